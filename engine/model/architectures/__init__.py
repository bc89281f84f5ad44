"""The known architectures: one small declarative file per family, gathered here."""

from __future__ import annotations

from engine.errors import UnsupportedModelError
from engine.model.architecture import Architecture
from engine.model.architectures import llama, mistral3, qwen

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for module in (llama, mistral3, qwen) for architecture in module.ARCHITECTURES
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
