"""Measure the speed column of docs/support.md: prompts and decoding of every tensor type on the CPU, beside its peers.

    python -m scripts.support_speed --llama-bench /path/to/llama-bench --llama-bench "ik_llama.cpp=/another/llama-bench"

Each type is measured on a synthetic file of the Llama-3.2-1B shape with six layers, all matrices in that type, also the
embedding, which is the output matrix too. The method is that of bench_cpu_peer.py, whose options for the peer, the
threads and the lengths are taken. Results are kept in benchmarks/support.json as they are found: a run replaces the
types that it measures. Needs a machine that has nothing else to do, and about half a minute a type.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from engine.gguf import FORMATS, GGMLType
from scripts import support_measure
from scripts.bench_cpu_peer import add_options, compare
from scripts.make_synthetic_gguf import write_model
from scripts.support_render import render
from scripts.support_table import RESULTS, TABLE, Results
from scripts.synthetic_models import plan
from scripts.synthetic_shapes import SHAPES

SHAPE, LAYERS = "llama-3.2-1b", 6


def measured_types() -> list[GGMLType]:
    """Types that files carry for speed or size: floating point, and all that are multiplied in integers."""
    plain = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
    return [kind for kind in FORMATS if kind in plain or support_measure.rounds_activations(kind)]


def write_file(folder: Path, kind: GGMLType) -> Path:
    """The shape with all matrices in one type."""
    path = folder / f"{SHAPE}-{kind.name}.gguf"
    shape = replace(SHAPES[SHAPE], layers=LAYERS)
    recipe = "F32" if kind is GGMLType.F32 else "Q4_0"
    write_model(path, SHAPE, shape, recipe, plan(shape, recipe, [("weight", kind)]))
    return path


def measure(kind: GGMLType, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Median tokens per second for each length, this engine's and then its peers', and the names of those."""
    path = write_file(folder, kind)
    try:
        found = list(compare(path, options))
    finally:
        path.unlink()
    speeds = {result.what: [median(runs) for runs in (result.mine, *result.peers.values())] for result in found}
    return {"peers": list(found[0].peers), **speeds}


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=lambda text: text.upper().split(","), help="only these, e.g. Q4_K,IQ2_S")
    add_options(parser)
    parser.set_defaults(prompt=[128], generate=32, repetitions=3)
    options = parser.parse_args()
    unknown = set(options.types or ()) - {kind.name for kind in measured_types()}
    if unknown:
        parser.error(f"--types {', '.join(sorted(unknown))}: not among {', '.join(k.name for k in measured_types())}")
    results = Results(RESULTS, "speed")
    with tempfile.TemporaryDirectory(prefix="speed-") as scratch:
        for kind in measured_types():
            if options.types and kind.name not in options.types:
                continue
            results.add("types", kind.name, measure(kind, Path(scratch), options))
            results.save()
    TABLE.write_text(render(results.content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
