"""Find the first brick in which the GPU differs from the CPU reference.

    python -m scripts.diff_backends [MODEL.gguf] [--way prompt|decode|both] [--tokens 48] [--kv-type f16|f32] [--all]

The reference runs the model in plain numpy. At every brick the GPU is handed the reference's own input, so that each
figure is the error of that brick alone and an early fault does not hide in all that follows. Except for the cache:
the GPU reads the keys and values that it has written itself, from the reference's inputs. In decode steps the GPU turns
and stores keys inside its attention brick; there attn_qkv is compared before the rotation.

Prints the normalized mean squared error (squared error over squared reference, all tokens together) by brick and layer,
and ends with status 1 if a brick is above the threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.api.llm import BUNDLED_MODEL
from engine.config import page_count
from engine.cpu import reference
from engine.cpu.bricks.ops import CpuOps
from engine.cpu.caches.model import KVCache
from engine.cpu.products.matmul import matmul
from engine.cpu.threads import ThreadPool
from engine.cuda.load.device_weights import DeviceLayer
from engine.cuda.matrix.gemm import Operand
from engine.cuda.matrix.gemm_plan import operand_bytes
from engine.cuda.runner import CudaRunner
from engine.cuda.step.folding import columns_of
from engine.errors import EngineError
from engine.gguf import open_gguf
from engine.model.batch import Batch, Outputs
from engine.model.loader import LoadedModel, load_model
from engine.model.ops import LayerBricks
from engine.model.transformer import forward
from engine.model.weights import LayerWeights

PIECE = 32  # rows of logits that the runner has room for


@dataclass
class Error:
    """Sums over all tokens of one brick of one layer (-1 = outside the layers)."""

    brick: str
    layer: int
    squares: float = 0.0
    error: float = 0.0
    worst: float = 0.0

    @property
    def nmse(self) -> float:
        """Squared error over squared reference; infinite where something is not finite."""
        value = self.error / self.squares if self.squares else float(self.error > 0)
        return value if np.isfinite(value) else float("inf")


class Report:
    """Errors in the order in which the bricks first ran."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, int], Error] = {}

    def add(self, brick: str, layer: int, found: np.ndarray, expected: np.ndarray) -> None:
        """Counts one comparison."""
        one = self.errors.setdefault((brick, layer), Error(brick, layer))
        difference = found.astype(np.float64).reshape(-1) - expected.astype(np.float64).reshape(-1)
        one.error += float((difference**2).sum())
        one.squares += float((expected.astype(np.float64) ** 2).sum())
        one.worst = max(one.worst, float(np.abs(difference).max(initial=0.0)))


def on_host(found: Any) -> np.ndarray:
    """Rows that a brick gave, (T, K); of an operand its halfs, in the order of columns (layout: operand.cu)."""
    if not isinstance(found, Operand):
        rows: np.ndarray = found.get()
        return rows
    pitch, units = found.pitch, np.arange(8)
    halfs = found.data.get()[: operand_bytes(found.rows, found.columns)].view(np.float16).reshape(-1, pitch, 8, 8)
    row = np.arange(pitch)[:, None]
    ordered = halfs[:, row, units ^ (row & 7)].reshape(-1, pitch, 4, 2, 8)  # 16 columns: the even ones, the odd ones
    return ordered.transpose(1, 0, 2, 4, 3).reshape(pitch, -1)[: found.rows, : found.columns]


