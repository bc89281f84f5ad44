"""What the documentation names exists: files, folders, and the targets of links."""

import re

import pytest

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"`((?:engine|tests|scripts|docs|examples|benchmarks)/[^`\s*]*)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PLACEHOLDER = re.compile(r"[A-Z]{4,}")
"""Names such as engine/cuda/FOLDER/NAME.cu are for the reader to fill in."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    named = [ROOT / name for name in NAMED.findall(text) if not PLACEHOLDER.search(name)]
    linked = [page.parent / target for target in LINK.findall(text) if "://" not in target]
    assert [str(path) for path in named + linked if not path.exists()] == []


def test_the_tree_in_the_readme_is_the_tree():
    """Every line of it names something that exists, and no folder with code is missing."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## What is where")[1].split("```")[1]
    folders, found = [], set()
    for line in block.strip("\n").splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        path = "".join(folders).rstrip("/")
        found.add(path)
        assert (ROOT / path).exists(), path
    packages = {path.parent for path in (ROOT / "engine").rglob("*.py")} - {ROOT / "engine"}
    assert {str(path.relative_to(ROOT)) for path in packages} <= found


@pytest.mark.parametrize("folder", ["how-to", "decisions"])
def test_every_page_is_in_the_list_of_its_folder(folder):
    index = (ROOT / "docs" / folder / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs" / folder).glob("*.md")} - {"index.md"}
    assert {page for page in pages if page not in index} == set()
