"""The CPU backend: one model, its cache and its threads, behind three calls. It takes batches, not requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.concurrency.lazy import lazy
from engine.config import KvType
from engine.cpu.bricks.base import Float32Array
from engine.cpu.bricks.ops import CpuOps
from engine.cpu.caches.model import KVCache
from engine.cpu.products.matmul import SCRATCH_BYTES, matmul, warm_up
from engine.cpu.products.matmul import kernel_names as product_kernels
from engine.cpu.reference import PIECE_BYTES, SCORE_BYTES
from engine.cpu.text_pass import TextPass
from engine.cpu.threads import ThreadPool
from engine.errors import InvalidRequestError
from engine.gguf.quants import GGMLType
from engine.model.batch import Batch, Ids
from engine.model.config import AttentionConfig, OutputGate
from engine.model.kv_format import check_kv_type
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.model.transformer import hidden_states
from engine.model.weights import Weight

if TYPE_CHECKING:
    from engine.cpu.products.integer import IntegerWeights
    from engine.cpu.steps.program import Programs

HEAD_ROWS = 64
"""Rows of logits computed at once."""

QUIET: dict[str, Any] = {"over": "ignore", "invalid": "ignore", "divide": "ignore"}
"""Overflow to infinity is meant in exp(-x). Broken weights give logits that are not finite; they are passed on."""

PLANNED_ROWS = 512
"""Rows of a prompt chunk that memory_plan() counts on."""

TEXT_ROWS = 1024
"""The same of a batch of texts, where a model generates nothing."""

VECTOR = 16
"""Widths that the kernels take are multiples of this."""


class CpuBackend:
    """Runs batches of a model on the CPU.

    Args:
        model: a checked model; its file stays open as long as the backend is used.
        context_length: tokens a sequence may have; None = what the model was trained for.
        kv_type: number format of the cache, a KvType or its value.
        max_sequences: slots in the cache.
        checkpoints: copies of recurrent states kept for later prompts; of no effect in models without recurrent layers.
        n_pages: pages of the cache; None = enough for a whole context in every slot.
        threads: threads for matrix products; None = one per physical core.
        reference: compute everything in plain numpy, products from dequantized rows (slow; tests compare the fast path
            with it).
        activation_bits: multiply quantized weights in integers, with activations of 8 or 16 bits in blocks of 32 (about
            three or two times as fast); None: everything is float32. With 8, activations that meet BF16 weights are
            rounded to BF16, where the processor multiplies such pairs, and else, like those that meet F16 weights, to
            14 bits: prompts are read nearly twice as fast.
        repack: keep a copy of those weights in the order that the kernels read them in, for speed.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        context_length: int | None = None,
        kv_type: str = KvType.F16,
        max_sequences: int = 1,
        n_pages: int | None = None,
        checkpoints: int = 0,
        threads: int | None = None,
        reference: bool = False,
        activation_bits: int | None = None,
        repack: bool = True,
    ) -> None:
        for name, value in (("context_length", context_length), ("max_sequences", max_sequences)):
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} is {value}; allowed is a positive integer")
        if model.config.learned_positions and (context_length or 0) > model.config.context_length:
            raise InvalidRequestError(
                f"context_length is {context_length}; this model has learned positions, {model.config.context_length} "
                "of them: ask for at most as many"
            )
        self.model = model
        self.config = model.config
        self.context_length = context_length or model.config.context_length
        if not model.config.generates:  # there are no sequences; texts that are embedded bring pages of their own
            max_sequences = n_pages = 1
        self.max_sequences = max_sequences
        self._kv_type = KvType.parse(kv_type)
        if not model.config.generates:
            self._kv_type = KvType.F32  # as texts are read
        check_kv_type(model.config, self._kv_type)
        self._reference = reference
        self._compiled = not reference and kernels_fit(model)
        self._activation_bits = activation_bits if self._compiled else None
        self._repack = self._activation_bits is not None and repack
        self._rounded = self._activation_bits == 8
        self._pool = ThreadPool(threads)
        self._cache = KVCache(
            model.config.memories,
            context_length=self.context_length,
            n_slots=max_sequences,
            n_pages=n_pages,
            kv_type=self._kv_type,
            values_apart=self._compiled,
            n_checkpoints=checkpoints,
        )

    @lazy
    def _ops(self) -> CpuOps:
        """The bricks: compiled ones where they fit the model. Made on first use, as importing numba takes long."""
        return self._make_ops(self._cache)

    def _make_ops(self, cache: KVCache) -> CpuOps:
        if self._compiled:
            from engine.cpu.steps.fast_ops import FastOps

            return FastOps(self.config, self.model.weights, cache, self._pool, self._integer, rounded=self._rounded)
        return CpuOps(self.config, self.model.weights, cache, self._product)

    def vectors(self, texts: Sequence[Ids]) -> list[Float32Array]:
        """Vectors of whole texts, in one batch that touches no sequence's cache; see TextPass.vectors.

        Raises:
            ContextFullError: a text is longer than the context.
            InvalidRequestError: a token id is not in the vocabulary.
            GGUFError: the model's file was cut or rewritten since it was opened.
        """
        self._settle()
        self.model.gguf.check_unchanged()
        text_pass = TextPass(self.model, self.context_length, self._make_ops, values_apart=self._compiled)
        with np.errstate(**QUIET):
            return text_pass.vectors(texts)

    @lazy
    def _programs(self) -> Programs | None:
        """Runs steps as programs, where the model allows it."""
        if not self._compiled:
            return None
        from engine.cpu.steps.fast_ops import FastOps
        from engine.cpu.steps.program import Programs, can_record

        if isinstance(self._ops, FastOps) and can_record(self.model.weights):
            return Programs(self.model.weights, self._ops, self._pool, self._integer)
        return None

    @lazy
    def _integer(self) -> IntegerWeights | None:
        """The weights that are multiplied in integers, repacked where `repack` asks for it."""
        if self._activation_bits is None:
            return None
        from engine.cpu.products.integer import IntegerWeights, all_matrices

        weights = IntegerWeights(self._pool, self._activation_bits)
        if self._repack:
            for weight in all_matrices(self.model.weights):
                weights.repack(weight)
        return weights

    @property
    def weight_types(self) -> list[GGMLType]:
        """Types of all matrices, for `warm_up` of products/matmul.py; otherwise kernels are compiled at first use."""
        return sorted({info.type for info in self.model.gguf.tensors.values() if len(info.shape) > 1})

    def warm_up(self, status: Callable[[str], None] = lambda _: None) -> None:
        """Compile the kernels that this model needs (or load them from the disk cache), and repack its weights.

        Args:
            status: called with what is being done.
        """
        if not self._compiled:
            if not self._reference:
                warm_up(self.weight_types, status)
            return
        from engine.cpu.kernels.build import kernel

        for kind, type_name in self._kernels():
            status(f"preparing kernels: {kind} {type_name}")
            kernel(kind, type_name)
        if self._repack:
            status("repacking the weights")
            self.model.gguf.check_unchanged()
        self._ops  # noqa: B018 - made on first use

    def _kernels(self) -> list[tuple[str, str]]:
        """Kind and type of every kernel that a step can ask for."""
        from engine.cpu.kernels.formats.decoders import DECODERS
        from engine.cpu.products.integer import all_matrices, is_integer, kernel_names
        from engine.cpu.steps.recurrent_steps import kernel_names as recurrent_kernels

        weights = self.model.weights
        needed = [(kind, self._kv_type.name) for kind in ("attend", "rotate_store")] + [("run_program", "F32")]
        needed.append(("normalize", self.config.norm.name))
        for layer in self.config.layers:
            compiled = (part for part in layer.ffn_parts if part.caps is None and part.xielu is None)
            needed += (("gate", part.activation.name) for part in compiled)
            if isinstance(layer.mixer, AttentionConfig) and layer.mixer.output_gate is OutputGate.IN_QUERY:
                needed += [("take_columns", "F32"), ("gate", "SIGMOID")]
            if layer.recurrent_part is not None:
                needed += recurrent_kernels(layer.recurrent_part)
        if weights.token_embd.type.name in DECODERS:
            needed.append(("dequantize_rows", weights.token_embd.type.name))
        bits = self._activation_bits
        for type, columns in {(weight.type, weight.shape[-1]) for weight in all_matrices(weights)}:
            if bits is not None and is_integer(type, columns, bits, repack=self._repack):
                names = kernel_names(type, bits, repack=self._repack)
                needed += [("quantize", "F32"), *names]
            else:
                needed += product_kernels(type, rounded=self._rounded)
        return list(dict.fromkeys(needed))

    def forward(self, batch: Batch) -> Float32Array:
        """Feed a batch and return the logits (R, V) float32 of its output rows.

        Raises:
            ContextFullError: a sequence would outgrow the context; nothing was changed.
            InvalidRequestError: a token id is not in the vocabulary; nothing was changed.
            GGUFError: the model's file was cut or rewritten since it was opened; nothing was changed.
        """
        self._settle()
        logits = self._pool.memory.empty(len(batch.output_rows), self.config.vocab_size)
        if self._programs is not None and self._programs.takes(batch):
            self.model.gguf.check_unchanged()
            with np.errstate(**QUIET):
                self._programs.run(batch, logits)
            return logits
        row = 0
        for part in self.logit_chunks(batch):
            logits[row : row + len(part)] = part
            row += len(part)
        return logits

    def logit_chunks(self, batch: Batch) -> Iterator[Float32Array]:
        """The result of forward() in pieces of at most HEAD_ROWS rows; the cache is extended before the first.

        A piece may be overwritten by the next call.
        """
        if self._programs is not None and self._programs.takes(batch):
            yield self.forward(batch)
            return
        self._settle()
        x = self._hidden(batch)[batch.output_rows]
        for start in range(0, len(x), HEAD_ROWS):
            with np.errstate(**QUIET):
                logits = self._ops.head_rows(x[start : start + HEAD_ROWS])
            yield logits

    @property
    def cache(self) -> KVCache:
        """Keys and values."""
        return self._cache

    def memory_plan(self) -> MemoryPlan:
        """What running takes, with every page full and prompts fed in chunks of PLANNED_ROWS."""
        return MemoryPlan(
            weights_bytes=self.model.weights_bytes,
            kv_bytes=self._cache.page_bytes,
            scratch_bytes=self._scratch_bytes(),
            kv_bytes_per_token=self._cache.bytes_per_token,
            repacked_bytes=self._repacked_bytes(),
            state_bytes=self._cache.state_bytes,
            max_sequences=self.max_sequences,
        )

    def _repacked_bytes(self) -> int:
        bits = self._activation_bits
        if bits is None or not self._repack:
            return 0
        from engine.cpu.products.integer import all_matrices, repacked_bytes

        return sum(repacked_bytes(weight, bits) for weight in all_matrices(self.model.weights))

    def close(self) -> None:
        """Stop the threads, drop the cache and copies of weights. The caller closes the model's file.

        A call that was cut short can be repeated.
        """
        self._pool.close()
        for made_on_first_use in ("_programs", "_ops", "_integer"):
            vars(self).pop(made_on_first_use, None)
        self._cache.close()

    def _settle(self) -> None:
        """End what an exception or a fork has cut short in an earlier call."""
        self._pool.settle()
        self._ops.settle()

    def _hidden(self, batch: Batch) -> Float32Array:
        self.model.gguf.check_unchanged()
        with np.errstate(**QUIET):
            x: Float32Array = hidden_states(self.model.weights, self._ops, batch)
        return x

    def _product(self, x: Float32Array, weight: Weight) -> Float32Array:
        return matmul(x, weight, pool=self._pool, reference=self._reference)

    def _scratch_bytes(self) -> int:
        # A text of a model that generates nothing is one piece.
        rows = min(PLANNED_ROWS, self.context_length) if self.config.generates else max(TEXT_ROWS, self.context_length)
        widest = most_heads = 0
        for layer in self.config.layers:
            attention, recurrent = layer.attention_part, layer.recurrent_part
            mixed = 0 if recurrent is None else recurrent.row_width
            mixed += 0 if layer.ngrams is None else layer.ngrams.row_width
            if attention is not None:
                most_heads = max(most_heads, attention.n_heads)
                heads = attention.n_heads + 2 * attention.n_kv_heads
                mixed += 2 * heads * max(attention.key_width, attention.value_width)
                if attention.indexer is not None:
                    mixed += (attention.indexer.heads + 1) * attention.indexer.width
                if attention.compressed is not None:
                    mixed += 2 * attention.compressed.position_width(attention.key_width)
            widest = max(widest, mixed, *(3 * part.width for part in layer.ffn_parts[:1]))
        per_layer = 2 * self.config.per_layer_width * self.config.n_layers
        activations = 4 * rows * (4 * self.config.stream_width + per_layer + 2 * widest)
        logits = 4 * min(rows, HEAD_ROWS) * self.config.vocab_size if self.config.generates else 0
        if self._compiled:
            from engine.cpu.kernels.attention.attend import HEAD_FLOATS

            return activations + logits + self._pool.threads * (2 * SCRATCH_BYTES + 4 * most_heads * HEAD_FLOATS)
        return activations + logits + 2 * SCORE_BYTES + 2 * PIECE_BYTES


def kernels_fit(model: LoadedModel) -> bool:
    """Whether the kernels between products fit a model; otherwise CpuOps runs it, with the same products."""
    widths = [model.config.width]
    for layer, weights in zip(model.config.layers, model.weights.layers, strict=True):
        attention, recurrent = layer.attention_part, layer.recurrent_part
        if weights.ffn is not None and weights.ffn.act_scales is not None:
            return False
        if attention is not None:
            widths += (attention.key_width, attention.value_width)
            if attention.latent is not None:
                widths += (attention.latent.rank, attention.latent.q_rank or 0)
            if attention.indexer is not None:
                widths.append(attention.indexer.width)
            if attention.compressed is not None:
                widths.append(attention.compressed.q_rank)
        if recurrent is not None:
            widths += recurrent.normalized_widths
        widths += (part.width for part in layer.ffn_parts)
        widths += (layer.per_layer_width, layer.laurel_rank)
        widths += () if weights.moe is None or weights.moe.latent is None else (weights.moe.latent.down.weight.rows,)
    return all(width % VECTOR == 0 for width in widths)
