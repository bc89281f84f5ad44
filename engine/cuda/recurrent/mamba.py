"""Launchers of the convolution and the selective scan of Mamba layers. They are the kernels' contracts.

Letters: T rows of a batch (B of a decode step, where row b is slot b), E inner width, N states of a channel, W width of
the convolution, Z rows of states, R places of a slot's ring, S spans of a prompt batch. Source: Gu and Dao, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2.

Every array is a C-contiguous float32 CuPy array unless said otherwise. Buffers shared by the calls:
    xz           (T, 2 * E): x and z, the product of ssm_in
    conv_state   (Z, E, W - 1): of each state, the last inputs of each channel, oldest first
    ssm_state    (Z, E, N); a slot's ring is the rows slot * R to slot * R + R - 1 of both
    positions    int32 (B,): position of each slot's token, -1 for a padded row (nothing read, nothing written)
    offsets      int32 (slots,): the state behind the token at a position is kept at place (position + offset) mod R
A decoded token reads the place in front of its own and writes its own; at position 0 it starts from zero. So a step
that is run again gives the same bits, and they depend neither on other rows nor on how a prompt is cut.
This module must not know of tokenizers, requests or layers.
"""

from __future__ import annotations

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import build
from engine.cuda.driver.launch import launch
from engine.cuda.recurrent.mamba_plan import THREADS, MambaShape, build_jobs

_BLOCKS = 12
"""Blocks of scan_decode that registers leave room for on a multiprocessor; more rows than that give take turns."""


