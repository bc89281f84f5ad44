"""How a download tells how far it is: a call for every piece, and a bar made of such calls."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.units import size_text

log = logging.getLogger("engine")

Progress = Callable[[str, int, int], None]
"""Called with what is done ("downloading model-Q4_K_M.gguf"), bytes done so far and bytes in all, over all parts."""

LINE_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


def ignore(text: str, done: int, total: int) -> None:
    """Progress that is not shown."""


def progress_text(text: str, done: int, total: int) -> str:
    """One line for people: what is done, and how far."""
    return f"{text}: {size_text(done)} of {size_text(total)} ({100 * done // max(total, 1)} %)"


@contextmanager
def shown(line: Callable[[str], None] = log.info) -> Iterator[Progress]:
    """Progress as a bar on stderr where that is a terminal, else as a line every LINE_SECONDS, the first at once.

    Nothing is written before the first call: a model that is here is opened in silence.
    """
    if not sys.stderr.isatty():
        due = 0.0

        def write_line(text: str, done: int, total: int) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + LINE_SECONDS
                line(progress_text(text, done, total))

        yield write_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = None

    def update(text: str, done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bar.start()
        if task is None or bar.tasks[-1].description != text:
            if task is not None:
                bar.remove_task(task)
            task = bar.add_task(text, total=total, completed=done)  # the speed begins anew with each file
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()
