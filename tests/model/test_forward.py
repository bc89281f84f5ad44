"""The forward pass against an independent one: float64, loops over positions and heads, written from the formulas."""

import math

import numpy as np
import pytest

from engine.config import PAGE
from engine.cpu.backend import CpuBackend
from engine.errors import ContextFullError, InvalidRequestError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from tests.support.gguf_builder import build_gguf, tiny_llama_parts

TOKENS = [3, 250, 17, 17, 99, 201, 4, 260, 33, 8, 120, 77]


class Naive:
    """Logits of a llama-like model, one position after the other, from numbers in float64."""

    def __init__(self, metadata, tensors):
        self.meta = {key.split(".", 1)[1]: value for key, value in metadata.items() if not key.startswith("general")}
        self.arch = metadata["general.architecture"]
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.heads = self.meta["attention.head_count"]
        self.kv_heads = self.meta.get("attention.head_count_kv", self.heads)

    def project(self, name, x, expert=None):
        weight, scale = self.tensors[name + ".weight"], self.tensors.get(name + ".scale")
        bias = self.tensors.get(name + ".bias")
        y = (weight if expert is None else weight[expert]) @ x
        y = y if scale is None else y * (scale[0] if expert is None else scale[expert])
        if bias is None:
            return y
        # llama.cpp scales the bias of feed-forward projections too
        return y + bias * (scale[0] if scale is not None and ".ffn_" in name else 1.0)

    def norm(self, name, x):
        return (
            x
            / math.sqrt((x * x).mean() + self.meta["attention.layer_norm_rms_epsilon"])
            * self.tensors[name + ".weight"]
        )

    def frequency(self, i, n_rot):
        """Radians per position of pair i, and the factor on cos and sin."""
        f = self.meta.get("rope.freq_base", 10000.0) ** (-2.0 * i / n_rot)
        if "rope_freqs.weight" in self.tensors:
            f /= self.tensors["rope_freqs.weight"][i]
        s = self.meta.get("rope.scaling.factor", 0.0) or 1.0
        if self.meta.get("rope.scaling.type", "linear") == "linear":
            return f / s, 1.0
        original = self.meta["rope.scaling.original_context_length"]

        def dim(turns):
            return n_rot * math.log(original / (2 * math.pi * turns)) / (2 * math.log(self.meta["rope.freq_base"]))

        low, high = max(0, math.floor(dim(32.0))), min(n_rot - 1, math.ceil(dim(1.0)))
        keep = 1.0 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
        return keep * f + (1.0 - keep) * f / s, 1.0 + 0.1 * math.log(s)

    def rope(self, head, position):
        n_rot = self.meta.get("rope.dimension_count", len(head))
        out = head.copy()
        for i in range(n_rot // 2):
            a, b = (2 * i, 2 * i + 1) if self.arch in ("llama", "mistral3") else (i, i + n_rot // 2)
            frequency, magnitude = self.frequency(i, n_rot)
            c, s = magnitude * math.cos(position * frequency), magnitude * math.sin(position * frequency)
            out[a], out[b] = head[a] * c - head[b] * s, head[a] * s + head[b] * c
        return out

    def attention(self, prefix, x, position, keys, values):
        width = len(self.tensors[f"{prefix}.attn_q.weight"]) // self.heads
        q = self.project(f"{prefix}.attn_q", x).reshape(self.heads, width)
        k = self.project(f"{prefix}.attn_k", x).reshape(self.kv_heads, width)
        if f"{prefix}.attn_q_norm.weight" in self.tensors:
            q = np.array([self.norm(f"{prefix}.attn_q_norm", head) for head in q])
            k = np.array([self.norm(f"{prefix}.attn_k_norm", head) for head in k])
        keys.append(np.array([self.rope(head, position) for head in k]))
        values.append(self.project(f"{prefix}.attn_v", x).reshape(self.kv_heads, -1))
        sharpen = 1.0
        if self.meta.get("attention.temperature_scale"):
            steps = position // self.meta["rope.scaling.original_context_length"]
            sharpen += self.meta["attention.temperature_scale"] * math.log(1 + steps)
        window = self.meta.get("attention.sliding_window", 0) or 10**9
        out = []
        for h in range(self.heads):
            shared = h * self.kv_heads // self.heads
            query = self.rope(q[h], position) * sharpen
            seen = range(max(0, position - window + 1), position + 1)
            weights = np.exp([query @ keys[j][shared] / math.sqrt(width) for j in seen])
            out.append(sum(w * values[j][shared] for w, j in zip(weights / weights.sum(), seen, strict=True)))
        return self.project(f"{prefix}.attn_output", np.concatenate(out))

    def gated(self, prefix, suffix, x, expert=None):
        gate = self.project(f"{prefix}.ffn_gate{suffix}", x, expert)
        up = self.project(f"{prefix}.ffn_up{suffix}", x, expert)
        return self.project(f"{prefix}.ffn_down{suffix}", gate / (1.0 + np.exp(-gate)) * up, expert)

    def feed_forward(self, prefix, x):
        if not self.meta.get("expert_count"):
            return self.gated(prefix, "", x)
        scores = np.exp(self.project(f"{prefix}.ffn_gate_inp", x))
        scores /= scores.sum()
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: self.meta["expert_used_count"]]
        total = 1.0 if self.arch == "qwen2moe" else sum(scores[e] for e in best)
        y = sum(scores[e] / total * self.gated(prefix, "_exps", x, e) for e in best)
        if f"{prefix}.ffn_gate_inp_shexp.weight" in self.tensors:
            share = 1.0 / (1.0 + math.exp(-self.tensors[f"{prefix}.ffn_gate_inp_shexp.weight"].ravel() @ x))
            y = y + share * self.gated(prefix, "_shexp", x)
        return y

    def logits(self, tokens):
        cache = [([], []) for _ in range(self.meta["block_count"])]
        rows = []
        for position, token in enumerate(tokens):
            x = self.tensors["token_embd.weight"][token]
            for layer, (keys, values) in enumerate(cache):
                prefix = f"blk.{layer}"
                x = x + self.attention(prefix, self.norm(f"{prefix}.attn_norm", x), position, keys, values)
                x = x + self.feed_forward(prefix, self.norm(f"{prefix}.ffn_norm", x))
            head = "output" if "output.weight" in self.tensors else "token_embd"
            rows.append(self.project(head, self.norm("output_norm", x)))
        return np.array(rows)


def with_biases(tensors):
    rng = np.random.default_rng(5)
    for name in [name for name in tensors if name.startswith("blk") and "norm" not in name]:
        tensors[name.replace("weight", "bias")] = rng.normal(0, 0.3, tensors[name].shape[0]).astype(np.float32)


def with_scales(tensors):
    with_biases(tensors)
    rng = np.random.default_rng(6)
    for name in [name for name in tensors if name.startswith("blk") and name.endswith("weight") and "norm" not in name]:
        tensors[name.replace("weight", "scale")] = rng.uniform(0.5, 2.0, 1).astype(np.float32)
        tensors[name.replace("weight", "input_scale")] = rng.uniform(0.5, 2.0, 1).astype(np.float32)


def with_freqs(tensors):
    tensors["rope_freqs.weight"] = np.linspace(1.0, 8.0, 8).astype(np.float32)


def with_qk_norm(tensors):
    rng = np.random.default_rng(7)
    for i in range(2):
        for which in "qk":
            tensors[f"blk.{i}.attn_{which}_norm.weight"] = rng.uniform(0.5, 2.0, 16).astype(np.float32)


def with_fused_qkv(tensors):
    for i in range(2):
        parts = [tensors.pop(f"blk.{i}.attn_{which}.weight") for which in "qkv"]
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)


