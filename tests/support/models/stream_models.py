"""Tiny models whose layers are joined by hyper-connections, without what their families have beside these."""

import re
from dataclasses import dataclass

import numpy as np

from tests.support.models.gguf_builder import build_gguf
from tests.support.models.hybrid_models import tiny_hybrid_parts


@dataclass
class StreamModel:
    """Metadata and tensors of a file."""

    meta: dict
    tensors: dict

    def write(self, folder):
        """The path of the file."""
        path = folder / "tiny.gguf"
        path.write_bytes(build_gguf(self.meta, self.tensors))
        return path


def qwen_4():
    """Low-rank gates; delta rules and attention, without indexers and tables of n-grams."""
    meta, tensors = tiny_hybrid_parts("qwen4exp")
    apart = re.compile(r"indexer\.|\.ple[._]|per_layer")
    meta = {key: value for key, value in meta.items() if not apart.search(key)}
    meta["qwen4exp.attention.compress_ratios"] = np.zeros(2, np.int32)
    return StreamModel(meta, {name: one for name, one in tensors.items() if not apart.search(name)})


def glm_5_next():
    """Streams that mix; delta rules alone, so that no layer has an indexer."""
    meta, tensors = tiny_hybrid_parts("glm5-next")
    of_attention = re.compile(r"indexer|_mla$|_lora_rank|rope\.|attention\.(key|value)_length")
    meta = {key: value for key, value in meta.items() if not of_attention.search(key)}
    meta["glm5-next.attention.head_count_kv"] = np.zeros(2, np.int32)
    attention = re.compile(r"blk\.1\.(attn_(?!norm)|indexer)")
    recurrent = re.compile(r"blk\.0\.(attn_(?!norm)|ssm_)")
    kept = {name: one for name, one in tensors.items() if not attention.match(name)}
    return StreamModel(
        meta, kept | {name.replace("blk.0", "blk.1"): one for name, one in kept.items() if recurrent.match(name)}
    )


STREAMS = {"hyper-connections": qwen_4, "streams that mix": glm_5_next}
"""Models by name."""
