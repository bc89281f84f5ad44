"""What both versions of time mixing state before their kernels are built. Needs no GPU. Must not know of models."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.recurrent.plan import WALK_VALUES, StateShape

DECODE_THREADS, THREADS = 512, 128
"""Of a block in decode steps, and of the kernels of prompts."""

VALUES = 32
"""Columns of a head that a block of prompts computes."""

MAX_HEAD = 128
"""Most columns of a head: a lane holds an eighth of the keys of a value."""


@dataclass(frozen=True)
class TimeMixShape(StateShape):
    """What kernels are built for, and are launched with.

    Attributes:
        heads: H. head: S columns, at most MAX_HEAD.
        channel_mix: the layer's feed-forward part is RWKV's channel mixing, which keeps its last input as well.
    """

    heads: int
    head: int
    channel_mix: bool

    def __post_init__(self) -> None:
        assert 1 <= self.head <= MAX_HEAD, self

    @property
    def inner(self) -> int:
        """Numbers of all heads: D."""
        return self.heads * self.head

    @property
    def prompt_blocks(self) -> int:
        """Blocks of a span in prompts."""
        return self.heads * -(-self.head // VALUES)

    @property
    def walk_blocks(self) -> int:
        """Blocks of a span in prompts that go in chunks."""
        return self.heads * -(-self.head // WALK_VALUES)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The last input, the memories (H, S values, S keys) and, with channel mixing, its last input."""
        states = (self.inner,), (self.heads, self.head, self.head)
        return (*states, (self.inner,)) if self.channel_mix else states

    def finish_blocks(self, rows: int) -> int:
        """Blocks that have a warp for every head of so many rows."""
        return -(-rows * self.heads // (THREADS // 32))


def check_chunks(shape: TimeMixShape, chunked: DeviceArray, *inputs: DeviceArray) -> None:
    """What kernels of chunks need: room for all tokens, and rows of inputs that are copied by 16 bytes."""
    assert shape.chunk_width and chunked.shape[1] == shape.chunk_width and chunked.flags.c_contiguous, chunked.shape
    assert all(array.strides[0] % 16 == 0 for array in inputs)
