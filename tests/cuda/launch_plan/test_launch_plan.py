"""The launch plan against what a runner really launches on a pretended card, and against the kernel files."""

import json
import re
from dataclasses import replace
from functools import cache, partial

import pytest

from engine.config import STATE_BORDER, KvType, step_sizes
from engine.cuda.attention.attention_plan import decode_plan
from engine.cuda.driver.compiler import kernel_files
from engine.cuda.launch_plan.describe import describe
from engine.cuda.launch_plan.families import Family, Phase, Split
from engine.cuda.launch_plan.model import Settings
from engine.cuda.launch_plan.steps import Norm
from engine.cuda.load.memory_plan import CACHE_SHARE, LEAST_SEQUENCES, MOST_SEQUENCES, make_plan
from engine.errors import DeviceError, InvalidRequestError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.loader import load_model
from tests.conftest import CONFORMANCE, SHARED, extract
from tests.support.command_line import run
from tests.support.conformance import NAMES
from tests.support.gpu.fake_runner import (
    MULTIPROCESSORS,
    built,
    chosen,
    decode,
    feed,
    known,
    launched,
    planned,
    pretended,
    read_prompt,
    sparse_model,
)
from tests.support.gpu.helpers import decode_logits, generate, mixed_model, shared_expert_model, typed_model
from tests.support.models.embedding_models import bert_like
from tests.support.models.feature_models import CASES, LATENT_CASES, latent
from tests.support.models.hybrid_models import FAMILIES, tiny_hybrid
from tests.support.models.recurrent_models import tiny_mamba
from tests.support.peers.models import GPU_MODELS

ARCHIVES = [SHARED / source / "models.tar.xz" for source in CONFORMANCE]
CARDS = tuple(MULTIPROCESSORS.items())
SERVED = (
    "apertus", "arctic", "bitnet", "chameleon", "deepseek32, four positions chosen", "deepseek4",
    "dots3note", "gemma3n",
    "gemma4 with experts", "gemma4 with shared caches", "glm-dsa, a choice for two layers", "grovemoe", "hrm_text",
    "hy_v4", "hyper-connections", "laguna", "llama4", "maple", "minimax-m3, three blocks chosen", "nanbeige",
    "rwkv6qwen2", "arwkv7", "arwkv7 with norms, without gates", "smallthinker", "spark2_5", "step35",
    "streams that mix", "talkie",
)  # fmt: skip
"""Families that need launches of their own."""

LAUNCHED_ELSEWHERE = {
    "pooling.cu": {"pool_rows"},  # texts, see test_embeddings.py
    "repack.cu": {"repack_", "largest_", "choose_scale_"},  # uploads
    "moves.cu": {"scatter", "copy_pages", "gather_rows"},  # what the host sends, pages, rows that draw
    "rows.cu": {"read_all"},  # the memory's speed
    "sampling.cu": {"sample_masked"},  # steps in which a row has a constraint
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder):
    """Files by name: every part that only some families have, mixed types, real shapes, and the conformance models."""
    found = {}
    for number, case in enumerate([*CASES, *(lambda pair=pair: latent(*pair) for pair in LATENT_CASES)]):
        place = folder / str(number)
        place.mkdir()
        found[f"part {number}"] = case()[0].write(place)
    found["mixed"] = mixed_model(folder)
    found["two-bit"] = typed_model(folder, GGMLType.Q2_K)
    found["bf16"] = typed_model(folder, GGMLType.BF16)
    found["mamba"] = tiny_mamba(folder / "mamba.gguf")
    found["mamba-q8"] = tiny_mamba(
        folder / "mamba-q8.gguf", weight_type=GGMLType.Q8_0, dt_rank=32, n_layers=3, norm_dt_b_c=True
    )
    found |= {family: tiny_hybrid(folder / f"{family}.gguf", family) for family in FAMILIES}
    for name in SERVED:
        place = folder / name
        place.mkdir()
        found[name] = GPU_MODELS[name]().write(place)
    found["8b"] = sparse_model(folder / "8b.gguf", "llama-3.1-8b")
    found["30b"] = sparse_model(folder / "30b.gguf", "qwen3-30b-a3b")
    found["35b"] = sparse_model(folder / "35b.gguf", "qwen3.5-35b-a3b", layers=4)
    found["mamba-2.8b"] = sparse_model(folder / "mamba-2.8b.gguf", "mamba-2.8b")
    apart = re.compile("attn_v").pattern
    found["8b-plain-v"] = sparse_model(folder / "v.gguf", "llama-3.1-8b", overrides=[(apart, GGMLType.F32)])
    wanted = {f"models/{name}.gguf" for name in NAMES}
    for archive in ARCHIVES:
        if archive.is_file():
            extract(archive, wanted, folder)
    found |= {path.stem: path for path in sorted((folder / "models").glob("*.gguf"))}
    return found


