"""Text and token ids: tokenizers, chat templates, structure in answers. Independent of models and devices."""

from engine.text.answers.call_forms import form_named
from engine.text.answers.reader import AnswerReader
from engine.text.answers.rules import AnswerRules
from engine.text.chat_prompt import ChatPrompt, chat_prompt
from engine.text.templates.chat_template import ChatTemplate
from engine.text.tokenizers import ControlStops, IncrementalDecoder, Tokenizer

__all__ = [
    "AnswerReader",
    "AnswerRules",
    "ChatPrompt",
    "ChatTemplate",
    "ControlStops",
    "IncrementalDecoder",
    "Tokenizer",
    "chat_prompt",
    "form_named",
]
