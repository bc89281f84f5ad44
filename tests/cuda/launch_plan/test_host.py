"""The host's side of the GPU backend, which needs no GPU: run-ahead, memory plan, kernel arguments, what is missing."""

import ctypes
import importlib.util
import re
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cuda import availability
from engine.cuda.attention.step_rows import KnownToken
from engine.cuda.driver.graphs import Graphs
from engine.cuda.formats.layouts import packed_bytes
from engine.cuda.launch_plan.ahead import AHEAD, MOST_AHEAD, STATE_PLACES
from engine.cuda.load.memory_plan import DevicePlan, fit, make_plan, memory_plan
from engine.cuda.step.prompt import pack, prompt_batch
from engine.cuda.step.run_ahead import RunAhead
from engine.errors import DeviceError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.loader import load_model
from engine.request import ActiveSequence, Work
from engine.sampling import SamplingParams
from tests.support.models.gguf_builder import tiny_llama
from tests.support.models.recurrent_models import tiny_mamba

# ---- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [True, False])
def test_launches_that_find_no_memory_run_again_only_where_they_may(again):
    """Graphs of other keys give theirs first."""
    graphs, runs = Graphs(None, eager=False), []
    graphs._graphs["other"] = object()

    def run():
        runs.append(len(graphs._graphs))
        if graphs._graphs:
            raise MemoryError

    if again:
        graphs.launch("key", run, again=True)
        assert runs == [1, 0]
    else:
        with pytest.raises(MemoryError):
            graphs.launch("key", run, again=False)
        assert runs == [1]
        assert not graphs._graphs


# ---- decode loop --------------------------------------------------------------------------------------------------

SLOTS, CONTEXT = 8, 40


def next_token(request_id, position, token):
    return (request_id * 7919 + position * 104729 + token * 31 + 17) % 1000003


def expected(request_id, position, token, n):
    """The n tokens after feeding `token` at `position`."""
    out = []
    for i in range(n):
        token = next_token(request_id, position + i, token)
        out.append(token)
    return out


