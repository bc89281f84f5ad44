"""AsyncLLM gives what LLM gives, and leaves nothing behind however its streams end."""

import asyncio
import gc
import threading

import pytest

from engine import LLM, AsyncLLM, EngineError, InvalidRequestError, SamplingParams
from engine.api.asynchronous import mailbox
from engine.errors import DeviceError


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=2, max_sequences=4) as model:
        yield model


@pytest.fixture
def run(llm):
    """Run a coroutine function with an AsyncLLM over the shared model; nothing may be left in the engine."""

    def run(work):
        async def main():
            shared = AsyncLLM(llm)
            try:
                await asyncio.wait_for(work(shared), 60)
                while shared.n_requests or llm.active_requests:
                    await asyncio.sleep(0.005)
            finally:
                await asyncio.to_thread(shared._driver.close)

        asyncio.run(main())
        now = llm.occupancy()
        assert (now.slots, now.waiting, now.preempted, now.held_pages) == ((), 0, 0, 0)

    return run


def test_the_same_results_as_the_plain_calls(llm, run):
    params = [SamplingParams(max_tokens=30, seed=seed, logprobs=2) for seed in range(6)]

    async def work(shared):
        found = await asyncio.gather(*(shared.generate("The old king", one) for one in params))
        for one, result in zip(params, found, strict=True):
            plain = llm.generate("The old king", one)
            assert (result.text, result.token_ids, result.logprobs) == (plain.text, plain.token_ids, plain.logprobs)
            assert (result.finish_reason, result.seed) == (plain.finish_reason, plain.seed)

    run(work)


def test_chunks_fold_to_the_result_and_samples_have_their_own_seeds(llm, run):
    async def work(shared):
        stream = await shared.stream("Once upon a time", SamplingParams(max_tokens=50, seed=4))
        texts = [chunk.text async for chunk in stream]
        plain = llm.generate("Once upon a time", SamplingParams(max_tokens=50, seed=4))
        assert "".join(texts) == plain.text == (await stream.result()).text
        result = await shared.generate([5, 6, 7], SamplingParams(n=3, max_tokens=8, seed=9))
        assert [one.seed for one in result.samples] == [9, 10, 11]
        assert result.samples[2].token_ids == llm.generate([5, 6, 7], SamplingParams(max_tokens=8, seed=11)).token_ids

    run(work)


def test_the_first_chunk_does_not_wait_for_others(run):
    async def work(shared):
        stream = await shared.stream("The sea", SamplingParams(max_tokens=200, seed=1))
        first = await anext(stream)
        assert 1 <= len(first.token_ids) < 100

    run(work)


def test_first_and_last_chunks_do_not_wait_for_the_next_delivery(run, monkeypatch):
    """The pause between two deliveries is an hour here."""
    monkeypatch.setattr(mailbox, "SHORTEST_PAUSE", 3600.0)
    monkeypatch.setattr(mailbox, "LONGEST_PAUSE", 3600.0)

    async def work(shared):
        for seed in range(3):
            stream = await shared.stream("The sea", SamplingParams(max_tokens=40, seed=seed, ignore_eos=True))
            sizes = [len(chunk.token_ids) async for chunk in stream]
            assert sum(sizes) == 40
            assert len(sizes) <= 3

    run(work)


def test_what_is_refused_is_refused_at_once(run):
    async def work(shared):
        with pytest.raises(InvalidRequestError):
            await shared.generate([10**9])
        for no_prompt in (None, 7, b"bytes"):
            with pytest.raises(InvalidRequestError, match="a prompt is"):
                await shared.generate(no_prompt)
        with pytest.raises(InvalidRequestError, match="streams"):
            await shared.stream("a", SamplingParams(n=2))
        with pytest.raises(InvalidRequestError, match="chat template"):
            await shared.chat([{"role": "user", "content": "hi"}])

    run(work)


@pytest.mark.parametrize("way", ["cancel", "close", "forget", "task"])
def test_every_way_to_give_up_frees_the_place(run, way):
    """run() waits until the engine is empty: a request that went on would take 1000 tokens, and it checks the pages."""
    endless = SamplingParams(ignore_eos=True, seed=3)

    async def work(shared):
        if way == "task":
            task = asyncio.ensure_future(shared.generate("The", endless))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        stream = await shared.stream("The", endless)
        await anext(stream)
        if way == "cancel":
            stream.cancel()
            result = await stream.result()
            assert result.finish_reason == "cancelled"
            assert len(result.token_ids) < 900
        elif way == "close":
            await stream.aclose()
            assert [chunk async for chunk in stream] == []
        else:
            del stream
            gc.collect()

    run(work)


def test_a_failed_step_reaches_its_requests_and_the_next_one_works(llm, run, monkeypatch):
    failing = threading.Event()
    step = type(llm._runner).step

    def broken(self, work):
        if failing.is_set():
            failing.clear()
            raise DeviceError("injected")
        return step(self, work)

    monkeypatch.setattr(type(llm._runner), "step", broken)

    async def work(shared):
        streams = [await shared.stream("The", SamplingParams(max_tokens=400, ignore_eos=True)) for _ in range(2)]
        await anext(streams[0])
        failing.set()
        for stream in streams:
            with pytest.raises(DeviceError, match="injected"):
                await stream.result()
        assert isinstance(shared.failure, DeviceError)
        assert (await shared.generate("The", SamplingParams(max_tokens=3, ignore_eos=True))).finish_reason == "length"
        assert shared.failure is None

    run(work)


def test_several_event_loops_share_one_batch(llm):
    shared = AsyncLLM(llm)
    found = {}

    def other(seed):
        found[seed] = asyncio.run(shared.generate("The fox", SamplingParams(max_tokens=20, seed=seed))).text

    threads = [threading.Thread(target=other, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    shared._driver.close()
    assert found == {n: llm.generate("The fox", SamplingParams(max_tokens=20, seed=n)).text for n in range(3)}


def test_closing_ends_what_runs():
    async def main():
        shared = AsyncLLM(LLM(device="cpu", threads=1, max_sequences=2))
        stream = await shared.stream("The", SamplingParams(ignore_eos=True))
        await anext(stream)
        await shared.aclose()
        await shared.aclose()
        with pytest.raises(EngineError, match="closed"):
            await stream.result()
        with pytest.raises(EngineError, match="closed"):
            await shared.generate("The")

    asyncio.run(main())


def test_prompt_progress_is_told_step_by_step():
    async def main():
        async with AsyncLLM(LLM(device="cpu", threads=2, max_sequences=2, prefill_chunk=64)) as shared:
            prompt = list(range(100, 300))
            for cached in (0, 192):  # the second time whole pages and a part of the last one are there
                stream = (await shared.streams(prompt, SamplingParams(max_tokens=2), watched=True))[0]
                told = [one async for one in stream.prompt_progress()]
                await stream.result()
                assert [one.total for one in told] == [200] * len(told)
                assert told[0].done == told[0].cached >= cached
                assert told[-1].done == 200
                assert [one.done for one in told] == sorted({one.done for one in told})
                if not cached:
                    assert [one.done for one in told] == [0, 64, 128, 192, 200]

    asyncio.run(main())
