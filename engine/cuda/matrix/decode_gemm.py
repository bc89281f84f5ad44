"""Launcher of the products of many sequences (decode_gemm.cu): packed weights, read once for up to 64 rows.

Letters: B sequences, K columns (inputs), N rows (outputs). Needs a Hopper GPU (wgmma). The contract of the results is
matvec.MatVec's; this family has float16 inputs (times a power of two per sequence) and sums in float32. Bits of a
sequence's result do not depend on the other sequences, on B, or on the run. Must not know of models.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.cuda.driver.arrays import Argument, DeviceArray, Stream
from engine.cuda.driver.compiler import Kernel, build
from engine.cuda.driver.launch import launch
from engine.cuda.formats.repack import PackedMatrix
from engine.cuda.matrix.decode_gemm_plan import (
    CHUNK,
    FEW_ROWS,
    MAX_ROWS,
    UNIT_TILES,
    BlockMemory,
    Cut,
    block_memory,
    emits,
    emits_halves,
    group_cut,
    groups_of_eight,
    kernel_job,
    operand_job,
)


class DecodeGemm:
    """out = f(alpha * (norm(x) @ W.T + bias)), or out += ..., for matrices W that share their input.

    Args:
        matrices: 1 to 4 packed matrices of supported() types; a paired one must be alone.
        multiprocessors: of the card.
        cut: for experiments; chosen by the matrices when left out.
    """

    def __init__(self, matrices: Sequence[PackedMatrix], multiprocessors: int, cut: Cut | None = None) -> None:
        self._types = [m.type for m in matrices]
        self._rows = [m.rows for m in matrices]
        self._columns = matrices[0].columns
        self._paired = matrices[0].paired
        self._multiprocessors = multiprocessors
        shapes = [(m.type, m.rows) for m in matrices]
        self.cut = cut or group_cut(shapes, self._columns, multiprocessors, paired=self._paired)
        self._kernels: dict[tuple[int, int, int, bool], tuple[Kernel, int, BlockMemory]] = {}
        self._segments: list[Argument] = []
        unit, column = 0, 0
        for matrix in matrices:
            unit += -(-matrix.tiles // UNIT_TILES)
            self._segments += [matrix.data, matrix.scale, unit, matrix.tiles, matrix.rows, column]
            column += matrix.rows
        self._units = unit

    @property
    def emits(self) -> bool:
        """See decode_gemm_plan.emits."""
        return emits(self._types, self.cut, paired=self._paired)

    @property
    def emits_halves(self) -> bool:
        """See decode_gemm_plan.emits_halves."""
        return emits_halves(self._types, self._rows[0], self.cut, self._multiprocessors, paired=self._paired)

    def prepare(self, batch: int, activation: int = 0) -> None:
        """Builds and loads the kernels of a batch size and activation."""
        self._kernel(min(batch, MAX_ROWS), activation, ready=False)
        build(operand_job()[0]).get("batch_operand")

    def _kernel(
        self, batch: int, activation: int, *, ready: bool, halves: bool = False
    ) -> tuple[Kernel, int, BlockMemory]:
        memory = block_memory(self._types, self.cut, batch, self._columns, ready=ready)
        key = (groups_of_eight(batch), memory.resident, activation, halves)
        found = self._kernels.get(key)
        if found is None:
            files, defines = kernel_job(
                self._types,
                self.cut,
                self._columns,
                batch,
                paired=self._paired,
                activation=activation,
                ready=ready,
                halves=halves,
            )
            threads = int(str(defines["TILES"])) * 32 + int(str(defines["FETCHERS"]))
            found = self._kernels[key] = (build(files, defines=defines).get("batch_matvec"), threads, memory)
        return found

    def __call__(
        self,
        x: DeviceArray,
        out: DeviceArray,
        operand: DeviceArray,
        *,
        norm: DeviceArray | None = None,
        eps: float = 0.0,
        bias: DeviceArray | None = None,
        activation: int = 0,
        add: bool = False,
        alpha: float = 1.0,
        ready: bool = False,
        emitted: tuple[DeviceArray | None, DeviceArray | None] | None = None,
        halves: tuple[DeviceArray, DeviceArray] | None = None,
        stream: Stream | None = None,
        pdl: bool = True,
    ) -> None:
        """Launches the product for B sequences, up to 64 at a time.

        Args:
            x: float32 (B, K), rows contiguous.
            out: float32 (B, >= N), rows contiguous; must not overlap x.
            operand: uint8 scratch memory, at least operand_bytes(K), 128-byte aligned, of this stream alone.
            norm: float32 (K,) weight of an RMSNorm of x; None for none.
            eps: the norm's epsilon.
            bias: float32 (N,); not with a paired matrix.
            activation: KernelActivation.
            add: add to out; not with an activation.
            alpha: factor of product + bias.
            ready: operand holds norm(x) already, left by an earlier product; more than FEW_ROWS, up to 64.
            emitted: weight of the norm that comes next, or None, and other memory of operand_bytes(N): there the
                outputs are left as an operand as well. Where emits, likewise.
            halves: other memory of operand_bytes(N), where the outputs are left as an operand as well, and int32 words,
                word_count(N) zeros, which are zeros again behind the launch. Where emits_halves, likewise; of what is
                left, the sums of squares hold no values, as no norm may follow.
            stream: a CuPy stream, may be under capture; the current one when left out.
            pdl: start early (programmatic dependent launch).
        """
        chunks = -(-self._columns // CHUNK)
        prepare = build(operand_job()[0]).get("batch_operand")
        handed = ready or emitted is not None or halves is not None
        assert not handed or FEW_ROWS < int(x.shape[0]) <= MAX_ROWS
        norm_of_emitted, emitted_operand = emitted or (None, None)
        words: tuple[DeviceArray, ...] = ()
        if halves is not None:
            assert emitted is None and self.emits_halves
            emitted_operand, words = halves[0], halves[1:]
        for first in range(0, int(x.shape[0]), MAX_ROWS):
            batch = min(MAX_ROWS, int(x.shape[0]) - first)
            rows, target = (x[first:], out[first:]) if first else (x, out)
            groups = groups_of_eight(batch)
            kernel, threads, memory = self._kernel(batch, activation, ready=ready, halves=halves is not None)
            blocks = -(-self._units * UNIT_TILES // self.cut.tiles_of_block(groups_of_eight(batch)))
            if self.cut.cluster > 1:
                grid = blocks * self.cut.cluster
            else:  # as many as stay busy to the last turn
                grid = -(-blocks // -(-blocks // self._multiprocessors))
            if not memory.resident and not ready:
                launch(
                    prepare,
                    (chunks, -(-batch // 8)),
                    256,
                    (rows, x.strides[0] // 4, norm, self._columns, batch, groups, operand),
                    stream=stream,
                    pdl=pdl,
                )
            launch(
                kernel,
                grid,
                threads,
                (
                    *self._segments,
                    self._units,
                    blocks,
                    self._columns,
                    batch,
                    rows,
                    x.strides[0] // 4,
                    norm,
                    float(eps),
                    operand,
                    bias,
                    target,
                    out.strides[0] // 4,
                    int(add),
                    float(alpha),
                    norm_of_emitted,
                    emitted_operand,
                    *words,
                ),
                shared=memory.total,
                stream=stream,
                pdl=pdl,
            )
