"""The tensors of real models and the types that llama.cpp's quantizer gives them.

For make_synthetic_gguf.py. Knows names, sizes and scales; nothing of files or of bytes.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from engine.gguf import GGMLType
from scripts.synthetic_rwkv import list_rwkv_7
from scripts.synthetic_shapes import Shape
from scripts.synthetic_tensors import Tensor

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
            yield from _mixer_of(s)(s, layer, blk, back)
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
    yield norm("token_embd_norm" if s.attention_layers and not s.groups else "output_norm", s.width)
    if not s.tied:
        yield matrix("output", s.vocab, s.width, gain=2.5)
    if s.rope_factor:
        yield Tensor("rope_freqs.weight", (s.head_dim // 2,), values=rope_factors(s))


def _mixer_of(s: Shape) -> Callable[[Shape, int, str, float], Iterator[Tensor]]:
    if s.groups:
        return list_mixer_2
    if s.attention_layers:
        return list_convolution
    return list_delta if s.heads else list_mixer


def list_convolution(s: Shape, layer: int, blk: str, back: float) -> Iterator[Tensor]:
    """Yield the tensors of a short convolution."""

    def matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
        return Tensor(f"{blk}shortconv.{name}.weight", shape, std=gain / math.sqrt(shape[-1]), layer=layer)

    yield matrix("in_proj", 3 * s.width, s.width)
    yield matrix("conv", s.width, s.conv)
    yield matrix("out_proj", s.width, s.width, gain=2 * back)


def list_mixer_2(s: Shape, layer: int, blk: str, back: float) -> Iterator[Tensor]:
    """Yield the tensors of a Mamba 2 layer of dt_rank heads, with decays and steps as for Mamba."""

    def matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
        return Tensor(f"{blk}{name}.weight", shape, std=gain / math.sqrt(shape[-1]), layer=layer)

    heads, convolved = s.dt_rank, s.inner + 2 * s.groups * s.state
    decays = np.linspace(-1, -16, heads, dtype=np.float32)[:, None]
    yield matrix("ssm_in", s.inner + convolved + heads, s.width)
    yield matrix("ssm_conv1d", convolved, s.conv)
    yield Tensor(f"{blk}ssm_conv1d.bias", (convolved,), std=0.1, layer=layer)
    yield Tensor(f"{blk}ssm_dt.bias", (heads,), std=1.3, mean=-4.6, layer=layer)
    yield Tensor(f"{blk}ssm_a", (heads, 1), values=decays, layer=layer)
    yield Tensor(f"{blk}ssm_d", (heads, 1), std=0.1, mean=1.0, layer=layer)
    yield Tensor(f"{blk}ssm_norm.weight", (s.groups, s.inner // s.groups), std=0.1, mean=1.0, layer=layer)
    yield matrix("ssm_out", s.width, s.inner, gain=2 * back)


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


SMALL = ("ffn_gate_inp", "ssm_conv1d", "ssm_norm", "shortconv.conv", "_lerp")
"""Parts of names of tensors that stay in float32."""


def choose_type(t: Tensor, s: Shape, recipe: str) -> GGMLType:
    """Return the type llama.cpp's quantizer gives a tensor."""
    base = RECIPES[recipe][0]
    low = re.search(r"time_mix_([wavg])[12]", t.name)  # of RWKV: they stay as they were converted
    if low and low[1] != "w" and base is not GGMLType.F32:
        return GGMLType.F16
    if low or len(t.shape) < 2 or any(name in t.name for name in SMALL) or t.name.endswith((".ssm_a", ".ssm_d")):
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
