"""Sampling fields of requests under OpenAI's, llama.cpp's and vLLM's names → SamplingParams."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from engine.api.llm import LLM
from engine.errors import InvalidRequestError
from engine.sampling.params import MAX_LOGIT_BIAS, SamplingParams
from engine.serve.errors import ApiError, as_api_error
from engine.serve.fields.body import Body, Integers, Strings
from engine.serve.fields.structure import FIELDS, Structure, structure_of
from engine.serve.settings import ServeSettings

NAMES: dict[str, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "typical_p": ("typical_p", "typical"),
    "repetition_penalty": ("repetition_penalty", "repeat_penalty"),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "penalty_last_n": ("penalty_last_n", "repeat_last_n"),
    "seed": ("seed",),
    "stop": ("stop",),
    "stop_token_ids": ("stop_token_ids",),
    "ignore_eos": ("ignore_eos",),
    "n": ("n", "n_cmpl"),
    "free_logprobs": ("free_logprobs",),
}
"""Names that clients may use for each name of SamplingParams, the first one that is given counts."""
LENGTH_NAMES = ("max_completion_tokens", "max_tokens", "n_predict")

OTHER_SAMPLERS: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "dynatemp_range": (0, 0.0),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "top_n_sigma": (-1, -1.0, 0, 0.0),
    "adaptive_target": (-1, -1.0),
    "use_beam_search": (False,),
    "best_of": (1,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (-1,),
    "logits_processors": ([],),
}
"""Fields of samplers that the engine does not have, with the values that switch them off."""
FORMS: dict[str, tuple[Any, ...]] = {
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
}
"""Fields beside those of engine/serve/fields/structure.py that would change the form of an answer."""
TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


class StreamOptions(Body):
    """What a stream has beside the text."""

    include_usage: bool = False


class SamplingFields(Body):
    """What all endpoints that generate take."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {**OTHER_SAMPLERS, **FORMS, **TOOLS}

    model: str | None = None
    stream: bool = False
    timeout: float | None = Field(None, gt=0, description="seconds that the request may take, waiting included")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    typical: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_last_n: int | None = None
    repeat_last_n: int | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    n_cmpl: int | None = None
    free_logprobs: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n_predict: int | None = None
    logit_bias: dict[str, Any] | list[Any] | None = None
    response_format: Any = None
    grammar: Any = None
    json_schema: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    return_progress: bool = False
    timings_per_token: bool = False


_MOST_BIAS_TEXT = 1 << 14


def structure_in(body: SamplingFields, **more: Any) -> Structure:
    """What the answer has to be.

    Args:
        body: the request.
        more: fields that only its endpoint has, by the names of engine.serve.fields.structure.FIELDS, "_" for ".".

    Raises:
        ApiError: see structure_of().
    """
    given = {name: getattr(body, name) for name in FIELDS if name in SamplingFields.model_fields}
    return structure_of({**given, **{name.replace("_", "."): value for name, value in more.items()}})


def params_of(body: SamplingFields, settings: ServeSettings, llm: LLM, **given: Any) -> SamplingParams:
    """The sampling parameters that a request asks for, with the server's own where it says nothing.

    Args:
        body: the request.
        settings: of the server.
        llm: the model, for its tokenizer.
        given: parameters that the endpoint has worked out itself, by the names of SamplingParams.

    Raises:
        ApiError: 400; names the field as the client wrote it.
    """
    values: dict[str, Any] = dict(settings.sampling)
    used: dict[str, str] = {}
    for name, aliases in NAMES.items():
        for alias in aliases:
            value = getattr(body, alias)
            if value is not None:
                values[name], used[name] = value, alias
                break
    if values.get("seed") == -1:
        values["seed"] = None
    if values.get("top_k") == -1:  # as vLLM says "off"
        values["top_k"] = 0
    if body.logit_bias:
        values["logit_bias"] = _bias(body.logit_bias, llm)
        used["logit_bias"] = "logit_bias"
    values["max_tokens"] = settings.max_tokens
    for alias in LENGTH_NAMES:
        value = getattr(body, alias)
        if value is not None:
            values["max_tokens"], used["max_tokens"] = (None if value == -1 else value), alias
            break
    values.update(given)
    return make_params(values, used, llm)


def make_params(values: Mapping[str, Any], used: Mapping[str, str], llm: LLM) -> SamplingParams:
    """SamplingParams, checked against a model; an error names the field as the client wrote it."""
    try:
        params = SamplingParams(**values)
        params.check_vocabulary(llm.model.config.vocab_size)
        return params
    except InvalidRequestError as error:
        raise as_api_error(error, {name: used.get(name, name) for name in SamplingParams.names()}) from None


def _bias(given: Any, llm: LLM) -> dict[int, float]:
    """Numbers by token id; a text means all of its tokens, and false forbids a token."""
    # Before anything else is done: this runs in the event loop, and a text of a megabyte takes a second to encode.
    if len(given) > MAX_LOGIT_BIAS:
        raise _wrong_bias(f"logit_bias has {len(given)} entries; allowed: at most {MAX_LOGIT_BIAS}")
    pairs = list(given.items()) if isinstance(given, dict) else given
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not _is_number_or(str, pair[0]):
            raise _wrong_bias("logit_bias has entries [token, bias], the token an id or a text")
        if pair[1] is not False and not _is_number_or(float, pair[1]):
            raise _wrong_bias(f"logit_bias has {reprlib.repr(pair[1])} for {pair[0]!r:.80}; a number or false")
    n = sum(len(pair[0]) for pair in pairs if isinstance(pair[0], str))
    if n > _MOST_BIAS_TEXT:
        raise _wrong_bias(f"logit_bias has texts of {n} characters; allowed: at most {_MOST_BIAS_TEXT}")
    found: dict[int, float] = {}
    for key, bias in pairs:
        number = -math.inf if bias is False else float(bias)
        if isinstance(key, str) and not key.isdecimal():
            ids = llm.tokenizer.encode(key, add_special=False)
        else:
            try:
                ids = [int(key)]
            except (ValueError, OverflowError):
                raise _wrong_bias(f"logit_bias names the token {key!r:.80}") from None
        found.update(dict.fromkeys(ids, number))
    return found


def _is_number_or(other: type, value: Any) -> bool:
    return isinstance(value, (int, float, other)) and not isinstance(value, bool)


def _wrong_bias(message: str) -> ApiError:
    return ApiError(400, message, param="logit_bias", code="invalid_value")