def with_experts(tensors, shared=0):
    rng = np.random.default_rng(8)
    for i in range(2):
        prefix = f"blk.{i}.ffn"
        for name in ("gate", "up", "down"):
            rows, columns = tensors.pop(f"{prefix}_{name}.weight").shape
            shape = (5, rows, columns)
            tensors[f"{prefix}_{name}_exps.weight"] = rng.normal(0, 0.12, shape).astype(np.float32)
            if shared:
                small = (shared, columns) if name != "down" else (rows, shared)
                tensors[f"{prefix}_{name}_shexp.weight"] = rng.normal(0, 0.12, small).astype(np.float32)
        tensors[f"{prefix}_gate_inp.weight"] = rng.normal(0, 0.3, (5, 64)).astype(np.float32)
        if shared:
            tensors[f"{prefix}_gate_inp_shexp.weight"] = rng.normal(0, 0.3, 64).astype(np.float32)


def with_expert_scales(tensors):
    with_experts(tensors)
    rng = np.random.default_rng(9)
    for name in [name for name in tensors if name.endswith("_exps.weight")]:
        tensors[name.replace("weight", "scale")] = rng.uniform(0.5, 2.0, 5).astype(np.float32)


EXPERTS = {"expert_count": 5, "expert_used_count": 2}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 100,
}
CASES = {
    "grouped heads": {},
    "one kv head": {"kv_heads": 1},
    "as many kv heads": {"kv_heads": 4},
    "separate head": {"tied": False},
    "half-split rope": {"architecture": "qwen2"},
    "partial rope": {"metadata": {"rope.dimension_count": 8}},
    "linear scaling": {"metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    "yarn": {"metadata": YARN},
    "llama 3 frequencies": {"change": with_freqs},
    "sliding window": {"metadata": {"attention.sliding_window": 4}},
    "window of one": {"metadata": {"attention.sliding_window": 1}},
    "biases": {"change": with_biases},
    "scales": {"change": with_scales},
    "wide heads": {"metadata": {"attention.key_length": 16, "attention.value_length": 16}, "heads": 4},
    "temperature": {
        "architecture": "mistral3",
        "metadata": {"attention.temperature_scale": 0.4, "rope.scaling.original_context_length": 3},
    },
    "qk norm": {"architecture": "qwen3", "change": with_qk_norm},
    "experts": {"metadata": EXPERTS, "change": with_experts},
    "expert scales": {"metadata": EXPERTS, "change": with_expert_scales},
    "shared expert": {
        "architecture": "qwen2moe",
        "metadata": EXPERTS | {"expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 24},
        "change": lambda tensors: with_experts(tensors, shared=24),
    },
}


def make(tmp_path, *, metadata=None, change=None, architecture="llama", **options):
    meta, tensors = tiny_llama_parts(
        tokenizer=False,
        architecture=architecture,
        metadata={f"{architecture}.{key}": value for key, value in (metadata or {}).items()},
        **options,
    )
    if change is not None:
        change(tensors)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"  # a new file: earlier ones may be mapped
    path.write_bytes(build_gguf(meta, tensors))
    return meta, tensors, path


BACKENDS = []


@pytest.fixture(autouse=True)
def close_backends():
    yield
    for backend in BACKENDS:
        backend.close()
        backend.model.gguf.close()
    BACKENDS.clear()


def opened(path, **options):
    gguf = open_gguf(path)
    BACKENDS.append(CpuBackend(load_model(gguf), **({"threads": 1, "exact": True, "kv_type": "f32"} | options)))
    return BACKENDS[-1]


def all_logits(backend, tokens, slot=0):
    return backend.forward(Batch.build([(slot, tokens, 0, Outputs.ALL)]))


def step(backend, tokens, slot=0):
    rows = [backend.forward(Batch.build([(slot, [t], i, Outputs.LAST)])) for i, t in enumerate(tokens)]
    return np.concatenate(rows)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_the_formulas(tmp_path, case):
    meta, tensors, path = make(tmp_path, **case)
    expected = Naive(meta, tensors).logits(TOKENS)
    backend = opened(path, max_sequences=2)
    # float32 against float64: about 1e-6 of logits whose spread is about 3
    np.testing.assert_allclose(all_logits(backend, TOKENS), expected, atol=5e-5)
    np.testing.assert_allclose(step(backend, TOKENS, slot=1), expected, atol=5e-5)


def test_fused_projections_are_slices(tmp_path):
    meta, tensors, path = make(tmp_path)
    expected = Naive(meta, tensors).logits(TOKENS)
    _, _, path = make(tmp_path, change=with_fused_qkv)
    np.testing.assert_allclose(all_logits(opened(path), TOKENS), expected, atol=5e-5)


def test_per_layer_head_counts(tmp_path):
    _, _, path = make(tmp_path, metadata={"attention.head_count_kv": [2, 2]})
    same = all_logits(opened(path), TOKENS)
    _, _, path = make(tmp_path)
    np.testing.assert_array_equal(same, all_logits(opened(path), TOKENS))

    def narrow(tensors):
        for which in "kv":
            name = f"blk.1.attn_{which}.weight"
            tensors[name] = tensors[name][:16]

    _, tensors, path = make(tmp_path, metadata={"attention.head_count_kv": [2, 1]}, change=narrow)
    backend = opened(path)
    assert [layer.attention.n_kv_heads for layer in backend.config.layers] == [2, 1]
    # Sharing one key/value head equals having two equal ones.
    for which in "kv":
        name = f"blk.1.attn_{which}.weight"
        tensors[name] = np.concatenate([tensors[name]] * 2)
    meta, _, _ = make(tmp_path)
    np.testing.assert_allclose(all_logits(backend, TOKENS), Naive(meta, tensors).logits(TOKENS), atol=5e-5)


@pytest.mark.parametrize("exact", [True, False], ids=["reference", "kernels"])
def test_a_batch_of_several_sequences(tmp_path, exact):
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=6, exact=exact)
    first, second = TOKENS[:5], TOKENS[3:]
    alone = all_logits(backend, first), all_logits(backend, second, slot=1)
    together = backend.forward(Batch.build([(3, first[:4], 0, Outputs.NONE), (2, second[:-1], 0, Outputs.ALL)]))
    np.testing.assert_allclose(together, alone[1][:-1], atol=2e-5)
    # Now one row of each, and a prompt chunk beside them.
    parts = [
        (3, first[4:], 4, Outputs.LAST),
        (4, second, 0, Outputs.LAST),
        (2, second[-1:], len(second) - 1, Outputs.LAST),
    ]
    mixed = backend.forward(Batch.build(parts))
    np.testing.assert_allclose(mixed, np.stack([alone[0][-1], alone[1][-1], alone[1][-1]]), atol=2e-5)


def test_single_rows_do_not_depend_on_company(tmp_path):
    """Bit for bit: a decode step gives a sequence the same logits whatever runs beside it."""
    _, _, path = make(tmp_path, metadata=EXPERTS, change=with_experts)
    for exact in (True, False):
        backend = opened(path, max_sequences=3, exact=exact)
        for slot in range(3):
            all_logits(backend, TOKENS[slot:], slot=slot)
        n = [len(TOKENS) - slot for slot in range(3)]
        alone = backend.forward(Batch.build([(1, [42], n[1], Outputs.LAST)]))
        together = backend.forward(Batch.build([(slot, [42 - slot + 1], n[slot], Outputs.LAST) for slot in range(3)]))
        if exact:  # the reference leaves the order of sums to the BLAS
            np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
        else:
            np.testing.assert_array_equal(together[1], alone[0])


def test_long_prompts_in_chunks(tmp_path, monkeypatch):
    """Bounded score and cache pieces give what one piece gives."""
    tokens = np.random.default_rng(0).integers(0, 270, 600)
    for metadata in ({}, {"attention.sliding_window": 100}):
        _, _, path = make(tmp_path, context_length=700, metadata=metadata)
        backend = opened(path, max_sequences=3)
        whole = all_logits(backend, tokens)
        monkeypatch.setattr("engine.cpu.reference.SCORE_BYTES", 4 * 4 * 600 * 7)
        monkeypatch.setattr("engine.cpu.reference.PIECE_BYTES", 1)
        np.testing.assert_allclose(all_logits(backend, tokens, slot=1), whole, atol=5e-5)
        rows = [
            backend.forward(Batch.build([(2, tokens[start : start + 150], start, Outputs.ALL)]))
            for start in range(0, 600, 150)
        ]
        np.testing.assert_allclose(np.concatenate(rows), whole, atol=5e-5)
        monkeypatch.undo()


def test_cache_types(tmp_path):
    _, _, path = make(tmp_path)
    exact = step(opened(path, kv_type="f32"), TOKENS)
    half = step(opened(path, kv_type="f16"), TOKENS)
    # Half precision keeps 11 bits: about 1e-3 of keys and values, and of logits whose spread is about 3.
    assert 0 < np.abs(half - exact).max() < 0.02
    with pytest.raises(InvalidRequestError, match=r"'q8'.*f16, f32"):
        CpuBackend(BACKENDS[0].model, kv_type="q8")


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_packed_weights(tmp_path, kind):
    """Kernels and reference agree on packed weights, and the reference agrees with the formulas on their values."""
    from engine.gguf.quants import dequantize

    meta, tensors, path = make(tmp_path, weight_type=kind)
    values = {
        name: dequantize(tensor[0], tensor[2]).reshape(tensor[1]) if isinstance(tensor, tuple) else tensor
        for name, tensor in tensors.items()
    }
    expected = Naive(meta, values).logits(TOKENS)
    np.testing.assert_allclose(all_logits(opened(path), TOKENS), expected, atol=5e-5)
    np.testing.assert_allclose(all_logits(opened(path, exact=False), TOKENS), expected, atol=5e-5)


def test_only_the_rows_asked_for(tmp_path):
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=2)
    assert backend.forward(Batch.build([(0, TOKENS, 0, Outputs.NONE)])).shape == (0, backend.config.vocab_size)
    last = backend.forward(Batch.build([(1, TOKENS, 0, Outputs.LAST)]))
    np.testing.assert_allclose(last[0], all_logits(backend, TOKENS)[-1], atol=2e-5)