class ComparingOps(LayerBricks[LayerWeights]):
    """Implements engine.model.ops.Ops: answers with the reference, and runs the GPU's brick on the same input.

    Args:
        cpu: the reference.
        runner: the same model on the GPU; its slot 0 is used.
        report: where errors go.
        decode: compare decode steps (one token a batch) instead of prompts.
    """

    def __init__(self, cpu: CpuOps, cache: KVCache, runner: CudaRunner, report: Report, *, decode: bool) -> None:
        self._cpu, self._cpu_cache, self._runner, self._report = cpu, cache, runner, report
        self._decode = decode
        self._ops: Any = runner._machine.decode_ops(1) if decode else runner._machine.prompt_ops
        self._layers = runner._machine.weights.layers
        self._raw: np.ndarray

    def begin(self, batch: Batch) -> None:
        """See Ops.begin."""
        self._cpu.begin(batch)
        self._batch = batch
        if self._decode:
            self._runner._machine.slots.tokens[:1].set(batch.token_ids)
            self._runner._machine.slots.positions[:1].set(batch.positions)
            self._runner._machine.flush()
        else:
            self._ops.begin(batch)

    def embed(self, batch: Batch) -> np.ndarray:
        """See Ops.embed."""
        x = self._cpu.embed(batch)
        self._report.add("embed", -1, self._ops.embed(batch).get(), x)
        return x

    def mix(self, layer: LayerWeights, x: np.ndarray) -> np.ndarray:
        """See Ops.mix; a recurrent layer is compared as a whole."""
        if layer.mixer is None:
            return x
        if layer.recurrent is None:
            attended: np.ndarray = super().mix(layer, x)
            return attended
        y = self._cpu.mix(layer, x)
        found = self._ops.mix(self._device_layer(layer), self._x(x))
        self._report.add("ssm", layer.index, found.get() - x, y - x)
        return y

    def attn_qkv(self, layer: LayerWeights, x: np.ndarray) -> np.ndarray:
        """See LayerBricks.attn_qkv."""
        device = self._device_layer(layer)
        q = self._cpu.attn_qkv(layer, x)
        found = self._ops.attn_qkv(device, self._x(x)).get()
        if self._decode:
            # What row kernels have changed has no counterpart on the CPU; attention continues from it.
            self._raw = found
            plain = device.attention.latent is None and device.attention.heads is None
            if plain and not device.attention.shape.gate:
                normed = x if layer.attn_norm is None else reference.normalize(x, layer.attn_norm)
                self._raw = np.concatenate([self._cpu._linear(one, normed) for one in layer.attention.qkv], 1)
            self._report.add("attn_qkv", layer.index, found, self._raw)
        else:
            width = q.shape[1] * q.shape[2]
            self._report.add("attn_qkv", layer.index, found[:, :width], q)
            self._compare_cache(layer)
        return q

    def attention(self, layer: LayerWeights, q: np.ndarray) -> np.ndarray:
        """See LayerBricks.attention."""
        device = self._device_layer(layer)
        a = self._cpu.attention(layer, q)
        given = self._raw if self._decode else np.zeros((len(a), device.attention.shape.row_width), np.float32)
        if not self._decode:
            given[:, : q[0].size] = q.reshape(len(q), -1)
            if (gate := device.attention.shape.gate) > 0:
                given[:, -gate:] = self._cpu._gate
        qkv = self._upload(self._ops.buffers.qkv, given)
        self._report.add("attention", layer.index, on_host(self._ops.attention(device, qkv)), a)
        if self._decode:
            self._compare_cache(layer)
        return a

    def attn_output(self, layer: LayerWeights, a: np.ndarray, x: np.ndarray) -> np.ndarray:
        """See LayerBricks.attn_output."""
        y = self._cpu.attn_output(layer, a, x)
        attended = self._upload(self._ops.buffers.attention, a)
        found = self._ops.attn_output(self._device_layer(layer), attended, self._x(x))
        added = found.get() if layer.parallel else found.get() - x
        self._report.add("attn_output", layer.index, added, y - x)
        return y

    def ffn_gate_up(self, layer: LayerWeights, x: np.ndarray) -> np.ndarray:
        """See LayerBricks.ffn_gate_up."""
        h = self._cpu.ffn_gate_up(layer, x)
        found = self._ops.ffn_gate_up(self._device_layer(layer), self._x(x))
        self._report.add("ffn_gate_up", layer.index, on_host(found), h)
        return h

    def ffn_down(self, layer: LayerWeights, h: np.ndarray, y: np.ndarray) -> np.ndarray:
        """See LayerBricks.ffn_down."""
        result = self._cpu.ffn_down(layer, h, y)
        hidden = self._upload(self._ops.buffers.gate, h)
        found = self._ops.ffn_down(self._device_layer(layer), hidden, self._behind(layer, self._x(y)))
        self._report.add("ffn_down", layer.index, found.get() - y, result - y)
        return result

    def ffn_moe(self, layer: LayerWeights, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """See LayerBricks.ffn_moe."""
        result = self._cpu.ffn_moe(layer, x, y)
        given = self._x(x)
        found = self._ops.ffn_moe(self._device_layer(layer), given, self._behind(layer, given))
        self._report.add("ffn_moe", layer.index, found.get() - x, result - y)
        return result

    def head(self, x: np.ndarray, batch: Batch) -> np.ndarray:
        """See Ops.head."""
        logits = self._cpu.head(x, batch)
        given = self._x(x[batch.output_rows])
        buffer = (
            self._runner._machine.logits[:1] if self._decode else self._runner._machine.prompts.logit_rows[: len(given)]
        )
        self._ops.logits(given, buffer)
        self._report.add("head", -1, buffer.get(), logits)
        return logits

    # ---- arrays ----------------------------------------------------------------------------------------------

    def _device_layer(self, layer: LayerWeights) -> DeviceLayer:
        return self._layers[layer.index]

    def _x(self, x: np.ndarray) -> Any:
        return self._upload(self._ops.buffers.x, x)

    def _behind(self, layer: LayerWeights, x: Any) -> Any:
        """What the GPU hands from attention to the feed-forward part: x, or what a parallel layer adds to it: 0."""
        return self._upload(self._ops.buffers.beside, np.zeros(x.shape, np.float32)) if layer.parallel else x

    def _upload(self, buffer: Any, values: np.ndarray) -> Any:
        """Values as the leading rows of a buffer, contiguous."""
        target = columns_of(buffer, len(values), values[0].size)
        target.set(np.ascontiguousarray(values, np.float32).reshape(target.shape))
        return target

    def _compare_cache(self, layer: LayerWeights) -> None:
        """Keys and values of the batch's positions, both in the cache's number format."""
        (span,) = self._batch.spans
        keys, values = self._cpu_cache.view(layer.index, span)
        cache = self._runner._machine.cache
        pages, (our_keys, our_values) = cache.block_table.get()[0], cache.arrays(layer.index)
        for name, ours, expected in (("attn_qkv.keys", our_keys, keys), ("attn_qkv.values", our_values, values)):
            content = ours.get()[pages].transpose(1, 0, 2, 3)
            content = content.reshape(content.shape[0], -1, content.shape[3])  # (K, positions, width)
            rows = slice(span.n_past, span.n_total)
            self._report.add(name, layer.index, content[:, rows, : expected.shape[-1]], np.asarray(expected[:, rows]))


def compare(model: LoadedModel, runner: CudaRunner, ids: np.ndarray, kv_type: str, *, decode: bool) -> Report:
    """Feeds the tokens to both and returns the errors."""
    report = Report()
    with ThreadPool(None) as pool:
        cache = KVCache(
            [layer.mixer for layer in model.config.layers], context_length=len(ids), n_slots=1, kv_type=kv_type
        )
        cpu = CpuOps(model.config, model.weights, cache, lambda x, weight: matmul(x, weight, pool=pool, reference=True))
        ops = ComparingOps(cpu, cache, runner, report, decode=decode)
        with runner._running():
            runner._machine.cache.set_pages(0, list(range(page_count(len(ids)))))
            step = 1 if decode else PIECE
            for first in range(0, len(ids), step):
                batch = Batch.build([(0, ids[first : first + step], first, Outputs.ALL)])
                forward(model.weights, ops, batch)
            runner._machine.slots.set_position(0, -1)
            runner._machine.flush()
    return report


def show(report: Report, threshold: float, everything: bool, write: Callable[[str], None]) -> Error | None:
    """Prints the table; returns the first brick above the threshold."""
    errors = list(report.errors.values())
    first = next((one for one in errors if one.nmse > threshold), None)
    shown = errors if everything else [one for one in errors if one is first or one.layer in (-1, 0)]
    write(f"{'brick':16} {'layer':>5} {'nmse':>10} {'largest difference':>19}")
    for one in shown:
        layer = "" if one.layer < 0 else str(one.layer)
        mark = "  <-- first above the threshold" if one is first else ""
        write(f"{one.brick:16} {layer:>5} {one.nmse:10.2e} {one.worst:19.3e}{mark}")
    for brick in dict.fromkeys(one.brick for one in errors):
        worst = max((one for one in errors if one.brick == brick), key=lambda one: one.nmse)
        write(f"worst {brick:16} {worst.nmse:10.2e}" + ("" if worst.layer < 0 else f" in layer {worst.layer}"))
    return first


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare the GPU with the CPU reference, brick by brick.")
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED_MODEL, help="default: the bundled model")
    parser.add_argument("--way", choices=("prompt", "decode", "both"), default="both")
    parser.add_argument("--tokens", type=int, default=48, help="random tokens fed")
    parser.add_argument("--kv-type", choices=("f16", "f32"), default="f16")
    parser.add_argument("--threshold", type=float, default=1e-5, help="normalized mean squared error allowed")
    parser.add_argument("--all", action="store_true", help="every layer, not only the first and the worst")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--device", type=int, default=0)
    args = parser.parse_args()
    failed, figures = False, {}
    with open_gguf(args.model) as gguf:
        model = load_model(gguf)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, args.tokens).astype(np.int32)
        try:
            runner = CudaRunner(
                model,
                context_length=args.tokens,
                kv_type=args.kv_type,
                max_sequences=1,
                device_index=args.device,
                eager=True,
            )
        except EngineError as error:
            sys.exit(f"{error}")
        for way in ("prompt", "decode") if args.way == "both" else (args.way,):
            print(f"{args.model.name}, {way}, {args.tokens} tokens, {args.kv_type} cache, threshold {args.threshold:g}")
            report = compare(model, runner, ids, args.kv_type, decode=way == "decode")
            failed |= show(report, args.threshold, args.all, print) is not None
            figures[way] = [{**vars(one), "nmse": one.nmse} for one in report.errors.values()]
        runner.close()
        del model, report
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
