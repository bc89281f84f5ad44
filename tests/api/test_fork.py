"""A real model in the children of a process whose threads generate and open models."""

import asyncio
import os
import threading

import pytest

from engine import LLM, AsyncLLM, EngineError, SamplingParams
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


def test_an_async_model_in_a_child():
    """The thread that steps it is not there; the child's first request starts another."""

    async def parent():
        model = AsyncLLM(LLM(device="cpu", threads=1, context_length=256))
        want = (await model.generate("Once upon a time", GREEDY)).token_ids
        stream = await model.stream("A long story", SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
        await anext(stream)

        async def again():
            with pytest.raises(EngineError, match="forked while this request was running"):
                async for _ in stream:
                    pass
            results = await asyncio.gather(*(model.generate("Once upon a time", GREEDY) for _ in range(2)))
            assert [result.token_ids for result in results] == [want, want]

        def child():
            asyncio.run(again())
            model.close()

        await asyncio.to_thread(in_child, child, 60)
        assert len((await stream.result()).token_ids) == 200
        await model.aclose()

    asyncio.run(parent())
