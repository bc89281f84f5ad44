"""A pretended card on which recurrent states are real: every kernel that moves them, or reads and writes them, runs.

A state is the checksum of all tokens that went into it. The next token is a function of the states behind a row, so a
state that is read from the wrong place, overwritten too early or lost gives another text. What the host sends, copies
of rows and the sampler's positions are carried out; products and everything else are only written down.
"""

import ctypes
import zlib
from dataclasses import dataclass

import numpy as np

from engine.cuda.driver.staging import RECORD
from engine.cuda.sampling.sampler import ROW
from tests.support.gpu.fake_cupy import FakeGpu

VOCABULARY = 200
"""Tokens below this are drawn."""


def fold(state, token):
    """A state behind one more token."""
    return zlib.crc32(int(token).to_bytes(4, "little"), int(state))


def drawn(states):
    """Token and log-probability that follow from the states of a row, in the order of the layers."""
    checksum = 0
    for state in states:
        checksum = fold(checksum, state)
    return checksum % VOCABULARY, -(checksum >> 16) / 65536


def expected(prompt, n, n_states):
    """(token, log-probability) of the n tokens behind a prompt, of a model with so many arrays of states."""
    state, found = 0, []
    for token in prompt:
        state = fold(state, token)
    for _ in range(n):
        found.append(drawn([state] * n_states))
        state = fold(state, found[-1][0])
    return found


