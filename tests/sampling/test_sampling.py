"""The host sampler: by hand on four tokens, against a plain float64 model, and by chi-square."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.errors import InvalidRequestError, ModelFileError
from engine.sampling import SamplingParams
from engine.sampling.filters import draw, keep_min_p, keep_typical, largest_ids, top_p_count
from engine.sampling.fixed_point import exponential, fixed_point
from engine.sampling.logprobs import score_tokens
from engine.sampling.rng import fresh_seed, philox, uniform24
from engine.sampling.sampler import adjusted, sample

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FOUR = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def reachable(logits, n=400, **settings_):
    """Which tokens come out of n draws."""
    params = SamplingParams(**{**OFF, **settings_})
    return {sample(logits, params, history=[], output_index=i, seed=5).token_id for i in range(n)}


def test_philox_known_answers():
    # Test vectors published with Random123 (kat_vectors, philox4x32-10).
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform24_is_uniform():
    draws = np.array([uniform24(seed, i) for seed in (0, 2**40 + 3) for i in range(5000)]) / 2**24
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert uniform24(1, 0) != uniform24(2**32 + 1, 0)
    assert 0 <= fresh_seed() < 2**64


def test_exponential():
    x = -np.concatenate([np.linspace(0, 29.99, 200_001), [0.0]]).astype(np.float32)
    np.testing.assert_allclose(exponential(x), np.exp(x.astype(np.float64)), rtol=3e-7)
    assert exponential(np.array([0.0, -30.5, -np.inf], np.float32)).tolist() == [1.0, 0.0, 0.0]


def test_greedy_and_ties():
    greedy = SamplingParams(temperature=0)
    for logits, expected in (([1, 3, 3, 2], 1), ([0, -0.0, 0, 0], 0), ([-np.inf, -5, -np.inf, -5], 1), ([7], 0)):
        assert sample(np.float32(logits), greedy, history=[], output_index=0, seed=0).token_id == expected
    assert reachable(FOUR, top_k=1) == {1}


def test_top_k():
    assert reachable(FOUR, top_k=2) == {1, 3}
    assert reachable(FOUR, top_k=3) == {1, 2, 3}
    assert reachable(FOUR, top_k=99) == {0, 1, 2, 3}
    assert reachable(np.zeros(4, np.float32), top_k=2) == {0, 1}, "ties keep the lower ids"


def test_top_p():
    assert reachable(FOUR, top_p=0.35) == {1}
    assert reachable(FOUR, top_p=0.65) == {1, 3}
    assert reachable(FOUR, top_p=0.75) == {1, 3, 2}
    assert reachable(FOUR, top_p=1e-9) == {1}, "at least one"
    assert reachable(FOUR, top_p=0.5, top_k=2) == {1}, "0.4 / 0.7 reaches a half"


def test_min_p():
    assert reachable(FOUR, min_p=0.45) == {1, 2, 3}
    assert reachable(FOUR, min_p=0.7) == {1, 3}
    assert reachable(FOUR, min_p=1.0) == {1}


def test_typical():
    # Entropy 1.2799; surprises 2.303, 0.916, 1.609, 1.204; so the differences are 1.02, 0.36, 0.33, 0.08.
    assert reachable(FOUR, typical_p=0.25) == {3}
    assert reachable(FOUR, typical_p=0.45) == {3, 2}
    assert reachable(FOUR, typical_p=0.85) == {3, 2, 1}
    assert reachable(FOUR, typical_p=0.95) == {0, 1, 2, 3}
    assert reachable(FOUR, typical_p=0.45, min_p=0.7) == {3}, "min-p is relative to the best that is left"


def test_penalties_by_hand():
    logits = np.float32([2.0, -2.0, 1.0, 0.5])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, penalty_last_n=3)
    changed = adjusted(logits, params, [3, 0, 0, 1])
    np.testing.assert_allclose(changed, [1.0 - 1.25, -4.0 - 0.75, 1.0, 0.5])
    assert logits[0] == 2.0, "the caller's logits stay"
    all_of_it = SamplingParams(presence_penalty=1, penalty_last_n=-1)
    np.testing.assert_allclose(adjusted(logits, all_of_it, [3, 0, 0, 1]), [1.0, -3.0, 1.0, -0.5])
    assert adjusted(logits, SamplingParams(presence_penalty=1, penalty_last_n=0), [0]) is logits
    assert adjusted(logits, all_of_it, []) is logits
    bias = SamplingParams(logit_bias={1: 4.0}, repetition_penalty=2.0)
    np.testing.assert_allclose(adjusted(logits, bias, [1]), [2.0, 1.0, 1.0, 0.5], err_msg="bias comes first")


def test_bias_forbids():
    assert 1 not in reachable(FOUR, logit_bias={1: -np.inf})
    greedy = SamplingParams(temperature=0, logit_bias={1: -np.inf, 0: 50})
    assert sample(FOUR, greedy, history=[], output_index=0, seed=0).token_id == 0
    with pytest.raises(InvalidRequestError, match="leave no token"):
        reachable(FOUR, logit_bias=dict.fromkeys(range(4), -np.inf))
    with pytest.raises(InvalidRequestError, match="token 4; allowed: 0 to 3"):
        reachable(FOUR, logit_bias={4: 1})


@pytest.mark.parametrize(
    ("bad", "text"), [([0, np.nan], "NaN"), ([0, np.inf], "infinity"), ([-np.inf, -np.inf], "no finite number")]
)
def test_bad_logits(bad, text):
    for temperature in (0, 1):
        with pytest.raises(ModelFileError, match=text):
            sample(np.float32(bad), SamplingParams(temperature=temperature), history=[], output_index=0, seed=0)


def test_extreme_logits_and_temperatures():
    huge = np.float32([3e38, -3e38, 0, -np.inf])
    for temperature in (1e-30, 1.0, 1e4):
        params = SamplingParams(**{**OFF, "temperature": temperature})
        assert sample(huge, params, history=[], output_index=0, seed=1).token_id == 0
    assert reachable(FOUR, temperature=1e4) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings_", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"temperature": 0.5}, [0, 1, 2, 3]),
        ({"temperature": 2.0, "top_k": 3}, [1, 2, 3]),
        ({"top_p": 0.75}, [1, 2, 3]),
        ({"min_p": 0.6}, [1, 3]),
        ({"typical_p": 0.85}, [1, 2, 3]),
    ],
)
def test_chi_square(settings_, kept):
    n = 6000
    params = SamplingParams(**{**OFF, **settings_})
    tokens = [sample(FOUR, params, history=[], output_index=i, seed=2**33 + 7).token_id for i in range(n)]
    counts = np.bincount(tokens, minlength=4)
    p = np.array([0.1, 0.4, 0.2, 0.3])[kept] ** (1 / params.temperature)
    assert counts[kept].sum() == n
    assert stats.chisquare(counts[kept], p / p.sum() * n).pvalue > 1e-3


def plain(logits, params, random):
    """All steps in float64 with whole sorts, as a textbook has them; also the margin to the nearest other outcome."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    x = logits[order].astype(np.float64) / params.temperature
    if params.top_k:
        order, x = order[: params.top_k], x[: params.top_k]
    p = np.exp(x - x.max())
    p /= p.sum()
    margin = np.inf
    if params.typical_p < 1:
        surprise = -np.log(p)
        score = np.abs(surprise - (p * surprise).sum())
        by_score = np.lexsort((order, score))
        cumulative = np.cumsum(p[by_score])
        n = np.searchsorted(cumulative, params.typical_p) + 1
        margin = min(margin, np.abs(cumulative - params.typical_p).min(), np.diff(np.sort(score)).min(initial=1))
        keep = np.sort(by_score[:n])
        order, p = order[keep], p[keep] / p[keep].sum()
    if params.top_p < 1:
        cumulative = np.cumsum(p)
        n = np.searchsorted(cumulative, params.top_p) + 1
        margin = min(margin, np.abs(cumulative - params.top_p).min())
        order, p = order[:n], p[:n] / p[:n].sum()
    if params.min_p > 0:
        margin = min(margin, np.abs(p / p[0] - params.min_p).min())
        keep = p >= params.min_p * p[0]
        order, p = order[keep], p[keep] / p[keep].sum()
    cumulative = np.cumsum(p)
    margin = min(margin, np.abs(cumulative - random).min())
    return int(order[min(np.searchsorted(cumulative, random, side="right"), len(order) - 1)]), margin


