"""Run-time settings of one open model, frozen once made.

Checks which values are possible; independent of arrays, devices and requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypedDict

from engine.errors import InvalidRequestError

PAGE = 64
"""Positions of one page of the cache. Kernels depend on it, and each asserts what it needs: on the CPU a page is 8
vectors of 8 scores (cpu/kernels/attention_item.py); on the GPU it is a power of two and a multiple of 32, the positions
that a tile of the plain kernels takes from one page (cuda/attention/attention_plan.py)."""
CHECKPOINT_SPACING = 2048
"""Positions between the recurrent states that are kept of a prompt, unless the caller sets checkpoint_spacing. A state
of Mamba 2.8B takes as much memory as the keys and values of 190 positions of Llama 3 8B. Pieces of prompts end there,
and a GPU reads 2048 tokens at once. States are kept where prompts part, too."""
STATE_BORDER = 16
"""Where a model keeps recurrent states, pieces of a prompt end at multiples of it, or with the prompt: devices take so
many tokens together from such a position on, and the bits do not depend on how a prompt is cut."""
MAX_SEQUENCES = 1024
CONTEXTS = 8
"""Whole contexts that the cache holds by default."""
DEFAULT_CONTEXT_LIMIT = 8192
"""Longest context by default: a 128 k context of an 8B model would cost 16 GiB per sequence."""


class Target(StrEnum):
    """What prompts beside running streams are cut for."""

    BALANCED = "balanced"  # latency while few streams run, throughput with hundreds of them
    THROUGHPUT = "throughput"  # most tokens per second of all requests together
    LATENCY = "latency"  # streams that wait little for each token while prompts are read

    @classmethod
    def parse(cls, value: str) -> Target:
        """The member of that value.

        Raises:
            InvalidRequestError: there is none.
        """
        try:
            return cls(value)
        except ValueError:
            raise InvalidRequestError(f"target is {value!r}; allowed: {', '.join(cls)}") from None


KV_BLOCK = 32
"""Neighbouring columns of a cached row that share a scale, where the cache is quantized."""


class KvType(StrEnum):
    """Number format of cached keys and values."""

    F16 = "f16"
    F32 = "f32"
    Q8_0 = "q8_0"  # int8 with a float16 for every KV_BLOCK columns: engine/model/kv_format.py

    @property
    def float_bytes(self) -> int:
        """Bytes of a cached number that is kept as float: any but those of Q8_0's keys and values."""
        return 4 if self is KvType.F32 else 2

    def row_bytes(self, width: int) -> int:
        """Bytes of a position's key or value of one head with so many numbers, scales included."""
        if self is not KvType.Q8_0:
            return width * self.float_bytes
        assert width % KV_BLOCK == 0, f"{width} columns are no whole blocks of {KV_BLOCK}"
        return width + width // KV_BLOCK * 2

    @classmethod
    def parse(cls, value: str) -> KvType:
        """The member of that value.

        Raises:
            InvalidRequestError: there is none.
        """
        try:
            return cls(value)
        except ValueError:
            raise InvalidRequestError(f"kv_type is {value!r}; allowed: {', '.join(cls)}") from None


