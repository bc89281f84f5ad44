"""Texts per second of an encoder beside llama.cpp's, for the same file, in turns.

    python -m scripts.bench_embed --type Q8_0 --type F16 --peer-python /path/to/venv/bin/python

A file with the shape of BERT base (12 layers of 768, 12 heads, feed-forward width 3072) and random weights is made for
each type. `--peer-python` is an interpreter that has llama-cpp-python installed, built for the machine at hand. Each
program has a process of its own that keeps the model open; they run by turns with the same number of threads, on the
same texts, as packed batches. llama.cpp gets batches of --batch tokens, of which it computes as many at once. Shown are
texts per second by the clock and, as other programs may run on the machine, per second of processor time. Markdown.
With `--device cuda` both run on the GPU, for which llama-cpp-python must be built.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from scripts.bench_cpu_peer import ROOT, answer, listen, note

LAYERS, WIDTH, HEADS, FFN, VOCAB, CONTEXT = 12, 768, 12, 3072, 30522, 512

PEER_SEQUENCES = 256
"""Most texts of a batch of llama.cpp: the most that it takes (its LLAMA_MAX_SEQ)."""


def bert_file(path: Path, type_name: str) -> None:
    """Write a file of random weights whose matrices have this type."""
    from engine.gguf.types import GGMLType
    from tests.support.models.gguf_builder import build_gguf, pack

    rng, kind = np.random.default_rng(0), GGMLType[type_name]
    tensors: dict[str, Any] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        drawn = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(math.sqrt(columns))
        tensors[f"{name}.weight"] = pack(drawn, kind)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = np.ones(WIDTH, np.float32)
        tensors[f"{name}.bias"] = np.zeros(WIDTH, np.float32)

    matrix("token_embd", VOCAB, WIDTH)
    tensors["position_embd.weight"] = rng.standard_normal((CONTEXT, WIDTH), dtype=np.float32)
    tensors["token_types.weight"] = np.zeros((2, WIDTH), np.float32)
    norm("token_embd_norm")
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
            rows = FFN if part == "ffn_up" else WIDTH
            matrix(f"blk.{layer}.{part}", rows, FFN if part == "ffn_down" else WIDTH)
            tensors[f"blk.{layer}.{part}.bias"] = np.zeros(rows, np.float32)
        norm(f"blk.{layer}.attn_output_norm")
        norm(f"blk.{layer}.layer_output_norm")
    keys = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": 1,
        "vocab_size": VOCAB,
    }
    metadata = {"general.architecture": "bert", **{f"bert.{key}": value for key, value in keys.items()}}
    metadata |= {"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.token_type_count": 2}
    path.write_bytes(build_gguf(metadata, tensors))


def texts_of(n: int, shortest: int, longest: int) -> list[list[int]]:
    """Token ids of texts, the same in both programs."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, size).tolist() for size in rng.integers(shortest, longest + 1, n)]


def timed(work: Any) -> list[float]:
    """Seconds by the clock and of the processor."""
    begin, busy = time.perf_counter(), time.process_time()
    work()
    return [time.perf_counter() - begin, time.process_time() - busy]


def serve_engine(settings: dict[str, Any]) -> None:
    """Answer requests with this engine."""
    from engine import LLM, __version__

    with LLM(settings["model"], device=settings["device"], threads=settings["threads"]) as llm:

        def measure(n: int, shortest: int, longest: int) -> list[float]:
            texts = texts_of(n, shortest, longest)
            llm.embed(texts[: max(4, n // 8)])
            return timed(lambda: llm.embed(texts))

        answer(__version__)
        listen(measure)


def serve_peer(settings: dict[str, Any]) -> None:
    """Answer requests with llama.cpp."""
    import ctypes

    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0 if settings["device"] == "cpu" else LAYERS + 1
    model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), params)
    run, size = llama_cpp.llama_context_default_params(), settings["batch"]
    run.n_ctx = run.n_batch = run.n_ubatch = size
    run.n_seq_max = PEER_SEQUENCES
    run.n_threads = run.n_threads_batch = settings["threads"]
    run.embeddings, run.pooling_type = True, 1
    context = llama_cpp.llama_init_from_model(model, run)

    def feed(texts: list[list[int]]) -> None:
        batch = llama_cpp.llama_batch_init(size, 0, 1)
        row = 0
        for sequence, ids in enumerate(texts):
            for position, token in enumerate(ids):
                batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.logits[row] = token, position, 1, 1
                batch.seq_id[row][0] = sequence
                row += 1
        batch.n_tokens = row
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for sequence in range(len(texts)):
            np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, sequence), (WIDTH,)).copy()
        llama_cpp.llama_batch_free(batch)

    def embed(texts: list[list[int]]) -> None:
        part: list[list[int]] = []
        for ids in [*texts, None]:
            if ids is None or sum(map(len, part)) + len(ids) > size or len(part) == PEER_SEQUENCES:
                feed(part)
                part = []
            if ids is not None:
                part.append(ids)

    def measure(n: int, shortest: int, longest: int) -> list[float]:
        texts = texts_of(n, shortest, longest)
        embed(texts[: max(4, n // 8)])
        return timed(lambda: embed(texts))

    answer(f"llama-cpp-python {llama_cpp.__version__}")
    listen(measure)


class Program:
    """A process with the model open."""

    def __init__(self, python: str, role: str, settings: dict[str, Any]) -> None:
        command = [python, "-m", "scripts.bench_embed", "--serve", role, json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.greeting = self._read()

    def ask(self, **request: int) -> list[float]:
        """One run: seconds by the clock and of the processor."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        seconds: list[float] = self._read()
        return seconds

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a program that is measured ended early")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(model: Path, type_name: str, args: argparse.Namespace) -> list[str]:
    """Rows of the table for one file."""
    settings = {"model": str(model), "device": args.device, "threads": args.threads, "batch": args.batch}
    programs = [Program(sys.executable, "engine", settings)]
    if args.peer_python:
        programs.append(Program(args.peer_python, "peer", settings))
    note(f"{type_name}: {' beside '.join(str(program.greeting) for program in programs)}")
    rows = []
    for shortest, longest in args.lengths:
        runs: list[list[list[float]]] = [[] for _ in programs]
        for _ in range(args.repetitions):
            for program, found in zip(programs, runs, strict=True):
                found.append(program.ask(n=args.texts, shortest=shortest, longest=longest))
        columns = [type_name, f"{shortest} to {longest}"]
        for kind in (0, 1):
            speeds = [args.texts / median(run[kind] for run in found) for found in runs]
            columns += [f"{speed:.1f}" for speed in speeds]
            columns.append(f"{speeds[0] / speeds[-1]:.2f}")
        rows.append(f"| {' | '.join(columns)} |")
        note(rows[-1])
    for program in programs:
        program.close()
    return rows


def main() -> None:
    """Read the arguments; serve, or compare."""
    if sys.argv[1:2] == ["--serve"]:
        {"engine": serve_engine, "peer": serve_peer}[sys.argv[2]](json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", action="append", dest="types", help="of the matrices; default F16 and Q8_0")
    parser.add_argument("--peer-python", help="without it this engine runs alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512, help="tokens of a batch of llama.cpp")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split("-"))), nargs="*")
    args = parser.parse_args()
    args.lengths = args.lengths or [(8, 32), (32, 128), (256, 512)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for type_name in args.types or ["F16", "Q8_0"]:
            path = Path(folder) / f"bert-base-{type_name}.gguf"
            bert_file(path, type_name)
            rows += compare(path, type_name, args)
    print("| type | tokens of a text | texts/s | llama.cpp | ratio | per processor second | llama.cpp | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
