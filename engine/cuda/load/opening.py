"""Opening a model: kernels are built while the weights are uploaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.cuda.driver import compiler
from engine.cuda.driver.context import GpuContext
from engine.cuda.launch_plan.jobs import kernel_jobs
from engine.cuda.launch_plan.model import LaunchPlan
from engine.cuda.load.device_weights import DeviceWeights
from engine.cuda.load.uploader import Uploader
from engine.model.loader import LoadedModel


def load_weights(
    model: LoadedModel, launches: LaunchPlan, gpu: GpuContext, status: Callable[[str], None]
) -> DeviceWeights:
    """Uploads a model and builds every kernel that its launches need, with the GPU active.

    Args:
        model: the loaded file.
        launches: its plan.
        gpu: the GPU.
        status: called with what is under way.

    Raises:
        DeviceError: a kernel does not build.
    """
    total = model.weights_bytes
    uploader = Uploader(gpu.stream, lambda done: status(f"uploading weights {done * 100 // total} %"))
    # The compiler works without the GIL and without the device: it runs beside the upload.
    with ThreadPoolExecutor(max_workers=1) as side:
        building = side.submit(compiler.prebuild, kernel_jobs(launches), gpu.arch, status)
        weights = uploader.model(model, launches)
        building.result()
    del uploader
    gpu.pool.free_all_blocks()
    return weights
