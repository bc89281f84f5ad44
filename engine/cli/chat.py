"""gguf-engine chat: a conversation that remembers what was said."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli import options
from engine.cli.answers import AnswerWriter
from engine.cli.interrupts import Interrupts
from engine.cli.sampling import make_params
from engine.cli.terminal import note, open_model, read_text, stats_line
from engine.cli.variables import parse_variables
from engine.config import CHECKPOINT_SPACING
from engine.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from engine.api.llm import LLM
    from engine.api.stream import Stream
    from engine.sampling.params import SamplingParams

HELP = (
    "/reset forgets the conversation, /tool TEXT is the result of a call, /exit leaves (so does Ctrl-D); "
    "Ctrl-C stops an answer"
)


def chat(
    model: options.ModelOption = None,
    system: options.SystemOption = None,
    template_file: options.TemplateFileOption = None,
    chat_var: options.ChatVarOption = None,
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
    device: options.DeviceOption = "auto",
    context_length: options.ContextOption = None,
    kv_type: options.KvTypeOption = "f16",
    threads: options.ThreadsOption = None,
    exact: options.ExactOption = False,
    repack: options.RepackOption = True,
    strict: options.StrictOption = False,
    pre_tokenizer: options.PreTokenizerOption = None,
    prefill_chunk: options.PrefillChunkOption = None,
    prefix_cache: options.PrefixCacheOption = True,
    checkpoint_spacing: options.CheckpointSpacingOption = CHECKPOINT_SPACING,
    checkpoints: options.CheckpointsOption = None,
    deterministic: options.DeterministicOption = False,
    temperature: options.TemperatureOption = 0.8,
    top_k: options.TopKOption = 40,
    top_p: options.TopPOption = 0.95,
    min_p: options.MinPOption = 0.05,
    typical_p: options.TypicalPOption = 1.0,
    repeat_penalty: options.RepeatPenaltyOption = 1.0,
    presence_penalty: options.PresencePenaltyOption = 0.0,
    frequency_penalty: options.FrequencyPenaltyOption = 0.0,
    repeat_last_n: options.RepeatLastNOption = 64,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    stop_token_id: options.StopTokenIdOption = None,
    logit_bias: options.LogitBiasOption = None,
) -> None:
    """Talk with a model that has a chat template. Also works with lines from a pipe."""
    params = make_params(
        max_tokens=None if max_tokens == -1 else max_tokens,
        logit_bias=logit_bias,
        stop=stop,
        stop_token_id=stop_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_last_n=repeat_last_n,
        seed=seed,
    )
    variables = parse_variables(chat_var)
    with open_model(
        model=model,
        device=device,
        context_length=context_length,
        kv_type=kv_type,
        threads=threads,
        exact=exact,
        repack=repack,
        strict=strict,
        max_sequences=1,
        prefill_chunk=prefill_chunk,
        prefix_cache=prefix_cache,
        checkpoint_spacing=checkpoint_spacing,
        checkpoints=checkpoints,
        deterministic=deterministic,
        pre_tokenizer=pre_tokenizer,
        chat_template=read_text(template_file) if template_file is not None else None,
    ) as llm:
        llm.require_chat_template()
        _talk(llm, system, params, variables, stats)


def _talk(llm: LLM, system: str | None, params: SamplingParams, variables: dict[str, Any], stats: bool) -> None:
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
            return
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
            answer = _answer(llm, history, params, variables, stats)
            if answer is None:
                history.pop()
            else:
                history.append(answer)


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
) -> dict[str, Any] | None:
    """Write the answer as it comes; an interrupt ends it and keeps what there is.

    Returns:
        The assistant's message for the history; None where there can be no answer.
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
    return result.as_message()


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
