"""Whole texts through a model at once, for embeddings: packed into one batch without padding, outside the scheduler.

Every product runs over the rows of all texts; attention is between the rows of one text. Keys and values are read in
the same layer only, so layers share one set of pages. It keeps nothing between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.config import KvType, page_count
from engine.cpu.bricks.base import Float32Array
from engine.cpu.bricks.ops import CpuOps
from engine.cpu.caches.model import KVCache
from engine.errors import ContextFullError
from engine.model.batch import Batch, Ids, Outputs
from engine.model.loader import LoadedModel
from engine.model.transformer import hidden_states

PIECE = 2048
"""Tokens up to which a text is one piece where it may be several, as its activations take memory."""


class TextPass:
    """Runs texts through the layers of a model.

    Args:
        model: the model.
        context_length: tokens that a text may have.
        make_ops: the bricks over a cache.
        values_apart: see KVCache.
    """

    def __init__(
        self,
        model: LoadedModel,
        context_length: int,
        make_ops: Callable[[KVCache], CpuOps],
        *,
        values_apart: bool,
    ) -> None:
        self._model = model
        self._context_length = context_length
        self._make_ops = make_ops
        self._values_apart = values_apart
        self._causal = model.config.causal
        self._recurrent = model.config.state_bytes > 0  # a text's states may take more than all of its keys

    def vectors(self, texts: Sequence[Ids]) -> list[Float32Array]:
        """Vectors (T, D) of each text behind the last norm.

        Raises:
            ContextFullError: a text is longer than the context.
            InvalidRequestError: a token id is not in the vocabulary.
        """
        for ids in texts:
            if len(ids) > self._context_length:
                raise ContextFullError(len(ids), self._context_length)
        whole = not self._causal or (max(map(len, texts)) <= PIECE and not self._recurrent)
        return self._packed(texts) if whole else self._one_by_one(texts)

    def _packed(self, texts: Sequence[Ids]) -> list[Float32Array]:
        """All texts in one batch."""
        pages, n_pages = [], 0
        for ids in texts:
            end = n_pages + page_count(len(ids))
            pages.append(range(n_pages, end))
            n_pages = end
        ops = self._make_ops(self._cache(len(texts), n_pages, max(map(len, texts)), shared=True))
        batch = Batch.build((slot, ids, 0, Outputs.ALL, pages[slot], 0) for slot, ids in enumerate(texts))
        rows = ops.normed(hidden_states(self._model.weights, ops, batch))
        return [rows[span.row : span.row + span.n_rows] for span in batch.spans]

    def _one_by_one(self, texts: Sequence[Ids]) -> list[Float32Array]:
        """Texts of which some are long, or with states: pieces of one after the other, over a whole cache."""
        longest = max(map(len, texts))
        ops = self._make_ops(self._cache(1, page_count(longest), longest, shared=False))
        found = []
        for ids in texts:
            parts = []
            for place, start in enumerate(range(0, len(ids), PIECE)):
                piece = ids[start : start + PIECE]
                batch = Batch.build([(0, piece, start, Outputs.ALL, range(page_count(longest)), place)])
                parts.append(ops.normed(hidden_states(self._model.weights, ops, batch)))
            found.append(np.concatenate(parts))
        return found

    def _cache(self, n_slots: int, n_pages: int, longest: int, *, shared: bool) -> KVCache:
        return KVCache(
            [layer.mixer for layer in self._model.config.layers],
            context_length=longest,
            n_slots=n_slots,
            n_pages=n_pages,
            kv_type=KvType.F32,
            values_apart=self._values_apart,
            shared=shared,
        )
