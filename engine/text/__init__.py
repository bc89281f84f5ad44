"""Text and token ids: tokenizer, incremental decoding, chat templates. Knows nothing of models or devices."""

from engine.text.answer_reader import AnswerReader
from engine.text.chat_prompt import ChatPrompt, chat_prompt
from engine.text.chat_template import ChatTemplate
from engine.text.control_stops import ControlStops
from engine.text.incremental import IncrementalDecoder
from engine.text.tokenizer import Tokenizer

__all__ = [
    "AnswerReader",
    "ChatPrompt",
    "ChatTemplate",
    "ControlStops",
    "IncrementalDecoder",
    "Tokenizer",
    "chat_prompt",
]
