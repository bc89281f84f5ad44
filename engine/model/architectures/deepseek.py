"""DeepSeek 1 (shared experts), 2 to 3.1 (latent attention), 3.2 (an indexer), and Mistral 4, made as 2 to 3.1 are."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.indexer_config import IndexerKind
from engine.model.parts import AttentionParts, FfnParts, IndexerParts, MoeParts, RopeParts, TemperatureParts

_MOE = MoeParts(
    required=True,
    normalize=None,
    weight_scale=True,
    dense_lead=True,
    groups=True,
    shared=True,
    shared_counted=True,
    selection_bias=True,
)

ARCHITECTURES = (
    Architecture(
        name="deepseek",
        rope=RopeParts(RopeStyle.NORM, divisors=True),
        moe=MoeParts(
            required=True, normalize=False, weight_scale=True, dense_lead=True, shared=True, shared_counted=True
        ),
    ),
    *(
        Architecture(
            name=name,
            rope=RopeParts(RopeStyle.NORM),
            attention=AttentionParts(latent=True, temperature=TemperatureParts()),
            moe=_MOE,
        )
        for name in ("deepseek2", "mistral4")
    ),
    Architecture(
        name="deepseek32",
        rope=RopeParts(RopeStyle.NORM),
        attention=AttentionParts(latent=True, indexer=IndexerParts(IndexerKind.TOKENS, style=RopeStyle.NEOX)),
        ffn=FfnParts(scales=True),
        moe=_MOE,
        next_token_layers=True,
        ignored_keys=("rope.dimension_sections",),  # of texts alone, whose axes of position are the same
    ),
)
