"""Families of several generations, whose layers differ: from dense parts to experts, latent attention or states."""

from engine.model.architectures.series import (
    bailing,
    cohere,
    deepseek,
    exaone,
    gemma,
    glm,
    granite,
    hunyuan,
    llama,
    minimax,
    olmo,
    phi,
    plamo,
    qwen,
)

FILES = (
    bailing,
    cohere,
    deepseek,
    exaone,
    gemma,
    glm,
    granite,
    hunyuan,
    llama,
    minimax,
    olmo,
    phi,
    plamo,
    qwen,
)
