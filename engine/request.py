"""What the parts of the engine pass to each other: requests, running sequences, the work of a step, results.

Integers, parameters and text only; no arrays, no devices.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from engine.sampling.constraint import TokenMask
from engine.sampling.params import SamplingParams
from engine.sampling.result import TokenSample

__all__ = [
    "ActiveSequence",
    "CallPart",
    "GenerationResult",
    "GenerationStats",
    "Request",
    "StreamChunk",
    "TokenSample",
    "ToolCall",
    "Work",
]


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that a model asks for.

    Attributes:
        id: names the call; a tool's message with the result has it as its "tool_call_id".
        name: of the function.
        arguments: JSON text.
    """

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """The call as part of an assistant's message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class CallPart:
    """What one step added to a call of a tool. Joined, the arguments of its parts are those of the call.

    Attributes:
        index: number of the call in its answer, from 0.
        arguments: new text of them.
        id: of the call, in its first part; None in the others.
        name: of the function, in the first part; None in the others.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Request:
    """One accepted request, checked and ready to be scheduled.

    Attributes:
        request_id: unique in one engine.
        prompt_ids: the prompt, at least one token.
        params: sampling parameters.
        seed: the seed in force, params.seed or a fresh one.
        max_output: tokens to generate at most; 0 only scores the prompt.
        score_from: first prompt position whose log-probability is wanted; None scores none.
        shares_with: id of an earlier request with the same prompt, whose pages this one waits for.
        mask: which tokens may be drawn, for a request with a constraint; belongs to this request alone.
    """

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_output: int
    score_from: int | None = None
    shares_with: int | None = None
    mask: TokenMask | None = field(default=None, repr=False, compare=False)


@dataclass
class ActiveSequence:
    """A request that holds a cache slot.

    Attributes:
        request_id: the request it serves.
        slot: cache slot, 0 to max_sequences - 1.
        prompt_ids: the prompt.
        output_ids: tokens generated so far.
        params: sampling parameters.
        seed: key of its random numbers.
        n_cached: tokens of prompt and output whose keys and values are in the cache.
        pages: cache pages; page i holds positions i * PAGE to i * PAGE + PAGE - 1.
        state_place: how far its recurrent state has moved: the place that holds the state after n_cached tokens,
            modulo the places of a slot (docs/decisions/repeatable-step.md).
        draft_ids: predicted tokens after the newest one, to be checked by its next step.
        cached_tokens: prompt tokens whose keys and values were in the cache already when it started.
        end: the first position that it never feeds, whatever its text becomes; None: unknown.
        mask: see Request.
        parts_at: where its prompt parts from an earlier one whose recurrent state was not kept there, at a page border;
            0: nowhere.
        pieces_end: tokens before this position are fed as pieces like those of a prompt, however they are cut: the
            prompt, and of a constrained text all up to forced tokens that are fed together.
        known_end: generated tokens before this position are fed without a draw, where they are not pieces; several of
            them may be rows of one decode step.
    """

    request_id: int
    slot: int
    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    seed: int
    n_cached: int = 0
    pages: list[int] = field(default_factory=list)
    state_place: int = 0
    draft_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    end: int | None = None
    mask: TokenMask | None = field(default=None, repr=False, compare=False)
    pieces_end: int = field(init=False)
    known_end: int = 0
    parts_at: int = 0

    def __post_init__(self) -> None:
        self.pieces_end = len(self.prompt_ids)


class Work(NamedTuple):
    """What a runner is asked to do for one sequence in one step. A tuple: one is made per sequence and step.

    Attributes:
        sequence: whose tokens these are.
        token_ids: the new tokens to feed.
        start: position of the first of them; equals sequence.n_cached.
        sample: whether the token after the last one is to be drawn.
        score: whether this goes to Runner.score, which also reports the log-probability of every next prompt token.
        decode: whether what is fed are generated tokens: one of which the next is drawn, or, not to draw, some before
            sequence.known_end. Otherwise this is a piece of what comes before sequence.pieces_end.
        draft_ids: predicted tokens fed after it, one row each; the runner draws a token after each row.
    """

    sequence: ActiveSequence
    token_ids: Ids[int]
    start: int
    sample: bool
    score: bool = False
    decode: bool = False
    draft_ids: Ids[int] = ()


