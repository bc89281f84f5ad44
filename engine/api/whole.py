"""Whole results of many prompts: all run side by side, and each is folded when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.api.stream import Stream
from engine.errors import InvalidRequestError
from engine.request import GenerationResult
from engine.sampling.params import SamplingParams


def params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, n_prompts: int) -> Sequence[Any]:
    """The parameters of each of so many prompts, from one for all or a list.

    Raises:
        InvalidRequestError: a list of another length.
    """
    if not isinstance(params, Sequence) or isinstance(params, str):
        return [params or SamplingParams()] * n_prompts
    if len(params) != n_prompts:
        raise InvalidRequestError(f"{n_prompts} prompts but {len(params)} SamplingParams; give one, or one for each")
    return params


def one_sample(params: SamplingParams | None) -> SamplingParams:
    """The parameters of a request that is followed chunk by chunk.

    Raises:
        InvalidRequestError: they ask for several samples.
    """
    params = params or SamplingParams()
    if isinstance(params, SamplingParams) and params.n != 1:
        raise InvalidRequestError(f"n is {params.n}; a stream gives one sample: use generate() or sample_streams()")
    return params


def results_of(groups: Sequence[Sequence[Stream]]) -> list[GenerationResult]:
    """The result of each prompt, from the streams of its samples; all are closed afterwards.

    Raises:
        EngineError: a step failed; its attribute `partial_results` holds the prompts that were finished.
    """
    results: list[GenerationResult] = []
    try:
        for group in groups:
            samples = tuple(stream.result() for stream in group)
            results.append(samples[0].copy(samples=samples) if len(samples) > 1 else samples[0])
    except Exception as error:
        error.partial_results = list(results)  # type: ignore[attr-defined]
        raise
    finally:
        for group in groups:
            for stream in group:
                stream.close()
    return results
