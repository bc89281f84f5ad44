"""Sampling options to SamplingParams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from engine.sampling.params import SamplingParams


def make_params(
    *,
    logit_bias: list[str] | None,
    stop: list[str] | None,
    seed: int | None,
    stop_token_id: list[int] | None = None,
    **settings: Any,
) -> SamplingParams:
    """SamplingParams from options; `logit_bias` holds texts of the form ID=BIAS, a `seed` of -1 is a random one."""
    from engine.sampling.params import SamplingParams

    return SamplingParams(
        logit_bias=dict(_parse_bias(entry) for entry in logit_bias) if logit_bias else None,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        seed=None if seed == -1 else seed,
        **settings,
    )


def _parse_bias(entry: str) -> tuple[int, float]:
    token_id, separator, bias = entry.partition("=")
    try:
        if not separator:
            raise ValueError
        return int(token_id), float(bias)
    except ValueError:
        raise InvalidRequestError(f"--logit-bias is {entry!r}; it has the form ID=BIAS, as 15=-inf or 15=2.5") from None