_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class EngineConfig:
    """How a model is opened.

    Attributes:
        model: a GGUF file, any part of a split one, or `hf:owner/repo[:quant][@revision]`, fetched from the Hugging
            Face hub where it is not in the cache; None is the bundled model. Of an open model it is the file.
        device: "auto", "cpu", "cuda" or "cuda:N".
        context_length: tokens of one sequence, prompt and output together. None takes what the model was trained for,
            but at most DEFAULT_CONTEXT_LIMIT; a larger value than the trained one is allowed and logged.
        kv_type: number format of the key-value cache: a KvType, which its value "f16", "f32" or "q8_0" becomes.
            The last takes 17/32 of the memory of the first, and rounds keys and values to 8 bits in blocks of 32; heads
            must be multiples of 32 wide, and latent attention cannot have it.
        threads: CPU threads; None takes the physical cores.
        max_sequences: sequences that run side by side; further requests wait. None: 8 on the CPU, on a GPU one for
            every 1024 positions of the cache, 64 to 512.
        cache_tokens: positions of the key-value cache, shared by all sequences; at least one whole context. None: on
            the CPU eight contexts, on a GPU what nine tenths of the free memory hold.
        prefill_chunk: most prompt tokens fed in one step; beside running streams the device may take fewer, so that a
            long prompt does not stop them. None: what suits the device.
        target: on a GPU, "latency" cuts prompts beside running streams into short pieces, so that a stream never waits
            long for a token; "throughput" takes as long ones as without streams, which serves all requests together
            faster, and lets decode attention suit many long sequences rather than one; "balanced" takes longer ones the
            more streams run.
        prefix_cache: keep the pages of prompts, so that a later prompt with the same beginning need not compute it, nor
            the second of several samples.
        checkpoint_spacing: in models with recurrent layers, positions between the states of a prompt that are kept for
            later prompts; a multiple of PAGE. The last page border of a prompt is always kept, and that at which it
            parts from an earlier one.
        checkpoints: how many such states are kept at most, over all prompts; 0 keeps none. None: two per
            sequence, at least 8.
        deterministic: give a request the same tokens whatever runs beside it, also where that costs speed.
        activation_bits: on the CPU, to how many bits activations are rounded, in blocks of 32, where weights are
            quantized: 8, or 16, which gives nearly the probabilities of float32 (KL divergence below 1e-6) and decodes
            as fast, but reads prompts 0.7 to 0.8 times as fast. With 8 also F16 and BF16 weights meet rounded
            activations, of 14 bits and of BF16's 8; with 16 they are multiplied in float32.
        exact: on the CPU, keep everything in float32, which is two to three times slower.
        repack: on the CPU, keep a second copy of quantized and F16 weights in the order that the kernels read them in;
            without it decoding is slower, and memory holds little more than the mapped file. It takes as much as the
            weights, in formats with grids (IQ1 to IQ3) 1.2 to 1.55 times as much; without it those and F16 stay in
            float32.
        strict: refuse a file with unknown metadata keys or tensors, instead of naming them in a
            warning.
        eager: on a GPU, launch decode steps kernel by kernel instead of replaying a captured graph (slower; for tests).
        pre_tokenizer: overrides the pre-tokenizer that the file names.
        chat_template: jinja2 source that replaces the file's chat template.
        tool_format: how the model writes calls of tools: a name of engine.text.answers.call_forms, or "auto", which
            takes what its chat template writes.
        reasoning_format: where the thoughts of chats go: "deepseek" or "auto": apart from the text; "none": into the
            text, as the model writes them; "deepseek-legacy": both.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    model: str | Path | None = None
    device: str = "auto"
    context_length: int | None = None
    kv_type: KvType | str = KvType.F16
    threads: int | None = None
    max_sequences: int | None = None
    cache_tokens: int | None = None
    prefill_chunk: int | None = None
    target: Target | str = Target.BALANCED
    prefix_cache: bool = True
    checkpoint_spacing: int = CHECKPOINT_SPACING
    checkpoints: int | None = None
    deterministic: bool = False
    activation_bits: int = 8
    exact: bool = False
    repack: bool = True
    strict: bool = False
    eager: bool = False
    pre_tokenizer: str | None = None
    chat_template: str | None = field(default=None, repr=False)
    tool_format: str = "auto"
    reasoning_format: str = "auto"

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise InvalidRequestError(f"device is {self.device!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...")
        object.__setattr__(self, "kv_type", KvType.parse(self.kv_type))
        object.__setattr__(self, "target", Target.parse(self.target))
        for name in ("context_length", "threads", "max_sequences", "cache_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _whole(value) or value < 1:
                raise InvalidRequestError(f"{name} is {value!r}; allowed: a whole number of at least 1")
        if not _whole(self.checkpoint_spacing) or self.checkpoint_spacing < 1 or self.checkpoint_spacing % PAGE:
            raise InvalidRequestError(
                f"checkpoint_spacing is {self.checkpoint_spacing!r}; allowed: multiples of {PAGE}, the size of a page"
            )
        if self.activation_bits not in (8, 16):
            raise InvalidRequestError(f"activation_bits is {self.activation_bits!r}; allowed: 8 or 16")
        if self.checkpoints is not None and (not _whole(self.checkpoints) or self.checkpoints < 0):
            raise InvalidRequestError(f"checkpoints is {self.checkpoints!r}; allowed: a whole number of at least 0")
        if self.max_sequences is not None and self.max_sequences > MAX_SEQUENCES:
            raise InvalidRequestError(f"max_sequences is {self.max_sequences}; allowed: 1 to {MAX_SEQUENCES}")

    @property
    def path(self) -> Path:
        """The file of an open model."""
        assert isinstance(self.model, Path), "a model that is not open has a name, and perhaps no file"
        return self.model

    @property
    def activations(self) -> int | None:
        """Bits of activations in products with quantized weights on the CPU; None where all is float32."""
        return None if self.exact else self.activation_bits

    @property
    def device_index(self) -> int:
        """The N of "cuda:N"; 0 where none is given."""
        _, _, index = self.device.partition(":")
        return int(index) if index else 0

    def resolve_context(self, trained: int) -> int:
        """The context length in force for a model that was trained with `trained` tokens.

        Raises:
            InvalidRequestError: cache_tokens is less than that.
        """
        context_length = self.context_length or min(trained, DEFAULT_CONTEXT_LIMIT)
        if self.cache_tokens is not None and self.cache_tokens < context_length:
            raise InvalidRequestError(
                f"cache_tokens is {self.cache_tokens}; it must hold one whole context of {context_length} tokens: "
                "ask for a larger cache_tokens or a smaller context_length"
            )
        return context_length


class EngineSettings(TypedDict, total=False):
    """The fields of EngineConfig but model and device, as keywords of LLM(). A test compares the two."""

    context_length: int | None
    kv_type: KvType | str
    threads: int | None
    max_sequences: int | None
    cache_tokens: int | None
    prefill_chunk: int | None
    target: Target | str
    prefix_cache: bool
    checkpoint_spacing: int
    checkpoints: int | None
    deterministic: bool
    activation_bits: int
    exact: bool
    repack: bool
    strict: bool
    eager: bool
    pre_tokenizer: str | None
    chat_template: str | None
    tool_format: str
    reasoning_format: str


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def piece_end(start: int, end: int, last: int, border: int) -> int:
    """Where a piece of a prompt ends that begins at `start` and may go up to `end`: at a border, or with the prompt.

    Args:
        start: position of its first token.
        end: position behind the last token that it may have.
        last: end of the prompt.
        border: STATE_BORDER, or 1 where pieces may end anywhere.

    Returns:
        The largest such position up to `end`; `start` or less where there is none behind it.
    """
    return last if end >= last else end // border * border


def page_count(n_positions: int) -> int:
    """Pages that so many positions need."""
    return -(-n_positions // PAGE)


def step_sizes(slots: int) -> tuple[int, ...]:
    """Numbers of rows that decode steps over so many slots have on a GPU, ascending.

    Powers of two up to 64, where products of few rows cost what their weights cost; above, steps of 1/8 to 1/2 of the
    number, since there each row costs time. All slots are one of them.
    """
    powers = [1 << power for power in range(7)]
    many = [*range(96, 257, 32), *range(320, 513, 64), *range(640, MAX_SEQUENCES + 1, 128)]
    return tuple(sorted({min(size, slots) for size in (*powers, *many)}))


def cache_size(cache_tokens: int | None, context_length: int, max_sequences: int) -> int:
    """Positions of the cache: what was asked for, or CONTEXTS contexts but no more than there are sequences."""
    return max(context_length, cache_tokens or min(CONTEXTS, max_sequences) * context_length)


def checkpoint_count(checkpoints: int | None, max_sequences: int) -> int:
    """Recurrent states kept for later prompts: what was asked for, or two per sequence and at least 8."""
    return max(8, 2 * max_sequences) if checkpoints is None else checkpoints
