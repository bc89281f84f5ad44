"""Launcher of adjugate.cu. Letters: T rows, E experts, U experts of a row. Must not know of layers."""

from __future__ import annotations

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch

FILES = ("adjugate.cu",)


def weigh_groups(
    scores: DeviceArray, ids: DeviceArray, weights: DeviceArray, *, best: int, per_group: int, scale: float
) -> None:
    """Chosen experts become the groups of the best of them, and weights those of their adjugate experts, in place.

    Args:
        scores: float32 (T, E), contiguous, of the router.
        ids: int32 (T, U), contiguous, U at most 32: experts, best first; then groups, each once, or -1.
        weights: float32 (T, U), contiguous, written.
        best: experts whose groups count, at most U.
        per_group: consecutive experts of a group.
        scale: factor of the weights.
    """
    used = int(ids.shape[1])
    assert ids.shape == weights.shape and 1 <= best <= used <= 32
    assert scores.flags.c_contiguous and ids.flags.c_contiguous and weights.flags.c_contiguous
    args = (scores, int(scores.shape[1]), used, best, per_group, float(scale), ids, weights)
    launch(build(FILES).get("adjugate_weights"), len(ids), 32, args)
