"""DeepSeek 1 (shared experts) and 2 to 3.1 (latent attention)."""

from engine.model.architecture import Architecture, MoeParts
from engine.model.config import RopeStyle

ARCHITECTURES = (
    Architecture(
        name="deepseek",
        rope=RopeStyle.NORM,
        rope_freqs=True,
        moe=MoeParts(
            required=True, normalize=False, weight_scale=True, dense_lead=True, shared=True, shared_counted=True
        ),
    ),
    Architecture(
        name="deepseek2",
        rope=RopeStyle.NORM,
        latent=True,
        temperature=True,
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
    ),
)
