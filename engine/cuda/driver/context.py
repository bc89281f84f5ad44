"""One GPU as a runner holds it: device, stream, a memory pool of its own, and whether it has failed.

All device memory of a runner comes from its pool, so that closing gives back exactly what it took and two open models
do not disturb each other. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.concurrency import fork
from engine.cuda.driver.arrays import Stream
from engine.cuda.driver.failure import device_errors, is_cuda_error, is_out_of_memory
from engine.cuda.driver.graphs import end_capture
from engine.errors import DeviceError


class GpuContext:
    """A GPU.

    Args:
        index: which one.

    Attributes:
        name: for people. arch: compute capability (90 = 9.0). multiprocessors: of the card.
        stream: everything is ordered on it. pool: a CuPy memory pool.
        broken: what failed; None while the GPU works.
        forked: this process is the child of the one that opened the GPU.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self.device = cupy.cuda.Device(index)
        with self.device:
            properties = cupy.cuda.runtime.getDeviceProperties(index)
            self.name = f"cuda:{index} ({properties['name'].decode()})"
            self.arch = int(self.device.compute_capability)
            self.multiprocessors = int(properties["multiProcessorCount"])
            self.pool = cupy.cuda.MemoryPool()
            self.stream: Stream = cupy.cuda.Stream(non_blocking=True)
        self.broken: str | None = None
        self.forked = False
        fork.register(self)

    def after_fork(self) -> None:
        """The driver refuses its work to the child of a process that used it."""
        self.forked = True

    def check(self) -> None:
        """Refuse a device that cannot be used any more.

        Raises:
            DeviceError: the GPU failed before, or this process is the child of a fork.
        """
        if self.forked:
            raise DeviceError(
                "this process was forked from one that had opened a model on the GPU, and CUDA does not work in it: "
                'start processes by the method "spawn" (multiprocessing.get_context("spawn")), or fork before a '
                "model is opened, or open the model on the cpu"
            )
        if self.broken:
            raise DeviceError(f"the GPU failed before ({self.broken}); restart the program and open the model again")

    def free_bytes(self) -> int:
        """Memory that no process has taken."""
        import cupy

        with self.device:
            return int(cupy.cuda.runtime.memGetInfo()[0])

    @contextmanager
    def active(self) -> Iterator[None]:
        """Device, stream and pool are the current ones."""
        import cupy

        with self.device, cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """As active(); a CUDA error marks the GPU broken for good.

        Raises:
            DeviceError: the GPU failed, now or before; see check().
        """
        self.check()
        try:
            with device_errors("running the model"), self.active():
                end_capture(self.stream)
                yield
        except DeviceError as error:
            if is_cuda_error(error.__cause__) and not is_out_of_memory(error):
                self.broken = str(error)
            raise

    def release(self) -> None:
        """Gives unused memory of the pool back."""
        with self.device:
            self.pool.free_all_blocks()
