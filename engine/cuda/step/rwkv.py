"""RWKV's layers between their norms and the stream: products, the shift of tokens, states. Letters: T rows, D width.

Must not know of requests.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from engine.cuda.driver.arrays import DeviceArray
from engine.cuda.launch_plan.parts.rwkv import row_width
from engine.cuda.load.device_recurrent import DeviceChannelMix, DeviceRwkv6, DeviceRwkv7
from engine.cuda.recurrent.rwkv.rwkv_6 import Rwkv6, Rwkv6Inputs
from engine.cuda.recurrent.rwkv.rwkv_7 import Rwkv7, Rwkv7Inputs
from engine.cuda.recurrent.rwkv.token_shift import shift, shift_further, squash
from engine.cuda.rows import parts
from engine.cuda.rows import rows as row_ops
from engine.cuda.rows.activation import KernelActivation
from engine.cuda.step.folding import columns_of
from engine.cuda.step.moves import Moves

States = tuple[DeviceArray, DeviceArray]
"""The last inputs, and the memories."""


def mix_time_6(
    mixer: DeviceRwkv6,
    kernels: Rwkv6,
    x: DeviceArray,
    states: States,
    out: DeviceArray,
    moves: Moves,
    chunked: DeviceArray | None,
) -> None:
    """out (T, D): time mixing of version 6 of normed inputs x (T, D), without the last product; chunked: see Rwkv6."""
    row, product = _split(moves, len(x), mixer.plan.columns), moves.product
    inputs, mix, low = row["inputs"], row["mix"], row["low"]
    xw, xk, xv, xr, xg = every = _equal(inputs, len(mixer.mix_b))
    shift(moves.rows, x, mixer.lerp_x, states[0], xw, change=row["change"])
    product(mixer.mix_a, xw, mix)
    squash(mix, int(mix.shape[1]))
    for mix_b, source, target in zip(mixer.mix_b, _equal(mix, len(every)), every, strict=True):
        product(mix_b, source, target)
    shift_further(x, row["change"], mixer.lerp, inputs)
    product(mixer.receptance, xr, row["r"])
    product(mixer.key, xk, row["k"])
    product(mixer.value, xv, row["v"])
    product(mixer.gate, xg, row["gate"])
    product(mixer.decay_a, xw, low)
    squash(low, int(low.shape[1]))
    product(mixer.decay_b, low, row["w"])
    given = Rwkv6Inputs(row["r"], row["w"], row["k"], row["v"], row["gate"])
    kernels(moves.rows, given, mixer.kept, states[1], out, chunked=chunked)


def mix_time_7(
    mixer: DeviceRwkv7,
    kernels: Rwkv7,
    x: DeviceArray,
    states: States,
    out: DeviceArray,
    moves: Moves,
    chunked: DeviceArray | None,
) -> None:
    """The same of version 7. The first layer's values are left in Activations.kept, where later layers read them."""
    plan, product = mixer.plan, moves.product
    row = _split(moves, len(x), plan.columns)
    shift(moves.rows, x, mixer.lerp, states[0], row["inputs"])
    mixed = dict(zip(plan.mixed, _equal(row["inputs"], len(plan.mixed)), strict=True))
    for name, projection in (("r", mixer.receptance), ("k", mixer.key), ("v", mixer.value)):
        product(projection, mixed[name], row[name])
    pairs = {"w": mixer.decay, "g": mixer.gate, "a": mixer.rate, "v": mixer.first_value}
    low_rank = {name: one for name, one in pairs.items() if one is not None}
    low = _split_row(row["low"], {name: one.a.width for name, one in low_rank.items()})
    for name, one in low_rank.items():
        product(one.a, mixed[name], low[name])
    tanhs, sigmoids = mixer.decay.a.width, 0 if mixer.gate is None else mixer.gate.a.width
    squash(row["low"][:, : tanhs + sigmoids], tanhs)
    targets = {"w": "w", "g": "gate", "a": "a", "v": "f"}
    for name, one in low_rank.items():
        product(one.b, low[name], row[targets[name]])
    f, gate = None if mixer.first_value is None else row["f"], None if mixer.gate is None else row["gate"]
    given = Rwkv7Inputs(row["r"], row["w"], row["k"], row["v"], row["a"], f, gate, row["u"])
    first = columns_of(moves.buffers.kept, len(x), int(x.shape[1]))
    kernels(moves.rows, given, mixer.kept, first, states[1], out, chunked=chunked)


def mix_channels(mixer: DeviceChannelMix, x: DeviceArray, state: DeviceArray, out: DeviceArray, moves: Moves) -> None:
    """out (T, D) += channel mixing of normed inputs x (T, D), contiguous; keeps the last of them in the state."""
    n, width = x.shape
    row = _split(moves, n, {"inputs": len(mixer.lerps) * width, "receptance": width})
    inputs = _equal(row["inputs"], len(mixer.lerps))
    shift(moves.rows, x, mixer.lerps, state, row["inputs"])
    h = columns_of(moves.buffers.gate, n, mixer.key.width)
    moves.product(mixer.key, inputs[0], h)
    row_ops.gate(h, None, KernelActivation.RELU_SQUARED)
    if mixer.receptance is None:
        moves.product(mixer.value, h, out, add=True)
        return
    part = columns_of(moves.buffers.scanned, n, width)
    moves.product(mixer.value, h, part)
    moves.product(mixer.receptance, inputs[1], row["receptance"])
    parts.multiply_gate(part, row["receptance"])
    row_ops.add_scaled(out, part, None, 0)


def _split(moves: Moves, n: int, widths: dict[str, int]) -> dict[str, DeviceArray]:
    """Parts of Activations.between, which is taken as rows of all of them."""
    return _split_row(columns_of(moves.buffers.between, n, row_width(widths.values())), widths)


def _split_row(x: DeviceArray, widths: dict[str, int]) -> dict[str, DeviceArray]:
    """Neighbouring columns of x (T, .), (T, width) each."""
    ends = accumulate(widths.values(), initial=0)
    return {name: x[:, first:end] for name, (first, end) in zip(widths, pairwise(ends), strict=True)}


def _equal(x: DeviceArray, count: int) -> list[DeviceArray]:
    """(T, count * N) as `count` times (T, N)."""
    width = int(x.shape[1]) // count
    return [x[:, i * width : (i + 1) * width] for i in range(count)]
