"""The table of pre-tokenizers: the name in a GGUF file → the patterns that cut text into words before BPE.

The names are the values of `tokenizer.ggml.pre` that llama.cpp writes. Patterns are in the Oniguruma syntax of the
`tokenizers` library and are applied one after another, each to the pieces the one before left; what a pattern does not
match stays a piece of its own. Independent of vocabularies and files.
"""

from dataclasses import dataclass

from engine.errors import TokenizerError


@dataclass(frozen=True)
class PreTokenizer:
    """How one family of models cuts text into words.

    Attributes:
        patterns: regular expressions, applied in order.
        ignore_merges: a word that is a token is taken whole, without looking at the merges.
        add_bos: a BOS token is put first when the file does not say.
        border_at_space: a single space between two ASCII letters always starts a word, so that long text may be cut
            there without changing the result.
        byte_level: tokens are written in the byte alphabet; otherwise as they are, with "<0x0A>" for single bytes.
        escape_spaces: where not byte_level, a space is written as "▁".
        whole_breaks: where not byte_level, a run of line breaks that is a token is taken whole.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    border_at_space: bool = True
    byte_level: bool = True
    escape_spaces: bool = False
    whole_breaks: bool = False


# Pieces that many patterns share. Contractions are spelled out because (?i:) would also fold "ſ" to "s".
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# A word ends where lower case turns to upper case ("camelCase" is two words).
_CASED_HEAD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
_CASED_TAIL = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_GPT4O = (
    rf"{_CASED_HEAD}{_CONTRACTION}?|{_CASED_TAIL}{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_PUNCTUATION_RUN = r"[\p{P}\$\+<=>\^~\|]+"
_ASCII_PUNCTUATION_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_CJK_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_DEEPSEEK3_WORDS = (
    rf"{_ASCII_PUNCTUATION_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# Digits in threes counted from the right: the first group takes what is left over.
_DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_CJK_HANGUL = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
# Everything but spaces, brackets and the sentence marks of several scripts.
_NOT_SENTENCE_MARK = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C})]+"
_HAN_FREE_UPPER, _HAN_FREE_LOWER = rf"[{_UPPER}&&[^\p{{Han}}]]", rf"[{_LOWER}&&[^\p{{Han}}]]"

# Letters that have an upper and a lower case, as the DeepSeek LLM tokenizer lists them (code points, hexadecimal).
_CASED_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5
3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15
1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC
1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2
10CC0-10CF2 118A0-118DF 1E900-1E943
"""

# Scripts that AFMoE keeps apart from others: Chinese, kana, Thai, Lao, Khmer, Myanmar, Hangul.
_ASIAN_SCRIPTS = """
4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F AA60-AA7F
A9E0-A9FF AC00-D7AF 1100-11FF
"""


def _character_class(ranges: str) -> str:
    """The pattern for one of these characters, written out: `41-43 B5` gives `[A-Cµ]`."""
    return "[" + "".join("-".join(chr(int(end, 16)) for end in item.split("-")) for item in ranges.split()) + "]"


