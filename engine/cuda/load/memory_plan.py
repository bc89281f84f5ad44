"""What a model takes on the GPU, computed without one, and whether it fits what is free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import MAX_SEQUENCES, PAGE, KvType, cache_size, checkpoint_count, page_count, step_sizes
from engine.cuda.attention.attention_plan import scratch_bytes
from engine.cuda.attention.cache import bytes_per_page, page_table_bytes, text_cache_bytes, text_pages
from engine.cuda.attention.step_rows import StepRows
from engine.cuda.launch_plan.ahead import STATE_PLACES
from engine.cuda.launch_plan.arrays import array_bytes
from engine.cuda.launch_plan.describe import describe
from engine.cuda.launch_plan.model import REFERENCE_CARD, LaunchPlan, Settings
from engine.cuda.launch_plan.scratch import indexer_bytes, indexer_bytes_per_page
from engine.cuda.load.features import check_features
from engine.cuda.load.tensor_index import TensorIndex
from engine.cuda.sampling.sampler import DeviceSampler
from engine.errors import DeviceError
from engine.model.cache import StateRows
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan

PREFILL_ROWS = (2048, 512)
"""Rows of prompts that run at once: the first whose activations leave room for all pages, else the last."""

TEXT_ROWS = 8192
"""The same of a model that makes embeddings alone, or its context where that is longer: a text is in one batch."""

MIXED_ROWS = 512
"""Rows of prompts beside running streams, which wait for them once a token; with throughput as the target PREFILL_ROWS.

8B Q4_K_M on an H200: 512 rows take 14 ms, 2048 take 53. 768 requests of 128 tokens in and 128 out, all at once, give
12 450 tokens per second with 512 rows beside the streams, 15 190 with 2048."""

MIXED_ROWS_PER_SEQUENCE = 16
"""Rows of prompts for each running stream where that is more than MIXED_ROWS: 128 streams have all of PREFILL_ROWS."""

SHORTEST_KNOWN = 2
"""Runner.shortest_piece where forced tokens are rows of decode steps: even one that is not drawn needs no mask."""

SHORTEST_PIECE = 32
"""Runner.shortest_piece of models with recurrent layers. Such tokens go through the kernels of prompts, beside the
decode step, and the forward pass of the last token drawn, which was launched ahead, is lost. Whole answers of 330
tokens, 8B Q4_K_M on an H200, tokens per second one by one and with pieces of 8 and more: 598 and 628 for one sequence,
4280 and 3833 for 16, 8987 and 7359 for 64, whose neighbours wait for each piece. It does not go by the number of
sequences, as the bits of a text must not depend on its neighbours."""

LOGIT_ROWS = 32
"""Rows of logits of a prompt computed at once, where they are asked for."""

_RESERVE = 384 << 20  # cuBLAS workspace, captured graphs, loaded kernels

CACHE_SHARE = 0.9
"""Share of the free memory that a model takes by default; what is left is for other programs and other models."""

REFERENCE_FREE = 139 << 30
"""Free memory that is planned for where no card is there to ask: an H200's."""

LEAST_SEQUENCES, MOST_SEQUENCES = 64, 512
"""Sequences side by side by default: as many as find SEQUENCE_TOKENS positions each in the cache, within these bounds.
Steps of more than 512 rows of 8B Q4_K_M give 8 to 9 % more tokens per second, for nearly twice the time per token."""

SEQUENCE_TOKENS = 1024


@dataclass(frozen=True)
class DevicePlan:
    """Bytes per part, and the pages they buy.

    Attributes:
        weights: packed weights. activations: every buffer that is no weight and no cache.
        per_page: bytes of one page of all layers; 0 where no layer has pages.
        pages: pages of the cache.
        least_pages: pages of one full context; with fewer the model is not opened.
        prefill_rows: rows of prompts that run at once.
        per_context_page: bytes of `activations` for every page of a context, whatever the cache holds.
        states: recurrent states of all slots, and of the checkpoints.
        max_sequences: slots.
    """

    weights: int
    activations: int
    per_page: int
    pages: int
    least_pages: int
    prefill_rows: int
    per_context_page: int = 0
    states: int = 0
    max_sequences: int = 1

    @property
    def cache(self) -> int:
        """Keys and values of all pages."""
        return self.per_page * self.pages

    @property
    def total(self) -> int:
        """Everything, with a reserve for what the libraries take."""
        return self.weights + self.cache + self.states + self.activations + _RESERVE


