"""Errors and frozen values travel: copied, pickled, from a process pool; equal values have equal hashes."""

import copy
import dataclasses
import importlib
import multiprocessing
import pickle
import pkgutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import pytest

import engine
from engine import ContextFullError, EngineError, InvalidRequestError, SamplingParams, TokenSample
from engine.api.bench import BenchResult, Speed
from engine.api.perplexity import Perplexity
from engine.config import EngineConfig
from engine.errors import copy_error
from engine.frozen import FrozenDict
from engine.model.memory import MemoryPlan
from engine.request import GenerationResult, GenerationStats, StreamChunk
from engine.serve.errors import ApiError

WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda x, n=n: pickle.loads(pickle.dumps(x, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
}


def exception_classes():
    """Every exception class that a module of the package defines, wherever it is."""
    for module in pkgutil.walk_packages(engine.__path__, "engine."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # the GPU backend without its packages
                importlib.import_module(module.name)
    found, new = set(), [BaseException]
    while new:
        classes = new.pop().__subclasses__()
        new += classes
        found.update(one for one in classes if one.__module__.startswith("engine."))
    return found


def example(kind):
    """An error with everything that the engine or a caller may hang on it."""
    if kind is ContextFullError:
        error = kind(10, 5, parts="6 of the prompt")
    elif kind is ApiError:
        error = kind(503, "what to do", param="n", code="word", headers={"Retry-After": "1"}, extra={"a": 1})
    else:
        error = kind("what to do")
    error.request_id, error.partial_results = 7, [RESULT]
    error.add_note("said by a caller")
    return error


STATS = GenerationStats(3, 2, 0.1, 0.2, 0.3)
RESULT = GenerationResult("a", [1, 2], "stop", [3, 4, 5], 7, STATS, [TokenSample(1, -1.0, ((1, -1.0),))])


@pytest.mark.parametrize("way", WAYS)
def test_every_error_survives(way):
    classes = exception_classes()
    assert {ContextFullError, InvalidRequestError} < classes
    for kind in classes:
        error = example(kind)
        same = WAYS[way](error)
        assert type(same) is kind
        assert (str(same), same.args) == (str(error), error.args)
        assert vars(same) == vars(error)


def fail_inside():
    try:
        raise KeyError("inside")
    except KeyError as inner:
        raise ContextFullError(10, 5) from inner


def test_a_copy_for_another_caller_has_the_cause_and_attributes_of_its_own():
    with pytest.raises(ContextFullError) as caught:
        fail_inside()
    error = caught.value
    other = copy_error(error)
    assert other is not error
    assert (str(other), other.limit, other.__cause__) == (str(error), 5, error.__cause__)
    assert other.__traceback__ is error.__traceback__
    other.request_id = 3
    assert not hasattr(error, "request_id")


def fail(kind):
    raise example(kind)


def test_a_process_pool_hands_errors_on_and_lives():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for kind in (ContextFullError, InvalidRequestError, EngineError):
            with pytest.raises(kind) as caught:
                pool.submit(fail, kind).result(60)
            assert vars(caught.value)["request_id"] == 7
        assert pool.submit(len, "abc").result(60) == 3


EQUAL = [
    (
        lambda: SamplingParams(logit_bias={3: 1, 5: -1.5}, stop=["a", "b"], stop_token_ids=[1], temperature=0),
        lambda: SamplingParams(logit_bias={5: -1.5, 3: 1.0}, stop=("a", "b"), stop_token_ids=(1,), temperature=0.0),
    ),
    (lambda: StreamChunk("a", (1,), logprobs=(TokenSample(1),), stats=STATS), None),
    (lambda: RESULT.copy(samples=(RESULT,)), None),
    (lambda: EngineConfig("a.gguf", threads=2), None),
    (lambda: BenchResult(Speed(1.0, 0.5, 2.0), None, 3, None), None),
    (lambda: Perplexity(1, 2, 4.0, 5.0), None),
    (lambda: MemoryPlan(1, 2, 3, 4), None),
    (lambda: FrozenDict({1: 2, 3: 4}), lambda: FrozenDict({3: 4, 1: 2})),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_values_have_equal_hashes_and_survive(one, other):
    one, other = one(), (other or one)()
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1
    for way in WAYS.values():
        same = way(one)
        assert same == one
        assert hash(same) == hash(one)
        assert type(same) is type(one)


def test_settings_cannot_be_changed_behind_the_engine():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[3] = 2.0
    assert params.logit_bias == {3: 1.0}
    for change in (
        lambda: params.logit_bias.update({3: 2}),
        lambda: params.logit_bias.__setitem__(3, 2),
        lambda: params.logit_bias.clear(),
        lambda: params.logit_bias.pop(3),
        lambda: params.logit_bias.__ior__({3: 2}),
        lambda: params.logit_bias.__delitem__(3),
    ):
        with pytest.raises(TypeError, match="make a dict of it"):
            change()
    assert dataclasses.replace(params, seed=4).logit_bias == {3: 1.0}
