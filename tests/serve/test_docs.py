"""docs/serve.md names every flag of the command and every endpoint of the application, and no others."""

import re
import warnings

import typer

from engine.cli.app import app
from engine.serve.models.model_store import ModelSpec
from engine.serve.serving import Serving
from engine.serve.settings import ServeSettings
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^#)", TEXT, re.MULTILINE | re.DOTALL)[1]


def table_names(text):
    """What the first cells of the lines of a table name."""
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_flags():
    command = typer.main.get_command(app).commands["serve"]
    flags = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)} - {"--help", "-h"}
    assert {flag for name in table_names(section("Flags")) for flag in name.split("/")} == flags


def test_endpoints():
    from engine.serve import app as application

    made = []

    class Caught(application.FastAPI):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    original, application.FastAPI = application.FastAPI, Caught
    try:
        application.make_app(Serving([ModelSpec("x")], ServeSettings()))
    finally:
        application.FastAPI = original
    with warnings.catch_warnings(action="ignore"):  # old versions of the framework warn of each other
        paths = set(made[0].openapi()["paths"]) | {"/"}
    named = {name.split(" ")[-1] for name in table_names(section("Endpoints"))}
    assert named == {path.replace("{name}", "NAME") for path in paths}
