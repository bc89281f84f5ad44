"""What a generated text may be: the descriptions of constraints, and the protocol of the mask made of one.

No libraries of grammars and no vocabularies: engine/constraints makes masks of descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from engine.errors import InvalidRequestError

if TYPE_CHECKING:  # command lines read the settings before anything needs arrays
    import numpy as np
    import numpy.typing as npt

MAX_CHARACTERS = 1_000_000
"""Of one description: a longer one is refused before anything reads it."""

MAX_CHOICES = 10_000

Bits: TypeAlias = "npt.NDArray[np.uint32]"
"""One bit per token of the vocabulary: token i is allowed if bit i % 32 of element i // 32 is set."""


class TokenMask(Protocol):
    """The tokens that may follow in one request. A function of the tokens generated so far alone."""

    def bits(self, output_ids: Sequence[int]) -> Bits:
        """(ceil(V / 32),) uint32: the tokens that may come after output_ids. The array is valid until the next call.

        Raises:
            EngineError: no token can follow; the request must end.
        """

    def prepare(self, wanted: Sequence[tuple[TokenMask, Sequence[int]]]) -> None:
        """bits() of these masks will be asked for next, each with these tokens: what several can share is done now.

        Errors are left to bits(). Masks of any kind may be among them.
        """

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """The tokens that must come after output_ids: the only ones that bits() allows one after the other.

        () where there is a choice, or where the text may end.

        Raises:
            EngineError: see bits().
        """

    def is_complete(self, output_ids: Sequence[int]) -> bool:
        """Whether the text is complete and nothing may follow it."""


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{name} is {value!r}; allowed: a text that is not empty")
    if len(value) > MAX_CHARACTERS:
        raise InvalidRequestError(f"{name} has {len(value)} characters; allowed: at most {MAX_CHARACTERS}")
    return value


@dataclass(frozen=True)
class JsonSchema:
    """JSON that is valid under a schema.

    Args:
        schema: the schema as a mapping or boolean, as JSON text, or a class with model_json_schema() (pydantic).

    Attributes:
        text: the schema as JSON text.

    Raises:
        InvalidRequestError: it is no JSON object or boolean.
    """

    schema: Any = field(repr=False, compare=False, hash=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        schema = self.schema
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        try:
            if isinstance(schema, str):
                schema = json.loads(_text("a JSON schema", schema))
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"the JSON schema is not JSON ({error}); give a JSON object") from None
        if not isinstance(schema, (Mapping, bool)):
            raise InvalidRequestError(f"the JSON schema is {text[:80]}; allowed: a JSON object, true or false")
        object.__setattr__(self, "schema", schema)
        object.__setattr__(self, "text", _text("a JSON schema", text))


@dataclass(frozen=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True)
class Regex:
    """A text that a regular expression matches as a whole. The syntax is that of Rust's regex crate, without anchors.

    Raises:
        InvalidRequestError: no text.
    """

    pattern: str

    def __post_init__(self) -> None:
        _text("a regular expression", self.pattern)


@dataclass(frozen=True)
class Choice:
    """One of several texts.

    Raises:
        InvalidRequestError: no choices, too many, or one that is no text.
    """

    options: Sequence[str]

    def __post_init__(self) -> None:
        options = self.options
        if isinstance(options, (str, bytes)) or not isinstance(options, Sequence) or not options:
            raise InvalidRequestError(f"the choices are {options!r}; allowed: a list of at least one text")
        if len(options) > MAX_CHOICES:
            raise InvalidRequestError(f"there are {len(options)} choices; allowed: at most {MAX_CHOICES}")
        for option in options:
            if not isinstance(option, str) or not option:
                raise InvalidRequestError(f"a choice is {option!r}; allowed: texts of at least one character")
        _text("the choices", "".join(options))
        object.__setattr__(self, "options", tuple(options))


@dataclass(frozen=True)
class Lark:
    """A text of a context-free grammar in llguidance's variant of Lark; it begins with the rule `start`.

    A rule may name a control token of the model, as `<|im_end|>`; only there can that token be drawn.

    Raises:
        InvalidRequestError: no text.
    """

    grammar: str

    def __post_init__(self) -> None:
        _text("a Lark grammar", self.grammar)


@dataclass(frozen=True)
class Gbnf:
    """A text of a context-free grammar in llama.cpp's GBNF; it begins with the rule `root`.

    Raises:
        InvalidRequestError: no text.
    """

    grammar: str

    def __post_init__(self) -> None:
        _text("a GBNF grammar", self.grammar)


Constraint = JsonSchema | JsonObject | Regex | Choice | Lark | Gbnf
