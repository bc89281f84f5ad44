"""Runs a recorded program of step kernels from start to end on all threads that join, without returning to Python.

A program is a table of int64 rows; every thread walks through all of them. The items of a row are cut into regions, one
for each thread, and these into chunks. A thread takes the chunks of its region in order, by an atomic counter, so that
it reads memory in order; then it helps with those that are left of the others. So a thread that starts late or is
delayed never blocks the others: they do its share. A row may ask to wait until it and rows before it are complete.
"""

# ruff: noqa: ANN001, ANN201 - the intrinsic's signature is read by numba; its arguments are llvmlite values.
# mypy: disable-error-code="no-untyped-def"

from enum import IntEnum
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu.kernels.emit import I32, I64, Emitter, Value
from engine.cpu.kernels.stepping import emitter, integers

HEADER, ROW = 5, 32
"""int64 numbers before a row's operands (Head), and in a whole row."""


class Head(IntEnum):
    """What a row begins with: its kernel's address, items, chunks of a region, regions, and rows to wait for."""

    KERNEL = 0
    ITEMS = 1
    CHUNKS = 2
    REGIONS = 3
    WAITS = 4


REGIONS = 8
"""Regions of a row at most; more threads than that share them."""

COUNTERS = 8
"""int64 counters per region, a cache line: chunks taken at 0 and chunks done at 1."""

SPINS = 512
"""Times a counter is read before the thread yields the processor: about 10 us on x86-64."""

ARGUMENTS: dict[str, tuple[types.Type, ...]] = {"run_program": (types.int64,) * 7}
"""Argument types of the kernel."""


@intrinsic(prefer_literal=True)
def run_program(typing_context, name, program, n_rows, counters, n_regions, region, scratch, give_way):
    """Executes rows 0..n_rows-1; returns when all chunks of the rows waited for are done.

    counters (n_rows, n_regions, COUNTERS) are zero before the first thread starts; region is where this thread begins;
    scratch is its own memory; give_way is the address of a C function without arguments that yields the processor.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        e = emitter(context, builder)
        _, program, n_rows, counters, n_regions, region, scratch, give_way = arguments
        triple = context.codegen().magic_tuple()[0]
        yielder = builder.inttoptr(give_way, ir.FunctionType(I32, ()).as_pointer())
        line, row_counters = 8 * COUNTERS, builder.mul(n_regions, I64(8 * COUNTERS))
        with cgutils.for_range(builder, n_rows) as rows:
            row = builder.add(program, builder.mul(rows.index, I64(8 * ROW)))
            own = builder.add(counters, builder.mul(rows.index, row_counters))
            head = dict(zip(Head, integers(e, row, HEADER), strict=True))
            first = builder.srem(region, head[Head.REGIONS])
            with cgutils.for_range(builder, head[Head.REGIONS]) as regions:
                number = builder.add(first, regions.index)
                beyond = builder.icmp_signed(">=", number, head[Head.REGIONS])
                number = builder.select(beyond, builder.sub(number, head[Head.REGIONS]), number)
                _work(e, row, head, number, builder.add(own, builder.mul(number, I64(line))), scratch)
            with cgutils.for_range(builder, head[Head.WAITS]) as back:
                earlier = builder.sub(row, builder.mul(back.index, I64(8 * ROW)))
                wanted, active = (e.load(earlier, I64, 8 * place, align=8) for place in (Head.CHUNKS, Head.REGIONS))
                finished = builder.sub(own, builder.mul(back.index, row_counters))
                with cgutils.for_range(builder, active) as regions:
                    place = e.at(builder.add(finished, builder.mul(regions.index, I64(line))), 8)
                    _wait(e, place, wanted, yielder, triple)
        return context.get_dummy_value()

    return types.void(name, *ARGUMENTS["run_program"]), generate


def _work(e: Emitter, row: Value, head: dict[Head, Value], region: Value, counters: Value, scratch: Value) -> None:
    """Takes chunks of a region until none is left."""
    builder = e.builder
    n_chunks, n_items = head[Head.CHUNKS], head[Head.ITEMS]
    all_chunks, before = builder.mul(head[Head.REGIONS], n_chunks), builder.mul(region, n_chunks)
    function = builder.inttoptr(head[Head.KERNEL], ir.FunctionType(ir.VoidType(), (I64,) * 4).as_pointer())
    look, take, work, done = (builder.append_basic_block(name) for name in ("look", "take", "work", "done"))
    builder.branch(look)
    builder.position_at_end(look)  # without writing: where nothing is left, the others' caches keep the line
    taken = builder.load_atomic(e.pointer(counters, I64), "monotonic", 8)
    builder.cbranch(builder.icmp_signed("<", taken, n_chunks), take, done)
    builder.position_at_end(take)
    chunk = builder.atomic_rmw("add", e.pointer(counters, I64), I64(1), "seq_cst")
    builder.cbranch(builder.icmp_signed("<", chunk, n_chunks), work, done)
    builder.position_at_end(work)
    number = builder.add(before, chunk)
    low = builder.sdiv(builder.mul(number, n_items), all_chunks)
    high = builder.sdiv(builder.mul(builder.add(number, I64(1)), n_items), all_chunks)
    builder.call(function, (e.at(row, 8 * HEADER), low, high, scratch))
    builder.atomic_rmw("add", e.pointer(e.at(counters, 8), I64), I64(1), "seq_cst")
    builder.branch(look)
    builder.position_at_end(done)


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