class Mamba:
    """The kernels of one shape of Mamba layers on the current device.

    Args:
        shape: widths.
        places: R, at least 2: a state is never written where it is read.
    """

    def __init__(self, shape: MambaShape, places: int) -> None:
        import cupy

        assert places >= 2
        self.shape = shape
        self.places = places
        conv, scan = (build(files, defines=defines) for files, defines in build_jobs(shape))
        self._conv_decode, self._conv_prompt = conv.get("conv_decode"), conv.get("conv_prompt")
        self._scan_decode, self._scan_prompt = scan.get("scan_decode"), scan.get("scan_prompt")
        self._conv_blocks = -(-shape.d_inner // (THREADS * shape.wide))
        self._scan_blocks = -(-shape.d_inner // shape.channels)
        multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self._most_rows = max(1, _BLOCKS * multiprocessors // self._scan_blocks)

    def conv_decode(
        self,
        xz: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        conv_state: DeviceArray,
        positions: DeviceArray,
        offsets: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (B, E) = silu(bias + convolution of each slot's last W inputs), B = positions.size; keeps the last W - 1.

        Args:
            xz: see the module.
            weight: (E, W), the newest input's last.
            bias: (E,).
            conv_state: see the module.
            positions: likewise.
            offsets: likewise.
            out: rows with positions[b] >= 0 are written.
            stream: the current stream when left out.

        Started early (programmatic dependent launch): positions, offsets and states are read before the wait, so the
        first kernel of a step must not be launched early. The same holds for scan_decode.
        """
        n = int(positions.size)
        self._check(xz, out, n)
        self._check_state(conv_state, self.shape.d_conv - 1)
        assert n <= offsets.size and offsets.size * self.places <= len(conv_state)
        args = (xz, weight, bias, conv_state, self.places, positions, offsets, out, self.shape.d_inner)
        launch(self._conv_decode, (self._conv_blocks, n), THREADS, args, stream=stream)

    def scan_decode(
        self,
        dt: DeviceArray,
        x: DeviceArray,
        bc: DeviceArray,
        xz: DeviceArray,
        a: DeviceArray,
        d: DeviceArray,
        ssm_state: DeviceArray,
        positions: DeviceArray,
        offsets: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (B, E) = (C . h + d * x) * silu(z) behind h = exp(softplus(dt) * a) * h + softplus(dt) * x * B.

        Args:
            dt: (B, E), the product of ssm_dt with its bias.
            x: (B, E), what conv_decode wrote.
            bc: (B, dt_rank + 2 * N), rows contiguous: the product of ssm_x; B and C are read.
            xz: see the module; z is read.
            a: (E, N).
            d: (E,).
            ssm_state: see the module.
            positions: likewise.
            offsets: likewise.
            out: rows with positions[b] >= 0 are written; may be dt, else apart from the inputs.
            stream: the current stream when left out.
        """
        n = int(positions.size)
        self._check(xz, out, n)
        self._check_state(ssm_state, self.shape.d_state)
        assert n <= offsets.size and offsets.size * self.places <= len(ssm_state)
        inputs = self._inputs(dt, x, bc, xz, a, d)
        args = (*inputs, ssm_state, self.places, positions, offsets, n, out, self.shape.d_inner)
        launch(self._scan_decode, (self._scan_blocks, min(n, self._most_rows)), THREADS, args, stream=stream)

    def conv_prompt(
        self,
        xz: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        conv_state: DeviceArray,
        spans: DeviceArray,
        tiles: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """out (T, E) = silu(bias + convolution), row after row of each span; keeps the last W - 1 inputs of each.

        Args:
            xz: see the module.
            weight: as in conv_decode.
            bias: likewise.
            conv_state: see the module.
            spans: int32 (S, 5) on the device, from span_table.
            tiles: int32 (n_tiles, 2) on the device, from conv_tiles; n_tiles 0 does nothing.
            out: rows that no span names stay as they are.
            stream: the current stream when left out.
        """
        self._check(xz, out, 0)
        self._check_state(conv_state, self.shape.d_conv - 1)
        if len(tiles) == 0:
            return
        args = (xz, weight, bias, conv_state, spans, tiles, out, self.shape.d_inner)
        launch(self._conv_prompt, (self._conv_blocks, len(tiles)), THREADS, args, stream=stream)

    def scan_prompt(
        self,
        dt: DeviceArray,
        x: DeviceArray,
        bc: DeviceArray,
        xz: DeviceArray,
        a: DeviceArray,
        d: DeviceArray,
        ssm_state: DeviceArray,
        spans: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream | None = None,
    ) -> None:
        """As scan_decode for T rows of prompts, token after token within each span.

        Args:
            dt: (T, E).
            x: (T, E).
            bc: (T, dt_rank + 2 * N).
            xz: (T, 2 * E).
            a: as in scan_decode.
            d: likewise.
            ssm_state: see the module.
            spans: int32 (S, 5) on the device, from span_table; S 0 does nothing.
            out: (T, E); rows that no span names stay as they are. It may be dt, else apart from the inputs.
            stream: the current stream when left out.
        """
        self._check(xz, out, 0)
        self._check_state(ssm_state, self.shape.d_state)
        if len(spans) == 0:
            return
        inputs = self._inputs(dt, x, bc, xz, a, d)
        args = (*inputs, ssm_state, spans, out, self.shape.d_inner)
        launch(self._scan_prompt, (self._scan_blocks, len(spans)), THREADS, args, stream=stream)

    def _check(self, xz: DeviceArray, out: DeviceArray, n: int) -> None:
        width = self.shape.d_inner
        assert xz.shape[1] == 2 * width and out.shape[1] == width and min(len(xz), len(out)) >= n, (xz.shape, out.shape)
        assert xz.flags.c_contiguous and out.flags.c_contiguous

    def _check_state(self, state: DeviceArray, each: int) -> None:
        assert state.shape[1:] == (self.shape.d_inner, each), state.shape
        assert state.flags.c_contiguous

    def _inputs(
        self, dt: DeviceArray, x: DeviceArray, bc: DeviceArray, xz: DeviceArray, a: DeviceArray, d: DeviceArray
    ) -> tuple[Argument, ...]:
        shape = self.shape
        assert dt.shape[1] == x.shape[1] == d.size == shape.d_inner and a.shape == (shape.d_inner, shape.d_state)
        assert bc.shape[1] == shape.row_width and all(array.flags.c_contiguous for array in (dt, x, bc))
        return dt, x, bc[:, shape.dt_rank :], shape.row_width, xz, a, d
