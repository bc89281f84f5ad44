"""Options that several commands share, under the names that users of llama.cpp and vLLM know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "Model"
BATCH = "Cache and batching"
CHAT = "Conversation"
SAMPLING = "Sampling"

ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="GGUF file (any part of a split one), or hf:owner/repo[:quant] of the Hugging Face hub.",
        show_default="the bundled model",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MODEL),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--ctx-size",
        "--context-length",
        "-c",
        help="Longest sequence in tokens, prompt and output together.",
        show_default="what the model was trained for, at most 8192",
        rich_help_panel=MODEL,
    ),
]
KvTypeOption = Annotated[
    str,
    typer.Option("--kv-type", help="Number format of the key-value cache: f16 or f32.", rich_help_panel=MODEL),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", "-t", help="CPU threads.", show_default="the physical cores", rich_help_panel=MODEL),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="On the CPU, keep everything in float32: slower, without the rounding of activations to 8 bits.",
        rich_help_panel=MODEL,
    ),
]
RepackOption = Annotated[
    bool,
    typer.Option(
        "--repack/--no-repack",
        help="On the CPU, keep a second copy of quantized weights in the order of the kernels, for speed.",
        rich_help_panel=MODEL,
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse a file with metadata keys or tensors of which nothing is known, instead of a warning.",
        rich_help_panel=MODEL,
    ),
]
PreTokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--pre-tokenizer", help="Use this pre-tokenizer instead of the one the file names.", rich_help_panel=MODEL
    ),
]
MaxSequencesOption = Annotated[
    int | None,
    typer.Option(
        "--max-sequences",
        help="Sequences that run side by side, 1 to 1024; the others wait.",
        show_default="one for each sample, at most 8 on the CPU and 512 on a GPU",
        rich_help_panel=BATCH,
    ),
]
CacheTokensOption = Annotated[
    int | None,
    typer.Option(
        "--cache-tokens",
        help="Size of the key-value cache that all sequences share, in tokens; at least one whole context. Give it for "
        "each of several models on one GPU: by default the first takes most of the memory.",
        show_default="a context for each sequence; on the CPU at most 8, on a GPU what the memory holds",
        rich_help_panel=BATCH,
    ),
]
PrefillChunkOption = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        help="Most prompt tokens fed in one step.",
        show_default="512 on the CPU, what suits the card on a GPU",
        rich_help_panel=BATCH,
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        help="On a GPU, what prompts beside running sequences are cut for: throughput, latency or balanced.",
        rich_help_panel=BATCH,
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same tokens whatever runs beside a sequence, at some cost; the CPU does so anyway.",
        rich_help_panel=BATCH,
    ),
]
PrefixCacheOption = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Do not read again what an earlier prompt began with.",
        rich_help_panel=BATCH,
    ),
]
CheckpointSpacingOption = Annotated[
    int,
    typer.Option(
        "--checkpoint-spacing",
        help="In models with recurrent layers, keep the state every so many prompt tokens, for later prompts.",
        rich_help_panel=BATCH,
    ),
]
CheckpointsOption = Annotated[
    int | None,
    typer.Option(
        "--checkpoints",
        help="How many such states are kept at most; 0 keeps none.",
        show_default="two for each sequence, at least 8",
        rich_help_panel=BATCH,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]

TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", "--temp", help="0 always takes the likeliest token.", rich_help_panel=SAMPLING),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", help="Keep this many likeliest tokens; 0 keeps all.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p", help="Keep the likeliest tokens that hold this much probability.", rich_help_panel=SAMPLING
    ),
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", help="Keep tokens at least this likely, relative to the best.", rich_help_panel=SAMPLING),
]
TypicalPOption = Annotated[
    float,
    typer.Option("--typical-p", "--typical", help="Locally typical sampling; 1 is off.", rich_help_panel=SAMPLING),
]
RepeatPenaltyOption = Annotated[
    float,
    typer.Option(
        "--repeat-penalty",
        "--repetition-penalty",
        help="Divide the score of tokens already seen; 1 is off.",
        rich_help_panel=SAMPLING,
    ),
]
PresencePenaltyOption = Annotated[
    float,
    typer.Option("--presence-penalty", help="Subtracted once from tokens already seen.", rich_help_panel=SAMPLING),
]
FrequencyPenaltyOption = Annotated[
    float,
    typer.Option("--frequency-penalty", help="Subtracted per occurrence of a token.", rich_help_panel=SAMPLING),
]
RepeatLastNOption = Annotated[
    int,
    typer.Option(
        "--repeat-last-n", help="Tokens that the penalties look back on; 0 none, -1 all.", rich_help_panel=SAMPLING
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "-s",
        help="Same seed, same text; -1 takes a random one.",
        show_default="random",
        rich_help_panel=SAMPLING,
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        "-r",
        help="End before this text, or at the special token of this name; may be given several times.",
        rich_help_panel=SAMPLING,
    ),
]
StopTokenIdOption = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token-id",
        metavar="ID",
        help="End at this token; may be given several times.",
        rich_help_panel=SAMPLING,
    ),
]
IgnoreEosOption = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after an end-of-generation token.", rich_help_panel=SAMPLING)
]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=BIAS",
        help="Add BIAS to the score of token ID, as 15=-inf or 15=2.5; may be given several times.",
        rich_help_panel=SAMPLING,
    ),
]

SystemOption = Annotated[
    str | None, typer.Option("--system", "-sys", help="A system message put first.", rich_help_panel=CHAT)
]
TemplateFileOption = Annotated[
    Path | None,
    typer.Option(
        "--chat-template-file", help="A jinja2 chat template instead of the model's own.", rich_help_panel=CHAT
    ),
]
ChatVarOption = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-var",
        metavar="NAME=VALUE",
        help="A variable of the chat template, as enable_thinking=false; VALUE is JSON or text. "
        "May be given several times.",
        rich_help_panel=CHAT,
    ),
]
