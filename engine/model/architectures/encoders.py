"""Encoders: every token sees its whole text, and what comes out are vectors, for embeddings and rerankers.

BERT and its relatives, ModernBERT, NeoBERT, EuroBERT, the encoder of T5, and decoders that were made encoders.
"""

from engine.model.architecture import Architecture
from engine.model.architectures.common import LAYER_NORM, NORMS_ON_BOTH_SIDES
from engine.model.config import Activation, NormKind, QkNorm, RopeStyle
from engine.model.parts import (
    AttentionParts,
    EmbeddingParts,
    FfnParts,
    HeadParts,
    LayerParts,
    MoeParts,
    NormParts,
    Presence,
    QkNormParts,
    RankParts,
    RopeParts,
    WindowParts,
)

_VECTORS = HeadParts(norm=None, generates=False)
_NORMED_VECTORS = HeadParts(generates=False)
# All norms of BERT come behind the residuals; the last layer's is the model's.
_BERT_LAYER = LayerParts(attn_norm=(), ffn_norm=(), output_norms=True)
_BERT_EMBEDDING = EmbeddingParts(norm=True, token_types=Presence.OPTIONAL)
_BOTH_WAYS = AttentionParts(causal=False)
_PLAIN_GELU = FfnParts(Activation.GELU, gated=False)

ARCHITECTURES = (
    Architecture(
        name="bert",
        embedding=EmbeddingParts(norm=True, token_types=Presence.OPTIONAL, positions=Presence.ALWAYS),
        norm=LAYER_NORM,
        layer=_BERT_LAYER,
        rope=None,
        attention=_BOTH_WAYS,
        ffn=_PLAIN_GELU,
        head=_VECTORS,
        rank=RankParts(),
    ),
    *(
        Architecture(
            name=name,
            embedding=_BERT_EMBEDDING,
            norm=LAYER_NORM,
            layer=_BERT_LAYER,
            rope=RopeParts(RopeStyle.NEOX),
            attention=_BOTH_WAYS,
            ffn=ffn,
            moe=moe,
            head=_VECTORS,
        )
        for name, ffn, moe in (
            ("nomic-bert", FfnParts(), None),
            ("nomic-bert-moe", _PLAIN_GELU, MoeParts(normalize=False, weight_scale=True, every=True)),
            ("jina-bert-v3", _PLAIN_GELU, None),
        )
    ),
    Architecture(
        name="jina-bert-v2",
        embedding=_BERT_EMBEDDING,
        norm=LAYER_NORM,
        layer=_BERT_LAYER,
        rope=None,
        attention=AttentionParts(
            causal=False, alibi=8.0, qk_norm=QkNormParts(QkNorm.WIDTH, presence=Presence.OPTIONAL)
        ),
        ffn=FfnParts(Activation.GELU, ungated=Activation.GELU, fused_gate=Presence.OPTIONAL),
        head=_VECTORS,
        rank=RankParts(),
    ),
    # The embedding's norm serves the first layer, too.
    Architecture(
        name="modern-bert",
        embedding=EmbeddingParts(norm=True),
        norm=NormParts(NormKind.LAYER),
        layer=LayerParts(attn_norm_optional=True),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(
            causal=False,
            window=WindowParts(period=3, full_first=True, symmetric=True, base=10000.0, unscaled=True),
        ),
        ffn=FfnParts(Activation.GELU, fused_gate=Presence.ALWAYS, stated=True),
        head=_NORMED_VECTORS,
        rank=RankParts(gelu=True, mean=True),
    ),
    Architecture(
        name="neo-bert",
        rope=RopeParts(RopeStyle.NORM),
        attention=_BOTH_WAYS,
        ffn=FfnParts(fused_gate=Presence.ALWAYS),
        head=HeadParts(norm="enc.output_norm", generates=False),
        rank=RankParts(),
    ),
    Architecture(
        name="eurobert",
        rope=RopeParts(RopeStyle.NEOX),
        attention=_BOTH_WAYS,
        head=_NORMED_VECTORS,
    ),
    Architecture(
        name="gemma-embedding",
        embedding=EmbeddingParts(sqrt_width=True),
        norm=NormParts(epsilon=1e-6),
        layer=NORMS_ON_BOTH_SIDES,
        rope=RopeParts(RopeStyle.NEOX, base=1000000.0),
        attention=AttentionParts(
            causal=False,
            qk_norm=QkNormParts(QkNorm.HEAD),
            window=WindowParts(period=6, symmetric=True, base=10000.0, unscaled=True),
        ),
        ffn=FfnParts(Activation.GELU),
        head=_NORMED_VECTORS,
        dense=True,
        ignored_keys=("final_logit_softcapping",),  # of logits, which it does not give
    ),
    # Of a whole T5 the encoder runs.
    *(
        Architecture(
            name=name,
            layer=LayerParts(prefix="enc.blk"),
            rope=None,
            attention=AttentionParts(causal=False, unscaled=True, relative_buckets=True, output="attn_o"),
            ffn=FfnParts(Activation.GELU, ungated=Activation.RELU),
            head=HeadParts(norm="enc.output_norm", generates=False),
            ignored_tensors=tensors,
            ignored_keys=keys,
        )
        for name, tensors, keys in (("t5encoder", (), ()), ("t5", ("dec.*",), ("decoder_block_count",)))
    ),
)
