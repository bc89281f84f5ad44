"""Constraints of chats begin behind what the model thinks: scripted models say what is allowed and what is not."""

import json

import pytest

from engine import LLM, Choice, InvalidRequestError, JsonSchema, Regex
from engine import SamplingParams as Params
from engine.constraints import ConstraintCompiler
from engine.sampling.opening import Opening, Thought
from engine.text.answers.formats import PLAIN, choose_format
from engine.text.answers.openings import opening_of
from tests.support.masks import allows
from tests.support.models.scripted_model import scripted_llama

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}
ASKED = [{"role": "user", "content": "Hi"}]
USER = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
WRITES = USER + "{# <think> </think> <tool_call> </tool_call> #}<a>"
OPENS = USER + "<a>{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{# </think> #}"
CLOSES = USER + "<a><think>\n\n</think>\n\n"
COMMAND = USER + "{# <|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|> #}<a>"
HARMONY = USER + "{# <|channel|>analysis<|message|> #}<|start|>assistant"
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|return|>", "<|call|>")
COMMAND_TOKENS = ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
GREEDY = Params(constraint=JsonSchema(SCHEMA), temperature=0, max_tokens=60)
INSIDE = '{"a": "</think> <tool_call> [x]"}'

SAYS = [
    # template, control tokens, what the model wants to say, its reasoning, its text
    (WRITES, (), ["<think>", "Hm {", " no.", "</think>", '{"a": ', '"b"}'], "Hm { no.", {"a": "b"}),
    (WRITES, (), ["<th", "ink>Hm", ".</th", 'ink>\n\n{"a"', ': "b"}'], "Hm.", {"a": "b"}),
    (WRITES, ("<think>", "</think>"), ["<think>", "\nHm\n", "</think>", "\n\n", '{"a":"b"}'], "Hm", {"a": "b"}),
    (WRITES, (), ['{"a":', '"<think>x</think>"}'], "", {"a": "<think>x</think>"}),
    (WRITES, (), ["<think>Hm</think>", INSIDE], "Hm", json.loads(INSIDE)),
    (OPENS, (), ["Hm", "</thi", "nk>", '{"a":"b"}'], "Hm", {"a": "b"}),
    (OPENS, (), ["</think>", '{"a":"b"}', "more"], "", {"a": "b"}),
    (CLOSES, (), ['{"a":"', "<think>", '"}'], "", {"a": "<think>"}),
    (
        COMMAND,
        COMMAND_TOKENS,
        ["<|START_THINKING|>", "Hm", "<|END_THINKING|>", "<|START_RESPONSE|>", '{"a":"b"}', "<|END_RESPONSE|>"],
        "Hm",
        {"a": "b"},
    ),
    (
        HARMONY,
        HARMONY_TOKENS,
        ["<|channel|>", "analysis", "<|message|>", "Hm {", "<|end|>"],  # the mask then spells the final message's head
        "Hm {",
        None,
    ),
]


@pytest.mark.parametrize(("template", "control", "answer", "reasoning", "value"), SAYS, ids=range(len(SAYS)))
def test_the_constraint_begins_behind_the_thought(tmp_path, template, control, answer, reasoning, value):
    path = scripted_llama(tmp_path / "m.gguf", answer, control=control, template=template)
    with LLM(path, device="cpu", threads=1) as llm:
        result = llm.chat(ASKED, GREEDY)
        chunks = list(llm.stream_chat(ASKED, GREEDY))
    assert result.reasoning.strip() == reasoning
    if value is not None:
        assert result.finish_reason == "stop"
        assert json.loads(result.text) == value
    assert not result.tool_calls
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning


REFUSES = [
    # the model ends inside its thought, answers with text, begins a second thought behind the first
    (OPENS, ["Hm"]),
    (WRITES, ["no JSON"]),
    (OPENS, ["Hm</think>", "<think>"]),
    (CLOSES, ["<think>"]),
]


@pytest.mark.parametrize(("template", "answer"), REFUSES, ids=range(len(REFUSES)))
def test_what_the_model_wants_otherwise_is_never_drawn(tmp_path, template, answer):
    path = scripted_llama(tmp_path / "m.gguf", answer, template=template)
    with LLM(path, device="cpu", threads=1) as llm:
        params = Params(constraint=Choice(["yes", "no"]), temperature=1.5, top_k=0, min_p=0, seed=3, max_tokens=300)
        result = llm.chat(ASKED, params)
    assert (result.text, result.finish_reason) in ([("yes", "stop"), ("no", "stop"), ("", "length")])


