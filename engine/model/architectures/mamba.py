"""Mamba 1 and Falcon Mamba: selective state spaces, no attention and no feed-forward parts."""

from engine.model.architecture import Architecture, MixerKind

ARCHITECTURES = (
    Architecture(
        name="mamba",
        rope=None,
        mixer=MixerKind.MAMBA,
        feed_forward=False,
        ffn_norm=(),
        ignored_keys=("attention.head_count", "attention.head_count_kv", "attention.recurrent_layers"),
    ),
)
