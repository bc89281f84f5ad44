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


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with conformance/, vocabs/ and demo-model/; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED} (set GGUF_ENGINE_TEST_DATA)")
    return SHARED


@pytest.fixture(scope="session")
def conformance_dir(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked conformance files: models/NAME.gguf and logits/NAME.npz for the architectures supported so far."""
    return unpacked(shared_dir / "conformance", tmp_path_factory)


@pytest.fixture(scope="session")
def conformance2_dir(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of further architectures, not all of which are supported."""
    return unpacked(shared_dir / "conformance2", tmp_path_factory)


def unpacked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives of a folder of conformance data; skips the test where the folder is absent."""
    if not source.is_dir():
        pytest.skip(f"no conformance data at {source}")
    target = tmp_path_factory.mktemp(source.name)
    for archive in ("models.tar.xz", "logits.tar.xz"):
        with tarfile.open(source / archive) as tar:
            tar.extractall(target, filter="data")
    return target
