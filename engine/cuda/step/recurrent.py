"""Recurrent layers between their first and their last product, in decode steps and in prompts.

The kernels between the products read and write states; which ones, a decode step computes on the device and a batch of
prompts lists. Must not know of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.load.buffers import Activations
from engine.cuda.load.device_weights import DeviceMamba
from engine.cuda.recurrent.mamba_plan import span_table
from engine.cuda.recurrent.state_cache import StateCache
from engine.cuda.rows import parts
from engine.cuda.step.folding import columns_of
from engine.model.batch import Span
from engine.model.cache import StateRows


class Scans(Protocol):
    """The kernels that read and write the states of the rows at hand; `layer` is a layer's number."""

    def convolve(self, layer: int, mamba: DeviceMamba, xz: DeviceArray, out: DeviceArray) -> None:
        """See Mamba.conv_decode and Mamba.conv_prompt."""

    def scan(
        self, layer: int, mamba: DeviceMamba, dt: DeviceArray, x: DeviceArray, bc: DeviceArray, xz: DeviceArray
    ) -> None:
        """See Mamba.scan_decode and Mamba.scan_prompt; the result replaces dt."""


class DecodeScans:
    """Row b is slot b. Implements Scans.

    Args:
        states: the states.
        positions: int32 (B,), the position of each slot's token, -1 = the slot does not run.
    """

    def __init__(self, states: StateCache, positions: DeviceArray) -> None:
        self._states, self._positions = states, positions

    def convolve(self, layer: int, mamba: DeviceMamba, xz: DeviceArray, out: DeviceArray) -> None:
        """See Scans.convolve."""
        states, (conv_state, _) = self._states, self._states.arrays(layer)
        kernels = states.kernels[mamba.plan.shape]
        kernels.conv_decode(xz, mamba.conv, mamba.conv_bias, conv_state, self._positions, states.offsets, out)

    def scan(
        self, layer: int, mamba: DeviceMamba, dt: DeviceArray, x: DeviceArray, bc: DeviceArray, xz: DeviceArray
    ) -> None:
        """See Scans.scan."""
        states, (_, ssm_state) = self._states, self._states.arrays(layer)
        kernels = states.kernels[mamba.plan.shape]
        kernels.scan_decode(dt, x, bc, xz, mamba.a, mamba.d, ssm_state, self._positions, states.offsets, dt)


class PromptScans:
    """Pieces of prompts. Implements Scans.

    Args:
        states: the states.
        spans: int32 (S, 5) on the device, from span_table.
        tiles: int32 (n_tiles, 2) on the device, from conv_tiles.
    """

    def __init__(self, states: StateCache, spans: DeviceArray, tiles: DeviceArray) -> None:
        self._states, self._spans, self._tiles = states, spans, tiles

    def convolve(self, layer: int, mamba: DeviceMamba, xz: DeviceArray, out: DeviceArray) -> None:
        """See Scans.convolve."""
        conv_state, _ = self._states.arrays(layer)
        kernels = self._states.kernels[mamba.plan.shape]
        kernels.conv_prompt(xz, mamba.conv, mamba.conv_bias, conv_state, self._spans, self._tiles, out)

    def scan(
        self, layer: int, mamba: DeviceMamba, dt: DeviceArray, x: DeviceArray, bc: DeviceArray, xz: DeviceArray
    ) -> None:
        """See Scans.scan."""
        _, ssm_state = self._states.arrays(layer)
        kernels = self._states.kernels[mamba.plan.shape]
        kernels.scan_prompt(dt, x, bc, xz, mamba.a, mamba.d, ssm_state, self._spans, dt)


def state_spans(spans: Iterable[Span], rows: StateRows) -> npt.NDArray[np.int32]:
    """Spans of a batch as the kernels read them, int32 (S, 5).

    Where a span names no place, the state after n tokens is at place n - 1, as decode steps leave it at offset 0. That
    is for callers without a scheduler: only places that a step does not overwrite make it repeatable.
    """
    found = []
    for span in spans:
        read, write = (span.n_past - 1, span.n_total - 1) if span.place is None else (span.place, span.place_behind)
        found.append((span.row, span.n_rows, span.n_past, rows.place(span.slot, read), rows.place(span.slot, write)))
    return span_table(found)


def state_space(
    layer: int,
    mamba: DeviceMamba,
    xz: DeviceArray,
    buffers: Activations,
    product: Callable[..., None],
    scans: Scans,
) -> DeviceArray:
    """The brick ssm: from what ssm_in gives (T, 2 * E) to what ssm_out reads (T, E)."""
    n, shape = len(xz), mamba.plan.shape
    u, dt = columns_of(buffers.convolved, n, shape.d_inner), columns_of(buffers.scanned, n, shape.d_inner)
    dt_b_c = columns_of(buffers.dt_b_c, n, shape.row_width)
    scans.convolve(layer, mamba, xz, u)
    product(mamba.ssm_x, u, dt_b_c)
    compressed = dt_b_c[:, : shape.dt_rank]
    if mamba.norm is not None:
        ends = accumulate((shape.dt_rank, shape.d_state, shape.d_state), initial=0)
        for part in (dt_b_c[:, first:end] for first, end in pairwise(ends)):
            parts.normalize(part, part, mamba.norm)
    product(mamba.ssm_dt, compressed, dt)
    scans.scan(layer, mamba, dt, u, dt_b_c, xz)
    return dt
