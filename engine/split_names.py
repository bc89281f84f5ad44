"""Names of the parts of a split model file: NAME-00001-of-00003.gguf. Text only: no file is looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})(?P<end>-of-(?P<count>\d{5})\.gguf)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class PartName:
    """The name of one part, taken apart.

    Attributes:
        stem: what all parts have in common, before their numbers.
        number: of the part, 1 for the first one.
        count: of all parts.
        end: what all parts have in common behind their numbers.
    """

    stem: str
    number: int
    count: int
    end: str

    def all_names(self) -> list[str]:
        """The names of all parts, in order."""
        return [f"{self.stem}-{number:05d}{self.end}" for number in range(1, self.count + 1)]


def part_name(name: str) -> PartName | None:
    """The name of a file without its folder, taken apart; None where it is not the name of a part."""
    match = _PART.fullmatch(name)
    return None if match is None else PartName(match["stem"], int(match["number"]), int(match["count"]), match["end"])
