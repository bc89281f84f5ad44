"""The model on its device, as the scheduler sees it: work in, tokens out.

Runner is the protocol; CpuRunner joins the CPU backend with the host sampler; open_runner chooses the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig, cache_size
from engine.cpu.backend import CpuBackend
from engine.cpu.bandwidth import read_bandwidth
from engine.cpu.kv_cache import page_count
from engine.cpu.threads import ThreadPool, default_threads
from engine.errors import DeviceError, EngineError
from engine.model.batch import Batch, Outputs
from engine.model.config import ModelConfig
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.request import Sequence as RunningSequence
from engine.request import TokenSample, Work
from engine.sampling.logprobs import score_tokens
from engine.sampling.sampler import sample

log = logging.getLogger("engine")

LOGITS_CHUNK = 512
"""Tokens fed at once where logits of a whole text are asked for."""

DEFAULT_SEQUENCES, GPU_SEQUENCES = 8, 64
"""Sequences side by side where nobody says."""

PREFILL_CHUNK, MIXED_CHUNK = 512, 64
"""Prompt tokens of a step on the CPU, alone and beside decoding sequences: 64 cost as much as ten decode steps."""

_GPU_TRACES = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvmap")


class Runner(Protocol):
    """One model with its cache on one device. Called by one thread at a time."""

    config: ModelConfig
    context_length: int
    max_sequences: int
    device_name: str
    threads: int | None
    n_pages: int  # pages of the cache that the scheduler may hand out
    prefill_chunk: int  # prompt tokens of a step in which nobody decodes
    mixed_chunk: int  # prompt tokens of a step beside decoding sequences
    lookahead: int  # positions behind a decoding sequence's token that may be written as well, where it has pages

    def step(self, work: Sequence[Work]) -> Sequence[TokenSample | EngineError | None]:
        """Feed each item's tokens, append to the caches, and draw a token where item.sample says so.

        Every sequence has pages for all tokens fed, and those written to are its alone. Where rows go depends on the
        items alone, so that an interrupted step can be repeated. What makes one draw impossible (a bias that forbids
        every token) is returned in its place; the others go on. If a step raises, no item counts as done.
        """

    def score(self, work: Work) -> list[TokenSample]:
        """Feed one item's tokens like step(), without drawing; for each the log-probability of the next prompt token.

        work.sequence.prompt_ids holds it; params.prompt_logprobs says how many alternatives to name.
        """

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """(T, V) float32 logits of a fresh sequence, in a place of its own."""

    def release(self, slot: int) -> None:
        """The slot's sequence has left it; its pages may be given to another at once."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages of the cache, (source, target) each, keys and values of all layers."""

    def save_pages(self, pages: Sequence[int]) -> Any:
        """What pages hold, kept outside the cache, bit for bit."""

    def load_pages(self, saved: Any, pages: Sequence[int]) -> None:
        """Put back what save_pages() kept, into as many pages."""

    def memory_plan(self) -> MemoryPlan:
        """What the open model takes."""

    def read_bandwidth(self) -> float | None:
        """Measured bytes per second that the device reads from its memory; None where it is not known."""

    def close(self) -> None:
        """Free everything on the device."""


class CpuRunner:
    """The CPU backend with sampling on the host.

    Args:
        model: the loaded model.
        context_length: tokens of one sequence.
        kv_type: "f16" or "f32".
        max_sequences: sequences side by side; None takes DEFAULT_SEQUENCES. One more slot is kept for logits().
        cache_tokens: positions of all sequences together; None takes CONTEXTS whole contexts.
        prefill_chunk: most prompt tokens of a step; None takes PREFILL_CHUNK.
        threads: None takes the physical cores.
        status: told about compilation.
        exact, repack: see EngineConfig.
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
        threads: int | None,
        status: Callable[[str], None],
        exact: bool = False,
        repack: bool = True,
    ) -> None:
        self.config = model.config
        self.context_length = context_length
        self.max_sequences = max_sequences or DEFAULT_SEQUENCES
        self.n_pages = page_count(cache_size(cache_tokens, context_length, self.max_sequences))
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK
        self.mixed_chunk = min(MIXED_CHUNK, self.prefill_chunk)
        self.lookahead = 0
        self._backend = CpuBackend(
            model,
            context_length=context_length,
            kv_type=kv_type,
            max_sequences=self.max_sequences + 1,
            n_pages=self.n_pages + page_count(context_length),
            threads=threads,
            quantize=not exact,
            repack=repack,
        )
        # logits() has pages of its own, behind those of the scheduler; they take memory only when they are used.
        self._scratch_pages = range(self.n_pages, self.n_pages + page_count(context_length))
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
            )
            for item in work
        )
        rows = iter(self._backend.forward(batch))
        return [_draw(next(rows), item.sequence) if item.sample else None for item in work]

    def score(self, work: Work) -> list[TokenSample]:
        """See Runner.score."""
        sequence, samples = work.sequence, list[TokenSample]()
        first, n_top = work.start + 1, sequence.params.prompt_logprobs or 0
        for rows in self._backend.logit_chunks(_batch(sequence.slot, work.token_ids, work.start, sequence.pages)):
            samples.extend(score_tokens(rows, sequence.prompt_ids[first : first + len(rows)], n_top))
            first += len(rows)
        return samples

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See Runner.logits."""
        slot, pages = self.max_sequences, self._scratch_pages
        parts = [
            self._backend.forward(_batch(slot, token_ids[start : start + LOGITS_CHUNK], start, pages))
            for start in range(0, len(token_ids), LOGITS_CHUNK)
        ]
        return np.concatenate(parts)

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

    def close(self) -> None:
        """See Runner.close."""
        self._backend.close()


