"""What the documentation names exists: files, folders, and the targets of links."""

import re

import pytest

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"`((?:engine|tests|scripts|docs|examples|benchmarks)/[^`\s*]*)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PLACEHOLDER = re.compile(r"[A-Z]{4,}")
"""Names such as engine/cuda/FOLDER/NAME.cu are for the reader to fill in."""
ARRIVING = ("engine/cuda/launch_plan", "engine/cuda/recurrent")
"""Folders that the documentation describes and that are not merged yet; to be emptied when they are."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    named = [
        ROOT / name for name in NAMED.findall(text) if not PLACEHOLDER.search(name) and not name.startswith(ARRIVING)
    ]
    linked = [page.parent / target for target in LINK.findall(text) if "://" not in target]
    assert [str(path) for path in named + linked if not path.exists()] == []
