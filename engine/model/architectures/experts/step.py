"""Step 3.5: windows, gated attention, and limits of the gates."""

from engine.model.architecture import Architecture
from engine.model.config import OutputGate, QkNorm, RopeStyle, Routing
from engine.model.parts import AttentionParts, FfnParts, MoeParts, Presence, QkNormParts, RopeParts, WindowParts

ARCHITECTURES = (
    # Full layers rotate half of what windowed ones do.
    Architecture(
        name="step35",
        rope=RopeParts(RopeStyle.NEOX, divisors=True, long_factors=True, halved=True),
        attention=AttentionParts(
            qk_norm=QkNormParts(QkNorm.HEAD, presence=Presence.OPTIONAL),
            window=WindowParts(base=10000.0, unscaled=True, undivided=True, own_width=True),
            output_gate=OutputGate.OWN,
        ),
        ffn=FfnParts(limits=True),
        moe=MoeParts(
            routing=Routing.SIGMOID,
            normalize=None,
            weight_scale=True,
            dense_without_router=True,
            shared=True,
            selection_bias=True,
        ),
        next_token_layers=True,
    ),
)
