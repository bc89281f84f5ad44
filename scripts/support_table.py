"""Measure every tensor type and architecture and write the table of what is supported, and how exactly.

    python -m scripts.support_table                    the CPU's columns
    python -m scripts.support_table --device gpu       the GPU's, in less than a minute
    python -m scripts.support_table --render           only docs/support.md, from what has been measured

Results are kept in benchmarks/support.json: a run replaces what it measures and leaves the rest, so that the CPU's
columns may come from one machine and the GPU's from another, and --missing goes on where a run was stopped. Test data
are in the folder GGUF_ENGINE_TEST_DATA, laid out as for the tests; the demonstration model in float16 may be packed
there as tales-f16.gguf.xz. A GPU run is fast once the kernels are in the cache, as after the tests.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.gguf import GGMLType
from engine.gguf.quantizers.quantize import WRITABLE
from scripts import support_measure as measures
from scripts.support_render import render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "support.json"
TABLE = ROOT / "docs" / "support.md"

SLOW = ("IQ1_S", "IQ1_M", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "NVFP4")
"""Types that take longest to write: they are begun first."""


class Results:
    """The file of results.

    Args:
        path: where it is, or will be.
        device: "cpu" or "gpu", whose column is measured.
        adding: earlier figures of the column stay, and so does the name of the machine that they come from.
    """

    def __init__(self, path: Path, device: str, *, adding: bool = False) -> None:
        self._path, self._device, self._adding = path, device, adding
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, part: str, name: str, cell: dict[str, Any], *, device: str | None = None) -> None:
        """Record what was measured, and say so."""
        self.content.setdefault(part, {}).setdefault(name, {})[device or self._device] = cell
        figures = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in cell.items())
        print(f"{name:18} {device or self._device}: {figures}", flush=True)

    def foresee(self, part: str, name: str, cell: dict[str, Any]) -> None:
        """Record what is known of the GPU without one; figures stay unless it turns out to serve this no more."""
        row = self.content.setdefault(part, {}).setdefault(name, {})
        if "falls_back" in cell or "at_once" not in row.get("gpu", {}):
            row["gpu"] = cell

    def has(self, part: str, name: str) -> bool:
        """Whether there are figures of this device already."""
        cell = self.content.get(part, {}).get(name, {}).get(self._device, {})
        return "at_once" in cell and not (part == "types" and self._device == "cpu" and _lacks_figures(name, cell))

    def save(self) -> None:
        """Write the file, complete or not at all."""
        machine, measured = measures.machine(self._device), self.content.setdefault("measured", {})
        before = measured.get(self._device)
        if self._adding and before is not None:
            same = machine in before["machine"]
            machine = before["machine"] if same else f"{before['machine']}, {before['date']}, and {machine}"
        measured[self._device] = {"machine": machine, "date": datetime.now(UTC).date().isoformat()}
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(_rounded(self.content), indent=1, sort_keys=True) + "\n")
        unfinished.replace(self._path)


def _lacks_figures(name: str, cell: dict[str, Any]) -> bool:
    return measures.rounds_activations(GGMLType[name]) and "as_run" not in cell


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class OutOfTimeError(Exception):
    """The time limit has passed; what was measured is kept."""


class Clock:
    """Seconds since the start, and whether there are any left."""

    def __init__(self, limit: float) -> None:
        self._start, self._limit = time.perf_counter(), limit

    def check(self, share: float = 1.0) -> None:
        """Raises OutOfTimeError after a share of the limit."""
        if self.seconds > self._limit * share:
            raise OutOfTimeError

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start


class Files:
    """The model in every type that will be measured, being written by processes of their own from now on.

    Args:
        kinds: types to write.
        jobs: processes.
    """

    def __init__(self, data: measures.Data, kinds: Iterable[GGMLType], jobs: int) -> None:
        assert data.model is not None
        self.ids = measures.first_tokens(data.model, data.text)
        # Processes of many threads each would only get in each other's way.
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        self._pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        slow_first = sorted(kinds, key=lambda kind: kind.name not in SLOW)
        self._pending = [
            self._pool.submit(measures.make_file, data.model, kind, data.scratch, self.ids) for kind in slow_first
        ]

    def __iter__(self) -> Iterator[tuple[GGMLType, Path, Path]]:
        """(type, file, logits of plain numpy) as they are finished."""
        return (future.result() for future in as_completed(self._pending))

    def close(self) -> None:
        """Write no more of them."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def begin_files(options: argparse.Namespace, data: measures.Data, results: Results) -> Files | None:
    """Have the files written whose measurement is asked for and possible."""
    if options.only == "architectures":
        return None
    if data.model is None or not data.text.exists():
        print("no tales-f16.gguf or held_out.txt: perplexities are left as they are", file=sys.stderr)
        return None
    kinds = (kind for kind in asked(options) if kind in WRITABLE)
    if options.device == "gpu":
        kinds = (kind for kind in kinds if "falls_back" not in measures.type_on_any_gpu(kind))
    return Files(
        data, [kind for kind in kinds if not (options.missing and results.has("types", kind.name))], options.jobs
    )


