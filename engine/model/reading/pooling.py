"""How a text's vectors become an embedding or a reranker's scores, from metadata."""

from __future__ import annotations

from engine.errors import ModelFileError, UnsupportedModelError
from engine.model.config import Pooling, RankConfig
from engine.model.reading.source import Source

POOLINGS = {1: Pooling.MEAN, 2: Pooling.CLS, 3: Pooling.LAST, 4: Pooling.RANK}
"""By the values of pooling_type."""

UNSAID = (0, -1, 2**32 - 1)
"""What writers store where they do not know; 0 would mean vectors of tokens, which no model is made for."""

DENSE_WIDTHS = ("dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out")


def read_pooling(source: Source) -> Pooling | None:
    """What the file asks for; None where it does not say.

    Raises:
        ModelFileError: pooling_type is no integer that means something.
    """
    return _pooling(source, "pooling_type")


def read_rank(source: Source) -> RankConfig | None:
    """The classification head; None where the file has none.

    Raises:
        ModelFileError: labels that are no texts.
        UnsupportedModelError: the head reads something else than the mean or one token.
    """
    if source.architecture.dense:
        for key in DENSE_WIDTHS:  # shapes of tensors say it, too
            source.read.integer(key, 0, low=0)
    parts = source.architecture.rank
    if parts is None or not any(f"cls{part}.weight" in source.tensors for part in ("", ".output")):
        return None
    pooling = _pooling(source, "classifier.pooling_type")
    if pooling not in (None, Pooling.MEAN, Pooling.CLS):
        raise UnsupportedModelError(
            f"{source.name}.classifier.pooling_type says {pooling.value}; supported are 1 (mean) and 2 (cls)"
        )
    mean = parts.mean if pooling is None else pooling is Pooling.MEAN
    return RankConfig(labels=_labels(source), mean=mean, gelu=parts.gelu, softmax=parts.softmax)


def _pooling(source: Source, key: str) -> Pooling | None:
    value = source.read.integer(key, 0, low=-1, high=2**32 - 1)
    if value in UNSAID:
        return None
    if value not in POOLINGS:
        allowed = ", ".join(f"{number} ({pooling.value})" for number, pooling in POOLINGS.items())
        raise ModelFileError(f"metadata key {source.name}.{key} is {value}; allowed are {allowed}")
    return POOLINGS[value]


def _labels(source: Source) -> tuple[str, ...]:
    key = "classifier.output_labels"
    if not source.read.has(key):
        return ()
    return source.read.texts(key)
