"""Shapes of real models and the tensor types that llama.cpp's quantizer gives their tensors.

For make_synthetic_gguf.py. Knows names, sizes and scales; nothing of files or of bytes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.gguf import GGMLType
from scripts.synthetic_rwkv import list_rwkv_7
from scripts.synthetic_tensors import Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Hyper-parameters of a model; names as in GGUF metadata.

    A recurrent one has inner > 0: layers of Mamba and nothing else where it has no heads; with heads delta rules of
    dt_rank value heads, of which every full_every-th layer is gated attention instead. RWKV-7 has ranks.
    """

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int
    context_length: int
    tied: bool
    rope_base: float
    epsilon: float
    rope_factor: float = 0.0  # Llama 3: by how much the lowest frequencies are divided; 0 = none
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0
    inner: int = 0
    state: int = 0
    conv: int = 0
    dt_rank: int = 0
    key_heads: int = 0
    full_every: int = 0
    rope_dim: int = 0  # 0 = the whole head
    shared_ffn: int = 0  # of the expert that every token passes through
    ranks: tuple[int, ...] = ()  # of RWKV-7's decays, rates, first values and gates

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return self.heads > 0 and (self.full_every == 0 or layer % self.full_every == self.full_every - 1)


def _llama(**kw: Any) -> Shape:
    common = {"vocab": 128256, "context_length": 131072, "rope_base": 500000.0, "epsilon": 1e-5, "kv_heads": 8}
    return Shape(architecture="llama", **(common | kw))


def _qwen(architecture: str, **kw: Any) -> Shape:
    common = {"vocab": 151936, "context_length": 40960, "rope_base": 1000000.0, "epsilon": 1e-6}
    return Shape(architecture=architecture, qkv_bias=architecture == "qwen2", **(common | kw))


def _qwen3(architecture: str = "qwen3", **kw: Any) -> Shape:
    return _qwen(architecture, qk_norm=True, **kw)


def _mamba(**kw: Any) -> Shape:
    common: dict[str, Any] = {"heads": 0, "kv_heads": 0, "ffn": 0, "head_dim": 0, "rope_base": 0.0, "epsilon": 1e-5}
    common |= {"vocab": 50280, "context_length": 1 << 20, "tied": True, "state": 16, "conv": 4}
    return Shape(architecture="mamba", **(common | kw))


def _hybrid(architecture: str = "qwen35", **kw: Any) -> Shape:
    common: dict[str, Any] = {"vocab": 248320, "context_length": 262144, "rope_base": 1e7, "conv": 4, "full_every": 4}
    common |= {"head_dim": 256, "rope_dim": 64, "state": 128, "dt_rank": 32, "key_heads": 16, "inner": 4096}
    return _qwen3(architecture, **(common | kw))


def _rwkv_7(**kw: Any) -> Shape:
    common: dict[str, Any] = {"heads": 0, "kv_heads": 0, "head_dim": 64, "rope_base": 0.0, "epsilon": 1e-5}
    common |= {"vocab": 65536, "context_length": 1 << 20, "tied": False}
    return Shape(architecture="rwkv7", **(common | kw))


