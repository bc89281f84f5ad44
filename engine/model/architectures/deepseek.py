"""DeepSeek 1 (shared experts), 2 to 3.1 (latent attention), and Mistral 4, which is made as they are."""

from engine.model.architecture import Architecture
from engine.model.config import RopeStyle
from engine.model.parts import AttentionParts, MoeParts, RopeParts, TemperatureParts

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
            moe=MoeParts(
                required=True,
                normalize=None,
                weight_scale=True,
                dense_lead=True,
                groups=True,
                shared=True,
                shared_counted=True,
                selection_bias=True,
            ),
        )
        for name in ("deepseek2", "mistral4")
    ),
)
