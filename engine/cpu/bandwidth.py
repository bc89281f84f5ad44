"""How fast this machine reads memory: the ceiling that decode speed is compared with.

Uses the thread pool and one kernel; independent of models.
"""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np

from engine.cpu.threads import ThreadPool
from engine.gguf.quants import GGMLType
from engine.model.weights import Weight

COLUMNS = 4096


@dataclass(frozen=True)
class ReadBandwidth:
    """Bytes per second read from main memory by all threads of a pool together.

    Attributes:
        median: of the repeats; compare a median speed with this.
        best: of the repeats.
        threads: threads that read.
    """

    median: float
    best: float
    threads: int


def read_bandwidth(pool: ThreadPool, *, n_bytes: int = 256 << 20, repeats: int = 9) -> ReadBandwidth:
    """Times a plain float32 product over a matrix that is far larger than the caches, cut evenly over the threads.

    The vector it is multiplied with stays in the first-level cache, so the traffic is the matrix, read once in order.

    Args:
        pool: threads to read with.
        n_bytes: size of the matrix, allocated for the duration of the call.
        repeats: timed runs after one untimed.
    """
    from engine.cpu.kernels.build import kernel
    from engine.cpu.products.matmul import dot_operands, prepare

    dot_rows = kernel("dot_rows", "F32")
    rows = max(pool.threads, n_bytes // (4 * COLUMNS))
    matrix = np.empty((rows, COLUMNS), dtype=np.float32)
    matrix.fill(1.0)  # pages that were never written are all one page of zeros
    x = np.ones((1, COLUMNS), dtype=np.float32)
    out = np.empty((1, rows), dtype=np.float32)
    weight = prepare(Weight("matrix", GGMLType.F32, matrix.shape, matrix.view(np.uint8)))
    operands = np.array(dot_operands(x, weight, out), dtype=np.int64)
    address: int = operands.__array_interface__["data"][0]
    n_tasks = min(rows, 4 * pool.threads)

    def task(index: int) -> None:
        low, high = rows * index // n_tasks, rows * (index + 1) // n_tasks
        dot_rows(address, low, high, 0)

    speeds = []
    for _ in range(repeats + 1):
        start = perf_counter()
        pool.run(task, n_tasks)
        speeds.append(matrix.nbytes / (perf_counter() - start))
    return ReadBandwidth(median=median(speeds[1:]), best=max(speeds[1:]), threads=pool.threads)
