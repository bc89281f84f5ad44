"""Every kernel that a model needs on a card, so that all can be built side by side before the first is used.

Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cuda.attention.attention_plan import build_jobs
from engine.cuda.driver.graphs import buckets
from engine.cuda.driver.staging import FILES as STAGING_FILES
from engine.cuda.formats import dequant, repack
from engine.cuda.formats.layouts import kept_as
from engine.cuda.load.needs import attention_shape, head_jobs, kernel_groups, moe_jobs
from engine.cuda.matrix.matvec import MAX_COLUMNS, group_jobs
from engine.cuda.rows import parts, rows
from engine.cuda.sampling.sampler import SOURCES as SAMPLING_FILES
from engine.cuda.step.products import build_expert_jobs
from engine.cuda.step.products import build_jobs as product_jobs
from engine.model.loader import LoadedModel

Job = tuple[Sequence[str], dict[str, object] | None]
"""Kernel files and defines, for module.prebuild."""


def kernel_jobs(
    model: LoadedModel, *, kv_type: str, max_sequences: int, card: tuple[int, int], batch_rows: int
) -> list[Job]:
    """Build jobs of a runner, each once.

    Args:
        model: the loaded file.
        kv_type: "f16" or "f32".
        max_sequences: slots.
        card: compute capability and number of multiprocessors.
        batch_rows: rows from which decode steps take the products for many; see matvec.BATCH_ROWS.
    """
    jobs: list[Job] = [(files, None) for files in (rows.FILES, parts.FILES, STAGING_FILES, SAMPLING_FILES)]
    for info in model.gguf.tensors.values():
        if len(info.shape) > 1:
            type = kept_as(info.type)
            jobs += [repack.build_job(type), *dequant.build_jobs(type)]
    for layer in model.config.layers:
        jobs += build_jobs(attention_shape(layer.attention, kv_type == "f16"), *card)
    jobs += [*moe_jobs(model, card[0]), *head_jobs(model, card[0])]
    prompts = kernel_groups(model, prompts=True)
    jobs += [*product_jobs(prompts, card[0]), *build_expert_jobs(prompts, model, card[0])]
    batches = sorted({1, MAX_COLUMNS, *buckets(max_sequences)})
    for matrices, columns, paired, activation in kernel_groups(model):
        jobs += group_jobs(
            matrices, columns, batches, card, paired=paired, activation=activation, batch_rows=batch_rows
        )
    return list({repr(job): job for job in jobs}.values())
