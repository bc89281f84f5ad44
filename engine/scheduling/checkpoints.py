"""Checkpoints: which known pages have a copy of the recurrent state at their end, and in which entry. Integers only.

A page of keys can be entered at any position by a prompt with the same tokens; a recurrent state can only be resumed
where a copy of it was kept. The entries of the pool hold such copies. An entry belongs to the page that ends there and
is freed with it; where no entry is free, the one unused for longest is evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container


class CheckpointPool:
    """All entries.

    Args:
        n_entries: entries 0 to n_entries - 1; may be 0.
    """

    def __init__(self, n_entries: int) -> None:
        self.n_entries = n_entries
        self._free = list(range(n_entries))[::-1]
        self._entries: OrderedDict[int, int] = OrderedDict()  # by page, unused for longest first

    @property
    def n_free(self) -> int:
        """Entries that belong to no page."""
        return len(self._free)

    def find(self, page: int) -> int | None:
        """The entry of a page; None where it has none."""
        return self._entries.get(page)

    def use(self, page: int) -> None:
        """The entry of a page has been used now."""
        self._entries.move_to_end(page)

    def take(self) -> int | None:
        """An entry that belongs to no page any more, perhaps taken from one; None where the pool is empty."""
        if self._free:
            return self._free.pop()
        return self._entries.popitem(last=False)[1] if self._entries else None

    def add(self, page: int, entry: int) -> None:
        """An entry from take() belongs to a page that has none."""
        assert page not in self._entries
        self._entries[page] = entry

    def drop(self, page: int) -> None:
        """Free the entry of a page, if it has one."""
        entry = self._entries.pop(page, None)
        if entry is not None:
            self._free.append(entry)

    def drop_entry(self, entry: int) -> None:
        """Free an entry, if it belongs to a page: it does not hold what it should."""
        for page, held in self._entries.items():
            if held == entry:
                self.drop(page)
                return

    def recover(self, pages: Container[int]) -> None:
        """Make all fields agree again after an exception has cut a change short; `pages` are those that are known."""
        entries = OrderedDict((page, entry) for page, entry in self._entries.items() if page in pages)
        free = sorted(set(range(self.n_entries)) - set(entries.values()), reverse=True)
        self._entries, self._free = entries, free
