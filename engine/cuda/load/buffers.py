"""All activations on the device, with their shapes; nothing else allocates while the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.cuda.load.needs import folds
from engine.cuda.matrix.decode_gemm import operand_bytes
from engine.model.config import FfnConfig, LatentConfig, MoeConfig
from engine.model.loader import LoadedModel


@dataclass(frozen=True)
class Widths:
    """Row widths of the activations of one model, the largest over its layers.

    Attributes:
        model: D. qkv: all of q, k and v. attention: H*Hv. ffn: F. experts: E, 0 without a mixture. vocab: V.
        used: experts of a row. hidden: hidden values of all of them.
        normed: D, or 0 where every norm folds into a product. part: D, or 0 where every result is added as it comes.
        beside: D, or 0 without parallel layers.
        inputs: first products of latent attention. queries: queries from their compression. heads: what the matrices
            of single heads, or kv_b, give. All 0 without latent attention.
    """

    model: int
    qkv: int
    attention: int
    ffn: int
    experts: int
    vocab: int
    used: int = 0
    hidden: int = 0
    normed: int = 0
    part: int = 0
    beside: int = 0
    inputs: int = 0
    queries: int = 0
    heads: int = 0

    @classmethod
    def of(cls, model: LoadedModel) -> Widths:
        """The widths of a model."""
        config, weights = model.config, model.weights
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
        norms = [norm for layer in weights.layers for norm in (layer.attn_norm, layer.ffn_norm)]
        norms += [weights.output_norm]
        behind = [norm for layer in weights.layers for norm in (layer.attn_post_norm, layer.ffn_post_norm)]
        waits = weights.position_embd is not None or any(norm is not None for norm in behind)
        latents = [(a.n_heads, a.latent) for a in attention if a.latent is not None]
        return cls(
            model=config.width,
            qkv=max(a.n_heads * a.key_width + a.n_kv_heads * (a.key_width + a.value_width) for a in attention),
            attention=max(a.n_heads * a.value_width for a in attention),
            ffn=ffn,
            experts=experts,
            vocab=config.vocab_size,
            used=used,
            hidden=hidden,
            normed=0 if all(norm is None or folds(norm) for norm in norms) else config.width,
            part=config.width if waits else 0,
            beside=config.width if any(layer.parallel for layer in weights.layers) else 0,
            inputs=max((_inputs(heads, latent) for heads, latent in latents), default=0),
            queries=max((heads * (one.nope_width + one.rope_width) for heads, one in latents), default=0),
            heads=max((heads * (one.nope_width + one.value_width) for heads, one in latents), default=0),
        )

    @property
    def widest(self) -> int:
        """Columns of the widest matrix."""
        return max(self.model, self.attention, self.ffn, self.inputs, self.heads)

    def row_bytes(self, *, dense: bool) -> int:
        """Bytes Activations holds per row, without logits."""
        streams = 3 if self.experts else 1
        floats = streams * self.model + self.qkv + self.attention + 2 * self.ffn + self.experts + 2 * self.used + 1
        floats += self.normed + self.part + self.beside + self.inputs + self.queries + self.heads
        return 4 * (floats + (self.widest if dense else self.hidden))


def _inputs(heads: int, latent: LatentConfig) -> int:
    queries = latent.q_rank or heads * (latent.nope_width + latent.rope_width)
    return queries + latent.rank + latent.rope_width


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
