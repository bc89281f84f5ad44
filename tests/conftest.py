import os
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GGUF_ENGINE_TEST_DATA", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with conformance/, vocabs/ and demo-model/; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED} (set GGUF_ENGINE_TEST_DATA)")
    return SHARED


@pytest.fixture(scope="session")
def conformance_dir(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked conformance files: models/NAME.gguf and logits/NAME.npz for the architectures supported so far."""
    source = shared_dir / "conformance"
    if not source.is_dir():
        pytest.skip(f"no conformance data at {source}")
    target = tmp_path_factory.mktemp("conformance")
    for archive in ("models.tar.xz", "logits.tar.xz"):
        with tarfile.open(source / archive) as tar:
            tar.extractall(target, filter="data")
    return target
