"""The tokenizer against hand-made vocabularies, brute force, hostile metadata, and real vocabularies where present."""

import random
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError, TokenizerError
from engine.gguf.reader import open_gguf
from engine.text import Tokenizer
from engine.text.tokenizers.bpe import BYTE_OF_CHARACTER, ByteLevelBpe, byte_level_bytes
from engine.text.tokenizers.pretokenizers import PRE_TOKENIZERS
from engine.text.tokenizers.special_tokens import TokenType
from engine.text.tokenizers.splitter import SpecialSplitter
from tests.support.vocabularies import (
    BPE,
    SPM,
    SPM_PLAIN,
    bpe_metadata,
    spm_metadata,
)

VOCABS = ("falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")


def names(tokenizer, ids):
    return [tokenizer._vocabulary.tokens[id] for id in ids]


# ---------------------------------------------------------------------------------------------------- byte-level BPE


def test_bpe_merges_by_rank():
    assert names(BPE, BPE.encode("the the")) == ["t", "he", "Ġthe"]
    assert names(BPE, BPE.encode("é")) == ["Ã", "©"]
    assert BPE.encode("") == []


def test_bpe_first_of_equal_merges_counts_and_leftmost_goes_first():
    tokenizer = Tokenizer.from_metadata(bpe_metadata(merges=("a a", "b a", "aa a")))
    assert names(tokenizer, tokenizer.encode("aaaa")) == ["aa", "aa"]
    repeated = bpe_metadata(merges=("a a", "b a", "aa a"))
    repeated["tokenizer.ggml.merges"] = ["b a", "a a", "aa a", "b a"]
    tokenizer = Tokenizer.from_metadata(repeated)
    assert names(tokenizer, tokenizer.encode("baa")) == ["ba", "a"]


def test_bpe_defaults():
    assert (BPE.add_bos, BPE.add_eos, BPE.bos_id) == (False, False, None)
    assert BPE.eos_id == BPE.token_id("<|endoftext|>")
    bos = Tokenizer.from_metadata(bpe_metadata(pre="llama-bpe", bos_token_id=0))
    assert bos.add_bos
    assert bos.encode("x")[0] == 0
    assert bos.encode("x", add_special=False) == [bos.token_id("x")]
    silent = Tokenizer.from_metadata(bpe_metadata(pre="llama-bpe", bos_token_id=0, add_bos_token=False))
    assert not silent.add_bos
    both = Tokenizer.from_metadata(bpe_metadata(bos_token_id=1, add_bos_token=True, add_eos_token=True))
    assert both.encode("x") == [1, both.token_id("x"), both.eos_id]


def test_bpe_ignore_merges_takes_a_whole_word():
    metadata = bpe_metadata(merges=("a b", "c d", "ab cd", "b c"))
    metadata["tokenizer.ggml.merges"] = ["b c", "a b", "c d", "ab cd"]
    by_merges = Tokenizer.from_metadata(metadata)
    assert names(by_merges, by_merges.encode("abcd")) == ["a", "bc", "d"]
    for pre in ("llama-bpe", "glm4"):
        whole = Tokenizer.from_metadata(metadata, pre=pre)
        assert names(whole, whole.encode("abcd")) == ["abcd"]


