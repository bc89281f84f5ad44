"""All activations on the device, with their shapes; nothing else allocates while the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.cuda.launch_plan.widths import Widths
from engine.cuda.matrix.decode_gemm_plan import operand_bytes


class Activations:
    """Buffers of R rows. All float32 and C-contiguous.

    Attributes:
        x: (R, D) residual stream. qkv: (R, widest q+k+v). attention: (R, H*Hv). gate, up: (R, F).
        y: (R, D) output of one expert. total: (R, D) sum over experts.
        router: (R, E) scores. mix: (R, 1) score of the shared expert.
        chosen: int32 (R, U) experts of each row; chosen_weights: (R, U); hidden: (R, U * F), None where dense is True.
        normed, part, beside, inputs, queries, heads: see Widths; a column where nobody needs them.
        operand: bytes of one (R, K) float16 or float32 operand of a dense product; None where dense is False.
        expert_room: scratch memory of the experts of prompts; None where there are none of that kind.
        batch_operand: scratch memory of MatVec's products of many rows; None where dense is True.
        stream_operand: x as such products read it, left by the one before; likewise.
    """

    def __init__(self, widths: Widths, rows: int, *, dense: bool, expert_room: int = 0) -> None:
        import cupy

        def floats(width: int) -> Any:
            return cupy.zeros((rows, max(width, 1)), cupy.float32)

        self.rows = rows
        self.widths = widths
        self.x = floats(widths.model)
        self.y = floats(widths.model if widths.experts else 0)
        self.total = floats(widths.model if widths.experts else 0)
        self.qkv = floats(widths.qkv)
        self.attention = floats(widths.attention)
        self.gate = floats(widths.ffn)
        self.up = floats(widths.ffn)
        self.router = floats(widths.experts)
        self.mix = floats(1)
        self.chosen = cupy.zeros((rows, max(widths.used, 1)), cupy.int32)
        self.chosen_weights = floats(widths.used)
        self.hidden = None if dense else floats(widths.hidden)
        self.normed, self.part, self.beside = floats(widths.normed), floats(widths.part), floats(widths.beside)
        self.inputs, self.queries, self.heads = floats(widths.inputs), floats(widths.queries), floats(widths.heads)
        widest = widths.widest
        self.operand = cupy.empty(rows * widest * 4, cupy.uint8) if dense else None
        self.expert_room = cupy.empty(expert_room, cupy.uint8) if expert_room else None
        self.batch_operand = None if dense else cupy.empty(operand_bytes(widest), cupy.uint8)
        self.stream_operand = None if dense else cupy.empty(operand_bytes(widths.model), cupy.uint8)

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        arrays: Sequence[Any] = [value for value in vars(self).values() if hasattr(value, "nbytes")]
        return sum(int(array.nbytes) for array in arrays)
