"""State of every slot on the device (token, position, sampling), and the results the host reads from mapped memory.

The kernel writes what it draws straight into pinned host memory, so that a step needs no copy: once its event has
passed, the token is there. Must not know of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cuda.sampling_ops import DeviceSampler
from engine.errors import ModelFileError
from engine.request import Sequence, TokenSample
from engine.sampling.params import MAX_LOGPROBS


class _Mapped:
    """A pinned host array that kernels write to: `host` is numpy, `device` the same memory as a CuPy array."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        import cupy

        count = int(np.prod(shape))
        n_bytes = count * np.dtype(dtype).itemsize
        self._memory = cupy.cuda.alloc_pinned_memory(n_bytes)
        self.host = np.frombuffer(self._memory, dtype, count).reshape(shape)
        self.host[:] = 0
        outside = cupy.cuda.UnownedMemory(self._memory.ptr, n_bytes, self._memory)
        self.device = cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(outside, 0))


class DeviceSlots:
    """Tokens, positions and sampling of all slots.

    Args:
        vocab_size: V.
        n_slots: slots.
        context_length: positions of a slot.
        places: length of the ring of results.
        stream: the stream everything happens on.

    Attributes:
        tokens: int32 (n_slots,), the token each slot is fed next.
        positions: int32 (n_slots,), its position; -1 = inactive.
    """

    def __init__(self, vocab_size: int, n_slots: int, context_length: int, *, places: int, stream: Any) -> None:
        import cupy

        self._stream = stream
        self._sampler = DeviceSampler(vocab_size, context_length, n_slots, ring=places)
        self._tokens_out = _Mapped((places, n_slots), np.int32)
        self._logprobs_out = _Mapped((places, n_slots), np.float32)
        self._top_ids_out = _Mapped((places, n_slots, MAX_LOGPROBS), np.int32)
        self._top_logprobs_out = _Mapped((places, n_slots, MAX_LOGPROBS), np.float32)
        self._sampler.out_tokens = self._tokens_out.device
        self._sampler.out_logprobs = self._logprobs_out.device
        self._sampler.out_top_ids = self._top_ids_out.device
        self._sampler.out_top_logprobs = self._top_logprobs_out.device
        self.tokens = cupy.zeros(n_slots, cupy.int32)
        self.positions = cupy.full(n_slots, -1, cupy.int32)
        self._numbers = cupy.arange(n_slots, dtype=cupy.int32)
        self._vocab_size = vocab_size
        self._places = places
        self._launched = 0

    def begin(self, sequence: Sequence, position: int) -> None:
        """The slot serves a sequence whose newest token stands at that position."""
        slot = sequence.slot
        history = [*sequence.prompt_ids, *sequence.output_ids][: position + 1]
        n_output = max(0, position + 1 - len(sequence.prompt_ids))
        self._sampler.set_slot(slot, sequence.params, sequence.seed, n_output, history, self._stream)
        self.positions[slot : slot + 1].set(np.array([position], np.int32), stream=self._stream)

    def deactivate(self, slot: int) -> None:
        """The slot takes no part in the following steps."""
        import cupy

        pointer = self.positions[slot : slot + 1].data.ptr
        cupy.cuda.runtime.memsetAsync(pointer, 0xFF, 4, self._stream.ptr)  # int32 -1

    def sample(self, logits: Any) -> None:
        """Draws the next token of slots 0..n-1 from logits (n, V); may be captured."""
        n = logits.shape[0]
        self._sampler.launch(logits, self.positions[:n], self.tokens[:n], stream=self._stream)

    def sample_one(self, logits: Any, slot: int) -> int:
        """Draws the next token of one slot from logits (1, V); returns the place of its result, in column 0."""
        one = slice(slot, slot + 1)
        self._sampler.launch(
            logits, self.positions[one], self.tokens[one], slots=self._numbers[one], stream=self._stream, pdl=False
        )
        return self.count_launch()

    def count_launch(self) -> int:
        """Call once per launch that really runs, in order; returns the place of its results."""
        self._launched += 1
        return (self._launched - 1) % self._places

    def read(self, place: int, column: int, sequence: Sequence) -> TokenSample:
        """A result whose launch has ended.

        Raises:
            ModelFileError: no token can be drawn from the logits (NaN, +inf, or nothing finite).
        """
        token_id = int(self._tokens_out.host[place, column])
        if token_id < 0:
            raise ModelFileError(
                "the model's logits hold NaN or infinity: the weights are damaged or outside the float range, "
                "compare the file's checksum with its source"
            )
        wanted = sequence.params.logprobs
        if wanted is None:
            return TokenSample(token_id)
        n = min(wanted, self._vocab_size)
        ids = self._top_ids_out.host[place, column, :n].tolist()
        values = self._top_logprobs_out.host[place, column, :n].tolist()
        return TokenSample(
            token_id, float(self._logprobs_out.host[place, column]), tuple(zip(ids, values, strict=True))
        )
