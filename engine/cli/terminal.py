"""What commands write where: results to stdout, everything about the work itself to stderr."""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.cli.interrupts import Interrupts
from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from engine.api.llm import LLM
    from engine.config import EngineConfig
    from engine.request import GenerationResult

MOST_TEXT = 1 << 28
"""Bytes read of a text: endless input must not fill the memory."""


def write(text: str) -> None:
    """Write text to stdout now; what the terminal's encoding cannot show becomes a replacement character."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Write one JSON object (RFC 8259) and a line end to stdout.

    As UTF-8 where that is stdout's encoding, else in ASCII with escapes, whatever the encoding is. Numbers that are not
    finite are the strings "Infinity", "-Infinity" and "NaN", which JSON has no numbers for.
    """
    value = _finite(value)
    data = (json.dumps(value, allow_nan=False) + "\n").encode("ascii")
    if codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8":
        # A file name that is not UTF-8 comes as lone surrogates, which UTF-8 cannot hold and escapes can.
        with suppress(UnicodeEncodeError):
            data = (json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:  # replaced by an object that takes text alone
        write(data.decode("utf-8"))
        return
    sys.stdout.flush()
    while data:  # with python -u there is no buffer, and a pipe may take a part
        data = data[raw.write(data) or 0 :]
    raw.flush()


def _finite(value: Any) -> Any:
    """The same value with names in place of the numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_text(path: Path) -> str:
    """A UTF-8 text file; "-" is stdin.

    Raises:
        InvalidRequestError: the bytes are not UTF-8, or there is no end to them.
    """
    with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")  # one read() would take memory for all that may come
        raw = b"".join(itertools.islice(pieces, MOST_TEXT >> 20))
        endless = file.read(1) != b""
    if endless:
        raise InvalidRequestError(f"{path} has more than {MOST_TEXT} bytes; that is more than any model reads at once")
    return utf8_text(raw, str(path))


def utf8_text(raw: bytes, source: str) -> str:
    """Text of its bytes.

    Raises:
        InvalidRequestError: they are not UTF-8; source says in it where they come from.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{raw[error.start]:02x}"
        raise InvalidRequestError(f"{source} is not UTF-8 text: {found}; convert it first") from None


def note(text: str) -> None:
    """One line about the work, to stderr."""
    print(text, file=sys.stderr, flush=True)


def stats_line(load_seconds: float | None, *results: GenerationResult) -> str:
    """Speeds and counts of a finished request, or of all samples of a prompt, on one line."""
    stats = results[0].stats
    parts = [] if load_seconds is None else [f"load {load_seconds:.2f} s"]
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts.append(f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_tok_s:.1f} tok/s")
    if len(results) == 1:
        speed = f", {stats.decode_tok_s:.1f} tok/s" if stats.output_tokens > 1 else ""  # between two tokens at least
        parts.append(f"decode {stats.output_tokens} tokens{speed}")
        parts.append(f"end: {results[0].finish_reason}")
    else:
        every = [result.stats for result in results]
        n_tokens = sum(one.output_tokens for one in every)
        begin = min(one.queue_seconds + one.prompt_seconds for one in every)
        seconds = max(one.queue_seconds + one.prompt_seconds + one.decode_seconds for one in every) - begin
        together = (n_tokens - 1) / seconds if seconds > 0 else 0.0
        parts.append(f"decode {n_tokens} tokens of {len(results)} samples, {together:.1f} tok/s in all")
        ends = Counter(result.finish_reason for result in results)
        parts.append("end: " + ", ".join(f"{count} {reason}" for reason, count in ends.items()))
    parts.append(f"seed {results[0].seed}")
    return "[" + " | ".join(parts) + "]"


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done while it is done; the function given changes the text.

    On a terminal the line disappears afterwards. Elsewhere a line is written for what lasts longer than a second.
    """
    if not sys.stderr.isatty():
        timer = threading.Timer(1.0, note, (text,))

        def update(text: str) -> None:
            nonlocal timer
            timer.cancel()
            timer = threading.Timer(1.0, note, (text,))
            timer.daemon = True
            timer.start()

        try:
            yield update
        finally:
            timer.cancel()
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as line:
        yield line.update


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Warnings of the engine as single lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("engine")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def local_file(model: str | Path) -> Path:
    """The file of a model, fetched with a progress bar on stderr where it is named hf:... and is not here."""
    from engine.api.names import resolve_model
    from engine.hub.names import HubName, is_hub_name

    if not is_hub_name(str(model)):
        return resolve_model(model)
    from engine.hub.progress import shown
    from engine.hub.resolve import resolve

    with shown(note) as progress, Interrupts():
        return resolve(HubName.parse(str(model)), progress)


@contextmanager
def open_model(config: EngineConfig) -> Iterator[LLM]:
    """An open LLM, with the state of its loading visible and warnings on stderr."""
    with warnings_shown():
        if config.model is not None:
            config = replace(config, model=local_file(config.model))
        with status("loading the model ...") as update, Interrupts():
            from engine.api.llm import LLM

            llm = LLM(config, status=update)
        with llm:
            yield llm