def test_special_tokens_in_text():
    end, tool = BPE.token_id("<|im_end|>"), BPE.token_id("<tool>")
    assert BPE.encode("a<|im_end|>b<tool>") == [BPE.token_id("a"), end, BPE.token_id("b"), tool]
    plain = BPE.encode("a<|im_end|>b<tool>", parse_special=False)
    assert end not in plain
    assert plain[-1] == tool
    assert BPE.decode(plain) == "a<|im_end|>b<tool>"
    assert BPE.decode(BPE.encode("a<|im_end|>b")) == "ab"
    assert BPE.decode(BPE.encode("a<|im_end|>b"), skip_special=False) == "a<|im_end|>b"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I've 123  foo\n\nbar!", ["I", "'ve", " 123", " ", " foo", "\n", "\n", "bar", "!"]),
        ("llama-bpe", "I'VE 1234  foo\n\nbar!\n", ["I", "'VE", " ", "123", "4", " ", " foo", "\n\n", "bar", "!\n"]),
        ("qwen2", "a12 b", ["a", "1", "2", " b"]),
        ("falcon", "x$$ 12345", ["x", "$$", " ", "123", "45"]),
        ("default", "x.. 12345", ["x", "..", " ", "123", "45"]),
        ("starcoder", "ab 12", ["ab", " ", "1", "2"]),
        ("gpt-4o", "camelCase's 1234", ["camel", "Case's", " ", "123", "4"]),
        ("tekken", "camelCase 12/\n", ["camel", "Case", " ", "1", "2", "/\n"]),
        ("deepseek-llm", "Über uns\n12", ["Ü", "ber", " uns", "\n", "12"]),
        ("deepseek-coder", "ab 12, c", ["ab", " ", "1", "2", ",", " c"]),
        ("deepseek-v3", "漢字kana 1234 a.foo .b", ["漢字", "kana", " ", "123", "4", " a", ".foo", " .", "b"]),
        ("poro-chat", "a bc, d", ["a", " bc", ",", " d"]),
        ("viking", "a b12", ["a", " b", "1", "2"]),
        ("superbpe", "a b 1234567", ["a b ", "1", "234", "567"]),
        ("kimi-k2", "漢字abc 1234", ["漢字", "abc", " ", "123", "4"]),
        ("tiny_aya", "x 1234567", ["x", " ", "1", "234", "567"]),
        ("bloom", "ab cd. ", ["ab", " cd", ". "]),
        ("exaone-moe", "ab cd 12", ["ab cd", " ", "1", "2"]),
        ("qwen35", "ខ្មែរ a", ["ខ្មែរ", " a"]),
        ("jais-2", "a   b", ["a", "  ", " b"]),
        ("laguna", "a\n\nb", ["a", "\n\n", "b"]),
        ("afmoe", "x 1234567漢字a.foo", ["x", " ", "1", "234", "567", "漢字", "a", ".foo"]),
        ("k2-horizon", "क\u200dष 1234", ["क\u200dष", " ", "123", "4"]),
        ("spark2_5", "x 123.\n\nb", ["x", " ", "1", "2", "3", ".", "\n", "\n", "b"]),
    ],
)
def test_pre_tokenizer_words(pre, text, words):
    encoder = ByteLevelBpe({c: i for i, c in enumerate(BYTE_OF_CHARACTER)}, [], PRE_TOKENIZERS[pre])
    cut = encoder._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [byte_level_bytes(word).decode() for word, _ in cut] == words


@pytest.mark.parametrize("pre", sorted(name for name, style in PRE_TOKENIZERS.items() if style.byte_level))
def test_long_text_is_cut_without_changing_the_result(pre, monkeypatch):
    merges = ["Ġ t", "h e", "Ġt he", "Ġ a", "Ċ Ċ", "Ġ Ġ", "e Ġ", "1 2", "12 3"]
    tokenizer = Tokenizer.from_metadata(bpe_metadata(merges=merges, bos_token_id=0), pre=pre)
    rng = random.Random(pre)
    parts = ["the ", "a", " ", "\n", "They've ", "1234567", "漢字", "\n\nB", "!", " the", "\t", "é", "camelCase "]
    text = "".join(rng.choices(parts, k=3000))
    whole = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(whole) == text
    monkeypatch.setattr("engine.text.tokenizers.bpe._CHUNK", 40)
    for brief in (0, 30, 10**6):  # both calls of the library give the same
        monkeypatch.setattr("engine.text.tokenizers.bpe._BRIEF", brief)
        assert tokenizer.encode(text, add_special=False) == whole


