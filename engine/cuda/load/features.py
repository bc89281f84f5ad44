"""Says which parts of a model have no GPU kernels yet, from its configuration. Needs no GPU.

What is served is listed, not what is missing: a new part of a model is declined until it is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from engine.cuda.attention.attention_plan import LARGEST_HEAD
from engine.cuda.experts.router import MAX_EXPERTS, MAX_USED
from engine.cuda.recurrent.mamba_plan import MAX_CONV, MAX_STATES
from engine.errors import DeviceError
from engine.model.config import (
    Activation,
    AttentionConfig,
    CombinedConfig,
    FfnConfig,
    MixerConfig,
    MoeConfig,
    NormKind,
    QkNorm,
    ResidualKind,
    Routing,
)
from engine.model.loader import LoadedModel
from engine.model.recurrent_config import (
    DeltaNetConfig,
    KimiDeltaConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    Plamo2Config,
    ShortConvConfig,
)

_SERVED: dict[str, frozenset[Any]] = {
    "norm": frozenset({NormKind.RMS, NormKind.LAYER}),
    "qk_norm": frozenset({None, QkNorm.HEAD, QkNorm.EACH_HEAD, QkNorm.WIDTH}),
    "qk_norm_after_rope": frozenset({True, False}),
    "sinks": frozenset({True, False}),
    "residual": frozenset({ResidualKind.SEQUENTIAL, ResidualKind.PARALLEL}),
    "learned_positions": frozenset({True, False}),
    "activation": frozenset(
        {
            Activation.SILU,
            Activation.GELU,
            Activation.RELU,
            Activation.RELU_SQUARED,
            Activation.SWIGLU_CLAMPED,
        }
    ),
    "gated": frozenset({True, False}),
    "routing": frozenset({Routing.SOFTMAX, Routing.SIGMOID, Routing.SOFTMAX_CHOSEN}),
    "normalize": frozenset({True, False}),
    "shared_gate": frozenset({True, False}),
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
        "value_scale",
        "shared_scale",
    }
)
"""Fields that have a default and whose every value is served."""

_MIXER_NAMES = {
    ShortConvConfig: "short convolutions as layers",
    Mamba2Config: "Mamba 2 layers",
    DeltaNetConfig: "gated delta rules",
    KimiDeltaConfig: "Kimi delta attention",
    LightningConfig: "lightning attention",
    Plamo2Config: "PLaMo 2 layers",
}

_NAMES = {
    "output_gate": "gated attention",
    "indexer": "an indexer that chooses positions",
    "skip": "this kind of residual connections",
    "norm_weights": "weights of the norms in Mamba layers",
    "qk_norm": "this kind of normalized queries and keys",
    "activation": "this activation",
    "routing": "this routing of experts",
    "gate_function": "this function of gates of attention",
    "chunk": "attention in chunks",
    "qk_norm_weights": "normalized queries and keys without weights",
    "block": "layers that are passed several times",
    "closing_norm": "norms between passes of layers",
    "embedding_skip": "embeddings added to later layers",
    "silent": "tokens that are never given",
    "limit": "limits of gated activations",
    "limits_gate": "limits of gated activations",
    "weights_inputs": "weights of experts on their inputs",
    "routed_early": "routers before the mixer",
    "adjugate": "adjugate experts",
    "reads_input": "experts that read the layer's input",
}


def check_features(model: LoadedModel) -> None:
    """Refuse a model with parts that the GPU does not compute.

    Raises:
        DeviceError: names the parts.
    """
    missing = missing_features(model)
    if missing:
        raise DeviceError(
            f"architecture {model.config.architecture!r} does not run on the GPU yet, which lacks: "
            f"{', '.join(missing)}; use device='cpu'"
        )


def missing_features(model: LoadedModel) -> list[str]:
    """Names of the parts of a model that the GPU does not compute; empty where it computes all of them."""
    found = list(_unserved(model.config))
    for layer in model.weights.layers:
        found += _unserved(layer.config)
        found += _of_mixer(layer.config.mixer)
        if layer.config.ffn is not None:
            found += _of_ffn(layer.config.ffn)
    return list(dict.fromkeys(found))


def _of_mixer(mixer: MixerConfig | None) -> Iterator[str]:
    if isinstance(mixer, AttentionConfig):
        yield from _of_attention(mixer)
    elif isinstance(mixer, MambaConfig):
        yield from _of_mamba(mixer)
    elif mixer is None:
        yield "layers of a feed-forward part alone"
    elif isinstance(mixer, CombinedConfig):
        yield "attention and a recurrent mixer in one layer"
    else:
        yield _MIXER_NAMES[type(mixer)]


def _of_attention(config: AttentionConfig) -> Iterator[str]:
    yield from _unserved(config)
    if config.temperature is not None and config.temperature.offset:
        yield "offsets of attention's temperature"
    if max(config.key_width, config.value_width) > LARGEST_HEAD:
        yield f"heads of more than {LARGEST_HEAD} columns"


def _of_mamba(config: MambaConfig) -> Iterator[str]:
    yield from _unserved(config)
    if config.state > MAX_STATES:
        yield f"recurrent layers with more than {MAX_STATES} states of a channel"
    if config.conv_width > MAX_CONV:
        yield f"convolutions over more than {MAX_CONV} tokens"


def _of_ffn(ffn: FfnConfig | MoeConfig) -> Iterator[str]:
    yield from _unserved(ffn)
    if isinstance(ffn, MoeConfig):
        yield from _unserved(ffn.expert)
        if ffn.shared is not None:
            yield from _unserved(ffn.shared)
        if ffn.n_experts > MAX_EXPERTS or ffn.n_used > MAX_USED:
            yield f"more than {MAX_USED} of {MAX_EXPERTS} experts for a token"


def _unserved(config: Any) -> Iterator[str]:
    """Fields that ask for something: other than the default, and no value that is served."""
    for field in fields(config):
        value = getattr(config, field.name)
        served = _SERVED.get(field.name)
        if field.name in _ANY or (served is None and field.default is MISSING):
            continue
        if value not in served if served else value != field.default:
            yield _NAMES.get(field.name, field.name.replace("_", " "))