@dataclass
class StateGpu(FakeGpu):
    """See the module.

    Attributes:
        machine: the runner's, once it is open; no layer runs before.
        copies: copied rows so far.
    """

    machine: object = None
    copies: int = 0

    def ran(self, name, grid, args):
        self.launches.clear()
        run = getattr(self, f"_run_{name}", None)
        if name.startswith("embed_") and (self.machine is None or args[0] is self.machine.weights.token_embd.data):
            self._behind = {}  # by row, the new state of every array
        elif run is not None and (self.machine is not None or name in ("scatter", "sample")):
            run(grid, *args)

    def call(self, name, *args):
        super().call(name, *args)
        if name == "memcpy":
            ctypes.memmove(*args)

    def _run_scatter(self, grid, records, data):
        for to, first, count in np.asarray(records).view(RECORD)[: grid[0]]:
            ctypes.memmove(int(to), data.data.ptr + 4 * int(first), 4 * int(count))

    def _run_copy_pages(self, grid, sources, targets, sizes, pairs):
        for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            for one, other in pairs.tolist():
                ctypes.memmove(target + other * size, source + one * size, size)
        self.copies += len(pairs)

    # ---- recurrent layers ----------------------------------------------------------------------------------------

    def _run_conv_decode(self, grid, x, row, weight, bias, states, places, positions, offsets, *rest):
        self._decode(states, places, positions, offsets)

    def _run_scan_decode(self, grid, dt, x, bc, width, xz, a, d, states, places, positions, offsets, *rest):
        self._decode(states, places, positions, offsets)

    def _run_mamba_2_decode(self, grid, mixed, row, weight, bias, dt_bias, a, d, past, states, *rows):
        self._decode(past, *rows[:3])
        self._decode(states, *rows[:3])

    def _run_lightning_decode(self, grid, mixed, row, decay, states, places, positions, offsets, *rest):
        self._decode(states, places, positions, offsets)

    def _run_lightning_prompt(self, grid, mixed, row, decay, states, spans, *rest):
        self._prompt(states, spans)

    def _run_delta_decode(self, grid, *args):
        past, states, *rows = args[13:18]
        self._decode(past, *rows)
        self._decode(states, *rows)

    def _run_shift_decode(self, grid, x, row, lerps, count, states, places, positions, offsets, *rest):
        self._decode(states, places, positions, offsets)

    def _run_shift_prompt(self, grid, x, row, lerps, count, states, spans, *rest):
        self._prompt(states, spans)

    def _run_rwkv_6_decode(self, grid, *args):
        self._decode(*args[10:14])

    def _run_rwkv_6_prompt(self, grid, r, w, k, v, stride, first, states, spans, *rest):
        self._prompt(states, spans)

    def _run_rwkv_7_decode(self, grid, *args):
        self._decode(*args[16:20])

    def _run_rwkv_7_prompt(self, grid, r, w, k, v, u, away, stride, states, spans, *rest):
        self._prompt(states, spans)

    def _run_ngram_rows_decode(self, grid, tokens, numbers, end, states, places, positions, offsets, *rest):
        self._decode(states, places, positions, offsets)

    def _run_ngram_conv_decode(self, grid, inputs, weight, channels, states, places, positions, offsets, *rest):
        self._decode(states, places, positions, offsets)

    def _run_ngram_keep(self, grid, tokens, inputs, channels, known, states, spans):
        self._prompt(known, spans)
        self._prompt(states, spans)

    def _run_rwkv_6_walk(self, grid, r, w, v, stride, chunked, states, spans, *rest):
        self._prompt(states, spans)

    def _run_rwkv_7_walk(self, grid, w, v, u, away, stride, chunked, states, spans, *rest):
        self._prompt(states, spans)

    def _run_conv_prompt(self, grid, x, row, weight, bias, states, spans, *rest):
        self._prompt(states, spans)

    def _run_scan_prompt(self, grid, dt, x, bc, width, xz, a, d, states, spans, *rest):
        self._prompt(states, spans)

    def _run_mamba_2_prompt(self, grid, mixed, row, convolved, dt_bias, a, d, states, spans, *rest):
        self._prompt(states, spans)

    def _run_delta_prompt(
        self, grid, convolved, beta, beta_row, steps, steps_row, dt_bias, a, eps, states, spans, *rest
    ):
        self._prompt(states, spans)

    def _run_mamba_2_walk(self, grid, mixed, row, convolved, d, chunked, states, spans, *rest):
        self._prompt(states, spans)

    def _run_delta_walk(self, grid, convolved, chunked, states, spans, *rest):
        self._prompt(states, spans)

    def _decode(self, states, places, positions, offsets):
        tokens = self.machine.slots.tokens
        for row, position in enumerate(positions.tolist()):
            if position < 0:
                continue
            read, write = (row * places + (position + int(offsets[row]) - back) % places for back in (1, 0))
            self._set(states, write, fold(self.state(states, read) if position else 0, tokens[row]), row)

    def _prompt(self, states, spans):
        tokens = self.machine.prompt_ops._tokens
        for first, n_rows, n_past, read, write in spans.tolist():
            state = self.state(states, read) if n_past else 0
            for row in range(first, first + n_rows):
                state = fold(state, tokens[row])
                self._behind.setdefault(row, []).append(state)
            self._set(states, write, state)

    @staticmethod
    def state(states, row):
        """What a row of an array of states holds."""
        return int(np.asarray(states[row]).reshape(-1).view(np.uint32)[0])

    def _set(self, states, row, state, of=None):
        np.asarray(states[row]).reshape(-1).view(np.uint32)[0] = state
        if of is not None:
            self._behind.setdefault(of, []).append(state)

    # ---- sampling ------------------------------------------------------------------------------------------------

    def _run_sample_masked(self, *given):
        self._run_sample(*given)

    def _are_chosen(self, slots):
        """Whether these are the slots of a decode step's rows."""
        rows = self.machine._step_rows
        return rows is not None and slots.data.ptr == rows.chosen.data.ptr

    def _run_sample(self, grid, logits, vocabulary, n, slots, table, *args):
        _, _, _, _, context, tokens, positions, step, ring, _, results, logprobs = args[:12]
        settings, place = np.asarray(table).view(ROW).reshape(-1), int(step[0]) % ring
        prompts = slots is not None and not self._are_chosen(slots)
        rows = self.machine.prompt_ops.output_rows.tolist() if prompts else range(n)
        for column, row in enumerate(rows):
            slot = column if slots is None else int(slots[column])
            results[place, column] = -1
            if slot < 0 or positions[slot] < 0:
                continue
            tokens[slot], logprobs[place, column] = drawn(self._behind[row])
            results[place, column] = tokens[slot]
            position = int(positions[slot]) + 1
            positions[slot] = -1 if position >= min(int(settings["limit"][slot]), context) else position
        step[0] += 1
