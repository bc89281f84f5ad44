"""What the launchers know of arrays and streams on the device: protocols that CuPy's classes satisfy.

CuPy has no type annotations and is imported only where a GPU is used, so signatures name these instead. Shapes and
dtypes are checked by the launchers, not by types. Imports nothing of CuPy.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt


class DevicePointer(Protocol):
    """Where an array begins."""

    @property
    def ptr(self) -> int:
        """Address on the device."""


class ArrayFlags(Protocol):
    """How an array is laid out."""

    @property
    def c_contiguous(self) -> bool:
        """Whether elements follow one another without gaps, the last axis fastest."""


class DeviceArray(Protocol):
    """An array in device memory, or in host memory that the device reads; cupy.ndarray is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next along each axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an element."""

    @property
    def ndim(self) -> int:
        """Number of axes."""

    @property
    def size(self) -> int:
        """Number of elements."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""

    @property
    def data(self) -> DevicePointer:
        """Address of the first element."""

    @property
    def flags(self) -> ArrayFlags:
        """Layout."""

    def __len__(self) -> int:
        """Length of the first axis."""

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view, for slices and whole numbers; the caller must not give an array as the key, which would copy."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write elements, on the current stream."""

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements under another shape; a view of a contiguous array."""

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """The same bytes as elements of another type."""

    def get(self) -> npt.NDArray[Any]:
        """A copy in host memory; waits for the current stream."""

    def set(self, values: npt.NDArray[Any], stream: Stream | None = None) -> None:
        """Copy host values of the same shape and type to the device, on a stream, else the current one."""


class Graph(Protocol):
    """Launches that were captured; cupy.cuda.Graph is one."""

    def launch(self, stream: Stream | None = None) -> None:
        """Queue all of them."""


class Stream(Protocol):
    """A queue of launches that run one after the other; cupy.cuda.Stream is one."""

    @property
    def ptr(self) -> int:
        """Handle of the stream; 0 is the default one."""

    def synchronize(self) -> None:
        """Wait until everything queued has run."""

    def begin_capture(self) -> None:
        """From now on launches become nodes of a graph instead of running."""

    def is_capturing(self) -> bool:
        """Whether launches are recorded instead of run.

        Raises:
            RuntimeError: an error has made the capture invalid.
        """

    def end_capture(self) -> Graph:
        """The graph of the launches since begin_capture()."""

    def __enter__(self) -> Self:
        """Make it the current stream of the calling thread."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make the former one current again."""


Argument = DeviceArray | int | float | np.integer[Any] | None
"""What a kernel takes: an array's address, 0 for None; an int as 32 bits, a numpy integer in its own width; a float as
32 bits."""
