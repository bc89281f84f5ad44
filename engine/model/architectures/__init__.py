"""The known architectures: small declarative files, gathered here.

A family is in the folder that says what its layers are made of, or in `series` where that differs from one of its
generations to the next; encoders are one file. Small families that share one part share a file named after that part.
Every file with a tuple `ARCHITECTURES` is found, so a new one needs no other change.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module

from engine.errors import UnsupportedModelError
from engine.model.architecture import Architecture

_ALL: tuple[Architecture, ...] = tuple(
    architecture
    for file in pkgutil.walk_packages(__path__, f"{__name__}.")
    for architecture in getattr(import_module(file.name), "ARCHITECTURES", ())
)

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}


OTHER_NAMES = {"qwen25vl": "qwen2vl"}
"""Names that Ollama's converters give to architectures; those files have the same tensors, and keys under that name."""

OTHER_LAYOUTS = {"gptoss": "gpt-oss"}
"""Names of files whose tensors differ from those of the architecture that llama.cpp's converters write."""


def find_architecture(name: str) -> Architecture:
    """The architecture called `name`, under this name.

    Raises:
        UnsupportedModelError: nothing is known about it; lists the known names.
    """
    if name in OTHER_NAMES:
        return replace(ARCHITECTURES[OTHER_NAMES[name]], name=name)
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        hint = f" (take a file of {OTHER_LAYOUTS[name]!r} from llama.cpp's converter)" if name in OTHER_LAYOUTS else ""
        raise UnsupportedModelError(f"architecture {name!r} is not supported{hint}; supported are: {known}")
    return ARCHITECTURES[name]
