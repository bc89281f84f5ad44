"""What support_table.py measures: how exact every tensor type and architecture is, and what types cost in perplexity.

Errors are normalized mean squared errors of logits: of the architectures against llama.cpp's in float32, of the types
against this engine's plain numpy in float32 with the same packed weights. The second kind says nothing of how much a
type loses against the original weights (perplexity does), only how exactly its products are computed.
"""

import lzma
import os
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.api.llm import LLM
from engine.api.perplexity import cut, measure
from engine.api.tokenizers import load_tokenizer
from engine.cpu.backend import CpuBackend
from engine.cpu.products.matmul import matmul
from engine.cpu.threads import ThreadPool
from engine.gguf import GGMLType, dequantize, open_gguf
from engine.gguf.quantizers.rewrite import matrices, rewrite
from engine.model.architectures import ARCHITECTURES
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from engine.model.weights import Weight

CONTEXT = 512
"""Tokens of a chunk of the perplexity text."""

ARCHIVES = ("models.tar.xz", "logits.tar.xz")
"""Files of a set of conformance models."""

LOGIT_TOKENS = 64
"""Tokens whose logits are compared."""

Cell = dict[str, Any]
"""What was measured of one type or file on one device."""


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the mean square expected."""
    wanted = expected.astype(np.float64)
    return float(((found - wanted) ** 2).mean() / (wanted**2).mean())


class Data:
    """Test data in a folder laid out as that of the tests; archives are unpacked into a temporary one.

    Attributes:
        text: the held-out text.
        conformance: folder with models/ and logits/, or None.
        model: the float16 demonstration model, or None.
    """

    def __init__(self, folder: Path, model: Path | None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="support-")
        self.scratch = Path(self._scratch.name)
        self.text = folder / "demo-model" / "held_out.txt"
        self.conformance = self._unpacked_conformance(folder / "conformance")
        found = (
            [model] if model else [*(folder / "demo-model").glob("tales-f16.gguf*"), *folder.glob("**/tales-f16.gguf*")]
        )
        self.model = self._unpacked_model(found[0]) if found else None

    def _unpacked_conformance(self, folder: Path) -> Path | None:
        if (folder / "models").is_dir():
            return folder
        every = (part / name for part in (folder, folder.with_name("conformance2")) for name in ARCHIVES)
        archives = [archive for archive in every if archive.exists()]
        for archive in archives:
            with tarfile.open(archive) as tar:
                tar.extractall(self.scratch, filter="data")
        return self.scratch if archives else None

    def _unpacked_model(self, path: Path) -> Path:
        if path.suffix != ".xz":
            return path
        target = self.scratch / "tales-f16.gguf"
        with lzma.open(path) as packed, open(target, "wb") as out:
            shutil.copyfileobj(packed, out)
        return target

    def files(self) -> list[Path]:
        """Conformance files of known architectures whose logits are there too."""
        if self.conformance is None:
            return []
        models = sorted((self.conformance / "models").glob("*.gguf"))
        return [path for path in models if self.logits(path).exists() and path.stem.rpartition("-")[0] in ARCHITECTURES]

    def logits(self, path: Path) -> Path:
        """The expected logits of a conformance file."""
        return path.parent.parent / "logits" / f"{path.stem}.npz"

    def close(self) -> None:
        """Remove what was unpacked."""
        self._scratch.cleanup()


# -- types -------------------------------------------------------------------------------------------------------------


def dequantization(kind: GGMLType) -> Cell:
    """Whether random bytes decode to the very bits of the gguf package, or of plain loops where it has not the type."""
    import gguf

    from tests.support import block_references

    size = 64 * 256 // kind.block_size * kind.type_size
    raw = np.random.default_rng(int(kind)).integers(0, 256, (4, size), np.uint8)
    own = kind in block_references.TYPES
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        expected = (
            block_references.decode(raw, kind)
            if own
            else gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(kind)))
        )
    found = dequantize(raw, kind)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    return {"exact": bool(same.all()), "against": "plain loops" if own else "gguf"}


def product(kind: GGMLType) -> Cell:
    """Error of products on the CPU with whole numbers, which no quantizer writes, against float64."""
    from tests.support.models.gguf_builder import random_blocks

    w = Weight("w", kind, (256, 1024), random_blocks((256, 1024), kind, std=20.0))
    x = np.random.default_rng(0).standard_normal((LOGIT_TOKENS, 1024), dtype=np.float32)
    exact = x.astype(np.float64) @ dequantize(w.raw, kind).T.astype(np.float64)
    with ThreadPool(1) as pool:
        single = np.concatenate([matmul(row[None], w, pool=pool) for row in x])
        return {"at_once": nmse(matmul(x, w, pool=pool), exact), "single": nmse(single, exact)}


def first_tokens(model: Path, text: Path) -> list[int]:
    """The tokens whose logits are compared: the beginning of the text."""
    return load_tokenizer(model).encode(text.read_text(encoding="utf-8")[:4096], add_special=True)[:LOGIT_TOKENS]


def make_file(model: Path, kind: GGMLType, folder: Path, ids: list[int]) -> tuple[GGMLType, Path, Path]:
    """Write the model in a type, and the logits that plain numpy computes from it; run in a process of its own."""
    path, logits = folder / f"{kind.name}.gguf", folder / f"{kind.name}.npy"
    with open_gguf(model) as source:
        rewrite(source, path, {info.name: kind for info in matrices(source)})
    with open_gguf(path) as gguf_file:
        backend = CpuBackend(load_model(gguf_file), kv_type="f32", context_length=CONTEXT, threads=1, reference=True)
        np.save(logits, backend.forward(Batch.build([(0, ids, 0, Outputs.ALL)])))
        backend.close()
        del backend
    return kind, path, logits


@contextmanager
def _cpu_backend(path: Path, **options: Any) -> Iterator[CpuBackend]:
    with open_gguf(path) as gguf_file:
        backend = CpuBackend(load_model(gguf_file), kv_type="f32", max_sequences=2, **options)
        try:
            yield backend
        finally:
            backend.close()
            del backend


def cpu_errors(path: Path, ids: list[int], expected: np.ndarray, threads: int | None) -> Cell:
    """Errors of the compiled path with a float32 cache, all tokens at once and token by token."""
    with _cpu_backend(path, context_length=max(len(ids), 16), threads=threads) as backend:
        at_once = backend.forward(Batch.build([(0, ids, 0, Outputs.ALL)]))
        single = [backend.forward(Batch.build([(1, [token], i, Outputs.ALL)])) for i, token in enumerate(ids)]
        return {"at_once": nmse(at_once, expected), "single": nmse(np.concatenate(single), expected)}


def perplexity(llm: LLM, text: Path, chunks: int | None) -> Cell:
    """Perplexity of the first chunks of a text."""
    *_, last = measure(llm, cut(llm, text.read_text(encoding="utf-8"), CONTEXT)[:chunks])
    return {"perplexity": last.value, "error": last.error, "chunks": last.n_chunks}


def type_on_cpu(path: Path, ids: list[int], logits: Path, text: Path, chunks: int | None, threads: int | None) -> Cell:
    """Errors and perplexity of a file on the CPU in float32, and perplexity as the engine runs where that differs."""
    cell = cpu_errors(path, ids, np.load(logits), threads)
    settings: dict[str, Any] = {"device": "cpu", "context_length": CONTEXT, "threads": threads, "max_sequences": 1}
    rounds = rounds_activations(GGMLType[path.stem])
    with LLM(path, **settings, exact=rounds) as llm:
        cell |= perplexity(llm, text, chunks)
    if rounds:
        with LLM(path, **settings) as llm:
            cell["as_run"] = perplexity(llm, text, chunks)["perplexity"]
    return cell


def rounds_activations(kind: GGMLType) -> bool:
    """Whether the CPU rounds the activations that a type is multiplied with unless `exact` is set."""
    try:
        from engine.cpu.products.integer import is_integer
    except ImportError:  # it never does
        return False
    # BF16 where the processor multiplies pairs of such numbers.
    return bool(is_integer(kind, kind.block_size * 64)) or kind is GGMLType.BF16


def type_on_gpu(path: Path, ids: list[int], logits: Path, text: Path, chunks: int | None) -> Cell:
    """The same on the GPU, all with its float16 cache."""
    from tests.support.gpu.helpers import decode_logits

    expected = np.load(logits)
    with LLM(path, device="cuda", context_length=CONTEXT, max_sequences=8) as llm:
        cell = perplexity(llm, text, chunks)
        with llm.exclusive_runner() as runner:
            cell |= {
                "at_once": nmse(runner.logits(ids), expected),
                "single": nmse(decode_logits(runner, ids), expected),
            }
        return cell


def type_on_any_gpu(kind: GGMLType) -> Cell:
    """What becomes of a type there: nothing to say of those that kernels read as they are."""
    from engine.cuda.formats import layouts

    kept = getattr(layouts, "kept_as", lambda kind: kind)(kind)
    if kept not in layouts.LAYOUTS:
        return {"falls_back": "no kernels"}
    return {} if kept is kind else {"kept_as": kept.name}


# -- architectures -----------------------------------------------------------------------------------------------------


def missing_on_gpu(path: Path) -> str:
    """Parts of a model that the GPU does not compute, or nothing."""
    from engine.cuda.load.features import missing_features

    with open_gguf(path) as gguf_file:
        model = load_model(gguf_file)
        missing = ", ".join(missing_features(model))
        del model
    return missing


def architecture_on_cpu(path: Path, expected: Path, threads: int | None) -> Cell:
    """Errors of a conformance file on the CPU."""
    with np.load(expected) as file:
        return cpu_errors(path, file["tokens"].tolist(), file["logits"], threads)


def architecture_on_gpu(path: Path, expected: Path, kv_type: str) -> Cell:
    """Errors of a conformance file on the GPU."""
    from tests.support.gpu.helpers import decode_logits, opened

    with np.load(expected) as file:
        ids, logits = file["tokens"].tolist(), file["logits"]
    with opened(path, kv_type=kv_type) as runner:
        return {"at_once": nmse(runner.logits(ids), logits), "single": nmse(decode_logits(runner, ids), logits)}


def machine(device: str) -> str:
    """What the figures were measured on, in words."""
    if device == "gpu":
        import cupy

        return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores"
