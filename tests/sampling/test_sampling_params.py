"""Sampling settings: defaults, ranges, error texts."""

import math

import pytest

from engine.errors import InvalidRequestError
from engine.sampling import SamplingParams
from engine.sampling.params import MAX_LOGIT_BIAS


def test_a_temperature_too_small_to_divide_by_is_greedy():
    """1e-50 is 0 in float32, and 1e-40 on a GPU."""
    assert SamplingParams(temperature=1e-50).greedy
    assert SamplingParams(temperature=1e-40).temperature == 0
    assert not SamplingParams(temperature=1e-3).greedy


@pytest.mark.parametrize(
    ("name", "value", "quoted"),
    [
        ("temperature", -0.1, "0 (greedy)"),
        ("temperature", math.nan, "nan"),
        ("temperature", "hot", "'hot'"),
        ("temperature", True, "True"),
        ("top_k", -1, "0 (off)"),
        ("top_k", 1.5, "1.5"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.01, "1.01"),
        ("min_p", -0.1, "0 (off) to 1"),
        ("typical_p", 0, "above 0"),
        ("repetition_penalty", 0.0, "0.01 to 100"),
        ("presence_penalty", 101, "-100 to 100"),
        ("frequency_penalty", math.inf, "inf"),
        ("penalty_last_n", -2, "-1 (all)"),
        ("max_tokens", -1, "at least 0"),
        ("max_tokens", True, "True"),
        ("seed", -1, "2**64"),
        ("seed", 2**64, "18446744073709551616"),
        ("stop", ("a", ""), "at least one character"),
        ("stop", 3, "string"),
        ("stop", ["x"] * 65, "at most 64"),
        ("stop_token_ids", [-1], "-1"),
        ("stop_token_ids", 5, "list"),
        ("ignore_eos", 1, "True or False"),
        ("logprobs", 33, "32"),
        ("prompt_logprobs", -1, "-1"),
        ("logit_bias", {1: math.nan}, "logit_bias[1]"),
        ("logit_bias", {1: math.inf}, "inf"),
        ("logit_bias", {1: -2e6}, "-inf to forbid"),
        ("logit_bias", {-1: 1.0}, "-1"),
        ("logit_bias", [1], "mapping"),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0), str(MAX_LOGIT_BIAS)),
    ],
)
def test_refused(name, value, quoted):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert quoted in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_accepted_forms():
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], logit_bias={2: -math.inf}, temperature=1, seed=2**64 - 1)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {2: -math.inf}
    assert SamplingParams(stop=None, logit_bias={}).logit_bias is None
    assert SamplingParams(max_tokens=0).max_tokens == 0


def test_unknown_setting():
    with pytest.raises(TypeError):
        SamplingParams(heat=1)


def test_vocabulary():
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check_vocabulary(10)
    for params in (SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=[10])):
        with pytest.raises(InvalidRequestError, match="token 10; allowed: 0 to 9"):
            params.check_vocabulary(10)


def test_flags():
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams().penalizes
    assert SamplingParams(presence_penalty=1).penalizes
    assert not SamplingParams(presence_penalty=1, penalty_last_n=0).penalizes
