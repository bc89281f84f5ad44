"""What the tests of the GPU runner share: models on both devices, their logits, and a plain decode loop."""

import ctypes
import itertools
import os
from contextlib import contextmanager

import numpy as np
import pytest

from engine.config import page_count
from engine.cpu.backend import CpuBackend
from engine.cuda.attention.attention_plan import PAGE
from engine.errors import EngineError
from engine.gguf.reader import open_gguf
from engine.gguf.types import GGMLType
from engine.model.batch import Batch, Outputs
from engine.model.loader import load_model
from engine.model.transformer import hidden_states
from engine.request import ActiveSequence, Work
from engine.sampling import SamplingParams
from tests.support.models.gguf_builder import build_gguf, random_blocks, tiny_llama_parts
from tests.support.models.small_models import EXPERTS, make, with_experts

_request_ids = itertools.count(1)


def process_bytes():
    """Memory that this process has on the first GPU, contexts and loaded kernels too, as the driver's NVML counts it.

    None where NVML does not tell: it is missing, or knows the process by another number (containers). What other
    processes take and free meanwhile is not in it, as it is in cudaMemGetInfo.
    """
    import cupy

    class Process(ctypes.Structure):
        _fields_ = (
            ("pid", ctypes.c_uint),
            ("bytes", ctypes.c_ulonglong),
            ("gpu_instance", ctypes.c_uint),
            ("compute_instance", ctypes.c_uint),
        )

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        list_processes = nvml.nvmlDeviceGetComputeRunningProcesses_v3
    except (OSError, AttributeError):
        return None
    card, count, found = ctypes.c_void_p(), ctypes.c_uint(256), (Process * 256)()
    bus = cupy.cuda.runtime.deviceGetPCIBusId(0).encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(card)):
        return None
    if list_processes(card, ctypes.byref(count), found):
        return None
    mine = [one.bytes for one in found[: count.value] if one.pid == os.getpid()]
    return mine[0] if mine and mine[0] != ctypes.c_ulonglong(-1).value else None


def own_bytes(runner):
    """(of the runner's pool, of CuPy's own pool, of the whole process or 0 where it is not known)."""
    import cupy

    cupy.cuda.Device().synchronize()
    pools = runner._gpu.pool.total_bytes(), cupy.get_default_memory_pool().total_bytes()
    return *pools, process_bytes() or 0


def nmse(found, expected):
    """Squared error over the squares expected; not finite counts as infinite."""
    error = float(((found.astype(np.float64) - expected) ** 2).sum() / (expected.astype(np.float64) ** 2).sum())
    return error if np.isfinite(error) else float("inf")


def hopper_cupy():
    """The module cupy on a Hopper GPU; the calling test is skipped elsewhere."""
    import cupy

    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("the kernels are for compute capability 9.0")
    return cupy


@contextmanager
def opened(path, *, context_length=512, kv_type="f16", max_sequences=1, **options):
    """A CudaRunner with pages for full contexts in all slots; its attribute `model` holds the loaded file."""
    from engine.cuda.runner import CudaRunner

    with open_gguf(path) as gguf:
        model = load_model(gguf)
        runner = CudaRunner(
            model,
            context_length=context_length,
            kv_type=kv_type,
            max_sequences=max_sequences,
            **{"cache_tokens": max_sequences * page_count(context_length) * PAGE} | options,
        )
        runner.model = model
        try:
            yield runner
        finally:
            runner.close()
            del runner.model, model


def pages_of(runner, slot, order=None):
    """Pages for a full context: each slot has its own run of them, in the order of a permutation of all if given."""
    each = page_count(runner.context_length)
    pages = range(slot * each, (slot + 1) * each)
    return [int(order[page]) for page in pages] if order is not None else list(pages)


def cpu_logits(model, ids, kv_type="f32"):
    """The reference's logits (T, V): plain numpy, float32 cache unless told otherwise."""
    backend = CpuBackend(model, kv_type=kv_type, context_length=max(len(ids), 1), threads=2, reference=True)
    try:
        return backend.forward(Batch.build([(0, ids, 0, Outputs.ALL)]))
    finally:
        backend.close()


