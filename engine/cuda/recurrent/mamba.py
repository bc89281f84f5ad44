"""Launcher of the selective scan of Mamba layers. It is the kernels' contract.

Letters: T rows of a batch, E inner width, N states of a channel, Z rows of states. Source: Gu and Dao, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2.

Every array is a C-contiguous float32 CuPy array unless said otherwise. How rows find their states, rows.py says.
This module must not know of tokenizers, requests or layers.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.convolution import Convolution
from engine.cuda.recurrent.mamba_plan import THREADS, MambaShape
from engine.cuda.recurrent.rows import DecodeRows, Rows

_BLOCKS = 12
"""Blocks of scan_decode that registers leave room for on a multiprocessor; more rows than that give take turns."""


class Mamba:
    """The kernels of one shape of Mamba layers on the current device.

    Args:
        shape: widths.
        most_rows: blocks of scan_decode side by side for a channel; more rows take turns. Chosen when left out.

    Attributes:
        convolve: the convolution: (rows, xz (T, 2 * E), weight, bias, conv_state, out (T, E)).
    """

    def __init__(self, shape: MambaShape, *, most_rows: int | None = None) -> None:
        self.shape = shape
        self.convolve = Convolution(shape.conv)
        files, defines = shape.build_jobs()[-1]
        scan = build(files, defines=defines)
        self._decode, self._prompt = scan.get("scan_decode"), scan.get("scan_prompt")
        self._blocks = -(-shape.d_inner // shape.channels)
        if most_rows is None:
            import cupy

            multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
            most_rows = max(1, _BLOCKS * multiprocessors // self._blocks)
        self._most_rows = most_rows

    def scan(
        self,
        rows: Rows,
        dt: DeviceArray,
        x: DeviceArray,
        bc: DeviceArray,
        xz: DeviceArray,
        a: DeviceArray,
        d: DeviceArray,
        ssm_state: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (T, E) = (C . h + d * x) * silu(z) behind h = exp(softplus(dt) * a) * h + softplus(dt) * x * B.

        Prompts go token after token within each span. Rows that the step does not name stay as they are.

        Args:
            rows: of the step.
            dt: (T, E), the product of ssm_dt with its bias.
            x: (T, E), what the convolution gave.
            bc: (T, dt_rank + 2 * N): the product of ssm_x; B and C are read.
            xz: (T, 2 * E): x and z, the product of ssm_in; z is read.
            a: (E, N).
            d: (E,).
            ssm_state: (Z, E, N).
            out: (T, E); may be dt, else apart from the inputs.
            stream: the current stream when left out.

        Decode kernels read states before their wait; see Convolution.
        """
        shape = self.shape
        assert xz.shape[1] == 2 * shape.d_inner and out.shape[1] == shape.d_inner, (xz.shape, out.shape)
        assert dt.shape[1] == x.shape[1] == d.size == shape.d_inner and a.shape == (shape.d_inner, shape.d_state)
        assert bc.shape[1] == shape.row_width and ssm_state.shape[1:] == shape.state_shapes[1]
        assert all(array.flags.c_contiguous for array in (dt, x, bc, xz, out, ssm_state))
        inputs = dt, x, bc[:, shape.dt_rank :], shape.row_width, xz, a, d, ssm_state
        if isinstance(rows, DecodeRows):
            n = rows.count
            assert min(len(xz), len(out)) >= n and rows.fit(ssm_state)
            args: tuple[Argument, ...] = (*inputs, rows.places, rows.positions, rows.offsets, n, out, shape.d_inner)
            launch(self._decode, (self._blocks, min(n, self._most_rows)), THREADS, args, stream=stream)
        elif len(rows.spans):
            args = (*inputs, rows.spans, out, shape.d_inner)
            launch(self._prompt, (self._blocks, len(rows.spans)), THREADS, args, stream=stream)
