"""The settings of a model, from the arguments of LLM()."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig, EngineSettings
from engine.errors import InvalidRequestError


def config_of(
    model: str | Path | EngineConfig | None, device: str | None, config: EngineConfig | None, settings: EngineSettings
) -> EngineConfig:
    """One config: the one given, where one is, with all that was given beside it.

    Raises:
        InvalidRequestError: two configs, or a setting out of its range.
    """
    if isinstance(model, EngineConfig):
        if config is not None:
            raise InvalidRequestError("two configs are given; give one, with further settings as keywords")
        model, config = None, model
    config = EngineConfig() if config is None else config
    if model is not None:
        config = replace(config, model=model)
    if device is not None:
        config = replace(config, device=device)
    return replace(config, **settings) if settings else config