def asked(options: argparse.Namespace) -> list[GGMLType]:
    """The types that the command line names, or all."""
    return [kind for kind in GGMLType if not options.types or kind.name in options.types]


def measure_decoding(options: argparse.Namespace, results: Results) -> None:
    """Decoding of all types and products of those that no quantizer writes, on the CPU; what a GPU makes of them."""
    for kind in asked(options):
        results.foresee("types", kind.name, measures.type_on_any_gpu(kind))
        if options.device == "cpu":
            results.add("types", kind.name, measures.dequantization(kind), device="decoding")
            if kind not in WRITABLE:
                results.add("types", kind.name, measures.product(kind))


def measure_types(
    options: argparse.Namespace, data: measures.Data, files: Files, results: Results, clock: Clock
) -> None:
    """Errors and perplexity of the model in every type."""
    on_cpu = partial(measures.type_on_cpu, threads=options.threads)
    run = on_cpu if options.device == "cpu" else measures.type_on_gpu
    for kind, path, logits in files:
        try:
            cell = run(path, files.ids, logits, data.text, options.chunks)
        except EngineError as error:
            cell = {"failed": str(error)}
        results.add("types", kind.name, cell)
        path.unlink()
        clock.check()


def measure_architectures(options: argparse.Namespace, data: measures.Data, results: Results, clock: Clock) -> None:
    """Errors of every conformance file."""
    for path in data.files():
        name, expected = path.stem, data.logits(path)
        missing = measures.missing_on_gpu(path)
        results.foresee("architectures", name, {"falls_back": missing} if missing else {})
        if options.missing and results.has("architectures", name):
            continue
        if options.device == "cpu":
            results.add("architectures", name, measures.architecture_on_cpu(path, expected, options.threads))
        elif not missing:
            results.add("architectures", name, _on_gpu(path, expected))
        clock.check(0.45)


def _on_gpu(path: Path, expected: Path) -> dict[str, Any]:
    try:
        cell = measures.architecture_on_gpu(path, expected, "f16")
        if max(cell["at_once"], cell["single"]) > 1e-5:  # how much of it is the cache's rounding
            wide = measures.architecture_on_gpu(path, expected, "f32")
            cell |= {f"f32_{key}": value for key, value in wide.items()}
    except EngineError as error:
        return {"failed": str(error)}
    return cell


def run(options: argparse.Namespace, results: Results, clock: Clock) -> int:
    """Measure what is asked for; returns the exit status."""
    data = measures.Data(options.data, options.model)
    files, status = None, 0
    try:
        files = begin_files(options, data, results)  # written while architectures are measured
        if options.only != "types":
            try:
                measure_architectures(options, data, results, clock)
            except OutOfTimeError:
                status = 1
        if options.only != "architectures":
            measure_decoding(options, results)
        if files is not None:
            measure_types(options, data, files, results, clock)
    except OutOfTimeError:
        status = 1
    finally:
        results.save()
        if files is not None:
            files.close()
        data.close()
    if status:
        print(f"stopped after {clock.seconds:.0f} s: go on with --missing", file=sys.stderr)
    return status


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--only", choices=("types", "architectures"), help="leave the other as it is")
    parser.add_argument("--missing", action="store_true", help="only what this device has no figures of")
    parser.add_argument("--types", type=lambda text: text.upper().split(","), help="only these, e.g. Q4_K,IQ2_S")
    default = Path(os.environ.get("GGUF_ENGINE_TEST_DATA", ROOT.parent / "shared"))
    parser.add_argument("--data", type=Path, default=default, help="folder of test data")
    parser.add_argument("--model", type=Path, help="the demonstration model in float16, also .xz")
    parser.add_argument("--chunks", type=int, help="only the first chunks of 512 tokens of the text")
    parser.add_argument("--threads", type=int, help="threads of the engine on the CPU")
    parser.add_argument("--jobs", type=int, help="processes that write files (default: 1, on the GPU one per core)")
    parser.add_argument("--time-limit", type=float, help="seconds (default: none, on the GPU 55)")
    options = parser.parse_args()
    on_gpu = options.device == "gpu"
    if on_gpu and not options.render:
        from engine.cuda import availability

        reason = availability()
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr)
            return 2
    options.jobs = options.jobs or (min(16, os.cpu_count() or 1) if on_gpu else 1)
    clock = Clock(options.time_limit or (55 if on_gpu else float("inf")))
    results = Results(RESULTS, options.device, adding=options.missing)
    status = 0 if options.render else run(options, results, clock)
    TABLE.write_text(render(results.content), encoding="utf-8")
    if "OUT" in os.environ:  # where a borrowed machine leaves what comes back
        shutil.copy(RESULTS, os.environ["OUT"])
    print(f"{TABLE} after {clock.seconds:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
