"""Counts the values of JSON text piece by piece, as a body arrives. Knows nothing of what they mean."""

from __future__ import annotations

MOST_VALUES = 1 << 20
"""Of a body of the usual size. Parsing holds the interpreter lock, for 0.1 to 0.4 s of so many values, and no other
request is served meanwhile. A prompt of a million token ids is that long."""

BYTES_PER_VALUE = 16
"""A larger body may have one value for each so many bytes."""

WEIGHT = 8
"""Values as which a list, an object and a field of an object count: each takes about 2 us, a number 0.1 us."""


def most_values(max_body: int) -> int:
    """Values that a body may have where it may have so many bytes."""
    return max(MOST_VALUES, max_body // BYTES_PER_VALUE)


class ValueCount:
    """Values of one JSON text, as far as it is known.

    What is counted are the signs outside strings: the comma between two values counts as 1, what opens a list or an
    object and what follows the name of a field as WEIGHT. In text that is no JSON the number means nothing.

    Attributes:
        n: values so far.
    """

    def __init__(self) -> None:
        self.n = 1
        self._in_string = 0
        self._cut = b""

    def add(self, data: bytes) -> None:
        """Count those of the next piece."""
        data = self._cut + data
        self._cut = b""
        if b"\\" in data:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of quotes begins or ends a string
            if data.endswith(b"\\"):  # what it escapes is in the next piece
                data, self._cut = data[:-1], b"\\"
        parts = data.split(b'"')
        signs = b"".join(parts[self._in_string :: 2])
        self.n += signs.count(b",") + WEIGHT * (signs.count(b"[") + signs.count(b"{") + signs.count(b":"))
        self._in_string ^= (len(parts) - 1) & 1
