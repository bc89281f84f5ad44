"""The files of the caches of compiled code: whole and as written, or absent."""

import pytest

from engine import disk_cache
from tests.support.damage import WAYS, fill_disk

CONTENT = bytes(range(256)) * 7


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_file_counts_as_absent_and_goes(tmp_path, way):
    path = tmp_path / "new folder" / "entry"
    assert disk_cache.read(path) is None
    assert disk_cache.write(path, CONTENT)
    assert disk_cache.read(path) == CONTENT
    path.write_bytes(WAYS[way](path.read_bytes()))
    assert disk_cache.read(path) is None
    assert not path.exists()
    assert disk_cache.write(path, b"")
    assert disk_cache.read(path) == b""


@pytest.mark.parametrize("room", [0, 10, 48, 1000])
def test_a_full_disk_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, room):
    path = tmp_path / "entry"
    disk_cache.write(path, b"old")
    fill_disk(monkeypatch, room)
    assert not disk_cache.write(path, CONTENT)
    monkeypatch.undo()
    assert [one.name for one in tmp_path.iterdir()] == ["entry"]
    assert disk_cache.read(path) == b"old"


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        disk_cache.write(tmp_path / "entry", CONTENT)
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert not disk_cache.write(tmp_path / "file" / "entry", CONTENT)
    (tmp_path / "folder").mkdir()
    assert disk_cache.read(tmp_path / "folder") is None
    assert not disk_cache.write(tmp_path / "folder", CONTENT)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]
