"""A model's file for a server that may be stopped meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.api.names import resolve_model
from engine.hub.names import is_hub_name


async def local_source(source: str | None, status: Callable[[str], None]) -> str | Path | None:
    """What LLM() opens without a network: a model named hf:... is fetched where it is not here.

    In a daemon thread: a server that is told to stop does not wait for a download, which the next start continues.

    Args:
        source: a file or a name; None is the bundled model.
        status: called with one sentence about a download and how far it is.

    Raises:
        EngineError: the name has another form, or the model cannot be fetched.
    """
    if source is None or not is_hub_name(source):
        return source
    loop = asyncio.get_running_loop()
    fetched: asyncio.Future[Path] = loop.create_future()

    def finish(path: Path | None, error: BaseException | None) -> None:
        if fetched.cancelled():
            return
        if error is not None:
            fetched.set_exception(error)
        elif path is not None:
            fetched.set_result(path)

    def fetch() -> None:
        path, problem = None, None
        try:
            path = resolve_model(source, status)
        except BaseException as error:
            problem = error
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(finish, path, problem)

    threading.Thread(target=fetch, name="fetch a model", daemon=True).start()
    return await fetched
