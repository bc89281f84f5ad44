"""How the vectors of a text's tokens become an embedding, or a reranker's scores. Pure description.

Independent of metadata and arrays; engine/runner/pooling.py computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Pooling(Enum):
    """How the vectors of a text's tokens become one vector; the values are those that callers write."""

    NONE = "none"  # they do not: one vector per token
    MEAN = "mean"
    CLS = "cls"  # that of the first token
    LAST = "last"  # that of the last token
    RANK = "rank"  # the classification head's scores


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """The classification head of a reranker: cls_output · (cls_norm(activation(cls · v + bias)) + bias).

    v is the first token's vector, the last one's in causal models, or the mean. Parts that a file lacks do nothing.
    """

    labels: tuple[str, ...] = ()  # what the scores mean, as far as the file says
    mean: bool = False  # v is the mean
    gelu: bool = False  # the activation is GELU, else tanh
    softmax: bool = False  # the scores are probabilities
