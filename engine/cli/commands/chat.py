"""gguf-engine chat: a conversation that remembers what was said."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.answers import AnswerWriter
from engine.cli.interrupts import Interrupts
from engine.cli.options import shared
from engine.cli.options.form import EXIT_CUT, Form, is_cut
from engine.cli.options.groups import Without, with_groups
from engine.cli.options.opening import Opening
from engine.cli.options.sampling import Sampling
from engine.cli.options.variables import parse_variables
from engine.cli.terminal import note, open_model, read_text, stats_line
from engine.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from engine.api.llm import LLM
    from engine.api.stream import Stream
    from engine.request import GenerationResult
    from engine.sampling.params import SamplingParams

HELP = (
    "/reset forgets the conversation, /tool TEXT is the result of a call, /exit leaves (so does Ctrl-D); "
    "Ctrl-C stops an answer"
)


@with_groups
def chat(
    model: shared.ModelOption = None,
    system: shared.SystemOption = None,
    template_file: shared.TemplateFileOption = None,
    chat_var: shared.ChatVarOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            min=-1,
            help="Longest answer, in tokens.",
            show_default="until its end or the context is full",
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Statistics of each answer on stderr.")] = False,
    *,
    opening: Annotated[Opening, Without("max_sequences", "cache_tokens", "target")],
    sampling: Annotated[Sampling, Without("ignore_eos")],
    form: Form,
) -> int:
    """Talk with a model that has a chat template. Also works with lines from a pipe."""
    params = sampling.params(max_tokens=None if max_tokens == -1 else max_tokens, constraint=form.constraint())
    variables = parse_variables(chat_var)
    template = read_text(template_file) if template_file is not None else None
    with open_model(opening.config(model, max_sequences=1, chat_template=template)) as llm:
        llm.require_chat_template()
        return EXIT_CUT if _talk(llm, system, params, variables, stats) else 0


def _talk(llm: LLM, system: str | None, params: SamplingParams, variables: dict[str, Any], stats: bool) -> bool:
    """The conversation; returns whether an answer that a constraint is about was cut short."""
    any_cut = False
    start: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    if sys.stdin.isatty():
        note(f"{llm.config.path.name} on {llm.device}. {HELP}.")
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            note(f"\n{HELP}")
            continue
        if line is None or line.strip() in ("/exit", "/quit"):
            return any_cut
        if not line.strip():
            continue
        if line.strip() == "/reset":
            history = list(start)
            note("the conversation is forgotten")
        elif line.strip() in ("/help", "/?"):
            note(HELP)
        else:
            told = _told(history, line)
            if told is None:
                note("no call is waiting for a result")
                continue
            history.append(told)
            result = _answer(llm, history, params, variables, stats)
            if result is None:
                history.pop()
                continue
            history.append(result.as_message())
            any_cut = (params.constraint is not None and is_cut([result])) or any_cut


def _told(history: list[dict[str, Any]], line: str) -> dict[str, Any] | None:
    """The message that a line is: what the user says, or with /tool the result of the first call that has none."""
    command, _, text = line.strip().partition(" ")
    if command != "/tool":
        return {"role": "user", "content": line}
    answered = {message.get("tool_call_id") for message in history}
    for message in reversed(history):
        if message["role"] == "user":
            return None
        for call in message.get("tool_calls") or ():
            if call["id"] not in answered:
                return {
                    "role": "tool",
                    "tool_call_id": call["id"],
                    "name": call["function"]["name"],
                    "content": text.strip(),
                }
    return None


def _read_line() -> str | None:
    """One line from the user; None at the end of input."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(
    llm: LLM, history: list[dict[str, Any]], params: SamplingParams, variables: dict[str, Any], stats: bool
) -> GenerationResult | None:
    """Write the answer as it comes; an interrupt ends it and keeps what there is.

    Returns:
        The answer; None where there can be no answer.
    """
    writer = AnswerWriter()
    try:
        with _stream(llm, history, params, variables) as stream:
            try:
                with Interrupts() as interrupts:
                    for chunk in stream:
                        writer.write(chunk)
                        interrupts.check()
            except KeyboardInterrupt:
                stream.cancel()
            result = stream.result()
    except EngineError as error:
        if not sys.stdin.isatty():
            raise
        note(f"error: {error}" + (" (or /reset)" if len(history) > 1 else ""))
        return None
    writer.close()
    if stats:
        note(stats_line(None, result))
    return result


def _stream(llm: LLM, history: list[dict[str, Any]], params: SamplingParams, variables: dict[str, Any]) -> Stream:
    """The answer's stream. Calls that got no result are told as text where the template takes no such calls."""
    try:
        return llm.stream_chat(history, params, **variables)
    except InvalidRequestError:
        plain = [_without_calls(message) if history[-1]["role"] == "user" else message for message in history]
        if plain == history:
            raise
        try:
            return llm.stream_chat(plain, params, **variables)
        except InvalidRequestError:
            pass
        raise


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message["tool_calls"]]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join([message["content"] or "", *calls]).strip()}
