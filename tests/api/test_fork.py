"""A real model in the children of a process whose threads generate and open models."""

import os
import threading

import pytest

from engine import LLM, SamplingParams
from tests.support.forking import in_child

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]
GREEDY = SamplingParams(max_tokens=4, temperature=0)


def test_children_generate_the_same():
    done = threading.Event()
    with LLM(device="cpu", threads=2, context_length=256) as llm:
        want = llm.generate("Once upon a time", GREEDY).token_ids

        def generate():
            while not done.is_set():
                for _ in llm.stream("A long story", SamplingParams(max_tokens=100, temperature=0.8)):
                    if done.is_set():
                        break

        def open_models():
            while not done.is_set():
                LLM(device="cpu", threads=1, context_length=64).close()

        threads = [threading.Thread(target=work) for work in (generate, generate, open_models)]
        for thread in threads:
            thread.start()

        def child():
            assert llm.generate("Once upon a time", GREEDY).token_ids == want
            with LLM(device="cpu", threads=1, context_length=64) as other:
                assert other.generate("Once upon a time", GREEDY).token_ids == want

        try:
            for _ in range(6):
                in_child(child, 60)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert llm.generate("Once upon a time", GREEDY).token_ids == want
