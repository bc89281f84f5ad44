"""Brings recurrent mixers, RWKV's feed-forward part and tables of n-grams to the GPU. Must not know of steps."""

from __future__ import annotations

import numpy as np

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.parts.ngrams import NgramPlan
from engine.cuda.launch_plan.parts.recurrent import DeltaPlan, LightningPlan, Mamba2Plan, MambaPlan, ShortConvPlan
from engine.cuda.launch_plan.parts.recurrent_plan import RecurrentPlan
from engine.cuda.launch_plan.parts.rwkv import MIXED, ChannelMixPlan, LowRankPlan, Rwkv6Plan, Rwkv7Plan
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.load.device_recurrent import (
    DeviceChannelMix,
    DeviceDelta,
    DeviceLightning,
    DeviceLowRank,
    DeviceMamba,
    DeviceMamba2,
    DeviceNgrams,
    DeviceRecurrent,
    DeviceRwkv6,
    DeviceRwkv7,
    DeviceShortConv,
)
from engine.cuda.load.tensor_upload import TensorUploader
from engine.cuda.recurrent.delta import DeltaConstants
from engine.cuda.recurrent.mamba_2 import Mamba2Constants
from engine.cuda.recurrent.ngrams.ngrams import NgramConstants
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6Constants
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7Constants
from engine.model.config import LEAST_GATE, NgramConfig
from engine.model.weights import (
    ChannelMixWeights,
    DeltaNetWeights,
    Float32Array,
    KimiDeltaWeights,
    LightningWeights,
    Mamba2Weights,
    MambaWeights,
    NgramWeights,
    Norm,
    Plamo2Weights,
    RecurrentWeights,
    Rwkv6Weights,
    Rwkv7Weights,
    ShortConvWeights,
)


