"""What an architecture file declares: which parts a model family is made of. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model.config import Activation, NormKind, RopeStyle, Routing


@dataclass(frozen=True, kw_only=True)
class MoeParts:
    """The mixture of experts of a family, used in files whose expert_count is above zero.

    `normalize` divides the chosen weights by their sum. `shared` names the kind of shared expert: its width comes from
    expert_shared_feed_forward_length, and `shared_gate` multiplies it by sigmoid(ffn_gate_inp_shexp · x).
    """

    routing: Routing = Routing.SOFTMAX
    normalize: bool = True
    weight_scale: bool = False  # expert_weights_scale is read
    required: bool = False  # the family has no dense form
    shared: bool = False
    shared_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family: parts, their order and constants, and which optional metadata it reads.

    Attributes:
        name: value of general.architecture, also the prefix of its metadata keys.
        rope: pairing of rotated elements.
        norm: kind of every norm.
        qk_norm: heads of q and k are normalized before rotation (attn_q_norm, attn_k_norm).
        activation: of the feed-forward parts.
        gated: feed-forward parts have a gate.
        moe: mixture of experts, where the family has one.
        sliding_window: attention.sliding_window is read and holds for every layer.
        temperature: attention.temperature_scale is read.
        ffn_scale: ffn_*.scale tensors multiply the projections; llama.cpp leaves them out in some families.
        rope_freqs: the tensor rope_freqs.weight may divide the rotation frequencies.
        ignored_tensors: names of tensors such files may hold that take no part in next-token logits.
    """

    name: str
    rope: RopeStyle
    norm: NormKind = NormKind.RMS
    qk_norm: bool = False
    activation: Activation = Activation.SILU
    gated: bool = True
    moe: MoeParts | None = None
    sliding_window: bool = False
    temperature: bool = False
    ffn_scale: bool = True
    rope_freqs: bool = False
    ignored_tensors: tuple[str, ...] = ()
