"""Requests from what callers give: prompts become token ids, parameters are checked, what cannot run is refused.

Knows the model's vocabulary and context; knows nothing of steps or devices.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from engine.api.prompts import Prompt, check_id, is_prompt_like, not_a_prompt
from engine.errors import ContextFullError, InvalidRequestError, TokenizerError
from engine.model.config import ModelConfig
from engine.request import Request
from engine.sampling.constraint import TokenMask
from engine.sampling.opening import Opening
from engine.sampling.params import MAX_SEED, SamplingParams
from engine.sampling.rng import fresh_seed
from engine.scheduling.job import Job
from engine.scheduling.output import OutputAssembler
from engine.text import AnswerRules, Tokenizer

if TYPE_CHECKING:
    from engine.constraints import ConstraintCompiler


class Requests:
    """Makes the jobs of one open model.

    Args:
        tokenizer: of the model, or why there is none.
        model: its vocabulary, and whether it predicts tokens.
        context_length: tokens of one sequence.
    """

    def __init__(self, tokenizer: Tokenizer | str, model: ModelConfig, context_length: int) -> None:
        self._tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self._why_none = tokenizer if isinstance(tokenizer, str) else ""
        self._model = model
        self._vocab_size = model.vocab_size
        self._context_length = context_length
        self._ids = itertools.count(1)
        self._constraints: ConstraintCompiler | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerError: the file has none, or one that is not supported.
        """
        if self._tokenizer is None:
            raise TokenizerError(self._why_none)
        return self._tokenizer

    def require_generation(self) -> None:
        """Refuse to predict tokens where the model cannot.

        Raises:
            InvalidRequestError: it makes embeddings alone.
        """
        if not self._model.generates:
            raise InvalidRequestError(
                f"this model ({self._model.architecture}) makes embeddings and no text: use LLM.embed(), LLM.rerank(), "
                "`gguf-engine embed` or /v1/embeddings"
            )

    def scoring(self, chunks: Sequence[Sequence[int]], first: int) -> list[Job]:
        """Jobs that score every token of each chunk from position `first` on, and generate nothing.

        Raises:
            InvalidRequestError, ContextFullError: an impossible chunk, or no token behind `first`.
        """
        self.require_generation()
        checked = [self.checked(chunk) for chunk in chunks]
        for ids in checked:
            if len(ids) > self._context_length + 1:
                raise ContextFullError(len(ids) - 1, self._context_length)
            if not 1 <= first < len(ids):
                raise InvalidRequestError(
                    f"first is {first}; allowed: 1 to {len(ids) - 1} for a chunk of {len(ids)} tokens"
                )
        params = SamplingParams(prompt_logprobs=0)
        requests = [Request(next(self._ids), ids, params, 0, 0, score_from=first) for ids in checked]
        return [Job(request, OutputAssembler(request, None, ())) for request in requests]

    def samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        shown_ids: Collection[int] = (),
        opening: Opening | None = None,
        *,
        rules: AnswerRules | None = None,
        by_step: bool = False,
    ) -> list[Job]:
        """One job for each sample of a prompt: seeds from the first one on, pages shared."""
        first = self.job(prompt, params, by_step=by_step, shown_ids=shown_ids, opening=opening, rules=rules)
        jobs, request = [first], first.request
        for number in range(1, params.n):
            following = replace(
                request,
                request_id=next(self._ids),
                seed=(request.seed + number) % (MAX_SEED + 1),
                shares_with=request.request_id,
                mask=self._mask(params, opening, rules),
            )
            assembler = OutputAssembler(following, self._tokenizer, self._eog_ids, shown_ids)
            jobs.append(Job(following, assembler, by_step))
        return jobs

    @property
    def _eog_ids(self) -> Collection[int]:
        return self._tokenizer.eog_ids if self._tokenizer is not None else ()

    def job(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        by_step: bool = False,
        shown_ids: Collection[int] = (),
        opening: Opening | None = None,
        rules: AnswerRules | None = None,
    ) -> Job:
        """Check a request against the model and the context; refuses what cannot run.

        Args:
            prompt: text or token ids.
            params: sampling parameters.
            by_step: whether step() tells its chunks.
            shown_ids: control tokens that appear in the text by name.
            opening: what may come before a constrained text.
            rules: what the answer of a chat is held to.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"the settings of a request are SamplingParams; found {params!r}")
        self.require_generation()
        self.check_length(prompt)
        ids = self.prompt_ids(prompt)
        limit = self._context_length
        room = limit - len(ids)
        wanted = params.max_tokens if params.max_tokens is not None else max(room, 1)
        if wanted > room:
            parts = f"{len(ids)} of the prompt, {wanted} to generate"
            raise ContextFullError(len(ids) + wanted, limit, parts=parts)
        params.check_vocabulary(self._vocab_size)
        if params.stop:
            _ = self.tokenizer  # stop strings need text
        seed = params.seed if params.seed is not None else fresh_seed()
        score_from = 1 if params.prompt_logprobs is not None else None
        mask = self._mask(params, opening, rules)
        request = Request(next(self._ids), ids, params, seed, wanted, score_from, mask=mask)
        return Job(request, OutputAssembler(request, self._tokenizer, self._eog_ids, shown_ids), by_step)

    def _mask(self, params: SamplingParams, opening: Opening | None, rules: AnswerRules | None) -> TokenMask | None:
        """The mask of a request with a constraint, or of an answer that is held to something.

        Raises:
            InvalidRequestError: the constraint or the schema of a tool cannot be used.
        """
        if params.constraint is None and rules is None:
            return None
        calls = None if rules is None else rules.calls
        if rules is not None and (params.constraint is None or (calls is not None and calls.forced)):
            return self.compiler().answer_mask(rules)  # where calls are forced, there is no text to constrain
        assert params.constraint is not None, "one of the two"
        limit = rules if rules is not None and rules.max_reasoning is not None else None
        return self.compiler().mask(params.constraint, opening, calls, limit)

    def compiler(self) -> ConstraintCompiler:
        """What makes masks of constraints; imported and made when it is first needed."""
        if self._constraints is None:
            from engine.constraints import ConstraintCompiler  # a library that only these requests need

            self._constraints = ConstraintCompiler(self.tokenizer, self._vocab_size, self._eog_ids)
        return self._constraints

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt is to the model, checked; an empty prompt is the beginning-of-text token alone.

        Raises:
            InvalidRequestError: no prompt at all, an id outside the vocabulary, or an empty one where there is no such
                token.
        """
        if not is_prompt_like(prompt):
            raise not_a_prompt(prompt)
        ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids and self._tokenizer is not None and self._tokenizer.bos_id is not None:
            ids = [self._tokenizer.bos_id]
        return self.checked(ids)

    def check_length(self, prompt: Prompt) -> None:
        """Refuse a text that is too long however it is cut into tokens, before that is done: it may take a minute.

        Raises:
            ContextFullError: its length is that of the fewest tokens that it can have.
        """
        if isinstance(prompt, str) and self._tokenizer is not None:
            n = self._tokenizer.fewest_tokens(prompt)
            if n > self._context_length:
                raise ContextFullError(n, self._context_length, parts="at the least, of the prompt alone")

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a prompt, at least one, each in the vocabulary.

        Raises:
            InvalidRequestError: another one, or none.
        """
        if not ids:
            raise InvalidRequestError(
                "the prompt is empty and the model has no beginning-of-text token: give some text"
            )
        try:
            # At a tenth of the time of single checks: texts to embed may have millions of tokens.
            found = np.frombuffer(struct.pack(f"{len(ids)}I", *ids), np.uint32)
        except struct.error:  # something else than whole numbers, or a negative one
            return [check_id(token_id, self._vocab_size) for token_id in ids]
        if found.max() < self._vocab_size:
            whole: list[int] = found.tolist()
            return whole
        return [check_id(token_id, self._vocab_size) for token_id in ids]
