"""How the vectors of a text's tokens become an embedding, or a reranker's scores.

Independent of metadata and devices; what follows the one vector of a text is engine/runner/pooling.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt


class Pooling(Enum):
    """How the vectors of a text's tokens become one vector; the values are those that callers write."""

    NONE = "none"  # they do not: one vector per token
    MEAN = "mean"
    CLS = "cls"  # that of the first token
    LAST = "last"  # that of the last token
    RANK = "rank"  # the classification head's scores


def pooled(text: npt.NDArray[np.float32], pooling: Pooling) -> npt.NDArray[np.float32]:
    """Of a text's vectors (T, D), T at least 1, their MEAN, the CLS or the LAST one as (1, D); with NONE all (T, D)."""
    if pooling is Pooling.NONE:
        return text
    if pooling is Pooling.MEAN:
        return np.asarray(text.mean(axis=0, keepdims=True, dtype=np.float64), dtype=np.float32)
    return np.asarray(text[:1] if pooling is Pooling.CLS else text[-1:])


@dataclass(frozen=True, kw_only=True)
class RankParts:
    """The classification head of rerankers, in files that have cls or cls.output.

    Attributes:
        gelu: the activation is GELU, else tanh.
        softmax: scores are probabilities.
        mean: the head reads the mean of a text, where classifier.pooling_type does not say.
    """

    gelu: bool = False
    softmax: bool = False
    mean: bool = False


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The classification head of a reranker: cls_output · (cls_norm(activation(cls · v + bias)) + bias).

    v is the first token's vector, the last one's in causal models, or the mean. Parts that a file lacks do nothing.
    """

    labels: tuple[str, ...] = ()  # what the scores mean, as far as the file says
    mean: bool = False  # v is the mean
    gelu: bool = False  # the activation is GELU, else tanh
    softmax: bool = False  # the scores are probabilities
