"""What a template writes for an assistant's message is read as the model's answer, put back, and written again: equal.

Templates of our own for every form; with GGUF_ENGINE_CHAT_TEMPLATES, a folder of *.jinja files, those of real models.
"""

import os
from pathlib import Path

import pytest

from engine.errors import InvalidRequestError
from engine.text import ChatTemplate
from engine.text.answers.call_records import FORMS, GENERIC
from tests.support.chats.form_templates import template_of
from tests.support.chats.round_trip import MESSAGES, TOOLS, round_trip, text_trip

FOLDER = os.environ.get("GGUF_ENGINE_CHAT_TEMPLATES")
OFFICIAL = sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else []


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_own_templates(form):
    template = ChatTemplate(template_of(form))
    assert template.call_form(tools=TOOLS) == form
    for name, answer in MESSAGES.items():
        if len(answer["tool_calls"]) > 1 and not form.several:
            continue
        if (form.opens or not form.begin) and answer["content"]:
            continue  # text before calls is a message of its own there, or makes them text
        for size in (1, 4, 1000):
            trip = round_trip(template, answer, size)
            assert trip.second == trip.first, name
            assert len(trip.calls) == len(answer["tool_calls"]), name


@pytest.mark.skipif(not OFFICIAL, reason="GGUF_ENGINE_CHAT_TEMPLATES names no folder with chat templates")
@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: path.stem)
def test_official_templates(path):
    template = ChatTemplate(path.read_text(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    form = template.call_form(tools=TOOLS)
    tried = 0
    for name, answer in MESSAGES.items():
        try:
            trip = round_trip(template, answer) if template.takes_calls() else text_trip(template, form, answer)
        except InvalidRequestError as error:
            if "template" not in str(error):
                raise
            continue  # the template's own refusal
        if (path.stem, name) not in PECULIAR and path.stem not in UNCOMPARED:
            assert trip.second == trip.first, name
            tried += 1
    assert tried or path.stem in UNCOMPARED or form is GENERIC


PECULIAR = {
    # These write a text that comes with calls behind them, as a second answer.
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "text before"),
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "text before"),
    ("llama-cpp-deepseek-r1", "text before"),
    # Answers in its history begin with a space that its prompt does not have.
    ("Reka-Edge", "text before"),
}
UNCOMPARED = {
    "fireworks-ai-llama-3-firefunction-v2": "wants its tools under another name",
    "google-gemma-2-2b-it": "has no role for results",
    "CohereForAI-c4ai-command-r-plus-tool_use": "asks for actions in a turn that its history does not have",
}
