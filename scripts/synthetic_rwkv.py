"""The tensors of RWKV-7 for scripts/synthetic_models.py, but for the embedding and the head's matrix."""

import math
from collections.abc import Iterator

from scripts.synthetic_tensors import Tensor

NAMES = "wavg"
"""Of the low-rank products, in the order of a shape's ranks: decays, rates, first values, gates."""


def list_rwkv_7(layers: int, width: int, ffn: int, head: int, ranks: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the tensors, all F32 still; memories last for some tens of tokens. head: columns of one."""
    back = 1 / math.sqrt(layers)
    for name in ("token_embd_norm", "output_norm"):
        yield from _norm(name, width, -1)
    for layer in range(layers):
        blk = f"blk.{layer}."
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            yield from _norm(f"{blk}{name}", width, layer)
        yield Tensor(f"{blk}time_mix_lerp_fused.weight", (6, 1, 1, width), std=0.1, mean=0.5, layer=layer)
        yield Tensor(f"{blk}channel_mix_lerp_k.weight", (1, 1, width), std=0.1, mean=0.5, layer=layer)
        for name, mean in (("w0", -3.0), ("a0", 0.0), ("v0", 0.5), ("k_k", 0.85), ("k_a", 1.0), ("r_k", 0.0)):
            yield Tensor(f"{blk}time_mix_{name}.weight", (width,), std=0.1, mean=mean, layer=layer)
        for letter, rank in zip(NAMES, ranks, strict=True):
            yield _matrix(f"{blk}time_mix_{letter}1", rank, width, layer)
            yield _matrix(f"{blk}time_mix_{letter}2", width, rank, layer)
        for name in ("receptance", "key", "value"):
            yield _matrix(f"{blk}time_mix_{name}", width, width, layer)
        yield _matrix(f"{blk}time_mix_output", width, width, layer, gain=back)
        yield _matrix(f"{blk}channel_mix_key", ffn, width, layer)
        yield _matrix(f"{blk}channel_mix_value", width, ffn, layer, gain=back)


def _matrix(name: str, rows: int, columns: int, layer: int, *, gain: float = 1.0) -> Tensor:
    return Tensor(f"{name}.weight", (rows, columns), std=gain / math.sqrt(columns), layer=layer)


def _norm(name: str, size: int, layer: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (size,), std=0.1, mean=1.0, layer=layer)
    yield Tensor(f"{name}.bias", (size,), std=0.1, layer=layer)
