"""The chunks that a request has given, one per token, kept so that hundreds of sequences cost little.

Nearly every chunk is a text and a token. It is kept as a pair, which Python's garbage collector forgets once it has
seen it, and made a StreamChunk when it is read. Tens of thousands of objects would make the collector go through the
whole process again and again, some tens of milliseconds each time, in the middle of a step. Must not know jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast, overload

from engine.request import StreamChunk

_make = tuple.__new__
"""StreamChunk(...) without looking for defaults takes a third of the time."""


class Chunks(Sequence[StreamChunk]):
    """Chunks of one request, in order. They are only ever appended.

    Args:
        request_id: the request.

    Attributes:
        given: a chunk, or the text and the token of one that has nothing else. Appending to it is one statement that
            makes the chunk count as given.
    """

    def __init__(self, request_id: int) -> None:
        self._request_id = request_id
        self.given: list[tuple[str, int] | StreamChunk] = []

    def __len__(self) -> int:
        return len(self.given)

    @overload
    def __getitem__(self, index: int) -> StreamChunk: ...

    @overload
    def __getitem__(self, index: slice) -> list[StreamChunk]: ...

    def __getitem__(self, index: int | slice) -> StreamChunk | list[StreamChunk]:
        if isinstance(index, slice):
            return [self._chunk(one) for one in self.given[index]]
        return self._chunk(self.given[index])

    def __iter__(self) -> Iterator[StreamChunk]:
        return map(self._chunk, self.given)

    @property
    def ended(self) -> bool:
        """Whether the last chunk says that nothing more will come."""
        return bool(self.given) and self[-1].finish_reason is not None

    @property
    def token_ids(self) -> list[int]:
        """The tokens of all chunks."""
        ids: list[int] = []
        for one in self.given:
            ids += self._chunk(one).token_ids
        return ids

    def tell(self, first: int, to: list[StreamChunk]) -> int:
        """Appends the chunks from number `first` on to a list; returns how many there are."""
        given = self.given
        n = len(given)
        if n == first + 1:  # mostly
            to.append(self._chunk(given[first]))
        elif n > first:
            to += self[first:n]
        return n

    def _chunk(self, one: tuple[str, int] | StreamChunk) -> StreamChunk:
        if type(one) is not tuple:
            return cast("StreamChunk", one)
        return _make(StreamChunk, (one[0], (one[1],), None, (), None, None, self._request_id, "", (), ()))
