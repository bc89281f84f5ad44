"""What may know what: the order of imports, the homes of cupy and numba, and of the names of architectures."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine.model.architectures import ARCHITECTURES

PACKAGE = Path(engine.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import parts of a lower rank, itself, and what BESIDE allows.
RANKS = {
    "errors": 0,
    "deferral": 0,
    "config": 1,
    "prompts": 1,
    "sampling": 1,
    "request": 1,
    "gguf": 2,
    "text": 2,
    "kv_blocks": 2,
    "model": 3,
    "cpu": 4,
    "cuda": 4,
    "runner": 5,
    "scheduler": 5,
    "output": 5,
    "loop": 6,
    "stream": 7,
    "llm": 8,
    "perplexity": 9,
    "bench": 9,
    "__init__": 10,
    "cli": 11,
    "serve": 11,
    "__main__": 12,
}
BESIDE = {("request", "sampling"), ("llm", "perplexity")}
ONLY_IN = {
    "cupy": "engine.cuda",
    "cupyx": "engine.cuda",
    "numba": "engine.cpu.kernels",
    "llvmlite": "engine.cpu.kernels",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> list[str]:
    """Full names of all modules a file imports, also inside functions and for type checking only."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" and path.parent != PACKAGE else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from engine import x" may name a module or one of the package's public names.
            found += [f"engine.{alias.name}" if module == "engine" else module for alias in node.names]
    return found


def part(name: str) -> str:
    piece = name.split(".")[1] if "." in name else "__init__"
    return piece if piece in RANKS else "__init__"


def wrong_arrows(source: str, targets: list[str]) -> list[str]:
    own = part(source)
    wrong = []
    for target in targets:
        if target != "engine" and not target.startswith("engine."):
            continue
        other = part(target)
        if other != own and RANKS[other] >= RANKS[own] and (own, other) not in BESIDE:
            wrong.append(f"{source} imports {target}")
    return wrong


def test_every_part_has_a_rank():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert parts <= RANKS.keys(), f"give these a place in the import order: {sorted(parts - RANKS.keys())}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    if name == "engine.__init__":
        return  # the public names, imported only when asked for
    assert wrong_arrows(name, imports(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_device_packages_stay_in_their_folder(path):
    name = module_name(path)
    for target in imports(path):
        home = ONLY_IN.get(target.split(".")[0])
        assert home is None or name.startswith(home), f"{name} imports {target}, which belongs in {home}"


def test_the_check_sees_a_wrong_arrow():
    assert wrong_arrows("engine.model.loader", ["engine.cpu.ops"]) == ["engine.model.loader imports engine.cpu.ops"]
    assert wrong_arrows("engine.cpu.ops", ["engine.cuda.module"]) != []
    assert wrong_arrows("engine.gguf.reader", ["engine.errors", "numpy", "engine.gguf.types"]) == []


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