class FakeDevice:
    """A stream that does its work only when the host waits for it, with the state of the slots behind that stream.

    As the kernels do it: a row stops by itself at its limit; what the host changes is sent with the next launch.
    """

    def __init__(self, step_sizes=(1, 2, 4, 8), turns=range(SLOTS + 1)):
        self.requests, self.tokens = [0] * SLOTS, [0] * SLOTS
        self.positions, self.limits = [-1] * SLOTS, [0] * SLOTS
        self.news, self.stream, self.rows, self.results = {}, [], [], {}
        self.cache, self.first = {}, {}  # token by request and position; the first position of a request
        self.masked, self.masks, self.forwards, self.logits = set(), {}, [], []
        self.loop = RunAhead(
            enqueue=self.enqueue,
            enqueue_chosen=self.enqueue_chosen,
            forward=self.forward,
            forward_known=self.forward_known,
            sample=self.sample,
            set_position=lambda slot, position: self.change(slot, positions=position),
            set_limit=lambda slot, limit: self.change(slot, limits=limit),
            step_sizes=step_sizes,
            turns=turns,
        )

    def change(self, slot, **values):
        self.news.setdefault(slot, {}).update(values)

    def flush(self):
        self.stream += [("set", slot, values) for slot, values in self.news.items()]
        self.news = {}

    def begin(self, slot, request_id, position, token, limit=CONTEXT, *, masked=False):
        self.change(slot, requests=request_id, tokens=token, positions=position, limits=limit)
        self.loop.start(slot, request_id, position, token, limit, masked=masked)
        self.first.setdefault(request_id, position)
        if masked:
            self.masked.add(request_id)

    def enqueue(self, n):
        self.flush()
        self.rows.append(n)
        self.stream.append(("step", len(self.rows) - 1, n))
        return len(self.rows) - 1

    def enqueue_chosen(self, slots):
        self.flush()
        self.rows.append(len(slots))
        self.stream.append(("chosen", len(self.rows) - 1, slots))
        return len(self.rows) - 1

    def forward(self, n):
        """What the logits come from: who fed which token where."""
        self.flush()
        self.forwards.append(n)
        self.stream.append(("forward", n))

    def forward_known(self, n, known):
        self.flush()
        self.forwards.append(n)
        self.stream.append(("known", n, tuple(known)))

    def sample(self, n):
        self.flush()
        self.rows.append(n)
        self.stream.append(("sample", len(self.rows) - 1, n, dict(self.masks)))
        return len(self.rows) - 1

    def _known(self, n, known):
        for slot, token, position in known:
            assert position < self.limits[slot]
            self.cache[self.requests[slot], position] = token
        self._forward(n)

    def _feed(self, slots):
        """Rows go to the cache, behind all that comes before them."""
        for slot in slots:
            request_id, position = self.requests[slot], self.positions[slot]
            if position >= 0:
                before = range(self.first.get(request_id, 0), position)
                assert all((request_id, one) in self.cache for one in before), "a token was fed too early"
                self.cache[request_id, position] = self.tokens[slot]

    def _forward(self, n):
        self._feed(range(n))
        self.logits = [(self.requests[slot], self.positions[slot], self.tokens[slot]) for slot in range(n)]
        assert all(position < 0 for position in self.positions[n:]), "an active row is outside the step"

    def _sample(self, number, n, masks):
        for slot in range(n):
            if self.positions[slot] >= 0:
                now = (self.requests[slot], self.positions[slot], self.tokens[slot])
                assert self.logits[slot] == now, "sampled from the logits of another token"
                assert self.requests[slot] not in self.masked or masks[slot] == now, (
                    "sampled with the mask of another token"
                )
        self._step(number, n)

    def wait(self, place):
        while place not in self.results:
            kind, *args = self.stream.pop(0)
            if kind == "set":
                slot, values = args
                for name, value in values.items():
                    getattr(self, name)[slot] = value
            else:
                {
                    "prompts": self.logits.clear,
                    "step": self._unmasked,
                    "chosen": self._chosen,
                    "forward": self._forward,
                    "known": self._known,
                    "sample": self._sample,
                }[kind](*args)

    def _unmasked(self, number, n):
        active = {self.requests[slot] for slot in range(n) if self.positions[slot] >= 0}
        assert not active & self.masked, "a row was drawn without its mask"
        self._step(number, n)

    def _chosen(self, number, slots):
        assert not {self.requests[slot] for slot in slots} & self.masked, "a row was drawn without its mask"
        assert all(self.positions[slot] >= 0 for slot in slots), "a row was chosen that does not run"
        self._draw(number, slots)

    def _step(self, number, n):
        self._draw(number, range(n))
        assert all(position < 0 for position in self.positions[n:]), "an active row is outside the step"

    def _draw(self, number, slots):
        self._feed(slots)
        self.results[number] = {}
        for column, slot in enumerate(slots):
            position = self.positions[slot]
            if position >= 0:
                assert position < self.limits[slot] <= CONTEXT, "a token was fed where the row has no page"
                self.tokens[slot] = next_token(self.requests[slot], position, self.tokens[slot])
                self.positions[slot] = -1 if position + 1 == self.limits[slot] else position + 1
                self.results[number][column] = self.tokens[slot]

    def step(self, sequences, known=()):
        """As the runner does it: what is needed, known tokens of a slot, what is ahead, then the results.

        known: (slot, tokens, limit): the first is what the row feeds next, and the last what it feeds behind them.
        """
        slots = [one.slot for one in sequences]
        for slot in slots:
            if self.loop.wants_mask(slot):
                row = self.loop._rows[slot]
                self.masks[slot] = (row.request_id, row.position, row.token)
                self.loop.give_mask(slot)
        self.loop.launch_needed(slots)
        if known:
            slot, tokens, limit = known
            self.loop.feed([slot])
            row = self.loop._rows[slot]
            fed = enumerate(tokens[1:-1], row.position + 1)
            fed = [KnownToken(slot, token, position) for position, token in fed]
            self.begin(slot, row.request_id, row.position + len(tokens) - 1, tokens[-1], limit, masked=True)
            self.loop.feed_known(fed)
        self.loop.run_ahead()
        tokens = []
        for (place, column), slot in zip(self.loop.take(slots), slots, strict=True):
            self.wait(place)
            tokens.append(self.results[place][column])
            self.loop.learn(slot, tokens[-1])
        return tokens

    def pending(self):
        """Steps launched and not read, per slot."""
        return {slot: len(row.results) for slot, row in self.loop._rows.items()}