def decode_logits(runner, ids, *, slot=0, start=0):
    """Logits (T, V) of decode steps that are fed the given tokens in one slot, launched kernel by kernel."""
    rows, n = [], next(size for size in runner._machine.step_sizes if size > slot)
    ops, place = runner._machine.decode_ops(n), slice(slot, slot + 1)
    with runner._running():
        runner._machine.cache.set_pages(slot, pages_of(runner, slot))
        if runner._machine.states is not None:
            runner._machine.states.seat(slot, start - 1, start)  # where batches that name no place have left the state
        runner._machine.flush()
        for position, token in enumerate(ids, start):
            runner._machine.slots.tokens[place].set(np.array([token], np.int32))
            runner._machine.slots.positions[place].set(np.array([position], np.int32))
            x = hidden_states(runner._machine.weights, ops, None)
            ops.logits(x, runner._machine.logits[:n])
            rows.append(runner._machine.logits[place].get())
        runner._machine.slots.positions[place].set(np.array([-1], np.int32))
        runner._gpu.stream.synchronize()
    return np.concatenate(rows)


def generate(runner, prompt, n, *, slot=0, seed=0, chunk=512, release=True, order=None, **options):
    """n samples after a prompt, asked for one step at a time as the scheduler does; greedy unless told otherwise."""
    params = SamplingParams(max_tokens=n, ignore_eos=True, **({"temperature": 0} | options))
    sequence = ActiveSequence(
        next(_request_ids), slot, list(prompt), [], params, seed, pages=pages_of(runner, slot, order)
    )
    samples = []
    for start in range(0, len(prompt), chunk):
        ids = sequence.prompt_ids[start : start + chunk]
        last = start + len(ids) == len(prompt)
        (sample,) = runner.step([Work(sequence, ids, start, last)])
        sequence.n_cached += len(ids)
        sequence.state_place += 1
    while True:
        if isinstance(sample, EngineError):
            raise sample
        samples.append(sample)
        sequence.output_ids.append(sample.token_id)
        if len(samples) == n:
            break
        (sample,) = runner.step([Work(sequence, [sample.token_id], sequence.n_cached, True, decode=True)])
        sequence.n_cached += 1
        sequence.state_place += 1
    if release:
        runner.release(slot)
    return samples


def token_ids(samples):
    return [sample.token_id for sample in samples]


def typed_model(folder, weight_type, **options):
    """A tiny llama file whose matrices are random blocks of one type; widths must be whole blocks."""
    options = {"width": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "context_length": 512} | options
    meta, tensors = tiny_llama_parts(weight_type=GGMLType.F32, **options)
    for number, (name, array) in enumerate(tensors.items()):
        if array.ndim > 1:
            raw = random_blocks(array.shape, weight_type, std=float(array.std()), seed=number)
            tensors[name] = (raw, array.shape, weight_type)
    path = folder / f"{weight_type.name}-{len(list(folder.iterdir()))}.gguf"
    path.write_bytes(build_gguf(meta, tensors))
    return path


def shared_expert_model(folder, times, *, down=GGMLType.Q6_K, shared_down=GGMLType.Q6_K):
    """A tiny Q4_K file with 5 experts and a shared one, with a score, that is so many times as wide."""

    def change(tensors):
        with_experts(tensors, shared=256 * times)
        for number, (name, array) in enumerate(tensors.items()):
            if array.ndim > 1 and "gate_inp" not in name:
                kind = shared_down if "down_shexp" in name else down if "down_exps" in name else GGMLType.Q4_K
                raw = random_blocks(array.shape, kind, std=float(array.std()), seed=number)
                tensors[name] = (raw, array.shape, kind)

    lengths = {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256 * times}
    sizes = {"width": 256, "ffn": 256, "heads": 4, "kv_heads": 2, "context_length": 512}
    return make(folder, architecture="qwen2moe", metadata=EXPERTS | lengths, change=change, **sizes)[2]


def mixed_model(folder, **options):
    """Q4_K and Q6_K mixed as in Q4_K_M files: value and down projections of some layers and the head are wider."""
    options = {"width": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "context_length": 512, "tied": False} | options
    meta, tensors = tiny_llama_parts(weight_type=GGMLType.F32, **options)
    for number, (name, array) in enumerate(tensors.items()):
        if array.ndim > 1:
            wide = name.startswith(("output", "blk.0.attn_v", "blk.0.ffn_down"))
            kind = GGMLType.Q6_K if wide else GGMLType.Q4_K
            raw = random_blocks(array.shape, kind, std=float(array.std()), seed=number)
            tensors[name] = (raw, array.shape, kind)
    path = folder / f"mixed-{len(list(folder.iterdir()))}.gguf"
    path.write_bytes(build_gguf(meta, tensors))
    return path
