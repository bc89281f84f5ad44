"""The facade, the step loop and the threads, on the bundled model and on tiny random ones."""

import gc
import math
import threading
import time

import numpy as np
import pytest

import engine
from engine import (
    LLM,
    ContextFullError,
    DeviceError,
    EngineError,
    GenerationResult,
    InvalidRequestError,
    SamplingParams,
    TokenizerError,
)
from engine.gguf import open_gguf
from tests.support.models.gguf_builder import build_gguf, tiny_llama, tiny_llama_parts

GREEDY = SamplingParams(max_tokens=12, temperature=0)
PROMPTS = ["Once upon a time", "The king", "In the dark wood there lived", "One day"]


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=2, max_sequences=4) as model:
        yield model


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_llama(context_length=64))
    with LLM(path, device="cpu", threads=1, max_sequences=2, prefill_chunk=16) as model:
        yield model


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return (
        wide - wide.max(-1, keepdims=True) - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


class TestLevels:
    def test_one_prompt_gives_one_result(self, llm):
        result = llm.generate(PROMPTS[0], GREEDY)
        assert isinstance(result, GenerationResult)
        assert result.text.startswith(" there was a little boy")
        assert result.text == llm.tokenizer.decode(result.token_ids)
        assert result.finish_reason == "length"
        assert len(result.token_ids) == 12
        assert result.prompt_token_ids == llm.tokenizer.encode(PROMPTS[0])
        assert result.stats.prompt_tokens == len(result.prompt_token_ids)
        assert result.stats.output_tokens == 12
        assert result.stats.prompt_tok_s > 0
        assert result.stats.decode_tok_s > 0

    def test_lists_of_texts_and_ids(self, llm):
        ids = llm.tokenizer.encode(PROMPTS[1])
        results = llm.generate([PROMPTS[0], ids], GREEDY)
        assert [result.text for result in results] == [llm.generate(prompt, GREEDY).text for prompt in PROMPTS[:2]]
        assert llm.generate(ids, GREEDY).token_ids == results[1].token_ids
        assert llm.generate(np.array(ids), GREEDY).token_ids == results[1].token_ids
        assert llm.generate([], GREEDY) == []

    def test_params_for_each_prompt(self, llm):
        results = llm.generate(PROMPTS[:2], [SamplingParams(max_tokens=n, temperature=0) for n in (3, 5)])
        assert [len(result.token_ids) for result in results] == [3, 5]
        with pytest.raises(InvalidRequestError, match="2 prompts but 1"):
            llm.generate(PROMPTS[:2], [GREEDY])

    @pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=20, seed=5, logprobs=2, prompt_logprobs=1)])
    def test_stream_folds_to_generate(self, llm, params):
        whole = llm.generate(PROMPTS[2], params)
        chunks = list(llm.stream(PROMPTS[2], params))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == whole.finish_reason
        assert [sample for chunk in chunks for sample in chunk.logprobs] == (whole.logprobs or [])
        assert chunks[0].prompt_logprobs == (tuple(whole.prompt_logprobs) if whole.prompt_logprobs else None)

    def test_step_gives_what_generate_gives(self, llm):
        expected = {prompt: llm.generate(prompt, GREEDY) for prompt in PROMPTS}
        ids = {llm.add_request(prompt, GREEDY): prompt for prompt in PROMPTS}
        texts = dict.fromkeys(ids, "")
        reasons = {}
        while len(reasons) < len(ids):
            for chunk in llm.step():
                texts[chunk.request_id] += chunk.text
                if chunk.finish_reason:
                    reasons[chunk.request_id] = chunk.finish_reason
        assert {ids[key]: text for key, text in texts.items()} == {p: expected[p].text for p in PROMPTS}
        assert set(reasons.values()) == {"length"}
        assert llm.step() == []
        assert llm.active_requests == 0

    def test_stream_half_fetched_then_folded(self, llm):
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        next(stream)
        assert stream.result().text == llm.generate(PROMPTS[0], GREEDY).text


