"""Text to token ids and back: the vocabulary, one algorithm per kind, special tokens, decoding one id at a time."""

from engine.text.tokenizers.control_stops import ControlStops
from engine.text.tokenizers.incremental import IncrementalDecoder
from engine.text.tokenizers.tokenizer import Tokenizer

__all__ = ["ControlStops", "IncrementalDecoder", "Tokenizer"]
