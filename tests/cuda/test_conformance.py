"""Every architecture on the GPU against logits computed by llama.cpp: prompts, decode steps, and both in turn."""

from functools import partial

import numpy as np
import pytest

from engine.config import KvType
from engine.cuda.driver.compiler import device_arch
from engine.gguf.reader import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.conformance import NAMES
from tests.support.gpu.helpers import cpu_logits, decode_logits, generate, nmse, opened, pages_of, token_ids
from tests.support.models.feature_models import CASES, LATENT_CASES, latent
from tests.support.peers.models import GPU_MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.shared]

LIMIT = {"f32": 1e-5, "f16": 1e-5}
"""Of the squared error over the squares expected, by the type of the cache. Prompts round what products read to float16
on every card, and on Hopper queries; on a float16 cache keys and values come on top. The models are random, so their
attention is sharper than that of trained ones."""

SLOTS = 4
"""So many rows take the products for many sequences on Hopper, one or two those for few."""

CONTEXT = 128
BEHIND = 29
"""Tokens of the prompt in front of decode steps."""


PARTS = {case.__name__: case for case in CASES}
PARTS |= {
    f"latent{'_absorbed' * absorbed}{'_compressed' * low_rank}": partial(latent, absorbed, low_rank)
    for absorbed, low_rank in LATENT_CASES
}
PARTS |= {name: lambda make=make: (make(), {}) for name, make in GPU_MODELS.items()}


@pytest.fixture(scope="module")
def part_files(tmp_path_factory):
    """A tiny float32 model of every part that only some families have."""
    return {name: case()[0].write(tmp_path_factory.mktemp(name)) for name, case in PARTS.items()}


@pytest.fixture(scope="module", autouse=True)
def kernels(request, conformance_files, part_files):
    """Builds what all files under test need side by side: one after the other would take minutes."""
    import cupy

    from engine.cuda.driver import compiler
    from engine.cuda.launch_plan.describe import describe
    from engine.cuda.launch_plan.jobs import kernel_jobs
    from engine.cuda.launch_plan.model import Settings

    card = compiler.device_arch(), int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    jobs = {}
    chosen = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    paths = [(files[0], LIMIT) for name, files in conformance_files.items() if name in chosen]
    paths += [(path, ["f32"]) for name, path in part_files.items() if name in chosen]
    for path, kv_types in paths:
        with open_gguf(path) as gguf:
            model = load_model(gguf)
            for kv_type in kv_types:
                found = kernel_jobs(describe(model, card, Settings(KvType.parse(kv_type), SLOTS, 512)))
                jobs |= {repr(job): job for job in found}
            del model
    compiler.prebuild(list(jobs.values()), card[0])


def prompt_logits(runner, ids, *, slot, pieces):
    """Logits (T, V) of a prompt that the slot's own pages keep, fed in pieces of so many tokens."""
    rows = []
    with runner._running():
        runner._machine.cache.set_pages(slot, pages_of(runner, slot))
        for first in range(0, len(ids), pieces):
            piece = np.asarray(ids[first : first + pieces], np.int32)
            rows += list(runner._machine.prompts.all_logits(Batch.build([(slot, piece, first, Outputs.ALL)])))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, conformance, capsys):
    path, logits = conformance(name)
    expected = np.load(logits)
    ids, logits = expected["tokens"], expected["logits"]
    errors = {}
    for kv_type in LIMIT:
        # Opened by its class: nothing here could fall back to the CPU.
        with opened(path, kv_type=kv_type, max_sequences=SLOTS, context_length=CONTEXT) as runner:
            behind = [
                prompt_logits(runner, ids[:BEHIND], slot=SLOTS - 1, pieces=16),
                decode_logits(runner, ids[BEHIND:], slot=SLOTS - 1, start=BEHIND),
            ]
            found = runner.logits(ids), decode_logits(runner, ids), np.concatenate(behind)
            errors[kv_type] = [nmse(one, logits) for one in found]
            if kv_type == "f32":
                # The same bits in another row of a larger step, and on Hopper in pieces of another size.
                np.testing.assert_array_equal(decode_logits(runner, ids[:20], slot=1), found[1][:20])
                if device_arch() == 90:
                    np.testing.assert_array_equal(behind[0], found[0][:BEHIND])
                text = token_ids(generate(runner, ids[:BEHIND], 8))
                check_greedy(runner, [*ids[:BEHIND], *text], text)
    with capsys.disabled():
        print(f"\n{name:22}", *(f"{kv} {' '.join(f'{e:.1e}' for e in errors[kv])} " for kv in errors), end="")
    assert all(max(errors[kv_type]) < limit for kv_type, limit in LIMIT.items()), errors


@pytest.mark.parametrize("name", PARTS)
def test_parts(name, part_files):
    """Parts and combinations that no file above has: groups of experts, a latent vector that is not absorbed, ..."""
    ids = np.random.default_rng(0).integers(0, 50, 14)
    with opened(part_files[name], kv_type="f32", max_sequences=SLOTS, context_length=16) as runner:
        expected = cpu_logits(runner.model, ids)
        prompt, decode = runner.logits(ids), decode_logits(runner, ids)
    assert nmse(prompt, expected) < 1e-5
    assert nmse(decode, expected) < 1e-6


def check_greedy(runner, ids, text):
    """Steps replayed from captured graphs chose what the logits of the same text say, or nearly tied with it."""
    rows = runner.logits(ids)[-len(text) - 1 : -1]
    for row, token in zip(rows, text, strict=True):
        assert row.max() - row[token] < 0.02 * np.abs(row).max(), (token, int(row.argmax()))
