"""gpt-oss: attention sinks, windows in every second layer, experts with biases and a clamped gate."""

from engine.model.architecture import Architecture, MoeParts, WindowParts
from engine.model.config import Activation, RopeStyle, Routing

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")

ARCHITECTURES = (
    Architecture(
        name="gpt-oss",
        rope=RopeStyle.NEOX,
        ffn_norm=("post_attention_norm",),
        biases=(*_ATTENTION, "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        sinks=True,
        window=WindowParts(period=2),
        moe=MoeParts(
            required=True,
            routing=Routing.SOFTMAX_CHOSEN,
            normalize=False,
            weight_scale=True,
            activation=Activation.SWIGLU_CLAMPED,
        ),
    ),
)
