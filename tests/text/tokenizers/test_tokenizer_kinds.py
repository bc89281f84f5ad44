"""WordPiece, Unigram, BPE over characters, longest match and best spelling, against their definitions."""

import re
import struct
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.text import IncrementalDecoder, Tokenizer
from engine.text.tokenizers.longest_match import unescape
from engine.text.tokenizers.unigram import CharacterMap
from tests.support.models.gguf_builder import bpe_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
any_text = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab c\n\t<|>'é漢😀9")))


def metadata(kind, pieces, **keys):
    """Metadata of (token, type, score) triples."""
    tokens, types, scores = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def build(kind, pieces, **keys):
    return Tokenizer.from_metadata(metadata(kind, pieces, **keys))


def names(tokenizer, ids):
    return [tokenizer._vocabulary.tokens[id] for id in ids]


# ---------------------------------------------------------------------------------------------------------- WordPiece


def wordpiece(**keys):
    words = ["▁un", "aff", "able", "▁a", "▁able", "a", "b", "▁!", "▁漢", "▁字", "▁É", "▁e"]
    pieces = [(name, CONTROL, 0) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] + [(w, NORMAL, 0) for w in words]
    return build("bert", pieces, unknown_token_id=1, bos_token_id=2, seperator_token_id=3, padding_token_id=0, **keys)


def test_wordpiece_takes_the_longest_piece_of_each_word():
    tokenizer = wordpiece()
    assert tokenizer.kind == "WordPiece"
    assert names(tokenizer, tokenizer.encode("UNaffable  able!\n漢字")) == [
        "[CLS]", "▁un", "aff", "able", "▁able", "▁!", "▁漢", "▁字", "[SEP]",
    ]  # fmt: skip
    assert names(tokenizer, tokenizer.encode("unx é", add_special=False)) == ["[UNK]", "▁e"]
    assert tokenizer.decode(tokenizer.encode("unaffable able!")) == "unaffable able !"
    # An endless word takes linear time.
    assert len(tokenizer.encode("ab" * 100_000, add_special=False)) == 200_000


def test_a_separator_ends_a_text_of_wordpiece_alone():
    """ModernBERT's files ask for BOS, EOS and SEP, of which EOS and SEP are one token; RoBERTa's name no SEP flag."""
    flags = {"add_bos_token": True, "add_eos_token": True, "add_sep_token": True, "seperator_token_id": 271}
    plain = bpe_tokenizer() | {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    modern = Tokenizer.from_metadata(plain)
    assert (modern.encode("a"), modern.add_sep) == ([270, 97, 271], True)
    roberta = dict(plain) | {"tokenizer.ggml.pre": "roberta-bpe"}
    del roberta["tokenizer.ggml.add_sep_token"]
    assert Tokenizer.from_metadata(roberta).add_sep


def test_wordpiece_keeps_case_and_accents_where_the_file_says_so():
    cased = wordpiece(**{"normalizer.lowercase": False})
    assert names(cased, cased.encode("É UN", add_special=False)) == ["▁É", "[UNK]"]
    both = wordpiece(**{"normalizer.lowercase": False, "normalizer.strip_accents": True})
    assert names(both, both.encode("é", add_special=False)) == ["▁e"]


# ------------------------------------------------------------------------------------------------------------ Unigram

UNIGRAM_HEAD = [("<pad>", CONTROL, 0), ("</s>", CONTROL, 0), ("<unk>", UNKNOWN, 0)]


def highest_score(text, scores, unknown):
    """The definition: the best sum over all ways to cut the text, by trying them all."""

    @cache
    def best(start):
        if start == len(text):
            return 0.0
        ways = [
            scores[text[start:end]] + best(end) for end in range(start + 1, len(text) + 1) if text[start:end] in scores
        ]
        if text[start] not in scores:
            ways.append(unknown + best(start + 1))
        return max(ways)

    return best(0)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abc x", max_size=12),
    st.dictionaries(st.text(alphabet="abc▁", min_size=1, max_size=4), st.floats(-9, -1, width=32), max_size=12),
)
def test_unigram_is_the_most_probable_spelling(text, scores):
    scores = {piece: float(np.float32(score)) for piece, score in scores.items()}
    pieces = UNIGRAM_HEAD + [(piece, NORMAL, score) for piece, score in scores.items()] + [("yy", NORMAL, -9.5)]
    tokenizer = build("t5", pieces, add_space_prefix=False, unknown_token_id=2)
    lowest = min(*scores.values(), -9.5) if scores else -9.5
    text = text.replace(" ", "▁")
    spelling = names(tokenizer, tokenizer.encode(text.replace("▁", " "), add_special=False))
    # Spellings may tie, so it is the score that is compared; neighbouring unknown characters share one token.
    pattern = "".join("(.+)" if piece == "<unk>" else re.escape(piece) for piece in spelling)
    assert re.fullmatch(pattern, text)
    known = [piece for piece in spelling if piece != "<unk>"]
    n_unknown = len(text) - sum(map(len, known))
    score = sum(scores[piece] for piece in known) + n_unknown * (lowest - 10)
    assert score == pytest.approx(highest_score(text, scores, lowest - 10), abs=1e-4)
    assert all(a != "<unk>" or b != "<unk>" for a, b in pairwise(spelling))


