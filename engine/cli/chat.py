"""gguf-engine chat: a conversation that remembers what was said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import options
from engine.cli.interrupts import Interrupts
from engine.cli.sampling import make_params
from engine.cli.terminal import note, open_model, read_text, stats_line, write
from engine.config import CHECKPOINT_SPACING
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.api.llm import LLM
    from engine.sampling.params import SamplingParams

HELP = "/reset forgets the conversation, /exit leaves (so does Ctrl-D); Ctrl-C stops an answer"


def chat(
    model: options.ModelOption = None,
    system: Annotated[str | None, typer.Option("--system", "-sys", help="A system message put first.")] = None,
    template_file: Annotated[
        Path | None, typer.Option("--chat-template-file", help="A jinja2 chat template instead of the model's own.")
    ] = None,
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
    logit_bias: options.LogitBiasOption = None,
) -> None:
    """Talk with a model that has a chat template. Also works with lines from a pipe."""
    params = make_params(
        max_tokens=None if max_tokens == -1 else max_tokens,
        logit_bias=logit_bias,
        stop=stop,
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
        _talk(llm, system, params, stats)


def _talk(llm: LLM, system: str | None, params: SamplingParams, stats: bool) -> None:
    start: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    history = list(start)
    if sys.stdin.isatty():
        note(f"{llm.config.model.name} on {llm.device}. {HELP}.")
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
            history.append({"role": "user", "content": line})
            answer = _answer(llm, history, params, stats)
            if answer is None:
                history.pop()
            else:
                history.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """One line from the user; None at the end of input."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _answer(llm: LLM, history: list[dict[str, str]], params: SamplingParams, stats: bool) -> str | None:
    """Write the answer as it comes; an interrupt ends it and keeps what there is. None where there can be no answer."""
    try:
        with llm.stream_chat(history, params) as stream:
            try:
                with Interrupts() as interrupts:
                    for chunk in stream:
                        write(chunk.text)
                        interrupts.check()
            except KeyboardInterrupt:
                stream.cancel()
            result = stream.result()
    except EngineError as error:
        if not sys.stdin.isatty():
            raise
        note(f"error: {error}" + (" (or /reset)" if len(history) > 1 else ""))
        return None
    write("\n")
    if stats:
        note(stats_line(None, result))
    return result.text
