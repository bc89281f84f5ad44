"""State of every slot on the device (token, position, sampling), and the results the host reads from mapped memory.

The kernel writes what it draws straight into pinned host memory, so that a step needs no copy: once its event has
passed, the tokens are there. What the host changes waits until flush() sends it, the newest value of each. Must not
know of models.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.failure import device_errors
from engine.cuda.driver.staging import Mapped, Staging
from engine.cuda.sampling.sampler import COUNT_WORD, LIMIT_WORD, DeviceSampler, Results, pack_row
from engine.errors import EngineError, ModelFileError
from engine.request import ActiveSequence, TokenSample
from engine.sampling.constraint import Bits
from engine.sampling.params import MAX_LOGPROBS


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

    def __init__(self, vocab_size: int, n_slots: int, context_length: int, *, places: int, stream: Stream) -> None:
        import cupy

        self._stream = stream
        self._tokens_out = Mapped((places, n_slots), np.int32)
        self._logprobs_out = Mapped((places, n_slots), np.float32)
        self._top_ids_out = Mapped((places, n_slots, MAX_LOGPROBS), np.int32)
        self._top_logprobs_out = Mapped((places, n_slots, MAX_LOGPROBS), np.float32)
        results = Results(
            self._tokens_out.device,
            self._logprobs_out.device,
            self._top_ids_out.device,
            self._top_logprobs_out.device,
        )
        self._sampler = DeviceSampler(vocab_size, context_length, n_slots, results=results)
        self.tokens = cupy.zeros(n_slots, cupy.int32)
        self.positions = cupy.asarray(np.full(n_slots, -1, np.int32))
        self._vocab_size = vocab_size
        self._places = places
        self._masks: Mapped | None = None  # most programs never need it
        self._launched = 0
        self._new_positions: dict[int, int] = {}
        self._new_limits: dict[int, int] = {}
        self._new_tokens: dict[int, int] = {}
        self._new_counts: dict[int, int] = {}  # of outputs
        self._new_sequences: dict[int, tuple[ActiveSequence, int, int]] = {}
        self._news = self._new_sequences, self._new_limits, self._new_counts, self._new_positions, self._new_tokens

    def begin(self, sequence: ActiveSequence, position: int, limit: int, token: int | None = None) -> None:
        """The slot serves a sequence whose newest token has that position.

        Args:
            sequence: whose slot it is.
            position: of the newest token known.
            limit: the row stops by itself when it would have to feed this position.
            token: the newest token, where it is to be fed; None where its logits come from a prompt.
        """
        slot = sequence.slot
        self._new_sequences[slot] = (sequence, position, limit)
        self._new_limits.pop(slot, None)
        self._new_counts.pop(slot, None)
        self._new_positions[slot] = position
        if token is not None:
            self._new_tokens[slot] = token

    def pass_over(self, sequence: ActiveSequence, position: int, limit: int, token: int) -> None:
        """A slot that has begun goes on with its newest token at a later position; the tokens before it were not drawn.

        As begin(), but only what changes by that is sent.
        """
        slot = sequence.slot
        if sequence.params.penalizes or slot in self._new_sequences:
            self.begin(sequence, position, limit, token)
            return
        self._new_counts[slot] = position + 1 - len(sequence.prompt_ids)
        self._new_positions[slot], self._new_tokens[slot] = position, token

    def set_position(self, slot: int, position: int) -> None:
        """The slot feeds its token there in the following steps; -1 takes it out of them."""
        self._new_positions[slot] = position

    def set_limit(self, slot: int, limit: int) -> None:
        """See begin()."""
        self._new_limits[slot] = limit

    def set_mask(self, slot: int, bits: Bits) -> None:
        """The tokens that the slot may draw next. Nothing that reads its mask may be on its way.

        Raises:
            DeviceError: there is no memory for masks; it concerns this slot alone.
        """
        if self._masks is None:
            with device_errors("making room for the masks of constraints"):
                self._masks = Mapped((self.positions.size, -(-self._vocab_size // 32)), np.uint32)
        self._masks.host[slot] = bits

    def flush(self, staging: Staging) -> None:
        """Puts everything changed on its way."""
        for slot, (sequence, position, limit) in self._new_sequences.items():
            n_output = max(0, position + 1 - len(sequence.prompt_ids))
            self._sampler.set_slot(
                slot, pack_row(sequence.params, sequence.seed, n_output, limit), sequence.params, staging.put
            )
            if sequence.params.penalizes:  # nothing else looks back
                history = [*sequence.prompt_ids, *sequence.output_ids][: position + 1]
                self._sampler.set_history(slot, history, staging.put)
        rows = self._sampler.rows
        for slot, limit in self._new_limits.items():
            staging.put(rows, slot * rows.shape[1] + LIMIT_WORD, np.array([limit], np.uint32))
        for slot, count in self._new_counts.items():
            staging.put(rows, slot * rows.shape[1] + COUNT_WORD, np.array([count], np.uint32))
        for slot, position in self._new_positions.items():
            staging.put(self.positions, slot, np.array([position], np.int32))
        for slot, token in self._new_tokens.items():
            staging.put(self.tokens, slot, np.array([token], np.int32))
        for news in self._news:
            news.clear()

    def sample(self, logits: DeviceArray, slots: DeviceArray | None = None) -> None:
        """Draws the next token of slots 0..n-1 from logits (n, V), none with a mask; may be captured.

        slots: int32 (n,), other slots, -1 for a row without one; the results are in columns 0..n-1.
        """
        self._sampler.launch(logits, self.positions, self.tokens, slots=slots, stream=self._stream)

    def sample_masked(self, logits: DeviceArray) -> None:
        """The same where slots have masks."""
        assert self._masks is not None, "a row with a constraint whose mask was not set"
        self._sampler.launch(
            logits, self.positions, self.tokens, masks=self._masks.device, stream=self._stream, pdl=False
        )

    def sample_rows(self, logits: DeviceArray, slots: DeviceArray) -> None:
        """Draws the next token of the slots named (R,) from logits (R, V); the results are in columns 0..R-1."""
        masks = None if self._masks is None else self._masks.device
        self._sampler.launch(
            logits, self.positions, self.tokens, slots=slots, masks=masks, stream=self._stream, pdl=False
        )

    def count_launch(self) -> int:
        """Call once per launch that really runs, in order; returns the place of its results."""
        self._launched += 1
        return (self._launched - 1) % self._places

    def reset(self) -> None:
        """No slot is active, nothing is on its way, and the count is the device's own. Waits for the device."""
        for news in self._news:
            news.clear()
        self._stream.synchronize()
        self._launched = int(self._sampler.step[0])
        self._new_positions |= dict.fromkeys(range(self.positions.size), -1)

    def read(self, place: int, entries: Items[tuple[int, ActiveSequence]]) -> list[TokenSample | EngineError]:
        """Results of a launch that has ended, for (column, sequence) each.

        Where no token can be drawn from the logits (NaN, +inf, or nothing finite) there is an error in its place.
        """
        tokens, make = self._tokens_out.host[place].tolist(), tuple.__new__
        found: list[TokenSample | EngineError] = []
        for column, sequence in entries:
            token_id = tokens[column]
            if token_id >= 0 and sequence.params.logprobs is None:  # mostly
                found.append(make(TokenSample, (token_id, None, ())))
            elif token_id < 0:
                found.append(
                    ModelFileError(
                        "the model's logits hold NaN or infinity, or a bias or constraint forbids every token: the "
                        "weights are damaged or outside the float range; compare the file's checksum with its source"
                    )
                )
            else:
                n_top = sequence.params.logprobs or 0
                found.append(self._with_logprobs(place, column, token_id, n_top))
        return found

    def _with_logprobs(self, place: int, column: int, token_id: int, wanted: int) -> TokenSample:
        n = min(wanted, self._vocab_size)
        ids = self._top_ids_out.host[place, column, :n].tolist()
        values = self._top_logprobs_out.host[place, column, :n].tolist()
        return TokenSample(
            token_id, float(self._logprobs_out.host[place, column]), tuple(zip(ids, values, strict=True))
        )
