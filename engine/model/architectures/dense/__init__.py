"""Families whose layers have attention and a dense feed-forward part."""

from engine.model.architectures.dense import (
    activations,
    bitnet,
    falcon,
    gpt,
    layer_norm,
    linear_biases,
    mistral3,
    pictures,
    plain,
    residuals,
)

FILES = (
    activations,
    bitnet,
    falcon,
    gpt,
    layer_norm,
    linear_biases,
    mistral3,
    pictures,
    plain,
    residuals,
)