_TINY: dict[str, Any] = {"layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024}
_TINY |= {"ffn": 512, "context_length": 2048}

SHAPES: dict[str, Shape] = {
    "llama-3.2-1b": _llama(layers=16, width=2048, heads=32, head_dim=64, ffn=8192, tied=True, rope_factor=32.0),
    "llama-3.2-3b": _llama(layers=28, width=3072, heads=24, head_dim=128, ffn=8192, tied=True, rope_factor=32.0),
    "llama-3.1-8b": _llama(layers=32, width=4096, heads=32, head_dim=128, ffn=14336, tied=False, rope_factor=8.0),
    "llama-3.1-70b": _llama(layers=80, width=8192, heads=64, head_dim=128, ffn=28672, tied=False, rope_factor=8.0),
    "qwen2-0.5b": _qwen(
        "qwen2", layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, tied=True, context_length=32768
    ),
    "qwen3-0.6b": _qwen3(layers=28, width=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072, tied=True),
    "qwen3-8b": _qwen3(layers=36, width=4096, heads=32, kv_heads=8, head_dim=128, ffn=12288, tied=False),
    "qwen3-30b-a3b": _qwen3(
        "qwen3moe",
        layers=48, width=2048, heads=32, kv_heads=4, head_dim=128, ffn=6144, tied=False,
        experts=128, experts_used=8, expert_ffn=768,
    ),
    "qwen3.5-0.8b": _hybrid(
        layers=24, width=1024, heads=8, kv_heads=2, ffn=3584, tied=True, inner=2048, dt_rank=16
    ),
    "qwen3.5-9b": _hybrid(layers=32, width=4096, heads=16, kv_heads=4, ffn=12288, tied=False),
    "qwen3.5-35b-a3b": _hybrid(
        "qwen35moe",
        layers=40, width=2048, heads=16, kv_heads=2, ffn=512, tied=False,
        experts=256, experts_used=8, expert_ffn=512, shared_ffn=512,
    ),
    # Models of attention alone that read as many bytes of weights for a token as the two above, to compare them with.
    "attention-9b": _qwen3(
        layers=32, width=4096, heads=56, kv_heads=8, head_dim=128, ffn=12288, tied=False, vocab=248320
    ),
    "attention-35b-a3b": _qwen3(
        "qwen3moe",
        layers=40, width=2048, heads=56, kv_heads=4, head_dim=128, ffn=6144, tied=False, vocab=248320,
        experts=256, experts_used=9, expert_ffn=512,
    ),
    "mamba-130m": _mamba(layers=24, width=768, inner=1536, dt_rank=48),
    "mamba-2.8b": _mamba(layers=64, width=2560, inner=5120, dt_rank=160),
    "rwkv7-2.9b": _rwkv_7(layers=32, width=2560, ffn=10240, ranks=(96, 96, 64, 320)),
    "tiny-rwkv7": _rwkv_7(layers=2, width=256, ffn=512, ranks=(32, 32, 32, 64), vocab=1024, context_length=2048),
    "tiny-llama": _llama(**_TINY, tied=True, rope_factor=8.0),
    "tiny-qwen2": _qwen("qwen2", **_TINY, tied=False),
    "tiny-qwen3": _qwen3(**_TINY, tied=True),
    "tiny-mamba": _mamba(layers=2, width=256, inner=512, dt_rank=16, vocab=1024, context_length=2048),
    "tiny-qwen35": _hybrid(
        **_TINY, tied=False, full_every=2, rope_dim=32, inner=256, state=64, dt_rank=4, key_heads=2
    ),
    "tiny-qwen3moe": _qwen3("qwen3moe", **_TINY, tied=False, experts=4, experts_used=2, expert_ffn=256),
}  # fmt: skip


# -- tensors -----------------------------------------------------------------------------------------------------------


def list_tensors(s: Shape) -> Iterator[Tensor]:
    """Yield every tensor of a shape, all F32 still.

    A matrix of standard deviation g / sqrt(columns) turns inputs of unit scale into outputs of scale g. The two that
    write to the residual stream are made smaller with depth, so that it stays of unit scale; logits get about 2.5.
    """
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    back = 1 / math.sqrt(s.layers)

    def matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
        return Tensor(f"{name}.weight", shape, std=gain / math.sqrt(shape[-1]), layer=layer)

    def norm(name: str, size: int) -> Tensor:
        return Tensor(f"{name}.weight", (size,), std=0.1, mean=1.0, layer=layer)

    layer = -1
    yield matrix("token_embd", s.vocab, s.width, gain=2.5)
    if s.ranks:
        yield from list_rwkv_7(s.layers, s.width, s.ffn, s.head_dim, s.ranks)
        yield matrix("output", s.vocab, s.width, gain=2.5)
        return
    for layer in range(s.layers):
        blk = f"blk.{layer}."
        yield norm(f"{blk}attn_norm", s.width)
        if not s.attends(layer):
            yield from (list_delta if s.heads else list_mixer)(s, layer, blk, back)
        if not s.heads:
            continue
        if s.attends(layer):
            yield matrix(f"{blk}attn_q", q * (2 if s.full_every else 1), s.width, gain=1.3)
            yield matrix(f"{blk}attn_k", kv, s.width, gain=1.3)
            yield matrix(f"{blk}attn_v", kv, s.width)
        if s.qkv_bias:
            for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                yield Tensor(f"{blk}{name}.bias", (size,), std=0.1, layer=layer)
        if s.qk_norm and s.attends(layer):
            yield norm(f"{blk}attn_q_norm", s.head_dim)
            yield norm(f"{blk}attn_k_norm", s.head_dim)
        if s.attends(layer):
            yield matrix(f"{blk}attn_output", s.width, q, gain=back)
        yield norm(f"{blk}post_attention_norm" if s.full_every else f"{blk}ffn_norm", s.width)
        if s.shared_ffn:
            yield Tensor(f"{blk}ffn_gate_inp_shexp.weight", (s.width,), std=1 / math.sqrt(s.width), layer=layer)
            yield matrix(f"{blk}ffn_gate_shexp", s.shared_ffn, s.width)
            yield matrix(f"{blk}ffn_up_shexp", s.shared_ffn, s.width)
            yield matrix(f"{blk}ffn_down_shexp", s.width, s.shared_ffn, gain=2 * back)
        if s.experts:
            yield matrix(f"{blk}ffn_gate_inp", s.experts, s.width)
            yield matrix(f"{blk}ffn_gate_exps", s.experts, s.expert_ffn, s.width)
            yield matrix(f"{blk}ffn_up_exps", s.experts, s.expert_ffn, s.width)
            yield matrix(f"{blk}ffn_down_exps", s.experts, s.width, s.expert_ffn, gain=2 * back)
        else:
            yield matrix(f"{blk}ffn_gate", s.ffn, s.width)
            yield matrix(f"{blk}ffn_up", s.ffn, s.width)
            yield matrix(f"{blk}ffn_down", s.width, s.ffn, gain=2 * back)
    layer = -1
    yield norm("output_norm", s.width)
    if not s.tied:
        yield matrix("output", s.vocab, s.width, gain=2.5)
    if s.rope_factor:
        yield Tensor("rope_freqs.weight", (s.head_dim // 2,), values=rope_factors(s))


def list_mixer(s: Shape, layer: int, blk: str, back: float) -> Iterator[Tensor]:
    """Yield the tensors of a Mamba layer, with decays and steps as the architecture's authors initialize them."""

    def matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
        return Tensor(f"{blk}{name}.weight", shape, std=gain / math.sqrt(shape[-1]), layer=layer)

    decays = np.broadcast_to(-np.arange(1, s.state + 1, dtype=np.float32), (s.inner, s.state))
    yield matrix("ssm_in", 2 * s.inner, s.width)
    yield matrix("ssm_conv1d", s.inner, s.conv)
    yield Tensor(f"{blk}ssm_conv1d.bias", (s.inner,), std=0.1, layer=layer)
    yield matrix("ssm_x", s.dt_rank + 2 * s.state, s.inner, gain=2.0)
    yield matrix("ssm_dt", s.inner, s.dt_rank, gain=0.5)
    yield Tensor(f"{blk}ssm_dt.bias", (s.inner,), std=1.3, mean=-4.6, layer=layer)  # steps of about 0.001 to 0.1
    yield Tensor(f"{blk}ssm_a", (s.inner, s.state), values=decays, layer=layer)
    yield Tensor(f"{blk}ssm_d", (s.inner,), std=0.1, mean=1.0, layer=layer)
    yield matrix("ssm_out", s.width, s.inner, gain=2 * back)


def list_delta(s: Shape, layer: int, blk: str, back: float) -> Iterator[Tensor]:
    """Yield the tensors of a layer of gated delta rules, whose memories last for some hundreds of tokens."""

    def matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
        return Tensor(f"{blk}{name}.weight", shape, std=gain / math.sqrt(shape[-1]), layer=layer)

    channels = 2 * s.key_heads * s.state + s.inner
    yield matrix("attn_qkv", channels, s.width)
    yield matrix("attn_gate", s.inner, s.width)
    yield matrix("ssm_beta", s.dt_rank, s.width)
    yield matrix("ssm_alpha", s.dt_rank, s.width)
    yield matrix("ssm_conv1d", channels, s.conv)
    yield Tensor(f"{blk}ssm_dt.bias", (s.dt_rank,), std=0.5, mean=-4.0, layer=layer)
    yield Tensor(f"{blk}ssm_a", (s.dt_rank,), std=0.1, mean=-1.0, layer=layer)
    yield Tensor(f"{blk}ssm_norm.weight", (s.state,), std=0.1, mean=1.0, layer=layer)
    yield matrix("ssm_out", s.width, s.inner, gain=2 * back)


def rope_factors(s: Shape) -> np.ndarray:
    """Return by how much Llama 3 divides each rotary frequency: 1 for waves under 2048 tokens, all of it above 8192.

    Source: the Llama 3.1 model card's rope scaling, original context 8192, low and high frequency factors 1 and 4.
    """
    waves = 2 * np.pi * s.rope_base ** (np.arange(0, s.head_dim, 2) / s.head_dim)
    blend = np.clip((8192 / waves - 1) / (4 - 1), 0, 1)
    return (1 / (blend + (1 - blend) / s.rope_factor)).astype(np.float32)


# -- types: llama.cpp's recipes ----------------------------------------------------------------------------------------

# name -> (the type most tensors get, id of general.file_type)
RECIPES: dict[str, tuple[GGMLType, int]] = {
    "F32": (GGMLType.F32, 0), "F16": (GGMLType.F16, 1), "BF16": (GGMLType.BF16, 32),
    "Q4_0": (GGMLType.Q4_0, 2), "Q4_1": (GGMLType.Q4_1, 3), "Q5_0": (GGMLType.Q5_0, 8), "Q5_1": (GGMLType.Q5_1, 9),
    "Q8_0": (GGMLType.Q8_0, 7), "Q2_K": (GGMLType.Q2_K, 10), "Q3_K_S": (GGMLType.Q3_K, 11),
    "Q3_K_M": (GGMLType.Q3_K, 12), "Q3_K_L": (GGMLType.Q3_K, 13), "Q4_K_S": (GGMLType.Q4_K, 14),
    "Q4_K_M": (GGMLType.Q4_K, 15), "Q5_K_S": (GGMLType.Q5_K, 16), "Q5_K_M": (GGMLType.Q5_K, 17),
    "Q6_K": (GGMLType.Q6_K, 18),
}  # fmt: skip

# Where rows are no multiple of 256. llama.cpp turns Q2_K and Q3_K into IQ4_NL, which is as large as Q4_0.
NARROW = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}


def use_more_bits(layer: int, layers: int) -> bool:
    """Say whether a layer is one of those that get a finer type: the first and last eighth, and each third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def choose_type(t: Tensor, s: Shape, recipe: str) -> GGMLType:
    """Return the type llama.cpp's quantizer gives a tensor."""
    base = RECIPES[recipe][0]
    low = s.ranks and re.search(r"time_mix_([wavg])[12]", t.name)  # small ones stay as they were converted
    if low and low[1] != "w" and base is not GGMLType.F32:
        return GGMLType.F16
    small = any(name in t.name for name in ("ffn_gate_inp", "ssm_conv1d", "_lerp")) or t.name.endswith(".ssm_a")
    if low or small or len(t.shape) < 2:
        return GGMLType.F32
    if base.block_size == 1:
        return base
    chosen = base
    more, eighth = use_more_bits(t.layer, s.layers), t.layer < s.layers // 8
    if t.name == "output.weight" or (s.tied and t.name == "token_embd.weight"):
        if base is not GGMLType.Q8_0:
            chosen = GGMLType.Q6_K
    elif "attn_qkv" in t.name:
        finer = {"Q3_K_M": GGMLType.Q4_K, "Q3_K_L": GGMLType.Q4_K, "Q4_K_M": GGMLType.Q5_K, "Q5_K_M": GGMLType.Q6_K}
        chosen = finer.get(recipe, base)
    elif "attn_v" in t.name:
        gqa = s.heads // s.kv_heads
        match recipe:
            case "Q2_K":
                chosen = GGMLType.Q4_K if gqa >= 4 else GGMLType.Q3_K
            case "Q3_K_M":
                chosen = GGMLType.Q5_K if t.layer < 2 else GGMLType.Q4_K
            case "Q3_K_L":
                chosen = GGMLType.Q5_K
            case "Q4_K_S" if t.layer < 4:
                chosen = GGMLType.Q5_K
            case "Q4_K_M" | "Q5_K_M" if more:
                chosen = GGMLType.Q6_K
        if s.layers == 80 and chosen in (GGMLType.Q3_K, GGMLType.Q4_K):
            chosen = GGMLType.Q5_K  # eight query heads share it in 70B models: worth the bits
    elif "ffn_down" in t.name:
        match recipe:
            case "Q2_K":
                chosen = GGMLType.Q3_K
            case "Q3_K_M":
                chosen = GGMLType.Q5_K if t.layer < s.layers // 16 else GGMLType.Q4_K
            case "Q3_K_L":
                chosen = GGMLType.Q5_K
            case "Q4_K_S" if eighth:
                chosen = GGMLType.Q5_K
            case "Q4_K_M" | "Q5_K_M" if more:
                chosen = GGMLType.Q6_K
    elif "attn_output" in t.name:
        finer = {"Q2_K": GGMLType.Q3_K, "Q3_K_M": GGMLType.Q4_K, "Q3_K_L": GGMLType.Q5_K}
        chosen = finer.get(recipe, base)
    if t.shape[-1] % chosen.block_size:
        chosen = NARROW.get(chosen, GGMLType.F16)
    return chosen if t.shape[-1] % chosen.block_size == 0 else GGMLType.F16


def plan(s: Shape, recipe: str, overrides: list[tuple[str, GGMLType]] | None = None) -> list[Tensor]:
    """Return all tensors with their types; an override (regular expression, type) goes before the recipe."""
    tensors = []
    for t in list_tensors(s):
        chosen = choose_type(t, s, recipe)
        for pattern, wanted in overrides or []:
            if re.search(pattern, t.name) and len(t.shape) > 1:
                chosen = wanted
        if t.shape[-1] % chosen.block_size:
            raise SystemExit(
                f"{t.name}: rows of {t.shape[-1]} are not whole {chosen.name} blocks of {chosen.block_size}"
            )
        tensors.append(replace(t, type=chosen))
    return tensors
