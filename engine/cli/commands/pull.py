"""gguf-engine pull: fetch a model of the Hugging Face hub, or look for a newer version of one."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.cli.interrupts import Interrupts
from engine.cli.options import shared
from engine.cli.terminal import note, warnings_shown, write, write_json


def pull(
    name: Annotated[str, typer.Argument(help="hf:owner/repo[:quant][@revision]; without a quant Q4_K_M.")],
    json: shared.JsonOption = False,
) -> None:
    """Fetch a model into the Hugging Face cache, and compare what is there with the hub's checksums.

    The path of the file goes to stdout. An interrupted download continues where it was when the command is run again.
    """
    from engine.hub.names import HubName
    from engine.hub.progress import shown
    from engine.hub.resolve import pull

    hub_name = HubName.typed(name)
    with warnings_shown():
        try:
            with shown(note) as progress, Interrupts():
                path = pull(hub_name, progress)
        except KeyboardInterrupt:
            note(f"interrupted: what has come is kept; `gguf-engine pull {hub_name}` continues")
            raise
    if json:
        write_json({"name": str(hub_name), "path": str(path)})
    else:
        write(f"{path}\n")