def sequence(slot, request_id):
    return ActiveSequence(request_id, slot, [1], [], SamplingParams(), 0)


def test_one_sequence_in_order_and_ahead():
    device = FakeDevice()
    device.begin(0, 5, 10, 42)
    one, got = sequence(0, 5), []
    for _ in range(20):
        got += device.step([one])
        assert device.pending() == {0: AHEAD - 1}
    assert got == expected(5, 10, 42, 20)
    assert device.rows == [1] * (20 + AHEAD - 1)


def test_holds_knows_what_comes_next():
    device = FakeDevice()
    device.begin(3, 5, 10, 42)
    assert device.loop.holds(sequence(3, 5), 10, 42)
    assert not device.loop.holds(sequence(3, 6), 10, 42)
    assert not device.loop.holds(sequence(3, 5), 11, 42)
    assert not device.loop.holds(sequence(3, 5), 10, 43)
    assert not device.loop.holds(sequence(2, 5), 10, 42)
    (token,) = device.step([sequence(3, 5)])
    assert device.loop.holds(sequence(3, 5), 11, token)
    assert device.rows[0] == 4, "rows 0..3 are the smallest bucket that holds slot 3"


def test_a_stopped_slots_results_are_dropped():
    device = FakeDevice()
    device.begin(0, 1, 0, 7)
    device.begin(1, 2, 0, 8)
    first, second = sequence(0, 1), sequence(1, 2)
    for _ in range(3):
        device.step([first, second])
    device.loop.stop(1)
    assert device.pending().keys() == {0}
    device.begin(1, 3, 5, 9)  # the slot's next owner, while results of the last one are still on their way
    third, got = sequence(1, 3), []
    for _ in range(5):
        got.append(device.step([first, third]))
    assert [row[0] for row in got] == expected(1, 0, 7, 8)[3:]
    assert [row[1] for row in got] == expected(3, 5, 9, 5)


def test_stopping_an_unknown_slot_does_nothing():
    device = FakeDevice()
    device.loop.stop(4)
    assert device.news == {}


def test_rows_shrink_when_high_slots_leave():
    device = FakeDevice()
    for slot in range(5):
        device.begin(slot, slot + 1, 0, 0)
    everyone = [sequence(slot, slot + 1) for slot in range(5)]
    device.step(everyone)
    for slot in range(1, 5):
        device.loop.stop(slot)
    device.step(everyone[:1])
    device.step(everyone[:1])
    assert (device.rows[0], device.rows[-1]) == (8, 1)


def test_a_row_stops_at_its_last_page_and_goes_on_with_the_next():
    device = FakeDevice()
    device.begin(0, 1, 10, 7, limit=12)  # room for two more
    device.begin(1, 2, 0, 8)
    both = [sequence(0, 1), sequence(1, 2)]
    got = [device.step(both) for _ in range(2)]
    assert device.pending()[0] == 0
    others = [device.step(both[1:])[0] for _ in range(3)]  # the full one waits for a page
    device.loop.extend(0, 20)
    got += [device.step(both) for _ in range(8)]
    assert [row[0] for row in got] == expected(1, 10, 7, 10)
    assert [row[1] for row in got[:2]] + others + [row[1] for row in got[2:]] == expected(2, 0, 8, 13)
    assert device.pending()[0] == 0, "its second limit is reached"


