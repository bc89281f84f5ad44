"""The tokenizer of a file: of one that is being opened, or alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.api.names import resolve_model
from engine.errors import TokenizerError
from engine.gguf import open_gguf
from engine.text import Tokenizer


def open_tokenizer(metadata: Mapping[str, Any], path: Path, pre: str | None) -> Tokenizer | str:
    """The file's tokenizer; why there is none, where it has none or an unknown kind: that matters only to text."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or (isinstance(kind, str) and kind in ("none", "no_vocab")):
        return f"{path} holds no tokenizer: give token ids instead of text"
    try:
        return Tokenizer.from_metadata(metadata, pre=pre)
    except TokenizerError as error:
        return str(error)


def load_tokenizer(path: str | Path, *, pre_tokenizer: str | None = None) -> Tokenizer:
    """The tokenizer of a GGUF file, or of a model named hf:..., alone; the file needs no weights."""
    with open_gguf(resolve_model(path)) as file:
        return Tokenizer.from_metadata(file.metadata, pre=pre_tokenizer)
