"""Hyper-parameters of a model as frozen dataclasses: one file per part, and the whole in `model`.

Pure description: nothing here reads a file or touches an array. `engine.model.reading` fills it from metadata.
Letters used in all docstrings of this package: T tokens, D width, H heads, K key/value heads, Hd head width,
F feed-forward width, E experts, V vocabulary. A field's default is what a plain model does: nothing.
"""

from engine.model.config.attention import (
    AttentionConfig,
    AttentionTemperature,
    GateFunction,
    LatentConfig,
    OutputGate,
    QkNorm,
    QkWeights,
)
from engine.model.config.compressed import BlockIndexConfig, BlocksConfig, CompressedConfig
from engine.model.config.ffn import Activation, AdjugateConfig, FfnConfig, MoeConfig, Routing
from engine.model.config.indexer import IndexerConfig, IndexerKind
from engine.model.config.model import CombinedConfig, LayerConfig, MixerConfig, ModelConfig, NormKind, ResidualKind
from engine.model.config.ngrams import LEAST_GATE, NgramConfig
from engine.model.config.pooling import Pooling, RankConfig
from engine.model.config.recurrent import (
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    Plamo2Config,
    RecurrentConfig,
    ShortConvConfig,
)
from engine.model.config.rope import RopeConfig, RopeScaling, RopeStyle
from engine.model.config.rwkv import ChannelMixConfig, Rwkv6Config, Rwkv7Config, TimeMixConfig
from engine.model.config.skips import (
    BankedSkip,
    GatedSkip,
    HyperSkip,
    MixedSkip,
    NormedSkip,
    SkipConfig,
    SkipKind,
    StackSkip,
    most_streams,
)
from engine.model.config.streams import AltUpConfig

__all__ = [
    "LEAST_GATE",
    "Activation",
    "AdjugateConfig",
    "AltUpConfig",
    "AttentionConfig",
    "AttentionTemperature",
    "BankedSkip",
    "BlockIndexConfig",
    "BlocksConfig",
    "ChannelMixConfig",
    "CombinedConfig",
    "CompressedConfig",
    "DeltaNetConfig",
    "FfnConfig",
    "GateFunction",
    "GatedSkip",
    "HyperSkip",
    "IndexerConfig",
    "IndexerKind",
    "KimiDeltaConfig",
    "LatentConfig",
    "LayerConfig",
    "LightningConfig",
    "Mamba2Config",
    "MambaConfig",
    "MixedSkip",
    "MixerConfig",
    "ModelConfig",
    "MoeConfig",
    "NgramConfig",
    "NormKind",
    "NormedSkip",
    "OutputGate",
    "Plamo2Config",
    "Pooling",
    "QkNorm",
    "QkWeights",
    "RankConfig",
    "RecurrentConfig",
    "ResidualKind",
    "RopeConfig",
    "RopeScaling",
    "RopeStyle",
    "Routing",
    "Rwkv6Config",
    "Rwkv7Config",
    "ShortConvConfig",
    "SkipConfig",
    "SkipKind",
    "StackSkip",
    "TimeMixConfig",
    "most_streams",
]
