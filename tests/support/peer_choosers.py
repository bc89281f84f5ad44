"""Tiny models of which the conformance files do not show what they are about: choices that leave positions out, and
residual connections over several layers.

See peer_models.py.
"""

from tests.support.gguf_builder import build_gguf
from tests.support.hybrid_models import tiny_hybrid_parts
from tests.support.indexer_models import tokens


class Hybrid:
    """A file of hybrid_models.py, as naive_model.File is used."""

    def __init__(self, family):
        self.family, self.meta = family, {}
        self.metadata, self.tensors = tiny_hybrid_parts(family)

    def write(self, folder, more):
        """Its vocabulary is larger than that of the other models, and so is its tokenizer's."""
        path = folder / f"{self.family}.gguf"
        path.write_bytes(build_gguf(self.metadata, self.tensors))
        return path


CHOOSERS = {
    "deepseek32, four positions chosen": lambda: tokens()[0],
    "kimi-k3, states banked by every layer": lambda: Hybrid("kimi-k3"),
}