@pytest.mark.parametrize("text", ["1,2,3,4 " * 60_000, "a" * 3000 + " b" * 100_000], ids=["no safe cut", "usual"])
def test_other_threads_go_on_while_a_long_text_is_encoded(text):
    """Also inside a call of the library, which otherwise lasts to the end of a piece without a safe place to cut."""
    tokenizer = Tokenizer.from_metadata(bpe_metadata(bos_token_id=0), pre="gpt-2")
    library, inside, turns = tokenizer._encoding.encoder._tokenizer, threading.Event(), []

    class Noting:
        def encode(self, *given, **options):
            inside.set()
            try:
                return library.encode(*given, **options)
            finally:
                inside.clear()

        def encode_batch_fast(self, *given, **options):
            inside.set()
            try:
                return library.encode_batch_fast(*given, **options)
            finally:
                inside.clear()

    tokenizer._encoding.encoder._tokenizer = Noting()
    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.0005)
        turns.append(inside.is_set())
    assert sum(turns) > 30


def test_endless_runs_do_not_break_the_regex_engine():
    text = " " * 1_200_000 + "x"
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text


def test_unknown_pre_tokenizer_names_the_override():
    with pytest.raises(TokenizerError, match=r"'never-heard'.*--pre-tokenizer llama-bpe.*qwen2"):
        Tokenizer.from_metadata(bpe_metadata(pre="never-heard"))
    tokenizer = Tokenizer.from_metadata(bpe_metadata(pre="never-heard"), pre="gpt-2")
    assert tokenizer.pre == "gpt-2"
    without = bpe_metadata()
    del without["tokenizer.ggml.pre"]
    assert Tokenizer.from_metadata(without).pre == "default"


# ------------------------------------------------------------------------------------------------- SentencePiece BPE


def brute_force_spm(text, scores):
    """The definition, word for word: again and again the best join of two neighbours, leftmost of equals."""
    symbols = list(text)
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joins:
            return [piece for symbol in symbols for piece in ([symbol] if symbol in scores else _bytes_of(symbol))]
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def _bytes_of(symbol):
    return [f"<0x{byte:02X}>" for byte in symbol.encode()]


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab c▁é\n", max_size=40),
    st.dictionaries(
        st.text(alphabet="abc▁", min_size=2, max_size=4), st.sampled_from([-1.0, -2.0, -3.0, 0.0]), max_size=12
    ),
)
def test_spm_equals_the_definition(text, pieces):
    pieces = pieces | dict.fromkeys("abc▁", -9.0)
    tokenizer = Tokenizer.from_metadata(
        spm_metadata(tuple(pieces.items()), add_space_prefix=False, add_bos_token=False)
    )
    expected = brute_force_spm(text.replace(" ", "▁"), {piece: np.float32(score) for piece, score in pieces.items()})
    assert names(tokenizer, tokenizer.encode(text)) == expected


def test_spm_by_hand():
    assert names(SPM, SPM.encode("abc")) == ["<s>", "▁a", "bc"]  # "bc" first, then "▁a"; "abc" needs "a" free
    assert names(SPM_PLAIN, SPM_PLAIN.encode("abc")) == ["abc"]
    assert names(SPM_PLAIN, SPM_PLAIN.encode("aaa")) == ["aa", "a"]  # ties go to the left
    assert names(SPM, SPM.encode("ü\n", add_special=False)) == ["▁", "<0xC3>", "<0xBC>", "<0x0A>"]


def test_spm_space_prefix_at_the_start_and_after_special_tokens():
    assert names(SPM, SPM.encode("a</s>a<|u|>b")) == ["<s>", "▁a", "</s>", "▁a", "<|u|>", "▁", "b"]
    assert SPM.decode(SPM.encode("a</s>a<|u|>b"), skip_special=False) == "<s>a</s>a<|u|>b"
    assert SPM.encode("") == [1]
    assert SPM.encode("", add_special=False) == []


def test_spm_decode_of_a_continuation_keeps_the_space():
    ids = SPM.encode("a a", add_special=False)
    assert SPM.decode(ids) == "a a"
    assert SPM.decode(ids, continuation=True) == " a a"
    assert SPM.decode(SPM.encode("  a")) == "  a"


