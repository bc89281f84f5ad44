"""Run any GGUF language model from Python.

>>> from engine import LLM, SamplingParams
>>> with LLM() as llm:                                       # the bundled demonstration model
...     print(llm.generate("Once upon a time", SamplingParams(max_tokens=32)).text)

The names below are the public ones. They are loaded when first used, so that `import engine` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api.asynchronous.async_llm import AsyncLLM, AsyncStream
    from engine.api.embedding.embeddings import RankedDocument
    from engine.api.llm import LLM
    from engine.api.tokenizers import load_tokenizer
    from engine.config import EngineConfig
    from engine.errors import (
        ContextFullError,
        DeviceError,
        DownloadError,
        EngineError,
        GGUFError,
        InvalidRequestError,
        ModelFileError,
        TokenizerError,
        UnsupportedModelError,
    )
    from engine.request import GenerationResult, GenerationStats, StreamChunk, TokenSample, ToolCall
    from engine.sampling.constraint import Choice, Gbnf, JsonObject, JsonSchema, Lark, Regex
    from engine.sampling.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "Choice",
    "ContextFullError",
    "DeviceError",
    "DownloadError",
    "EngineConfig",
    "EngineError",
    "GGUFError",
    "Gbnf",
    "GenerationResult",
    "GenerationStats",
    "InvalidRequestError",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "ModelFileError",
    "RankedDocument",
    "Regex",
    "SamplingParams",
    "StreamChunk",
    "TokenSample",
    "TokenizerError",
    "ToolCall",
    "UnsupportedModelError",
    "__version__",
    "load_tokenizer",
]

_HOME = {
    "LLM": "engine.api.llm",
    "AsyncLLM": "engine.api.asynchronous.async_llm",
    "AsyncStream": "engine.api.asynchronous.async_llm",
    "RankedDocument": "engine.api.embedding.embeddings",
    "load_tokenizer": "engine.api.tokenizers",
    "EngineConfig": "engine.config",
    "GenerationResult": "engine.request",
    "GenerationStats": "engine.request",
    "StreamChunk": "engine.request",
    "TokenSample": "engine.request",
    "ToolCall": "engine.request",
    "Choice": "engine.sampling.constraint",
    "Gbnf": "engine.sampling.constraint",
    "JsonObject": "engine.sampling.constraint",
    "JsonSchema": "engine.sampling.constraint",
    "Lark": "engine.sampling.constraint",
    "Regex": "engine.sampling.constraint",
    "SamplingParams": "engine.sampling.params",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "engine.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
