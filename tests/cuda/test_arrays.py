"""The protocols of engine/cuda/driver/arrays.py against CuPy's classes, which need no GPU to be looked at."""

import pytest

from engine.cuda.driver import arrays

cupy = pytest.importorskip("cupy")
PROTOCOL_MACHINERY = {"__init__", "__subclasshook__"}


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [
        (arrays.DevicePointer, cupy.cuda.MemoryPointer),
        (arrays.ArrayFlags, cupy._core.flags.Flags),
        (arrays.DeviceArray, cupy.ndarray),
        (arrays.Stream, cupy.cuda.Stream.null),
    ],
)
def test_cupy_has_every_member(protocol, implementation):
    members = {name for name, value in vars(protocol).items() if callable(value) or isinstance(value, property)}
    members -= PROTOCOL_MACHINERY
    assert len(members) > 0
    assert {name for name in members if not hasattr(implementation, name)} == set()