def test_spm_without_byte_tokens_uses_unknown():
    metadata = spm_metadata()
    metadata["tokenizer.ggml.tokens"] = [
        token.replace("<0x", "[0x") if token.startswith("<0x") else token for token in metadata["tokenizer.ggml.tokens"]
    ]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("ü", add_special=False)[1:] == [0, 0]


def test_phi3_special_tokens_swallow_white_space():
    metadata = spm_metadata() | {"general.name": "Phi3 mini"}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert names(tokenizer, tokenizer.encode("<|u|>\n a", add_special=False)) == ["<|u|>", "▁a"]
    assert names(tokenizer, tokenizer.encode("<s>\na", add_special=False)) == ["<s>", "▁", "<0x0A>", "a"]


# ------------------------------------------------------------------------------------------------ splitting, properties


def reference_split(text, tokens):
    """Longest token first over all pieces still text, as a list of lists."""
    pieces = [text]
    for token, id in sorted(tokens, key=lambda pair: (-len(pair[0].encode()), pair[1])):
        cut = []
        for piece in pieces:
            if isinstance(piece, int):
                cut.append(piece)
                continue
            for index, part in enumerate(piece.split(token)):
                cut += [id] if index else []
                cut.append(part)
        pieces = cut
    return [piece for piece in pieces if piece != ""]


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="<a|b>é", max_size=40),
    st.lists(st.text(alphabet="<a|b>é", min_size=1, max_size=6), max_size=6, unique=True),
)
def test_splitter_equals_longest_first(text, tokens):
    pairs = [(token, id) for id, token in enumerate(tokens)]
    assert list(SpecialSplitter(pairs).split(text)) == reference_split(text, pairs)


any_text = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab c\n\t<|>▁'é漢😀9")))


@settings(max_examples=200, deadline=None)
@given(any_text, st.sampled_from(["gpt-2", "llama-bpe", "qwen2", "default", "deepseek-llm", "gpt-4o", "kimi-k2"]))
def test_bpe_round_trip(text, pre):
    if (pre, "t") not in _BY_PRE:
        _BY_PRE[pre, "t"] = Tokenizer.from_metadata(bpe_metadata(), pre=pre)
    tokenizer = _BY_PRE[pre, "t"]
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


_BY_PRE: dict = {}


@settings(max_examples=200, deadline=None)
@given(any_text.map(lambda text: text.replace("▁", "_")))
def test_spm_round_trip(text):
    assert SPM.decode(SPM.encode(text, parse_special=False)) == text
    assert SPM.decode(SPM.encode(text, add_special=False, parse_special=False)) == text
    assert SPM_PLAIN.decode(SPM_PLAIN.encode(text), skip_special=False) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["abc", "▁", " the", "<s>", "<tool>", "<|im_end|>", "é", "\n", "日"])).map("".join))
def test_texts_have_no_fewer_tokens_than_their_length_says(text):
    for tokenizer in (BPE, SPM, SPM_PLAIN):
        assert 0 <= tokenizer.fewest_tokens(text) <= len(tokenizer.encode_prompt(text))
    assert SPM.fewest_tokens(text + 100 * "b") > 9


def test_length_says_nothing_where_text_may_be_left_out():
    swallowing = Tokenizer.from_metadata(spm_metadata() | {"general.name": "Phi3 mini"})
    lacking = bpe_metadata()
    lacking["tokenizer.ggml.tokens"] = ["!!" if token == "Ą" else token for token in lacking["tokenizer.ggml.tokens"]]
    for tokenizer in (swallowing, Tokenizer.from_metadata(lacking)):
        assert tokenizer.fewest_tokens("a" * 1000) == 0


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters()))
def test_lone_surrogates_become_replacement_characters(text):
    clean = "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
    if "\ud83d" not in text:  # a proper pair joins to one character instead
        decoded = BPE.decode(BPE.encode(text, parse_special=False))
        assert decoded.count("\ufffd") <= clean.count("\ufffd")
    assert BPE.encode("\ud800x") == BPE.encode("\ufffdx")
    assert BPE.encode("\ud83d\ude00") == BPE.encode("😀")


