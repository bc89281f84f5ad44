"""What 1, 8 and 64 replicas do for conversations under three ways to choose the replica; needs no GPU.

    python -m scripts.simulate_cluster --replicas 1,8,64 --loads 2,4,6,8 --plot benchmarks/cluster.svg

Each replica is the engine's own Scheduler, whose plans take the time that steps of an 8B Q4_K_M model were measured to
take on one H200 (STEPS and what follows). Conversations arrive at random; each has several turns, and a turn's prompt
is all that was said before. A turn is in time where its first token came within --first seconds and its further tokens
came on average within --between seconds; goodput is how many of those there are in a second. Prints Markdown.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from engine.cluster.conversation import CHARACTERS_PER_TOKEN, Conversation
from engine.cluster.prefixes import PrefixMap
from engine.config import PAGE
from engine.request import Request, TokenSample
from engine.sampling.params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from scripts.plot_arrivals import GAP, HEIGHT, INK, LEFT, SURFACE, TOP, WIDTH, ticks

STEPS = (
    (0, 0.0),
    (1, 1.54),
    (16, 2.32),
    (64, 3.87),
    (96, 5.61),
    (128, 6.25),
    (192, 8.21),
    (256, 10.03),
    (384, 14.9),
    (512, 19.0),
)
"""Decoding sequences of a step and its milliseconds, prompts of 64 behind them (benchmarks/2026-11-29-h200.md)."""
MS_PER_PROMPT_TOKEN = 1000 / 36_000
MS_PER_POSITION = 11 / (256 * 1500)
"""Attention of one decoding sequence, for each position behind it."""
CACHE_TOKENS = 900_000
MAX_SEQUENCES = 512
TURNS, THINKING = 8.0, 8.0
"""Turns of a conversation and seconds between an answer and the next question, means of geometric and exponential."""
FIRST_PROMPT, QUESTION, ANSWER = (2000, 0.8), (120, 0.8), (220, 0.6)
"""Tokens: median and sigma of lognormal distributions."""
ROUTERS = ("prefix", "round robin", "least busy")
COLOURS = ("#2f6db3", "#c8793a", "#6b6a66")


@dataclass
class Turn:
    """One request of a conversation, and what became of it."""

    conversation: int
    prompt: int
    answer: int
    left: int
    arrived: float
    ends: tuple[int, ...]
    replica: int = -1
    first: float = 0.0
    last: float = 0.0
    cached: int = 0


@dataclass
class Replica:
    """A scheduler and the time of its steps."""

    scheduler: Scheduler
    turns: dict[int, Turn] = field(default_factory=dict)
    busy: bool = False

    def step(self) -> tuple[float, list[tuple[int, Turn, bool]]]:
        """Plan and do one step: its seconds, and whose tokens come at its end, with whether it is the last one."""
        work = self.scheduler.plan()
        while not work and self.scheduler.actions:
            self.scheduler.actions.clear()
            work = self.scheduler.plan()
        self.scheduler.actions.clear()
        if not work:
            return 0.0, []
        rows = sum(item.decode for item in work)
        prompt = sum(len(item.token_ids) for item in work if not item.decode)
        depth = sum(item.start for item in work if item.decode)
        sizes, times = zip(*STEPS, strict=True)
        ms = float(np.interp(rows, sizes, times)) + prompt * MS_PER_PROMPT_TOKEN + depth * MS_PER_POSITION
        told = []
        for item in work:
            number, sequence = item.sequence.request_id, item.sequence
            turn = self.turns[number]
            if not item.sample:
                self.scheduler.commit(item, None)
                continue
            place = item.start + len(item.token_ids)
            self.scheduler.commit(item, TokenSample(token(turn.conversation, place)))
            turn.cached = sequence.cached_tokens
            done = len(sequence.output_ids) >= turn.answer
            told.append((number, turn, done))
            if done:
                self.scheduler.remove(number)
                del self.turns[number]
        return ms / 1000, told


def token(conversation: int, position: int) -> int:
    """A token id that no other place of any conversation has."""
    return conversation * 1_000_000 + position


class Cluster:
    """Replicas and a way to choose one.

    Args:
        n: replicas.
        router: one of ROUTERS.
        seed: of everything random.
    """

    def __init__(self, n: int, router: str, seed: int) -> None:
        self.replicas = [
            Replica(
                Scheduler(
                    MAX_SEQUENCES, CACHE_TOKENS // PAGE, prefill_chunk=4096, mixed_chunk=512, mixed_per_sequence=16
                )
            )
            for _ in range(n)
        ]
        self.router, self.dice = router, random.Random(seed)
        self._map: PrefixMap[int] = PrefixMap(seed=seed)
        self._next = 0
        self._numbers = count(1)
        self._events: list[tuple[float, int, int, Turn | None]] = []

    def run(self, rate: float, seconds: float) -> list[Turn]:
        """Turns that ended; conversations come at `rate` a second for so long."""
        order, done, now = count(), list[Turn](), 0.0
        conversations = count(1)
        while now < seconds:
            now += self.dice.expovariate(rate)
            prompt = self._size(FIRST_PROMPT)
            left = 1 + int(self.dice.expovariate(1 / (TURNS - 1)))
            turn = Turn(next(conversations), prompt, self._size(ANSWER), left, now, (prompt,))
            heapq.heappush(self._events, (now, next(order), -1, turn))
        while self._events:
            now, _, index, arriving = heapq.heappop(self._events)
            if now > 1.5 * seconds:
                break
            if arriving is not None:
                index = self._give(arriving)
                if self.replicas[index].busy:
                    continue
            replica = self.replicas[index]
            took, told = replica.step()
            replica.busy = took > 0
            if not took:
                continue
            for number, turn, last in told:
                turn.first = turn.first or now + took
                if last:
                    turn.last = now + took
                    self._map.end(str(number))
                    done.append(turn)
                    if turn.left > 1:
                        later = now + took + self.dice.expovariate(1 / THINKING)
                        heapq.heappush(self._events, (later, next(order), -1, self._following(turn, later)))
            heapq.heappush(self._events, (now + took, next(order), index, None))
        return done

    def _size(self, shape: tuple[int, float]) -> int:
        return max(1, int(self.dice.lognormvariate(float(np.log(shape[0])), shape[1])))

    def _following(self, turn: Turn, arrived: float) -> Turn:
        prompt = turn.prompt + turn.answer + self._size(QUESTION)
        return Turn(turn.conversation, prompt, self._size(ANSWER), turn.left - 1, arrived, (*turn.ends, prompt))

    def _give(self, turn: Turn) -> int:
        """Choose the replica of a turn and queue it there."""
        number = next(self._numbers)
        hashes = tuple(f"{turn.conversation} {end}".encode() for end in turn.ends)
        conversation = Conversation(hashes, tuple(CHARACTERS_PER_TOKEN * end for end in turn.ends))
        n = len(self.replicas)
        if self.router == "prefix":
            turn.replica = self._map.ranked(conversation, range(n))[0]
            self._map.begin(str(number), conversation, turn.replica)
        elif self.router == "round robin":
            self._next = turn.replica = (self._next + 1) % n
        else:
            one, other = self.dice.randrange(n), self.dice.randrange(n)  # as Ray does it
            turn.replica = min(one, other, key=lambda index: len(self.replicas[index].turns))
        replica = self.replicas[turn.replica]
        ids = [token(turn.conversation, place) for place in range(turn.prompt)]
        replica.turns[number] = turn
        replica.scheduler.add(Request(number, ids, SamplingParams(), 0, turn.answer))
        return turn.replica


@dataclass(frozen=True)
class Point:
    """What a cluster did at one load.

    Attributes:
        load: conversations a second, for each replica.
        goodput: turns within the limits a second, for each replica.
        within: their part of all turns.
        first: seconds to the first token, median and 95th percentile.
        between: seconds between tokens, 95th percentile of the turns' means.
        cached: part of the prompt tokens that were in the cache.
    """

    load: float
    goodput: float
    within: float
    first: tuple[float, float]
    between: float
    cached: float


def measure(n: int, router: str, load: float, arguments: argparse.Namespace) -> Point:
    """Simulate one cluster at one load; turns that arrive in the first quarter of the time only warm it up."""
    begin, end = arguments.seconds / 4, arguments.seconds
    turns = Cluster(n, router, arguments.seed).run(load * n, arguments.seconds)
    turns = [turn for turn in turns if begin <= turn.arrived < end]
    firsts = [turn.first - turn.arrived for turn in turns]
    betweens = [(turn.last - turn.first) / max(turn.answer - 1, 1) for turn in turns]
    good = sum(a <= arguments.first and b <= arguments.between for a, b in zip(firsts, betweens, strict=True))
    return Point(
        load,
        good / (end - begin) / n,
        good / max(len(turns), 1),
        (statistics.median(firsts), float(np.quantile(firsts, 0.95))),
        float(np.quantile(betweens, 0.95)),
        sum(turn.cached for turn in turns) / sum(turn.prompt for turn in turns),
    )


def plot(curves: dict[int, dict[str, Sequence[Point]]]) -> str:
    """Goodput over load, a panel for each number of replicas, as SVG."""
    out = []
    for number, (n, by_router) in enumerate(curves.items()):
        x = LEFT + number * (WIDTH + LEFT)
        points = [point for one in by_router.values() for point in one]
        across, up = max(point.load for point in points), ticks(max(point.goodput for point in points))
        out.append(
            f'<text x="{x}" y="{TOP - 12}" fill="{INK}" font-size="13">{n} replicas: turns/s of each in time</text>'
        )
        for mark in up:
            y = TOP + HEIGHT * (1 - mark / up[-1])
            out.append(f'<line x1="{x}" x2="{x + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e3df"/>')
            out.append(f'<text x="{x - 8}" y="{y + 4:.1f}" font-size="11" text-anchor="end">{mark:g}</text>')
        for colour, (name, line) in zip(COLOURS, by_router.items(), strict=False):
            places = [(x + WIDTH * point.load / across, TOP + HEIGHT * (1 - point.goodput / up[-1])) for point in line]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for (a, b), point in zip(places, line, strict=True):
                out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"><title>{name}</title></circle>')
                if name == ROUTERS[0]:
                    out.append(
                        f'<text x="{a:.1f}" y="{TOP + HEIGHT + 16}" font-size="11" text-anchor="middle">'
                        f"{point.load:g}</text>"
                    )
    for number, (name, colour) in enumerate(zip(ROUTERS, COLOURS, strict=True)):
        y = TOP + HEIGHT + GAP - 10
        out.append(f'<rect x="{LEFT + 130 * number}" y="{y}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{LEFT + 18 + 130 * number}" y="{y + 11}" font-size="12">{name}</text>')
    width, height = LEFT + len(curves) * (WIDTH + LEFT), TOP + HEIGHT + GAP + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="100%" height="100%" fill="{SURFACE}"/>', *out, "</svg>\n"])


def main() -> None:
    """Simulate, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--replicas", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--loads", type=lambda text: [float(one) for one in text.split(",")], default=[2, 4, 6, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="in which conversations come")
    parser.add_argument("--first", type=float, default=1.0, help="seconds to the first token that are in time")
    parser.add_argument("--between", type=float, default=0.03, help="seconds between tokens that are in time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write an SVG there")
    arguments = parser.parse_args()
    curves: dict[int, dict[str, Sequence[Point]]] = {}
    print(
        "| replicas | router | conversations/s | turns/s in time | in time | first p50 / p95 | between p95 | cached |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for n in arguments.replicas:
        for router in ROUTERS if n > 1 else ROUTERS[:1]:
            line = []
            for load in arguments.loads:
                point = measure(n, router, load, arguments)
                line.append(point)
                cells = (
                    f"{n} | {router} | {load * n:g}",
                    f"{point.goodput * n:.1f} | {point.within:.0%}",
                    f"{point.first[0]:.2f} / {point.first[1]:.2f} s",
                    f"{point.between * 1000:.0f} ms | {point.cached:.0%}",
                )
                print(f"| {' | '.join(cells)} |", flush=True)
            curves.setdefault(n, {})[router] = line
    if arguments.plot:
        arguments.plot.write_text(plot(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