def make_plan(
    model: LoadedModel,
    *,
    context_length: int,
    kv_type: KvType | str,
    max_sequences: int | None,
    cache_tokens: int | None = None,
    prefill_chunk: int | None = None,
    checkpoints: int | None = None,
    card: tuple[int, int] = REFERENCE_CARD,
    free: int | None = None,
) -> DevicePlan:
    """The plan of a model; needs no GPU.

    Args:
        model: the loaded file.
        context_length: positions of one sequence.
        kv_type: number format of the cache, a KvType or its value.
        max_sequences: slots; None: see choose().
        cache_tokens: positions of all sequences together; at least one context is planned.
        prefill_chunk: rows of prompts that run at once.
        checkpoints: copies of recurrent states kept for later prompts; None takes what config.checkpoint_count says.
        card: compute capability (90 = 9.0) and number of multiprocessors.
        free: bytes for defaults to fill; None: as many as needed for what is asked for, and no defaults.

    Raises:
        DeviceError: a part of the model has no GPU kernels, or the kind of cache.
    """
    check_features(model, KvType.parse(kv_type))
    settings = Settings(KvType.parse(kv_type), max_sequences or LEAST_SEQUENCES, prefill_chunk or PREFILL_ROWS[0])
    if not model.config.generates:
        settings = replace(settings, max_sequences=1, prefill_rows=max(settings.prefill_rows, context_length))
    if free is not None:
        _, plan = choose(
            model,
            card,
            settings,
            free,
            context_length=context_length,
            cache_tokens=cache_tokens,
            checkpoints=checkpoints,
            default_sequences=max_sequences is None,
            default_rows=prefill_chunk is None,
        )
        return plan
    launches = describe(model, card, settings)
    return plan_of(
        model,
        launches,
        context_length=context_length,
        cache_tokens=cache_tokens,
        n_checkpoints=checkpoint_count(checkpoints, settings.max_sequences),
    )


