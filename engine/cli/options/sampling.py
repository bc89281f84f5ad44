"""The options that say how tokens are chosen and where a text ends → SamplingParams."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from engine.sampling.params import SamplingParams

SAMPLING = "Sampling"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The names and defaults are those of SamplingParams; a test compares them."""

    temperature: Annotated[
        float,
        typer.Option("--temperature", "--temp", help="0 always takes the likeliest token.", rich_help_panel=SAMPLING),
    ] = 0.8
    top_k: Annotated[
        int, typer.Option("--top-k", help="Keep this many likeliest tokens; 0 keeps all.", rich_help_panel=SAMPLING)
    ] = 40
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", help="Keep the likeliest tokens that hold this much probability.", rich_help_panel=SAMPLING
        ),
    ] = 0.95
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p", help="Keep tokens at least this likely, relative to the best.", rich_help_panel=SAMPLING
        ),
    ] = 0.05
    typical_p: Annotated[
        float,
        typer.Option("--typical-p", "--typical", help="Locally typical sampling; 1 is off.", rich_help_panel=SAMPLING),
    ] = 1.0
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repeat-penalty",
            "--repetition-penalty",
            help="Divide the score of tokens already seen; 1 is off.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        typer.Option("--presence-penalty", help="Subtracted once from tokens already seen.", rich_help_panel=SAMPLING),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option("--frequency-penalty", help="Subtracted per occurrence of a token.", rich_help_panel=SAMPLING),
    ] = 0.0
    penalty_last_n: Annotated[
        int,
        typer.Option(
            "--repeat-last-n", help="Tokens that the penalties look back on; 0 none, -1 all.", rich_help_panel=SAMPLING
        ),
    ] = 64
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            "-s",
            help="Same seed, same text; -1 takes a random one.",
            show_default="random",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            "-r",
            help="End before this text, or at the special token of this name; may be given several times.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token-id",
            metavar="ID",
            help="End at this token; may be given several times.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-generation token.", rich_help_panel=SAMPLING)
    ] = False
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias",
            metavar="ID=BIAS",
            help="Add BIAS to the score of token ID, as 15=-inf or 15=2.5; may be given several times.",
            rich_help_panel=SAMPLING,
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Keywords of SamplingParams. A seed of -1 is a random one.

        Raises:
            InvalidRequestError: a bias has another form than ID=BIAS.
        """
        return {
            **asdict(self),
            "seed": None if self.seed == -1 else self.seed,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logit_bias": dict(_parse_bias(entry) for entry in self.logit_bias) if self.logit_bias else None,
        }

    def params(self, **others: Any) -> SamplingParams:
        """The settings of a request; `others` are those without an option here.

        Raises:
            InvalidRequestError: a setting is out of its range.
        """
        from engine.sampling.params import SamplingParams

        return SamplingParams(**self.settings(), **others)


def _parse_bias(entry: str) -> tuple[int, float]:
    token_id, separator, bias = entry.partition("=")
    try:
        if not separator:
            raise ValueError
        return int(token_id), float(bias)
    except ValueError:
        raise InvalidRequestError(f"--logit-bias is {entry!r}; it has the form ID=BIAS, as 15=-inf or 15=2.5") from None
