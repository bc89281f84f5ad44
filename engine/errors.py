"""Every error a caller can see.

One child of EngineError per party who must act: the caller's input, the model file, the device, the full cache, the
hub that models are fetched from.
This module imports nothing of the package.
"""

from __future__ import annotations

from typing import Any, TypeVar

E = TypeVar("E", bound=BaseException)


class Portable(Exception):
    """An error that keeps its text and attributes when it is copied, pickled, or sent from one process to another.

    Also where its constructor takes other arguments than the text.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__.copy())


class EngineError(Portable):
    """Base of every error raised on purpose by this package; its text says what to do."""


class InvalidRequestError(EngineError, ValueError):
    """The caller asked for something impossible: a prompt, an option or a sampling setting out of range."""


class ConstraintError(InvalidRequestError):
    """What the answer has to be cannot be used: it contradicts itself, or asks for what is not supported."""


class ModelFileError(EngineError):
    """The model file cannot be used."""


class GGUFError(ModelFileError):
    """The file is not a well-formed GGUF file; names the file, the field, what was found and what is allowed."""


class UnsupportedModelError(ModelFileError):
    """The file is a well-formed GGUF but holds an architecture, tensor or setting that is not supported."""


class TokenizerError(ModelFileError):
    """The file's tokenizer is missing, broken or of an unknown kind."""


class DeviceError(EngineError, RuntimeError):
    """The device cannot be used: missing driver or package, out of memory, a failed kernel."""


class DownloadError(EngineError):
    """A model named hf:... cannot be had: the name, the hub, the network or the disk; says which and what to do."""


class ContextFullError(EngineError):
    """The KV cache has no room for the tokens asked for.

    Attributes:
        length: tokens the sequence would need.
        limit: tokens the context holds.
    """

    def __init__(self, length: int, limit: int, hint: str = "", parts: str = "") -> None:
        self.length = length
        self.limit = limit
        remedy = hint or "shorten the prompt, lower max_tokens, or open the model with a larger context_length"
        found = f"{length} tokens ({parts})" if parts else f"{length} tokens"
        super().__init__(f"{found} do not fit the context of {limit}: {remedy}")


def _restore(kind: type[E], args: tuple[Any, ...], attributes: dict[str, Any]) -> E:
    """A copy of an error, made without its constructor."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def copy_error(error: E) -> E:
    """The error for one more caller: a copy with the same cause. Errors of other modules are returned unchanged."""
    if not isinstance(error, EngineError):
        return error
    copied = _restore(type(error), error.args, error.__dict__)
    copied.__cause__, copied.__context__ = error.__cause__, error.__context__
    copied.__suppress_context__ = error.__suppress_context__
    return copied.with_traceback(error.__traceback__)