def test_bad_calls_are_refused():
    with pytest.raises(InvalidRequestError, match="must be a str, found bytes"):
        BPE.encode(b"abc")
    with pytest.raises(InvalidRequestError, match=rf"100000 is outside the vocabulary: 0 to {BPE.vocab_size - 1}"):
        BPE.decode([100000])
    with pytest.raises(InvalidRequestError, match="-1"):
        BPE.token_bytes(-1)
    with pytest.raises(InvalidRequestError, match=r"1\.5"):
        BPE.decode([1.5])
    assert BPE.decode(np.array(BPE.encode("numpy ids"))) == "numpy ids"


def test_encode_rendered_adds_no_second_bos():
    assert SPM.encode_rendered("<s>a").count(1) == 1
    assert SPM.encode_rendered("a").count(1) == 1
    assert SPM.encode_rendered("<s>" * 2_000_000 + "a") == SPM.encode_rendered("a")  # would take hours name by name


# ----------------------------------------------------------------------------------------------- ids, types, bad files


def test_end_of_generation_ids():
    tokenizer = Tokenizer.from_metadata(
        bpe_metadata(
            specials=("<eos0>", "<|eot_id|>", "<|im_end|>", "<|fim_pad|>", "<x>"), user=("<|end|>",), eot_token_id=3
        )
    )
    found = {"<eos0>", "<|eot_id|>", "<|im_end|>", "<|fim_pad|>", "<|end|>"}
    assert tokenizer.eog_ids == {3, *(tokenizer.token_id(name) for name in found)}
    assert tokenizer.is_control(tokenizer.token_id("<|end|>"))  # its type is corrected


def test_harmony_end_of_message_is_not_the_end():
    tokenizer = Tokenizer.from_metadata(bpe_metadata(specials=("<|return|>", "<|call|>", "<|end|>", "<|channel|>")))
    assert tokenizer.token_id("<|end|>") not in tokenizer.eog_ids
    assert tokenizer.token_id("<|call|>") in tokenizer.eog_ids
    assert tokenizer._vocabulary.types[tokenizer.token_id("<|channel|>")] == TokenType.USER_DEFINED


