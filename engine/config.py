"""Run-time settings of one open model, frozen once made.

Knows which values are possible; knows nothing of arrays, devices or requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidRequestError

KV_TYPES = ("f16", "f32")
PAGE = 64
"""Positions of one page of the key-value cache."""
MAX_SEQUENCES = 256
CONTEXTS = 8
"""Whole contexts that the cache holds without being asked."""
MAX_CONTEXT = 2**31 - 1
DEFAULT_CONTEXT_LIMIT = 8192
"""Longest context taken without being asked: a 128 k context of an 8B model would cost 16 GiB per sequence."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class EngineConfig:
    """How a model is opened.

    Attributes:
        model: the GGUF file (any part of a split file).
        device: "auto", "cpu", "cuda" or "cuda:N".
        context_length: tokens of one sequence, prompt and output together. None takes what the model was trained for,
            but at most DEFAULT_CONTEXT_LIMIT; a larger value than the trained one is allowed and logged.
        kv_type: number format of the key-value cache, "f16" or "f32".
        threads: CPU threads; None takes the physical cores.
        max_sequences: sequences that run side by side; further requests wait. None: 64 on a GPU, 8 on the CPU.
        cache_tokens: positions of the key-value cache, shared by all sequences; at least one whole context. None: eight
            contexts, or as many as the GPU's memory holds.
        prefill_chunk: most prompt tokens fed in one step; beside running streams the device may take fewer, so that a
            long prompt does not stop them. None: what suits the device.
        prefix_cache: keep the pages of prompts, so that a later prompt with the same beginning need not compute it, nor
            the second of several samples.
        deterministic: give a request the same tokens whatever runs beside it, also where that costs speed.
        exact: on the CPU, keep everything in float32. Otherwise activations are quantized to 8 bits, in blocks of 32,
            wherever weights are quantized, which is about three times as fast.
        repack: on the CPU, keep a second copy of quantized weights in the order that the kernels read them in; without
            it decoding is slower, and memory holds little more than the mapped file.
        strict: refuse a file with metadata keys or tensors of which nothing is known, instead of naming them in a
            warning.
        eager: on a GPU, launch decode steps kernel by kernel instead of replaying a captured graph (slower; for tests).

    Raises:
        InvalidRequestError: a value outside its range.
    """

    model: Path
    device: str = "auto"
    context_length: int | None = None
    kv_type: str = "f16"
    threads: int | None = None
    max_sequences: int | None = None
    cache_tokens: int | None = None
    prefill_chunk: int | None = None
    prefix_cache: bool = True
    deterministic: bool = False
    exact: bool = False
    repack: bool = True
    strict: bool = False
    eager: bool = False

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise InvalidRequestError(f"device is {self.device!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...")
        if self.kv_type not in KV_TYPES:
            raise InvalidRequestError(f"kv_type is {self.kv_type!r}; allowed: {', '.join(KV_TYPES)}")
        for name in ("context_length", "threads", "max_sequences", "cache_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequestError(f"{name} is {value!r}; a whole number of at least 1 is needed")
        if self.context_length is not None and self.context_length > MAX_CONTEXT:
            raise InvalidRequestError(f"context_length is {self.context_length}; allowed: 1 to {MAX_CONTEXT}")
        if self.max_sequences is not None and self.max_sequences > MAX_SEQUENCES:
            raise InvalidRequestError(f"max_sequences is {self.max_sequences}; allowed: 1 to {MAX_SEQUENCES}")

    @property
    def device_index(self) -> int:
        """The N of "cuda:N"; 0 where none is given."""
        _, _, index = self.device.partition(":")
        return int(index) if index else 0

    def resolve_context(self, trained: int) -> int:
        """The context length in force for a model that was trained with `trained` tokens.

        Raises:
            InvalidRequestError: cache_tokens is less than that.
        """
        context_length = self.context_length or min(trained, DEFAULT_CONTEXT_LIMIT)
        if self.cache_tokens is not None and self.cache_tokens < context_length:
            raise InvalidRequestError(
                f"cache_tokens is {self.cache_tokens}; it must hold one whole context of {context_length} tokens: "
                "ask for a larger cache_tokens or a smaller context_length"
            )
        return context_length


def on_pages(n_positions: int) -> int:
    """Positions of the whole pages that so many positions need."""
    return -(-n_positions // PAGE) * PAGE


def cache_size(cache_tokens: int | None, context_length: int, max_sequences: int) -> int:
    """Positions of the cache: what was asked for, or CONTEXTS contexts but no more than there are sequences."""
    return max(context_length, cache_tokens or min(CONTEXTS, max_sequences) * context_length)