mixes = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 2, 40, 500, 1999]),
        "top_p": st.sampled_from([0.1, 0.5, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3]),
        "typical_p": st.sampled_from([0.3, 0.9, 1.0, 1.0]),
    }
)


@settings(deadline=None)
@given(mixes, st.sampled_from([5, 300, 2000, 6000]), st.integers(0, 2**32), st.floats(0.1, 8))
def test_equals_a_plain_model(mix, size, seed, spread):
    params = SamplingParams(**mix)
    logits = (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)
    got = sample(logits, params, history=[], output_index=3, seed=seed).token_id
    expected, margin = plain(logits, params, uniform24(seed, 3) / 2**24)
    if margin > 1e-5:
        assert got == expected


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=900), st.integers(1, 900))
def test_largest_ids(values, k):
    logits = np.float32(values)
    k = min(k, len(values))
    expected = sorted(range(len(values)), key=lambda i: (-logits[i], i))[:k]
    assert largest_ids(logits, k).tolist() == expected


@pytest.mark.parametrize("n_allowed", [0, 1, 39, 40, 41, 600])
def test_largest_ids_where_few_are_allowed(n_allowed):
    logits = np.full(20_000, -np.inf, np.float32)
    allowed = np.random.default_rng(n_allowed).choice(20_000, n_allowed, replace=False)
    logits[allowed] = allowed % 7
    assert np.array_equal(largest_ids(logits, 40), np.argsort(-logits, kind="stable")[:40])


