"""All activations on the device, with their shapes; nothing else allocates while the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.cuda.batch_matvec import operand_bytes
from engine.model.config import FfnConfig, ModelConfig, MoeConfig


@dataclass(frozen=True)
class Widths:
    """Row widths of the activations of one model, the largest over its layers.

    Attributes:
        model: D. qkv: all of q, k and v. attention: H*Hv. ffn: F. experts: E, 0 without a mixture. vocab: V.
        used: experts of a row. hidden: hidden values of all of them.
    """

    model: int
    qkv: int
    attention: int
    ffn: int
    experts: int
    vocab: int
    used: int = 0
    hidden: int = 0

    @classmethod
    def of(cls, config: ModelConfig) -> Widths:
        """The widths of a model."""
        attention = [layer.attention for layer in config.layers]
        ffn, experts, used, hidden = 0, 0, 0, 0
        for layer in config.layers:
            if isinstance(layer.ffn, FfnConfig):
                ffn = max(ffn, layer.ffn.width)
            else:
                assert isinstance(layer.ffn, MoeConfig)
                shared = layer.ffn.shared.width if layer.ffn.shared else 0
                ffn = max(ffn, layer.ffn.expert.width, shared)
                experts = max(experts, layer.ffn.n_experts)
                used = max(used, layer.ffn.n_used)
                hidden = max(hidden, layer.ffn.n_used * layer.ffn.expert.width)
        return cls(
            model=config.width,
            qkv=max(a.n_heads * a.key_width + a.n_kv_heads * (a.key_width + a.value_width) for a in attention),
            attention=max(a.n_heads * a.value_width for a in attention),
            ffn=ffn,
            experts=experts,
            vocab=config.vocab_size,
            used=used,
            hidden=hidden,
        )

    def row_bytes(self, *, dense: bool) -> int:
        """Bytes Activations holds per row, without logits."""
        streams = 3 if self.experts else 1
        floats = streams * self.model + self.qkv + self.attention + 2 * self.ffn + 2 * self.experts + 1
        chosen = 0 if dense else 2 * self.used + self.hidden
        return 4 * (floats + chosen) + (4 * max(self.model, self.attention, self.ffn) if dense else 0)


class Activations:
    """Buffers of R rows. All float32 and C-contiguous.

    Attributes:
        x: (R, D) residual stream. qkv: (R, widest q+k+v). attention: (R, H*Hv). gate, up: (R, F).
        y: (R, D) output of one expert. total: (R, D) sum over experts.
        router, routing: (R, E) scores and weights. mix: (R, 1) score of the shared expert.
        chosen: int32 (R, U) experts of each row; chosen_weights: (R, U); hidden: (R, U * F); None where dense is True.
        operand: bytes of one (R, K) float16 or float32 operand of a dense product; None where dense is False.
        expert_room: scratch memory of the experts of prompts; None where there are none of that kind.
        batch_operand: scratch memory of MatVec's products of many rows; None where dense is True.
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
        self.routing = floats(widths.experts)
        self.mix = floats(1)
        self.chosen = self.chosen_weights = self.hidden = None
        if widths.used and not dense:
            self.chosen = cupy.zeros((rows, widths.used), cupy.int32)
            self.chosen_weights, self.hidden = floats(widths.used), floats(widths.hidden)
        widest = max(widths.model, widths.attention, widths.ffn)
        self.operand = cupy.empty(rows * widest * 4, cupy.uint8) if dense else None
        self.expert_room = cupy.empty(expert_room, cupy.uint8) if expert_room else None
        self.batch_operand = None if dense else cupy.empty(operand_bytes(widest), cupy.uint8)

    @property
    def n_bytes(self) -> int:
        """Device memory held."""
        arrays: Sequence[Any] = [value for value in vars(self).values() if hasattr(value, "nbytes")]
        return sum(int(array.nbytes) for array in arrays)
