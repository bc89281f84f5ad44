"""Says which parts of a model have no GPU kernels yet, from its configuration. Needs no GPU.

What is served is listed, not what is missing: a new part of a model is declined until it is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import PAGE, KvType
from engine.cuda.attention.attention_shape import LARGEST_HEAD
from engine.cuda.experts.router import MAX_EXPERTS, MAX_USED
from engine.cuda.indexer.plan import MOST_SHARED, indexer_shape
from engine.cuda.launch_plan.parts.norms import folds
from engine.cuda.recurrent.convolution import MAX_CONV
from engine.cuda.recurrent.delta import MAX_HEAD
from engine.cuda.recurrent.lightning import MAX_COLUMNS
from engine.cuda.recurrent.mamba_2 import MAX_STATES as MAX_STATES_2
from engine.cuda.recurrent.mamba_plan import MAX_STATES
from engine.cuda.recurrent.ngrams.ngrams import MOST_ROWS
from engine.cuda.recurrent.rwkv.shape import MAX_HEAD as MAX_TIME_MIX
from engine.cuda.rows.skips import MOST_BANKS, MOST_COUNT
from engine.cuda.rows.streams import MOST_STREAMS
from engine.errors import DeviceError
from engine.model.config import (
    Activation,
    AttentionConfig,
    BankedSkip,
    ChannelMixConfig,
    CombinedConfig,
    CompressedConfig,
    DeltaNetConfig,
    FfnConfig,
    GateFunction,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MoeConfig,
    NormKind,
    OutputGate,
    Plamo2Config,
    QkNorm,
    QkWeights,
    RecurrentConfig,
    ResidualKind,
    Routing,
    Rwkv6Config,
    Rwkv7Config,
    ShortConvConfig,
    TimeMixConfig,
    most_streams,
)
from engine.model.kv_format import check_kv_type
from engine.model.loader import LoadedModel
from engine.model.weights import NgramWeights

_SERVED: dict[str, frozenset[Any]] = {
    "norm": frozenset({NormKind.RMS, NormKind.LAYER, True, False}),  # of the model; whether Mamba 2 layers have one
    "qk_norm": frozenset({None, QkNorm.HEAD, QkNorm.EACH_HEAD, QkNorm.WIDTH}),
    "qk_norm_after_rope": frozenset({True, False}),
    "sinks": frozenset({True, False}),
    "output_gate": frozenset({None, OutputGate.IN_QUERY, OutputGate.OWN, OutputGate.PER_HEAD}),
    "gate_function": frozenset(GateFunction),
    "qk_norm_weights": frozenset(QkWeights),
    "residual": frozenset({ResidualKind.SEQUENTIAL, ResidualKind.PARALLEL}),
    "learned_positions": frozenset({True, False}),
    "activation": frozenset(
        {
            Activation.SILU,
            Activation.GELU,
            Activation.RELU,
            Activation.RELU_SQUARED,
            Activation.SWIGLU_CLAMPED,
            Activation.XIELU,
            Activation.SITU,
        }
    ),
    **dict.fromkeys(
        (
            "value_norm",
            "sub_norm",
            "limits_gate",
            "weights_inputs",
            "routed_early",
            "reads_input",
            "sigmoid_gate",
            "separate_norms",
            "embedding_skip",
            "closing_norm",
            "output_scale",
        ),
        frozenset({True, False}),
    ),
    "gated": frozenset({True, False}),
    "routing": frozenset(Routing),
    "normalize": frozenset({True, False}),
    "shared_gate": frozenset({True, False}),
    "causal": frozenset({True, False}),
    "generates": frozenset({True, False}),
    "output_norms": frozenset({True, False}),
    "token_types": frozenset({True, False}),
}
"""Values of a field that kernels serve."""

_ANY = frozenset(
    {
        "window",
        "temperature",
        "clamp",
        "softcap",
        "alibi",
        "latent",
        "residual_scale",
        "embedding_scale",
        "logit_scale",
        "logit_softcap",
        "weight_scale",
        "shared",
        "n_groups",
        "n_groups_used",
        "next_token_layers",
        "norm_dt_b_c",
        "decay_floor",
        "latent_width",
        "adjugate",
        "unit_epsilon",
        "caps",  # of an activation that is not served
        "norm_weights",
        "pooling",  # said of a file, as is the head of a reranker; neither takes part in predicting tokens
        "rank",
        "value_scale",
        "shared_scale",
        "relative_buckets",
        "chunk",
        "cache_layer",
        "limit",
        "xielu",
        "per_layer_width",  # also of layers
        "laurel_rank",
        "sparsity",
        "streams",  # of a model and of its layers, within a limit
        "silent",
        "skip",  # within a limit
        "block",  # only where the layer's weights are
        "output_factor",  # in the weights it is part of the layer's number
        "indexer",  # within a limit
        "ngrams",  # likewise
        "by_token",  # likewise
        "compressed",  # likewise
    }
)
"""Fields that have a default and whose every value is served."""

_RECURRENT = (
    ShortConvConfig,
    MambaConfig,
    Mamba2Config,
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Plamo2Config,
    Rwkv6Config,
    Rwkv7Config,
)
"""Recurrent mixers that kernels serve, within limits."""

_NAMES = {
    "qk_norm": "this kind of normalized queries and keys",
    "activation": "this activation",
    "routing": "this routing of experts",
}


def check_features(model: LoadedModel, kv_type: KvType = KvType.F16) -> None:
    """Refuse a model with parts that the GPU does not compute, or a cache that it does not read.

    Raises:
        DeviceError: names the parts.
        InvalidRequestError: no device can have such a cache of this model.
    """
    check_kv_type(model.config, kv_type)
    missing = missing_features(model)
    if missing:
        raise DeviceError(
            f"architecture {model.config.architecture!r} does not run on the GPU yet, which lacks: "
            f"{', '.join(missing)}; use device='cpu'"
        )
    indexed = any(layer.attention_part is not None and layer.attention_part.indexer for layer in model.config.layers)
    if kv_type is KvType.Q8_0 and indexed:
        raise DeviceError(
            f"kv_type is 'q8_0'; architecture {model.config.architecture!r} has an indexer, which reads caches of f16 "
            "and f32 alone on the GPU: use one of those, or device='cpu'"
        )


def missing_features(model: LoadedModel) -> list[str]:
    """Names of the parts of a model that the GPU does not compute; empty where it computes all of them."""
    found = list(_unserved(model.config))
    streams = most_streams(model.config.skip, len(model.config.layers))
    if streams > (MOST_BANKS if isinstance(model.config.skip, BankedSkip) else MOST_COUNT):
        found.append(f"residual connections between {streams} streams")
    if model.config.streams is not None and model.config.streams.count > MOST_STREAMS:
        found.append(f"a residual stream of more than {MOST_STREAMS} vectors")
    for layer in model.weights.layers:
        found += _unserved(layer.config)
        found += _of_mixer(layer.config.mixer)
        if layer.config.ffn is not None:
            found += _of_ffn(layer.config.ffn)
        if layer.moe is not None and layer.moe.token_experts is not None:
            found += _of_named_experts(layer.config.ffn, layer.moe.token_experts)
        if layer.ngrams is not None:
            found += _of_ngrams(layer.ngrams)
    return list(dict.fromkeys(found))


def _of_mixer(mixer: MixerConfig | None) -> Iterator[str]:
    if isinstance(mixer, CombinedConfig):
        yield from _of_mixer(mixer.attention)
        yield from _of_mixer(mixer.recurrent)
    elif isinstance(mixer, AttentionConfig):
        yield from _of_attention(mixer)
    elif mixer is not None:
        yield from _of_recurrent(mixer)


def _of_attention(config: AttentionConfig) -> Iterator[str]:
    yield from _unserved(config)
    if max(config.key_width, config.value_width) > LARGEST_HEAD:
        yield f"heads of more than {LARGEST_HEAD} columns"
    if config.compressed is not None:
        yield from _of_compressed(config, config.compressed)
    if config.indexer is not None and indexer_shape(config.indexer, KvType.F16).shared_floats > MOST_SHARED:
        yield "an indexer with queries of so many numbers"


def _of_compressed(config: AttentionConfig, compressed: CompressedConfig) -> Iterator[str]:
    if config.window is None or config.rope is None:
        yield "compressed blocks without a window or a rotation"
    blocks = compressed.blocks
    if blocks is None:
        return
    if blocks.length % PAGE and PAGE % blocks.length:
        yield f"compressed blocks of {blocks.length} positions"
    if (
        blocks.index is not None
        and blocks.index.heads * (blocks.index.width + 2) + 8 * blocks.index.width > MOST_SHARED
    ):
        yield "an index of blocks with queries of so many numbers"


def _of_recurrent(config: RecurrentConfig) -> Iterator[str]:
    if not isinstance(config, _RECURRENT):
        yield "this kind of recurrent layers"
        return
    yield from _unserved(config)
    if isinstance(config, LightningConfig):
        if config.head_width > MAX_COLUMNS:
            yield f"lightning attention with heads of more than {MAX_COLUMNS} columns"
        return
    if isinstance(config, TimeMixConfig):
        if config.head_width > MAX_TIME_MIX:
            yield f"time mixing with heads of more than {MAX_TIME_MIX} columns"
        return
    if config.conv_width not in range(2, MAX_CONV + 1):
        yield f"convolutions over other than 2 to {MAX_CONV} tokens"
    most = MAX_STATES_2 if isinstance(config, Mamba2Config) else MAX_STATES
    if isinstance(config, (MambaConfig, Mamba2Config, Plamo2Config)) and config.state > most:
        yield f"recurrent layers with more than {most} states of a channel"
    if isinstance(config, (DeltaNetConfig, KimiDeltaConfig)) and config.head_width > MAX_HEAD:
        yield f"delta rules with heads of more than {MAX_HEAD} columns"


def _of_ffn(ffn: FfnConfig | MoeConfig | ChannelMixConfig) -> Iterator[str]:
    if isinstance(ffn, ChannelMixConfig):
        return
    yield from _unserved(ffn)
    if isinstance(ffn, MoeConfig):
        yield from _unserved(ffn.expert)
        if ffn.shared is not None:
            yield from _unserved(ffn.shared)
        if ffn.adjugate is not None:
            yield from _unserved(ffn.adjugate.expert)
            if ffn.shared is not None:
                yield "adjugate experts beside a shared one"
        if ffn.n_experts > MAX_EXPERTS or ffn.n_used > MAX_USED:
            yield f"more than {MAX_USED} of {MAX_EXPERTS} experts for a token"


def _of_named_experts(
    ffn: FfnConfig | MoeConfig | ChannelMixConfig | None, named: npt.NDArray[np.int32]
) -> Iterator[str]:
    """Scores of the others become minus infinity: then gates must be single numbers, and each expert named once."""
    assert isinstance(ffn, MoeConfig)
    alone = ffn.routing in (Routing.SIGMOID, Routing.SQRT_SOFTPLUS) or ffn.normalize
    if not alone or ffn.n_groups > 1 or ffn.adjugate is not None:
        yield "experts that the token chooses with such a routing"
    ordered = np.sort(named, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        yield "experts that a token names twice"


def _of_ngrams(weights: NgramWeights) -> Iterator[str]:
    if weights.table.rows > MOST_ROWS:
        yield f"a table of more than {MOST_ROWS} n-grams"
    if not all(folds(norm) for norm in (weights.norm_key, weights.norm_query, weights.norm_conv)):
        yield "norms of n-grams that are no mean squares"


def _unserved(config: Any) -> Iterator[str]:
    """Fields that ask for something: other than the default, and no value that is served."""
    for field in fields(config):
        value = getattr(config, field.name)
        served = _SERVED.get(field.name)
        if field.name in _ANY or (served is None and field.default is MISSING):
            continue
        if value not in served if served else value != field.default:
            yield _NAMES.get(field.name, field.name.replace("_", " "))