def test_logits_in_chunks(tmp_path):
    _, _, path = make(tmp_path, context_length=300)
    backend = opened(path, max_sequences=2)
    tokens = np.arange(150)
    parts = list(backend.logit_chunks(Batch.build([(0, tokens, 0, Outputs.ALL)])))
    assert [len(part) for part in parts] == [64, 64, 22]
    np.testing.assert_allclose(np.concatenate(parts), all_logits(backend, tokens, slot=1), atol=2e-5)


def contents(backend):
    """Everything in the cache, in one row."""
    return np.concatenate([array.ravel() for layer in (0, 1) for array in backend.cache.arrays(layer)])


def test_a_full_context(tmp_path):
    _, _, path = make(tmp_path, context_length=10)
    backend = opened(path)
    all_logits(backend, TOKENS[:10])
    before = contents(backend)
    for tokens, n_past in ((TOKENS[:1], 10), (TOKENS[:3], 8), (TOKENS, 0)):
        with pytest.raises(ContextFullError) as caught:
            backend.forward(Batch.build([(0, tokens, n_past, Outputs.LAST)]))
        assert (caught.value.length, caught.value.limit) == (n_past + len(tokens), 10)
    np.testing.assert_array_equal(contents(backend), before)
    assert opened(path, context_length=12).forward(Batch.build([(0, TOKENS, 0, Outputs.LAST)])).shape[0] == 1


