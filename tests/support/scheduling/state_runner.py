"""A runner whose recurrent states record which tokens went into them, and how.

The state after n tokens is the cell of the last of them (cell_runner.py): a hash of all tokens up to there. The
runner compares the state that a work item reads with the recomputed truth, so that a place that is overwritten too
early, lost in a move, restored from the wrong checkpoint or updated twice fails a step.
"""

from engine.config import STATE_BORDER
from tests.support.scheduling.cell_runner import CellRunner


class States:
    """Rings of R places per slot and a pool of checkpoints, as engine.model.cache.StateStore."""

    def __init__(self, places, n_checkpoints):
        self.places, self.n_checkpoints = places, n_checkpoints
        self.ring, self.pool = {}, {}
        self.before = lambda: None  # called in front of and inside of every copy
        self.n_restored = self.n_moved = self.n_loaded = 0

    def read(self, slot, place):
        return self.ring[slot, place % self.places]

    def write(self, slot, place, value):
        self.ring[slot, place % self.places] = value

    def checkpoint(self, slot, place, entry):
        assert 0 <= entry < self.n_checkpoints
        self.before()
        self.pool[entry] = "half written"
        self.before()
        self.pool[entry] = self.read(slot, place)

    def restore(self, entry, slot, place):
        self.before()
        self.write(slot, place, self.pool[entry])
        self.n_restored += 1
        self.before()

    def move(self, slot, target, place):
        self.before()
        self.write(target, place, self.read(slot, place))
        self.n_moved += 1

    def save(self, slot, place):
        self.before()
        return self.read(slot, place)

    def load(self, saved, slot, place):
        self.before()
        self.write(slot, place, saved)
        self.n_loaded += 1


class StateRunner(CellRunner):
    """Pages as in CellRunner, and states; steps run ahead even where the one that launched them is cut short."""

    def __init__(self, *args, spare=0, n_checkpoints=4, **options):
        super().__init__(*args, **options)
        # One committed place, one that a step writes, and those of the steps launched behind it.
        self.states = States(self.lookahead + 2 + spare, n_checkpoints)
        self.states.before = self.copying
        self.flying = {}

    def copying(self):
        self.run_ahead()
        self.trouble()

    def feed(self, item):
        sequence, states = item.sequence, self.states
        slot, place, end = sequence.slot, sequence.state_place, item.start + len(item.token_ids)
        truth = self.truth[sequence.request_id].cells
        if not item.decode:
            scoring = item.score or sequence.params.prompt_logprobs is not None  # such pieces end where it begins, too
            assert end % STATE_BORDER == 0 or end >= sequence.pieces_end - 1 or scoring, "cut apart from borders"
        if item.start:
            assert states.read(slot, place) == truth[item.start - 1], "the state is not the one after these tokens"
        states.write(slot, place + 1, "half written")
        if item.decode and self.lookahead:
            self.flying[slot] = place + 2
        self.trouble()
        states.write(slot, place + 1, truth[end - 1])
        return super().feed(item)

    def run_ahead(self):
        for slot, place in self.flying.items():
            for step in range(self.lookahead):
                self.states.write(slot, place + step, "computed ahead")
        self.flying = {}
        super().run_ahead()

    def release(self, slot):
        self.run_ahead()  # launched before, and on the same stream as all that follows
        super().release(slot)
