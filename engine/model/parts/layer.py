"""A layer as declarations name it: its norms, the order of its parts, and what it does beside them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.model.config import SkipKind


class Parallel(Enum):
    """Whether the feed-forward part reads the layer's input, beside the mixer."""

    NEVER = "never"
    ALWAYS = "always"
    STATED = "stated"  # use_parallel_residual says so
    WITHOUT_NORM = "without_norm"  # where a layer has no ffn_norm, and then it shares attn_norm's


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Norms of a layer and the order of its parts.

    A norm is a tuple of tensor names, of which the first that the file has is taken; () = no such norm.

    Attributes:
        attn_norm: the norm before the mixer.
        ffn_norm: the norm before the feed-forward part.
        attn_post_norm: the norm after the mixer, before the residual is added.
        ffn_post_norm: the norm after the feed-forward part, before the residual is added.
        output_norms: attn_output_norm and layer_output_norm come after the residuals are added; attn_norm_2 too, in
            layers that have it.
        attn_norm_optional: a layer without attn_norm reads its input as it is.
        prefix: layer i's tensors have names that begin with this and ".i.".
        parallel: whether mixer and feed-forward part read the same input.
        post_epsilon: ε of the norms after the parts, where it is not that of the others.
        residual_scale: residual_scale is read; c of the default c / sqrt(layers), 0 = 1, None = not read.
        without_heads: a layer whose attention.head_count is 0 has no mixer, and one whose feed_forward_length is 0 no
            feed-forward part.
        behind_stated: swin_norm may say that attn_norm and ffn_norm come after the parts.
        loops: num_loops is read: tokens pass all layers so many times, with output_norm between the passes unless
            skip_loop_final_norm.
        embedding_skip: layer_output_scale times the embedding is added to what a layer gives.
        one_part: a layer has one part alone: a feed-forward part where feed_forward_length is above zero, else a mixer.
        skip: residual connections that are more than a sum; None = what a part gives is added to what it read.
        output_scale: layer_output_scale multiplies what a layer gives, where the file has it.
        rescaled: rescale_every_n_layers is read: what the last of each so many layers gives is halved.
        streams: the residual stream is several vectors per token, mixed by AltUp: so many where the file does not say;
            None = it is one.
        laurel: a low-rank projection (laurel_l, laurel_r) is added beside the mixer.
        ngrams: ple.layers is read: the layer whose input vectors of n-grams are added to.
    """

    attn_norm: tuple[str, ...] = ("attn_norm",)
    ffn_norm: tuple[str, ...] = ("ffn_norm",)
    attn_post_norm: tuple[str, ...] = ()
    ffn_post_norm: tuple[str, ...] = ()
    output_norms: bool = False
    attn_norm_optional: bool = False
    prefix: str = "blk"
    parallel: Parallel = Parallel.NEVER
    post_epsilon: float | None = None
    residual_scale: float | None = None
    without_heads: bool = False
    one_part: bool = False
    behind_stated: bool = False
    loops: bool = False
    embedding_skip: bool = False
    skip: SkipKind | None = None
    output_scale: bool = False
    rescaled: bool = False
    streams: int | None = None
    laurel: bool = False
    ngrams: bool = False
