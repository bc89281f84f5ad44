"""The table of what is supported says what was measured, of every type and every architecture."""

import json
from pathlib import Path

import pytest

from engine.gguf import GGMLType
from engine.model.architectures import ARCHITECTURES
from scripts.support_render import label, render
from tests.support.conformance import NAMES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "support.json").read_text())


def rows(text):
    cells = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    return {first: rest for first, *rest in cells}


def test_the_table_is_made_from_the_results():
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == render(RESULTS)


def test_every_type_and_architecture_is_measured_on_the_cpu():
    table = rows(render(RESULTS))
    for kind in GGMLType:
        decoding, at_once, single, *_ = table[kind.name][1:]
        assert decoding.startswith("exact")
        assert float(at_once) < 1e-8
        assert float(single) < 1e-8
        assert (kind.name.startswith("I") and kind.name[1] != "Q") or float(table[kind.name][6].split(" ± ")[0]) > 1
    for name in NAMES:
        assert all(float(cell) < 1e-8 for cell in table[label(name)][:2])


def test_architectures_are_named_as_in_files():
    labels = {label(name): name for name in RESULTS["architectures"]}
    assert len(labels) == len(RESULTS["architectures"])
    assert {name.partition(",")[0] for name in labels} <= set(ARCHITECTURES)
    assert labels["ernie4_5"] == "ernie4_5-moe"  # the file has no experts
    assert labels["ernie4_5-moe, experts"] == "ernie4_5-moe-moe"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (None, "not measured"),
        ({"falls_back": "no kernels"}, "falls back to the CPU"),
        ({"failed": "DeviceError"}, "failed"),
        ({"at_once": 1.25e-7, "single": 2e-8, "perplexity": 20.93587, "error": 0.512, "chunks": 3}, "20.9359 ± 0.51"),
    ],
)
def test_cells(cell, expected):
    results = {"types": {"Q4_K": {"gpu": cell} if cell else {}}}
    found = rows(render(results))["Q4_K"]
    assert found[-1] == expected
    assert found[4] == ("1.2e-07" if cell and "at_once" in cell else expected)
    assert rows(render({}))["IQ2_XXS"][2:] == ["not measured"] * 7