def test_largest_ids_with_chunks():
    logits = np.random.default_rng(0).integers(-500, 500, 50_001).astype(np.float32)
    expected = np.lexsort((np.arange(len(logits)), -logits))
    for k in (1, 40, 195, 196, 5000, len(logits)):
        assert np.array_equal(largest_ids(logits, k), expected[:k])


def test_filters_on_weights():
    w = np.float32([1.0, 0.5, 0.25, 0.25])
    q = fixed_point(w)
    assert q.tolist() == [2**40, 2**39, 2**38, 2**38]
    assert [top_p_count(q, p, int(q.sum())) for p in (0.5, 0.51, 0.75, 0.8, 0.99)] == [1, 2, 2, 3, 4]
    assert keep_min_p(w, 0.5).tolist() == [True, True, False, False]
    top = 2**24
    assert [draw(q, r, int(q.sum())) for r in (0, top // 2 - 1, top // 2, 3 * top // 4, 7 * top // 8, top - 1)] == [
        0, 0, 1, 2, 3, 3,
    ]  # fmt: skip
    even = np.zeros(4, np.float32)
    ones = np.ones(4, np.float32)
    assert keep_typical(even, ones, fixed_point(ones), np.arange(4), 0.5).tolist() == [True, True, False, False]


def test_same_seed_same_text_whatever_else():
    logits = np.random.default_rng(1).standard_normal((20, 1000)).astype(np.float32)
    params = SamplingParams()

    def run(seed, start=0):
        return [sample(logits[i], params, history=[], output_index=i, seed=seed).token_id for i in range(start, 20)]

    assert run(11) == run(11)
    assert run(11)[7:] == run(11, 7)
    assert run(11) != run(12)


def test_log_probabilities():
    logits = np.random.default_rng(2).standard_normal((3, 4000)).astype(np.float32) * 4
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    params = SamplingParams(logprobs=5, temperature=2.0, logit_bias={17: -3.0}, repetition_penalty=1.5)
    found = sample(logits[0], params, history=[17, 18], output_index=0, seed=3)
    assert found.logprob == pytest.approx(exact[0, found.token_id], abs=2e-6)
    assert [i for i, _ in found.top_logprobs] == np.argsort(-exact[0], kind="stable")[:5].tolist()
    np.testing.assert_allclose([v for _, v in found.top_logprobs], np.sort(exact[0])[::-1][:5], atol=2e-6)
    scored = score_tokens(logits, [7, 8, 9], 0)
    assert [s.token_id for s in scored] == [7, 8, 9]
    assert all(s.top_logprobs == () for s in scored)
    np.testing.assert_allclose([s.logprob for s in scored], exact[range(3), [7, 8, 9]], atol=2e-6)
    assert sample(logits[0], SamplingParams(logprobs=0), history=[], output_index=0, seed=3).top_logprobs == ()
    assert sample(logits[0], SamplingParams(), history=[], output_index=0, seed=3).logprob is None
