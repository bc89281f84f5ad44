"""From an open GGUF file to a checked model: configuration and weights as mapped views. Shared by every backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import ModelFileError, UnsupportedModelError
from engine.gguf.reader import GGUFFile
from engine.model.architecture import Architecture
from engine.model.architectures import find_architecture
from engine.model.building import TensorTable, build_weights, listed
from engine.model.config import ModelConfig
from engine.model.reading import read_config
from engine.model.weights import ModelWeights

log = logging.getLogger("engine")

PARTS_ONLY = {"adapter": "an adapter (LoRA)", "mmproj": "the encoder of pictures or sound of a model"}
"""Values of general.type of files that hold only a part of a model, and what that is."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready for a backend. The file must stay open as long as the weights are used."""

    gguf: GGUFFile
    architecture: Architecture
    config: ModelConfig
    weights: ModelWeights

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(info.n_bytes for info in self.gguf.tensors.values())


def load_model(
    gguf: GGUFFile, run_context: Callable[[int], int] = lambda trained: trained, *, strict: bool = False
) -> LoadedModel:
    """Recognize the architecture, read its hyper-parameters and check every tensor.

    Args:
        gguf: the open file.
        run_context: from the trained context length to the one of the run, which decides in some families how positions
            are rotated.
        strict: refuse unknown metadata keys and tensors, instead of naming them in a warning.

    Raises:
        ModelFileError: metadata is missing, of the wrong type, or contradicts itself.
        UnsupportedModelError: unknown architecture, unknown setting, or a tensor that is missing, of another shape than
            the metadata calls for, or not used by the architecture though it takes part in computations of others.
    """
    if not gguf.tensors:
        raise ModelFileError(
            f"{gguf.path} holds no tensors, perhaps only a vocabulary: take a file with weights, or open the tokenizer "
            "alone with engine.load_tokenizer"
        )
    try:
        return _load(gguf, run_context, strict)
    except ModelFileError as error:
        if str(gguf.path) in str(error):
            raise
        raise type(error)(f"{gguf.path}: {error}") from error


def _load(gguf: GGUFFile, run_context: Callable[[int], int], strict: bool) -> LoadedModel:
    kind = gguf.metadata.get("general.type")
    if isinstance(kind, str) and kind in PARTS_ONLY:
        raise UnsupportedModelError(
            f"{gguf.path} holds {PARTS_ONLY[kind]} (general.type is {kind!r}), which cannot run alone; take the file "
            "of the language model"
        )
    name = gguf.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelFileError(
            f"{gguf.path}: metadata key general.architecture is missing; take a file that holds a model"
        )
    architecture = find_architecture(name)
    tensors = TensorTable(gguf, name)
    embedding_shape = tensors.shape("token_embd.weight")
    if len(embedding_shape) != 2:
        raise UnsupportedModelError(f"tensor token_embd.weight has shape {embedding_shape}; allowed are two dimensions")
    config, unknown_keys = read_config(
        architecture,
        gguf.metadata,
        vocab_size=embedding_shape[0],
        tensors=gguf.tensors,
        run_context=run_context,
        strict=strict,
    )
    weights = build_weights(architecture, config, tensors)
    _warn(gguf, unknown_keys, tensors.finish(strict=strict))
    return LoadedModel(gguf, architecture, config, weights)


def _warn(gguf: GGUFFile, keys: Sequence[str], tensors: Sequence[str]) -> None:
    """Name in one warning what was left out of a file."""
    found = [f"{kind} {listed(names)}" for kind, names in (("metadata", keys), ("tensors", tensors)) if names]
    if found:
        log.warning(
            "%s: unknown %s; the model runs without (strict=True or --strict refuses such a file)",
            gguf.path,
            " and ".join(found),
        )
