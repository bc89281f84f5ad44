"""Residual connections on the GPU, where these are more than sums. Must not know of steps."""

from __future__ import annotations

from dataclasses import dataclass

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.parts.skips import SkipPlan
from engine.cuda.load.device_products import DeviceProjection
from engine.cuda.rows.parts import DeviceNorm


@dataclass(frozen=True, eq=False)
class DeviceSkip:
    """What skips one part of a layer, or what the head reads. What its plan does not need is None.

    Attributes:
        norm: of x or of the streams; of banked states its weight (D,) are the scores.
        inner: the products, in the order of the plan.
        factor, base: float32, of the gates that a product gives. init: float32 (D,), the second state's first values.
    """

    plan: SkipPlan
    norm: DeviceNorm | None
    inner: tuple[DeviceProjection, ...] = ()
    factor: DeviceArray | None = None
    base: DeviceArray | None = None
    init: DeviceArray | None = None