def _draw(logits: npt.NDArray[np.float32], sequence: RunningSequence) -> TokenSample | EngineError:
    history = sequence.prompt_ids + sequence.output_ids if sequence.params.penalizes else ()
    try:
        return sample(
            logits, sequence.params, history=history, output_index=len(sequence.output_ids), seed=sequence.seed
        )
    except EngineError as error:
        return error


def _batch(slot: int, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> Batch:
    """Tokens of one sequence, logits wanted for all of them."""
    return Batch.build([(slot, token_ids, start, Outputs.ALL, pages)])


def open_runner(config: EngineConfig, model: LoadedModel, status: Callable[[str], None]) -> Runner:
    """Put a loaded model on the device that the configuration asks for.

    Raises:
        DeviceError: a GPU was asked for by name and cannot be used; says why and what to install.
    """
    context_length = config.resolve_context(model.config.context_length)
    if context_length > model.config.context_length:
        log.warning(
            "context_length %d is more than the %d tokens the model was trained for; expect worse text beyond them",
            context_length,
            model.config.context_length,
        )
    if choose_device(config.device, config.device_index, model) == "cuda":
        from engine.cuda.runner import CudaRunner

        return CudaRunner(
            model,
            context_length=context_length,
            kv_type=config.kv_type,
            max_sequences=config.max_sequences or GPU_SEQUENCES,
            cache_tokens=config.cache_tokens,
            prefill_chunk=config.prefill_chunk,
            deterministic=config.deterministic,
            device_index=config.device_index,
            status=status,
            eager=config.eager,
        )
    return CpuRunner(
        model,
        context_length=context_length,
        kv_type=config.kv_type,
        max_sequences=config.max_sequences,
        cache_tokens=config.cache_tokens,
        prefill_chunk=config.prefill_chunk,
        threads=config.threads,
        status=status,
        exact=config.exact,
        repack=config.repack,
    )


def plan_memory(model: LoadedModel, config: EngineConfig) -> tuple[str, MemoryPlan]:
    """Device and memory that open_runner would take, without taking either; a plan for a GPU needs none."""
    context_length = config.resolve_context(model.config.context_length)
    if config.device.startswith("cuda") or choose_device(config.device, config.device_index, model) == "cuda":
        from engine.cuda.plan import make_plan, memory_plan

        plan = make_plan(
            model,
            context_length=context_length,
            kv_type=config.kv_type,
            max_sequences=config.max_sequences or GPU_SEQUENCES,
            cache_tokens=config.cache_tokens,
            prefill_chunk=config.prefill_chunk,
        )
        return "cuda", memory_plan(plan)
    backend = CpuBackend(
        model,
        context_length=context_length,
        kv_type=config.kv_type,
        max_sequences=config.max_sequences or DEFAULT_SEQUENCES,
        n_pages=page_count(cache_size(config.cache_tokens, context_length, config.max_sequences or DEFAULT_SEQUENCES)),
        quantize=not config.exact,
        repack=config.repack,
    )
    try:
        return "cpu", backend.memory_plan()
    finally:
        backend.close()


def choose_device(device: str, index: int = 0, model: LoadedModel | None = None) -> str:
    """What was asked for as "cpu" or "cuda".

    With "auto" a machine that shows no trace of a GPU gets the CPU in silence; one that has a GPU which cannot be used,
    or lacks kernels for a part of the model, gets it with a warning that says what is missing.

    Raises:
        DeviceError: a GPU was asked for by name and cannot be used.
    """
    if device == "cpu" or (device == "auto" and not any(Path(trace).exists() for trace in _GPU_TRACES)):
        return "cpu"
    from engine.cuda import availability

    reason = availability(index)
    if reason is None and model is not None and device == "auto":
        reason = _missing_on_gpu(model)
    if reason is None:
        return "cuda"
    if device != "auto":
        raise DeviceError(f"device {device!r} cannot be used: {reason}")
    log.warning("running on the CPU: %s", reason)
    return "cpu"


def _missing_on_gpu(model: LoadedModel) -> str | None:
    """Why the GPU cannot run a model, or None."""
    from engine.cuda.features import missing_features

    missing = missing_features(model)
    return f"the GPU has no kernels yet for {', '.join(missing)}" if missing else None