@dataclass(frozen=True)
class GenerationStats:
    """Counts and times of one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens generated.
        queue_seconds: from the call until the first step that served it.
        prompt_seconds: from there until the first generated token.
        decode_seconds: from the first to the last generated token.
        cached_tokens: prompt tokens that were not computed, as the cache held them from an earlier prompt.
    """

    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    prompt_seconds: float
    decode_seconds: float
    cached_tokens: int = 0

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens computed per second, those from the cache not counted; 0 where nothing was measured."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Generated tokens per second after the first; 0 where fewer than two were generated."""
        return (self.output_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures under plain names, for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "queue_seconds": self.queue_seconds,
            "prompt_seconds": self.prompt_seconds,
            "decode_seconds": self.decode_seconds,
            "prompt_tok_s": self.prompt_tok_s,
            "decode_tok_s": self.decode_tok_s,
        }


class StreamChunk(NamedTuple):
    """What one step added to one request. A tuple: one is made per sequence and step.

    Attributes:
        text: new text, possibly empty (half a character, or the possible beginning of a stop string, is held back).
        token_ids: new tokens.
        finish_reason: None while more follows; see GenerationResult.
        logprobs: one entry per new token, if asked for.
        prompt_logprobs: in the first chunk, if asked for.
        stats: in the last chunk.
        request_id: the request it belongs to.
        reasoning: of a chat, new text of what the model thinks before it answers.
        tool_calls: of a chat, calls that are complete now, or that the end of the answer has cut off.
        call_parts: of a chat, the same calls piece by piece, as they are written.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenSample, ...] = ()
    prompt_logprobs: tuple[TokenSample | None, ...] | None = None
    stats: GenerationStats | None = None
    request_id: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_parts: tuple[CallPart, ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """A finished request.

    Lists belong to the result alone: changing one changes nothing in the engine or in another result. They are no part
    of the hash.

    Attributes:
        text: the generated text, without the stop string or end token that ended it.
        token_ids: every generated token, the one that ended the text included.
        finish_reason: "stop" (end-of-generation token, stop token or stop string), "length" (max_tokens reached or
            the context full) or "cancelled".
        prompt_token_ids: the prompt as the model saw it.
        seed: the seed in force; with it, the same request gives the same text again.
        stats: counts and times.
        logprobs: one entry per token of token_ids, None unless params.logprobs asked for them.
        prompt_logprobs: one entry per prompt token (None for the first), None unless asked for.
        samples: all samples of the prompt, this one first, where params.n asked for more than one.
        reasoning: of a chat, what the model thought before it answered; "" where it did not.
        tool_calls: of a chat, the calls that it asks for; where finish_reason is "length", the arguments of the last
            one may be cut off.
        text_with_calls: of a chat with calls, the text with the calls written out, where the model's chat template
            reads no calls from messages.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    seed: int
    stats: GenerationStats
    logprobs: list[TokenSample] | None = None
    prompt_logprobs: list[TokenSample | None] | None = field(default=None, repr=False)
    samples: tuple[GenerationResult, ...] = field(default=(), repr=False)
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    text_with_calls: str | None = field(default=None, repr=False)

    def __hash__(self) -> int:
        return hash((self.text, self.finish_reason, self.seed, self.stats))

    def copy(self, *, samples: tuple[GenerationResult, ...] = ()) -> GenerationResult:
        """The same result with lists of its own, and with other samples beside it."""
        return replace(
            self,
            token_ids=list(self.token_ids),
            prompt_token_ids=list(self.prompt_token_ids),
            logprobs=None if self.logprobs is None else list(self.logprobs),
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            samples=samples,
        )

    def as_message(self) -> dict[str, Any]:
        """The answer of a chat as the assistant's message for the next turn, with reasoning and calls in their keys."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.text_with_calls is not None:
            message["content"] = self.text_with_calls
        elif self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return message