def choose(
    model: LoadedModel,
    card: tuple[int, int],
    settings: Settings,
    free: int,
    *,
    context_length: int,
    cache_tokens: int | None,
    checkpoints: int | None = None,
    default_sequences: bool,
    default_rows: bool,
) -> tuple[LaunchPlan, DevicePlan]:
    """What a runner is opened with on a card with so much free memory.

    Args:
        model: the loaded file.
        card: the GPU.
        settings: the launches depend on; max_sequences and prefill_rows where they are not defaults.
        free: bytes.
        context_length: positions of one sequence.
        cache_tokens: positions of all sequences together; None: all that CACHE_SHARE of the memory holds.
        checkpoints: see make_plan().
        default_sequences: choose how many sequences run side by side.
        default_rows: choose the rows of prompts.

    Raises:
        DeviceError: not even one full context fits.
    """

    def planned(rows: int, sequences: int) -> tuple[LaunchPlan, DevicePlan]:
        launches = describe(model, card, replace(settings, prefill_rows=rows, max_sequences=sequences))
        return launches, plan_of(
            model,
            launches,
            context_length=context_length,
            cache_tokens=cache_tokens,
            n_checkpoints=checkpoint_count(checkpoints, sequences),
        )

    if not model.config.generates:
        rows = max(TEXT_ROWS if default_rows else settings.prefill_rows, context_length)
        launches, plan = planned(rows, 1)
        if plan.total > free:
            launches, plan = planned(context_length, 1)
        return launches, fit(plan, free)
    sequences = LEAST_SEQUENCES if default_sequences else settings.max_sequences
    for rows in PREFILL_ROWS if default_rows else (settings.prefill_rows,):
        launches, plan = planned(rows, sequences)
        if plan.total <= free:
            break
    else:
        return launches, fit(plan, free)
    if default_sequences:
        pages = plan.pages if cache_tokens or not plan.per_page else _room(plan, free)
        wanted = min(pages * PAGE // SEQUENCE_TOKENS, MOST_SEQUENCES)
        for more in reversed([size for size in step_sizes(MAX_SEQUENCES) if LEAST_SEQUENCES < size <= wanted]):
            found = planned(rows, more)  # recurrent states take memory by the sequence
            if found[1].total <= CACHE_SHARE * free:
                launches, plan = found
                break
    if cache_tokens is None:
        most = plan.least_pages * launches.settings.max_sequences
        plan = replace(plan, pages=max(plan.pages, min(most, _room(plan, free))))
    return launches, plan


def _room(plan: DevicePlan, free: int) -> int:
    """Pages that CACHE_SHARE of the memory holds beside everything else."""
    return max(0, int(CACHE_SHARE * free) - (plan.total - plan.cache)) // max(plan.per_page, 1)


def plan_of(
    model: LoadedModel,
    launches: LaunchPlan,
    *,
    context_length: int,
    cache_tokens: int | None = None,
    n_checkpoints: int = 0,
) -> DevicePlan:
    """The plan of a model whose launches are known; arguments as those of make_plan(), n_checkpoints resolved."""
    settings = launches.settings
    slots, vocab, decode_rows = settings.max_sequences, launches.vocab, launches.decode_rows
    shapes, rows = launches.cache_shapes, StateRows(slots, STATE_PLACES, n_checkpoints)
    activations = (
        array_bytes(launches)
        + 4 * launches.width * slots  # last rows of prompts
        + 4 * vocab * (decode_rows + LOGIT_ROWS)
        + DeviceSampler.n_bytes(vocab, context_length, slots, slots)
        + page_table_bytes(context_length, slots)
        + StepRows.n_bytes(decode_rows, launches.known_rows, context_length)
        + sum(scratch_bytes(shape, decode_rows, *launches.card) for shape in set(launches.attention_shapes) if shape)
        + indexer_bytes(launches, context_length)
    )
    least = page_count(context_length)
    per_page, pages = bytes_per_page(shapes), page_count(cache_size(cache_tokens, context_length, slots))
    if not launches.generates:
        least = pages = text_pages(settings.prefill_rows)
        per_page = text_cache_bytes(launches.attention_shapes, 1)
    return DevicePlan(
        weights=_weight_bytes(model, launches),
        activations=activations,
        per_page=per_page,
        pages=pages,
        least_pages=least,
        prefill_rows=settings.prefill_rows,
        max_sequences=slots,
        # The sampler's history, the page tables and scores of indexers.
        per_context_page=slots * (4 * PAGE + 4) + 4 * decode_rows + indexer_bytes_per_page(launches),
        states=rows.total * sum(shape.state_bytes for shape in launches.state_shapes if shape is not None),
    )


def _weight_bytes(model: LoadedModel, launches: LaunchPlan) -> int:
    """Packed matrices, and vectors as float32."""
    return sum(matrix.n_bytes for matrix in launches.matrices) + 4 * TensorIndex(model.weights).vector_elements


def fit(plan: DevicePlan, free: int) -> DevicePlan:
    """The plan with as many of its pages as fit into `free` bytes.

    Raises:
        DeviceError: not even one full context fits; says what is needed, what is free and the largest that fits.
    """
    without_cache = plan.total - plan.cache
    left = free - without_cache
    pages = min(plan.pages, left // plan.per_page if plan.per_page else plan.pages) if left >= 0 else 0
    if pages >= plan.least_pages:
        return replace(plan, pages=int(pages))
    # A shorter context needs smaller buffers too, not only fewer pages.
    fixed = without_cache - plan.least_pages * plan.per_context_page
    largest = int(max(0, free - fixed) // (plan.per_page + plan.per_context_page)) * PAGE
    if largest:
        remedy = f"the largest context that fits is {largest} tokens (context_length={largest})"
    elif fixed - plan.states < free:
        remedy = "the recurrent states do not fit: ask for a smaller max_sequences or fewer checkpoints"
    else:
        remedy = "not even the weights fit: use a smaller quantization or device='cpu'"
    cache, buffers = plan.least_pages * plan.per_page, without_cache - plan.weights - plan.states
    states = f"recurrent states {_gib(plan.states)}, " if plan.states else ""
    raise DeviceError(
        f"the model needs {_gib(without_cache + cache)} of GPU memory with {plan.least_pages * PAGE} tokens of context "
        f"(weights {_gib(plan.weights)}, cache {_gib(cache)}, {states}buffers {_gib(buffers)}), "
        f"{_gib(free)} are free: {remedy}"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"


def memory_plan(plan: DevicePlan) -> MemoryPlan:
    """The same in the terms that every device shares."""
    return MemoryPlan(
        weights_bytes=plan.weights,
        kv_bytes=plan.cache,
        scratch_bytes=plan.activations + _RESERVE,
        kv_bytes_per_token=plan.per_page // PAGE,
        state_bytes=plan.states,
        max_sequences=plan.max_sequences,
    )
