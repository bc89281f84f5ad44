"""gpt-oss: attention sinks, windows in every second layer, experts with biases and a clamped gate."""

from engine.model.architecture import Architecture
from engine.model.config import Activation, RopeStyle, Routing
from engine.model.parts import AttentionParts, BiasParts, LayerParts, MoeParts, Presence, RopeParts, WindowParts

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")

ARCHITECTURES = (
    Architecture(
        name="gpt-oss",
        layer=LayerParts(ffn_norm=("post_attention_norm",)),
        rope=RopeParts(RopeStyle.NEOX),
        attention=AttentionParts(window=WindowParts(period=2), sinks=Presence.ALWAYS),
        moe=MoeParts(
            required=True,
            routing=Routing.SOFTMAX_CHOSEN,
            normalize=False,
            weight_scale=True,
            activation=Activation.SWIGLU_CLAMPED,
        ),
        biases=BiasParts(required=_ATTENTION + _EXPERTS),
    ),
)
