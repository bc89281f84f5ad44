"""Residual connections that are more than a sum: what a part reads of the streams, and how its result changes them.

Formulas: engine/model/config/skips.py. Must not know of mixers, requests or sampling.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.parts.skips import (
    BankedSkipPlan,
    GatedSkipPlan,
    HyperSkipPlan,
    MeanSkipPlan,
    NormedSkipPlan,
    StackSkipPlan,
)
from engine.cuda.load.device_skips import DeviceSkip
from engine.cuda.rows import parts, skips
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.rows.parts import NO_ROPE, DeviceNorm
from engine.cuda.step.bricks.base import RowBricks
from engine.cuda.step.folding import columns_of
from engine.model.config import MixedSkip


class SkipBricks(RowBricks):
    """Streams (T, S * D) of the rows of a step; x (T, D) is what a part reads, and then what it gives."""

    def _fill_streams(self, head: DeviceSkip, x: DeviceArray) -> None:
        """Embeddings become streams."""
        plan = self.weights.plan.skips
        assert plan is not None
        skips.fill(x, self._streams(), plan.filled, head.init)

    def _read_skip(self, skip: DeviceSkip, x: DeviceArray) -> None:
        """Makes x of the streams."""
        plan = skip.plan
        if isinstance(plan, NormedSkipPlan):
            parts.normalize(x, x, _given(skip.norm))
        elif isinstance(plan, BankedSkipPlan):
            norm = _given(skip.norm)
            assert norm.weight is not None
            skips.bank_read(self._streams(), plan.count, norm.weight, norm.epsilon, x)
        elif isinstance(plan, HyperSkipPlan):
            self._read_hyper(skip, plan, x)
        elif isinstance(plan, GatedSkipPlan):
            streams, raw = self._streams(), self._raw(plan)
            normed = columns_of(self.buffers.predicted, self.n_rows, int(streams.shape[1]))
            parts.normalize(streams, normed, _given(skip.norm))
            self._product(skip.inner[0], normed, raw)
            assert skip.factor is not None
            assert skip.base is not None
            skips.gated_read(streams, raw, skip.factor, skip.base, plan.config.epsilon, x)
        elif isinstance(plan, MeanSkipPlan):
            skips.total(self._streams(), 0, plan.count, 1.0 / plan.count, x)
        else:
            assert isinstance(plan, StackSkipPlan)
            skips.total(self._streams(), plan.first, plan.count, 1.0, x)

    def _begin_skip(self, skip: DeviceSkip, x: DeviceArray) -> None:
        """Makes x ready for what the part adds to it."""
        if isinstance(skip.plan, NormedSkipPlan):
            parts.scale(x, skip.plan.scale)
        elif not isinstance(skip.plan, StackSkipPlan):
            parts.clear(x)

    def _write_skip(self, skip: DeviceSkip, x: DeviceArray) -> None:
        """Changes the streams by what the part gave, x."""
        plan = skip.plan
        if isinstance(plan, BankedSkipPlan):
            skips.bank_write(self._streams(), x, plan.count if plan.banks else 0)
        elif isinstance(plan, HyperSkipPlan):
            skips.gated_write(self._streams(), self._inject(plan), 0, None, None, 2.0, 0.0, x)
        elif isinstance(plan, GatedSkipPlan):
            assert skip.factor is not None
            assert skip.base is not None
            config, gates = plan.config, (skip.factor, skip.base)
            if isinstance(config, MixedSkip):
                skips.mixed_write(self._streams(), self._raw(plan), *gates, config.epsilon, config.iterations, x)
            else:
                change = config.magnitude, config.epsilon
                skips.gated_write(self._streams(), self._raw(plan), config.count, *gates, *change, x)
        elif isinstance(plan, StackSkipPlan):
            for place in plan.ends:
                parts.normalize(x, self._state(place), _given(skip.norm))
            if not plan.ends:
                parts.rotate(x[:, None], self._state(2)[:, None], NO_ROPE, self._positions)

    def _read_hyper(self, skip: DeviceSkip, plan: HyperSkipPlan, x: DeviceArray) -> None:
        streams, n = self._streams(), self.n_rows
        normed = columns_of(self.buffers.predicted, n, int(streams.shape[1]))
        gates = columns_of(self.buffers.stream_gates, n, int(streams.shape[1]))
        low = columns_of(self.buffers.skip, n, plan.down.width)
        parts.normalize(streams, normed, _given(skip.norm), pieces=plan.count, own_weights=True)
        self._product(skip.inner[0], normed, low)
        row_ops.gate(low, None, KernelActivation.SILU)
        self._product(skip.inner[1], low, gates)
        skips.hyper_read(normed, gates, x)
        if plan.inject is not None:
            self._product(skip.inner[2], normed, self._inject(plan))

    def _streams(self) -> DeviceArray:
        """All streams, (T, S * D)."""
        plan = self.weights.plan
        assert plan.skips is not None
        return columns_of(self.buffers.streams, self.n_rows, plan.skips.streams * plan.width)

    def _state(self, place: int) -> DeviceArray:
        """One of them, (T, D)."""
        width = self.weights.plan.width
        return self._streams()[:, place * width : (place + 1) * width]

    def _raw(self, plan: GatedSkipPlan) -> DeviceArray:
        """What the gates are made of."""
        return columns_of(self.buffers.skip, self.n_rows, plan.fn.width)

    def _inject(self, plan: HyperSkipPlan) -> DeviceArray:
        """The same of hyper-connections, (T, S), behind the low-rank numbers."""
        n, first = self.n_rows, self.buffers.rows * plan.down.width
        return self.buffers.skip.reshape(-1)[first : first + n * plan.count].reshape(n, plan.count)


def _given(norm: DeviceNorm | None) -> DeviceNorm:
    assert norm is not None
    return norm
