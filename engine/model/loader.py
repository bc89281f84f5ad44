"""From an open GGUF file to a checked model: configuration and weights as mapped views. Shared by every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import ModelFileError, UnsupportedModelError
from engine.gguf.reader import GGUFFile
from engine.model.architecture import Architecture
from engine.model.architectures import find_architecture
from engine.model.config import AttentionConfig, FfnConfig, LayerConfig, ModelConfig, MoeConfig, RopeConfig
from engine.model.hyperparameters import read_config
from engine.model.rope import RopeTable, build_rope
from engine.model.tensors import TensorTable
from engine.model.weights import (
    AttentionWeights,
    FfnWeights,
    LayerWeights,
    Linear,
    ModelWeights,
    MoeWeights,
    Norm,
    Weight,
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready for a backend. The file must stay open as long as the weights are used."""

    gguf: GGUFFile
    architecture: Architecture
    config: ModelConfig
    weights: ModelWeights

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(info.n_bytes for info in self.gguf.tensors.values())


def load_model(gguf: GGUFFile) -> LoadedModel:
    """Recognize the architecture, read its hyper-parameters and check every tensor.

    Raises:
        ModelFileError: metadata is missing, of the wrong type, or contradicts itself.
        UnsupportedModelError: unknown architecture, unknown setting, or a tensor that is missing, of another shape than
            the metadata calls for, or of no use to the architecture.
    """
    if not gguf.tensors:
        raise ModelFileError(
            f"{gguf.path} holds no tensors, perhaps only a vocabulary: take a file with weights, or open the tokenizer "
            "alone with engine.load_tokenizer"
        )
    try:
        return _load(gguf)
    except ModelFileError as error:
        if str(gguf.path) in str(error):
            raise
        raise type(error)(f"{gguf.path}: {error}") from error


def _load(gguf: GGUFFile) -> LoadedModel:
    name = gguf.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelFileError(f"{gguf.path}: metadata key general.architecture is missing; the file holds no model")
    architecture = find_architecture(name)
    tensors = TensorTable(gguf, name)
    embedding_shape = tensors.shape("token_embd.weight")
    if len(embedding_shape) != 2:
        raise UnsupportedModelError(f"tensor token_embd.weight has shape {embedding_shape}; allowed are two dimensions")
    config = read_config(architecture, gguf.metadata, vocab_size=embedding_shape[0], n_tensors=len(gguf.tensors))
    return LoadedModel(gguf, architecture, config, _Builder(architecture, config, tensors).build())