def test_unknown_tokens(tmp_path):
    _, _, path = make(tmp_path)
    backend = opened(path)
    for token in (-1, 272, 2**31 - 1):
        with pytest.raises(InvalidRequestError, match=f"token id {token} .*0 to 271"):
            all_logits(backend, [1, token])
    assert not contents(backend).any()


def test_an_interrupted_step_can_be_repeated(tmp_path, monkeypatch):
    _, _, path = make(tmp_path)
    backend = opened(path, max_sequences=2)
    whole = step(backend, TOKENS, slot=1)
    all_logits(backend, TOKENS[:8])
    calls = 0

    def interrupted(*_):
        nonlocal calls
        calls += 1
        if calls == 2:  # the second layer: the first has written its rows
            raise KeyboardInterrupt
        return original(*_)

    original = backend._ops.attention
    monkeypatch.setattr(backend._ops, "attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.forward(Batch.build([(0, TOKENS[5:], 5, Outputs.ALL)]))
    monkeypatch.undo()
    again = backend.forward(Batch.build([(0, TOKENS[5:], 5, Outputs.ALL)]))
    np.testing.assert_allclose(again, whole[5:], atol=2e-5)


def test_memory_plan(tmp_path):
    _, _, path = make(tmp_path)
    backend = opened(path, kv_type="f16", max_sequences=3, context_length=50)
    plan = backend.memory_plan()
    assert plan.kv_bytes_per_token == 2 * 2 * (16 + 16) * 2  # layers, kv heads, key and value, two bytes
    assert plan.kv_bytes == 3 * PAGE * plan.kv_bytes_per_token  # whole pages
    assert plan.weights_bytes == sum(info.n_bytes for info in backend.model.gguf.tensors.values())
    assert plan.total_bytes == plan.weights_bytes + plan.kv_bytes + plan.scratch_bytes
