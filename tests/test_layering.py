"""What may know what: the order of imports, the homes of cupy and numba, and of the names of architectures."""

import ast
import subprocess
import sys
from graphlib import CycleError
from pathlib import Path

import pytest

from engine.model.architectures import ARCHITECTURES
from tests.layering import MODULES, PACKAGE, imports, module_name, modules, order, parts, parts_with_rooms, rooms

ONLY_IN = {
    "cupy": "engine.cuda",
    "cupyx": "engine.cuda",
    "numba": "engine.cpu.kernels",
    "llvmlite": "engine.cpu.kernels",
}
BELOW = [
    ("errors", "gguf"),
    ("sampling", "request"),
    ("request", "model"),
    ("gguf", "model"),
    ("text", "scheduling"),
    ("model", "cpu"),
    ("model", "cuda"),
    ("cpu", "runner"),
    ("cuda", "runner"),
    ("runner", "scheduling"),
    ("scheduling", "api"),
    ("api", "cli"),
]
"""Pairs of parts: the second may import the first, never the other way."""


@pytest.mark.parametrize("graph", [parts, modules])
def test_imports_have_no_circle(graph):
    order(graph())


@pytest.mark.parametrize("part", parts_with_rooms())
def test_rooms_have_no_circle(part):
    order(rooms(part))


def test_parts_know_only_what_is_below_them():
    graph = parts()
    found = order({place: targets | {low for low, high in BELOW if high == place} for place, targets in graph.items()})
    assert set(found) == graph.keys()
    assert "cuda" not in graph["cpu"]
    assert "cpu" not in graph["cuda"]


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        order({"model": {"cpu"}, "cpu": {"gguf"}, "gguf": {"model"}})


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_device_packages_stay_in_their_folder(path):
    name = module_name(path)
    for target in imports(path):
        home = ONLY_IN.get(target.split(".")[0])
        assert home is None or name.startswith(home), f"{name} imports {target}, which belongs in {home}"


def test_no_architecture_is_named_outside_its_file():
    """Nothing asks which architecture it serves; kinds of tokenizers share some of the names."""
    homes = (PACKAGE / "model" / "architectures", PACKAGE / "text")
    for path in MODULES:
        if not any(path.is_relative_to(home) for home in homes):
            strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert not strings & ARCHITECTURES.keys(), path


def test_import_is_light():
    """import engine loads neither numpy-heavy parts nor a device package."""
    code = (
        "import sys, engine; print([m for m in ('numpy', 'numba', 'cupy', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tests_borrow_from_support_alone():
    """What several test modules need is in tests/support; a test module imports no other one."""
    tests = Path(__file__).parent
    for path in sorted(tests.rglob("*.py")):
        assert not [name for name in imports(path) if name.startswith("tests.") and ".test_" in name], path