class RecurrentUploader(TensorUploader):
    """Uploads recurrent mixers."""

    def _recurrent(self, plan: RecurrentPlan, weights: RecurrentWeights) -> DeviceRecurrent:
        if isinstance(plan, Rwkv6Plan):
            assert isinstance(weights, Rwkv6Weights)
            return self._rwkv_6(plan, weights)
        if isinstance(plan, Rwkv7Plan):
            assert isinstance(weights, Rwkv7Weights)
            return self._rwkv_7(plan, weights)
        assert plan.inputs is not None
        products = self.projection(plan.inputs), self.projection(plan.output)
        if isinstance(plan, ShortConvPlan):
            assert isinstance(weights, ShortConvWeights)
            return DeviceShortConv(plan, *products, conv=self.vector(weights.conv))
        if isinstance(plan, MambaPlan):
            assert isinstance(weights, (MambaWeights, Plamo2Weights))
            return self._mamba(plan, *products, weights)
        if isinstance(plan, Mamba2Plan):
            assert isinstance(weights, Mamba2Weights)
            small = (self.vector(one) for one in (weights.dt_bias, weights.a, weights.d))
            kept = Mamba2Constants(self.vector(weights.conv1d), self.vector(weights.conv1d_bias), *small)
            return DeviceMamba2(plan, *products, kept, self.norm(weights.norm))
        if isinstance(plan, LightningPlan):
            assert isinstance(weights, LightningWeights)
            norm = self.norm(weights.norm)
            assert norm is not None
            return DeviceLightning(plan, *products, self.vector(weights.decay), norm)
        assert isinstance(plan, DeltaPlan)
        assert isinstance(weights, (DeltaNetWeights, KimiDeltaWeights))
        return self._delta(plan, *products, weights)

    def _mamba(
        self,
        plan: MambaPlan,
        inputs: DeviceProjection,
        output: DeviceProjection,
        weights: MambaWeights | Plamo2Weights,
    ) -> DeviceMamba:
        a, d, conv_bias = weights.a, weights.d, None
        if isinstance(weights, Plamo2Weights):  # one number of each for all states and channels of a head
            each = plan.mamba.d_inner // len(a)
            a, d = np.repeat(a, each * plan.mamba.d_state), np.repeat(d, each)
        else:
            conv_bias = weights.conv1d_bias
        return DeviceMamba(
            plan=plan,
            inputs=inputs,
            ssm_x=self.projection(plan.ssm_x),
            ssm_dt=self.projection(plan.ssm_dt),
            output=output,
            conv=self.vector(weights.conv1d),
            conv_bias=self.vector(conv_bias),
            a=self.vector(a.reshape(plan.mamba.d_inner, plan.mamba.d_state)),
            d=self.vector(d),
            norms=tuple(self.norm(norm) for norm in (weights.dt_norm, weights.b_norm, weights.c_norm)),
        )

    def _delta(
        self,
        plan: DeltaPlan,
        inputs: DeviceProjection,
        output: DeviceProjection,
        weights: DeltaNetWeights | KimiDeltaWeights,
    ) -> DeviceDelta:
        assert weights.norm.weight is not None
        steps, gate = (None if one is None else self.projection(one) for one in (plan.steps, plan.gate))
        conv, dt_bias, a = (self.vector(one) for one in (weights.conv1d, weights.dt_bias, weights.a))
        kept = DeltaConstants(conv, dt_bias, a, self.vector(weights.norm.weight), weights.norm.epsilon)
        return DeviceDelta(plan, inputs, steps, gate, output, kept)

    # ---- RWKV ------------------------------------------------------------------------------------------------

    def _rwkv_6(self, plan: Rwkv6Plan, weights: Rwkv6Weights) -> DeviceRwkv6:
        return DeviceRwkv6(
            plan=plan,
            inputs=None,
            output=self.projection(plan.output),
            mix_a=self.projection(plan.mix_a),
            mix_b=tuple(self.projection(plan.mix_b, index) for index in range(MIXED)),
            receptance=self.projection(plan.receptance),
            key=self.projection(plan.key),
            value=self.projection(plan.value),
            gate=self.projection(plan.gate),
            decay_a=self.projection(plan.decay_a),
            decay_b=self.projection(plan.decay_b),
            lerp_x=self.vector(weights.lerp_x).reshape(1, -1),
            lerp=self.vector(weights.lerp),
            kept=Rwkv6Constants(self.vector(weights.first), *self._head_norm(weights.norm)),
        )

    def _rwkv_7(self, plan: Rwkv7Plan, weights: Rwkv7Weights) -> DeviceRwkv7:
        k_k, k_a, r_k = (self.vector(one) for one in (weights.k_k, weights.k_a, weights.r_k))
        return DeviceRwkv7(
            plan=plan,
            inputs=None,
            output=self.projection(plan.output),
            receptance=self.projection(plan.receptance),
            key=self.projection(plan.key),
            value=self.projection(plan.value),
            decay=self._low_rank(plan.decay),
            rate=self._low_rank(plan.rate),
            first_value=None if plan.first_value is None else self._low_rank(plan.first_value),
            gate=None if plan.gate is None else self._low_rank(plan.gate),
            lerp=self.vector(weights.lerp),
            kept=Rwkv7Constants(k_k, k_a, r_k, *self._head_norm(weights.norm)),
        )

    def _low_rank(self, plan: LowRankPlan) -> DeviceLowRank:
        return DeviceLowRank(self.projection(plan.a), self.projection(plan.b))

    def _head_norm(self, norm: Norm | None) -> tuple[DeviceArray | None, DeviceArray | None, float]:
        """Weight, bias and epsilon of the norm of single heads; an epsilon that nothing reads without one."""
        if norm is None:
            return None, None, 0.0
        assert norm.weight is not None
        assert norm.bias is not None
        return self.vector(norm.weight), self.vector(norm.bias), norm.epsilon

    def _channel_mix(self, plan: ChannelMixPlan, weights: ChannelMixWeights) -> DeviceChannelMix:
        lerps = [weights.lerp_k] if weights.lerp_r is None else [weights.lerp_k, weights.lerp_r]
        receptance = None if plan.receptance is None else self.projection(plan.receptance)
        products = self.projection(plan.key), self.projection(plan.value), receptance
        return DeviceChannelMix(plan, *products, self.vector(np.stack(lerps)))

    # ---- tables of n-grams -----------------------------------------------------------------------------------

    def _ngrams(self, plan: NgramPlan, config: NgramConfig, weights: NgramWeights) -> DeviceNgrams:
        norms = weights.norm_key, weights.norm_query, weights.norm_conv
        key, query, conv = (norm.epsilon for norm in norms)
        numbers = np.array([*config.multipliers, *config.sizes, *config.offsets], np.uint64)
        kept = NgramConstants(
            numbers=self.vector(numbers, np.uint64),
            end=config.end,
            norms=self.vector(np.stack([_weight(norm).reshape(-1) for norm in norms])),
            epsilons=(key, query, conv),
            least=LEAST_GATE,
            conv=self.vector(weights.conv1d),
        )
        return DeviceNgrams(plan, self.matrix(weights.table), self.projection(plan.key_value), kept)


def _weight(norm: Norm) -> Float32Array:
    assert norm.weight is not None
    return norm.weight