def test_token_access():
    newline = SPM.token_id("<0x0A>")
    assert SPM.token_bytes(newline) == b"\n"
    assert SPM.token_bytes(SPM.token_id("▁a")) == b" a"
    assert SPM.token_text(SPM.token_id("<0xC3>")) == "\ufffd"
    assert BPE.token_bytes(BPE.token_id("Ġthe")) == b" the"
    assert SPM.kind == "SentencePiece BPE"
    assert BPE.vocab_size == 256 + 3 + 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": None}, "no tokenizer"),
        ({"tokenizer.ggml.model": "no_vocab"}, "no tokenizer"),
        ({"tokenizer.ggml.model": "t6"}, "'t6'; supported are 'gpt2'"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model is 3"),
        ({"tokenizer.ggml.model": np.array([1, 2])}, "tokenizer.ggml.model is array"),
        ({"tokenizer.ggml.eos_token_id": np.array([1])}, "must be a token id"),
        ({"tokenizer.ggml.eos_token_id": np.array([0.5, 1])}, "must be a token id"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": []}, "empty"),
        ({"tokenizer.ggml.tokens": ["a", 3]}, "int at index 1"),
        ({"tokenizer.ggml.tokens": "abc"}, "list of strings, found str"),
        ({"tokenizer.ggml.tokens": ["\ud800"]}, "not valid Unicode"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a", "b"]}, "none of the 2 entries"),
        ({"tokenizer.ggml.merges": ["zzz yyy"]}, "none of the 1 entries"),
        ({"tokenizer.ggml.merges": [1]}, "list of strings"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 entries for 262 tokens"),
        ({"tokenizer.ggml.token_type": [1.5] * 262}, "integers"),
        ({"tokenizer.ggml.token_type": "x"}, "list of numbers"),
        ({"tokenizer.ggml.scores": [0.0]}, "1 entries for 262 tokens"),
        ({"tokenizer.ggml.scores": [float("nan")] * 262}, "NaN at token 0"),
        ({"tokenizer.ggml.scores": [[1], [1, 2]]}, "list of numbers"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "must be a token id from 0 to 261"),
        ({"tokenizer.ggml.bos_token_id": True}, "must be a token id"),
        ({"tokenizer.ggml.add_bos_token": 1}, "true or false"),
        ({"tokenizer.ggml.pre": 7}, "must be a string"),
    ],
)
def test_malformed_metadata_is_refused(change, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(bpe_metadata() | change)


def test_a_merge_longer_than_every_token_is_left_out():
    """The library does not refuse it but breaks down."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*sorted(BYTE_OF_CHARACTER), "he"],
        "tokenizer.ggml.merges": ["h e", "t he"],
    }
    tokenizer = Tokenizer.from_metadata(metadata, pre="gpt-2")
    assert [tokenizer.token_text(id) for id in tokenizer.encode("the", add_special=False)] == ["t", "he"]


def test_odd_metadata_is_borne():
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.merges"] += ["", " ", "a", "a  b", "nope nope", "Ġ t"]
    metadata["tokenizer.ggml.tokens"] += ["", "a", "he"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1, 99, -5]
    metadata["tokenizer.ggml.padding_token_id"] = 10**12
    metadata["tokenizer.ggml.add_bos_token"] = True  # but there is no BOS
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("a the") == BPE.encode("a the")
    assert "pad" not in tokenizer.special_ids
    assert tokenizer.decode([BPE.vocab_size, BPE.vocab_size + 1]) == ""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_metadata_never_crashes(data):
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 400), st.floats(), st.text(max_size=4),
        st.lists(st.text(max_size=4), max_size=8), st.lists(st.integers(-5, 2**40), max_size=8),
        st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=5),
        st.lists(st.integers(-5, 300), max_size=3).map(np.array), st.lists(st.floats(), max_size=3).map(np.array),
    )  # fmt: skip
    metadata = data.draw(st.sampled_from([bpe_metadata(), spm_metadata()]))
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(metadata)), junk, max_size=3))
    try:
        tokenizer = Tokenizer.from_metadata(metadata | changed)
    except TokenizerError:
        return
    tokenizer.decode(tokenizer.encode("some text <|u|> é"))


# ------------------------------------------------------------------------------------------------- real vocabularies


@pytest.fixture(scope="module")
def real(shared_path):
    cache = {}

    def load(name):
        if name not in cache:
            with open_gguf(shared_path(f"vocabs/ggml-vocab-{name}.gguf")) as file:
                cache[name] = Tokenizer.from_metadata(file.metadata)
        return cache[name]

    return load


@pytest.mark.shared
@pytest.mark.parametrize("name", VOCABS)
def test_real_vocabulary_matches_every_line(name, real, shared_path):
    tokenizer = real(name)
    base = f"vocabs/ggml-vocab-{name}.gguf"
    with open(shared_path(f"{base}.inp"), encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = shared_path(f"{base}.out").read_text().split("\n")
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == [int(id) for id in line.split()], repr(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.shared
@pytest.mark.parametrize("name", VOCABS)
def test_real_vocabulary_round_trips_anything(name, real):
    tokenizer = real(name)
    # Falcon's vocabulary has no token for some bytes (control characters, leads of unassigned planes).
    lost = {byte for char, byte in BYTE_OF_CHARACTER.items() if tokenizer.pre and tokenizer.token_id(char) is None}
    writable = any_text.filter(lambda text: not lost & set(text.encode()))

    @settings(max_examples=60, deadline=None)
    @given(writable.map(lambda text: text.replace("▁", "_")))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text

    check()


@pytest.mark.shared
def test_a_megabyte_of_text_with_a_large_vocabulary(real, shared_path):
    tokenizer = real("llama-bpe")
    assert tokenizer.vocab_size == 128256
    text = shared_path("demo-model/held_out.txt").read_text(encoding="utf-8")
    text = (text * (1_000_000 // len(text) + 1))[:1_000_000]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
