"""Launcher of the quantized matrix-vector kernel (matvec.cu): products of few sequences.

Letters: B sequences, K columns (inputs), N rows (outputs). One launch multiplies a group of matrices with the same
input, of any mix of types: q, k and v; gate and up; one output projection; the head. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import Kernel, build, device_arch
from engine.cuda.driver.launch import launch
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.linear import MatrixGroup
from engine.cuda.matrix.matvec_plan import (
    SLAB,
    Block,
    Tuning,
    kernel_job,
    most_sequences,
    operand_block,
    operand_bytes,
    operand_job,
    runs,
    sequence_groups,
    turns,
)
from engine.cuda.rows.activation import KernelActivation


@cache
def multiprocessor_count(device: int) -> int:
    """Multiprocessors of a card."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


class MatVec(MatrixGroup):
    """out = f(alpha * (norm(x) @ W.T + bias)), or out += ..., for a group of matrices W on the current device.

    Bits of a sequence's result do not depend on the other sequences, on B, or on the run.

    Args:
        matrices: see MatrixGroup.
        tuning: shape of the blocks; chosen for the card when left out.
    """

    def __init__(self, matrices: Sequence[PackedMatrix], *, tuning: Tuning | None = None) -> None:
        import cupy

        super().__init__(matrices)
        self._card = device_arch(), multiprocessor_count(cupy.cuda.Device().id)
        self._tuning = tuning
        self._kernels: dict[tuple[object, ...], tuple[Kernel, Block]] = {}
        self._operand_blocks: dict[int, Block | None] = {}
        self._segments: list[Argument] = []
        tile, column = 0, 0
        for matrix in matrices:
            tile += matrix.tiles
            self._segments += [matrix.data, matrix.scale, tile, matrix.rows, column]
            column += matrix.rows
        self._tiles = tile
        self._unit = 256 if self.columns % 256 == 0 else 128
        left = iter(self.matrices)
        types = [matrix.type for matrix in self.matrices]
        sizes = runs(types)
        # Each run of quantized or unquantized matrices has its own launch.
        self._parts = [MatVec(list(islice(left, n)), tuning=tuning) for n in sizes] if len(sizes) > 1 else []
        self._most = 0 if self._parts else most_sequences(types, tile, self.columns, self._card)

    def prepare(self, batch: int, activation: KernelActivation = KernelActivation.NONE) -> None:
        """Builds and loads the kernels of a batch size and activation."""
        for part in self._parts:
            part.prepare(batch, activation)
        if not self._parts:
            self._kernel(min(batch, self._most), activation)

    def _kernel(self, batch: int, activation: KernelActivation, operand: Block | None = None) -> tuple[Kernel, Block]:
        key = (*sequence_groups(batch), activation, operand is not None)
        found = self._kernels.get(key)
        if found is None:
            (files, defines), block = kernel_job(
                [m.type for m in self.matrices],
                self._tiles,
                self.columns,
                batch,
                self._card,
                tuning=self._tuning,
                paired=self.paired,
                activation=activation,
                operand=operand,
            )
            found = self._kernels[key] = (build(files, defines=defines).get("matvec"), block)
        return found

    def _operand_block(self, batch: int) -> Block | None:
        if batch not in self._operand_blocks:
            types = [m.type for m in self.matrices]
            self._operand_blocks[batch] = operand_block(types, self._tiles, self.columns, batch, self._card)
        return self._operand_blocks[batch]

    def __call__(
        self,
        x: DeviceArray,
        out: DeviceArray,
        *,
        norm: DeviceArray | None = None,
        eps: float = 0.0,
        bias: DeviceArray | None = None,
        activation: KernelActivation = KernelActivation.NONE,
        add: bool = False,
        alpha: float = 1.0,
        operand: DeviceArray | None = None,
        stream: Stream | None = None,
        pdl: bool = True,
    ) -> None:
        """Launches the product for B sequences, up to 8 at a time.

        Args:
            x: float32 (B, K), rows contiguous.
            out: float32 (B, >= width), rows contiguous; must not overlap x.
            norm: float32 (K,) weight of an RMSNorm (Zhang and Sennrich 2019) over K applied to x first; None for none.
            eps: the norm's epsilon.
            bias: float32 (width,), added to the product, in the order of the outputs; not with a paired matrix.
            activation: see KernelActivation.
            add: add to out instead of overwriting it (the residual stream); not with an activation.
            alpha: factor of product + bias, before the activation.
            operand: uint8 scratch memory, at least operand_bytes(K), 128-byte aligned, of this stream alone: there the
                input of a few sequences is converted once, instead of by every block (operand_block()).
            stream: a CuPy stream, may be under capture; the current one when left out.
            pdl: start early (programmatic dependent launch): weights are fetched before the previous kernel ends.
        """
        n = int(x.shape[0])
        assert x.shape[1] == self.columns
        assert out.shape[0] >= n
        assert out.shape[1] >= self.width
        assert x.strides[1] == out.strides[1] == 4
        column = 0
        for part in self._parts:
            end = column + part.width
            part(
                x,
                out[:, column:end],
                norm=norm,
                eps=eps,
                bias=None if bias is None else bias[column:end],
                activation=activation,
                add=add,
                alpha=alpha,
                operand=operand,
                stream=stream,
                pdl=pdl,
            )
            column = end
        if self._parts:
            return
        first = 0
        for batch in turns(n, self._most):
            rows = x[first:] if first else x
            block = None if operand is None or self._tuning is not None else self._operand_block(batch)
            if block is not None:
                assert operand is not None and operand.nbytes >= operand_bytes(self.columns)
                split = block.tuning.split
                launch(
                    build(operand_job()[0]).get("matvec_operand"),
                    (4 * split, 1 if norm is not None else -(-self.columns // SLAB)),
                    128,
                    (rows, x.strides[0] // 4, norm, self.columns, self._unit, split, batch, operand),
                    stream=stream,
                    pdl=pdl,
                )
                rows = operand
            self._launch(
                *self._kernel(batch, activation, block),
                batch,
                (
                    rows,
                    x.strides[0] // 4,
                    norm,
                    float(eps),
                    bias,
                    out[first:] if first else out,
                    out.strides[0] // 4,
                    int(add),
                    float(alpha),
                ),
                stream,
                pdl,
            )
            first += batch

    def _launch(
        self, kernel: Kernel, block: Block, batch: int, args: tuple[Argument, ...], stream: Stream | None, pdl: bool
    ) -> None:
        launch(
            kernel,
            min(self._card[1], self._tiles),
            block.tuning.warps * 32,
            (*self._segments, self._tiles, self.columns, self._unit, batch, *args, 1.0 / self.columns),
            shared=block.shared_bytes,
            stream=stream,
            pdl=pdl,
        )
