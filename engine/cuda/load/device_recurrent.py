"""Recurrent mixers on the GPU, RWKV's feed-forward part and tables of n-grams: products and small arrays.

Must not know of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.launch_plan.parts.ngrams import NgramPlan
from engine.cuda.launch_plan.parts.recurrent import DeltaPlan, LightningPlan, Mamba2Plan, MambaPlan, ShortConvPlan
from engine.cuda.launch_plan.parts.rwkv import ChannelMixPlan, Rwkv6Plan, Rwkv7Plan
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.recurrent.delta import DeltaConstants
from engine.cuda.recurrent.mamba_2 import Mamba2Constants
from engine.cuda.recurrent.ngrams.ngrams import NgramConstants
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6Constants
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7Constants
from engine.cuda.rows.parts import DeviceNorm


@dataclass(frozen=True, eq=False)
class DeviceShortConv:
    """A gated short convolution. inputs, output: products. conv: float32 (D, W)."""

    plan: ShortConvPlan
    inputs: DeviceProjection
    output: DeviceProjection
    conv: DeviceArray

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """Products between the first and the last; likewise of the other recurrent mixers."""
        return ()

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """Small arrays that the kernels read; likewise of the other recurrent mixers."""
        return (self.conv,)


@dataclass(frozen=True, eq=False)
class DeviceMamba:
    """The selective state space of one layer; letters as in cuda/recurrent/mamba.py.

    Attributes:
        inputs, ssm_x, ssm_dt, output: products.
        conv: float32 (E, W). conv_bias: (E,) or None. a: (E, N). d: (E,).
        norms: of dt, B and C, or None.
    """

    plan: MambaPlan
    inputs: DeviceProjection
    ssm_x: DeviceProjection
    ssm_dt: DeviceProjection
    output: DeviceProjection
    conv: DeviceArray
    conv_bias: DeviceArray | None
    a: DeviceArray
    d: DeviceArray
    norms: tuple[DeviceNorm | None, ...]

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """See DeviceShortConv."""
        return self.ssm_x, self.ssm_dt

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """See DeviceShortConv."""
        return self.conv, self.conv_bias, self.a, self.d


@dataclass(frozen=True, eq=False)
class DeviceMamba2:
    """The state space of a Mamba 2 layer. norm: of each group of the result, with weights of its own, or None."""

    plan: Mamba2Plan
    inputs: DeviceProjection
    output: DeviceProjection
    kept: Mamba2Constants
    norm: DeviceNorm | None

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """See DeviceShortConv."""
        return ()

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """See DeviceShortConv."""
        return self.kept.conv, self.kept.conv_bias, self.kept.dt_bias, self.kept.a, self.kept.d


@dataclass(frozen=True, eq=False)
class DeviceDelta:
    """A gated delta rule; see DeltaPlan for which of its products are set."""

    plan: DeltaPlan
    inputs: DeviceProjection
    steps: DeviceProjection | None
    gate: DeviceProjection | None
    output: DeviceProjection
    kept: DeltaConstants

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """See DeviceShortConv."""
        return tuple(one for one in (self.steps, self.gate) if one is not None)

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """See DeviceShortConv."""
        return self.kept.conv, self.kept.dt_bias, self.kept.a, self.kept.norm


@dataclass(frozen=True, eq=False)
class DeviceLightning:
    """Lightning attention. decay: float32 (H,). norm: of the result of all heads together."""

    plan: LightningPlan
    inputs: DeviceProjection
    output: DeviceProjection
    decay: DeviceArray
    norm: DeviceNorm

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """See DeviceShortConv."""
        return ()

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """See DeviceShortConv."""
        return (self.decay,)


@dataclass(frozen=True, eq=False)
class DeviceRwkv6:
    """Time mixing of RWKV-6; see Rwkv6Plan. inputs: None. mix_b: one for each of the 5 inputs.

    lerp_x: float32 (1, D). lerp: float32 (5, D).
    """

    plan: Rwkv6Plan
    inputs: None
    output: DeviceProjection
    mix_a: DeviceProjection
    mix_b: tuple[DeviceProjection, ...]
    receptance: DeviceProjection
    key: DeviceProjection
    value: DeviceProjection
    gate: DeviceProjection
    decay_a: DeviceProjection
    decay_b: DeviceProjection
    lerp_x: DeviceArray
    lerp: DeviceArray
    kept: Rwkv6Constants

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """See DeviceShortConv."""
        whole = self.receptance, self.key, self.value, self.gate
        return self.mix_a, *self.mix_b, *whole, self.decay_a, self.decay_b

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """See DeviceShortConv."""
        return self.lerp_x, self.lerp, self.kept.first, self.kept.norm, self.kept.bias


@dataclass(frozen=True, eq=False)
class DeviceLowRank:
    """Two products, one behind the other."""

    a: DeviceProjection
    b: DeviceProjection


@dataclass(frozen=True, eq=False)
class DeviceRwkv7:
    """Time mixing of RWKV-7; see Rwkv7Plan for which of its products are set. inputs: None. lerp: float32 (C, D)."""

    plan: Rwkv7Plan
    inputs: None
    output: DeviceProjection
    receptance: DeviceProjection
    key: DeviceProjection
    value: DeviceProjection
    decay: DeviceLowRank
    rate: DeviceLowRank
    first_value: DeviceLowRank | None
    gate: DeviceLowRank | None
    lerp: DeviceArray
    kept: Rwkv7Constants

    @property
    def inner(self) -> tuple[DeviceProjection, ...]:
        """See DeviceShortConv."""
        low = (one for one in (self.decay, self.rate, self.first_value, self.gate) if one is not None)
        return self.receptance, self.key, self.value, *(part for one in low for part in (one.a, one.b))

    @property
    def constants(self) -> tuple[DeviceArray | None, ...]:
        """See DeviceShortConv."""
        kept = self.kept
        return self.lerp, kept.k_k, kept.k_a, kept.r_k, kept.norm, kept.bias


DeviceRecurrent = (
    DeviceShortConv | DeviceMamba | DeviceMamba2 | DeviceDelta | DeviceLightning | DeviceRwkv6 | DeviceRwkv7
)
"""A recurrent mixer; one class per class of launch_plan.recurrent_plan.RecurrentPlan."""


@dataclass(frozen=True, eq=False)
class DeviceChannelMix:
    """RWKV's feed-forward part; see ChannelMixPlan. lerps: float32 (1 or 2, D), of what key and receptance read."""

    plan: ChannelMixPlan
    key: DeviceProjection
    value: DeviceProjection
    receptance: DeviceProjection | None
    lerps: DeviceArray

    @property
    def n_bytes(self) -> int:
        """Packed size of the matrices."""
        return sum(one.n_bytes for one in (self.key, self.value, self.receptance) if one is not None)


@dataclass(frozen=True, eq=False)
class DeviceNgrams:
    """A table of n-grams; see NgramPlan."""

    plan: NgramPlan
    table: PackedMatrix
    key_value: DeviceProjection
    kept: NgramConstants