def test_a_row_that_joins_with_a_prompt_is_as_far_as_the_others():
    """Its first decode step is launched before the host has seen the token that it feeds."""
    device = FakeDevice()
    device.begin(0, 1, 0, 7)
    running = [sequence(0, 1)]
    for slot in range(1, 6):
        slots = [one.slot for one in running]
        device.loop.launch_needed(slots)
        device.change(slot, requests=slot + 1, tokens=7, positions=0, limits=CONTEXT)  # the prompt's sampler writes it
        device.loop.start(slot, slot + 1, 0, None, CONTEXT)
        device.loop.run_ahead()
        for (place, column), one in zip(device.loop.take(slots), running, strict=True):
            device.wait(place)
            device.loop.learn(one.slot, device.results[place][column])
        device.loop.learn(slot, 7)
        running.append(sequence(slot, slot + 1))
        assert set(device.pending().values()) == {AHEAD - 1}
    for _ in range(4):
        device.step(running)
        assert min(device.pending().values()) >= 1
        assert max(device.pending().values()) <= AHEAD


def test_a_constrained_row_makes_the_next_forward_pass_run_while_its_mask_is_made():
    device = FakeDevice()
    device.begin(0, 1, 0, 7, masked=True)
    device.begin(1, 2, 0, 8)
    both = [sequence(0, 1), sequence(1, 2)]
    got = [device.step(both) for _ in range(6)]
    assert [row[0] for row in got] == expected(1, 0, 7, 6)
    assert [row[1] for row in got] == expected(2, 0, 8, 6)
    assert len(device.forwards) == 7, "one forward pass a step, none repeated, one ahead"
    device.loop.stop(0)
    assert [device.step(both[1:])[0] for _ in range(4)] == expected(2, 0, 8, 10)[6:]
    assert len(device.forwards) == 7
    assert device.pending() == {1: AHEAD - 1}


IN_TURNS = (0, 1, 2, 2, 4, 4, 4, 7, 8)


def test_rows_take_turns_in_steps_of_the_best_size():
    """Seven rows with steps of four: everyone has a token in every call, and 7 / 4 as many steps are launched."""
    device = FakeDevice(turns=(0, 1, 2, 3, 4, 4, 4, 4, 4))
    everyone = [sequence(slot, slot + 1) for slot in range(7)]
    for one in everyone:
        device.begin(one.slot, one.request_id, 0, one.slot)
    got = [device.step(everyone) for _ in range(20)]
    for one, text in zip(everyone, zip(*got, strict=True), strict=True):
        assert list(text) == expected(one.request_id, 0, one.slot, 20)
        assert AHEAD - 1 <= device.pending()[one.slot] < MOST_AHEAD
    assert set(device.rows) == {4}
    assert len(device.rows) * 4 == 7 * 20 + sum(device.pending().values())


EVENTS = st.one_of(
    st.just("step"), st.just("step"), st.just("join"), st.just("join masked"), st.just("some"), st.just("forget"),
    st.just("resume"), st.just("page"), st.integers(0, SLOTS - 1), st.integers(-5, -1),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=80), st.booleans())
