"""Draw what gpu_bench.py measured when many prompts arrive at once, as SVG; needs nothing but Python.

    python -m scripts.plot_arrivals benchmarks/2026-11-21-h200.json -o benchmarks/arrivals.svg

Above: how many of the arriving prompts have their first token. Below: tokens per second of each stream that was running
before. One column per model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 170, 60, 46, 56
SURFACE, INK, QUIET, GRID, SERIES = "#fcfcfb", "#1c1c1a", "#6b6a66", "#e4e3df", "#2f6db3"


def ticks(high: float, wanted: int = 4) -> list[float]:
    """Round numbers from 0 to at least high."""
    step = 10.0 ** len(str(int(high)))
    for divisor in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000):
        if high / (step / divisor) >= wanted:
            return [i * step / divisor for i in range(int(high / (step / divisor) + 0.999) + 1)]
    return [0.0, high]


def panel(x: float, y: float, title: str, points: Sequence[tuple[float, float]], end: float, high: float) -> list[str]:
    """One chart: a line over seconds from 0 to end."""
    marks = ticks(high)
    top = marks[-1] or 1.0

    def at(seconds: float, value: float) -> tuple[float, float]:
        return x + WIDTH * seconds / end, y + HEIGHT * (1 - value / top)

    out = [f'<text x="{x}" y="{y - 12}" fill="{INK}" font-size="13">{title}</text>']
    for mark in marks:
        _, line = at(0, mark)
        out.append(f'<line x1="{x}" x2="{x + WIDTH}" y1="{line:.1f}" y2="{line:.1f}" stroke="{GRID}"/>')
        out.append(
            f'<text x="{x - 8}" y="{line + 4:.1f}" fill="{QUIET}" font-size="11" text-anchor="end">{mark:g}</text>'
        )
    for mark in ticks(end):
        if mark <= end:
            place, _ = at(mark, 0)
            out.append(
                f'<text x="{place:.1f}" y="{y + HEIGHT + 16}" fill="{QUIET}" font-size="11" text-anchor="middle">'
                f"{mark:g} s</text>"
            )
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in points))
    out.append(f'<polyline points="{path}" fill="none" stroke="{SERIES}" stroke-width="2" stroke-linejoin="round"/>')
    return out


def steps(times: Sequence[float], end: float) -> list[tuple[float, float]]:
    """How many of the times have passed, as corners of a staircase."""
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    for count, time in enumerate(sorted(times)):
        points += [(time, float(count)), (time, float(count + 1))]
    return [*points, (end, float(len(times)))]


def speeds(result: dict[str, Any], end: float, bins: int = 40) -> list[tuple[float, float]]:
    """Tokens per second of one running stream, by bins of time since the arrival."""
    width = end / bins
    counts = [0] * bins
    for time in result["running_token_seconds"]:
        if 0 <= time < end:
            counts[int(time / width)] += 1
    return [((i + 0.5) * width, count / width / result["running"]) for i, count in enumerate(counts)]


def draw(models: dict[str, dict[str, Any]]) -> str:
    """The SVG for results of one or more models."""
    columns: list[str] = []
    for number, (name, result) in enumerate(models.items()):
        x = LEFT + number * (WIDTH + LEFT + 20)
        end = max(result["running_token_seconds"])
        title = f"{name}: {result['arriving']} prompts of {result['prompt_tokens']} tokens, first tokens out"
        columns += panel(x, TOP, title, steps(result["first_token_seconds"], end), end, result["arriving"])
        line = speeds(result, end)
        high = max(result["running_tok_s_before"], *(value for _, value in line))
        title = (
            f"tokens/s of each of {result['running']} running streams (before: {result['running_tok_s_before']:.0f})"
        )
        columns += panel(x, TOP + HEIGHT + GAP, title, line, end, high)
    width = LEFT + len(models) * (WIDTH + LEFT + 20)
    height = TOP + 2 * HEIGHT + GAP + 40
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif">',
            f'<rect width="100%" height="100%" fill="{SURFACE}"/>',
            *columns,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the arrival of many prompts from a report of gpu_bench.py.")
    parser.add_argument("report", type=Path, help="the JSON file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    report = json.loads(args.report.read_text(encoding="utf-8"))
    found = {name: one for name, results in report["models"].items() for one in results if one["case"] == "arrivals"}
    if not found:
        parser.error(f"{args.report} holds no arrivals: run gpu_bench.py --only arrivals")
    args.output.write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
