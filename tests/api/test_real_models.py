"""Published models against llama.cpp: tokens, greedy text, probabilities and a conversation, in float32 throughout."""

import json
import os
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from tests.support.peers.real_models import CHAT, CHATTING, FILES, PROMPT, REFERENCES, TEXT

VARIABLE = "GGUF_ENGINE_REAL_MODELS"
pytestmark = pytest.mark.real


@pytest.fixture(params=FILES)
def model(request):
    """(model, what llama.cpp gave for it)."""
    folder = Path(os.environ.get(VARIABLE, ""))
    path = folder / request.param
    if not os.environ.get(VARIABLE) or not path.is_file():
        pytest.skip(f"no {request.param}: the package {FILES[request.param]} holds it; {VARIABLE} names its folder")
    reference = json.loads(REFERENCES.read_text(encoding="utf-8"))["models"][request.param]
    with LLM(path, "cpu", context_length=512, kv_type="f32", exact=True) as llm:
        yield llm, reference


def test_greedy_text(model):
    llm, reference = model
    wanted = reference["greedy"]
    assert llm.prompt_ids(PROMPT) == reference["prompt"]
    found = llm.generate(PROMPT, SamplingParams(max_tokens=len(wanted), temperature=0, ignore_eos=True))
    assert list(found.token_ids) == wanted


def test_probabilities_of_a_text(model):
    llm, reference = model
    assert llm.prompt_ids(TEXT) == reference["text"]
    (tokens,) = llm.score([reference["text"]])
    mean = sum(token.logprob for token in tokens) / len(tokens)
    assert mean == pytest.approx(reference["mean_log_probability"], rel=1e-5)


@pytest.mark.parametrize("model", CHATTING, indirect=True)
def test_conversation(model):
    llm, reference = model
    wanted = reference["answer"]
    assert llm.render_chat(CHAT) == reference["chat"]
    answer = llm.chat(CHAT, SamplingParams(max_tokens=len(wanted), temperature=0, ignore_eos=True))
    assert list(answer.token_ids) == wanted
