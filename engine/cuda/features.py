"""Says which parts of a model have no GPU kernels yet, from its configuration and weights. Needs no GPU.

What is served is listed, not what is missing: a new part of a model is declined until it is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from engine.errors import DeviceError
from engine.model.config import Activation, FfnConfig, MoeConfig, NormKind, QkNorm, Routing
from engine.model.loader import LoadedModel
from engine.model.weights import LayerWeights, Norm

_SERVED: dict[str, frozenset[Any]] = {
    "qk_norm": frozenset({None, QkNorm.HEAD}),
    "activation": frozenset({Activation.SILU, Activation.GELU}),
    "gated": frozenset({True, False}),
    "routing": frozenset({Routing.SOFTMAX}),
    "normalize": frozenset({True, False}),
    "shared_gate": frozenset({True, False}),
}
"""Values of a field that kernels serve."""

_ANY = frozenset({"window", "temperature", "weight_scale", "shared", "n_groups_used"})
"""Fields that have a default and whose every value is served."""

_NAMES = {
    "softcap": "attention soft-capping",
    "sinks": "attention sinks",
    "alibi": "linear attention biases (ALiBi)",
    "clamp": "clamped queries, keys and values",
    "latent": "latent attention",
    "qk_norm": "this kind of normalized queries and keys",
    "qk_norm_after_rope": "queries and keys normalized after rotation",
    "residual": "attention and feed-forward in parallel",
    "residual_scale": "scaled residuals",
    "embedding_scale": "scaled embeddings",
    "learned_positions": "learned positions",
    "logit_scale": "scaled logits",
    "logit_softcap": "logit soft-capping",
    "activation": "this activation",
    "routing": "this routing of experts",
    "n_groups": "groups of experts",
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
    config, weights = model.config, model.weights
    found = list(_unserved(config))
    if config.norm is not NormKind.RMS:
        found.append("LayerNorm")
    if weights.embedding_norm is not None:
        found.append("a norm behind the embedding")
    if not _plain_norm(weights.output_norm):
        found.append("norms with a bias or without a weight")
    for layer in weights.layers:
        found += _unserved(layer.config)
        found += _unserved(layer.config.attention)
        found += _of_ffn(layer.config.ffn)
        found += _of_weights(layer)
    return list(dict.fromkeys(found))


def _of_ffn(ffn: FfnConfig | MoeConfig) -> Iterator[str]:
    yield from _unserved(ffn)
    if isinstance(ffn, MoeConfig):
        yield from _unserved(ffn.expert)
        if ffn.shared is not None:
            yield from _unserved(ffn.shared)


def _of_weights(layer: LayerWeights) -> Iterator[str]:
    norms = (layer.attn_norm, layer.ffn_norm)
    if any(norm is None for norm in norms):
        yield "layers without a norm before a part"
    if layer.attn_post_norm is not None or layer.ffn_post_norm is not None:
        yield "norms behind a part"
    both = (*norms, layer.attention.q_norm, layer.attention.k_norm)
    if not all(_plain_norm(norm) for norm in both if norm is not None):
        yield "norms with a bias or without a weight"
    if layer.ffn is not None and layer.ffn.act_scales is not None:
        yield "scaled activations"
    if layer.moe is not None:
        if layer.moe.selection_bias is not None:
            yield "a bias in the choice of experts"
        if layer.moe.gate is None:
            yield "experts without a gate"


def _plain_norm(norm: Norm) -> bool:
    return norm.kind is NormKind.RMS and norm.weight is not None and norm.bias is None


def _unserved(config: Any) -> Iterator[str]:
    """Fields that ask for something: other than the default, and no value that is served."""
    for field in fields(config):
        value = getattr(config, field.name)
        served = _SERVED.get(field.name)
        if field.name in _ANY or (served is None and field.default is MISSING):
            continue
        if value not in served if served else value != field.default:
            yield _NAMES.get(field.name, field.name.replace("_", " "))
