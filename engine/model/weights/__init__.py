"""Weights as the file stores them: packed, mapped views, and the small vectors beside them as float32.

One file per part, and the whole in `model`. Nothing here expands a matrix.
"""

from engine.model.weights.attention import AttentionWeights, LatentWeights
from engine.model.weights.compressed import BlockIndexWeights, BlockKeyWeights, CompressedWeights
from engine.model.weights.ffn import ExpertsWeights, FfnWeights, LatentExpertWeights, MoeWeights
from engine.model.weights.indexer import IndexerWeights
from engine.model.weights.matrices import ExpertLinear, Float32Array, Linear, Norm, Uint8Array, Weight
from engine.model.weights.model import CombinedWeights, LayerWeights, MixerWeights, ModelWeights, PoolingWeights
from engine.model.weights.ngrams import NgramWeights
from engine.model.weights.recurrent import (
    ChannelMixWeights,
    DeltaNetWeights,
    KimiDeltaWeights,
    LightningWeights,
    LowRank,
    Mamba2Weights,
    MambaWeights,
    Plamo2Weights,
    RecurrentWeights,
    Rwkv6Weights,
    Rwkv7Weights,
    ShortConvWeights,
)
from engine.model.weights.skips import (
    BankedSkipWeights,
    GatedSkipWeights,
    HyperSkipWeights,
    MeanSkipWeights,
    MixedSkipWeights,
    NormedSkipWeights,
    SkipWeights,
    StackSkipWeights,
)
from engine.model.weights.streams import LaurelWeights, LayerInputWeights, PerLayerWeights, SpreadWeights, StreamWeights

__all__ = [
    "AttentionWeights",
    "BankedSkipWeights",
    "BlockIndexWeights",
    "BlockKeyWeights",
    "ChannelMixWeights",
    "CombinedWeights",
    "CompressedWeights",
    "DeltaNetWeights",
    "ExpertLinear",
    "ExpertsWeights",
    "FfnWeights",
    "Float32Array",
    "GatedSkipWeights",
    "HyperSkipWeights",
    "IndexerWeights",
    "KimiDeltaWeights",
    "LatentExpertWeights",
    "LatentWeights",
    "LaurelWeights",
    "LayerInputWeights",
    "LayerWeights",
    "LightningWeights",
    "Linear",
    "LowRank",
    "Mamba2Weights",
    "MambaWeights",
    "MeanSkipWeights",
    "MixedSkipWeights",
    "MixerWeights",
    "ModelWeights",
    "MoeWeights",
    "NgramWeights",
    "Norm",
    "NormedSkipWeights",
    "PerLayerWeights",
    "Plamo2Weights",
    "PoolingWeights",
    "RecurrentWeights",
    "Rwkv6Weights",
    "Rwkv7Weights",
    "ShortConvWeights",
    "SkipWeights",
    "SpreadWeights",
    "StackSkipWeights",
    "StreamWeights",
    "Uint8Array",
    "Weight",
]
