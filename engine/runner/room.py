"""Whether a model fits this machine: what its memory plan takes, beside what the machine has."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.gguf import GGUFFile
from engine.model.loader import load_model
from engine.runner.devices import plan_memory

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit is told: cgroup 2, and 1."""


@dataclass(frozen=True)
class Fit:
    """What running a model takes here.

    Attributes:
        device: "cpu" or "cuda"; "" where the model is not supported.
        needed: bytes with the settings of the configuration.
        available: bytes that the device has, used ones included.
        needed_unpacked: on the CPU, bytes without the second copy of the weights; elsewhere the same as needed.
        error: why the model cannot run at all; "" where it can.
    """

    device: str = ""
    needed: int = 0
    available: int = 0
    needed_unpacked: int = 0
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether the model runs here, if need be without the second copy of its weights."""
        return not self.error and self.needed_unpacked <= self.available

    @property
    def needs_unpacked(self) -> bool:
        """Whether it fits only without that copy (repack=False, --no-repack)."""
        return self.fits and self.needed > self.available


def fit_of(file: GGUFFile, config: EngineConfig) -> Fit:
    """How much of the machine an open file takes as a model; takes none of it."""
    try:
        model = load_model(file, config.resolve_context, strict=config.strict)
        device, plan = plan_memory(model, config)
        available = _available(device, config.device_index)
    except EngineError as error:
        return Fit(error=str(error))
    unpacked = replace(plan, repacked_bytes=0)
    return Fit(device, plan.total_bytes, available, unpacked.total_bytes)


def _available(device: str, index: int) -> int:
    if device == "cuda":
        from engine.cuda import total_memory

        return total_memory(index)
    return host_memory()


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or the limit of its container."""
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # "max" where there is no limit
            n_bytes = min(n_bytes, int(Path(path).read_text(encoding="ascii")))
    return n_bytes