def test_unigram_spaces_and_ends():
    pieces = [*UNIGRAM_HEAD, ("▁", NORMAL, -2), ("a", NORMAL, -2), ("▁a", NORMAL, -1), ("<u>", USER, 0)]
    merged = build("t5", pieces, add_space_prefix=True, remove_extra_whitespaces=True)
    assert names(merged, merged.encode("  a   a ")) == ["▁a", "▁a", "</s>"]
    kept = build("t5", pieces, add_space_prefix=True)
    assert names(kept, kept.encode("a  a", add_special=False)) == ["▁a", "▁", "▁a"]
    assert kept.decode(kept.encode("a  a")) == "a  a"
    assert kept.decode(kept.encode("a<u>a")) == "a<u>a"


def double_array(table):
    """SentencePiece's table of replacements for a dict of keys, in the layout CharacterMap documents."""
    units, replacements, bases = [0], b"", set()
    nodes = {b""} | {key.encode()[:end] for key in table for end in range(1, len(key.encode()) + 1)}

    def place(prefix, index):
        children = sorted({node[len(prefix)] for node in nodes if len(node) == len(prefix) + 1 and node[:-1] == prefix})
        value = next((key for key in table if key.encode() == prefix), None)
        labels = ([0] if value is not None else []) + children
        if not labels:
            return
        # No two nodes share a place for their children: a label alone tells whose child a unit is.
        free = (o for o in range(1, 1 << 21) if index ^ o not in bases)
        offset = next(o for o in free if all(not taken(index ^ o ^ label) for label in labels))
        bases.add(index ^ offset)
        units[index] |= offset << 10 | (0x100 if value is not None else 0)
        for label in labels:
            units[index ^ offset ^ label] = label if label else values[value] | 1 << 31
        for label in children:
            place(prefix + bytes([label]), index ^ offset ^ label)

    def taken(index):
        units.extend([0] * (index + 1 - len(units)))
        return index == 0 or units[index] != 0

    values = {}
    for key, replacement in table.items():
        values[key] = len(replacements)
        replacements += replacement.encode() + b"\0"
    place(b"", 0)
    units.extend([0] * 256)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements + b"\0\0\0\0"


letters = st.text(alphabet="abéñ\u0301漢 ", min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(letters, st.text(alphabet="xyß ", max_size=2), min_size=1, max_size=8), st.text("abcéñ\u0301漢 ")
)
def test_character_map_replaces_the_longest_key(table, text):
    expected, place = "", 0
    while place < len(text):
        key = max((key for key in table if text.startswith(key, place)), key=len, default="")
        expected += table[key] if key else text[place]
        place += len(key) or 1
    assert CharacterMap(double_array(table)).apply(text) == expected


def test_unigram_applies_the_map_but_not_to_its_own_tokens():
    blob = np.frombuffer(double_array({"A": "a", "\t": " "}), np.uint8)
    pieces = [*UNIGRAM_HEAD, ("▁", NORMAL, -2), ("a", NORMAL, -2), ("<A>", USER, 0)]
    tokenizer = build("t5", pieces, add_space_prefix=False, precompiled_charsmap=blob)
    assert names(tokenizer, tokenizer.encode("A\t<A>A", add_special=False)) == ["a", "▁", "<A>", "a"]


@pytest.mark.parametrize("blob", [b"", b"\x08", b"\x05\0\0\0" + b"\0" * 60, b"\xff\xff\xff\x7f" + b"\0" * 60])
def test_a_damaged_map_is_refused(blob):
    with pytest.raises(TokenizerError, match="damaged"):
        CharacterMap(blob)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=16, max_size=200), st.text(max_size=8))
def test_random_maps_never_crash(data, text):
    size = len(data) // 2 // 4 * 4
    try:
        CharacterMap(struct.pack("<I", size) + data).apply(text)
    except TokenizerError:
        return


# ------------------------------------------------------------------------------------------------ BPE over characters

GEMMA_TOKENS = ["▁", "a", "b", "▁a", "ab", "\n", "\n\n", "▁▁", "<pad>", "<bos>", "<|turn>"]


def characters(kind="gemma4", merges=("▁ a", "a b", "▁ ▁"), **keys):
    types = [NORMAL] * 8 + [CONTROL] * 3
    pieces = [(t, k, 0) for t, k in zip(GEMMA_TOKENS, types, strict=True)] + [(byte, BYTE, 0) for byte in BYTES]
    return build(kind, pieces, merges=list(merges), bos_token_id=9, eos_token_id=8, **keys)


