"""The version has one source, and the change log knows it."""

import importlib.metadata
import re
import tomllib

import pytest

import engine
from tests.conftest import ROOT


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'__version__ = "(.*)"', source) == [engine.__version__]


def test_the_installed_package_has_that_version():
    try:
        installed = importlib.metadata.version("gguf-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed: it runs from the checkout")
    assert installed == engine.__version__


def test_the_change_log_begins_with_what_is_unreleased_or_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", engine.__version__)