_DEFAULT = PreTokenizer((_PUNCTUATION_RUN, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2_STYLE = PreTokenizer((_GPT2,))
_LLAMA3_STYLE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_LLAMA3_PATTERN_ONLY = PreTokenizer((_LLAMA3,))
_GLM4_STYLE = PreTokenizer((_LLAMA3,), ignore_merges=True)
_QWEN2_STYLE = PreTokenizer((_QWEN2,))
_GPT4O_STYLE = PreTokenizer((_GPT4O,))
_SINGLE_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK3_STYLE = PreTokenizer((r"\p{N}{1,3}", _CJK_KANA, _DEEPSEEK3_WORDS))
_BAILING_STYLE = PreTokenizer(
    (rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_LINES = r"[^\n]+|\n+"
_GEMMA4_STYLE = PreTokenizer((_LINES,), add_bos=True, byte_level=False, escape_spaces=True, whole_breaks=True)
_SENTENCE_MARKS = PreTokenizer((_NOT_SENTENCE_MARK,))
_TINY_AYA_STYLE = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    # GPT-2 words
    "gpt-2": _GPT2_STYLE,
    "phi-2": _GPT2_STYLE,
    "mpt": _GPT2_STYLE,
    "olmo": _GPT2_STYLE,
    "jais": _GPT2_STYLE,
    "trillion": _GPT2_STYLE,
    "granite-docling": _GPT2_STYLE,
    "gigachat": _GPT2_STYLE,
    "mellum": _GPT2_STYLE,
    "modern-bert": _GPT2_STYLE,
    "exaone4": _GPT2_STYLE,
    "a.x-4.0": _GPT2_STYLE,
    "jina-es": _GPT2_STYLE,
    "jina-de": _GPT2_STYLE,
    "jina-v1-en": _GPT2_STYLE,
    "jina-v2-es": _GPT2_STYLE,
    "jina-v2-de": _GPT2_STYLE,
    "jina-v2-code": _GPT2_STYLE,
    "roberta-bpe": _GPT2_STYLE,
    # GPT-2 words, digits one by one
    "starcoder": _SINGLE_DIGITS_GPT2,
    "refact": _SINGLE_DIGITS_GPT2,
    "command-r": _SINGLE_DIGITS_GPT2,
    "smollm": _SINGLE_DIGITS_GPT2,
    "codeshell": _SINGLE_DIGITS_GPT2,
    "exaone": _SINGLE_DIGITS_GPT2,
    "minerva-7b": _SINGLE_DIGITS_GPT2,
    "mellum2": _SINGLE_DIGITS_GPT2,
    # Llama 3 words: digits in threes
    "llama-bpe": _LLAMA3_STYLE,
    "llama3": _LLAMA3_STYLE,
    "llama-v3": _LLAMA3_STYLE,
    "falcon3": _LLAMA3_STYLE,
    "falcon-h1": _LLAMA3_STYLE,
    "pixtral": _LLAMA3_STYLE,
    "midm-2.0": _LLAMA3_STYLE,
    "lfm2": _LLAMA3_STYLE,
    "jina-v5-nano": _LLAMA3_STYLE,
    "dbrx": _LLAMA3_PATTERN_ONLY,
    "smaug-bpe": _LLAMA3_PATTERN_ONLY,
    "chatglm-bpe": _LLAMA3_PATTERN_ONLY,
    "glm4": _GLM4_STYLE,
    "glm5": _GLM4_STYLE,
    # Marks and joiners are part of a word.
    "k2-horizon": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}\x{{200C}}\x{{200D}}]+"
            rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",
        )
    ),
    "jais-2": PreTokenizer(
        (
            rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|\s{{512}}(?!\S)|\s{{256}}(?!\S)"
            r"|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"), ignore_merges=True
    ),
    # Qwen 2 words: digits one by one
    "qwen2": _QWEN2_STYLE,
    "deepseek-r1-qwen": _QWEN2_STYLE,
    "kormo": _QWEN2_STYLE,
    "f2llmv2": _QWEN2_STYLE,
    "megrez": _QWEN2_STYLE,
    "stablelm2": _QWEN2_STYLE,
    "hunyuan": _QWEN2_STYLE,
    "solar-open": _QWEN2_STYLE,
    "grok-2": _QWEN2_STYLE,
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "ufakzeka": PreTokenizer((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}",)),
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "seed-coder": PreTokenizer(
        (rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
    ),
    "bailingmoe": _BAILING_STYLE,
    "bailingmoe2": _BAILING_STYLE,
    "llada-moe": _BAILING_STYLE,
    # Spaces inside a word are allowed, so nothing may be cut at a space.
    "exaone-moe": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
        border_at_space=False,
    ),
    # GPT-4o words: cut where the case changes
    "gpt-4o": _GPT4O_STYLE,
    "llama4": _GPT4O_STYLE,
    "kanana2": _GPT4O_STYLE,
    "talkie": _GPT4O_STYLE,
    "minimax-m2": _GPT4O_STYLE,
    "granite-embed-multi-97m": PreTokenizer((_GPT4O,), ignore_merges=True),
    "tiny_aya": _TINY_AYA_STYLE,
    "cohere2moe": _TINY_AYA_STYLE,
    "tekken": PreTokenizer(
        (rf"{_CASED_HEAD}|{_CASED_TAIL}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        ignore_merges=True,
        add_bos=True,
    ),
    "kimi-k2": PreTokenizer(
        (
            rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_HAN_FREE_UPPER}*{_HAN_FREE_LOWER}+{_CONTRACTION}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_HAN_FREE_UPPER}+{_HAN_FREE_LOWER}*{_CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",
        )
    ),
    "youtu": PreTokenizer(
        (
            r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+"
            r"|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}"
            r"\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+"
            rf"|[\x{{3105}}-\x{{312F}}]+|{_CJK_KANA}",
            rf"{_CASED_HEAD}{_CONTRACTION}?|{_CASED_TAIL}{_CONTRACTION}?"
            rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        ),
        ignore_merges=True,
    ),
    # DeepSeek
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_character_class(_CASED_LETTERS)}+",
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            _CJK_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}")),
    "deepseek-v3": _DEEPSEEK3_STYLE,
    "hunyuan-dense": _DEEPSEEK3_STYLE,
    "joyai-llm": _DEEPSEEK3_STYLE,
    "hy_v4": _DEEPSEEK3_STYLE,
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _CJK_KANA,
            rf"{_ASCII_PUNCTUATION_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
            r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "afmoe": PreTokenizer((_DIGITS_FROM_THE_RIGHT, f"{_character_class(_ASIAN_SCRIPTS)}+", _DEEPSEEK3_WORDS)),
    # Tokens written as they are
    "gemma4": _GEMMA4_STYLE,
    "granite-embed-multi-311m": _GEMMA4_STYLE,
    "sarvam-moe": PreTokenizer((_LINES,), byte_level=False, escape_spaces=True),
    "whitespace": PreTokenizer((r"[\S\x1c-\x1f]+",), byte_level=False),  # separators that to Unicode are no white space
    # Others
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom": _SENTENCE_MARKS,
    "poro-chat": _SENTENCE_MARKS,
    "gpt3-finnish": _SENTENCE_MARKS,
    "viking": PreTokenizer((_NOT_SENTENCE_MARK, r"\p{N}")),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    # Only digits are cut (in threes from the right): a token may span several words.
    "superbpe": PreTokenizer((r"\p{N}+", r"[0-9]{1,3}(?=(?:[0-9]{3})*(?![0-9]))"), border_at_space=False),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The table's entry of that name.

    Raises:
        TokenizerError: the name is not in the table; the text lists the names and how to override the file's.
    """
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise TokenizerError(
            f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre). If the model is known to use one of these, name it "
            f'with pre="llama-bpe" in Python or --pre-tokenizer llama-bpe on the command line: '
            + ", ".join(sorted(PRE_TOKENIZERS))
        )
    return found
