"""The bricks of a forward pass on the GPU that decode steps and prompts share.

Every brick is a fixed sequence of launches into preallocated buffers, the one that the launch plan lists; lengths and
positions are read from device memory, so a decode step can be captured once and replayed for every length. Must not
know of requests or sampling.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple, Protocol

from engine.cuda.attention.heads import prepare_heads
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.experts import router
from engine.cuda.formats.dequant import embed
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.steps import Step
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import (
    DeviceAttention,
    DeviceFfn,
    DeviceLaurel,
    DeviceLayer,
    DeviceLayerInput,
    DeviceMoe,
    DevicePerLayer,
    DeviceProjection,
    DeviceSpread,
    DeviceWeights,
)
from engine.cuda.rows import parts, streams
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm
from engine.cuda.step.folding import Hidden, Read, Shared, columns_of, folded
from engine.cuda.step.latent import latent_qkv, latent_values
from engine.cuda.step.recurrent import Moves, move_states
from engine.model.ops import LayerBricks


class Products(Protocol):
    """Products of the rows of one phase."""

    def product(
        self,
        projection: DeviceProjection,
        x: Hidden,
        out: DeviceArray,
        *,
        norm: DeviceNorm | None = None,
        add: bool = False,
        ready: bool = False,
        then: DeviceNorm | None = None,
    ) -> None:
        """out = or += projection of norm(x).

        Args:
            projection: the matrices.
            x: float32 (T, K), rows contiguous.
            out: float32 (T, >= projection.width), row stride free.
            norm: what is applied to x, for norms that fold.
            add: add to out.
            ready: an earlier product has left the operand of norm(x).
            then: leave the operand of products of then(out).
        """

    def gated(self, ffn: DeviceFfn, x: DeviceArray, *, norm: DeviceNorm | None = None, ready: bool = False) -> Hidden:
        """activation(gate(norm(x))) * up(norm(x)) of a paired matrix: (T, F), as the down projection reads it."""


class MoeInputs(NamedTuple):
    """What a mixture reads: its experts, its shared part, and the router's scores (T, E)."""

    experts: Read
    shared: Read
    scores: DeviceArray


