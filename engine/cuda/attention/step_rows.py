"""Rows of a decode step that are not those of slots 0, 1, ...: the token, position and pages of each.

A step normally has a row for each slot up to the last one that runs. Where sequences take turns, the rows are those of
chosen slots. Tokens of a sequence that are known before its newest one, because a constraint forces them, are rows
behind those of the slots: they read the pages of their slot. Must not know of layers or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.config import PAGE, page_count
from engine.cuda.driver.arrays import DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.driver.staging import Staging

FILES: tuple[str, ...] = ("step_rows.cu",)
DEFINES: dict[str, object] = {"PAGE": PAGE}
"""What builds the kernel."""


class KnownToken(NamedTuple):
    """A token that is fed at a position of the sequence in a slot."""

    slot: int
    token_id: int
    position: int


class StepRows:
    """Rows of one runner.

    Args:
        n_rows: most rows of a step, R. most: of them for known tokens, M.
        context_length: positions of a slot.

    Attributes:
        chosen: int32 (R,), the slots of the first rows of the next step, -1 in all others.
        tokens, positions: int32 (R,), position -1: a row without a token. table: int32 (R, pages of a sequence).
        sequence: int32 (R,), the row of `table` that a row reads: its own.
    """

    def __init__(self, n_rows: int, most: int, context_length: int) -> None:
        import cupy

        self._most = most
        self._kernel = build(FILES, defines=DEFINES).get("take_rows")
        self._counts = cupy.zeros(2, np.int32)
        self._known = cupy.zeros((3, most), np.int32)
        self.chosen = cupy.zeros(n_rows, np.int32)
        self.tokens = cupy.zeros(n_rows, np.int32)
        self.positions = cupy.asarray(np.full(n_rows, -1, np.int32))
        self.table = cupy.asarray(np.full((n_rows, page_count(context_length)), -1, np.int32))
        self.sequence = cupy.asarray(np.arange(n_rows, dtype=np.int32))

    @staticmethod
    def n_bytes(n_rows: int, most: int, context_length: int) -> int:
        """Device memory."""
        return 4 * (2 + 3 * most + n_rows * (4 + page_count(context_length)))

    def put(self, n: int, slots: Sequence[int], known: Sequence[KnownToken], staging: Staging) -> None:
        """The next step, of n rows, has those of these slots, then these tokens, at most M; on its way with a send."""
        assert len(known) <= self._most, f"{len(known)} known tokens, rows for {self._most}"
        assert len(slots) + len(known) <= n
        staging.put(self._counts, 0, np.array([len(slots), len(known)], np.int32))
        staging.put(self.chosen, 0, np.array([*slots, *[-1] * (n - len(slots))], np.int32))
        if known:
            columns = np.array([(one.token_id, one.position, one.slot) for one in known], np.int32).T
            for row, values in enumerate(columns):
                staging.put(self._known, row * self._most, values)

    def take(
        self,
        n: int,
        tokens: DeviceArray,
        positions: DeviceArray,
        block_table: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """Fills rows 0 .. n - 1 from what was put and from the state of the slots. First launch of a step.

        Args:
            n: rows of the step.
            tokens: int32 (slots,), what each slot is fed next.
            positions: int32 (slots,), -1 = the slot does not run.
            block_table: int32 (slots, pages of a sequence).
            stream: the current stream when left out.
        """
        launch(
            self._kernel,
            n,
            128,
            (
                self._counts,
                self.chosen,
                self._known,
                self._most,
                tokens,
                positions,
                block_table,
                int(block_table.shape[-1]),
                self.tokens,
                self.positions,
                self.table,
            ),
            stream=stream,
            pdl=False,
        )
