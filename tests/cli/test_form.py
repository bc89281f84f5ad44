"""--json-schema, --grammar-file and --regex, and exit status 3 where the text is not whole."""

import json
import re

import pytest

from tests.support.command_line import run
from tests.support.servers.http_server import TEMPLATE

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
SCHEMA |= {"additionalProperties": False}
USUAL = ("--device", "cpu", "--threads", 2, "--seed", 3, "--no-stats")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    (folder / "s.json").write_text(json.dumps(SCHEMA))
    (folder / "g.gbnf").write_text('root ::= "a" [0-9]')
    (folder / "g.lark").write_text('start: "b" /[0-9]/')
    (folder / "t.jinja").write_text(TEMPLATE)
    return folder


def test_texts_have_the_form(files):
    for given in (json.dumps(SCHEMA), files / "s.json"):
        text = run("generate", "Once", "-n", 60, *USUAL, "--json-schema", given).stdout
        assert json.loads(text)["n"] <= 99
    for given, pattern in (("g.gbnf", "a[0-9]"), ("g.lark", "b[0-9]")):
        assert re.fullmatch(pattern, run("generate", "x", *USUAL, "--grammar-file", files / given).stdout.strip())
    told = json.loads(run("generate", "x", *USUAL, "--regex", "[xy]{3}", "--samples", 2, "--json").stdout)
    assert all(re.fullmatch("[xy]{3}", one["text"]) for one in told["samples"])


def test_a_text_that_is_cut_ends_with_3(files):
    done = run("generate", "Once", "-n", 2, *USUAL, "--json-schema", files / "s.json", status=3)
    assert "--max-tokens" in done.stderr
    run("generate", "Once", "-n", 2, *USUAL)
    chat = ("chat", *USUAL, "--chat-template-file", files / "t.jinja", "--regex", "(yes|no)!")
    assert re.fullmatch("(yes|no)!\n", run(*chat, stdin="Hi\n").stdout)
    assert run(*chat, "-n", 1, stdin="Hi\n", status=3).stderr.count("cut after 1 tokens") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--regex", "a", "--json-schema", "{}"), "--json-schema and --regex are given"),
        (("--grammar-file", "x.txt"), ".gbnf or .lark"),
        (("--json-schema", "no-such-file.json"), "no-such-file.json"),
        (("--json-schema", "{"), "not JSON"),
        (("--regex", "("), "unclosed group"),
    ],
)
def test_what_cannot_be_used_is_told(options, words):
    assert words in run("generate", "x", *USUAL, *options, status=2).stderr
