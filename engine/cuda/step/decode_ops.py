"""The bricks of a decode step: row b is slot b, one token each; tokens and positions are in device memory."""

from __future__ import annotations

from engine.cuda.attention.attention import Attention, AttentionShape
from engine.cuda.attention.cache import PagedCache
from engine.cuda.attention.step_rows import StepRows
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.indexer.indexer import Rows
from engine.cuda.launch_plan.families import Family, Phase
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import DeviceLayer, DeviceMoe, DeviceWeights
from engine.cuda.recurrent.rows import DecodeRows
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.step.bricks.mixture import MoeInputs
from engine.cuda.step.decode_products import DecodeProducts
from engine.cuda.step.folding import Hidden, Left, Shared, columns_of, folded
from engine.cuda.step.indexer import Indexers, choose
from engine.cuda.step.moves import Moves
from engine.cuda.step.ops import CudaOps
from engine.cuda.step.prompt_products import PromptProducts


class DecodeOps(CudaOps):
    """Implements HiddenOps for decode steps.

    Args:
        weights: the model.
        buffers: activations.
        cache: keys and values. states: recurrent states, or None.
        attention: the kernels of each shape.
        tokens: int32 (slots,), the token each slot is fed.
        positions: int32 (slots,), its position; -1 = the slot does not run.
        n: rows of this step, a prefix of the slots.
        indexers: choices of positions.
        rows: rows that take the place of the slots', where those are not the first ones.
        known: whether some of these are known tokens, so that a sequence has several rows.
        prompts: products of very many rows: those of gemm.cu, and of experts.
        expert_room: scratch memory of experts.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        buffers: Activations,
        cache: PagedCache,
        states: StateCache | None,
        attention: dict[AttentionShape, Attention],
        tokens: DeviceArray,
        positions: DeviceArray,
        n: int,
        *,
        indexers: Indexers,
        rows: StepRows | None = None,
        known: bool = False,
        prompts: PromptProducts,
        expert_room: DeviceArray | None,
    ) -> None:
        super().__init__(
            weights, buffers, DecodeProducts(buffers, n, prompts.gemms), weights.plan.step(Phase.DECODE, n)
        )
        self._rows, self._known, self._indexers = rows, known, indexers
        self._slots = tokens, positions, cache.block_table
        table = cache.block_table
        if rows is not None:
            tokens, positions, table = rows.tokens, rows.positions, rows.table
        self._prompts = prompts
        self._expert_room = expert_room
        self._cache = cache
        self._attention = attention
        self._tokens = tokens[:n]
        self._positions = positions[:n]
        self._table = table[:n]
        self._moves = None
        if states is not None:
            places = DecodeRows(self._positions, states.offsets, states.rows.places)
            self._moves = Moves(states, places, buffers, self._product)

    def begin(self, batch: None) -> None:
        """See Ops.begin; everything is on the device already."""
        if self._rows is not None:
            self._rows.take(self.n_rows, *self._slots)

    def embed(self, batch: None) -> DeviceArray:
        """See Ops.embed."""
        return self._embed(self._tokens, self._positions)

    def attn_qkv(self, layer: DeviceLayer, x: DeviceArray) -> DeviceArray:
        """Norm and projections; what is left of the brick is fused into attention()."""
        return self._qkv(layer, x, self._positions)

    def attention(self, layer: DeviceLayer, q: DeviceArray) -> Hidden:
        """q/k norm, RoPE, cache append and attention. Of known rows, all are in the cache before any attends.

        Rows whose indexer leaves positions out go another way than the others. Which those are is found on the device,
        in the same step: attention is not launched early.
        """
        if layer.compressed is not None:
            assert self._indexers.identity is not None
            each = Rows(self._positions, self._table, self._indexers.identity[: self.n_rows])
            return self._attend_blocks(layer.compressed, q, self._cache.blocks(layer.index), each)
        mixer = layer.attention
        shape, kernels, positions = mixer.shape, self._attention[mixer.shape], self._positions
        out = columns_of(self.buffers.attention, self.n_rows, shape.heads * shape.value_dim)
        caches, known, indexer, rows = self._cache.arrays(layer.index), self._known, mixer.plan.indexer, None
        if indexer is not None:
            choice = self._indexers.choice(indexer)
            rows = Rows(positions, self._table, choice.identity[: self.n_rows])
            if mixer.indexer is not None:
                choose(mixer.indexer, self.buffers, choice, self._cache.index_keys(layer.index), rows)
        if known:
            assert self._rows is not None
            sequence = self._rows.sequence[: self.n_rows]
            kernels.rope_append(mixer.constants, q, *caches, self._table, sequence, positions, queries=False)
        if indexer is None or rows is None:
            operand = self.buffers.batch_operand if mixer.plan.leaves_operand and self.step.hands_over else None
            kernels.decode(mixer.constants, q, *caches, self._table, positions, out, early=not known, operand=operand)
            return out if operand is None else Left(out)
        choosing, whole = choice.choosing[: self.n_rows], choice.whole[: self.n_rows]
        kernels.rope_append(mixer.constants, q, *caches, self._table, rows.sequence, choosing)
        kernels.decode(mixer.constants, q, *caches, self._table, whole, out, early=False)
        self._indexers.attention(indexer)(mixer.constants, q, *caches, rows, out)
        return out

    def _own_experts(self, moe: DeviceMoe, family: Family, inputs: MoeInputs, out: DeviceArray) -> Shared | None:
        (x, norm), scores = inputs.experts, inputs.scores
        positions, room, (weight, eps) = self._positions, self._expert_room, folded(norm)
        if family is Family.EXPERTS_CHOSEN:
            assert moe.chosen is not None
            pairs = self.n_rows * moe.plan.routing.n_places
            assert self.buffers.hidden is not None
            h = columns_of(self.buffers.hidden, pairs, moe.chosen.width)
            early = not moe.plan.routed_early
            moe.chosen.gate_up(x, scores, h, norm=weight, eps=eps, positions=positions, early=early)
            shared = self._shared_hidden(moe, inputs)
            moe.chosen.down(scores, h, out, positions=positions)
            return shared
        shared = self._shared_hidden(moe, inputs)
        if family is Family.EXPERTS_SHARED:
            assert room is not None
            assert moe.sharing is not None
            then, operand = inputs.then, self.buffers.stream_operand
            assert operand is not None
            emitted = None if then is None else (then.weight, operand)
            moe.sharing(x, scores, room, out, norm=weight, eps=eps, positions=positions, emitted=emitted)
        else:
            self._prompts.grouped(moe, x, scores, room, out, norm, positions)
        return shared
