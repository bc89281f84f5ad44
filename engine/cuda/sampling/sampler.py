"""Sampling on the device: the tables the kernel reads, its workspace, and the launch. Knows no models, no requests.

The kernel (sampling.cu) chooses bit for bit what engine/sampling/sampler.py chooses, given equal logits. All
settings are data in device memory, so a captured launch serves every request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.errors import InvalidRequestError
from engine.sampling.params import MAX_LOGIT_BIAS, SamplingParams

SOURCES = ("sampling_common.cuh", "sampling_select.cuh", "sampling.cu")
FEW_THREADS, MANY_THREADS = 256, 1024
"""Threads of a block, for few rows and for many."""
MANY_ROWS = 32
"""Rows from which blocks have MANY_THREADS. On an H200 (V = 128256, us, with 256 and with 1024): 16 rows greedy 9.9 and
13.4, top_p=0.9 alone 97 and 63; 32 rows 13.0 and 15.0, 165 and 89; 128 rows 53 and 35, 633 and 276."""
MAXIMA = 128
CANDIDATES = 1024
BINS = 2048
MAX_VOCABULARY = 1 << 22
MAX_BLOCKS_PER_ROW = 64

# struct SamplingRow of the kernel, one per slot
ROW = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_k", "<i4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("typical_p", "<f4"),
        ("repetition_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("penalty_last_n", "<i4"),
        ("seed_low", "<u4"),
        ("seed_high", "<u4"),
        ("output_index", "<u4"),
        ("n_bias", "<i4"),
        ("n_logprobs", "<i4"),
        ("limit", "<i4"),
        ("mask", "<u4"),
    ]
)
assert ROW.itemsize == 64
NO_MASK, MASK, MASK_FREE_LOGPROBS = range(3)
"""Values of `mask`: the constants of sampling_common.cuh."""
COUNT_WORD, LIMIT_WORD = (list(ROW.names or ()).index(name) for name in ("output_index", "limit"))
"""Where they are in a row of 32-bit words."""

Put = Callable[[DeviceArray, int, npt.NDArray[Any]], None]
"""put(array, at, values) writes values into a device array from its element `at` on."""


@dataclass(frozen=True, eq=False)
class Results:
    """Rings of R launches with up to N rows each that the kernel writes, on the device or in memory it can reach.

    Attributes:
        tokens: (R, N) int32, the drawn token; -1 for padding and for logits no token can be drawn from.
        logprobs: (R, N) float32.
        top_ids: (R, N, 32) int32. top_logprobs: (R, N, 32) float32.
    """

    tokens: DeviceArray
    logprobs: DeviceArray
    top_ids: DeviceArray
    top_logprobs: DeviceArray


NO_LIMIT = int(np.iinfo(np.int32).max)


def pack_row(params: SamplingParams, seed: int, output_index: int, limit: int = NO_LIMIT) -> npt.NDArray[Any]:
    """The settings of one sequence as the kernel reads them: one ROW element, shape (1,)."""
    row = np.zeros(1, ROW)
    most = NO_LIMIT
    row["temperature"] = params.temperature
    row["top_k"] = min(params.top_k, most)
    row["top_p"] = params.top_p
    row["min_p"] = params.min_p
    row["typical_p"] = params.typical_p
    row["repetition_penalty"] = params.repetition_penalty
    row["presence_penalty"] = params.presence_penalty
    row["frequency_penalty"] = params.frequency_penalty
    row["penalty_last_n"] = min(params.penalty_last_n, most)
    row["seed_low"] = seed & 0xFFFFFFFF
    row["seed_high"] = seed >> 32
    row["output_index"] = output_index
    row["n_bias"] = len(params.logit_bias or ())
    row["n_logprobs"] = -1 if params.logprobs is None else params.logprobs
    row["limit"] = limit
    if params.constraint is not None:
        row["mask"] = MASK_FREE_LOGPROBS if params.free_logprobs else MASK
    return row


def threads(n_rows: int) -> int:
    """Threads of a block for so many rows."""
    return FEW_THREADS if n_rows < MANY_ROWS else MANY_THREADS


def job(n_threads: int) -> tuple[tuple[str, ...], dict[str, object]]:
    """The (files, defines) pair of the kernels with so many threads, for compiler.prebuild."""
    return SOURCES, {"THREADS": n_threads}


def grid(n_rows: int, n_multiprocessors: int) -> tuple[int, int]:
    """Blocks per row and rows at once.

    The blocks of a row wait for each other, so all must be resident: never more blocks than multiprocessors. Two
    engines on one GPU do not starve each other: of FEW_THREADS two blocks fit a multiprocessor; of MANY_THREADS one
    does, but a row then has at most four blocks (on 132 multiprocessors), and as blocks begin in order, one row of each
    engine at most waits for what the whole ones free.

    Seen on an H200 (V = 128256, us): greedy 4.8 and top_k=40 11.4 for one row on 64 blocks, 8.1 and 17 for eight rows
    on 16 blocks each; 21 and 40 for 64 rows on 2 blocks each, 126 and 246 for 512 rows on one.
    """
    at_once = min(n_rows, n_multiprocessors)
    blocks = MAX_BLOCKS_PER_ROW
    while blocks > 1 and blocks * at_once > n_multiprocessors:
        blocks //= 2
    return blocks, at_once


class DeviceSampler:
    """Per-slot tables, workspace and launch for up to N rows of logits at once; N is that of the results.

    Device arrays (S slots, V vocabulary):
        rows (S, 16) uint32: ROW structs; the kernel advances output_index.
        bias_ids (S, 1024) int32, bias_values (S, 1024) float32: the first n_bias entries count.
        history (S, context) int32: token at every position; the kernel writes the one it draws.
        step (2,) uint32: [0] launches finished so far; the results of launch i are in ring row i % R.
        workspace: adjusted (N, V) float32, maxima (N, 2, 128) uint64, control (N, 24) uint32 and
            histograms (N, 3, 2048) uint64 (both all zero between launches), candidates (N, 3, 1024) uint64.

    Args:
        vocab_size: V.
        context_length: tokens a slot's history holds.
        n_slots: S.
        results: where tokens and log-probabilities go.
    """

    def __init__(self, vocab_size: int, context_length: int, n_slots: int, *, results: Results) -> None:
        import cupy

        if vocab_size > MAX_VOCABULARY:
            raise InvalidRequestError(
                f"a vocabulary of {vocab_size}; sampling on the GPU allows at most {MAX_VOCABULARY}: use device='cpu'"
            )
        self.ring, n = results.tokens.shape
        self.vocab_size, self.context_length, self.max_rows, self.results = vocab_size, context_length, n, results
        self._kernels = {}
        for size in sorted({threads(1), threads(n)}):
            files, defines = job(size)
            kernels = build(files, defines=defines)
            self._kernels[size] = kernels.get("sample"), kernels.get("sample_masked")
        self._multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.rows = cupy.zeros((n_slots, ROW.itemsize // 4), np.uint32)
        self.bias_ids = cupy.zeros((n_slots, MAX_LOGIT_BIAS), np.int32)
        self.bias_values = cupy.zeros((n_slots, MAX_LOGIT_BIAS), np.float32)
        self.history = cupy.zeros((n_slots, context_length), np.int32)
        self.step = cupy.zeros(2, np.uint32)
        self.adjusted = cupy.empty((n, vocab_size), np.float32)
        self.maxima = cupy.zeros((n, 2, MAXIMA), np.uint64)
        self.control = cupy.zeros((n, 24), np.uint32)
        self.histograms = cupy.zeros((n, 3, BINS), np.uint64)
        self.candidates = cupy.empty((n, 3, CANDIDATES), np.uint64)

    @staticmethod
    def n_bytes(vocab_size: int, context_length: int, n_slots: int, n_rows: int) -> int:
        """Device memory of a DeviceSampler without its results, in bytes, for the memory plan."""
        per_slot = ROW.itemsize + 8 * MAX_LOGIT_BIAS + 4 * context_length
        return 8 + per_slot * n_slots + n_rows * (4 * vocab_size + 8 * (2 * MAXIMA + 3 * BINS + 3 * CANDIDATES) + 96)

    def set_slot(self, slot: int, row: npt.NDArray[Any], params: SamplingParams, put: Put) -> None:
        """Writes a sequence's settings: a row of pack_row() and the biases of the same parameters."""
        if params.logit_bias:
            params.check_vocabulary(self.vocab_size)
            n = len(params.logit_bias)
            put(self.bias_ids, slot * MAX_LOGIT_BIAS, np.fromiter(params.logit_bias.keys(), np.int32, n))
            put(self.bias_values, slot * MAX_LOGIT_BIAS, np.fromiter(params.logit_bias.values(), np.float32, n))
        put(self.rows, slot * self.rows.shape[1], row.view(np.uint32))

    def set_history(self, slot: int, history: Sequence[int], put: Put) -> None:
        """Writes a sequence's tokens so far (at least the one fed next); only penalties look at them."""
        put(self.history, slot * self.context_length, np.asarray(history, np.int32))

    def launch(
        self,
        logits: DeviceArray,
        positions: DeviceArray,
        next_token: DeviceArray,
        *,
        slots: DeviceArray | None = None,
        masks: DeviceArray | None = None,
        stream: Stream | None = None,
        pdl: bool = True,
    ) -> None:
        """Choose the next token of every row; nothing is allocated and nothing waits, so it may be captured.

        Args:
            logits: (B, V) float32, C-contiguous, B <= max_rows; rows with a mask get -inf where it allows no token,
                unless they report log-probabilities without it.
            positions: (S,) int32 by slot. Position of the token the logits come from, -1 for padding. Advanced by one;
                becomes -1 where the row's limit or the context is reached, or no token could be drawn.
            next_token: (S,) int32 by slot, written; -1 where no token could be drawn.
            slots: (B,) int32, the slot of every row, each at most once, -1 for padding; None: row b is slot b.
            masks: (S, ceil(V / 32)) uint32, the tokens that a row with a constraint may draw; None: no row has one.
            stream: CuPy stream.
            pdl: allow the launch to overlap the previous kernel's end.
        """
        n_rows, vocab_size = logits.shape
        assert vocab_size == self.vocab_size
        assert n_rows <= self.max_rows
        assert logits.dtype == np.float32
        assert logits.flags.c_contiguous
        assert positions.dtype == next_token.dtype == np.int32
        size = threads(n_rows)
        launch(
            self._kernels[size][masks is not None],
            grid(n_rows, self._multiprocessors),
            size,
            (
                logits,
                vocab_size,
                n_rows,
                slots,
                self.rows,
                self.bias_ids,
                self.bias_values,
                MAX_LOGIT_BIAS,
                self.history,
                self.context_length,
                next_token,
                positions,
                self.step,
                self.ring,
                self.max_rows,
                self.results.tokens,
                self.results.logprobs,
                self.results.top_ids,
                self.results.top_logprobs,
                self.adjusted,
                self.maxima,
                self.control,
                self.histograms,
                self.candidates,
                masks,
                0 if masks is None else masks.shape[1],
            ),
            stream=stream,
            pdl=pdl,
        )
