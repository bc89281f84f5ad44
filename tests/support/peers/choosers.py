"""Tiny models of which the conformance files do not show what they are about: choices that leave positions out, and
residual connections over several layers.

See models.py.
"""

import numpy as np

from tests.support.models.compressed_models import compressed
from tests.support.models.gguf_builder import build_gguf
from tests.support.models.hybrid_models import tiny_hybrid_parts
from tests.support.models.indexer_models import tokens

FIRST_ALONE = np.array([1, 0], np.int32)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8}


class Hybrid:
    """A file of hybrid_models.py, as naive_model.File is used."""

    def __init__(self, family):
        self.family, self.meta = family, {}
        self.metadata, self.tensors = tiny_hybrid_parts(family)

    def write(self, folder, more=None):
        """Its vocabulary is larger than that of the other models, and so is its tokenizer's."""
        path = folder / f"{self.family}.gguf"
        path.write_bytes(build_gguf(self.metadata, self.tensors))
        return path


FAMILIES = {
    "deepseek4": compressed,
    "glm-dsa": lambda: tokens("glm-dsa")[0],
    "glm5-next": lambda: Hybrid("glm5-next"),
}

CHOOSERS = {
    "deepseek32, four positions chosen": lambda: tokens()[0],
    "deepseek32, yarn": lambda: tokens(**YARN, **{"rope.scaling.yarn_log_multiplier": 0.1})[0],
    "glm-dsa, a choice for two layers": lambda: tokens("glm-dsa", **{"attention.indexer.types": FIRST_ALONE})[0],
    "qwen4exp, three streams and factors of 64 bits": lambda: Hybrid("qwen4exp"),
    "kimi-k3, states banked by every layer": lambda: Hybrid("kimi-k3"),
}
