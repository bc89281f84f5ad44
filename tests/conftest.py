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


def present(path: Path) -> Path:
    """The path; skips the test where there is no such file or folder."""
    if not path.exists():
        pytest.skip(f"no test data at {path} (GGUF_ENGINE_TEST_DATA names their folder)")
    return path


@pytest.fixture(scope="session")
def shared_path() -> Callable[[str], Path]:
    """Finds test data: shared_path("demo-model/held_out.txt") is its path, and skips the test where it is absent."""
    return lambda name: present(SHARED / name)


@pytest.fixture(scope="session")
def conformance_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Models of the conformance data by name, as far as they are present: (GGUF file, its logits as .npz)."""
    from tests.support.conformance import NAMES

    target = tmp_path_factory.mktemp("conformance")
    for folder, suffix in (("models", "gguf"), ("logits", "npz")):
        wanted = {f"{folder}/{name}.{suffix}" for name in NAMES}
        for source in ("conformance", "conformance2"):
            archive = SHARED / source / f"{folder}.tar.xz"
            if archive.is_file():
                extract(archive, wanted, target)
    models = {path.stem: path for path in target.glob("models/*.gguf")}
    logits = {path.stem: path for path in target.glob("logits/*.npz")}
    return {name: (models[name], logits[name]) for name in sorted(models.keys() & logits.keys())}


@pytest.fixture(scope="session")
def conformance(conformance_files: dict[str, tuple[Path, Path]]) -> Callable[[str], tuple[Path, Path]]:
    """Finds a model of the conformance data and its logits by name; skips the test where one of the two is absent."""

    def find(name: str) -> tuple[Path, Path]:
        if name not in conformance_files:
            pytest.skip(f"no model and logits of {name} in {SHARED} (GGUF_ENGINE_TEST_DATA names the folder)")
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
