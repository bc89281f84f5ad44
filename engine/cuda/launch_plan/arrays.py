"""Every array that activations take, by phase, from the launch plan: what is allocated and what the memory plan counts.

Kernels read whole blocks of rows, so an array may have room for more rows than a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from engine.cuda.launch_plan.families import Family, Phase
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.widths import Widths
from engine.cuda.matrix import decode_gemm_plan, dense_plan, gemm_plan

_ITEM_BYTES = {"float32": 4, "int32": 4, "uint8": 1}


@dataclass(frozen=True)
class ArraySize:
    """A C-contiguous array on the device: shape, and the name of a numpy type."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def n_bytes(self) -> int:
        """Memory."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def activation_arrays(plan: LaunchPlan, phase: Phase) -> dict[str, ArraySize]:
    """Arrays of one phase by their names in load.buffers.Activations."""
    widths, prompts = Widths.of(plan), phase is Phase.PROMPT
    rows = plan.settings.prefill_rows if prompts else plan.decode_rows
    mixture = max(widths.model, widths.latent) if widths.experts else 0
    floats = {
        "x": widths.model,
        "y": mixture,
        "total": mixture,
        "qkv": widths.qkv,
        "attention": widths.attention,
        "gate": widths.ffn,
        "up": widths.ffn,
        "router": widths.experts,
        "mix": 1,
        "chosen_weights": widths.used,
        "normed": widths.normed,
        "part": widths.part,
        "beside": widths.beside,
        "inputs": widths.inputs,
        "index_inputs": widths.index_inputs,
        "index_queries": widths.index_queries,
        "kept": widths.kept,
        "embedded": widths.embedded,
        "layer_inputs": widths.per_layer,
        "layer_projected": widths.per_layer,
        "streams": widths.streams,
        "predicted": widths.predicted,
        "stream_gates": widths.stream_gates,
        "skip": widths.skip,
        "latent": 2 * widths.latent,
        "given": widths.given,
        "queries": widths.queries,
        "heads": widths.heads,
        "mixed": widths.mixed,
        "convolved": widths.convolved,
        "between": widths.between,
        "scanned": widths.scanned,
    }
    floats |= {"chunked": widths.chunked} if prompts else {"hidden": widths.hidden}
    found = {name: ArraySize((rows, max(width, 1))) for name, width in floats.items()}
    found["chosen"] = ArraySize((rows, max(widths.used, 1)), "int32")
    if plan.gemm_types if prompts else Family.STEP_GEMM in plan.step_families:
        # Hidden vectors may be left there as an operand.
        needed = -(-gemm_plan.operand_bytes(rows, widths.ffn) // (4 * max(widths.ffn, 1)))
        found["gate"] = ArraySize((max(rows, needed), max(widths.ffn, 1)))
    if prompts:
        found["operand"] = ArraySize((max(_operands(plan, rows), default=1),), "uint8")
        if room := plan.expert_room():
            found["expert_room"] = ArraySize((room,), "uint8")
    else:
        batch = decode_gemm_plan.operand_bytes(widths.widest)
        if Family.STEP_GEMM in plan.step_families:
            batch = max(batch, gemm_plan.operand_bytes(rows, widths.widest))
        found["batch_operand"] = ArraySize((batch,), "uint8")
        words = decode_gemm_plan.word_count(widths.ffn) if any(layer.leaves_hidden for layer in plan.layers) else 1
        found["operand_words"] = ArraySize((words,), "int32")
        found["stream_operand"] = ArraySize((decode_gemm_plan.operand_bytes(widths.model),), "uint8")
    return found


def _operands(plan: LaunchPlan, rows: int) -> Iterator[int]:
    """Bytes of the input of each product of prompts as its kernels read it."""
    for product in plan.products:
        if product.families.prompt is Family.PREFILL_GEMM:
            yield gemm_plan.operand_bytes(rows, product.columns)
        elif product.families.prompt is Family.DENSE:
            for type in product.types:
                yield dense_plan.operand_bytes(type, rows, product.columns, fixed_rows=plan.fixed_rows)


def array_bytes(plan: LaunchPlan) -> int:
    """Memory of the activations of both phases, and of the expanded weights of cuBLAS products."""
    arrays = (size for phase in Phase for size in activation_arrays(plan, phase).values())
    dense = dense_plan.scratch_bytes(fixed_rows=plan.fixed_rows) if plan.dense else 0
    return sum(size.n_bytes for size in arrays) + dense