def test_any_coming_and_going_gives_everyone_the_tokens_it_gets_alone(events, in_turns):
    """Steps, joins, leaves (a number is the slot that leaves), rows begun anew and late pages, in any order.

    A negative number: a step in which a constrained row has so many tokens that are known.
    """
    device = FakeDevice(turns=IN_TURNS if in_turns else range(SLOTS + 1))
    running, born, texts, limits, forced = {}, {}, {}, {}, set()
    for event in events:
        free = sorted(set(range(SLOTS)) - set(running))
        if event in ("join", "join masked") and free:
            slot, request_id = free[0], len(texts) + 1
            born[request_id], texts[request_id] = request_id % 30, []
            limits[slot] = min(CONTEXT, born[request_id] // 8 * 8 + 8)
            device.begin(slot, request_id, born[request_id], 7, limits[slot], masked=event == "join masked")
            running[slot] = sequence(slot, request_id)
        elif event == "resume" and running:  # what an interrupted step, or one swapped out, comes back with
            slot, one = min(running.items())
            text = texts[one.request_id]
            device.loop.stop(slot)
            position, token = born[one.request_id] + len(text), [7, *text][-1]
            device.begin(slot, one.request_id, position, token, limits[slot], masked=one.request_id in device.masked)
        elif event == "page" and running:
            slot = max(running)
            limits[slot] = min(CONTEXT, limits[slot] + 8)
            device.loop.extend(slot, limits[slot])
        elif isinstance(event, int) and event >= 0:
            device.loop.stop(event)
            running.pop(event, None)
        elif event == "forget":  # prompts were read in between
            device.loop.forget_prepared()
            device.stream.append(("prompts",))
        elif running and (event in ("step", "some") or isinstance(event, int)):
            for slot, one in running.items():  # every sequence has a page for the token that it feeds
                position = born[one.request_id] + len(texts[one.request_id])
                if position == limits[slot]:
                    limits[slot] = min(CONTEXT, limits[slot] + 8)
                    device.loop.extend(slot, limits[slot])
            wanted, known = list(running.values()), ()
            bound = [one for one in wanted if one.request_id in device.masked]
            if isinstance(event, int) and bound:
                one, n = bound[-1], -event
                text = texts[one.request_id]
                end = born[one.request_id] + len(text) + n + 1
                if end <= CONTEXT:
                    limits[one.slot] = max(limits[one.slot], min(CONTEXT, -(-end // 8) * 8))
                    device.loop.extend(one.slot, limits[one.slot])
                    known = one.slot, [[7, *text][-1], *range(n)], limits[one.slot]
                    wanted.remove(one)
                    text += range(n)
                    forced |= {(one.request_id, len(text) - i) for i in range(1, n + 1)}
            if event == "some":  # a row that no work was planned for keeps what it is ahead
                wanted = wanted[len(wanted) // 2 :]
            for one, token in zip(wanted, device.step(wanted, known), strict=True):
                text = texts[one.request_id]
                text.append(token)
                room = limits[one.slot] - born[one.request_id] - len(text)
                if not device.masked & {other.request_id for other in running.values()}:
                    assert device.pending()[one.slot] >= min(room, AHEAD - 1), "the device would run dry"
                if born[one.request_id] + len(text) == CONTEXT:
                    device.loop.stop(one.slot)
                    del running[one.slot]
        assert max(device.pending().values(), default=0) <= MOST_AHEAD
    for request_id, text in texts.items():
        for index, token in enumerate(text):
            fed = [7, *text][index]
            assert (request_id, index) in forced or token == next_token(request_id, born[request_id] + index, fed)


# ---- batches of prompts -------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12), st.integers(1, 32))
def test_prompts_are_cut_into_batches_without_loss(sizes, rows):
    work = [
        Work(sequence(slot, slot), list(range(slot * 100, slot * 100 + n)), slot, sample)
        for slot, (n, sample) in enumerate(sizes)
    ]
    batches = list(pack(work, rows))
    assert all(sum(piece.end - piece.first for piece in batch) <= rows for batch in batches)
    assert len(batches) == -(-sum(n for n, _ in sizes) // rows)
    fed = {}
    for batch in batches:
        laid = prompt_batch(batch)
        assert len(laid.output_rows) == sum(piece.draws for piece in batch)
        for span in laid.spans:
            rows_of_span = slice(span.row, span.row + span.n_rows)
            fed.setdefault(span.slot, []).extend(
                zip(laid.positions[rows_of_span].tolist(), laid.token_ids[rows_of_span].tolist(), strict=True)
            )
        ends = [piece.work.sequence.slot for piece in batch if piece.draws]
        assert [next(s.slot for s in laid.spans if s.row <= row < s.row + s.n_rows) for row in laid.output_rows] == ends
    for item in work:
        assert fed[item.sequence.slot] == list(enumerate(item.token_ids, item.start))
    assert sum(piece.draws for batch in batches for piece in batch) == sum(sample for _, sample in sizes)


# ---- memory plan --------------------------------------------------------------------------------------------------

GIB, MIB = 1 << 30, 1 << 20


def plan_of(weights=4 * GIB, activations=100 * MIB, per_page=8 * MIB, pages=1024, least=128):
    return DevicePlan(weights, activations, per_page, pages, least, 2048)


def test_a_plan_that_fits_is_kept():
    plan = plan_of()
    assert fit(plan, plan.total) == plan
    assert plan.total > plan.weights + plan.cache + plan.activations


def test_fewer_pages_where_not_all_fit():
    plan = plan_of()
    fitted = fit(plan, plan.total - 1)
    assert fitted.pages == 1023
    assert fitted.total <= plan.total - 1
    assert fit(plan, plan.total - 896 * plan.per_page).pages == 128


def test_too_long_a_context_names_the_longest_that_fits():
    plan = plan_of()
    least = plan.total - plan.cache
    with pytest.raises(DeviceError) as error:
        fit(plan, least + 20 * plan.per_page + 5)
    text = str(error.value)
    assert "the largest context that fits is 1280 tokens (context_length=1280)" in text
    assert "8192 tokens" in text
    assert f"weights {4:.2f} GiB" in text
    assert f"cache {1:.2f} GiB" in text
    assert f"needs {(least + 128 * plan.per_page) / GIB:.2f} GiB" in text
    assert f"{(least + 20 * plan.per_page) / GIB:.2f} GiB are free" in text
    # what the error recommends does fit
    assert fit(plan_of(least=20), least + 20 * plan.per_page + 5).pages == 20


@pytest.mark.parametrize("context_length", [10**6, 10**9])
def test_the_advice_for_a_huge_context_fits(tmp_path, context_length):
    """Sampling tables and page tables grow with the context: a shorter one needs less of them too."""
    path = tmp_path / "tiny.gguf"
    tiny_llama(path, width=256, ffn=512)
    with open_gguf(path) as gguf:
        model = load_model(gguf)

        free, options = 1 << 30, {"kv_type": "f16", "max_sequences": 64}
        with pytest.raises(DeviceError, match="the largest context that fits is") as error:
            fit(make_plan(model, context_length=context_length, cache_tokens=context_length, **options), free)
        largest = int(re.search(r"context_length=(\d+)", str(error.value)).group(1))
        plan = fit(make_plan(model, context_length=largest, cache_tokens=largest, **options), free)
        assert plan.least_pages * 64 == largest
        more = make_plan(model, context_length=largest + 64, cache_tokens=largest + 64, **options)
        with pytest.raises(DeviceError, match=f"the largest context that fits is {largest} tokens"):
            fit(more, free)
        del model


def test_the_plan_of_a_recurrent_model(tmp_path):
    """No pages, but a ring of states for every slot and the checkpoints."""
    with open_gguf(tiny_mamba(tmp_path / "tiny.gguf")) as gguf:
        model = load_model(gguf)
        options = {"context_length": 8192, "kv_type": "f16", "max_sequences": 64}
        plan = make_plan(model, **options)
        per_state = 2 * 4 * 128 * (3 + 16)
        assert (plan.per_page, plan.cache) == (0, 0)
        assert plan.states == (64 * STATE_PLACES + 128) * per_state
        assert make_plan(model, **options, checkpoints=0).states == 64 * STATE_PLACES * per_state
        assert memory_plan(plan).state_bytes == plan.states
        assert memory_plan(plan).total_bytes == plan.total
        assert fit(plan, plan.total) == plan
        with pytest.raises(DeviceError, match="the largest context that fits is 8128 tokens"):
            fit(plan, plan.total - 1)
        large = replace(plan, states=64 * GIB)
        with pytest.raises(DeviceError, match=r"recurrent states 64.00 GiB.*ask for a smaller max_sequences or fewer"):
            fit(large, 4 * GIB)
        assert STATE_PLACES >= MOST_AHEAD + 1
        del model


def test_too_little_memory_for_the_weights():
    with pytest.raises(DeviceError, match="not even the weights fit: use a smaller quantization or device='cpu'"):
        fit(plan_of(), 3 * GIB)


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
def test_the_plan_of_a_model(tmp_path, kv_type):
    path = tmp_path / "tiny.gguf"
    tiny_llama(path, width=256, ffn=512, n_layers=3, weight_type=GGMLType.Q8_0, tied=False)
    with open_gguf(path) as gguf:
        model = load_model(gguf)
        plan = make_plan(model, context_length=100, kv_type=kv_type, max_sequences=3)
        small = make_plan(model, context_length=100, kv_type=kv_type, max_sequences=3, cache_tokens=5)
        large = make_plan(model, context_length=100, kv_type=kv_type, max_sequences=3, cache_tokens=6400)
        short = make_plan(model, context_length=100, kv_type=kv_type, max_sequences=3, prefill_chunk=64)
        matrices = [info for info in gguf.tensors.values() if len(info.shape) == 2]
        packed = sum(packed_bytes(info.type, *info.shape) for info in matrices)
        norms = sum(4 * info.n_elements for info in gguf.tensors.values() if len(info.shape) == 1)
        del model
    assert plan.weights == packed + norms
    size = {"f16": 2, "f32": 4, "q8_0": 34 / 32}[kv_type]
    assert plan.per_page == 64 * 3 * 2 * 128 * size  # positions, layers, keys and values, two heads of 64
    assert plan.least_pages == 2  # 100 positions begin a second page
    assert plan.pages == 5  # of 300 positions
    assert (small.pages, large.pages) == (2, 100)
    assert plan.cache == plan.pages * plan.per_page
    assert short.activations < plan.activations
    shown = memory_plan(plan)
    assert (shown.weights_bytes, shown.kv_bytes) == (plan.weights, plan.cache)
    assert shown.kv_bytes_per_token == 3 * 2 * 128 * size


# ---- kernel arguments ---------------------------------------------------------------------------------------------


def test_kernel_arguments_have_the_types_of_c():
    from engine.cuda.driver.launch import pack

    class Pointer:
        ptr = 1 << 40

    class Array:
        data = Pointer()

    args = (Array(), None, 7, -1, True, 1.5, np.int64(1 << 40), np.uint64(1 << 63), np.float32(0.25), np.uint32(5))
    for _ in range(2):  # the second time from the table of layouts
        layout, values = pack((*args, np.int32(-2), ctypes.c_void_p(9), ctypes.c_void_p(), ctypes.c_short(3)))
        cells = layout.pack(*values)
        assert len(cells) == 8 * 14
        found = [cells[i : i + 8] for i in range(0, len(cells), 8)]
        assert [int.from_bytes(cell, "little") for cell in found[:2]] == [1 << 40, 0]
        assert [int.from_bytes(cell[:4], "little", signed=True) for cell in found[2:5]] == [7, -1, 1]
        assert np.frombuffer(found[5], np.float32)[0] == 1.5
        assert [int.from_bytes(cell, "little") for cell in found[6:8]] == [1 << 40, 1 << 63]
        assert np.frombuffer(found[8], np.float32)[0] == 0.25
        assert [int.from_bytes(cell[:4], "little", signed=True) for cell in found[9:11]] == [5, -2]
        assert [int.from_bytes(cell, "little") for cell in found[11:13]] == [9, 0]
        assert int.from_bytes(found[13][:2], "little") == 3


def test_an_argument_too_large_for_its_type_is_refused():
    from engine.cuda.driver.launch import pack

    layout, values = pack((1 << 31,))
    with pytest.raises(struct.error):
        layout.pack(*values)


@pytest.mark.parametrize("wrong", ["text", b"bytes", [1], np.float64(1.0), np.int8(1), object()])
def test_other_arguments_are_refused(wrong):
    from engine.cuda.driver.launch import pack

    with pytest.raises(TypeError, match=f"made of {type(wrong).__name__}"):
        pack((wrong,))


# ---- profile ------------------------------------------------------------------------------------------------------


def test_figures_of_a_profile():
    from engine.model.brick_time import BrickTime, profile_table

    times = [
        BrickTime("launch", 1, 2e-6, 0),
        BrickTime("attn_qkv", 32, 3e-4, 600_000_000),
        BrickTime("head", 1, 1e-4, 400_000_000),
        BrickTime("step", 1, 3.5e-4, 1_000_000_000),
    ]
    assert times[1].as_dict(4e12) == {
        "brick": "attn_qkv",
        "calls": 32,
        "microseconds": pytest.approx(300),
        "bytes": 600_000_000,
        "gb_s": pytest.approx(2000),
        "percent_of_ceiling": pytest.approx(50),
    }
    assert times[1].as_dict()["percent_of_ceiling"] is None
    lines = profile_table(times, 4e12).splitlines()
    assert lines[2].split() == ["attn_qkv", "32", "300.0", "75.0%", "600.00", "2000", "50.0%"]
    assert lines[1].split() == ["launch", "1", "2.0", "0.00"]
    assert lines[-1].split() == ["sum", "400.0"]


def test_a_profile_needs_a_gpu(tmp_path):
    from engine import LLM
    from engine.api.bench import profile_bricks
    from engine.errors import InvalidRequestError

    path = tmp_path / "tiny.gguf"
    tiny_llama(path)
    with LLM(path, device="cpu") as llm, pytest.raises(InvalidRequestError, match="runs on the cpu: open it on device"):
        profile_bricks(llm)


# ---- what is missing ----------------------------------------------------------------------------------------------


def test_no_cupy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cupy" else find(name, *rest))
    assert availability() == "CuPy is not installed: pip install 'gguf-engine[cuda]'"


def test_a_cupy_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart is gone')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert re.match(r"CuPy cannot be loaded \(libcudart is gone\): reinstall it with pip install", availability())


def with_devices(monkeypatch, count, capability="90"):
    cupy = pytest.importorskip("cupy")

    class Device:
        def __init__(self, index):
            self.compute_capability = capability

    def get_count():
        if isinstance(count, Exception):
            raise count
        return count

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", get_count)
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    return cupy


def test_no_driver(monkeypatch):
    cupy = pytest.importorskip("cupy")
    with_devices(monkeypatch, cupy.cuda.runtime.CUDARuntimeError(35))
    assert re.match(r"no usable NVIDIA driver or GPU \(.*\): install the NVIDIA driver", availability())


def test_no_such_gpu(monkeypatch):
    with_devices(monkeypatch, 2)
    assert availability(2) == "there is no GPU 2: 2 found (cuda:0 to cuda:1)"
    assert availability(1) is None


def test_too_old_a_gpu(monkeypatch):
    with_devices(monkeypatch, 1, "61")
    assert availability() == "GPU 0 has compute capability 6.1; 7.5 or newer is needed"


def test_asking_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    from engine import LLM
    from engine.cuda.runner import CudaRunner

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cupy" else find(name, *rest))
    path = tmp_path / "tiny.gguf"
    tiny_llama(path)
    with pytest.raises(DeviceError, match=r"'cuda' cannot be used: CuPy is not installed: pip install"):
        LLM(path, device="cuda")
    with open_gguf(path) as gguf:
        model = load_model(gguf)
        with pytest.raises(DeviceError, match=r"'cuda:1' cannot be used: CuPy is not installed"):
            CudaRunner(model, context_length=64, kv_type="f16", max_sequences=1, device_index=1)
        del model
