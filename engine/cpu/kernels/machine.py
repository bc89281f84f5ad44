"""Runs a recorded program of step kernels from start to end on all threads that join, without returning to Python.

A program is a table of int64 rows; every thread walks through all of them. The items of a row are cut into chunks that
threads take by an atomic counter, so a thread that starts late or is delayed never blocks the others: they do its
share. A row may ask to wait until it and rows before it are complete.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsic's signature is read by numba; its arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import I32, I64, Emitter, Value
from engine.cpu.kernels.stepping import emitter, integers

HEADER, ROW = 4, 24
"""int64 numbers before a row's operands (kernel address, items, chunks, rows to wait for), and in a whole row."""

COUNTERS = 16
"""int64 counters per row: chunks taken at 0 and chunks done at 8, each on a cache line of its own."""

SPINS = 512
"""Times a counter is read before the thread yields the processor: about 10 us on x86-64."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"run_program": (types.int64,) * 5}
"""Argument types of the kernel."""


@intrinsic(prefer_literal=True)
def run_program(typing_context, name, program, n_rows, counters, scratch, give_way):
    """Executes rows 0..n_rows-1; returns when all chunks of the rows waited for are done.

    counters are zero before the first thread starts; scratch is this thread's own memory; give_way is the address of a
    C function without arguments that yields the processor.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, program, n_rows, counters, scratch, give_way = arguments
        kernel = ir.FunctionType(ir.VoidType(), (I64,) * 4).as_pointer()
        yielder = builder.inttoptr(give_way, ir.FunctionType(I32, ()).as_pointer())
        with cgutils.for_range(builder, n_rows) as rows:
            row = builder.add(program, builder.mul(rows.index, I64(8 * ROW)))
            taken = builder.add(counters, builder.mul(rows.index, I64(8 * COUNTERS)))
            address, n_items, n_chunks, waits = integers(e, row, HEADER)
            operands = e.at(row, 8 * HEADER)
            function = builder.inttoptr(address, kernel)

            take, work, done = (builder.append_basic_block(name) for name in ("take", "work", "done"))
            builder.branch(take)
            builder.position_at_end(take)
            chunk = builder.atomic_rmw("add", e.pointer(taken, I64), I64(1), "seq_cst")
            builder.cbranch(builder.icmp_signed("<", chunk, n_chunks), work, done)
            builder.position_at_end(work)
            low = builder.sdiv(builder.mul(chunk, n_items), n_chunks)
            high = builder.sdiv(builder.mul(builder.add(chunk, I64(1)), n_items), n_chunks)
            builder.call(function, (operands, low, high, scratch))
            builder.atomic_rmw("add", e.pointer(e.at(taken, 64), I64), I64(1), "seq_cst")
            builder.branch(take)
            builder.position_at_end(done)

            with cgutils.for_range(builder, waits) as back:
                earlier = builder.sub(row, builder.mul(back.index, I64(8 * ROW)))
                wanted = e.load(earlier, I64, 16, align=8)
                finished = builder.sub(e.at(taken, 64), builder.mul(back.index, I64(8 * COUNTERS)))
                _wait(e, finished, wanted, yielder, context.codegen().magic_tuple()[0])
        return context.get_dummy_value()

    return types.void(name, *ARGUMENTS["run_program"]), generate


def _wait(e: Emitter, counter: Value, wanted: Value, yielder: Value, triple: str) -> None:
    """Goes on when the counter has reached `wanted`."""
    builder = e.builder
    spins = cgutils.alloca_once_value(builder, I64(0))
    look, spin, offer, reached = (builder.append_basic_block(name) for name in ("look", "spin", "offer", "reached"))
    builder.branch(look)
    builder.position_at_end(look)
    value = builder.load_atomic(e.pointer(counter, I64), "acquire", 8)
    builder.cbranch(builder.icmp_signed(">=", value, wanted), reached, spin)
    builder.position_at_end(spin)
    _pause(builder, triple)
    count = builder.add(builder.load(spins), I64(1))
    builder.store(count, spins)
    builder.cbranch(builder.icmp_signed(">", count, I64(SPINS)), offer, look)
    builder.position_at_end(offer)
    builder.call(yielder, ())
    builder.branch(look)
    builder.position_at_end(reached)


def _pause(builder: Any, triple: str) -> None:
    """The instruction that marks a loop which waits, on processors that have one."""
    if not triple.startswith("x86_64"):
        return
    name = "llvm.x86.sse2.pause"
    function = builder.module.globals.get(name)
    builder.call(function or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), ()), name), ())
