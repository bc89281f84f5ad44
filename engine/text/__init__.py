"""Text and token ids: tokenizer, incremental decoding, chat templates. Knows nothing of models or devices."""

from engine.text.chat_template import ChatTemplate
from engine.text.incremental import IncrementalDecoder
from engine.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDecoder", "Tokenizer"]
