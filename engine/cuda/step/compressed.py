"""Attention over a window and compressed blocks between the layer's norm and its output projection.

Formulas: engine/model/config/compressed.py. The same launches serve decode steps and prompts. Must not know of batches.
Letters: T rows, H heads, Hd their width, G groups of heads.
"""

from __future__ import annotations

from engine.cuda.attention.cache import BlockCache
from engine.cuda.compressed.blocks import Blocks
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.indexer.indexer import PoolArrays, Rows, Scored
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_compressed import DeviceCompressed
from engine.cuda.rows import parts
from engine.cuda.rows.parts import DeviceNorm
from engine.cuda.step.folding import columns_of
from engine.cuda.step.latent import Product

_KEPT = PoolArrays(None, None, 0.0, None, 1.0)


def block_inputs(
    mixer: DeviceCompressed,
    product: Product,
    x: DeviceArray,
    norm: DeviceNorm | None,
    buffers: Activations,
    positions: DeviceArray,
    qkv: DeviceArray,
) -> None:
    """Queries and keys in qkv (T, row width); what blocks are made of, and the index's queries, stay in the buffers."""
    plan, n = mixer.plan, int(x.shape[0])
    heads, head, rank, turned = plan.shape.heads, plan.shape.head, plan.q_rank, plan.shape.rope_dim
    inputs = columns_of(buffers.inputs, n, plan.inputs.width)
    product(mixer.inputs, x, inputs, norm=norm)
    latent, queries, keys = inputs[:, :rank], qkv[:, : heads * head], qkv[:, heads * head : (heads + 1) * head]
    parts.normalize(latent, latent, mixer.q_a_norm)
    product(mixer.q_b, latent, queries)
    parts.normalize(queries, queries, mixer.q_norm, pieces=heads)
    parts.normalize(inputs[:, rank : rank + head], keys, mixer.kv_norm)
    both = qkv[:, : (heads + 1) * head].reshape(n, heads + 1, head)[:, :, head - turned :]
    parts.rotate(both, both, mixer.rope, positions)
    if mixer.index_q is not None:
        width = plan.shape.index_width
        q = columns_of(buffers.index_queries, n, mixer.index_q.width)
        product(mixer.index_q, latent, q)
        last = q.reshape(n, plan.shape.index_heads, width)[:, :, width - turned :]
        parts.rotate(last, last, mixer.rope, positions)


def attend_blocks(
    mixer: DeviceCompressed,
    kernels: Blocks,
    buffers: Activations,
    qkv: DeviceArray,
    cache: BlockCache,
    rows: Rows,
    out: DeviceArray,
) -> None:
    """out (T, H * Hd) = attention. Everything is in the cache before any row's attention reads it."""
    plan, n = mixer.plan, rows.count
    heads, head = plan.shape.heads, plan.shape.head
    inputs = columns_of(buffers.inputs, n, plan.inputs.width)
    first = plan.q_rank + head
    end = first + plan.shape.left
    kernels.append(qkv[:, heads * head : (heads + 1) * head], inputs[:, first:end], mixer.kept, cache, rows)
    if kernels.choice is not None:
        q = columns_of(buffers.index_queries, n, plan.shape.index_heads * plan.shape.index_width)
        kernels.choice.choose(Scored(q, inputs[:, end:], _KEPT), cache.index_keys, rows)
    kernels.attend(qkv, mixer.kept, cache, rows, out)


def block_values(
    mixer: DeviceCompressed, product: Product, attended: DeviceArray, buffers: Activations, positions: DeviceArray
) -> DeviceArray:
    """What the output projection reads, (T, G * rank), of what the heads give, (T, H * Hd), which is overwritten."""
    plan, n = mixer.plan, int(attended.shape[0])
    head, turned, width, rank = plan.shape.head, plan.shape.rope_dim, plan.group_width, plan.group_rank
    last = attended.reshape(n, plan.shape.heads, head)[:, :, head - turned :]
    parts.rotate(last, last, mixer.back, positions)
    out = columns_of(buffers.heads, n, len(mixer.output_a) * rank)
    for group, output_a in enumerate(mixer.output_a):
        product(output_a, attended[:, group * width : (group + 1) * width], out[:, group * rank : (group + 1) * rank])
    return out
