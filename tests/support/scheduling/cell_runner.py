"""A runner whose pages hold, for every position, what a model's keys and values depend on.

A cell is a hash of all tokens up to its position and of how each was computed, as prompt or as generated token. The
runner compares every cell that a sequence reads with a slow recomputation, and draws tokens from what it read: a page
that is lost, shared by mistake, restored wrongly or found for the wrong prompt changes a text or fails a step.
"""

from engine.config import PAGE
from engine.errors import EngineError
from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.job import Job
from engine.scheduling.output import OutputAssembler

PROMPT, GENERATED = "prompt", "generated"


class RunnerFailure(EngineError):
    """A step that the test made fail."""


def draw(cells, seed):
    """The token after positions whose cells are given."""
    return hash((cells[-1], len(cells), seed)) % 50


SHORTEST_PIECE = 3
RUNS = (0, 0, 0, 0, 0, 1, 2, 6, 90)


class Forcing:
    """A constraint that allows every token, and forces some number of tokens behind a few of them."""

    def forced(self, output_ids):
        n = RUNS[hash((output_ids[-1], len(output_ids))) % len(RUNS)]
        return [(output_ids[-1] + 7 * i) % 50 for i in range(n)]

    def is_complete(self, output_ids):
        return False


class Truth:
    """What a request must give, computed alone and without any cache."""

    def __init__(self, prompt, seed, max_output, mask=None, forced_as=PROMPT):
        self.cells, last = [], 0
        for token in prompt:
            last = hash((last, token, PROMPT))
            self.cells.append(last)
        self.output_ids = []
        while len(self.output_ids) < max_output:
            self.output_ids.append(draw(self.cells, seed))
            forced = mask.forced(self.output_ids) if mask else []
            forced = forced if 1 + len(forced) >= SHORTEST_PIECE else []
            tokens = [self.output_ids[-1], *forced]
            self.output_ids += forced
            for token in tokens:
                self.cells.append(hash((self.cells[-1], token, forced_as if forced else GENERATED)))
        del self.output_ids[max_output:]


class CellRunner:
    """A runner that can be told to fail or to be interrupted in the middle of what it does."""

    def __init__(self, n_pages, max_sequences, prefill_chunk, mixed_chunk, lookahead):
        self.n_pages, self.max_sequences, self.lookahead = n_pages, max_sequences, lookahead
        self.prefill_chunk, self.mixed_chunk, self.mixed_per_sequence = prefill_chunk, mixed_chunk, 3
        self.shortest_piece, self.known_room = SHORTEST_PIECE, None
        self.pages = [["never written"] * PAGE for _ in range(n_pages)]
        self.live = {}  # slot -> sequence, from its first step until release()
        self.ahead = {}  # slot -> (pages, position) that a step launched ahead is still to write to
        self.truth = {}  # request id -> Truth
        self.first_start = {}  # request id -> first position fed
        self.n_saved = self.n_saved_before = self.n_steps = 0
        self.trouble = lambda: None
        self.states = None

    def step(self, work):
        self.run_ahead()
        self.n_steps += 1
        fed = {item.sequence.request_id for item in work}
        assert len(fed) == len(work) <= self.max_sequences
        starved = [s.request_id for s in self.live.values() if s.n_cached >= s.pieces_end and s.request_id not in fed]
        assert not starved, f"streams {starved} did not get a token"
        n_prompt = sum(len(item.token_ids) for item in work if not item.decode)
        n_decode = sum(item.decode for item in work)
        n_planned = n_decode + self.n_saved - self.n_saved_before  # a piece may have preempted a stream planned before
        beside = min(self.prefill_chunk, max(self.mixed_chunk, self.mixed_per_sequence * n_planned))
        self.n_saved_before = self.n_saved
        assert n_prompt <= (beside if n_decode else self.prefill_chunk)
        samples = []
        for item in work:
            self.trouble()
            cells = self.feed(item)
            samples.append(TokenSample(draw(cells, item.sequence.seed)) if item.sample else None)
        self.trouble()
        for item in work:
            if item.decode and self.lookahead:
                self.ahead[item.sequence.slot] = list(item.sequence.pages), item.start + len(item.token_ids)
        return samples

    def score(self, work):
        cells = self.feed(work)
        targets = work.sequence.prompt_ids[work.start + 1 :]
        return [TokenSample(target, float(cell)) for target, cell in zip(targets, cells[work.start :], strict=False)]

    def feed(self, item):
        """Write the item's cells; returns all cells of the sequence, as read."""
        sequence, end = item.sequence, item.start + len(item.token_ids)
        assert item.start == sequence.n_cached
        assert end <= len(sequence.pages) * PAGE, "fed beyond its pages"
        assert len(set(sequence.pages)) == len(sequence.pages)
        assert self.live.setdefault(sequence.slot, sequence) is sequence, "a slot used twice"
        self.first_start.setdefault(sequence.request_id, item.start)
        truth = self.truth[sequence.request_id].cells
        assert self.read(sequence, item.start) == truth[: item.start], "the cache holds something else"
        written = set(sequence.pages[item.start // PAGE : -(-end // PAGE)])
        for other in self.live.values():
            assert other is sequence or written.isdisjoint(other.pages), "a page with two holders is written"
        last = truth[item.start - 1] if item.start else 0
        assert item.decode == (item.start >= sequence.pieces_end)
        if item.decode and not item.sample:
            assert end < len(sequence.pages) * PAGE, "no page for the token behind those that are known"
            assert end <= sequence.known_end
        for position, token in enumerate(item.token_ids, start=item.start):
            last = hash((last, token, GENERATED if item.decode else PROMPT))
            self.pages[sequence.pages[position // PAGE]][position % PAGE] = last
        return self.read(sequence, end)

    def read(self, sequence, n):
        cells = []
        for page in sequence.pages[: -(-n // PAGE)]:
            cells += self.pages[page]
        return cells[:n]

    def run_ahead(self):
        """Steps launched ahead write where they have pages; harmless, because those positions are computed again."""
        for pages, start in self.ahead.values():
            for position in range(start, min(start + self.lookahead, len(pages) * PAGE)):
                self.pages[pages[position // PAGE]][position % PAGE] = "computed ahead"
        self.ahead = {}

    def release(self, slot):
        self.live.pop(slot, None)
        self.ahead.pop(slot, None)

    def copy_pages(self, pairs):
        self.run_ahead()
        self.trouble()
        for source, target in pairs:
            self.pages[target] = list(self.pages[source])
        self.trouble()

    def save_pages(self, pages):
        self.run_ahead()
        self.trouble()
        self.n_saved += 1
        return [list(self.pages[page]) for page in pages]

    def load_pages(self, saved, pages):
        self.run_ahead()
        self.trouble()
        for page, cells in zip(pages, saved, strict=True):
            self.pages[page] = list(cells)
        self.trouble()

    def close(self):
        pass


def make_job(runner, request_id, prompt, n, *, seed=0, score_from=None, by_step=True, mask=None):
    runner.truth[request_id] = Truth(prompt, seed, n, mask, PROMPT if runner.known_room is None else GENERATED)
    params = SamplingParams(prompt_logprobs=None if score_from is None else 0)
    request = Request(request_id, list(prompt), params, seed, n, score_from, mask=mask)
    return Job(request, OutputAssembler(request, None, ()), by_step)
