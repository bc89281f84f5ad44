"""The whole of a model as declarations name it: embedding, norms, head, classification head, biases."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from enum import Enum

from engine.model.config import NormKind
from engine.model.parts.presence import Presence


@dataclass(frozen=True, kw_only=True)
class EmbeddingParts:
    """From token ids to vectors of width D.

    Attributes:
        norm: token_embd_norm normalizes the vectors.
        bare_norm: the vectors are normalized, without a weight.
        positions: whether files have learned positions, position_embd.
        token_types: whether files have token_types, of which the first row is added to every vector.
        sqrt_width: vectors are multiplied by sqrt(D).
        scale: embedding_scale is read; the default (also for 0 in the file, 0 = 1), None = not read.
        per_layer: embedding_length_per_layer_input is read, the width of vectors that a token has for every layer; the
            default, None = not read.
    """

    norm: bool = False
    bare_norm: bool = False
    positions: Presence = Presence.NEVER
    token_types: Presence = Presence.NEVER
    sqrt_width: bool = False
    scale: float | None = None
    per_layer: int | None = None


@dataclass(frozen=True)
class NormParts:
    """All norms of a model.

    Attributes:
        kind: how a vector is normalized.
        epsilon: used where the file does not state it; None = the file must.
        weight: norms have a weight.
        bias: norms have a bias.
        either_epsilon: attention.layer_norm_epsilon is taken where attention.layer_norm_rms_epsilon is missing.
        either_kind: norms are of this kind only in files that leave out attention.layer_norm_rms_epsilon, else RMS.
    """

    kind: NormKind = NormKind.RMS
    _: KW_ONLY
    epsilon: float | None = None
    weight: bool = True
    bias: Presence = Presence.NEVER
    either_epsilon: bool = False
    either_kind: bool = False


class LogitScale(Enum):
    """What logit_scale in the file does."""

    NONE = "none"
    MULTIPLIES = "multiplies"
    DIVIDES = "divides"


@dataclass(frozen=True, kw_only=True)
class HeadParts:
    """From the last hidden state to logits.

    Attributes:
        scale: what logit_scale does.
        scale_default: logit_scale where the file leaves it out or states 0.
        scale_width: likewise it is D / this; None = scale_default.
        softcap: final_logit_softcapping is read; the default, None = not read.
        silent: tokens that are never given: the first, and the one behind the last; None = there are none.
        norm: name of the last norm; None = there is none.
        generates: files predict tokens; otherwise they make embeddings alone.
    """

    scale: LogitScale = LogitScale.NONE
    scale_default: float = 1.0
    scale_width: int | None = None
    softcap: float | None = None
    silent: tuple[int, int] | None = None
    norm: str | None = "output_norm"
    generates: bool = True


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
class BiasParts:
    """Biases of projections, by the last part of the tensor's name. A projection named in neither tuple may have one.

    Attributes:
        required: projections that must have a bias.
        unused: projections whose bias, if a file has one, takes no part.
    """

    required: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
