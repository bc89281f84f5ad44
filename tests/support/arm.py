"""Kernels for 64-bit ARM, run by QEMU's user mode: compiled here, linked with their operands into a program.

The program has the arrays that a kernel reads and writes as data, calls it once and prints the result. Needs Debian's
binutils-aarch64-linux-gnu and qemu-user-static.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass

import llvmlite.binding as llvm
import numpy as np

TRIPLE = "aarch64-unknown-linux-gnu"
ASSEMBLER, LINKER, EMULATOR = "aarch64-linux-gnu-as", "aarch64-linux-gnu-ld", "qemu-aarch64-static"

PRESENT = all(shutil.which(program) for program in (ASSEMBLER, LINKER, EMULATOR))

# Numba's functions take places for a result and an exception first. System call 64 writes, 93 ends the program.
PROGRAM = """
    .text
    .globl _start
_start:
    sub sp, sp, #16
    mov x0, sp
    mov x1, sp
    ldr x2, =operands
    mov x3, #0
    ldr x4, ={items}
    mov x5, #0
    bl kernel
    ldr x19, ={result}
    ldr x20, ={size}
more:
    mov x0, #1
    mov x1, x19
    mov x2, x20
    mov x8, #64
    svc #0
    add x19, x19, x0
    subs x20, x20, x0
    b.gt more
    mov x0, #0
    mov x8, #93
    svc #0
    .data
    .balign 64
operands:
    .quad {operands}
"""


@dataclass(frozen=True)
class Processor:
    """What LLVM compiles for, and what QEMU then emulates, without any other instructions."""

    features: str
    emulated: str


PROCESSORS = {
    "portable": Processor("+neon", "cortex-a53"),
    "neon": Processor("+neon,+dotprod,+fullfp16", "neoverse-n1"),
    "i8mm": Processor("+neon,+dotprod,+fullfp16,+i8mm", "max"),
}
"""By the instruction set of kernels."""


def compiled(source, processor, folder):
    """Optimizes LLVM code for a processor; the path of its object."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(
        features=processor.features, opt=2, reloc="static", codemodel="small"
    )
    module = llvm.parse_assembly(source)
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    path = folder / "kernel.o"
    path.write_bytes(machine.emit_object(module))
    return path


def run(source, instructions, operands, n_items, result, folder):
    """Runs a step kernel, given as LLVM code for the machine at hand, on items 0..n_items-1.

    operands are numbers or arrays, which stand for their addresses; gives what is then in the array `result`.
    """
    processor = PROCESSORS[instructions]
    source = re.sub(r'target (triple|datalayout) = .*|"target-(cpu|features)"="[^"]*"', "", source)
    (name,) = re.findall(r"^define i32 @(\S+?)\(", source, re.MULTILINE)
    arrays = {id(one): one for one in operands if isinstance(one, np.ndarray)}
    names = {key: f"array{number}" for number, key in enumerate(arrays)}
    program = PROGRAM.format(
        items=n_items,
        result=names[id(result)],
        size=result.nbytes,
        operands=", ".join(names.get(id(one), str(one)) for one in operands),
    )
    for key, array in arrays.items():
        path = folder / names[key]
        path.write_bytes(np.ascontiguousarray(array).tobytes())
        program += f'    .balign 64\n{names[key]}:\n    .incbin "{path}"\n'
    objects = [compiled(source.replace(name, '"kernel"'), processor, folder), folder / "start.o"]
    subprocess.run([ASSEMBLER, "-o", objects[1], "-"], input=program.encode(), check=True, timeout=30)
    subprocess.run([LINKER, "-static", "-o", folder / "program", *objects], check=True, timeout=30)
    command = [EMULATOR, "-cpu", processor.emulated, folder / "program"]
    printed = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    return np.frombuffer(printed, result.dtype).reshape(result.shape)
