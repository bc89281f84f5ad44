"""What a model takes on the GPU, computed without one, and whether it fits what is free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import cache_size, page_count
from engine.cuda.attention.attention import PAGE, scratch_bytes
from engine.cuda.attention.cache import bytes_per_page
from engine.cuda.formats.layouts import kept_as, packed_bytes
from engine.cuda.load.buffers import Widths
from engine.cuda.load.features import check_features
from engine.cuda.load.needs import attention_shape, expert_room
from engine.cuda.matrix.decode_gemm import operand_bytes
from engine.cuda.matrix.dense import SCRATCH_BYTES
from engine.cuda.sampling.sampler import DeviceSampler
from engine.errors import DeviceError
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan

PREFILL_ROWS = (2048, 512)
"""Rows of prompts that run at once: the first whose activations leave room for all pages, else the last."""

MIXED_ROWS = 512
"""Rows of prompts beside running streams, which wait for them once a token."""


LOGIT_ROWS = 32
"""Rows of logits of a prompt computed at once, where they are asked for."""

_REFERENCE_CARD = (90, 132)  # compute capability and multiprocessors of an H100/H200, where no card is there to ask
_RESERVE = 384 << 20  # cuBLAS workspace, captured graphs, loaded kernels


@dataclass(frozen=True)
class DevicePlan:
    """Bytes per part, and the pages they buy.

    Attributes:
        weights: packed weights. activations: every buffer that is no weight and no cache.
        per_page: bytes of one page of all layers.
        pages: pages of the cache.
        least_pages: pages of one full context; with fewer the model is not opened.
        prefill_rows: rows of prompts that run at once.
    """

    weights: int
    activations: int
    per_page: int
    pages: int
    least_pages: int
    prefill_rows: int

    @property
    def cache(self) -> int:
        """Keys and values of all pages."""
        return self.per_page * self.pages

    @property
    def total(self) -> int:
        """Everything, with a reserve for what the libraries take."""
        return self.weights + self.cache + self.activations + _RESERVE


def make_plan(
    model: LoadedModel,
    *,
    context_length: int,
    kv_type: str,
    max_sequences: int,
    cache_tokens: int | None = None,
    prefill_chunk: int | None = None,
    card: tuple[int, int] = _REFERENCE_CARD,
) -> DevicePlan:
    """The plan of a model; needs no GPU.

    Args:
        model: the loaded file.
        context_length: positions of one sequence.
        kv_type: "f16" or "f32".
        max_sequences: slots.
        cache_tokens: positions of all sequences together; at least one context is planned.
        prefill_chunk: rows of prompts that run at once.
        card: compute capability (90 = 9.0) and number of multiprocessors.

    Raises:
        DeviceError: a part of the model has no GPU kernels.
    """
    check_features(model)
    widths = Widths.of(model)
    shapes = [attention_shape(layer.attention, kv_type == "f16") for layer in model.config.layers]
    rows = prefill_chunk or PREFILL_ROWS[0]
    activations = (
        max_sequences * (widths.row_bytes(dense=False) + 4 * widths.model)
        + rows * widths.row_bytes(dense=True)
        + expert_room(model, rows, max_sequences, card[0])
        + SCRATCH_BYTES
        + operand_bytes(widths.widest)
        + 4 * widths.vocab * (max_sequences + LOGIT_ROWS)
        + DeviceSampler.n_bytes(widths.vocab, context_length, max_sequences, max_sequences)
        + sum(scratch_bytes(shape, max_sequences, *card) for shape in set(shapes))
    )
    least = page_count(context_length)
    return DevicePlan(
        weights=_weight_bytes(model),
        activations=activations,
        per_page=bytes_per_page(shapes),
        pages=page_count(cache_size(cache_tokens, context_length, max_sequences)),
        least_pages=least,
        prefill_rows=rows,
    )


def _weight_bytes(model: LoadedModel) -> int:
    total = 0
    for info in model.gguf.tensors.values():
        if len(info.shape) > 1:
            rows = info.shape[-2]
            matrices = info.n_elements // (rows * info.shape[-1])
            total += matrices * packed_bytes(kept_as(info.type), rows, info.shape[-1])
        else:
            total += 4 * info.n_elements
    return total


def fit(plan: DevicePlan, free: int) -> DevicePlan:
    """The plan with as many of its pages as fit into `free` bytes.

    Raises:
        DeviceError: not even one full context fits; says what is needed, what is free and the largest that fits.
    """
    without_cache = plan.total - plan.cache
    pages = min(plan.pages, max(0, free - without_cache) // plan.per_page)
    if pages >= plan.least_pages:
        return replace(plan, pages=int(pages))
    remedy = (
        f"the largest context that fits is {pages * PAGE} tokens (context_length={pages * PAGE})"
        if pages
        else "not even the weights fit: use a smaller quantization or device='cpu'"
    )
    cache = plan.least_pages * plan.per_page
    raise DeviceError(
        f"the model needs {_gib(without_cache + cache)} of GPU memory with {plan.least_pages * PAGE} tokens of context "
        f"(weights {_gib(plan.weights)}, cache {_gib(cache)}, buffers {_gib(without_cache - plan.weights)}), "
        f"{_gib(free)} are free: {remedy}"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"


def memory_plan(plan: DevicePlan) -> MemoryPlan:
    """The same in the terms that every device shares."""
    return MemoryPlan(
        weights_bytes=plan.weights,
        kv_bytes=plan.cache,
        scratch_bytes=plan.activations + _RESERVE,
        kv_bytes_per_token=plan.per_page // PAGE,
    )
