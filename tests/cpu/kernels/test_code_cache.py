"""The disk cache of compiled CPU kernels: damaged files are replaced, whatever else happens the kernel runs."""

import logging
import tempfile

import numpy as np
import pytest

from engine.gguf.quants import dequantize
from engine.gguf.types import GGMLType
from tests.support.damage import WAYS, fill_disk


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for kernels; none is in memory."""
    from numba import config

    from engine.cpu.kernels import code_cache

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(code_cache, "_told", [])
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    from engine.cpu.kernels import build

    monkeypatch.setattr(build, "_kernels", {})


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def run_kernel():
    """Get a kernel and check what it gives; returns whether it was compiled."""
    from numba.core import event

    from engine.cpu.kernels.build import kernel

    compiled = []
    listener = type("Listener", (event.Listener,), {"on_start": lambda *_: compiled.append(1), "on_end": lambda *_: 0})
    with event.install_listener("numba:run_pass", listener()):
        unpack = kernel("dequantize_rows", "Q8_0")
    raw = np.random.default_rng(1).integers(0, 60, (3, 2 * GGMLType.Q8_0.type_size), np.uint8)
    out = np.empty((3, 64), np.float32)
    unpack(raw.ctypes.data, raw.strides[0], 2, out.ctypes.data, out.strides[0], 3)
    assert np.array_equal(out, dequantize(raw, GGMLType.Q8_0))
    return bool(compiled)


def files(folder):
    return {path.suffix: path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_file_is_replaced(cache, monkeypatch, suffix):
    assert run_kernel()
    path = files(cache)[suffix]
    whole = path.read_bytes()
    for way, damage in WAYS.items():
        path.write_bytes(damage(whole))
        forget(monkeypatch)
        assert run_kernel(), way
        assert files(cache).keys() == {".nbi", ".nbc"}, way
        assert path.stat().st_size == len(whole), way
        forget(monkeypatch)
        assert not run_kernel(), way
    path.unlink()
    forget(monkeypatch)
    assert run_kernel()
    assert path.exists()


@pytest.mark.parametrize("content", [b"no pickle", None])
def test_a_file_of_another_version_is_replaced(cache, monkeypatch, content):
    """Whole files whose content this version cannot read; None: as numba itself writes them."""
    import numba

    from engine import disk_cache
    from engine.cpu.kernels import build

    if content is None:
        with monkeypatch.context() as patch:
            patch.setattr(build, "KernelCache", numba.core.caching.FunctionCache)
            assert run_kernel()
    else:
        assert run_kernel()
        for path in files(cache).values():
            disk_cache.write(path, content)
    forget(monkeypatch)
    assert run_kernel()
    forget(monkeypatch)
    assert not run_kernel()


def test_a_full_disk_and_a_folder_that_cannot_be_written(cache, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, 100)
        assert run_kernel()
    assert not files(cache)
    forget(monkeypatch)
    from numba import config

    (cache / "file").write_text("no folder")
    monkeypatch.setattr(config, "CACHE_DIR", str(cache / "file"))
    run_kernel()  # numba goes on to its other folders, which may have the kernel


def read_only(*given, **options):
    raise OSError(30, "Read-only file system")


def test_one_warning_says_that_no_folder_can_be_written(cache, monkeypatch, caplog):
    """What was found, what it costs, and which variable names another folder."""
    from engine.cpu.kernels.build import kernel

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)  # with which numba tries each folder
    assert run_kernel()
    (message,) = warnings(caplog)
    assert caplog.records[0].name == "engine"
    assert f"{cache}/" in message
    assert "kernels/__pycache__: Read-only file system" in message
    assert message.count("Read-only file system") == 3
    assert "every start compiles them again" in message
    assert "set NUMBA_CACHE_DIR to a folder" in message
    kernel("dequantize_rows", "Q4_0")
    forget(monkeypatch)
    assert run_kernel()
    assert len(warnings(caplog)) == 1


def test_only_folders_that_were_tried_are_named(cache, monkeypatch, caplog):
    from numba import config

    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert run_kernel()
    (message,) = warnings(caplog)
    assert message.count("Read-only file system") == 2
    assert str(cache) not in message


def test_a_full_disk_is_told_once(cache, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        fill_disk(patch, 100)
        for _ in range(2):
            assert run_kernel()
            forget(monkeypatch)
    (message,) = warnings(caplog)
    assert f"{cache}/" in message
    assert "cannot be written" in message
    assert "NUMBA_CACHE_DIR" in message


def test_no_warning_where_nothing_is_compiled_or_all_is_kept(cache, monkeypatch, caplog):
    assert run_kernel()
    forget(monkeypatch)
    fill_disk(monkeypatch, 100)
    assert not run_kernel()  # from the disk
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert not run_kernel()  # from memory
    assert not warnings(caplog)
