"""gguf-engine generate: complete one prompt, once or several times."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.answers import AnswerWriter
from engine.cli.interrupts import Interrupts
from engine.cli.options import shared
from engine.cli.options.form import EXIT_CUT, Form, is_cut
from engine.cli.options.groups import with_groups
from engine.cli.options.opening import Opening
from engine.cli.options.sampling import Sampling
from engine.cli.options.variables import Talk
from engine.cli.terminal import note, open_model, read_text, stats_line, write, write_json
from engine.errors import InvalidRequestError
from engine.sampling.params import MAX_SAMPLES

if TYPE_CHECKING:
    from engine.api.llm import LLM
    from engine.api.stream import Stream
    from engine.request import GenerationResult, TokenSample

DEFAULT_MAX_TOKENS = 256


@with_groups
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from stdin.", show_default=False)
    ] = None,
    model: shared.ModelOption = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt, as an option.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a file; - is stdin.", show_default=False)
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="The prompt is what the user says in a conversation: put it into the model's chat template.",
            show_default="with any of the options below",
            rich_help_panel=shared.CHAT,
        ),
    ] = None,
    system: shared.SystemOption = None,
    template_file: shared.TemplateFileOption = None,
    chat_var: shared.ChatVarOption = None,
    prompt_ids: Annotated[
        str | None, typer.Option("--prompt-ids", help="The prompt as token ids: 1,15,27.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "--n-predict",
            "-n",
            min=-1,
            help="Tokens to generate; -1 goes on until the end or a full context.",
            show_default=str(DEFAULT_MAX_TOKENS),
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=1, max=MAX_SAMPLES, help="Texts to generate, each under a header; seeds S, S + 1, ..."
        ),
    ] = 1,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Write the text as it is made; of several samples, when done.")
    ] = True,
    echo: Annotated[
        bool | None,
        typer.Option("--echo/--no-echo", help="Write the prompt first.", show_default="on a terminal"),
    ] = None,
    json: shared.JsonOption = False,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json: log-probabilities of each token and this many alternatives."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="One line of statistics on stderr.")] = True,
    *,
    opening: Opening,
    sampling: Sampling,
    form: Form,
) -> int:
    """Continue a text. The continuation goes to stdout, statistics go to stderr."""
    text = _read_prompt(prompt, prompt_option, file, prompt_ids)
    talk = Talk.of(text, chat, system, template_file, chat_var)
    # Bad settings are refused before the model is loaded.
    params = sampling.params(n=samples, logprobs=logprobs, constraint=form.constraint())
    config = opening.config(
        model,
        max_sequences=_side_by_side(samples) if opening.max_sequences is None else opening.max_sequences,
        chat_template=read_text(template_file) if template_file is not None else None,
    )
    with open_model(config) as llm:
        ids = llm.prompt_ids(text) if talk is None else llm.render_chat(talk.messages, **talk.variables)
        if max_tokens is None:
            room = llm.context_length - len(ids)
            limit = DEFAULT_MAX_TOKENS if room >= DEFAULT_MAX_TOKENS else None
        else:
            limit = None if max_tokens == -1 else max_tokens
        params = replace(params, max_tokens=limit)
        show = stream and samples == 1 and not json
        if echo if echo is not None else show and sys.stdout.isatty():
            start = text if isinstance(text, str) else " ".join(map(str, text))
        else:
            start = ""
        streams = (
            llm.sample_streams(ids, params)
            if talk is None
            else llm.chat_streams(talk.messages, params, **talk.variables)
        )
        results, interrupted = _run(llm, streams, start, show=show, quiet=json, talk=talk is not None)
        if json:
            write_json(_as_dict(llm, results, talk is not None))
        if stats:
            note(stats_line(llm.load_seconds, *results))
    if interrupted:
        return 130
    return EXIT_CUT if params.constraint is not None and is_cut(results) else 0


def _side_by_side(samples: int) -> int | None:
    """Sequences for so many samples: as many, or what suits the device where that may be fewer."""
    return samples if samples <= 8 else None


def _read_prompt(argument: str | None, option: str | None, file: Path | None, ids: str | None) -> str | list[int]:
    given = [value for value in (argument, option, file, ids) if value is not None]
    if len(given) != 1:
        count = "no prompt is given" if not given else f"{len(given)} prompts are given"
        raise InvalidRequestError(
            f'{count}; give one: gguf-engine generate "Once upon a time", or - for stdin, or -p, -f or --prompt-ids'
        )
    if file is not None or argument == "-":
        return read_text(file or Path("-"))
    if ids is not None:
        try:
            return [int(part) for part in ids.replace(",", " ").split()]
        except ValueError:
            raise InvalidRequestError(f"--prompt-ids is {ids!r}; it has the form 1,15,27") from None
    return argument if argument is not None else option or ""


def _run(
    llm: LLM, streams: list[Stream], start: str, *, show: bool, quiet: bool, talk: bool
) -> tuple[list[GenerationResult], bool]:
    """Generate all samples and write them; an interrupt ends them early and keeps what there is."""
    interrupted = False
    results: list[GenerationResult] = []
    for number, stream in enumerate(streams, start=1):
        writer = AnswerWriter()
        if show:
            write(start + "\n" if talk and start else start)
        try:
            with Interrupts() as interrupts:
                for chunk in stream:
                    if show and talk:
                        writer.write(chunk)
                    elif show:
                        write(_words(llm, chunk.text, chunk.token_ids))
                    interrupts.check()
        except KeyboardInterrupt:
            interrupted = True
            for one in streams:
                one.cancel()
        result = stream.result()
        results.append(result)
        if show and talk:
            writer.close()
        elif show:
            write("\n")
        elif not quiet and talk:
            header = f"--- sample {number} of {len(streams)}, seed {result.seed}\n" if len(streams) > 1 else ""
            write(header + (start + "\n" if start else ""))
            writer.write_result(result)
        elif not quiet:
            header = f"--- sample {number} of {len(streams)}, seed {result.seed}\n" if len(streams) > 1 else ""
            write(f"{header}{start}{_words(llm, result.text, result.token_ids)}\n")
    return results, interrupted


def _as_dict(llm: LLM, results: list[GenerationResult], talk: bool) -> dict[str, Any]:
    """The first sample with what is common to all; where there are more, all of them as well."""
    value: dict[str, Any] = {
        **_sample(llm, results[0], talk),
        "prompt_token_ids": results[0].prompt_token_ids,
        "model": str(llm.config.model),
        "device": llm.device,
    }
    value["stats"]["load_seconds"] = llm.load_seconds
    if len(results) > 1:
        value["samples"] = [_sample(llm, result, talk) for result in results]
    return value


def _sample(llm: LLM, result: GenerationResult, talk: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "stats": result.stats.as_dict(),
    }
    if talk:
        value["reasoning"] = result.reasoning
        value["tool_calls"] = [call.as_dict() for call in result.tool_calls]
    if result.logprobs is not None:
        value["logprobs"] = [_logprob(llm, sample) for sample in result.logprobs]
    return value


def _words(llm: LLM, text: str, token_ids: Iterable[int]) -> str:
    """What is written of tokens: their text, or their numbers where the model has no tokenizer."""
    return text if llm.has_tokenizer else "".join(f" {token_id}" for token_id in token_ids)


def _logprob(llm: LLM, sample: TokenSample) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        token = llm.tokenizer.token_text(token_id) if llm.has_tokenizer else None
        return {"token_id": token_id, "token": token, "logprob": logprob}

    top = [entry(token_id, logprob) for token_id, logprob in sample.top_logprobs]
    return {**entry(sample.token_id, sample.logprob), "top_logprobs": top}
