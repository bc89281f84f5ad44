"""Brings attention over a window and compressed blocks to the GPU. Must not know of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.cuda.attention.attention_shape import LayerAttention
from engine.cuda.compressed.blocks import BlockConstants, KeyArrays
from engine.cuda.launch_plan.parts.compressed import CompressedPlan
from engine.cuda.load.device_compressed import DeviceCompressed
from engine.cuda.load.tensor_upload import TensorUploader
from engine.cuda.rows.parts import DeviceNorm
from engine.model.config import AttentionConfig
from engine.model.weights import AttentionWeights, BlockKeyWeights, Norm


class CompressedUploader(TensorUploader):
    """Uploads attention over compressed blocks."""

    def _compressed(self, plan: CompressedPlan, config: AttentionConfig, weights: AttentionWeights) -> DeviceCompressed:
        own = weights.compressed
        assert own is not None
        assert weights.rope is not None
        rope = self._rope(weights.rope)
        assert rope.inv_freq is not None
        attention = LayerAttention(
            scale=config.scale, inv_freq=None, softcap=config.softcap or 0.0, sinks=self.vector(weights.sinks)
        )
        index = None if own.index is None else own.index.keys
        kept = BlockConstants(self._keys(own.keys), self._keys(index), rope.inv_freq, rope.scale, attention)
        return DeviceCompressed(
            plan=plan,
            inputs=self.projection(plan.inputs),
            q_b=self.projection(plan.q_b),
            index_q=None if plan.index_q is None else self.projection(plan.index_q),
            output_a=tuple(self.projection(one) for one in plan.output_a),
            output=self.projection(plan.output),
            q_a_norm=self._given_norm(own.q_a_norm),
            q_norm=self._given_norm(own.q_norm),
            kv_norm=self._given_norm(own.kv_norm),
            rope=rope,
            back=replace(rope, inv_freq=self.vector(-weights.rope.inv_freq, np.float64)),
            kept=kept,
        )

    def _keys(self, keys: BlockKeyWeights | None) -> KeyArrays | None:
        if keys is None:
            return None
        assert keys.norm.weight is not None
        return KeyArrays(self.vector(keys.ape), self.vector(keys.norm.weight), keys.norm.epsilon)

    def _given_norm(self, norm: Norm) -> DeviceNorm:
        found = self.norm(norm)
        assert found is not None
        return found
