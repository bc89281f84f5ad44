"""The command line called in this process."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import pytest

from engine.cli import main


def run(*arguments, stdin="", status=0, columns=200):
    """Call main() as the command does, on a terminal of so many columns."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    with (
        mock.patch.object(sys, "argv", ["gguf-engine", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", given),
        mock.patch.dict(os.environ, environment),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert ended.value.code == status, stderr
    return SimpleNamespace(stdout=stdout, stderr=stderr)
