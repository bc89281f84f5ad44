"""Granite 3 and MiniCPM: Llama with multipliers on embeddings, residuals, attention scores and logits."""

from engine.model.architecture import Architecture, LogitScale, MoeParts
from engine.model.config import RopeStyle

_MOE = MoeParts(normalize=True, weight_scale=True, shared=True)

ARCHITECTURES = (
    *(
        Architecture(
            name=name,
            rope=RopeStyle.NORM,
            rope_freqs=True,
            longrope=True,
            rope_switch=True,
            moe=_MOE,
            attention_scale=True,
            embedding_scale=0.0,
            residual_scale=0.0,
            logit_scale=LogitScale.DIVIDES,
        )
        for name in ("granite", "granitemoe")
    ),
    Architecture(
        name="minicpm",
        rope=RopeStyle.NORM,
        rope_freqs=True,
        longrope=True,
        moe=_MOE,
        attention_scale=True,
        embedding_scale=12.0,
        residual_scale=1.4,
        logit_scale=LogitScale.DIVIDES,
        logit_width=256,
    ),
)