class CudaOps(LayerBricks[DeviceLayer]):
    """What decode and prefill share: products with norm, activation and residual folded in.

    Args:
        weights: the model.
        buffers: activations with room for every row of a batch.
        products: multiplies the rows.
        step: of the launch plan: phase and number of rows.
    """

    _positions: DeviceArray
    _moves: Moves | None  # None where no layer has a state

    def __init__(self, weights: DeviceWeights, buffers: Activations, products: Products, step: Step) -> None:
        self.weights = weights
        self.buffers = buffers
        self.step = step
        self._products = products
        self._product = products.product

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.step.n_rows

    # ---- around the layers -----------------------------------------------------------------------------------

    def _embed(self, tokens: DeviceArray, positions: DeviceArray) -> DeviceArray:
        """See Ops.embed. Not launched early: the attention kernels read positions before their own wait."""
        weights, x = self.weights, self.buffers.x[: self.n_rows]
        embed(weights.token_embd, tokens, x, scale=weights.embedding_scale, pdl=False)
        if weights.token_types is not None:
            row_ops.add_bias(x, weights.token_types, 1.0)
        if weights.position_embd is not None:
            part = self.buffers.part[: self.n_rows]
            embed(weights.position_embd, positions, part)
            row_ops.add_scaled(x, part, None, 0)
        if weights.embedding_norm is not None:
            parts.normalize(x, x, weights.embedding_norm)
        if weights.plan.keeps_embeddings:
            row_ops.copy(x, self.buffers.embedded[: self.n_rows])
        if weights.per_layer is not None:
            self._layer_inputs(weights.per_layer, tokens, x)
        if weights.spread is not None:
            self._spread(weights.spread, x)
        return x

    def _spread(self, spread: DeviceSpread, x: DeviceArray) -> None:
        """Embeddings become streams."""
        n = self.n_rows
        parts.rotate(x[:, None], self._stream(0)[:, None], NO_ROPE, self._positions)
        part = self.buffers.part[:n]
        for place, proj in enumerate(spread.proj, 1):
            self._product(proj, x, part)
            streams.lengthen(part, x, self._stream(place))

    def _merge(self, spread: DeviceSpread, x: DeviceArray) -> None:
        """Streams become what the head reads."""
        part = self.buffers.part[: self.n_rows]
        parts.rotate(self._stream(0)[:, None], x[:, None], NO_ROPE, self._positions)
        for place, unembd in enumerate(spread.unembd_proj, 1):
            self._product(unembd, self._stream(place), part)
            streams.lengthen(part, self._stream(spread.active), x, add=True)
        parts.scale(x, 1.0 / (len(spread.unembd_proj) + 1))

    def _stream(self, place: int) -> DeviceArray:
        """One of several streams, (T, D)."""
        width = self.weights.plan.width
        return self.buffers.streams[: self.n_rows, place * width : (place + 1) * width]

    def _layer_inputs(self, per_layer: DevicePerLayer, tokens: DeviceArray, x: DeviceArray) -> None:
        """Every layer's own vectors of the rows; see ModelConfig.per_layer_width."""
        inputs, projected = self.buffers.layer_inputs[: self.n_rows], self.buffers.layer_projected[: self.n_rows]
        width = per_layer.plan.width
        half = math.sqrt(0.5)
        embed(per_layer.token_embd, tokens, inputs, scale=half * math.sqrt(width), pdl=False)
        self._product(per_layer.model_proj, x, projected)
        pieces = inputs.shape[1] // width
        parts.normalize(projected, inputs, per_layer.proj_norm, pieces=pieces, scale=half, add=True)

    def logits(self, x: DeviceArray, out: DeviceArray) -> None:
        """Final norm and output projection of rows x (R, D) into out (R, V), contiguous."""
        weights = self.weights
        assert weights.output is not None
        source, norm = self._normed(x, weights.output_norm)
        ready = weights.plan.output_takes_left and self.step.hands_over
        self._product(weights.output, source, out, norm=norm, ready=ready)
        if weights.logit_softcap is not None:
            parts.softcap(out, weights.logit_softcap)
        if weights.silent is not None:
            parts.silence(out, *weights.silent)

    # ---- mixers ----------------------------------------------------------------------------------------------

    def mix(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """See Ops.mix."""
        moe, n = layer.moe, self.n_rows
        if layer.streams is not None:
            streams.predict(layer.streams, self.buffers.streams[:n], self.buffers.predicted[:n], x)
        if layer.laurel is not None:
            assert layer.attn_norm is not None
            parts.normalize(x, self.buffers.normed[:n], layer.attn_norm)
        if moe is not None and moe.plan.routed_early:
            self._score(moe, Read(x, None), self._scores_of(moe))
        if moe is not None and moe.plan.reads_input:
            assert moe.norm is not None
            parts.normalize(x, self.buffers.beside[: self.n_rows], moe.norm)
        if layer.mixer is None:
            return x
        if layer.attn_norm_2 is not None:
            row_ops.copy(x, self.buffers.beside[: self.n_rows])
        if layer.mixer_skip is not None:
            parts.normalize(x, x, layer.mixer_skip)
        q = None if layer.attention_part is None else self.attn_qkv(layer, x)
        mixed = None if layer.recurrent_part is None else self.ssm_in(layer, x)
        if layer.mixer_skip is not None:
            assert layer.plan.skip_scale is not None
            parts.scale(x, layer.plan.skip_scale)
        if q is not None:
            x = self.attn_output(layer, self.attention(layer, q), x)
        if mixed is not None:
            x = self.ssm_out(layer, self.ssm(layer, mixed), x)
        if layer.attn_output_norm is not None:
            parts.normalize(x, x, layer.attn_output_norm)
        if layer.attn_norm_2 is not None:
            row_ops.add_scaled(x, self.buffers.beside[: self.n_rows], None, 0)
            parts.normalize(x, x, layer.attn_norm_2)
        if layer.laurel is not None:
            self._add_laurel(layer.laurel, x)
        return x

    def _add_laurel(self, laurel: DeviceLaurel, x: DeviceArray) -> None:
        """x becomes what LayerConfig.laurel_rank says; what the mixer read is in `normed`."""
        n, normed = self.n_rows, self.buffers.normed[: self.n_rows]
        low, part = columns_of(self.buffers.gate, n, laurel.left.width), self.buffers.part[:n]
        self._product(laurel.left, normed, low)
        self._product(laurel.right, low, part)
        parts.normalize(part, x, laurel.post_norm, add=True)
        row_ops.add_scaled(x, normed, None, 0)
        parts.scale(x, math.sqrt(0.5))

    def feed_forward(self, layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See Ops.feed_forward."""
        result: DeviceArray = super().feed_forward(layer, x, y)
        if layer.embedding_scale:
            parts.add_times(result, self.buffers.embedded[: self.n_rows], layer.embedding_scale)
        if layer.last_norm is not None:
            parts.normalize(result, result, layer.last_norm)
        if layer.streams is not None:
            n = self.n_rows
            streams.correct(layer.streams, self.buffers.predicted[:n], result, self.buffers.streams[:n])
        if layer.layer_input is not None:
            self._add_layer_input(layer, layer.layer_input, result)
        if layer.output_scale != 1.0:
            parts.scale(result, layer.output_scale)
        if self.weights.spread is not None and layer.index == len(self.weights.layers) - 1:
            self._merge(self.weights.spread, result)
        return result

    def _add_layer_input(self, layer: DeviceLayer, weights: DeviceLayerInput, x: DeviceArray) -> None:
        """Adds to x, or to all streams but the first, what the rows' own vectors for the layer give."""
        n, width, index = self.n_rows, weights.inp_gate.width, layer.index
        h, own = columns_of(self.buffers.gate, n, width), columns_of(self.buffers.up, n, width)
        self._product(weights.inp_gate, x, h)
        vectors = self.buffers.layer_inputs[:n, None, index * width : (index + 1) * width]
        parts.rotate(vectors, own[:, None], NO_ROPE, self._positions)
        row_ops.gate(h, own, KernelActivation.GELU_TANH)
        part = self.buffers.part[:n]
        self._product(weights.proj, h, part)
        if layer.streams is None:
            parts.normalize(part, x, weights.post_norm, add=True)
            return
        parts.normalize(part, part, weights.post_norm)
        streams.add(self.buffers.streams[:n], part)

    def ssm_in(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """attn_norm and the first products of a recurrent layer, side by side."""
        source, norm = self._normed(x, layer.attn_norm)
        inputs = layer.recurrent.inputs
        mixed = columns_of(self.buffers.mixed, self.n_rows, inputs.width)
        self._product(inputs, source, mixed, norm=norm, ready=layer.plan.takes_left and self.step.hands_over)
        return mixed

    def ssm(self, layer: DeviceLayer, mixed: DeviceArray) -> DeviceArray:
        """Everything of a recurrent layer between the first and the last product, which moves its states on."""
        assert self._moves is not None
        return move_states(layer.index, layer.recurrent, mixed, self._moves)

    def ssm_out(self, layer: DeviceLayer, h: DeviceArray, x: DeviceArray) -> DeviceArray:
        """x + the last product of a recurrent layer; see attn_output."""
        return self._mixed(layer, layer.recurrent.output, h, x)

    def _qkv(self, layer: DeviceLayer, x: DeviceArray, positions: DeviceArray) -> DeviceArray:
        """Queries, keys and values of every row as the attention kernels read them."""
        mixer = layer.attention
        source, norm = self._normed(x, layer.attn_norm)
        qkv = columns_of(self.buffers.qkv, self.n_rows, mixer.shape.row_width)
        if mixer.latent is not None:
            latent_qkv(mixer.latent, self._product, source, norm, self.buffers, positions, qkv, self.step)
        else:
            assert mixer.qkv is not None
            ready = layer.plan.takes_left and self.step.hands_over
            self._product(mixer.qkv, source, qkv, norm=norm, ready=ready)
        if mixer.heads is not None:
            prepare_heads(mixer.heads, mixer.shape, qkv, positions)
        if mixer.plan.kept_at is not None:
            self._share_cache(mixer, qkv, positions)
        return qkv

    def _share_cache(self, mixer: DeviceAttention, qkv: DeviceArray, positions: DeviceArray) -> None:
        """Keys and values of a layer are kept for later ones, or are those that an earlier one has kept.

        The kernels then cache them once more, where they are already: the same bits.
        """
        plan, shape = mixer.plan, mixer.shape
        assert plan.kept_at is not None
        first = shape.heads * shape.key_dim
        own = qkv[:, None, first : first + plan.kept_width]
        kept = self.buffers.kept[: self.n_rows, None, plan.kept_at : plan.kept_at + plan.kept_width]
        source, target = (own, kept) if plan.cache_layer is None else (kept, own)
        parts.rotate(source, target, NO_ROPE, positions)

    def _gates(self, mixer: DeviceAttention) -> DeviceArray:
        """The gates of a layer's values, (T, G)."""
        gates = mixer.plan.gates
        if mixer.latent is not None:
            return columns_of(self.buffers.inputs, self.n_rows, mixer.latent.inputs.width)[:, :gates]
        width, first = mixer.shape.row_width, mixer.shape.row_width - mixer.shape.gate
        return columns_of(self.buffers.qkv, self.n_rows, width)[:, first : first + gates]

    def attn_output(self, layer: DeviceLayer, a: DeviceArray, x: DeviceArray) -> DeviceArray:
        """See LayerBricks.attn_output; in a parallel layer only what attention adds to x, which ffn reads again.

        Gates are read where attn_qkv has left them.
        """
        mixer = layer.attention
        if mixer.latent is not None:
            a = latent_values(mixer.latent, self._product, a, self.buffers, self.step)
        if mixer.plan.gates:
            parts.multiply_gate(a, self._gates(mixer), softplus=mixer.softplus)
        if mixer.sub_norm is not None:
            parts.normalize(a, a, mixer.sub_norm)
        last = layer.recurrent_part is None
        return self._mixed(layer, mixer.output, a, x, last=last)

    def _mixed(
        self, layer: DeviceLayer, output: DeviceProjection, a: DeviceArray, x: DeviceArray, *, last: bool = True
    ) -> DeviceArray:
        """The last product of a mixer, added to x, or beside it in a parallel layer. last: nothing more is mixed in."""
        if not layer.parallel:
            then = layer.ffn_norm if last and layer.plan.leaves_inside else None
            if last and layer.plan.ffn is None and layer.plan.leaves_behind:
                then = self._norm_behind(layer)
            self._add(layer, output, a, layer.attn_post_norm, x, then=then if self.step.hands_over else None)
            return x
        beside = self.buffers.beside[: self.n_rows]
        self._product(output, a, beside)
        if layer.attn_post_norm is not None:
            parts.normalize(beside, beside, layer.attn_post_norm, scale=layer.residual_scale)
        return beside

    # ---- feed-forward parts ----------------------------------------------------------------------------------

    def ffn_gate_up(self, layer: DeviceLayer, x: DeviceArray) -> Hidden:
        """See LayerBricks.ffn_gate_up."""
        assert layer.ffn is not None
        ready = layer.plan.leaves_inside and self.step.hands_over
        if layer.ffn_skip is None:
            return self._gate_up(layer.ffn, *self._normed(x, layer.ffn_norm), ready=ready)
        assert layer.plan.skip_scale is not None
        parts.normalize(x, x, layer.ffn_skip)
        h = self._gate_up(layer.ffn, *self._normed(x, layer.ffn_norm), ready=ready)
        parts.scale(x, layer.plan.skip_scale)
        return h

    def ffn_down(self, layer: DeviceLayer, h: Hidden, y: DeviceArray) -> DeviceArray:
        """See LayerBricks.ffn_down; y is what attn_output gave."""
        assert layer.ffn is not None
        stream = self.buffers.x[: self.n_rows] if layer.parallel else y
        then = self._norm_behind(layer) if layer.plan.leaves_behind and self.step.hands_over else None
        self._add(layer, layer.ffn.down, h, layer.ffn_post_norm, stream, then=then)
        return self._joined(layer, stream, y)

    def _norm_behind(self, layer: DeviceLayer) -> DeviceNorm | None:
        """The norm of what reads the stream behind a layer."""
        layers = self.weights.layers
        return layers[layer.index + 1].attn_norm if layer.index + 1 < len(layers) else self.weights.output_norm

    def _gate_up(self, ffn: DeviceFfn, x: DeviceArray, norm: DeviceNorm | None, *, ready: bool = False) -> Hidden:
        if ffn.paired is not None:
            return self._products.gated(ffn, x, norm=norm, ready=ready)
        n, width, activation = int(x.shape[0]), ffn.plan.width, ffn.plan.activation
        h, up = columns_of(self.buffers.gate, n, width), columns_of(self.buffers.up, n, width)
        assert ffn.up is not None
        if ffn.gate is None:
            self._product(ffn.up, x, h, norm=norm)
            row_ops.gate(h, None, activation, ffn.plan.limits)
        else:
            self._product(ffn.gate, x, h, norm=norm)
            self._product(ffn.up, x, up, norm=norm)
            if ffn.plan.sparsity:
                parts.thin_out(h, ffn.plan.sparsity)
            row_ops.gate(h, up, activation, ffn.plan.limits)
        if ffn.act_scales is not None:
            parts.divide(h, ffn.act_scales)
        if ffn.sub_norm is not None:
            parts.normalize(h, h, ffn.sub_norm)
        return h

    def ffn_moe(self, layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See LayerBricks.ffn_moe; y is what attn_output gave.

        Rows go to the experts they chose; where the card or the types forbid it, every expert multiplies all rows.
        """
        moe, post, n = layer.moe, layer.ffn_post_norm, self.n_rows
        assert moe is not None
        plan, scores, skip = moe.plan, self._scores_of(moe), layer.ffn_skip
        if skip is not None:
            parts.normalize(x, x, skip)
        family = plan.families.family_for(n, self.step.phase)
        if plan.reads_input:
            read = Read(self.buffers.beside[:n], None)
            if not plan.routed_early:
                self._score(moe, read, scores)
            shared = read if moe.shared is None else Read(*self._normed(x, layer.ffn_norm))
        elif plan.router_norm is not None:
            self._score(moe, Read(*self._normed(x, moe.router_norm)), scores)
            read, shared = Read(*self._normed(x, moe.norm)), Read(*self._normed(x, layer.ffn_norm))
        else:
            read = shared = Read(*self._normed(x, layer.ffn_norm))
            if not plan.routed_early:
                self._score(moe, read, scores)
        gathers, apart = family is not Family.EXPERTS_EVERY, post is not None or skip is not None or plan.sums_apart
        target = x if gathers and not apart else self.buffers.total[:n]
        if apart:
            parts.clear(target)
        elif not gathers:  # the sum goes beside x, which every expert still reads
            row_ops.copy(x, target)
        self._mixture(moe, family, MoeInputs(read, shared, scores), target)
        if skip is not None:
            assert layer.plan.skip_scale is not None
            parts.scale(x, layer.plan.skip_scale)
        if post is not None:
            parts.normalize(target, x, post, scale=layer.residual_scale, add=True)
        elif apart:
            row_ops.add_scaled(x, target, None, 0)
        elif not gathers:
            row_ops.copy(target, x)
        return self._joined(layer, x, y)

    def _scores_of(self, moe: DeviceMoe) -> DeviceArray:
        """Where the router's scores (T, E) are."""
        return columns_of(self.buffers.router, self.n_rows, moe.plan.routing.n_experts)

    def _score(self, moe: DeviceMoe, read: Read, scores: DeviceArray) -> None:
        """The router's product."""
        if moe.plan.score_family(self.n_rows, self.step.phase) is not Family.ROUTER:
            self._product(moe.router, read.x, scores, norm=read.norm)
            return
        (part,), (weight, eps) = moe.router.parts, folded(read.norm)
        (matrix,) = part.group.matrices
        router.score_experts(matrix, read.x, scores, bias=part.bias, alpha=part.alpha, norm=weight, eps=eps)

    def _mixture(self, moe: DeviceMoe, family: Family, inputs: MoeInputs, out: DeviceArray) -> None:
        """Adds chosen experts and the shared one to out, which may be x if rows go to their own experts."""
        if family is Family.EXPERTS_EVERY:
            self._every_expert(moe, inputs, out)
            shared = self._shared_hidden(moe, inputs.shared)  # uses the memory that the experts have used
        else:
            shared = self._own_experts(moe, family, inputs, out)
        if moe.expert_post_norm is not None:
            parts.normalize(out, out, moe.expert_post_norm)
        if shared is not None:
            self._add_shared(moe, *shared, out)

    @abstractmethod
    def _own_experts(self, moe: DeviceMoe, family: Family, inputs: MoeInputs, out: DeviceArray) -> Shared | None:
        """Adds to out the experts that each row chose; returns _shared_hidden(), which reads x before it changes."""

    def _every_expert(self, moe: DeviceMoe, inputs: MoeInputs, out: DeviceArray) -> None:
        buffers, n, routing, (x, norm) = self.buffers, self.n_rows, moe.plan.routing, inputs.experts
        ids = columns_of(buffers.chosen, n, routing.n_used)
        weights = columns_of(buffers.chosen_weights, n, routing.n_used)
        router.route(routing, inputs.scores, ids, weights, bias=moe.selection_bias)
        part, on_inputs = buffers.y[:n], moe.plan.weigh_input
        normed, weighed = buffers.normed[:n], buffers.part[:n]
        if on_inputs and norm is not None:
            parts.normalize(x, normed, norm)
        elif on_inputs and x.data.ptr != normed.data.ptr:
            row_ops.copy(x, normed)
        for index, expert in enumerate(moe.experts):
            if on_inputs:
                parts.weigh_chosen_rows(normed, weighed, ids, weights, index)
            h = self._gate_up(expert, *((weighed, None) if on_inputs else (x, norm)))
            self._product(expert.down, h, part)
            parts.add_chosen(out, part, ids, None if on_inputs else weights, index)

    def _shared_hidden(self, moe: DeviceMoe, read: Read) -> Shared | None:
        """Hidden values of the expert that every row passes through, and its factor (T, 1); None without one."""
        if moe.shared is None:
            return None
        mix = None
        if moe.shared_gate is not None:
            mix = self.buffers.mix[: self.n_rows]
            self._product(moe.shared_gate, read.x, mix, norm=read.norm)
            row_ops.sigmoid(mix)
        return self._gate_up(moe.shared, *read), mix

    def _add_shared(self, moe: DeviceMoe, h: Hidden, mix: DeviceArray | None, out: DeviceArray) -> None:
        assert moe.shared is not None
        if mix is None and moe.shared_post_norm is None:
            self._product(moe.shared.down, h, out, add=True)
            return
        y = self.buffers.y[: self.n_rows]
        self._product(moe.shared.down, h, y)
        if moe.shared_post_norm is not None:
            assert mix is None
            parts.normalize(y, out, moe.shared_post_norm, add=True)
        else:
            row_ops.add_scaled(out, y, mix, 0)

    # ---- what bricks share -----------------------------------------------------------------------------------

    def _add(
        self,
        layer: DeviceLayer,
        projection: DeviceProjection,
        x: Hidden,
        post: DeviceNorm | None,
        out: DeviceArray,
        *,
        then: DeviceNorm | None,
    ) -> None:
        """out += residual_scale * post(projection of x). then: see Products.product."""
        if post is None:
            self._product(projection, x, out, add=True, then=then)
            return
        part = self.buffers.part[: self.n_rows]
        self._product(projection, x, part)
        parts.normalize(part, out, post, scale=layer.residual_scale, add=True)

    @staticmethod
    def _joined(layer: DeviceLayer, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """x, in parallel layers with what attention adds."""
        if layer.parallel:
            row_ops.add_scaled(x, y, None, 0)
        return x

    def _normed(self, x: DeviceArray, norm: DeviceNorm | None) -> tuple[DeviceArray, DeviceNorm | None]:
        """What a product of norm(x) reads, and what it applies itself."""
        if norm is None or norm.folds:
            return x, norm
        out = self.buffers.normed[: x.shape[0]]
        parts.normalize(x, out, norm)
        return out, None
