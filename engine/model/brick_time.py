"""How long the bricks of a step take: what a runner measures and callers show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BrickTime:
    """One brick of a decode step.

    Attributes:
        brick: its name; "launch" is a graph with one empty kernel, what every single measurement contains at least;
            "step" the whole step as it runs.
        calls: times it occurs in a step.
        seconds: median time of all calls of a step together.
        n_bytes: weights and cache that they have to read.
    """

    brick: str
    calls: int
    seconds: float
    n_bytes: int

    @property
    def bytes_s(self) -> float:
        """Bytes read per second."""
        return self.n_bytes / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self, ceiling: float | None = None) -> dict[str, Any]:
        """All figures under plain names, for JSON; ceiling is the measured read bandwidth in bytes per second."""
        return {
            "brick": self.brick,
            "calls": self.calls,
            "microseconds": self.seconds * 1e6,
            "bytes": self.n_bytes,
            "gb_s": self.bytes_s / 1e9,
            "percent_of_ceiling": 100 * self.bytes_s / ceiling if ceiling else None,
        }


def profile_table(times: Sequence[BrickTime], ceiling: float | None) -> str:
    """The profile for people; ceiling in bytes per second."""
    lines = [f"{'brick':12} {'calls':>5} {'µs':>9} {'share':>6} {'MB':>9} {'GB/s':>7} {'of ceiling':>10}"]
    bricks = sum(time.seconds for time in times if time.brick not in ("launch", "step"))
    for time in times:
        share = f"{100 * time.seconds / bricks:5.1f}%" if time.brick not in ("launch", "step") else ""
        percent = f"{100 * time.bytes_s / ceiling:9.1f}%" if ceiling and time.n_bytes else ""
        speed = f"{time.bytes_s / 1e9:7.0f}" if time.n_bytes else ""
        lines.append(
            f"{time.brick:12} {time.calls:5} {time.seconds * 1e6:9.1f} {share:>6} {time.n_bytes / 1e6:9.2f} "
            f"{speed:>7} {percent:>10}"
        )
    lines.append(f"{'sum':12} {'':5} {bricks * 1e6:9.1f}")
    return "\n".join(lines)
