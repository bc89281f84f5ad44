"""The known architectures: small declarative files, gathered here."""

from __future__ import annotations

from engine.errors import UnsupportedModelError
from engine.model.architecture import Architecture
from engine.model.architectures import (
    cohere,
    deepseek,
    exaone,
    falcon,
    gemma,
    glm,
    gpt,
    gpt_oss,
    granite,
    llama,
    mamba,
    mistral3,
    olmo,
    others,
    phi,
    qwen,
)

_FILES = (
    cohere, deepseek, exaone, falcon, gemma, glm, gpt, gpt_oss, granite, llama, mamba, mistral3, olmo, others, phi,
    qwen,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for file in _FILES for architecture in file.ARCHITECTURES
}


def find_architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
        UnsupportedModelError: nothing is known about it; lists the known names.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"architecture {name!r} is not supported; supported are: {known}")
    return ARCHITECTURES[name]