def test_a_thought_that_the_template_opens_on_request_is_not_begun_unasked(tmp_path):
    path = scripted_llama(tmp_path / "m.gguf", ["<think>", "Hm</think>", "yes"], template=OPENS)
    with LLM(path, device="cpu", threads=1) as llm:
        params = Params(constraint=Regex("yes"), temperature=0, max_tokens=30)
        assert llm.chat_prompt(ASKED, enable_thinking=False).opening() is None
        result = llm.chat(ASKED, params, enable_thinking=False)
        assert (result.text, result.reasoning) == ("yes", "")
        assert llm.chat_prompt(ASKED).opening() == Opening(opened=("</think>",))


@pytest.mark.parametrize("template", [WRITES, OPENS], ids=["writes", "opens"])
def test_a_limited_thought_ends_before_a_constrained_text(tmp_path, template):
    thought = [f"hm{number} " for number in range(100)]
    answer = [*([] if template == OPENS else ["<think>"]), *thought]
    path = scripted_llama(tmp_path / "m.gguf", answer, template=template, endless=True)
    with LLM(path, device="cpu", threads=1) as llm:
        params = Params(constraint=Choice(["yes"]), temperature=0, max_tokens=60)
        assert llm.chat(ASKED, params).finish_reason == "length"
        for given, most in (({"max_reasoning_tokens": 6}, 6), ({"reasoning_effort": "none"}, 0)):
            result = llm.chat(ASKED, params, **given)
            assert (result.text, result.finish_reason) == ("yes", "stop")
            assert result.reasoning.count("hm") <= most
            assert result.reasoning or not most


def test_gpt_oss_answers_in_their_final_channel(tmp_path):
    answer = ["Hm", "<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "yes"]
    template = HARMONY + "<|channel|>analysis<|message|>"
    path = scripted_llama(tmp_path / "m.gguf", answer, control=HARMONY_TOKENS, template=template)
    with LLM(path, device="cpu", threads=1) as llm:
        result = llm.chat(ASKED, Params(constraint=Choice(["yes"]), temperature=0, max_tokens=40))
    assert (result.text, result.finish_reason) == ("yes", "stop")
    assert result.reasoning.endswith("Hm")


def test_whole_answers_of_gpt_oss(tmp_path):
    """Every token of an answer may be drawn in turn, or one of them may not."""
    path = scripted_llama(tmp_path / "m.gguf", ["x"], control=HARMONY_TOKENS, template=HARMONY)
    with LLM(path, device="cpu", threads=1) as llm:
        opening, tokenizer = llm.chat_prompt(ASKED).opening(), llm.tokenizer
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eog_ids)
    thought = "<|channel|>analysis<|message|>Hm.\n<|end|><|start|>assistant"
    final, other = "<|channel|>final<|message|>", "<|channel|>commentary<|message|>"
    for answer, may in [
        (f"{final}yes", True),
        (f"{thought}{final}yes", True),
        (f"{thought}{thought}<|channel|>final <|constrain|>json<|message|>yes", True),
        (f"{thought}{final}maybe", False),
        (f"{thought}{other}yes", False),
        (thought, False),
        ("yes", False),
    ]:
        mask, ids = compiler.mask(Choice(["yes"]), opening), tokenizer.encode(answer, add_special=False)
        drawn = all(allows(mask.bits(ids[:done]), token_id) for done, token_id in enumerate(ids))
        assert (drawn and mask.is_complete(ids)) == may, answer


def test_answers_with_other_headers_refuse_constraints(tmp_path):
    path = scripted_llama(tmp_path / "m.gguf", ["x"], template=USER + "{# >>>all\n #}>>>")
    with LLM(path, device="cpu", threads=1) as llm:
        with pytest.raises(InvalidRequestError, match="headers"):
            llm.chat(ASKED, GREEDY)
        assert llm.active_requests == 0


def test_openings_of_prompts():
    think = Thought("<think>", ("</think>",))
    plain = choose_format("<think></think>")
    assert opening_of(PLAIN, "x", begins_thoughts=True) is None
    assert opening_of(plain, "<a>", begins_thoughts=True) == Opening(thoughts=(think,))
    assert opening_of(plain, "<a>", begins_thoughts=False) is None
    assert opening_of(plain, "<a><think>\n", begins_thoughts=False) == Opening(opened=("</think>",))
    assert opening_of(plain, "<a><think>\n\n</think>\n", begins_thoughts=True) is None
    harmony = choose_format(HARMONY)
    final = "<|start|>assistant<|channel|>final<|message|>Well"
    assert opening_of(harmony, final, begins_thoughts=True) is None
    opened = opening_of(harmony, "<|start|>assistant<|channel|>analysis<|message|>", begins_thoughts=True)
    assert opened.opened
    assert opened.in_messages
