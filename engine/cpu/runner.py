"""The CPU backend joined with the sampler on the host: the Runner of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import STATE_BORDER, cache_size, checkpoint_count, page_count
from engine.cpu.backend import CpuBackend
from engine.cpu.bandwidth import read_bandwidth
from engine.cpu.threads import ThreadPool, default_threads
from engine.errors import EngineError, InvalidRequestError
from engine.model.batch import Batch, Outputs
from engine.model.brick_time import BrickTime
from engine.model.cache import StateStore
from engine.model.config import Pooling
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.model.pooling import pooled
from engine.request import ActiveSequence, TokenSample, Work
from engine.sampling.logprobs import score_tokens
from engine.sampling.sampler import sample

LOGITS_CHUNK = 512
"""Tokens fed at once where logits of a whole text are asked for."""

DEFAULT_SEQUENCES = 8
"""Sequences that run side by side unless the caller sets max_sequences."""

PREFILL_CHUNK, MIXED_CHUNK = 512, 64
"""Prompt tokens of a step, alone and beside decoding sequences: 64 cost as much as ten decode steps."""

TEXT_TOKENS, MOST_TEXTS = 1024, 64
"""See Runner.text_tokens: each text takes a page of the cache at least."""

SHORTEST_PIECE = 2
"""See Runner.shortest_piece: two rows of one step take less than two steps, which read all weights twice."""


class CpuRunner:
    """The CPU backend with sampling on the host.

    Args:
        model: the loaded model.
        context_length: tokens of one sequence.
        kv_type: "f16" or "f32".
        max_sequences: sequences side by side; None takes DEFAULT_SEQUENCES. One more slot is kept for logits().
        cache_tokens: positions of all sequences together; None takes CONTEXTS whole contexts.
        prefill_chunk: most prompt tokens of a step; None takes PREFILL_CHUNK.
        checkpoints: copies of recurrent states kept for later prompts; None takes what config.checkpoint_count says.
        threads: None takes the physical cores.
        status: called with what is being compiled.
        activation_bits: 8, 16, or None for float32.
        repack: see EngineConfig.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        context_length: int,
        kv_type: str,
        max_sequences: int | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int | None = None,
        checkpoints: int | None = None,
        threads: int | None,
        status: Callable[[str], None],
        activation_bits: int | None = None,
        repack: bool = True,
    ) -> None:
        self.config = model.config
        self.context_length = context_length
        generates = model.config.generates
        self.max_sequences = (max_sequences or DEFAULT_SEQUENCES) if generates else 1
        self.n_pages = page_count(cache_size(cache_tokens, context_length, self.max_sequences)) if generates else 1
        scratch_pages = page_count(context_length) if generates else 0
        self.prefill_chunk = max(prefill_chunk or PREFILL_CHUNK, STATE_BORDER if model.config.state_bytes else 1)
        self.mixed_chunk = min(MIXED_CHUNK, self.prefill_chunk)
        self.mixed_per_sequence = 0
        self.shortest_piece = SHORTEST_PIECE
        self.known_room: Callable[[int, int], int] | None = None
        self.lookahead = 0
        self.text_tokens, self.most_texts = TEXT_TOKENS, MOST_TEXTS
        self._backend = CpuBackend(
            model,
            context_length=context_length,
            kv_type=kv_type,
            max_sequences=self.max_sequences + 1,
            n_pages=self.n_pages + scratch_pages,
            checkpoints=checkpoint_count(checkpoints, self.max_sequences),
            threads=threads,
            activation_bits=activation_bits,
            repack=repack,
        )
        # logits() has pages of its own, after those of the scheduler; they take memory only when they are used.
        self._scratch_pages = range(self.n_pages, self.n_pages + scratch_pages)
        self._backend.warm_up(status)
        self.threads: int | None = threads if threads is not None else default_threads()
        self.device_name = "cpu"

    def step(self, work: Sequence[Work]) -> list[TokenSample | EngineError | None]:
        """See Runner.step."""
        batch = Batch.build(
            (
                item.sequence.slot,
                item.token_ids,
                item.start,
                Outputs.LAST if item.sample else Outputs.NONE,
                item.sequence.pages,
                item.sequence.state_place,
            )
            for item in work
        )
        rows = iter(self._backend.forward(batch))
        return [_draw(next(rows), item.sequence) if item.sample else None for item in work]

    def score(self, work: Work) -> list[TokenSample]:
        """See Runner.score."""
        sequence, samples = work.sequence, list[TokenSample]()
        first, n_top = work.start + 1, sequence.params.prompt_logprobs or 0
        batch = _batch(sequence.slot, work.token_ids, work.start, sequence.pages, sequence.state_place)
        for rows in self._backend.logit_chunks(batch):
            samples.extend(score_tokens(rows, sequence.prompt_ids[first : first + len(rows)], n_top))
            first += len(rows)
        return samples

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See Runner.logits."""
        slot, pages = self.max_sequences, self._scratch_pages
        parts = [
            self._backend.forward(_batch(slot, token_ids[start : start + LOGITS_CHUNK], start, pages, place))
            for place, start in enumerate(range(0, len(token_ids), LOGITS_CHUNK))
        ]
        return np.concatenate(parts)

    def vectors(self, texts: Sequence[Sequence[int]], pooling: Pooling) -> list[npt.NDArray[np.float32]]:
        """See Runner.vectors."""
        return [pooled(text, pooling) for text in self._backend.vectors(texts)]

    @property
    def states(self) -> StateStore | None:
        """See Runner.states."""
        return self._backend.cache.states

    def release(self, slot: int) -> None:
        """See Runner.release."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See Runner.copy_pages."""
        self._backend.cache.copy_pages(pairs)

    def save_pages(self, pages: Sequence[int]) -> Any:
        """See Runner.save_pages."""
        return self._backend.cache.save_pages(pages)

    def load_pages(self, saved: Any, pages: Sequence[int]) -> None:
        """See Runner.load_pages."""
        self._backend.cache.load_pages(saved, pages)

    def memory_plan(self) -> MemoryPlan:
        """See Runner.memory_plan."""
        return self._backend.memory_plan()

    def read_bandwidth(self) -> float | None:
        """See Runner.read_bandwidth."""
        with ThreadPool(self.threads) as pool:
            return read_bandwidth(pool).median

    def profile(self, depth: int, n_rows: int) -> list[BrickTime]:
        """See Runner.profile."""
        raise InvalidRequestError("a profile needs a GPU; the model runs on the cpu: open it on device 'cuda'")

    def close(self) -> None:
        """See Runner.close."""
        self._backend.close()


def _draw(logits: npt.NDArray[np.float32], sequence: ActiveSequence) -> TokenSample | EngineError:
    history = sequence.prompt_ids + sequence.output_ids if sequence.params.penalizes else ()
    try:
        return sample(
            logits,
            sequence.params,
            history=history,
            output_index=len(sequence.output_ids),
            seed=sequence.seed,
            allowed=None if sequence.mask is None else sequence.mask.bits(sequence.output_ids),
        )
    except EngineError as error:
        return error


def _batch(slot: int, token_ids: Sequence[int], start: int, pages: Sequence[int], place: int) -> Batch:
    """Tokens of one sequence, logits wanted for all of them."""
    return Batch.build([(slot, token_ids, start, Outputs.ALL, pages, place)])
