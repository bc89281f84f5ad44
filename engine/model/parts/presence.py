"""Whether a family's files have something: the answer that all parts declare alike."""

from __future__ import annotations

from enum import Enum


class Presence(Enum):
    """Whether a family's files have something."""

    NEVER = "never"
    OPTIONAL = "optional"  # as the file has it
    ALWAYS = "always"
