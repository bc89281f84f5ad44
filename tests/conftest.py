import os
import sys
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Appended: where the package is installed, `engine` is the installed one; tests.support and scripts come from here.
sys.path.append(str(ROOT))
SHARED = Path(os.environ.get("GGUF_ENGINE_TEST_DATA", ROOT.parent / "shared"))
CONFORMANCE = ("conformance", "conformance2")
"""Folders of test data that hold models.tar.xz and logits.tar.xz."""


@cache
def why_no_gpu() -> str | None:
    from engine.cuda import availability

    return availability()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu skip where the GPU backend cannot run, with the reason that it gives itself."""
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names that differ from process to process: parallel runs must collect the same tests in each worker."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} contains an address: give its parameters ids of their own")


@pytest.fixture(scope="session")
def shared_path() -> Callable[[str], Path]:
    """Finds test data: shared_path("demo-model/held_out.txt") is its path, and skips the test where it is absent."""

    def find(name: str) -> Path:
        if not (path := SHARED / name).exists():
            pytest.skip(f"no test data at {path} (set GGUF_ENGINE_TEST_DATA)")
        return path

    return find


@pytest.fixture(scope="session")
def conformance_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Models of the conformance data by name, as far as they are present: (GGUF file, its logits as .npz)."""
    from tests.support.conformance import NAMES

    target = tmp_path_factory.mktemp("conformance")
    for folder, suffix in (("models", "gguf"), ("logits", "npz")):
        wanted = {f"{folder}/{name}.{suffix}" for name in NAMES}
        archives = [SHARED / source / f"{folder}.tar.xz" for source in CONFORMANCE]
        present = [archive for archive in archives if archive.is_file()]
        for archive in present:
            extract(archive, wanted, target)
        assert not wanted or present != archives, f"no conformance file has {sorted(wanted)}"
    models = {path.stem: path for path in target.glob("models/*.gguf")}
    logits = {path.stem: path for path in target.glob("logits/*.npz")}
    return {name: (models[name], logits[name]) for name in NAMES if name in models and name in logits}


@pytest.fixture(scope="session")
def conformance(conformance_files: dict[str, tuple[Path, Path]]) -> Callable[[str], tuple[Path, Path]]:
    """Finds a model of the conformance data and its logits by name; skips the test where one of the two is absent."""

    def find(name: str) -> tuple[Path, Path]:
        if name not in conformance_files:
            folders = " and ".join(str(SHARED / source) for source in CONFORMANCE)
            pytest.skip(
                f"no model and logits of {name} in {folders} (GGUF_ENGINE_TEST_DATA names the folder around them)"
            )
        return conformance_files[name]

    return find


def extract(archive: Path, wanted: set[str], target: Path) -> None:
    """Unpack some members, and read the archive no further than the last of them."""
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name in wanted:
                tar.extract(member, target, filter="data")
                wanted.remove(name)
            if not wanted:
                return
