"""Hyper-parameters of real models, for synthetic_models.py. Knows nothing of tensors."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Hyper-parameters of a model; names as in GGUF metadata.

    A recurrent one has inner > 0: layers of Mamba, or with groups of Mamba 2, and nothing else where it has no heads;
    with heads delta rules of dt_rank value heads, of which every full_every-th layer is gated attention instead. One
    with attention_layers has short convolutions in all others, or with groups layers of Mamba 2.
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
    ranks: tuple[int, ...] = ()  # of RWKV-7's decays, rates, first values and gates; else none
    groups: int = 0
    attention_layers: tuple[int, ...] = ()
    multipliers: tuple[float, ...] = ()  # of Granite: on embeddings, residuals, attention scores and logits

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        if self.attention_layers:
            return layer in self.attention_layers
        return self.heads > 0 and (self.full_every == 0 or layer % self.full_every == self.full_every - 1)


def _llama(**kw: Any) -> Shape:
    common = {"vocab": 128256, "context_length": 131072, "rope_base": 500000.0, "epsilon": 1e-5, "kv_heads": 8}
    return Shape(architecture="llama", **(common | kw))


def _qwen(architecture: str, **kw: Any) -> Shape:
    common = {"vocab": 151936, "context_length": 40960, "rope_base": 1000000.0, "epsilon": 1e-6}
    return Shape(architecture=architecture, qkv_bias=architecture == "qwen2", **(common | kw))


def _qwen3(architecture: str = "qwen3", **kw: Any) -> Shape:
    return _qwen(architecture, qk_norm=True, **kw)


def _rwkv_7(**kw: Any) -> Shape:
    common: dict[str, Any] = {"heads": 0, "kv_heads": 0, "head_dim": 64, "rope_base": 0.0, "epsilon": 1e-5}
    common |= {"vocab": 65536, "context_length": 1 << 20, "tied": False}
    return Shape(architecture="rwkv7", **(common | kw))


def _mamba(**kw: Any) -> Shape:
    common: dict[str, Any] = {"heads": 0, "kv_heads": 0, "ffn": 0, "head_dim": 0, "rope_base": 0.0, "epsilon": 1e-5}
    common |= {"vocab": 50280, "context_length": 1 << 20, "tied": True, "state": 16, "conv": 4}
    return Shape(architecture="mamba", **(common | kw))


def _mamba_2(**kw: Any) -> Shape:
    return replace(_mamba(state=128, groups=1, **kw), architecture="mamba2")


def _lfm2(**kw: Any) -> Shape:
    common: dict[str, Any] = {"layers": 16, "kv_heads": 8, "head_dim": 64, "vocab": 65536, "conv": 3, "tied": True}
    common |= {"context_length": 128000, "rope_base": 1e6, "epsilon": 1e-5, "qk_norm": True}
    common |= {"attention_layers": (2, 5, 8, 10, 12, 14)}
    return Shape(architecture="lfm2", **(common | kw))


def _granite_hybrid(**kw: Any) -> Shape:
    common: dict[str, Any] = {"head_dim": 64, "vocab": 100352, "state": 128, "conv": 4, "groups": 1, "tied": True}
    common |= {"context_length": 131072, "rope_base": 10000.0, "epsilon": 1e-5}
    return Shape(architecture="granitehybrid", **(common | kw))


def _hybrid(architecture: str = "qwen35", **kw: Any) -> Shape:
    common: dict[str, Any] = {"vocab": 248320, "context_length": 262144, "rope_base": 1e7, "conv": 4, "full_every": 4}
    common |= {"head_dim": 256, "rope_dim": 64, "state": 128, "dt_rank": 32, "key_heads": 16, "inner": 4096}
    return _qwen3(architecture, **(common | kw))


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
    "mamba2-370m": _mamba_2(layers=48, width=1024, inner=2048, dt_rank=32),
    "lfm2-350m": _lfm2(width=1024, heads=16, ffn=4608),
    "lfm2-1.2b": _lfm2(width=2048, heads=32, ffn=8192),
    "granite-4.0-h-350m": _granite_hybrid(
        layers=32, width=768, heads=12, kv_heads=4, ffn=2048, inner=1536, dt_rank=48,
        attention_layers=(10, 13, 17, 27), multipliers=(12.0, 0.246, 0.015625, 3.0),
    ),
    "tiny-llama": _llama(**_TINY, tied=True, rope_factor=8.0),
    "tiny-qwen2": _qwen("qwen2", **_TINY, tied=False),
    "tiny-qwen3": _qwen3(**_TINY, tied=True),
    "rwkv7-2.9b": _rwkv_7(layers=32, width=2560, ffn=10240, ranks=(96, 96, 64, 320)),
    "tiny-rwkv7": _rwkv_7(layers=2, width=256, ffn=512, ranks=(32, 32, 32, 64), vocab=1024, context_length=2048),
    "tiny-mamba": _mamba(layers=2, width=256, inner=512, dt_rank=16, vocab=1024, context_length=2048),
    "tiny-mamba2": _mamba_2(layers=2, width=256, inner=512, dt_rank=8, vocab=1024, context_length=2048),
    "tiny-granite-hybrid": _granite_hybrid(
        **_TINY, inner=512, dt_rank=8, attention_layers=(1,), multipliers=(12.0, 0.25, 0.125, 4.0)
    ),
    "tiny-lfm2": _lfm2(**_TINY, attention_layers=(1,)),
    "tiny-qwen35": _hybrid(
        **_TINY, tied=False, full_every=2, rope_dim=32, inner=256, state=64, dt_rank=4, key_heads=2
    ),
    "tiny-qwen3moe": _qwen3("qwen3moe", **_TINY, tied=False, experts=4, experts_used=2, expert_ffn=256),
}  # fmt: skip
