"""Takes every tensor of a file to its place in the model, as the configuration calls for it."""

from __future__ import annotations

import numpy as np

from engine.errors import ModelFileError
from engine.model.architecture import Architecture, Presence
from engine.model.config import (
    AttentionConfig,
    FfnConfig,
    LatentConfig,
    LayerConfig,
    MambaConfig,
    MixerConfig,
    ModelConfig,
    MoeConfig,
    QkNorm,
    RopeConfig,
)
from engine.model.rope import Float32Array, RopeTable, alibi_slopes, build_rope
from engine.model.tensors import TensorTable
from engine.model.weights import (
    AttentionWeights,
    ExpertLinear,
    FfnWeights,
    LatentWeights,
    LayerWeights,
    Linear,
    MambaWeights,
    MixerWeights,
    ModelWeights,
    MoeWeights,
    Norm,
    Weight,
)


class Builder:
    """Asks for the tensors of each part in turn; what nobody asked for is refused in the end."""

    def __init__(self, architecture: Architecture, config: ModelConfig, tensors: TensorTable) -> None:
        self._architecture = architecture
        self._config = config
        self._tensors = tensors
        self._ropes: dict[RopeConfig, RopeTable] = {}
        self._slopes: dict[tuple[int, float], Float32Array] = {}

    def build(self) -> ModelWeights:
        """All weights.

        Raises:
            UnsupportedModelError: a tensor is missing, of another shape or type than needed, or of no use.
        """
        config, tensors, architecture = self._config, self._tensors, self._architecture
        width = config.width
        token_embd = tensors.weight("token_embd.weight", (config.vocab_size, width))
        position_embd = None
        if config.learned_positions:
            position_embd = tensors.weight("position_embd.weight", (config.context_length, width))
        embedding_norm = self._norm("token_embd_norm", (width,)) if architecture.embedding_norm else None
        layers = tuple(self._layer(layer) for layer in config.layers)
        output_norm = self._norm("output_norm", (width,))
        tied = not tensors.has("output.weight")
        output = self._tied_output(token_embd) if tied else tensors.linear("output", config.vocab_size, width)
        tensors.ignore(architecture.ignored_tensors)
        tensors.ignore_layers(range(config.n_layers, config.n_layers + config.next_token_layers))
        tensors.finish()
        return ModelWeights(
            token_embd=token_embd,
            layers=layers,
            output_norm=output_norm,
            output=output,
            tied=tied,
            embedding_norm=embedding_norm,
            position_embd=position_embd,
        )

    def _tied_output(self, token_embd: Weight) -> Linear:
        return Linear(token_embd, self._tensors.optional_vector("output.bias", (self._config.vocab_size,)))

    def _layer(self, layer: LayerConfig) -> LayerWeights:
        prefix, architecture = f"blk.{layer.index}", self._architecture
        ffn, moe = None, None
        if isinstance(layer.ffn, MoeConfig):
            moe = self._moe(prefix, layer.ffn)
        elif layer.ffn is not None:
            ffn = self._ffn(prefix, "", layer.ffn)
        return LayerWeights(
            config=layer,
            attn_norm=self._first_norm(prefix, architecture.attn_norm),
            mixer=self._mixer(prefix, layer.mixer),
            ffn_norm=self._first_norm(prefix, architecture.ffn_norm),
            ffn=ffn,
            moe=moe,
            attn_post_norm=self._first_norm(prefix, architecture.attn_post_norm),
            ffn_post_norm=self._first_norm(prefix, architecture.ffn_post_norm),
        )

    def _mixer(self, prefix: str, mixer: MixerConfig) -> MixerWeights:
        return self._mamba(prefix, mixer) if isinstance(mixer, MambaConfig) else self._attention(prefix, mixer)

    def _mamba(self, prefix: str, mamba: MambaConfig) -> MambaWeights:
        tensors, width, inner, norm = self._tensors, self._config.width, mamba.inner, None
        if mamba.norm_dt_b_c:
            norm = Norm(self._config.norm, self._config.norm_epsilon, None)
        return MambaWeights(
            ssm_in=self._linear(f"{prefix}.ssm_in", 2 * inner, width),
            conv1d=tensors.vector(f"{prefix}.ssm_conv1d.weight", (inner, mamba.conv_width)),
            conv1d_bias=tensors.vector(f"{prefix}.ssm_conv1d.bias", (inner,)),
            ssm_x=self._linear(f"{prefix}.ssm_x", mamba.dt_rank + 2 * mamba.state, inner),
            ssm_dt=self._linear(f"{prefix}.ssm_dt", inner, mamba.dt_rank),
            a=tensors.vector(f"{prefix}.ssm_a", (inner, mamba.state)),
            d=tensors.vector(f"{prefix}.ssm_d", (inner,)),
            ssm_out=self._linear(f"{prefix}.ssm_out", width, inner),
            dt_b_c_norm=norm,
        )

    def _attention(self, prefix: str, attention: AttentionConfig) -> AttentionWeights:
        tensors, width = self._tensors, self._config.width
        sinks = tensors.vector(f"{prefix}.attn_sinks.weight", (attention.n_heads,)) if attention.sinks else None
        value_width = attention.value_width if attention.latent is None else attention.latent.value_width
        output = self._linear(f"{prefix}.attn_output", width, attention.n_heads * value_width)
        latent = None if attention.latent is None else self._latent(prefix, attention.n_heads, attention.latent)
        q, k, v = self._qkv(prefix, attention) if latent is None else (None, None, None)
        # Tables come last: by now shapes of tensors vouch for the numbers of heads and of rotated elements.
        return AttentionWeights(
            output=output,
            rope=None if attention.rope is None else self._rope(attention.rope),
            q=q,
            k=k,
            v=v,
            q_norm=self._qk_norm(f"{prefix}.attn_q_norm", attention, attention.n_heads),
            k_norm=self._qk_norm(f"{prefix}.attn_k_norm", attention, attention.n_kv_heads),
            sinks=sinks,
            alibi_slopes=self._alibi_slopes(attention) if attention.alibi else None,
            latent=latent,
        )

    def _qkv(self, prefix: str, attention: AttentionConfig) -> tuple[Linear, Linear, Linear]:
        tensors, width = self._tensors, self._config.width
        q_rows = attention.n_heads * attention.key_width
        k_rows = attention.n_kv_heads * attention.key_width
        v_rows = attention.n_kv_heads * attention.value_width
        if tensors.has(f"{prefix}.attn_qkv.weight"):
            fused = self._linear(f"{prefix}.attn_qkv", q_rows + k_rows + v_rows, width)
            return (
                _rows(fused, 0, q_rows),
                _rows(fused, q_rows, q_rows + k_rows),
                _rows(fused, q_rows + k_rows, q_rows + k_rows + v_rows),
            )
        return (
            self._linear(f"{prefix}.attn_q", q_rows, width),
            self._linear(f"{prefix}.attn_k", k_rows, width),
            self._linear(f"{prefix}.attn_v", v_rows, width),
        )

    def _latent(self, prefix: str, heads: int, latent: LatentConfig) -> LatentWeights:
        tensors, width = self._tensors, self._config.width
        q_rows = heads * (latent.nope_width + latent.rope_width)
        q, q_a, q_a_norm, q_b = None, None, None, None
        if latent.q_rank is None:
            q = self._linear(f"{prefix}.attn_q", q_rows, width)
        else:
            q_a = self._linear(f"{prefix}.attn_q_a", latent.q_rank, width)
            q_a_norm = self._norm(f"{prefix}.attn_q_a_norm", (latent.q_rank,))
            q_b = self._linear(f"{prefix}.attn_q_b", q_rows, latent.q_rank)
        k_b, v_b, kv_b = None, None, None
        if latent.absorbed:
            k_b = tensors.experts(f"{prefix}.attn_k_b", heads, latent.rank, latent.nope_width)
            v_b = tensors.experts(f"{prefix}.attn_v_b", heads, latent.value_width, latent.rank)
        else:
            rows = heads * (latent.nope_width + latent.value_width)
            kv_b = self._linear(f"{prefix}.attn_kv_b", rows, latent.rank)
        return LatentWeights(
            q=q,
            q_a=q_a,
            q_a_norm=q_a_norm,
            q_b=q_b,
            kv_a=self._linear(f"{prefix}.attn_kv_a_mqa", latent.rank + latent.rope_width, width),
            kv_a_norm=self._norm(f"{prefix}.attn_kv_a_norm", (latent.rank,)),
            k_b=k_b,
            v_b=v_b,
            kv_b=kv_b,
        )

    def _ffn(self, prefix: str, suffix: str, ffn: FfnConfig) -> FfnWeights:
        tensors, width = self._tensors, self._config.width
        gate_name, up_name = f"{prefix}.ffn_gate{suffix}", f"{prefix}.ffn_up{suffix}"
        gate = None
        if ffn.gated and self._gate_is_fused(gate_name):
            both = self._linear(up_name, 2 * ffn.width, width, ffn=True)
            gate, up = _rows(both, 0, ffn.width), _rows(both, ffn.width, 2 * ffn.width)
        else:
            if ffn.gated:
                gate = self._linear(gate_name, ffn.width, width, ffn=True)
            up = self._linear(up_name, ffn.width, width, ffn=True)
        down = self._linear(f"{prefix}.ffn_down{suffix}", width, ffn.width, ffn=True)
        act_scales = None
        if self._architecture.act_scales:
            act_scales = tensors.optional_vector(f"{prefix}.ffn.act.scales", (ffn.width,))
        return FfnWeights(gate=gate, up=up, down=down, act_scales=act_scales)

    def _gate_is_fused(self, gate_name: str) -> bool:
        presence = self._architecture.fused_gate
        if presence is Presence.OPTIONAL:
            return not self._tensors.has(f"{gate_name}.weight")
        return presence is Presence.ALWAYS

    def _moe(self, prefix: str, moe: MoeConfig) -> MoeWeights:
        tensors, width, experts = self._tensors, self._config.width, moe.n_experts
        parts = self._architecture.moe
        assert parts is not None
        shared_gate = moe.shared is not None and moe.shared_gate
        router = tensors.linear(f"{prefix}.ffn_gate_inp", experts, width, bias=self._bias_presence("ffn_gate_inp"))
        gate, up = self._expert_gate_up(prefix, moe)
        bias = None
        if parts.selection_bias:
            bias = tensors.optional_vector(f"{prefix}.exp_probs_b.bias", (experts,))
        return MoeWeights(
            router=router,
            gate=gate,
            up=up,
            down=self._experts(f"{prefix}.ffn_down_exps", experts, width, moe.expert.width),
            shared=None if moe.shared is None else self._ffn(prefix, "_shexp", moe.shared),
            shared_gate=tensors.linear(f"{prefix}.ffn_gate_inp_shexp", 1, width) if shared_gate else None,
            selection_bias=bias,
        )

    def _expert_gate_up(self, prefix: str, moe: MoeConfig) -> tuple[ExpertLinear | None, ExpertLinear]:
        width, rows, experts = self._config.width, moe.expert.width, moe.n_experts
        fused = f"{prefix}.ffn_gate_up_exps"
        if moe.expert.gated and self._tensors.has(f"{fused}.weight"):
            both = self._experts(fused, experts, 2 * rows, width)
            return _expert_rows(both, 0, rows), _expert_rows(both, rows, 2 * rows)
        gate = self._experts(f"{prefix}.ffn_gate_exps", experts, rows, width) if moe.expert.gated else None
        return gate, self._experts(f"{prefix}.ffn_up_exps", experts, rows, width)

    def _experts(self, name: str, n_experts: int, rows: int, columns: int) -> ExpertLinear:
        bias = self._bias_presence(name)
        return self._tensors.experts(name, n_experts, rows, columns, bias=bias, scale=self._architecture.ffn_scale)

    def _linear(self, name: str, rows: int, columns: int, *, ffn: bool = False) -> Linear:
        """A projection; the scale of one in a feed-forward part multiplies its bias too, or has no effect."""
        architecture, bias = self._architecture, self._bias_presence(name)
        if bias is Presence.NEVER:
            self._tensors.ignore((f"{name}.bias",))
        return self._tensors.linear(
            name,
            rows,
            columns,
            bias=bias,
            scale=architecture.ffn_scale or not ffn,
            scale_after_bias=ffn,
        )

    def _bias_presence(self, name: str) -> Presence:
        part = name.rpartition(".")[2]
        if part in self._architecture.unused_biases:
            return Presence.NEVER
        return Presence.ALWAYS if part in self._architecture.biases else Presence.OPTIONAL

    def _first_norm(self, prefix: str, names: tuple[str, ...]) -> Norm | None:
        """The first of these norms that the file has; the last one is asked for without looking."""
        if not names:
            return None
        found = next((name for name in names if self._tensors.has(f"{prefix}.{name}.weight")), names[-1])
        return self._norm(f"{prefix}.{found}", (self._config.width,))

    def _qk_norm(self, name: str, attention: AttentionConfig, heads: int) -> Norm | None:
        if attention.qk_norm is None:
            return None
        width = attention.key_width
        shapes = {QkNorm.HEAD: (width,), QkNorm.EACH_HEAD: (heads, width), QkNorm.WIDTH: (heads * width,)}
        return self._norm(name, shapes[attention.qk_norm], optional_bias=True)

    def _norm(self, name: str, shape: tuple[int, ...], *, optional_bias: bool = False) -> Norm:
        config, architecture = self._config, self._architecture
        bias = architecture.norm_bias
        if optional_bias and bias is Presence.ALWAYS:
            bias = Presence.OPTIONAL
        weight = architecture.norm_weight
        return self._tensors.norm(name, shape, config.norm, config.norm_epsilon, weight=weight, bias=bias)

    def _rope(self, rope: RopeConfig) -> RopeTable:
        if rope not in self._ropes:
            self._ropes[rope] = build_rope(rope, self._frequency_divisors(rope))
        return self._ropes[rope]

    def _frequency_divisors(self, rope: RopeConfig) -> Float32Array | None:
        tensors, shape = self._tensors, (rope.n_rot // 2,)
        name, divisors = "rope_freqs.weight", None
        if self._architecture.rope_freqs:
            divisors = tensors.optional_vector(name, shape)
        if self._architecture.longrope:
            both = {which: f"rope_factors_{which}.weight" for which in ("long", "short")}
            if any(tensors.has(other) for other in both.values()):
                name = both["long" if rope.long_factors else "short"]
                divisors = tensors.vector(name, shape)
                tensors.ignore(both.values())
        if divisors is not None and not (np.isfinite(divisors).all() and (divisors != 0).all()):
            raise ModelFileError(f"tensor {name} holds zeros or infinities; allowed are divisors")
        return divisors

    def _alibi_slopes(self, attention: AttentionConfig) -> Float32Array:
        key = (attention.n_heads, attention.alibi)
        if key not in self._slopes:
            self._slopes[key] = alibi_slopes(*key)
        return self._slopes[key]


def _rows(linear: Linear, start: int, stop: int) -> Linear:
    """Some rows of a projection, as views."""
    bias = None if linear.bias is None else linear.bias[start:stop]
    return Linear(linear.weight.slice_rows(start, stop), bias, linear.scale)


def _expert_rows(experts: ExpertLinear, start: int, stop: int) -> ExpertLinear:
    """Some rows of every projection of a stack, as views."""
    bias = None if experts.bias is None else experts.bias[:, start:stop]
    return ExpertLinear(experts.weight.slice_rows(start, stop), bias, experts.scale)
