"""Memory that a model would take, and memory that is free; for the choice which model to close."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import EngineError


def bytes_needed(path: Path, settings: Mapping[str, Any]) -> int | None:
    """Bytes of main memory that a model takes on the CPU; None where it would run on a GPU or cannot be planned.

    A GPU without room refuses a model while it is opened, which is found out then.
    """
    known = {name: value for name, value in settings.items() if name in EngineConfig.__dataclass_fields__}
    return _planned(path, tuple(sorted(known.items(), key=lambda item: item[0])))


@cache
def _planned(path: Path, settings: tuple[tuple[str, Any], ...]) -> int | None:
    from engine.gguf import open_gguf
    from engine.model.loader import load_model
    from engine.runner.devices import plan_memory

    try:
        config = EngineConfig(model=path, **dict(settings))
        with open_gguf(path) as file:
            device, plan = plan_memory(load_model(file, config.resolve_context), config)
    except EngineError:
        return None
    return plan.total_bytes if device == "cpu" else None


def bytes_free() -> int | None:
    """Bytes of main memory that programs may still take; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
