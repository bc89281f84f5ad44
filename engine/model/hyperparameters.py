"""From an architecture's declaration and a file's metadata to a ModelConfig. Written once for all architectures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import ModelFileError
from engine.model.architecture import Architecture, LogitScale, MixerKind, Parallel, Presence
from engine.model.config import (
    AttentionConfig,
    AttentionTemperature,
    FfnConfig,
    LatentConfig,
    LayerConfig,
    MixerConfig,
    ModelConfig,
    MoeConfig,
    NormKind,
    QkNorm,
    ResidualKind,
    RopeConfig,
)
from engine.model.metadata import LIMIT, HyperParameters
from engine.model.read_ffn import read_ffn
from engine.model.read_recurrent import read_mamba
from engine.model.read_rope import latent_sharpening, read_rope, windowed_rope
from engine.model.unread_keys import check_unread


def read_config(
    architecture: Architecture,
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    tensors: Mapping[str, Any],
    run_context: Callable[[int], int],
) -> ModelConfig:
    """Hyper-parameters of a file.

    Args:
        architecture: what the family reads.
        metadata: all metadata of the file.
        vocab_size: rows of token_embd.
        tensors: the file's tensors by name: their number bounds block_count, and optional parts show in their names.
        run_context: from the trained context length to the one of the run.

    Raises:
        ModelFileError: a key is missing, of the wrong type, or out of range.
        UnsupportedModelError: a value asks for something that is not supported.
    """
    read = HyperParameters(metadata, architecture.name)
    reader = _Reader(architecture, read, tensors, run_context)
    config = reader.model(metadata, vocab_size)
    check_unread(architecture, read, config)
    return config


class _Reader:
    """Reads one file's keys, layer by layer."""

    def __init__(
        self,
        architecture: Architecture,
        read: HyperParameters,
        tensors: Mapping[str, Any],
        run_context: Callable[[int], int],
    ) -> None:
        self._architecture = architecture
        self._read = read
        self._tensors = tensors
        self._context_length = read.integer("context_length")
        self._run_context = run_context(self._context_length)
        n_blocks = read.integer("block_count", high=max(1, len(tensors)))
        self._n_layers = n_blocks - self._next_token_layers(n_blocks)
        self._n_blocks = n_blocks
        self._width = read.integer("embedding_length")

    def model(self, metadata: Mapping[str, Any], vocab_size: int) -> ModelConfig:
        architecture, read = self._architecture, self._read
        epsilon = "layer_norm_epsilon" if architecture.norm is NormKind.LAYER else "layer_norm_rms_epsilon"
        name = metadata.get("general.name")
        return ModelConfig(
            architecture=architecture.name,
            name=name if isinstance(name, str) else "",
            width=self._width,
            vocab_size=vocab_size,
            context_length=self._context_length,
            norm=architecture.norm,
            norm_epsilon=read.number(f"attention.{epsilon}", low=0.0, high=1.0),
            layers=self._layers(),
            embedding_scale=self._embedding_scale(),
            learned_positions=self._learned_positions(),
            logit_scale=self._logit_scale(),
            logit_softcap=self._default("final_logit_softcapping", architecture.logit_softcap),
            next_token_layers=self._n_blocks - self._n_layers,
        )

    def _layers(self) -> tuple[LayerConfig, ...]:
        mixers, ffns, scale = self._mixers(), self._ffns(), self._residual_scale()
        return tuple(
            LayerConfig(
                index=index,
                mixer=mixers[index],
                ffn=ffns[index],
                residual=self._residual(index),
                residual_scale=scale,
            )
            for index in range(self._n_layers)
        )

    def _mixers(self) -> list[MixerConfig]:
        read, n_blocks = self._read, self._n_blocks
        if self._architecture.mixer is MixerKind.MAMBA:
            return [read_mamba(read)] * self._n_layers
        heads = read.per_layer("attention.head_count", n_blocks)
        kv_heads = read.per_layer("attention.head_count_kv", n_blocks, default=heads)
        windows = self._windows()
        return [
            self._attention(index, heads[index], kv_heads[index], windows[index], any(windows))
            for index in range(self._n_layers)
        ]

    def _ffns(self) -> list[FfnConfig | MoeConfig | None]:
        if not self._architecture.feed_forward:
            return [None] * self._n_layers
        widths = self._read.per_layer("feed_forward_length", self._n_blocks, low=0)
        return [read_ffn(self._architecture, self._read, index, widths[index]) for index in range(self._n_layers)]

    def _attention(
        self, index: int, heads: int, kv_heads: int, window: int | None, any_window: bool
    ) -> AttentionConfig:
        architecture, read = self._architecture, self._read
        if heads % kv_heads:
            raise ModelFileError(
                f"layer {index} has {heads} heads and {kv_heads} key/value heads; the second must divide the first"
            )
        latent = self._latent(index, heads) if architecture.latent else None
        if latent is None:
            key_width = read.integer("attention.key_length", self._default_head_width(heads, "key"))
            value_width = read.integer("attention.value_length", self._default_head_width(heads, "value"))
            head_width = rotated = key_width
        elif latent.absorbed:
            kv_heads, key_width, value_width = 1, latent.rank + latent.rope_width, latent.rank
            head_width, rotated = latent.nope_width + latent.rope_width, latent.rope_width
        else:
            kv_heads, key_width, value_width = heads, latent.nope_width + latent.rope_width, latent.value_width
            head_width, rotated = key_width, latent.rope_width
        rope = self._rope(index, rotated, window, any_window)
        return AttentionConfig(
            n_heads=heads,
            n_kv_heads=kv_heads,
            key_width=key_width,
            value_width=value_width,
            scale=self._scale(head_width, heads, rope if latent is not None else None),
            rope=rope,
            window=window,
            qk_norm=self._qk_norm(index),
            qk_norm_after_rope=architecture.qk_norm_after_rope,
            temperature=self._temperature(),
            clamp=(read.number("attention.clamp_kqv", 0.0, low=0.0) or None) if architecture.clamp else None,
            softcap=self._default("attn_logit_softcapping", architecture.attn_softcap),
            sinks=architecture.sinks,
            alibi=self._default("attention.max_alibi_bias", architecture.alibi) or 0.0,
            latent=latent,
        )

    def _latent(self, index: int, heads: int) -> LatentConfig:
        read, prefix = self._read, f"blk.{index}"
        # Files with one attn_kv_b state widths per head; those with attn_k_b state the widths of what is cached.
        absorbed = f"{prefix}.attn_kv_b.weight" not in self._tensors
        suffix = "_mla" if absorbed else ""
        key_width = read.integer(f"attention.key_length{suffix}")
        rope_width = read.integer("rope.dimension_count", high=key_width - 1)
        has_query_rank = f"{prefix}.attn_q_a.weight" in self._tensors
        return LatentConfig(
            rank=read.integer("attention.kv_lora_rank"),
            q_rank=read.integer("attention.q_lora_rank") if has_query_rank else None,
            nope_width=key_width - rope_width,
            rope_width=rope_width,
            value_width=read.integer(f"attention.value_length{suffix}"),
            absorbed=absorbed,
        )

    def _rope(self, index: int, width: int, window: int | None, any_window: bool) -> RopeConfig | None:
        architecture, read = self._architecture, self._read
        every, parts = architecture.no_rope_every, architecture.window
        if every is not None and (index + 1) % every == 0:
            return None
        if parts is not None and parts.rotated_only and any_window and window is None:
            return None
        # Granite says with this key whether it rotates at all.
        if architecture.rope_switch and not read.flag("rope.scaling.finetuned", True):
            return None
        rope = read_rope(architecture, read, width, self._context_length, self._run_context)
        if rope is not None and window is not None and parts is not None:
            return windowed_rope(architecture, read, rope)
        return rope

    def _windows(self) -> list[int | None]:
        """The window of each layer."""
        parts, read, n_layers = self._architecture.window, self._read, self._n_layers
        nothing: list[int | None] = [None] * n_layers
        if parts is None:
            return nothing
        # 0 in the file means none.
        window = read.integer("attention.sliding_window", parts.default or 0, low=0) or None
        if window is None or (parts.n_layers is not None and parts.n_layers != n_layers):
            return nothing
        key = "attention.sliding_window_pattern"
        if read.is_list(key):
            pattern = read.flags(key)
            if len(pattern) < n_layers:
                raise ModelFileError(
                    f"metadata key {self._architecture.name}.{key} holds {len(pattern)} values; "
                    f"allowed are {n_layers}, one per layer"
                )
            return [window if pattern[index] else None for index in range(n_layers)]
        period = read.integer(key, parts.period, low=0)
        return [window if period == 0 or index % period < period - 1 else None for index in range(n_layers)]

    def _scale(self, head_width: int, heads: int, latent_rope: RopeConfig | None) -> float:
        architecture, read = self._architecture, self._read
        if architecture.attention_scale:
            stated = read.number("attention.scale", 0.0, low=0.0, high=LIMIT)
            if stated:
                return stated
        if self._n_layers in architecture.scale_by_width:
            return math.sqrt(heads / self._width)
        scale = 1.0 / math.sqrt(head_width)
        return scale if latent_rope is None else scale * latent_sharpening(read, latent_rope)

    def _qk_norm(self, index: int) -> QkNorm | None:
        architecture = self._architecture
        if architecture.qk_norm is None or architecture.qk_norm_presence is Presence.ALWAYS:
            return architecture.qk_norm
        return architecture.qk_norm if f"blk.{index}.attn_q_norm.weight" in self._tensors else None

    def _residual(self, index: int) -> ResidualKind:
        parallel = self._architecture.parallel
        if parallel is Parallel.STATED:
            is_parallel = self._read.flag("use_parallel_residual", True)
        elif parallel is Parallel.WITHOUT_NORM:
            is_parallel = f"blk.{index}.ffn_norm.weight" not in self._tensors
        else:
            is_parallel = parallel is Parallel.ALWAYS
        return ResidualKind.PARALLEL if is_parallel else ResidualKind.SEQUENTIAL

    def _default_head_width(self, heads: int, which: str) -> int:
        """Head width where the file does not state it."""
        if not self._read.has(f"attention.{which}_length") and self._width % heads:
            raise ModelFileError(
                f"embedding_length {self._width} is not a multiple of the head count {heads}; "
                f"allowed with a stated attention.{which}_length only, which is missing"
            )
        return max(1, self._width // heads)

    def _temperature(self) -> AttentionTemperature | None:
        """Attention temperature; a scale of 0 in the file means none."""
        read = self._read
        if not self._architecture.temperature:
            return None
        scale = read.number("attention.temperature_scale", 0.0, low=-LIMIT, high=LIMIT)
        if scale == 0.0:
            return None
        length = read.integer("attention.temperature_length", 0, low=0)
        return AttentionTemperature(
            scale, length or read.integer("rope.scaling.original_context_length", self._context_length)
        )

    def _default(self, key: str, default: float | None) -> float | None:
        """A number that families with a default read; 0 in the file means none."""
        if default is None:
            return None
        return self._read.number(key, default, low=0.0, high=LIMIT) or None

    def _embedding_scale(self) -> float:
        architecture = self._architecture
        if architecture.embedding_sqrt_width:
            return math.sqrt(self._width)
        return self._default("embedding_scale", architecture.embedding_scale) or 1.0

    def _residual_scale(self) -> float:
        base = self._architecture.residual_scale
        if base is None:
            return 1.0
        default = base / math.sqrt(self._n_layers)
        return self._read.number("residual_scale", default, low=-LIMIT, high=LIMIT) or 1.0

    def _logit_scale(self) -> float:
        use, width = self._architecture.logit_scale, self._architecture.logit_width
        if use is LogitScale.NONE:
            return 1.0
        default = 1.0 if width is None else self._width / width
        scale = self._read.number("logit_scale", default, low=-LIMIT, high=LIMIT) or 1.0
        return 1.0 / scale if use is LogitScale.DIVIDES else scale

    def _learned_positions(self) -> bool:
        presence = self._architecture.position_embd
        if presence is Presence.OPTIONAL:
            return "position_embd.weight" in self._tensors
        return presence is Presence.ALWAYS

    def _next_token_layers(self, n_blocks: int) -> int:
        if not self._architecture.next_token_layers:
            return 0
        return self._read.integer("nextn_predict_layers", 0, low=0, high=n_blocks - 1)