def test_bpe_over_characters():
    tokenizer = characters()
    assert tokenizer.add_bos
    assert names(tokenizer, tokenizer.encode("ab a  b\n\nü")) == [
        "<bos>", "ab", "▁a", "▁▁", "b", "\n\n", "<0xC3>", "<0xBC>",
    ]  # fmt: skip
    assert names(tokenizer, tokenizer.encode("\n\n\n", add_special=False)) == ["\n", "\n", "\n"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"
    # The same algorithm under another name in tokenizer.ggml.pre.
    other = characters("gpt2", pre="sarvam-moe", add_bos_token=False)
    assert names(other, other.encode("\n\na ")) == ["\n", "\n", "a", "▁"]


@settings(max_examples=150, deadline=None)
@given(any_text.map(lambda text: text.replace("▁", "_")))
def test_bpe_over_characters_round_trips(text):
    tokenizer = _CHARACTERS
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids) == text


_CHARACTERS = characters()


def test_white_space_separates_words():
    tokenizer = characters("whitespace", **{"normalizer.lowercase": True})
    assert names(tokenizer, tokenizer.encode("AB \n ba", add_special=False)) == ["ab", "b", "a"]
    assert names(tokenizer, tokenizer.encode("a\x1c\u3000\x85a", add_special=False)) == ["a", "<0x1C>", "a"]


# ------------------------------------------------------------------------------------- longest match, best spelling


def test_unescape():
    assert unescape(r"a\n\t\\\x00\xe6\x97") == b"a\n\t\\\x00\xe6\x97"
    assert unescape("é\\'") == "é'".encode()
    with pytest.raises(TokenizerError, match="broken escape"):
        unescape(r"\xg1")


def rwkv():
    singles = [f"\\x{byte:02x}" for byte in range(256)]
    more = ["ab", "abc", "abcde", r"\xe6\xbc", "漢字", r"\n\n"]
    return build("rwkv", [("<s>", CONTROL, 0), *((token, NORMAL, 0) for token in singles + more)], eos_token_id=0)


RWKV = rwkv()


def test_longest_match():
    assert names(RWKV, RWKV.encode("abcdab\n\n\n")) == ["abc", r"\x64", "ab", r"\n\n", r"\x0a"]
    assert names(RWKV, RWKV.encode("漢x")) == [r"\xe6\xbc", r"\xa2", r"\x78"]
    assert names(RWKV, RWKV.encode("漢字")) == ["漢字"]
    assert not RWKV.add_bos


@settings(max_examples=150, deadline=None)
@given(any_text)
def test_longest_match_round_trips(text):
    assert RWKV.decode(RWKV.encode(text, parse_special=False)) == text


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="abcé", max_size=10),
    st.dictionaries(st.text(alphabet="abc", min_size=1, max_size=4), st.integers(-40, -1), max_size=10),
)
def test_best_spelling(text, scores):
    head = [("<unk>", UNKNOWN, -30000), ("<bos>", CONTROL, -30000), ("<eos>", CONTROL, -30000)]
    pieces = (
        head + [(byte, BYTE, 0) for byte in BYTES] + [(piece, NORMAL, score / 4) for piece, score in scores.items()]
    )
    tokenizer = build("plamo2", pieces)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(ids) == text

    @cache
    def best(start):
        if start == len(text):
            return 0
        ways = [
            best(start + len(piece)) + score * 2500 for piece, score in scores.items() if text.startswith(piece, start)
        ]
        return max([*ways, best(start + 1) - 10_000_000])

    spelled = sum(scores[name] * 2500 if name in scores else 0 for name in names(tokenizer, ids))
    in_bytes = tokenizer.decode([id for id in ids if names(tokenizer, [id])[0] not in scores])
    assert spelled - 10_000_000 * len(in_bytes) == best(0)


def test_best_spelling_needs_all_bytes():
    with pytest.raises(TokenizerError, match="no token for byte 0x00"):
        build("plamo2", [("<unk>", UNKNOWN, 0), ("a", NORMAL, -1)])


# ------------------------------------------------------------------------------------------------------------ all kinds


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_metadata_never_crashes(data):
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 400), st.floats(), st.text(max_size=4),
        st.lists(st.text(max_size=4), max_size=8), st.lists(st.integers(-5, 2**40), max_size=8),
        st.lists(st.integers(-5, 300), max_size=3).map(np.array),
        st.binary(max_size=40).map(lambda raw: np.frombuffer(raw, np.uint8)),
    )  # fmt: skip
    kind = data.draw(st.sampled_from(["bert", "t5", "gemma4", "whitespace", "rwkv", "plamo2"]))
    pieces = [("<unk>", UNKNOWN, 0), ("▁a", NORMAL, -1), ("a", NORMAL, -2)] + [(byte, BYTE, 0) for byte in BYTES]
    whole = metadata(
        kind, pieces, merges=["▁ a"], unknown_token_id=0, precompiled_charsmap=None,
        add_space_prefix=True, remove_extra_whitespaces=True, **{"normalizer.lowercase": True},
    )  # fmt: skip
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(whole)), junk, max_size=3))
    try:
        tokenizer = Tokenizer.from_metadata(whole | changed)
        tokenizer.decode(tokenizer.encode("some a text é", add_special=False))
    except TokenizerError:
        return