class TestSampling:
    def test_seed_repeats_alone_and_in_any_batch(self, llm):
        params = SamplingParams(max_tokens=16, seed=11)
        alone = [llm.generate(prompt, params).token_ids for prompt in PROMPTS]
        assert [result.token_ids for result in llm.generate(PROMPTS, params)] == alone
        reverse = llm.generate([*PROMPTS[::-1], *PROMPTS[::-1]], params)
        assert [result.token_ids for result in reverse] == [*alone[::-1], *alone[::-1]]

    def test_fresh_seed_is_reported_and_repeats(self, llm):
        first, second = (llm.generate(PROMPTS[0], SamplingParams(max_tokens=16)) for _ in range(2))
        assert first.seed != second.seed
        again = llm.generate(PROMPTS[0], SamplingParams(max_tokens=16, seed=first.seed))
        assert again.token_ids == first.token_ids

    def test_logprobs_are_those_of_the_logits(self, llm):
        params = SamplingParams(max_tokens=5, seed=3, logprobs=3, prompt_logprobs=2)
        result = llm.generate(PROMPTS[2], params)
        ids = result.prompt_token_ids + result.token_ids
        truth = log_softmax(llm.logits(ids))
        scores = [*result.prompt_logprobs, *result.logprobs]
        assert scores[0] is None
        assert len(scores) == len(ids)
        for position, score in enumerate(scores[1:], start=1):
            row = truth[position - 1]
            assert score.token_id == ids[position]
            assert score.logprob == pytest.approx(row[ids[position]], abs=2e-3)
            n_top = 3 if position >= len(result.prompt_token_ids) else 2
            assert [logprob for _, logprob in score.top_logprobs] == pytest.approx(np.sort(row)[::-1][:n_top], abs=2e-3)

    def test_stop_string_across_tokens(self, llm):
        whole = llm.generate(PROMPTS[0], SamplingParams(max_tokens=40, temperature=0)).text
        stop = whole[25:33]  # begins and ends inside words
        result = llm.generate(PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, stop=stop))
        assert result.text == whole[: whole.index(stop)]
        assert result.finish_reason == "stop"
        shown = ""
        for chunk in llm.stream(PROMPTS[0], SamplingParams(max_tokens=40, temperature=0, stop=stop)):
            shown += chunk.text
            assert whole[: whole.index(stop)].startswith(shown)

    def test_unfinished_stop_string_is_shown_at_the_end(self, llm):
        whole = llm.generate(PROMPTS[0], GREEDY).text
        result = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, stop=whole[-3:] + "\0"))
        assert (result.text, result.finish_reason) == (whole, "length")

    def test_stop_token(self, llm):
        ids = llm.generate(PROMPTS[0], GREEDY).token_ids
        stop = ids[5]
        result = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,)))
        assert result.token_ids == ids[: ids.index(stop) + 1]
        assert result.text == llm.tokenizer.decode(ids[: ids.index(stop)])
        assert result.finish_reason == "stop"

    def test_end_token_and_ignore_eos(self, llm):
        eos = llm.tokenizer.eos_id
        force = {"max_tokens": 4, "temperature": 0, "logit_bias": {eos: 1e4}}
        assert llm.generate(PROMPTS[0], SamplingParams(**force)).token_ids == [eos]
        result = llm.generate(PROMPTS[0], SamplingParams(**force, ignore_eos=True))
        assert (result.token_ids, result.text, result.finish_reason) == ([eos] * 4, "", "length")

    def test_a_failing_draw_leaves_the_neighbours_alone(self, tiny):
        everything = dict.fromkeys(range(272), -math.inf)
        bad = tiny.stream([1, 2, 3], SamplingParams(max_tokens=4, logit_bias=everything))
        good = tiny.generate([1, 2, 3], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        assert len(good.token_ids) == 4
        with pytest.raises(InvalidRequestError, match="no token"):
            next(bad)
        assert tiny.active_requests == 0


class TestLimits:
    def test_no_limit_goes_on_until_the_context_is_full(self, tiny):
        result = tiny.generate([1, 2, 3], SamplingParams(temperature=0, ignore_eos=True))
        assert len(result.token_ids) == 64 - 3
        assert result.finish_reason == "length"

    def test_exactly_fitting_and_one_too_many(self, tiny):
        assert len(tiny.generate([1] * 60, SamplingParams(max_tokens=4, ignore_eos=True)).token_ids) == 4
        with pytest.raises(
            ContextFullError, match=r"65 tokens \(60 of the prompt, 5 to generate\) do not fit the context of 64"
        ) as caught:
            tiny.generate([1] * 60, SamplingParams(max_tokens=5))
        assert (caught.value.length, caught.value.limit) == (65, 64)
        for length in (64, 65, 1000):
            with pytest.raises(ContextFullError):
                tiny.generate([1] * length)
        assert len(tiny.generate([1] * 63, SamplingParams(ignore_eos=True)).token_ids) == 1

    def test_texts_that_are_too_long_in_any_case_are_not_cut_into_tokens(self, llm, monkeypatch):
        """Which would take seconds for every megabyte that a client sends."""
        monkeypatch.setattr(type(llm.tokenizer), "encode", lambda *_, **__: pytest.fail("the text was encoded"))
        text = "Once upon a time " * 100_000
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        for ask in (llm.generate, llm.stream, llm.add_request, llm.logits, llm.prompt_ids):
            with pytest.raises(ContextFullError, match=r"tokens \(at the least, of the prompt alone\) do not fit"):
                ask(text)
        chatty = LLM(device="cpu", threads=1, chat_template=template)
        with chatty, pytest.raises(ContextFullError, match="at the least"):
            chatty.chat([{"role": "user", "content": text}])

    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 63])
    def test_chunked_prompt_equals_whole_prompt(self, tiny, length):
        ids = np.random.default_rng(length).integers(0, 272, length).tolist()
        result = tiny.generate(ids, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=0))
        truth = log_softmax(tiny.logits(ids)[-1])
        assert result.logprobs[0].logprob == pytest.approx(truth.max(), abs=2e-3)

    def test_nothing_to_generate(self, llm):
        nothing = llm.generate("Once", SamplingParams(max_tokens=0))
        assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", [], "length")
        scored = llm.generate(PROMPTS[0], SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids)
        assert llm.generate([5], SamplingParams(max_tokens=0, prompt_logprobs=0)).token_ids == []

    def test_a_full_context_can_still_be_scored(self, tiny):
        scored = tiny.generate([1] * 64, SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert len(scored.prompt_logprobs) == 64
        with pytest.raises(ContextFullError, match="65 tokens"):
            tiny.generate([1] * 65, SamplingParams(max_tokens=0, prompt_logprobs=0))

    def test_the_token_behind_a_full_context_can_be_scored(self, tmp_path):
        """It is not fed, and so needs no place in a cache of one context."""
        path = tmp_path / "tiny.gguf"
        tiny_llama(path, context_length=64)
        with LLM(path, device="cpu", max_sequences=1) as model:
            (samples,) = model.score([[1] * 65])
        assert len(samples) == 64

    @pytest.mark.parametrize("prompt", [b"abc", None, 5, {"a": 1}, ["a", None], [b"abc"], ["a", {1: 2}]])
    def test_what_is_no_prompt(self, llm, prompt):
        with pytest.raises(InvalidRequestError, match="text or a list"):
            llm.generate(prompt, GREEDY)

    def test_what_can_be_a_list(self, llm):
        expected = llm.generate([1, 2, 3], GREEDY).token_ids
        for prompt in ((1, 2, 3), np.array([1, 2, 3]), iter([1, 2, 3])):
            assert llm.generate(prompt, GREEDY).token_ids == expected
        for prompts in ([(1, 2, 3)], np.array([[1, 2, 3]]), ([1, 2, 3] for _ in range(1))):
            assert [result.token_ids for result in llm.generate(prompts, GREEDY)] == [expected]
        assert llm.generate([], GREEDY) == []

    @pytest.mark.parametrize("params", [{"max_tokens": 3}, 5, [{"max_tokens": 3}], "greedy"])
    def test_what_is_no_params(self, llm, params):
        with pytest.raises(InvalidRequestError, match="SamplingParams"):
            llm.generate(["a"], params)

    def test_bad_prompts(self, llm):
        for prompt, words in (([4096], "0 to 4095"), ([-1], "-1"), ([1.5], "token ids"), ([1, "a"], "token ids")):
            with pytest.raises(InvalidRequestError, match=words):
                llm.generate(prompt, GREEDY)
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            llm.generate("a", SamplingParams(logit_bias={5000: 1.0}))

    def test_empty_prompt_is_the_beginning_of_text(self, llm):
        assert llm.generate("", GREEDY).prompt_token_ids == [llm.tokenizer.bos_id]

    def test_bad_settings(self):
        for settings in (
            {"device": "tpu"},
            {"kv_type": "q8"},
            {"context_length": 0},
            {"threads": 0},
            {"max_sequences": 0},
        ):
            with pytest.raises(InvalidRequestError):
                LLM(**settings)

    def test_missing_file(self, tmp_path):
        with pytest.raises(EngineError, match="nothing"):
            LLM(tmp_path / "nothing.gguf")


class TestThreadsAndEnds:
    def test_calls_from_many_threads_get_their_own_answers(self, llm):
        params = SamplingParams(max_tokens=10, seed=4)
        expected = {prompt: llm.generate(prompt, params).text for prompt in PROMPTS}
        failures = []

        def work(index):
            prompt = PROMPTS[index % len(PROMPTS)]
            for _ in range(2):
                if index % 2:
                    text = "".join(chunk.text for chunk in llm.stream(prompt, params))
                else:
                    text = llm.generate([prompt, prompt], params)[1].text
                if text != expected[prompt]:
                    failures.append((prompt, text))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert not failures
        assert llm.active_requests == 0

    def test_threads_share_one_batch(self, llm, monkeypatch):
        sizes = []
        step = llm._runner.step

        def slow_step(work):
            sizes.append(len(work))
            time.sleep(0.01)
            return step(work)

        monkeypatch.setattr(llm._runner, "step", slow_step)
        threads = [threading.Thread(target=llm.generate, args=(prompt, GREEDY)) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert max(sizes) == 4

    def test_more_requests_than_places(self, llm):
        results = llm.generate(PROMPTS * 3, SamplingParams(max_tokens=3, temperature=0))
        assert [result.text for result in results[:4]] == [result.text for result in results[8:]]

    def test_abandoned_streams_free_their_places(self, llm):
        never_started = llm.stream(PROMPTS[0], GREEDY)
        started = llm.stream(PROMPTS[1], GREEDY)
        next(started)
        closed = llm.stream(PROMPTS[2], GREEDY)
        next(closed)
        assert llm.active_requests == 3
        closed.close()
        del never_started, started
        gc.collect()
        assert llm.active_requests == 0
        assert list(closed) == []
        with llm.stream(PROMPTS[0]) as stream:
            next(stream)
        assert llm.active_requests == 0

    def test_cancelled_stream_keeps_what_there_is(self, llm):
        stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0))
        texts = [next(stream).text for _ in range(5)]
        stream.cancel()
        result = stream.result()
        assert result.finish_reason == "cancelled"
        assert result.text == "".join(texts)
        assert len(result.token_ids) == 5

    def test_cancel_by_id(self, llm):
        request_id = llm.add_request(PROMPTS[0], SamplingParams(temperature=0))
        llm.step()
        llm.cancel(request_id)
        chunks = llm.step()
        assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]
        assert llm.active_requests == 0
        llm.cancel(request_id)
        llm.cancel(123456)

    def test_a_failing_step_is_delivered_and_survived(self, llm, monkeypatch):
        stream = llm.stream(PROMPTS[0], GREEDY)
        first = next(stream)
        monkeypatch.setattr(llm._runner, "step", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
        assert stream.text == first.text
        with pytest.raises(ZeroDivisionError) as caught:
            llm.generate(PROMPTS, GREEDY)
        assert caught.value.partial_results == []
        llm.add_request(PROMPTS[0], GREEDY)
        with pytest.raises(ZeroDivisionError):
            llm.step()
        monkeypatch.undo()
        assert llm.active_requests == 0
        assert llm.generate(PROMPTS[0], GREEDY).text.startswith(first.text)

    def test_an_interrupted_step_is_repeated(self, llm, monkeypatch):
        """Ctrl-C in the middle of a step that also serves another request: the other's text is not changed by it."""
        expected = llm.generate(PROMPTS[1], GREEDY).text
        other = llm.stream(PROMPTS[1], GREEDY)
        next(other)
        interrupted = llm.stream(PROMPTS[0], GREEDY)
        step = llm._runner.step

        def interrupting(work):
            step(work)
            raise KeyboardInterrupt

        monkeypatch.setattr(llm._runner, "step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            next(interrupted)
        monkeypatch.undo()
        interrupted.cancel()
        assert interrupted.result().finish_reason == "cancelled"
        assert other.result().text == expected

    def test_closing_ends_everything(self):
        model = LLM(device="cpu", threads=1)
        stream = model.stream(PROMPTS[0])
        next(stream)
        model.close()
        model.close()
        with pytest.raises(EngineError, match="closed"):
            next(stream)
        with pytest.raises(EngineError, match="closed"):
            model.generate(PROMPTS[0])
        with pytest.raises(EngineError, match="closed"):
            model.step()


class TestTokenizerAndChat:
    def test_model_without_tokenizer_works_with_ids(self, tmp_path):
        path = tmp_path / "bare.gguf"
        path.write_bytes(tiny_llama(tokenizer=False))
        with LLM(path, device="cpu", threads=1) as model:
            result = model.generate([1, 2, 3], SamplingParams(max_tokens=4, temperature=0))
            assert (len(result.token_ids), result.text) == (4, "")
            with pytest.raises(TokenizerError, match="token ids"):
                model.generate("text")
            with pytest.raises(TokenizerError):
                model.generate([1], SamplingParams(stop="a"))
            with pytest.raises(InvalidRequestError, match="empty"):
                model.stream([])

    def test_model_with_a_malformed_tokenizer_works_with_ids(self, tmp_path):
        metadata, tensors = tiny_llama_parts()
        path = tmp_path / "odd.gguf"
        for key, value in (("model", np.array([1, 2])), ("eos_token_id", np.array([0.5])), ("merges", ["a"])):
            path.write_bytes(build_gguf(metadata | {f"tokenizer.ggml.{key}": value}, tensors))
            with LLM(path, device="cpu", threads=1) as model:
                assert len(model.generate([1, 2, 3], SamplingParams(max_tokens=2)).token_ids) == 2
                with pytest.raises(TokenizerError, match=key):
                    model.generate("text")

    def test_tokenizer_alone(self):
        tokenizer = engine.load_tokenizer(engine.api.llm.BUNDLED_MODEL)
        ids = tokenizer.encode("Once upon a time", add_special=False)
        assert tokenizer.decode(ids) == "Once upon a time"

    def test_chat_renders_the_template(self):
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
        with LLM(device="cpu", threads=1, chat_template=template) as model:
            messages = [{"role": "user", "content": "Tell me a story."}]
            result = model.chat(messages, GREEDY)
            assert result.prompt_token_ids == model.tokenizer.encode("user: Tell me a story.\nassistant:")
            assert result.text == model.stream_chat(messages, GREEDY).result().text

    def test_no_template(self, llm):
        with pytest.raises(InvalidRequestError, match=r"^tales-Q4_K_M\.gguf holds no chat template"):
            llm.chat([{"role": "user", "content": "hi"}])


class TestScores:
    def test_logits_shape_and_type(self, llm):
        logits = llm.logits([1, 2, 3])
        assert (logits.shape, logits.dtype) == ((3, 4096), np.float32)
        with pytest.raises(ContextFullError):
            llm.logits([1] * 1025)

    def test_perplexity_by_hand(self, llm):
        text = " ".join(["Once upon a time there was a little fox who lived in a deep dark wood."] * 8)
        context = 32
        ids = llm.tokenizer.encode(text)
        total, count = 0.0, 0
        for start in range(0, len(ids) // context * context, context):
            chunk = [llm.tokenizer.bos_id, *ids[start + 1 : start + context]]
            truth = log_softmax(llm.logits(chunk))
            for position in range(context // 2 + 1, context):
                total -= truth[position - 1, chunk[position]]
                count += 1
        assert llm.perplexity(text, context=context) == pytest.approx(math.exp(total / count), rel=1e-4)

    def test_broken_weights_have_no_perplexity(self, tmp_path):
        data = bytearray(tiny_llama(context_length=64))
        path = tmp_path / "broken.gguf"
        path.write_bytes(data)
        with open_gguf(path) as file:
            norm = file.tensors["output_norm.weight"]
        data[norm.offset : norm.offset + norm.n_bytes] = np.full(norm.n_elements, np.nan, np.float32).tobytes()
        path.write_bytes(data)
        with LLM(path, device="cpu", threads=1) as model:
            with pytest.raises(EngineError, match="NaN"):
                list(model.score([[1, 2, 3]]))
            with pytest.raises(EngineError, match="NaN"):
                model.generate([1, 2, 3], GREEDY)

    def test_perplexity_refusals(self, llm):
        with pytest.raises(InvalidRequestError, match="one chunk"):
            llm.perplexity("too short")
        with pytest.raises(ContextFullError):
            llm.perplexity("a " * 5000, context=2048)
        with pytest.raises(InvalidRequestError, match="at least 4"):
            llm.perplexity("a", context=2)


class TestDevices:
    def test_cuda_by_name_says_what_is_missing(self, monkeypatch):
        monkeypatch.setattr("engine.cuda.availability", lambda index=0: "CuPy is not installed: pip install it")
        with pytest.raises(DeviceError, match="pip install"):
            LLM(device="cuda")

    def test_auto_without_a_trace_of_a_gpu_is_silent(self, monkeypatch, caplog):
        monkeypatch.setattr("engine.runner.devices._GPU_TRACES", ("/nonexistent",))
        monkeypatch.setattr("engine.cuda.availability", lambda index=0: pytest.fail("asked for nothing"))
        with LLM(device="auto", threads=1) as model:
            assert model.device == "cpu"
        assert not caplog.records

    def test_auto_with_a_gpu_that_cannot_be_used_says_so_once(self, monkeypatch, caplog):
        monkeypatch.setattr("engine.runner.devices._GPU_TRACES", ("/",))
        monkeypatch.setattr("engine.cuda.availability", lambda index=0: "the driver is too old")
        with LLM(device="auto", threads=1) as model:
            assert model.device == "cpu"
        assert [record.getMessage() for record in caplog.records] == ["running on the CPU: the driver is too old"]

    def test_longer_context_than_trained_is_allowed_and_logged(self, caplog):
        with LLM(device="cpu", threads=1, context_length=2048) as model:
            assert model.context_length == 2048
        assert "trained" in caplog.text
