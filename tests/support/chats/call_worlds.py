"""Tools, tokenizers of single bytes, and texts drawn under the masks of calls."""

import json
import re
from dataclasses import replace

import jsonschema
import numpy as np

from engine.constraints import ConstraintCompiler
from engine.text import Tokenizer
from engine.text.answers.call_forms import FORMS, GENERIC, probe
from engine.text.answers.formats import CHANNELS, MARKS, AnswerFormat
from engine.text.answers.rules import AnswerRules, CallRules, argument_schemas, choose_tools
from engine.text.answers.tool_calls import parameter_types
from tests.support.models.gguf_builder import byte_tokens
from tests.support.models.scripted_model import END

LOOK = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}], "default": None},
        "unit": {"type": "string", "enum": ["C", "Grad <F>"]},
        "more": {
            "type": "object",
            "properties": {"tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 2}},
            "additionalProperties": False,
        },
    },
    "required": ["city", "unit"],
}


TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": LOOK}},
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}},
]


SCHEMAS = {"look_up": LOOK, "look": {"type": "object", "maxProperties": 0}}


CONTROLS = sorted(
    {
        END,
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|constrain|>",
        "<|begin|>",
        "<|think|>",
        "<|return|>",
        "<|call|>",
    }
    | {"｜DSML｜", "<think>", "</think>"}
    | {
        token
        for form in (*FORMS, GENERIC)
        for token in re.findall(r"<\|[^<>]*\|>|<｜[^<>D]*｜>|\[[A-Z_]+\]|</?tool_call>|</?arg_\w+>", probe(form))
    }
)


def world(controls):
    """A tokenizer of single bytes with these control tokens, and its compiler."""
    letters = byte_tokens()
    tokens = [*letters, *controls]
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array([1] * len(letters) + [3] * len(controls), np.int32),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": tokens.index(END),
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    return tokenizer, ConstraintCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eog_ids)


WORLDS = {"text": world([END]), "tokens": world(CONTROLS)}


def rules_of(form, choice="required", *, parallel=True, prompt="", tools=TOOLS, **more):
    """The rules of an answer in a form, as a chat makes them."""
    wanted = choose_tools(tools, choice, parallel)
    calls = CallRules(form, argument_schemas(wanted), wanted.forced, wanted.several)
    if form.opens:
        channels = next(one for one in CHANNELS if form.opens in one.opens)
        markers, prompt = AnswerFormat(channels=channels), prompt or form.opens + "assistant"
    else:
        marks = tuple(one for one in MARKS if one.begin in (form.begin, "<think>"))
        frames = tuple(re.findall(r"<\|\w+\|>\w+<\|sep\|>", form.lead))
        markers = AnswerFormat(marks, frames=frames, bare_calls=frozenset() if form.begin else frozenset(SCHEMAS))
    return markers, AnswerRules(markers, prompt, parameter_types(tools), (), calls, **more)


def ready(rules, tokenizer):
    ids = (tokenizer.token_id(name) for name in rules.markers.token_names())
    shown = frozenset(i for i in ids if i is not None and i not in tokenizer.eog_ids)
    return replace(rules, shown_ids=shown)


def allowed(bits, n):
    return [i for i in range(n) if bits[i // 32] >> (i % 32) & 1]


def draw(mask, tokenizer, seed, begun=(), most=3000, letters="abeü0 19<>/\"'{}[]\n"):
    """Tokens drawn at random, rather those of some letters, until the text ends."""
    random = np.random.default_rng(seed)
    wanted = set(tokenizer.encode(letters, add_special=False))
    thoughts = {tokenizer.token_id("<think>"), tokenizer.token_id("<|think|>")}
    ids = list(begun)
    while len(ids) < most:
        if mask.is_complete(ids):
            break
        may = allowed(mask.bits(ids), tokenizer.vocab_size)
        ends = [i for i in may if i in tokenizer.eog_ids]
        if ends and random.random() < 0.3:
            break
        may = [i for i in may if i not in tokenizer.eog_ids and i not in thoughts]
        some = [i for i in may if i in wanted or i >= 256]
        ids.append(int(random.choice(some or may)))
    return ids


def read(rules, tokenizer, ids):
    """Text, reasoning and calls of an answer."""
    parser = rules.parser()
    pieces, run = [], []
    for i in [*ids, None]:
        if i is None or i in rules.shown_ids:
            pieces.append(parser.push(tokenizer.decode(run, continuation=True)))
            run = []
            if i is not None:
                pieces.append(parser.push(tokenizer.token_text(i)))
        else:
            run.append(i)
    pieces.append(parser.finish())
    calls = [(call.name, json.loads(call.arguments)) for piece in pieces for call in piece.tool_calls]
    return "".join(p.content for p in pieces), "".join(p.reasoning for p in pieces), calls


def beginning(form, tokenizer):
    """What keeps a random model from thinking for ever."""
    return tokenizer.encode({"harmony": "<|channel|>c", "muse": " to=l"}.get(form.name, ""), add_special=False)


def check(calls):
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
