"""--json writes RFC 8259 whatever is in a file and whatever stdout's encoding is; refusals are one clear line."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from engine.api.perplexity import Perplexity
from engine.cli import main
from engine.cli.terminal import write_json
from engine.cpu.caches.model import KVCache
from engine.errors import DeviceError
from engine.model.config import AttentionConfig
from tests.support.models.gguf_builder import Typed, build_gguf, tiny_llama_parts


def run(*arguments, encoding="utf-8"):
    """Call main(); stdout as bytes, stderr as text, and the exit status."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=name, write_through=True) for name in (encoding, "utf-8"))
    with (
        mock.patch.object(sys, "argv", ["gguf-engine", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return SimpleNamespace(out=out.buffer.getvalue(), err=err.buffer.getvalue().decode(), status=ended.value.code)


def parsed(data):
    """One JSON object in UTF-8, with nothing that RFC 8259 lacks."""

    def refuse(name):
        raise AssertionError(f"{name} is no number of JSON")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def written(value, encoding, **settings):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, **settings)
    with redirect_stdout(out):
        write_json(value)
    return out.buffer.getvalue()


def model(folder, keys=None, tensors=None):
    meta, own = tiny_llama_parts()
    path = folder / "tiny.gguf"
    path.write_bytes(build_gguf(meta | (keys or {}), own | (tensors or {})))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "utf-16", "cp037"])
def test_every_encoding_of_stdout(encoding):
    value = {"text": "Größe ☃ 😀", "none": None, "list": [1, 2.5, "é"]}
    data = written(value, encoding)
    assert parsed(data) == value
    assert ("ß".encode() in data) == (encoding == "utf-8")
    assert data.endswith(b"}\n")


def test_numbers_that_are_not_finite():
    value = {"a": [float("inf"), -float("inf"), (float("nan"), 1.0)], "b": {"c": np.float64("inf")}}
    expected = {"a": ["Infinity", "-Infinity", ["NaN", 1.0]], "b": {"c": "Infinity"}}
    assert parsed(written(value, "utf-8")) == expected


def test_names_that_are_not_utf_8():
    """A file name of other bytes: Python holds lone surrogates, and a UTF-8 stream may let them through as bytes."""
    name = b"mod\xe8le.gguf".decode("utf-8", "surrogateescape")
    for errors in ("strict", "surrogateescape"):
        assert parsed(written({"file": name}, "utf-8", errors=errors)) == {"file": name}


def test_a_stream_of_text_alone():
    out = io.StringIO()
    with redirect_stdout(out):
        write_json({"text": "é"})
    assert parsed(out.getvalue().encode()) == {"text": "é"}


def test_inspect(tmp_path):
    """What conformance files hold: infinities among the metadata; and nested arrays."""
    keys = {
        "llama.kda.gate_lower_bound": -float("inf"),
        "general.nothing": Typed("f64", float("nan")),
        "general.floats": np.array([1.0, np.inf], np.float32),
        "general.nested": [[1, 2], [3]],
        "general.name": b"caf\xe9",
    }
    path = model(tmp_path, keys, {"mm.0.bias": np.ones(4, np.float32)})
    done = run("inspect", path, "--device", "cpu", "--json", encoding="ascii")
    metadata = parsed(done.out)["metadata"]
    assert metadata["llama.kda.gate_lower_bound"] == "-Infinity"
    assert metadata["general.nothing"] == "NaN"
    assert metadata["general.floats"] == [1.0, "Infinity"]
    assert metadata["general.nested"] == [[1, 2], [3]]
    assert metadata["general.name"] == "caf\ufffd"
    warnings = [line for line in done.err.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 2
    assert "not UTF-8 in metadata general.name" in warnings[0]
    assert "mm.0.bias" in warnings[1]


def test_strict(tmp_path):
    path = model(tmp_path, {"llama.invented": 3})
    assert "llama.invented is 3" in parsed(run("inspect", path, "--strict", "--json").out)["memory"]["error"]
    for command in (["generate", "x"], ["bench"], ["perplexity", __file__]):
        done = run(*command, "-m", path, "--device", "cpu", "--strict")
        assert (done.status, done.out) == (2, b"")
        assert "llama.invented is 3" in done.err


def test_generate_to_a_stream_that_is_not_utf_8(tmp_path):
    path = model(tmp_path)
    options = ["-m", path, "--device", "cpu", "--temp", 0, "-n", 6, "--json", "--logprobs", 2, "--ignore-eos", "-t", 1]
    plain, other = (parsed(run("generate", "héllo", *options, encoding=name).out) for name in ("utf-8", "ascii"))
    assert plain["text"] == other["text"]
    assert plain["logprobs"] == other["logprobs"]


def test_the_perplexity_of_a_hopeless_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello there, hello there, " * 40)
    path = model(tmp_path, tensors={"output_norm.weight": np.full(64, 1e5, np.float32)})
    options = [text, "-m", path, "-c", 32, "--chunks", 2, "--device", "cpu", "-t", 1]
    value = parsed(run("perplexity", *options, "--json").out)
    assert (value["perplexity"], value["error"]) == ("Infinity", "Infinity")
    assert value["loss"] > 1000
    assert run("perplexity", *options).out.startswith(b"perplexity inf +/- inf\n")


@pytest.mark.parametrize(
    ("loss", "error", "expected"),
    [
        (710.0, 0.5, (float("inf"), float("inf"))),
        (float("inf"), float("nan"), (float("inf"), float("inf"))),
        (0.0, 0.25, (1.0, 0.25)),
    ],
)
def test_perplexities(loss, error, expected):
    measured = Perplexity(1, 10, loss, error)
    assert (measured.value, measured.error) == expected


@pytest.mark.parametrize("option", ["--ctx-size", "--cache-tokens"])
@pytest.mark.parametrize("tokens", [10**15, 2**63 - 1, 10**320], ids=["1e15", "2**63", "1e320"])
def test_more_than_any_address_space_holds(tmp_path, option, tokens):
    done = run("generate", "x", "-m", model(tmp_path), "--device", "cpu", option, tokens)
    assert (done.status, done.out) == (2, b"")
    assert "GiB: ask for a smaller context_length or cache_tokens" in done.err.splitlines()[-1]
    done = run("inspect", model(tmp_path), "--device", "cpu", "--json", option, tokens)
    assert "GiB: ask for a smaller context_length or cache_tokens" in parsed(done.out)["memory"]["error"]


def test_page_tables_that_no_memory_holds():
    attention = AttentionConfig(n_heads=1, n_kv_heads=1, key_width=16, value_width=16, scale=1.0, rope=None)
    for context in (10**16, 10**20):
        with pytest.raises(DeviceError, match="ask for a smaller context_length"):
            KVCache([attention], context_length=context, n_slots=2, n_pages=1)
