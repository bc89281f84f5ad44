"""Choice of the device: a loaded model becomes a Runner on the CPU or on a GPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig, KvType, Target, cache_size, checkpoint_count, page_count
from engine.cpu.backend import CpuBackend
from engine.cpu.runner import DEFAULT_SEQUENCES, CpuRunner
from engine.errors import DeviceError
from engine.model.loader import LoadedModel
from engine.model.memory import MemoryPlan
from engine.runner.protocol import Runner

log = logging.getLogger("engine")

_GPU_TRACES = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvmap")


def open_runner(config: EngineConfig, model: LoadedModel, status: Callable[[str], None]) -> Runner:
    """Put a loaded model on the device that the configuration asks for.

    With "auto" a GPU on which the model cannot be opened, whatever the reason, is the CPU with one warning.

    Raises:
        DeviceError: a GPU was asked for by name and cannot be used; says why and what to do.
    """
    context_length = config.resolve_context(model.config.context_length)
    if context_length > model.config.context_length:
        log.warning(
            "context_length %d is more than the %d tokens the model was trained for; text beyond them is usually worse",
            context_length,
            model.config.context_length,
        )
    if choose_device(config.device, config.device_index, model) == "cuda":
        try:
            return _on_gpu(config, model, context_length, status)
        except DeviceError as error:  # memory that others hold, a kernel that does not build
            if config.device != "auto":
                raise
            log.warning("running on the CPU: %s", error)
        gc.collect()  # the GPU memory of what had been opened
    return CpuRunner(
        model,
        context_length=context_length,
        kv_type=config.kv_type,
        max_sequences=config.max_sequences,
        cache_tokens=config.cache_tokens,
        prefill_chunk=config.prefill_chunk,
        checkpoints=config.checkpoints if config.prefix_cache else 0,
        threads=config.threads,
        status=status,
        activation_bits=config.activations,
        repack=config.repack,
    )


def _on_gpu(config: EngineConfig, model: LoadedModel, context_length: int, status: Callable[[str], None]) -> Runner:
    from engine.cuda.runner import CudaRunner

    return CudaRunner(
        model,
        context_length=context_length,
        kv_type=config.kv_type,
        max_sequences=config.max_sequences,
        cache_tokens=config.cache_tokens,
        prefill_chunk=config.prefill_chunk,
        checkpoints=config.checkpoints if config.prefix_cache else 0,
        target=config.target,
        deterministic=config.deterministic,
        device_index=config.device_index,
        status=status,
        eager=config.eager,
    )


def plan_memory(model: LoadedModel, config: EngineConfig) -> tuple[str, MemoryPlan]:
    """Device and memory that open_runner would take, without taking either.

    A plan for a GPU needs none: where there is no card, it is made for an H200.
    """
    context_length = config.resolve_context(model.config.context_length)
    if config.device.startswith("cuda") or choose_device(config.device, config.device_index, model) == "cuda":
        from engine.cuda import availability, free_memory
        from engine.cuda.load.memory_plan import REFERENCE_FREE, make_plan, memory_plan

        present = availability(config.device_index) is None
        plan = make_plan(
            model,
            context_length=context_length,
            kv_type=config.kv_type,
            max_sequences=config.max_sequences,
            cache_tokens=config.cache_tokens,
            prefill_chunk=config.prefill_chunk,
            checkpoints=config.checkpoints if config.prefix_cache else 0,
            free=free_memory(config.device_index) if present else REFERENCE_FREE,
        )
        return "cuda", memory_plan(plan)
    sequences = config.max_sequences or DEFAULT_SEQUENCES
    backend = CpuBackend(
        model,
        context_length=context_length,
        kv_type=config.kv_type,
        max_sequences=sequences,
        n_pages=page_count(cache_size(config.cache_tokens, context_length, sequences)),
        checkpoints=checkpoint_count(config.checkpoints if config.prefix_cache else 0, sequences),
        activation_bits=config.activations,
        repack=config.repack,
    )
    try:
        return "cpu", backend.memory_plan()
    finally:
        backend.close()


def plan_launches(model: LoadedModel, config: EngineConfig) -> tuple[list[dict[str, str]], str]:
    """Which GPU kernels would multiply which tensors, as rows by column name and as a table; needs no GPU.

    The card is the one that the memory plan is made for. Empty where the model would run on the CPU.
    """
    device = config.device
    if not device.startswith("cuda") and choose_device(device, config.device_index, model) != "cuda":
        return [], ""
    from engine.cuda.launch_plan.describe import describe
    from engine.cuda.launch_plan.model import REFERENCE_CARD, Settings
    from engine.cuda.launch_plan.table import launch_rows, launch_table
    from engine.cuda.load.features import check_features
    from engine.cuda.load.memory_plan import MOST_SEQUENCES, PREFILL_ROWS

    check_features(model, KvType.parse(config.kv_type))
    settings = Settings(
        kv_type=KvType.parse(config.kv_type),
        max_sequences=config.max_sequences or MOST_SEQUENCES,
        prefill_rows=config.prefill_chunk or PREFILL_ROWS[0],
        deterministic=config.deterministic,
        throughput=config.target == Target.THROUGHPUT,
    )
    rows = launch_rows(describe(model, REFERENCE_CARD, settings))
    return [row.as_dict() for row in rows], launch_table(rows)


def choose_device(device: str, index: int = 0, model: LoadedModel | None = None) -> str:
    """What was asked for as "cpu" or "cuda".

    With "auto" a machine that shows no trace of a GPU gets the CPU without a warning. A machine whose GPU cannot be
    used, or lacks kernels for a part of the model, gets it with a warning that says what is missing.

    Raises:
        DeviceError: a GPU was asked for by name and cannot be used.
    """
    if device == "cpu" or (device == "auto" and not any(Path(trace).exists() for trace in _GPU_TRACES)):
        return "cpu"
    from engine.cuda import availability

    reason = availability(index)
    if reason is None and model is not None and device == "auto":
        reason = _missing_on_gpu(model)
    if reason is None:
        return "cuda"
    if device != "auto":
        raise DeviceError(f"device {device!r} cannot be used: {reason}")
    log.warning("running on the CPU: %s", reason)
    return "cpu"


def _missing_on_gpu(model: LoadedModel) -> str | None:
    """Why the GPU cannot run a model, or None."""
    from engine.cuda.load.features import missing_features

    missing = missing_features(model)
    return f"the GPU has no kernels yet for {', '.join(missing)}" if missing else None
