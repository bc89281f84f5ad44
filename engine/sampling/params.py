"""The sampling settings of one request and the ranges they may take; check_vocabulary() compares them with a model."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from engine.errors import InvalidRequestError
from engine.frozen import FrozenDict
from engine.sampling.constraint import Constraint

MAX_LOGPROBS = 32
MAX_SAMPLES = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_SEED = 2**64 - 1
SMALLEST_TEMPERATURE = 1e-30
"""Smaller ones count as 0: no two different logits are so close, and float32 cannot hold much smaller numbers."""


def _fail(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r}; allowed: {allowed}")


def _integer(name: str, value: Any, low: int, high: int | None, allowed: str) -> int:
    if isinstance(value, bool):
        raise _fail(name, value, allowed)
    try:
        number = operator.index(value)
    except TypeError:
        raise _fail(name, value, allowed) from None
    if number < low or (high is not None and number > high):
        raise _fail(name, value, allowed)
    return number


def _real(name: str, value: Any, low: float, high: float, allowed: str, *, open_low: bool = False) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise _fail(name, value, allowed)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _fail(name, value, allowed) from None
    if not low <= number <= high or (open_low and number == low):
        raise _fail(name, value, allowed)
    return number


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next tokens are chosen and when to stop. Cannot be changed, can be hashed; equal ones have equal hashes.

    Attributes:
        n: samples to generate for the prompt, with the seeds seed, seed + 1, ...
        max_tokens: tokens to generate at most; None = until an end token or the context is full.
        temperature: divides the logits; 0 = always the most probable token.
        top_k: keep the k most probable tokens; 0 = off.
        top_p: keep the smallest set of most probable tokens that reaches this probability; 1 = off.
        min_p: drop tokens less probable than this share of the most probable one; 0 = off.
        typical_p: keep the tokens whose surprise is closest to the expected one, up to this probability; 1 = off.
        repetition_penalty: divides positive and multiplies negative logits of recent tokens; 1 = off.
        presence_penalty: subtracted once from the logit of every recent token.
        frequency_penalty: subtracted once per occurrence.
        penalty_last_n: how many of the last tokens (prompt included) are recent; -1 = all, 0 = none.
        logit_bias: token id -> number added to its logit; -inf forbids the token.
        seed: key of the random numbers; None = a fresh one, which the result names.
        stop: strings that end the text; they are not part of it. A single string is accepted.
        stop_token_ids: tokens that end the text.
        ignore_eos: go on after the model's end-of-generation tokens.
        logprobs: report the log-probability of each generated token and of the n best; None = off.
        prompt_logprobs: the same for the prompt's tokens.
        constraint: what the text has to be, e.g. JsonSchema(...); tokens that it does not allow are never drawn.
        free_logprobs: with a constraint, report the log-probabilities that the tokens would have without it.

    Raises:
        InvalidRequestError: a value is out of its range; the text quotes both.
    """

    n: int = 1
    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    free_logprobs: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("n", _integer("n", self.n, 1, MAX_SAMPLES, f"1 to {MAX_SAMPLES}"))
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 0, None, "None or an integer of at least 0"))
        temperature = _real("temperature", self.temperature, 0.0, 1e4, "0 (greedy) to 10000")
        put("temperature", temperature if temperature >= SMALLEST_TEMPERATURE else 0.0)
        put("top_k", _integer("top_k", self.top_k, 0, None, "0 (off) or an integer of at least 1"))
        put("top_p", _real("top_p", self.top_p, 0.0, 1.0, "above 0 and at most 1 (off)", open_low=True))
        put("min_p", _real("min_p", self.min_p, 0.0, 1.0, "0 (off) to 1"))
        put("typical_p", _real("typical_p", self.typical_p, 0.0, 1.0, "above 0 and at most 1 (off)", open_low=True))
        put("repetition_penalty", _real("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "0.01 to 100"))
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, _real(name, getattr(self, name), -100.0, 100.0, "-100 to 100"))
        put(
            "penalty_last_n",
            _integer("penalty_last_n", self.penalty_last_n, -1, None, "-1 (all), 0 (none) or a number of tokens"),
        )
        put("logit_bias", self._checked_bias(self.logit_bias))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, MAX_SEED, "None or 0 to 2**64 - 1"))
        put("stop", self._checked_stop(self.stop))
        ids = "token ids of at least 0"
        if not isinstance(self.stop_token_ids, Iterable) or isinstance(self.stop_token_ids, (str, bytes)):
            raise _fail("stop_token_ids", self.stop_token_ids, f"a list of {ids}")
        put("stop_token_ids", tuple(_integer("stop_token_ids", i, 0, None, ids) for i in self.stop_token_ids))
        for name in ("ignore_eos", "free_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise _fail(name, getattr(self, name), "True or False")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            kinds = ", ".join(kind.__name__ for kind in get_args(Constraint))
            raise _fail("constraint", self.constraint, f"None or one of {kinds}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                put(name, _integer(name, value, 0, MAX_LOGPROBS, f"None or 0 to {MAX_LOGPROBS}"))

    @staticmethod
    def _checked_bias(bias: Any) -> FrozenDict[int, float] | None:
        if bias is None:
            return None
        if not isinstance(bias, Mapping):
            raise _fail("logit_bias", bias, "a mapping of token id to number")
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias has {len(bias)} entries; allowed: at most {MAX_LOGIT_BIAS}")
        checked: dict[int, float] = {}
        for token_id, value in bias.items():
            key = _integer("a token id of logit_bias", token_id, 0, None, "integers of at least 0")
            allowed = "-1e6 to 1e6, or -inf to forbid the token"
            number = _real(f"logit_bias[{key}]", value, -math.inf, 1e6, allowed)
            if number < -1e6 and number != -math.inf:
                raise _fail(f"logit_bias[{key}]", value, allowed)
            checked[key] = number
        return FrozenDict(checked) if checked else None

    @staticmethod
    def _checked_stop(stop: Any) -> tuple[str, ...]:
        if stop is None:
            return ()
        if isinstance(stop, str):
            stop = (stop,)
        if not isinstance(stop, Iterable) or isinstance(stop, bytes):
            raise _fail("stop", stop, "a string or a list of strings")
        strings = tuple(stop)
        for text in strings:
            if not isinstance(text, str) or not text:
                raise _fail("stop", text, "strings of at least one character")
        if len(strings) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop has {len(strings)} strings; allowed: at most {MAX_STOP_STRINGS}")
        return strings

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, with no random number."""
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens generated so far change the logits."""
        return self.penalty_last_n != 0 and (
            self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids named here against a model's vocabulary.

        Raises:
            InvalidRequestError: an id of logit_bias or stop_token_ids is not in the vocabulary.
        """
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        f"{name} names token {token_id}; allowed: 0 to {vocab_size - 1} (the model's vocabulary)"
                    )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all settings, for command lines and JSON."""
        return tuple(field.name for field in fields(cls))
