import os
import sys
import tarfile
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


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with conformance/, vocabs/ and demo-model/; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED} (set GGUF_ENGINE_TEST_DATA)")
    return SHARED


@pytest.fixture(scope="session")
def conformance_dir(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked conformance files of all NAMES: models/NAME.gguf and logits/NAME.npz."""
    from tests.support.conformance import NAMES

    target = tmp_path_factory.mktemp("conformance")
    for folder, suffix in (("models", "gguf"), ("logits", "npz")):
        wanted = {f"{folder}/{name}.{suffix}" for name in NAMES}
        for source in ("conformance", "conformance2"):
            archive = shared_dir / source / f"{folder}.tar.xz"
            if not archive.exists():
                pytest.skip(f"no conformance data at {archive}")
            extract(archive, wanted, target)
        assert not wanted, f"no conformance file has {sorted(wanted)}"
    return target


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
