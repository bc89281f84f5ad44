"""Whole texts on the GPU: packed into batches without padding, one vector of each or all of them.

A batch is prepared while the one before it runs; results are fetched behind the last one. Must not know of requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine.config import page_count
from engine.cuda.attention.cache import MOST_TEXTS, TextCache, text_pages
from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.load.device_weights import DeviceWeights
from engine.cuda.rows import parts
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.pooling import pool_rows
from engine.cuda.step.prompt_ops import PromptOps
from engine.errors import ContextFullError
from engine.model.batch import Batch, Outputs
from engine.model.config import Pooling
from engine.model.transformer import hidden_states

Texts = Sequence[Sequence[int]]


def whole_texts(texts: Texts, rows: int) -> Iterator[Texts]:
    """Texts of at most `rows` tokens each as batches of at most that many rows, in order.

    A batch's table of pages, which has a row as wide as the longest text for each, holds 4 * rows numbers at most.
    """
    first, n_rows, longest = 0, 0, 0
    for i, ids in enumerate(texts):
        n_texts, wide = i - first + 1, page_count(max(longest, len(ids)))
        if i > first and (n_rows + len(ids) > rows or n_texts > MOST_TEXTS or n_texts * wide > 4 * rows):
            yield texts[first:i]
            first, n_rows, longest = i, 0, 0
        n_rows, longest = n_rows + len(ids), max(longest, len(ids))
    if first < len(texts):
        yield texts[first:]


class TextReader:
    """Runs texts through a model whose tokens may see later ones of their text.

    Args:
        weights: the model.
        ops: the bricks; ops.buffers says how many rows a batch may have.
        context_length: tokens that a text may have; so many rows at least fit a batch.
    """

    def __init__(self, weights: DeviceWeights, ops: PromptOps, context_length: int) -> None:
        assert context_length <= ops.buffers.rows
        self._weights, self._ops = weights, ops
        self._context_length = context_length
        self._cache = TextCache(weights.plan.attention_shapes, text_pages(ops.buffers.rows))

    def vectors(self, texts: Texts, pooling: Pooling) -> list[npt.NDArray[np.float32]]:
        """See Runner.vectors."""
        for ids in texts:
            if len(ids) > self._context_length:
                raise ContextFullError(len(ids), self._context_length)
        self._ops.use(self._cache, None)
        batches = list(whole_texts(texts, self._ops.buffers.rows))
        results = [self.launch(batch, pooling) for batch in batches]
        return [vector for batch, result in zip(batches, results, strict=True) for vector in _split(batch, result)]

    def launch(self, texts: Texts, pooling: Pooling) -> DeviceArray:
        """Launches a batch over the cache of texts; gives vectors (N, D), or with NONE those of all tokens (T, D)."""
        import cupy

        batch = Batch.build((slot, ids, 0, Outputs.NONE) for slot, ids in enumerate(texts))
        self._cache.seat([span.n_rows for span in batch.spans])
        x: DeviceArray = hidden_states(self._weights, self._ops, batch)
        if self._weights.output_norm is not None:
            parts.normalize(x, x, self._weights.output_norm)
        n = batch.n_tokens if pooling is Pooling.NONE else len(texts)
        out: DeviceArray = cupy.empty((n, x.shape[1]), np.float32)
        if pooling is Pooling.NONE:
            row_ops.copy(x, out)
        else:
            pool_rows(x, self._cache.spans, out, pooling)
        return out


def _split(texts: Texts, result: DeviceArray) -> list[npt.NDArray[np.float32]]:
    """What belongs to each text of a batch, on the host; waits for the batch."""
    found: npt.NDArray[np.float32] = result.get()
    if len(found) == len(texts):
        return list(found[:, None])
    return np.split(found, np.cumsum([len(ids) for ids in texts])[:-1])
