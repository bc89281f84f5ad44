"""Recurrent layers between their first and their last product, in decode steps and in prompts.

The kernels between the products read and write states; which ones, a decode step computes on the device and a batch of
prompts lists. Must not know of requests.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.load.device_recurrent import (
    DeviceDelta,
    DeviceLightning,
    DeviceMamba,
    DeviceMamba2,
    DeviceRecurrent,
    DeviceRwkv6,
    DeviceRwkv7,
    DeviceShortConv,
)
from engine.cuda.recurrent.convolution import Convolution
from engine.cuda.recurrent.delta import Delta, DeltaInputs
from engine.cuda.recurrent.lightning import Lightning
from engine.cuda.recurrent.mamba import Mamba
from engine.cuda.recurrent.mamba_2 import Mamba2
from engine.cuda.recurrent.rows import PromptRows
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7
from engine.cuda.rows import parts
from engine.cuda.step.folding import columns_of
from engine.cuda.step.moves import Moves
from engine.cuda.step.rwkv import mix_time_6, mix_time_7


def move_states(layer: int, mixer: DeviceRecurrent, mixed: DeviceArray, moves: Moves) -> DeviceArray:
    """The brick ssm: from what the first products give, (T, .), to what the last one reads, (T, .)."""
    out = columns_of(moves.buffers.scanned, len(mixed), mixer.output.columns)
    kernels, arrays = moves.states.kernels[mixer.plan.shape], moves.states.arrays(layer)
    chunked = None
    if isinstance(moves.rows, PromptRows) and mixer.plan.chunked:
        assert moves.buffers.chunked is not None
        chunked = columns_of(moves.buffers.chunked, len(mixed), mixer.plan.chunked)
    if isinstance(mixer, DeviceShortConv):
        assert isinstance(kernels, Convolution)
        kernels(moves.rows, mixed, mixer.conv, None, arrays[0], out)
    elif isinstance(mixer, DeviceMamba):
        assert isinstance(kernels, Mamba)
        _mamba(mixer, kernels, mixed, arrays[0], arrays[1], out, moves)
    elif isinstance(mixer, DeviceMamba2):
        assert isinstance(kernels, Mamba2)
        convolved = columns_of(moves.buffers.convolved, len(mixed), kernels.shape.convolved)
        kernels(moves.rows, mixed, mixer.kept, arrays[0], arrays[1], convolved, out, chunked=chunked)
        if mixer.norm is not None:
            parts.normalize(out, out, mixer.norm, pieces=kernels.shape.groups, own_weights=True)
    elif isinstance(mixer, DeviceLightning):
        assert isinstance(kernels, Lightning)
        kernels(moves.rows, mixed, mixer.decay, arrays[0], out)
        parts.normalize(out, out, mixer.norm)
        parts.multiply_gate(out, mixed[:, 3 * kernels.shape.inner :])
    elif isinstance(mixer, DeviceRwkv6):
        assert isinstance(kernels, Rwkv6)
        mix_time_6(mixer, kernels, mixed, (arrays[0], arrays[1]), out, moves, chunked)
    elif isinstance(mixer, DeviceRwkv7):
        assert isinstance(kernels, Rwkv7)
        mix_time_7(mixer, kernels, mixed, (arrays[0], arrays[1]), out, moves, chunked)
    else:
        assert isinstance(kernels, Delta)
        convolved = columns_of(moves.buffers.convolved, len(mixed), kernels.shape.convolved)
        inputs = _delta_inputs(mixer, mixed, moves)
        kernels(moves.rows, inputs, mixer.kept, arrays[0], arrays[1], convolved, out, chunked=chunked)
    return out


def _mamba(
    mamba: DeviceMamba,
    kernels: Mamba,
    xz: DeviceArray,
    conv_state: DeviceArray,
    ssm_state: DeviceArray,
    dt: DeviceArray,
    moves: Moves,
) -> None:
    """Convolution, products and scan of Mamba 1; the result replaces dt."""
    shape, buffers = kernels.shape, moves.buffers
    u, dt_b_c = (
        columns_of(buffers.convolved, len(xz), shape.d_inner),
        columns_of(buffers.between, len(xz), shape.row_width),
    )
    kernels.convolve(moves.rows, xz, mamba.conv, mamba.conv_bias, conv_state, u)
    moves.product(mamba.ssm_x, u, dt_b_c)
    ends = pairwise(accumulate((shape.dt_rank, shape.d_state, shape.d_state), initial=0))
    for (first, end), norm in zip(ends, mamba.norms, strict=True):
        if norm is not None:
            part = dt_b_c[:, first:end]
            parts.normalize(part, part, norm)
    moves.product(mamba.ssm_dt, dt_b_c[:, : shape.dt_rank], dt)
    kernels.scan(moves.rows, dt, u, dt_b_c, xz, mamba.a, mamba.d, ssm_state, dt)


def _delta_inputs(delta: DeviceDelta, mixed: DeviceArray, moves: Moves) -> DeltaInputs:
    """Gate, beta and steps, where the first products have left them or from what they have left."""
    shape, n = delta.plan.delta, len(mixed)
    at = shape.convolved
    if not shape.key_decays:
        gate_end = at + shape.inner
        beta_end = gate_end + shape.heads
        return DeltaInputs(mixed, mixed[:, at:gate_end], mixed[:, gate_end:beta_end], mixed[:, beta_end:])
    between = columns_of(moves.buffers.between, n, shape.inner * len(delta.inner))
    found = []
    for product in (delta.steps, delta.gate):
        end = at + (shape.inner if product is None else product.columns)
        given, at = mixed[:, at:end], end
        if product is not None:
            target, between = between[:, : shape.inner], between[:, shape.inner :]
            moves.product(product, given, target)
            given = target
        found.append(given)
    steps, gate = found
    return DeltaInputs(mixed, gate, mixed[:, at:], steps)
