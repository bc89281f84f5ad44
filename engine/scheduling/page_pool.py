"""Pages of the cache: which sequences hold them, and which prompts' pages can be used again. Integers only.

A page is free, held by one or more sequences, or kept: its holder count is 0, but it has the keys and values of a
prompt and may be held again by the next request that begins with the same tokens. Kept pages are evicted, the one
unused for longest first, when no free page is left. In a model whose layers have no keys a page has no bytes; it still
counts positions, and checkpoints of the recurrent state belong to it. Must not know of devices or text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.config import PAGE
from engine.scheduling.checkpoints import CheckpointPool

_MOST_LOOKED_AT = 32
"""Pages compared for a partial match: prompts that differ within a page rarely have more relatives."""


@dataclass(eq=False)
class _Node:
    """A page whose first tokens are known, behind the pages of its parents. The root has no page."""

    page: int
    tokens: tuple[int, ...]
    parent: _Node | None
    whole: dict[tuple[int, ...], _Node] = field(default_factory=dict)  # children by all their tokens
    by_first: dict[int, list[_Node]] = field(default_factory=dict)  # children by their first token


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt that the cache holds.

    Attributes:
        pages: pages to hold as they are, PAGE tokens each.
        source: a page whose first `n_more` tokens go on from there; to be copied, for what follows differs. None: no.
        n_more: tokens of the source, 0 without one.
        entry: the checkpoint with the recurrent state after these pages; None where the model has none.
        parts_at: tokens in whole pages that another prompt began with, where its state was not kept; else 0.
    """

    pages: tuple[int, ...]
    source: int | None = None
    n_more: int = 0
    entry: int | None = None
    parts_at: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt that need not be computed."""
        return len(self.pages) * PAGE + self.n_more


class PagePool:
    """All pages of a cache.

    Args:
        n_pages: pages 0 to n_pages - 1.
        prefix_cache: keep pages of prompts for later requests.
        checkpoints: copies of recurrent states at the ends of pages; None where the model has no state, so that any
            known position can be resumed.
    """

    def __init__(self, n_pages: int, *, prefix_cache: bool = True, checkpoints: CheckpointPool | None = None) -> None:
        self.n_pages = n_pages
        self._checkpoints = checkpoints
        self._prefix_cache = prefix_cache
        self._free = list(range(n_pages))[::-1]
        self._holders = [0] * n_pages
        self._nodes: dict[int, _Node] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._root = _Node(-1, (), None)

    @property
    def n_available(self) -> int:
        """Pages with no holder."""
        return len(self._free) + len(self._kept)

    def holders(self, page: int) -> int:
        """Sequences that hold a page."""
        return self._holders[page]

    def can_allocate(self, n: int) -> bool:
        """Whether allocate(n) would work."""
        return n <= self.n_available

    def allocate(self, n: int) -> list[int]:
        """n pages without a holder, held once each from now on; what they hold is void."""
        assert self.can_allocate(n), f"{n} pages of {self.n_available}"
        pages = []
        for _ in range(n):
            page = self._free.pop() if self._free else self._forget_oldest()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page of a sequence, given in the sequence's order."""
        # Backwards: of a chain of pages the last is given away first, as the first is good for more prompts.
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} has no holder"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._nodes:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def find(self, tokens: Sequence[int], most: int) -> Prefix:
        """The longest beginning of `tokens`, of at most `most` tokens, that can be resumed. Holds nothing yet."""
        pages: list[int] = []
        node, done = self._root, 0
        while done + PAGE <= most:
            child = node.whole.get(tuple(tokens[done : done + PAGE]))
            if child is None:
                break
            pages.append(child.page)
            node, done = child, done + PAGE
        if self._checkpoints is not None:
            return _cut_back(pages, self._checkpoints)
        rest = tuple(tokens[done : min(done + PAGE, most)])
        best, n_more = None, 0
        for child in node.by_first.get(rest[0], ())[-_MOST_LOOKED_AT:] if rest else ():
            same = _common(child.tokens, rest)
            if same > n_more:
                best, n_more = child.page, same
        return Prefix(tuple(pages), best, n_more)

    def remember(self, pages: Sequence[int], tokens: Sequence[int]) -> int | None:
        """Note that held pages contain a prompt's first tokens: whole pages, or the whole prompt with a page in part.

        Pages of a sequence that hold what known pages already hold stay unknown.

        Returns:
            The known page that holds the last of these tokens; None where nothing is remembered.
        """
        if not self._prefix_cache or not tokens:
            return None
        node = self._root
        for place in range(0, len(tokens), PAGE):
            held, page = tuple(tokens[place : place + PAGE]), pages[place // PAGE]
            child = node.whole.get(held)
            if child is None:
                assert page not in self._nodes, f"page {page} is known to hold something else"
                child = self._nodes[page] = _link(_Node(page, held, node))
            node = child
            if len(held) < PAGE:
                break
        return node.page

    def checkpoint_entry(self, page: int) -> int | None:
        """An entry for the state at the end of a known page; None where it has one already or none can be had."""
        if self._checkpoints is None or self._checkpoints.find(page) is not None:
            return None
        return self._checkpoints.take()

    def add_checkpoint(self, page: int, entry: int) -> None:
        """From now on prompts may resume at the end of a page, with the state in an entry from checkpoint_entry()."""
        assert self._checkpoints is not None
        self._checkpoints.add(page, entry)

    def use_checkpoint(self, page: int) -> None:
        """A sequence resumes at the end of a page: its entry is now the one used last."""
        assert self._checkpoints is not None
        self._checkpoints.use(page)

    def drop_checkpoint(self, entry: int) -> None:
        """An entry was not written: no page has it any more."""
        assert self._checkpoints is not None
        self._checkpoints.drop_entry(entry)

    def recover(self, held: Iterable[Sequence[int]]) -> None:
        """Make all fields agree again after an exception has cut a change short. May be repeated.

        A page is known while it is in `_nodes`: it enters after it was written, and leaves before it is given away.

        Args:
            held: the pages of each holder.
        """
        holders = [0] * self.n_pages
        for pages in held:
            for page in pages:
                holders[page] += 1
        root = _Node(-1, (), None)
        nodes: dict[int, _Node] = {}
        renewed = {id(self._root): root}
        for page, old in self._nodes.items():  # parents before their children
            parent = renewed.get(id(old.parent))
            if parent is not None and old.tokens not in parent.whole:
                nodes[page] = renewed[id(old)] = _link(_Node(page, old.tokens, parent))
        without = [page for page in (*self._kept, *nodes) if not holders[page] and page in nodes]
        free = [page for page in range(self.n_pages)[::-1] if not holders[page] and page not in nodes]
        kept = OrderedDict.fromkeys(without)
        if self._checkpoints is not None:
            self._checkpoints.recover(nodes)
        self._root, self._nodes, self._holders, self._kept, self._free = root, nodes, holders, kept, free

    def _forget_oldest(self) -> int:
        """Evicts the page unused for longest; what was known behind it can no longer be found."""
        page, _ = self._kept.popitem(last=False)
        self._unlink(self._nodes[page])
        lost = [self._nodes.pop(page)]
        while lost:
            node = lost.pop()
            if self._checkpoints is not None:
                self._checkpoints.drop(node.page)
            for child in node.whole.values():
                lost.append(child)
                del self._nodes[child.page]
                if child.page in self._kept:
                    del self._kept[child.page]
                    self._free.append(child.page)
        return page

    def _unlink(self, node: _Node) -> None:
        assert node.parent is not None
        del node.parent.whole[node.tokens]
        relatives = node.parent.by_first[node.tokens[0]]
        relatives.remove(node)
        if not relatives:
            del node.parent.by_first[node.tokens[0]]


def _link(node: _Node) -> _Node:
    """The node, made a child of its parent."""
    assert node.parent is not None
    node.parent.whole[node.tokens] = node
    node.parent.by_first.setdefault(node.tokens[0], []).append(node)
    return node


def _cut_back(pages: list[int], checkpoints: CheckpointPool) -> Prefix:
    """The pages up to the last one at whose end a state was kept."""
    known = len(pages)
    while pages and checkpoints.find(pages[-1]) is None:
        pages.pop()
    parts_at = known * PAGE if known > len(pages) else 0
    return Prefix(tuple(pages), entry=checkpoints.find(pages[-1]) if pages else None, parts_at=parts_at)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
