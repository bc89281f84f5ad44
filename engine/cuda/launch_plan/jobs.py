"""Every kernel of a plan, so that all can be built side by side before the first is used. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import step_sizes
from engine.cuda.driver import staging
from engine.cuda.formats import repack
from engine.cuda.launch_plan.families import Family
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.launch_plan.steps import Job
from engine.cuda.matrix import float_gemm, gemm_plan
from engine.cuda.rows import rows


def kernel_jobs(plan: LaunchPlan) -> list[Job]:
    """Build jobs of a runner, each once."""
    return list({repr(job): job for job in _jobs(plan)}.values())


def _jobs(plan: LaunchPlan) -> Iterator[Job]:
    yield staging.FILES, None  # what the host sends, and copies of pages
    yield rows.FILES, None  # measures the memory
    for matrix in plan.matrices:
        yield repack.build_job(matrix.type)
    for n in step_sizes(plan.settings.max_sequences) if plan.generates else ():
        yield from (launch.job for launch in plan.decode(n) if launch.job is not None)
    for n in plan.known_sizes:
        yield from (launch.job for launch in plan.known(n) if launch.job is not None)
    # Tile shapes of prompts go by the number of rows, of which there are too many to list: all are built.
    whole = plan.prompt(1, 1) if plan.generates else plan.texts(1)
    yield from (launch.job for launch in whole if launch.job is not None)
    if any(product.families.prompt is Family.FLOAT_GEMM for product in plan.products):
        yield from float_gemm.build_jobs(plan.card.arch)
    if plan.gemm_types:
        for activation in plan.gemm_activations:
            yield from gemm_plan.build_jobs(plan.gemm_types, activation)
    for layer in plan.layers:
        moe = layer.moe
        if moe is not None and Family.EXPERTS_GROUPED in moe.families.used:
            assert moe.gate_up is not None
            assert moe.down is not None
            types = (*moe.gate_up.types, *moe.down.types)
            yield from gemm_plan.expert_jobs(plan.gemm_types, types, moe.expert.activation)
