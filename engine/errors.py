"""Every error a caller can see.

One child of EngineError per party who must act: the caller's input, the model file, the device, the full cache.
This module knows nothing of the rest of the package.
"""


class EngineError(Exception):
    """Base of every error raised on purpose by this package; its text says what to do."""


class InvalidRequestError(EngineError, ValueError):
    """The caller asked for something impossible: a prompt, an option or a sampling setting out of range."""


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
