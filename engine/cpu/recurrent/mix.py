"""From the kind of a recurrent layer to its mixer."""

from __future__ import annotations

from engine.cpu.recurrent.convolution import mix_short_conv
from engine.cpu.recurrent.delta_net import mix_delta_net, mix_kimi_delta
from engine.cpu.recurrent.lightning import mix_lightning
from engine.cpu.recurrent.mamba import mix_mamba
from engine.cpu.recurrent.mamba_2 import mix_mamba_2
from engine.cpu.recurrent.plamo_2 import mix_plamo_2
from engine.cpu.recurrent.rwkv import mix_rwkv_6, mix_rwkv_7
from engine.cpu.recurrent.tools import Float32Array, Tools
from engine.model.config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    Plamo2Config,
    RecurrentConfig,
    Rwkv6Config,
    Rwkv7Config,
    ShortConvConfig,
)
from engine.model.weights import (
    DeltaNetWeights,
    KimiDeltaWeights,
    LightningWeights,
    Mamba2Weights,
    MambaWeights,
    Plamo2Weights,
    RecurrentWeights,
    Rwkv6Weights,
    Rwkv7Weights,
    ShortConvWeights,
)


def mix_recurrent(
    config: RecurrentConfig, weights: RecurrentWeights, normed: Float32Array, tools: Tools
) -> Float32Array:
    """The mixer of normalized inputs (T, D), without the residual: (T, D). Stores the states behind the step."""
    if isinstance(config, MambaConfig) and isinstance(weights, MambaWeights):
        return mix_mamba(config, weights, normed, tools)
    if isinstance(config, Mamba2Config) and isinstance(weights, Mamba2Weights):
        return mix_mamba_2(config, weights, normed, tools)
    if isinstance(config, ShortConvConfig) and isinstance(weights, ShortConvWeights):
        return mix_short_conv(config, weights, normed, tools)
    if isinstance(config, DeltaNetConfig) and isinstance(weights, DeltaNetWeights):
        return mix_delta_net(config, weights, normed, tools)
    if isinstance(config, Rwkv6Config) and isinstance(weights, Rwkv6Weights):
        return mix_rwkv_6(config, weights, normed, tools)
    if isinstance(config, Rwkv7Config) and isinstance(weights, Rwkv7Weights):
        return mix_rwkv_7(config, weights, normed, tools)
    if isinstance(config, LightningConfig) and isinstance(weights, LightningWeights):
        return mix_lightning(config, weights, normed, tools)
    if isinstance(config, Plamo2Config) and isinstance(weights, Plamo2Weights):
        return mix_plamo_2(config, weights, normed, tools)
    assert isinstance(config, KimiDeltaConfig)
    assert isinstance(weights, KimiDeltaWeights)
    return mix_kimi_delta(config, weights, normed, tools)
