"""Parts that answers of several APIs share: ids, usage, timings, log-probabilities."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from engine import __version__
from engine.api.asynchronous.mailbox import PromptProgress
from engine.api.llm import LLM
from engine.request import CallPart, GenerationResult, GenerationStats, TokenSample

FINGERPRINT = f"b{__version__}-gguf-engine"
LOWEST = -9999.0
"""Written for a log-probability of minus infinity, which JSON lacks."""


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage(stats: Sequence[GenerationStats], n: int = 1) -> dict[str, Any]:
    """OpenAI's count of tokens.

    Args:
        stats: of all sequences, the samples of a prompt side by side.
        n: samples of each prompt, which count as one prompt.
    """
    prompts = stats[::n]
    prompt, output = sum(one.prompt_tokens for one in prompts), sum(one.output_tokens for one in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }


def timings(stats: GenerationStats) -> dict[str, Any]:
    """llama.cpp's times of one sequence."""
    computed = stats.prompt_tokens - stats.cached_tokens
    prompt_ms, output_ms = stats.prompt_seconds * 1000, stats.decode_seconds * 1000
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / computed if computed else 0.0,
        "prompt_per_second": stats.prompt_tok_s,
        "predicted_n": stats.output_tokens,
        "predicted_ms": output_ms,
        "predicted_per_token_ms": output_ms / max(stats.output_tokens - 1, 1),
        "predicted_per_second": stats.decode_tok_s,
    }


def progress_entry(told: PromptProgress, *, timed: bool) -> dict[str, Any]:
    """llama.cpp's words for how much of a prompt has been read."""
    entry: dict[str, Any] = {
        "prompt_progress": {
            "total": told.total,
            "cache": told.cached,
            "processed": told.done,
            "time_ms": int(told.seconds * 1000),
        }
    }
    if timed:
        computed = told.done - told.cached
        entry["timings"] = timings(GenerationStats(computed, 0, 0.0, told.seconds, 0.0))
    return entry


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LOWEST


def token_entry(llm: LLM, token_id: int, logprob: float) -> dict[str, Any]:
    """A token with its text, its bytes and its log-probability."""
    raw = llm.tokenizer.token_bytes(token_id) if llm.has_tokenizer and token_id < llm.tokenizer.vocab_size else b""
    return {"id": token_id, "token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": finite(logprob)}


def chat_logprobs(llm: LLM, samples: Sequence[TokenSample], n: int) -> list[dict[str, Any]]:
    """Entries of tokens with the n best alternatives at each place, as in chats."""
    return [
        {
            **token_entry(llm, one.token_id, one.logprob if one.logprob is not None else 0.0),
            "top_logprobs": [token_entry(llm, token_id, value) for token_id, value in one.top_logprobs[:n]],
        }
        for one in samples
    ]


def finish_reason(result: GenerationResult) -> str:
    """OpenAI's word for the end of a text."""
    return "tool_calls" if result.tool_calls and result.finish_reason == "stop" else result.finish_reason


def in_order(parts: Sequence[CallPart]) -> tuple[list[CallPart], list[CallPart]]:
    """Parts of a chunk that belong to a call that was open before it, which come before its text; and the others."""
    n = next((number for number, part in enumerate(parts) if part.name is not None), len(parts))
    return list(parts[:n]), list(parts[n:])


def is_json(text: str) -> bool:
    """Whether arguments are whole: a text that the end of the answer has cut off is no JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def whole_part(arguments: str) -> dict[str, Any]:
    """The object that arguments are; of a text that was cut off, what there is of it."""
    try:
        value = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
