"""Decoding token by token equals decoding at once, and never shows half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.text import IncrementalDecoder
from tests.support.vocabularies import BPE, SPM, SPM_PLAIN


def test_a_character_appears_with_its_last_byte():
    ids = BPE.encode("é😀")
    decoder = IncrementalDecoder(BPE)
    assert [decoder.push(id) for id in ids] == ["", "é", "", "", "", "😀"]
    assert decoder.finish() == ""


def test_invalid_bytes_are_replaced_once_certain():
    first, letter = BPE.encode("😀")[0], BPE.token_id("x")
    decoder = IncrementalDecoder(BPE)
    assert decoder.push(first) == ""
    assert decoder.push(letter) == "\ufffdx"
    assert decoder.push(first) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(letter) == "x"


@pytest.mark.parametrize("tokenizer", [BPE, SPM, SPM_PLAIN], ids=["bpe", "spm", "spm-plain"])
def test_parts_joined_equal_the_whole(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), st.booleans(), st.booleans())
    def check(ids, skip_special, continuation):
        decoder = IncrementalDecoder(tokenizer, skip_special=skip_special, continuation=continuation)
        parts = [decoder.push(id) for id in ids]
        whole = tokenizer.decode(ids, skip_special=skip_special, continuation=continuation)
        assert "".join(parts) + decoder.finish() == whole

    check()


def test_the_space_prefix_goes_at_the_start_only():
    ids = SPM.encode("a a", add_special=False)
    decoder = IncrementalDecoder(SPM)
    assert [decoder.push(id) for id in ids] == ["a", " a"]
    decoder = IncrementalDecoder(SPM, continuation=True)
    assert [decoder.push(id) for id in ids] == [" a", " a"]


def test_control_tokens_are_left_out_unless_asked_for():
    end = BPE.token_id("<|im_end|>")
    assert IncrementalDecoder(BPE).push(end) == ""
    assert IncrementalDecoder(BPE, skip_special=False).push(end) == "<|im_end|>"
    with pytest.raises(InvalidRequestError):
        IncrementalDecoder(BPE).push(10**6)
