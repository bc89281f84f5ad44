"""The options that say how a model is opened → EngineConfig."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import CHECKPOINT_SPACING, EngineConfig

MODEL = "Model"
BATCH = "Cache and batching"

CACHE_FIELDS = ("max_sequences", "cache_tokens", "prefix_cache", "checkpoint_spacing", "checkpoints")
BATCHING_FIELDS = (*CACHE_FIELDS, "prefill_chunk", "target")
CHAT_FIELDS = ("tool_format", "reasoning_format")
"""Fields of Opening that commands leave out which have no requests to schedule, or no conversations."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a model is opened. The names and defaults are those of EngineConfig; a test compares them."""

    device: Annotated[
        str,
        typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL),
    ] = "auto"
    context_length: Annotated[
        int | None,
        typer.Option(
            "--ctx-size",
            "--context-length",
            "-c",
            help="Longest sequence in tokens, prompt and output together.",
            show_default="what the model was trained for, at most 8192",
            rich_help_panel=MODEL,
        ),
    ] = None
    kv_type: Annotated[
        str,
        typer.Option(
            "--kv-type",
            help="Number format of the key-value cache: f16, f32, or q8_0 (8 bits, half the memory of f16).",
            rich_help_panel=MODEL,
        ),
    ] = "f16"
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", help="CPU threads.", show_default="the physical cores", rich_help_panel=MODEL),
    ] = None
    activation_bits: Annotated[
        int,
        typer.Option(
            "--activation-bits",
            help="On the CPU, to how many bits activations are rounded: 8, or 16 (nearly exact; slower prompts).",
            rich_help_panel=MODEL,
        ),
    ] = 8
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="On the CPU, keep everything in float32: slower.",
            rich_help_panel=MODEL,
        ),
    ] = False
    repack: Annotated[
        bool,
        typer.Option(
            "--repack/--no-repack",
            help="On the CPU, keep a second copy of quantized weights in the order of the kernels, for speed.",
            rich_help_panel=MODEL,
        ),
    ] = True
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse a file with metadata keys or tensors of which nothing is known, instead of a warning.",
            rich_help_panel=MODEL,
        ),
    ] = False
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer", help="Use this pre-tokenizer instead of the one the file names.", rich_help_panel=MODEL
        ),
    ] = None
    tool_format: Annotated[
        str,
        typer.Option(
            "--tool-format",
            help="How the model writes calls of tools, as hermes or llama3; auto takes what its chat template writes.",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    reasoning_format: Annotated[
        str,
        typer.Option(
            "--reasoning-format",
            help="Where a chat's thoughts go: deepseek or auto (apart from the text), none (into the text, as the "
            "model writes them), deepseek-legacy (both).",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    max_sequences: Annotated[
        int | None,
        typer.Option(
            "--max-sequences",
            help="Sequences that run side by side, 1 to 1024; the others wait.",
            show_default="one for each sample, at most 8 on the CPU and 512 on a GPU",
            rich_help_panel=BATCH,
        ),
    ] = None
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--cache-tokens",
            help="Size of the key-value cache that all sequences share, in tokens; at least one whole context. Give "
            "it for each of several models on one GPU: by default the first takes most of the memory.",
            show_default="a context for each sequence; on the CPU at most 8, on a GPU what the memory holds",
            rich_help_panel=BATCH,
        ),
    ] = None
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk",
            help="Most prompt tokens fed in one step.",
            show_default="512 on the CPU, what suits the card on a GPU",
            rich_help_panel=BATCH,
        ),
    ] = None
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="On a GPU, what prompts beside running sequences are cut for: throughput, latency or balanced.",
            rich_help_panel=BATCH,
        ),
    ] = "balanced"
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Do not read again what an earlier prompt began with.",
            rich_help_panel=BATCH,
        ),
    ] = True
    checkpoint_spacing: Annotated[
        int,
        typer.Option(
            "--checkpoint-spacing",
            help="In models with recurrent layers, keep the state every so many prompt tokens, for later prompts.",
            rich_help_panel=BATCH,
        ),
    ] = CHECKPOINT_SPACING
    checkpoints: Annotated[
        int | None,
        typer.Option(
            "--checkpoints",
            help="How many such states are kept at most; 0 keeps none.",
            show_default="two for each sequence, at least 8",
            rich_help_panel=BATCH,
        ),
    ] = None
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="The same tokens whatever runs beside a sequence, at some cost; the CPU does so anyway.",
            rich_help_panel=BATCH,
        ),
    ] = False

    def settings(self) -> dict[str, Any]:
        """Keywords of EngineConfig and LLM."""
        return asdict(self)

    def config(self, model: str | Path | None, **others: Any) -> EngineConfig:
        """The config of a model; `others` are settings without an option, or in place of one.

        Raises:
            InvalidRequestError: a setting is out of its range.
        """
        return EngineConfig(model, **{**self.settings(), **others})
