"""The table of what is supported says what was measured, of every type and every architecture."""

import argparse
import json
from pathlib import Path

import pytest

from engine.gguf import GGMLType
from engine.model.architectures import ARCHITECTURES
from scripts import support_table
from scripts.support_render import REFUSED, label, render
from tests.support.conformance import NAMES

MEASURED = {"at_once": 2e-7, "single": 1e-8}
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
    assert found[8] == expected
    assert found[4] == ("1.2e-07" if cell and "at_once" in cell else expected)
    assert rows(render({}))["IQ2_XXS"][2:] == ["not measured"] * 7 + ["-"]


def test_what_the_gpu_has_learned_is_measured_where_figures_are_missing(tmp_path, monkeypatch):
    """A cell that says what the GPU lacked is filled once it lacks nothing; one with figures stays."""
    cells = {"old": MEASURED, "learned": {"falls_back": "an indexer"}, "lacking": {"falls_back": "an indexer"}}
    path, models = tmp_path / "support.json", tmp_path / "conformance" / "models"
    path.write_text(json.dumps({"architectures": {f"{name}-moe": {"gpu": cell} for name, cell in cells.items()}}))
    models.mkdir(parents=True)
    (tmp_path / "conformance" / "logits").mkdir()
    for name in (*cells, "new"):
        (models / f"{name}-moe.gguf").touch()
        (models.parent / "logits" / f"{name}-moe.npz").touch()
    measures = support_table.measures
    monkeypatch.setattr(measures, "ARCHITECTURES", {*cells, "new"})
    monkeypatch.setattr(measures, "missing_on_gpu", lambda path: "streams" if "lacking" in path.stem else "")
    monkeypatch.setattr(measures, "architecture_on_gpu", lambda *_: MEASURED | {"at_once": 3e-7})
    monkeypatch.setattr(measures, "machine", lambda device: "a card")
    options = argparse.Namespace(data=tmp_path, model=None, device="gpu", only="architectures", missing=True)
    results = support_table.Results(path, "gpu", adding=True)
    assert support_table.run(options, results, support_table.Clock(60)) == 0
    found = json.loads(path.read_text())["architectures"]
    fresh = MEASURED | {"at_once": 3e-7}
    assert {name: row["gpu"] for name, row in found.items()} == {
        "old-moe": MEASURED, "learned-moe": fresh, "lacking-moe": {"falls_back": "streams"}, "new-moe": fresh,
    }  # fmt: skip


def test_a_speed_is_shown_beside_the_fastest_peer_s():
    cell = {"peers": ["one", "two"], "prompt of 128": [250.04, 125.0, 0.0], "decode at depth 0": [33.333, 25.0, 30.0]}
    results = {
        "types": {"Q4_K": {"speed": cell}},
        "measured": {"speed": {"machine": "two cores", "date": "2026-01-02"}},
    }
    text = render(results)
    assert rows(text)["Q4_K"][-1] == "250 / 33.3 (2.00 / 1.11)"
    assert "two cores, 2026-01-02" in text
    assert "times those of the fastest of one, two on" in text


def test_what_is_said_to_be_refused_is():
    assert not {name for names in REFUSED.values() for name in names} & set(ARCHITECTURES)