def plans(path, cards=CARDS, **settings):
    """The plan of a file on every card."""
    with open_gguf(path) as gguf:
        model = load_model(gguf)
        chosen = Settings(**({"kv_type": KvType.F16, "max_sequences": 65, "prefill_rows": 512} | settings))
        found = [describe(model, card, chosen) for card in cards]
        del model
    return found


def launches_of(plan):
    """Launches of every step size, and of prompts."""
    steps = [plan.decode(n) for n in (1, 4, 5, 32, 65)] + [plan.known(n) for n in plan.known_sizes[-1:]]
    return [launch for step in [*steps, plan.prompt(300, 2)] for launch in step]


@cache
def entry_points(name):
    """Kernels of a file; of those made for a tensor type, what comes before its name."""
    text = re.sub(r"^#.*$", "", kernel_files()[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"__(launch_bounds|cluster_dims)__\((?:[^()]|\([^()]*\))*\)", "", text)
    found = re.findall(r"__global__\s+void\s+(?:JOIN\((\w+), FORMAT\)|(\w+))\s*\(", text)
    assert len(found) == text.count("__global__")
    return frozenset(made or plain for made, plain in found)


@cache
def entry_of(file, kernel):
    """(file, entry point) of a launch."""
    points = [one for one in entry_points(file) if kernel == one or (one[-1] == "_" and kernel.startswith(one))]
    assert points, f"{file} has no kernel {kernel}"
    return file, max(points, key=len)


def test_every_launch_has_a_kernel_and_every_kernel_a_user(models):
    users = {(file, name) for file, names in LAUNCHED_ELSEWHERE.items() for name in names}
    for number, path in enumerate(models.values()):
        for plan in plans(path, kv_type=KvType.F16 if number % 3 else KvType.F32):
            tensors = {plan.token_embd.tensor}
            for launch in launches_of(plan):
                tensors |= set(launch.tensors)
                if launch.job is not None:
                    users.add(entry_of(launch.job[0][-1], launch.kernel))
            uploaded = {name for one in plan.matrices for name in one.tensors}
            assert uploaded == tensors, (path, plan.card)
            for layer in plan.layers:  # a mixture with a norm behind it, which no file here has
                if layer.moe is not None:
                    changed = replace(layer, ffn_post_norm=Norm.APART).launches(plan.step(Phase.DECODE, 1))
                    users |= {entry_of(launch.job[0][-1], launch.kernel) for launch in changed if launch.job}
    every = {(file, name) for file in kernel_files() if file.endswith(".cu") for name in entry_points(file)}
    if all(archive.is_file() for archive in ARCHIVES):
        assert every == users
    assert users <= every


def check_runner(monkeypatch, path, arch, **options):
    """Steps and prompts of a runner are those of its plan, launch by launch, and were built ahead."""
    with pretended(monkeypatch, path, arch, **options) as (runner, gpu):
        plan = runner._machine.weights.plan
        ready = built(gpu, plan)
        for n in step_sizes(runner.max_sequences):
            found = launched(gpu, lambda n=n: decode(runner, n))
            assert found == planned(gpu, plan.decode(n)), (path, arch, n)
            assert {source for _, source in found if source} <= ready, (path, arch, n)
        for n in plan.known_sizes[:: max(1, len(plan.known_sizes) - 1)]:
            found = launched(gpu, lambda n=n: known(runner, n))
            assert found == planned(gpu, plan.known(n)), (path, arch, n)
            assert {source for _, source in found if source} <= ready, (path, arch, n)
        for n in step_sizes(runner.max_sequences)[-2:] if plan.known_sizes else ():
            found = launched(gpu, lambda n=n: chosen(runner, n))
            assert found == planned(gpu, plan.chosen(n)), (path, arch, n)
            assert {source for _, source in found if source} <= ready, (path, arch, n)
        for n in (1, 9, 31):
            found = launched(gpu, lambda n=n: read_prompt(runner, n))
            assert found == planned(gpu, plan.prompt(n, None)), (path, arch, n)
            assert {source for _, source in found if source} <= ready, (path, arch, n)
        for n, draws in ((9, False), (9, True), (1, True)) if plan.generates else ():
            found = launched(gpu, lambda n=n, draws=draws: feed(runner, n, draws=draws))
            wanted = planned(gpu, plan.prompt(n, int(draws)))
            assert found[: len(wanted)] == wanted, (path, arch, n, draws)
            assert {source for _, source in found if source} <= ready, (path, arch, n, draws)


@pytest.mark.parametrize("arch", [90, 86])
def test_a_runner_launches_what_is_planned(models, monkeypatch, arch):
    for name, path in models.items():
        if arch == 90 or not name.endswith(("-dense", "-moe")):
            check_runner(monkeypatch, path, arch)


@pytest.mark.parametrize("arch", [card[0] for card in CARDS if card[0] != 90])
def test_every_number_of_sequences_has_a_block_on_every_card(models, arch):
    """Real shapes; a block that does not fit the shared memory is an error when its launch is planned."""
    for name in ("8b", "30b"):
        (plan,) = plans(models[name], [card for card in CARDS if card[0] == arch], max_sequences=64)
        for n in range(1, 65):
            assert all(launch.kernel for launch in plan.decode(n))


@pytest.mark.parametrize("name", ["8b", "30b", "8b-plain-v", "mixed", "two-bit", "mamba-2.8b"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_steps_of_many_rows_are_planned(models, monkeypatch, name, deterministic):
    """17 to 64 rows hand operands over, more take the products of prompts or, deterministic, another turn."""
    check_runner(monkeypatch, models[name], 90, max_sequences=200, deterministic=deterministic)


@pytest.mark.parametrize(("kv_type", "names"), [("f32", ("mixed", "30b", "part 0")), ("q8_0", ("8b", "30b"))])
def test_other_caches_are_planned(models, monkeypatch, kv_type, names):
    for name in names:
        check_runner(monkeypatch, models[name], 90, kv_type=kv_type)


@pytest.mark.parametrize(
    ("kv_type", "slots", "throughput", "positions"),
    [
        (KvType.Q8_0, 64, True, 256),
        (KvType.Q8_0, 65, False, 512),
        (KvType.Q8_0, 65, True, 1024),
        (KvType.F16, 64, True, 128),
        (KvType.F16, 65, False, 128),
        (KvType.F16, 65, True, 512),
    ],
)
def test_ranges_of_attention_suit_the_runner(models, kv_type, slots, throughput, positions):
    """Longer where many sequences run, and more so where one alone does not matter."""
    (plan,) = plans(models["8b"], [(90, 132)], kv_type=kv_type, max_sequences=slots, throughput=throughput)
    assert {decode_plan(shape, 90, 132).min_chunk for shape in plan.attention_shapes} == {positions}


def test_a_model_that_caches_nothing_has_no_cache_of_bytes(tmp_path):
    (plan,) = plans(bert_like("bert", positions=True).write(tmp_path), [(90, 132)], kv_type=KvType.Q8_0)
    assert {shape.kv_type for shape in plan.attention_shapes} == {KvType.F16}


@pytest.mark.parametrize("arch", [90, 86])
@pytest.mark.parametrize("chunk", [1, 2, 7, 9])
def test_buffers_hold_batches_of_any_size(models, monkeypatch, arch, chunk):
    """Kernels read whole blocks of 8 or 256 rows; the arrays have room for them, and no batch allocates."""
    for name in ("part 0", "part 18", "mixed", "bf16", "8b", "30b", "mamba", "mamba-q8", "falcon-h1", "qwen35"):
        with pretended(monkeypatch, models[name], arch, max_sequences=1, prefill_chunk=chunk) as (runner, gpu):
            least = STATE_BORDER if runner.states else 1
            assert runner.prefill_chunk == max(chunk, least)
            read_prompt(runner, 1)  # makes the tables of products
            held = gpu.allocations
            for n in range(1, chunk + 1):
                read_prompt(runner, n)
            assert gpu.allocations == held
            assert len(runner.logits(list(range(12)))) == 12


@pytest.mark.parametrize("size", [*range(3, 20, 5), 31, 33, 65, 70])
def test_odd_numbers_of_rows_and_slots(models, monkeypatch, size):
    """As many slots as rows of a prompt: everything padded to blocks of rows has room in both phases."""
    arch = (90, 86)[size % 2]
    for name in ("part 0", "part 18", "mixed", "two-bit", "mamba"):
        sizes = {"max_sequences": size, "prefill_chunk": size, "context_length": 96}
        with pretended(monkeypatch, models[name], arch, **sizes) as (runner, _):
            for n in {1, size - 1, size}:
                read_prompt(runner, n)
                decode(runner, n)
            assert len(runner.logits(list(range(12)))) == 12


def families(plan, name):
    """By number of rows, the family of the product that reads a tensor, in decode steps; then in prompts."""
    (product,) = {one for one in plan.products if any(matrix.tensor == name for matrix in one.matrices)}
    return [product.family_for(n) for n in (1, 4, 5, 64, 65)], product.family_for(1, Phase.PROMPT)


def test_families_of_products(models):
    few, many, step = Family.MATVEC, Family.DECODE_GEMM, Family.STEP_GEMM
    (hopper,) = plans(models["8b"], [(90, 132)])
    (same,) = plans(models["8b"], [(90, 132)], deterministic=True)
    (other,) = plans(models["8b"], [(86, 84)])
    (plain,) = plans(models["8b-plain-v"], [(90, 132)])
    name = "blk.0.attn_q.weight"
    assert families(hopper, name) == ([few, few, many, many, step], Family.PREFILL_GEMM)
    assert families(same, name) == ([many] * 5, Family.PREFILL_GEMM)
    assert families(other, name) == ([few] * 5, Family.DENSE)
    assert families(plain, name) == ([few] * 5, Family.DENSE), "q goes with a float32 v"
    assert families(plain, "blk.0.ffn_down.weight") == families(hopper, name)


def test_families_of_experts(models):
    rows = (1, 4, 5, 256, 257)
    (hopper,) = plans(models["30b"], [(90, 132)])
    (same,) = plans(models["30b"], [(90, 132)], deterministic=True)
    (other,) = plans(models["30b"], [(80, 108)])
    found = [[plan.layers[0].moe.families.family_for(n) for n in rows] for plan in (hopper, same, other)]
    chosen = Family.EXPERTS_CHOSEN
    assert found[0] == [chosen, chosen, Family.EXPERTS_SHARED, Family.EXPERTS_SHARED, Family.EXPERTS_GROUPED]
    assert found[1] == found[2] == [chosen] * 5
    assert hopper.layers[0].moe.families.prompt is Family.EXPERTS_GROUPED
    assert other.layers[0].moe.families.prompt is Family.EXPERTS_EVERY
    scores = [hopper.layers[0].moe.score_family(n, Phase.DECODE) for n in rows]
    assert scores == [Family.ROUTER] * 5
    floats = [[plan.layers[0].moe.router.parts[0].family_for(n) for n in (2, 3)] for plan in (hopper, same, other)]
    few, many = Family.MATVEC, Family.FLOAT_GEMM
    assert floats == [[few, many], [few, few], [few, few]], "deterministic, and other cards: one for any number of rows"
    assert [plan.dense for plan in (hopper, same, other)] == [False, False, True]


def test_shared_experts_are_experts_of_the_stack(models, tmp_path):
    """Where types and widths allow it: then they have no launches of their own, and their score is the router's."""
    (plan,) = plans(models["35b"], [(90, 132)])
    moe = plan.layers[0].moe
    assert (moe.routing.n_shared, moe.routing.shared_scored, moe.shared, moe.shared_gate) == (1, True, None, None)
    assert [one.rows * one.count for one in moe.matrices()] == [257, 257 * 512, 257 * 2048]
    experts = [launch.kernel for launch in plan.decode(1) if launch.brick == "ffn_moe" and launch.layer == 0]
    assert experts == ["router", "moe_gate_up", "moe_down"]
    q6, q8 = GGMLType.Q6_K, GGMLType.Q8_0
    cases = {1: (1, q6, q6), 2: (2, q6, q6), 0: (1, q6, q8)}
    for expected, (times, *types) in cases.items():
        path = shared_expert_model(tmp_path, times, down=types[0], shared_down=types[1])
        (plan,) = plans(path, [(90, 132)])
        moe = plan.layers[0].moe
        assert moe.routing.n_shared == expected
        assert (moe.shared is None) == (expected > 0)
        assert moe.routing.shared_scored
        kernels = [launch.kernel for launch in plan.decode(1) if launch.brick == "ffn_moe" and launch.layer == 0]
        apart = ["router", "moe_gate_up", "matvec", "moe_down", "matvec", "add_gated"]
        assert kernels == (experts if expected else apart)


def test_operands_are_left_only_for_products_that_read_them(models):
    (plan,) = plans(models["8b"], [(90, 132)])
    assert [layer.leaves_inside for layer in plan.layers] == [True, True]
    assert [layer.leaves_hidden for layer in plan.layers] == [True, True]
    assert [layer.leaves_behind for layer in plan.layers] == [True, True]
    assert [layer.takes_left for layer in plan.layers] == [False, True]
    assert plan.output_takes_left
    converted = [sum(one.kernel == "batch_operand" for one in plan.decode(n)) for n in (16, 17, 64)]
    assert converted == [9, 1, 1], "the first layer's q, k and v read the embeddings"
    assert [plan.step(Phase.DECODE, n).hands_over for n in (16, 17, 64, 65)] == [False, True, True, False]
    assert not plan.step(Phase.PROMPT, 32).hands_over
    (plain,) = plans(models["8b-plain-v"], [(90, 132)])
    assert [layer.leaves_behind for layer in plain.layers] == [False, True], "the second layer's q, k and v read x"
    assert plain.output_takes_left


def test_a_recurrent_layer_leaves_the_operand_of_the_next(models):
    (plan,) = plans(models["mamba-2.8b"], [(90, 132)])
    assert [layer.leaves_behind for layer in plan.layers] == [True, True]
    assert [layer.takes_left for layer in plan.layers] == [False, True]
    assert not any(layer.leaves_inside for layer in plan.layers)
    shape = plan.state_shapes[0]
    assert (plan.attention_shapes, shape.state_bytes) == ((None, None), 4 * 5120 * (3 + 16))
    bricks = [launch.brick for launch in plan.decode(1)]
    assert list(dict.fromkeys(bricks)) == ["embed", "ssm_in", "ssm", "ssm_out", "head", "sample"]


def test_an_all_reduce_comes_behind_products_whose_columns_are_split(models):
    (plan,) = plans(models["8b"], [(90, 132)])
    layer = plan.layers[0]

    def split(projection):
        return replace(projection, parts=tuple(replace(part, split=Split.COLUMNS) for part in projection.parts))

    divided = replace(
        layer,
        mixer=replace(layer.mixer, output=split(layer.mixer.output)),
        ffn=replace(layer.ffn, down=split(layer.ffn.down)),
    )
    for step in (plan.step(Phase.DECODE, 1), plan.step(Phase.PROMPT, 100)):
        whole, found = list(layer.launches(step)), list(divided.launches(step))
        places = [i for i, launch in enumerate(found) if launch.kernel == "all_reduce"]
        assert [found[i].brick for i in places] == ["attn_output", "ffn_down"]
        assert [found[i - 1].tensors for i in places] == [("blk.0.attn_output.weight",), ("blk.0.ffn_down.weight",)]
        assert [launch for launch in found if launch.kernel != "all_reduce"] == whole


@pytest.mark.parametrize("name", ["mixed", "mamba-q8", *FAMILIES])
def test_a_runner_goes_through_its_life_on_a_pretended_card(models, monkeypatch, name):
    """Prompts, decode steps replayed from graphs, scores, logits, a profile, and close(), which leaves nothing."""
    sizes = {"max_sequences": 3, "context_length": 96, "cache_tokens": 3 * 128}
    with pretended(monkeypatch, models[name], **sizes, eager=False) as (runner, _):
        assert [sample.token_id for sample in generate(runner, [1, 2, 3], 5, slot=1, release=False)] == [0] * 5
        with pytest.raises(InvalidRequestError, match="idle model"):
            runner.profile(10, 2)
        runner.release(1)
        assert decode_logits(runner, [4, 5], slot=2).shape == (2, runner.config.vocab_size)
        assert runner.logits(list(range(60))).shape == (60, runner.config.vocab_size)
        for rows, depth in ((4, 0), (1, 96), (0, 0)):
            with pytest.raises(InvalidRequestError, match="allowed are 1 to 3 sequences and a depth of 0 to 94"):
                runner.profile(depth, rows)
        times = runner.profile(10, 2, repeats=1)
        bricks = [launch.brick for launch in runner._machine.weights.plan.decode(2)]
        assert [time.brick for time in times] == ["launch", *dict.fromkeys(bricks), "step"]
        runner.close()
        assert (vars(runner._machine), runner.states) == ({}, None)
        runner.close()


def test_prompts_of_a_shape_are_launched_by_hand_then_captured_then_replayed(models, monkeypatch):
    sizes = {"max_sequences": 3, "context_length": 96, "cache_tokens": 3 * 128}
    with pretended(monkeypatch, models["mixed"], **sizes, eager=False) as (runner, gpu):
        plan = runner._machine.weights.plan

        def products(n):
            found = launched(gpu, lambda: generate(runner, list(range(n)), 1, slot=1))
            wanted = planned(gpu, plan.prompt(n, 1))[1:-2]  # without what the host sends, and what draws
            return sum(found[i : i + len(wanted)] == wanted for i in range(len(found)))

        assert [products(7) for _ in range(4)] == [1, 1, 0, 0]
        assert products(8) == 1, "another shape"
    for name in ("30b", "35b", "qwen35", "mamba", "falcon-h1", *FAMILIES):  # float32 matrices, and states
        with pretended(monkeypatch, models[name], **sizes, eager=False) as (runner, gpu):
            counts = [len(launched(gpu, partial(generate, runner, list(range(20)), 1, slot=1))) for _ in range(4)]
            assert counts[0] == counts[1] > 4 * counts[2], name
            assert counts[2] == counts[3] < 10, "what the host sends, and what draws"
    with pretended(monkeypatch, models["8b-plain-v"], **sizes, eager=False) as (runner, gpu):
        assert runner._machine.weights.plan.dense
        for _ in range(4):
            assert "cublas" in [name for name, _ in launched(gpu, lambda: generate(runner, [1, 2, 3], 1, slot=1))]


def test_defaults_use_the_memory_that_is_free(models):
    """An 8B model of two layers here: positions are 16 times as cheap as those of all 32."""
    gib = 1 << 30
    with open_gguf(models["8b"]) as gguf:
        model = load_model(gguf)
        made = partial(make_plan, model, context_length=8192, kv_type="f16")
        large, small, full = (made(free=int(n * gib), max_sequences=None) for n in (139, 6, 2.5))
        given = made(free=139 * gib, max_sequences=100, cache_tokens=16384)
        counted = made(free=139 * gib, max_sequences=None, cache_tokens=200_000)
        with pytest.raises(DeviceError, match="GiB are free"):
            made(free=gib // 2, max_sequences=None)
        del model, made
    assert large.max_sequences == MOST_SEQUENCES >= 256
    assert large.pages == MOST_SEQUENCES * 128, "a whole context for each, and no more"
    for plan, free in ((small, 6 * gib), (full, 2.5 * gib)):
        assert 0.85 * free < plan.total <= CACHE_SHARE * free
        assert plan.max_sequences in step_sizes(MOST_SEQUENCES)
        assert plan.max_sequences >= LEAST_SEQUENCES
    assert (given.pages, given.max_sequences) == (256, 100)
    assert counted.max_sequences == 192, "one for every 1024 positions"


def test_a_plan_is_shown_as_a_table(models):
    def rows(name):
        shown = run("inspect", models[name], "--launches", "--device", "cuda").stdout
        lines = [re.split(r"  +", line.strip()) for line in shown.splitlines()]
        return lines[[line[0] for line in lines].index("layers") :]

    head, *found = rows("30b")
    assert head == ["layers", "tensors", "types", "shape", "decode", "prompts"]
    assert ["0", "ffn_gate_inp", "F32", "128 x 2048", "router", "float_gemm"] in found
    experts = "experts_chosen, experts_shared from 5, experts_grouped from 257"
    assert ["1", "ffn_down_exps", "Q6_K", "128 x 2048 x 768", experts, "experts_grouped"] in found
    families = "matvec, decode_gemm from 5, step_gemm from 65"
    assert found[-1] == ["output", "Q6_K", "1024 x 2048", families, "prefill_gemm"]
    _, *found = rows("mamba-2.8b")
    assert ["0-1", "ssm_dt", "Q5_0", "5120 x 160", families, "prefill_gemm"] in found
    _, *same = rows("bf16")
    families = "matvec, decode_gemm from 3, step_gemm from 65"
    assert same[0] == ["0-1", "attn_q attn_k attn_v", "BF16", "512 x 256", families, "prefill_gemm"]
    report = json.loads(run("inspect", models["bf16"], "--launches", "--device", "cuda", "--json").stdout)
    assert report["launches"][0] == dict(zip(head, same[0], strict=True))
    shown = run("inspect", models["bf16"], "--launches", "--device", "cpu").stdout
    assert "launches: the model runs on the CPU" in shown
