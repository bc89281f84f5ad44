"""Sampling on the host: settings, penalties, filters, random numbers, log-probabilities, stop strings.

Must not know models or devices. engine/cuda/sampling/sampling.cu follows the same steps bit for bit.
"""

from engine.sampling.params import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from engine.sampling.result import TokenSample

__all__ = ["MAX_LOGIT_BIAS", "MAX_LOGPROBS", "SamplingParams", "TokenSample"]
