"""What a model takes on the GPU, computed without one, and whether it fits what is free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.attention import scratch_bytes
from engine.cuda.buffers import Widths
from engine.cuda.cache import bytes_per_page, page_count
from engine.cuda.dense import SCRATCH_BYTES
from engine.cuda.features import check_features
from engine.cuda.layouts import LAYOUTS, packed_bytes
from engine.cuda.weights import attention_shape
from engine.errors import DeviceError
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan

PREFILL_ROWS = 512
"""Rows of a prompt that run at once; longer pieces are cut."""

LOGIT_ROWS = 32
"""Rows of logits of a prompt computed at once, where they are asked for."""

_REFERENCE_CARD = (90, 132)  # compute capability and multiprocessors of an H100/H200, where no card is there to ask
_RESERVE = 384 << 20  # cuBLAS workspace, captured graphs, loaded kernels


@dataclass(frozen=True)
class DevicePlan:
    """Bytes per part, and the slots they buy.

    Attributes:
        weights: packed weights. cache: keys and values of all slots. activations: every other buffer.
        per_slot: cache bytes of one slot. per_page: of one page of all layers.
        slots: sequences side by side.
    """

    weights: int
    activations: int
    per_slot: int
    per_page: int
    slots: int

    @property
    def cache(self) -> int:
        """Keys and values of all slots."""
        return self.per_slot * self.slots

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
    card: tuple[int, int] = _REFERENCE_CARD,
) -> DevicePlan:
    """The plan of a model; needs no GPU.

    Args:
        model: the loaded file.
        context_length: positions of one slot.
        kv_type: "f16" or "f32".
        max_sequences: slots.
        card: compute capability (90 = 9.0) and number of multiprocessors.

    Raises:
        DeviceError: a part of the model has no GPU kernels.
    """
    check_features(model)
    widths = Widths.of(model.config)
    shapes = [attention_shape(layer.attention, kv_type == "f16") for layer in model.config.layers]
    per_page = bytes_per_page(shapes)
    activations = (
        max_sequences * widths.row_bytes(dense=False)
        + PREFILL_ROWS * widths.row_bytes(dense=True)
        + SCRATCH_BYTES
        + 4 * widths.vocab * (max_sequences * 3 + LOGIT_ROWS)
        + sum(scratch_bytes(shape, max_sequences, *card) for shape in set(shapes))
    )
    return DevicePlan(
        weights=_weight_bytes(model),
        activations=activations,
        per_slot=per_page * page_count(context_length),
        per_page=per_page,
        slots=max_sequences,
    )


def _weight_bytes(model: LoadedModel) -> int:
    total = 0
    for info in model.gguf.tensors.values():
        if len(info.shape) > 1 and info.type in LAYOUTS:
            rows = info.shape[-2]
            matrices = info.n_elements // (rows * info.shape[-1])
            total += matrices * packed_bytes(info.type, rows, info.shape[-1])
        else:
            total += 4 * info.n_elements
    return total


def fit(plan: DevicePlan, free: int, context_length: int, page: int) -> DevicePlan:
    """The plan with as many of its slots as fit.

    Raises:
        DeviceError: not even one slot fits; says what is needed, what is free and the largest context that fits.
    """
    without_cache = plan.total - plan.cache
    slots = min(plan.slots, max(0, free - without_cache) // plan.per_slot)
    if slots >= 1:
        return DevicePlan(plan.weights, plan.activations, plan.per_slot, plan.per_page, int(slots))
    pages = max(0, free - without_cache) // plan.per_page
    remedy = (
        f"the largest context that fits is {pages * page} tokens (context_length={pages * page})"
        if pages
        else "not even the weights fit: use a smaller quantization or device='cpu'"
    )
    raise DeviceError(
        f"the model needs {_gib(without_cache + plan.per_slot)} of GPU memory with {context_length} tokens of context "
        f"(weights {_gib(plan.weights)}, cache {_gib(plan.per_slot)}, buffers {_gib(without_cache - plan.weights)}), "
        f"{_gib(free)} are free: {remedy}"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"


def memory_plan(plan: DevicePlan, context_length: int) -> MemoryPlan:
    """The same in the terms that every device shares."""
    return MemoryPlan(
        weights_bytes=plan.weights,
        kv_bytes=plan.cache,
        scratch_bytes=plan.activations + _RESERVE,
        kv_bytes_per_token=plan.per_slot // max(context_length, 1),
    )