class _Builder:
    """Takes each part's tensors in turn."""

    def __init__(self, architecture: Architecture, config: ModelConfig, tensors: TensorTable) -> None:
        self._architecture = architecture
        self._config = config
        self._tensors = tensors
        self._ropes: dict[RopeConfig, RopeTable] = {}

    def build(self) -> ModelWeights:
        config, tensors = self._config, self._tensors
        token_embd = tensors.weight("token_embd.weight", (config.vocab_size, config.width))
        layers = tuple(self._layer(layer) for layer in config.layers)
        output_norm = self._norm("output_norm", config.width)
        tied = not tensors.has("output.weight")
        output = self._tied_output(token_embd) if tied else tensors.linear("output", config.vocab_size, config.width)
        tensors.ignore(self._architecture.ignored_tensors)
        tensors.finish()
        return ModelWeights(token_embd=token_embd, layers=layers, output_norm=output_norm, output=output, tied=tied)

    def _tied_output(self, token_embd: Weight) -> Linear:
        return Linear(token_embd, self._tensors.optional_vector("output.bias", (self._config.vocab_size,)))

    def _layer(self, layer: LayerConfig) -> LayerWeights:
        prefix, width = f"blk.{layer.index}", self._config.width
        attn_norm = self._norm(f"{prefix}.attn_norm", width)
        attention = self._attention(prefix, layer.attention)
        ffn_norm = self._norm(f"{prefix}.ffn_norm", width)
        ffn, moe = None, None
        if isinstance(layer.ffn, MoeConfig):
            moe = self._moe(prefix, layer.ffn)
        else:
            ffn = self._ffn(prefix, "", layer.ffn)
        return LayerWeights(config=layer, attn_norm=attn_norm, attention=attention, ffn_norm=ffn_norm, ffn=ffn, moe=moe)

    def _attention(self, prefix: str, attention: AttentionConfig) -> AttentionWeights:
        tensors, width = self._tensors, self._config.width
        q_rows = attention.n_heads * attention.key_width
        k_rows = attention.n_kv_heads * attention.key_width
        v_rows = attention.n_kv_heads * attention.value_width
        if tensors.has(f"{prefix}.attn_qkv.weight"):
            fused = tensors.linear(f"{prefix}.attn_qkv", q_rows + k_rows + v_rows, width)
            q = _slice(fused, 0, q_rows)
            k = _slice(fused, q_rows, q_rows + k_rows)
            v = _slice(fused, q_rows + k_rows, q_rows + k_rows + v_rows)
        else:
            q = tensors.linear(f"{prefix}.attn_q", q_rows, width)
            k = tensors.linear(f"{prefix}.attn_k", k_rows, width)
            v = tensors.linear(f"{prefix}.attn_v", v_rows, width)
        output = tensors.linear(f"{prefix}.attn_output", width, attention.n_heads * attention.value_width)
        q_norm = self._norm(f"{prefix}.attn_q_norm", attention.key_width) if attention.qk_norm else None
        k_norm = self._norm(f"{prefix}.attn_k_norm", attention.key_width) if attention.qk_norm else None
        rope = None if attention.rope is None else self._rope(attention.rope)
        return AttentionWeights(q=q, k=k, v=v, output=output, q_norm=q_norm, k_norm=k_norm, rope=rope)

    def _ffn(self, prefix: str, suffix: str, ffn: FfnConfig) -> FfnWeights:
        tensors, width = self._tensors, self._config.width
        scale, gate = self._architecture.ffn_scale, None
        if ffn.gated:
            gate = tensors.linear(f"{prefix}.ffn_gate{suffix}", ffn.width, width, scale=scale, scale_after_bias=True)
        up = tensors.linear(f"{prefix}.ffn_up{suffix}", ffn.width, width, scale=scale, scale_after_bias=True)
        down = tensors.linear(f"{prefix}.ffn_down{suffix}", width, ffn.width, scale=scale, scale_after_bias=True)
        return FfnWeights(gate=gate, up=up, down=down)

    def _moe(self, prefix: str, moe: MoeConfig) -> MoeWeights:
        tensors, width, experts = self._tensors, self._config.width, moe.n_experts
        shared_gate = moe.shared is not None and moe.shared_gate
        scale = self._architecture.ffn_scale
        return MoeWeights(
            router=tensors.linear(f"{prefix}.ffn_gate_inp", experts, width),
            gate=tensors.experts(f"{prefix}.ffn_gate_exps", experts, moe.expert.width, width, scale=scale),
            up=tensors.experts(f"{prefix}.ffn_up_exps", experts, moe.expert.width, width, scale=scale),
            down=tensors.experts(f"{prefix}.ffn_down_exps", experts, width, moe.expert.width, scale=scale),
            shared=None if moe.shared is None else self._ffn(prefix, "_shexp", moe.shared),
            shared_gate=tensors.linear(f"{prefix}.ffn_gate_inp_shexp", 1, width) if shared_gate else None,
        )

    def _norm(self, name: str, width: int) -> Norm:
        return self._tensors.norm(name, width, self._config.norm, self._config.norm_epsilon)

    def _rope(self, rope: RopeConfig) -> RopeTable:
        if rope not in self._ropes:
            factors = None
            if self._architecture.rope_freqs:
                factors = self._tensors.optional_vector("rope_freqs.weight", (rope.n_rot // 2,))
            if factors is not None and not (np.isfinite(factors).all() and (factors != 0).all()):
                raise ModelFileError("tensor rope_freqs.weight holds zeros or infinities; allowed are divisors")
            self._ropes[rope] = build_rope(rope, factors)
        return self._ropes[rope]


def _slice(linear: Linear, start: int, stop: int) -> Linear:
    """Some rows of a projection, as views."""
    bias = None if linear.bias is None else linear.bias[start:stop]
    return Linear(linear.weight.slice_rows(start, stop), bias, linear.scale)
