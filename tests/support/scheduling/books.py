"""Recounts slots, pages, entries and requests of a loop."""

from collections import Counter


def check_books(loop):
    """Recounts what the scheduler's fields must be from the sequences that hold slots and pages."""
    scheduler = loop._scheduler
    assert loop.n_active == len(loop._jobs)  # which recovers
    blocks, seated = scheduler.blocks, scheduler.sequences()
    held = Counter(page for sequence in seated for page in sequence.pages)
    held.update(scheduler._prefixes.sources)
    assert [blocks.holders(page) for page in range(blocks.n_pages)] == [held[page] for page in range(blocks.n_pages)]
    assert sorted([*blocks._free, *blocks._kept, *held]) == list(range(blocks.n_pages)), "a page lost, or twice"
    assert set(blocks._kept) == set(blocks._nodes) - set(held)
    slots = [sequence.slot for sequence in seated]
    assert sorted([*scheduler._slots.free, *slots]) == list(range(scheduler._slots.n))
    started = [one.request.request_id for one in scheduler._started]
    assert sorted([*started, *scheduler._waiting]) == sorted(loop._jobs)
    if blocks._checkpoints is not None:
        pool = blocks._checkpoints
        assert sorted([*pool._free, *pool._entries.values()]) == list(range(pool.n_entries))
        assert set(pool._entries) <= set(blocks._nodes)
