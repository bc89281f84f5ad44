"""Masks of many requests, computed side by side: the bits of each alone, whatever happens to its neighbours."""

import numpy as np
import pytest

from engine import LLM, Choice, JsonSchema, Regex
from engine.constraints import ConstraintCompiler
from engine.constraints.side_by_side import FEWEST, MOST_THREADS
from engine.errors import EngineError
from tests.support.chats.call_worlds import allowed

CONSTRAINTS = [
    JsonSchema({"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}),
    Regex("[a-z]{3,30} [0-9]+"),
    Choice(["red apples", "green apples", "a pear"]),
]


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", threads=1, max_sequences=1) as one:
        yield one


@pytest.mark.parametrize("n", [FEWEST - 1, FEWEST, 3 * MOST_THREADS + 1])
def test_each_has_the_bits_that_it_has_alone(llm, n):
    vocabulary = llm.tokenizer.vocab_size
    rng = np.random.default_rng(n)
    compiler, other = (ConstraintCompiler(llm.tokenizer, vocabulary, llm.tokenizer.eog_ids) for _ in range(2))
    masks, twins = ([one.mask(CONSTRAINTS[i % 3]) for i in range(n)] for one in (compiler, other))
    texts = [[] for _ in range(n)]
    for step in range(30):
        alive = [i for i in range(n) if not twins[i].is_complete(texts[i])]
        wanted = [(masks[i], texts[i]) for i in alive]
        if wanted and step % 5 != 4:  # not always asked for, and then not always all of them
            wanted[0][0].prepare(wanted if step % 2 else wanted[::2])
        for i in alive:
            bits = twins[i].bits(texts[i]).copy()
            assert masks[i].bits(texts[i]).tobytes() == bits.tobytes(), (step, i)
            assert masks[i].bits(texts[i]).tobytes() == bits.tobytes(), "asked for twice"
            texts[i].append(int(rng.choice(allowed(bits, vocabulary))))


def test_one_that_fails_fails_alone(llm):
    vocabulary = llm.tokenizer.vocab_size
    compiler = ConstraintCompiler(llm.tokenizer, vocabulary, llm.tokenizer.eog_ids)
    masks = [compiler.mask(CONSTRAINTS[1]) for _ in range(FEWEST + 2)]
    wrong = next(i for i in range(vocabulary) if i not in allowed(masks[0].bits([]), vocabulary))
    wanted = [(mask, [wrong] if i == 3 else []) for i, mask in enumerate(masks)]
    masks[0].prepare(wanted)
    for i, (mask, ids) in enumerate(wanted):
        if i == 3:
            with pytest.raises(EngineError, match="cannot go on"):
                mask.bits(ids)
        else:
            assert mask.bits(ids).any()
