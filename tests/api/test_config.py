"""One EngineConfig, taken whole or made from keywords."""

import dataclasses
import inspect
import typing

import pytest

import engine
from engine import LLM, EngineConfig, InvalidRequestError
from engine.api.llm import BUNDLED_MODEL
from engine.config import EngineSettings

SMALL = {"context_length": 64, "threads": 1, "max_sequences": 2}
STORY = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_keywords_are_the_fields_of_a_config():
    fields = {one.name: one.type for one in dataclasses.fields(EngineConfig)}
    assert list(fields)[:2] == ["model", "device"]
    assert list(fields)[2:] == list(EngineSettings.__annotations__)
    hints, keywords = typing.get_type_hints(EngineConfig), typing.get_type_hints(EngineSettings)
    assert {name: hints[name] for name in keywords} == keywords
    given = inspect.signature(LLM).parameters
    assert list(given) == ["model", "device", "config", "status", "settings"]
    assert "EngineConfig" in engine.__all__


def test_all_ways_to_open_a_model_are_the_same():
    wanted = EngineConfig(BUNDLED_MODEL, "cpu", **SMALL, chat_template=STORY)
    for opened in (
        lambda: LLM(BUNDLED_MODEL, "cpu", **SMALL, chat_template=STORY),
        lambda: LLM(None, "cpu", **SMALL, chat_template=STORY),
        lambda: LLM(str(BUNDLED_MODEL), device="cpu", **SMALL, chat_template=STORY),
        lambda: LLM(wanted),
        lambda: LLM(config=wanted),
        lambda: LLM(EngineConfig(device="cpu", **SMALL, chat_template=STORY)),
        lambda: LLM(config=EngineConfig(context_length=32, chat_template=STORY), device="cpu", **SMALL),
        lambda: LLM(BUNDLED_MODEL, config=EngineConfig("other.gguf", "cpu", **SMALL, chat_template=STORY)),
    ):
        with opened() as llm:
            assert llm.config == wanted
            assert (llm.context_length, llm.threads, llm.max_sequences) == (64, 1, 2)
            assert llm.render_chat([{"role": "user", "content": "abc"}]) == llm.prompt_ids("abc")


def test_wrong_settings_are_refused():
    with pytest.raises(InvalidRequestError, match="two configs"):
        LLM(EngineConfig(), config=EngineConfig())
    with pytest.raises(InvalidRequestError, match="threads is 0"):
        LLM(config=EngineConfig(), threads=0)
    with pytest.raises(TypeError, match="colour"):
        LLM(colour="red")
