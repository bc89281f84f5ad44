"""Attention kernels as C++ for the CPU (host_kernels.py): their text, and layouts that suit small sizes."""

import re
from dataclasses import replace

from engine.config import PAGE
from engine.cuda.attention.attention_plan import PrefillPlan, decode_plan

PLAIN = PrefillPlan(32, 32, 256, 0, "plain")
ON_HOST = [
    (r'asm\("ex2\..*?;\n', "y = exp2f(x);\n"),
    (r'asm volatile\("ld\.global\.cg\..*?;\n', "v = *p;\n"),
    (r'asm volatile\("atom\.acq_rel\..*?;\n', "old = *counter, *counter += n;\n"),
    (r"extern __shared__ (.*?)\[\];", r"static \1[SHARED_BYTES];"),
    (r'extern "C" __global__', "static"),
]
"""Replacements of a kernel's assembly, dynamic shared memory and C linkage, which would join all shapes' kernels."""


def host_plan(shape):
    """Layout of decode kernels with small ranges."""
    return replace(decode_plan(shape, 80, 8), min_chunk=PAGE, blocks=3)


def host_source(name, files, defines, text):
    """C++ of a kernel, in a namespace of its own."""
    body = "".join(text[file] for file in files if file != "half_pairs.cuh")  # cuda_on_host.h has it
    for pattern, by in ON_HOST:
        body = re.sub(pattern, by, body, flags=re.DOTALL)
    source = "".join(f"\n#define {key} {value}" for key, value in defines.items())
    source += f"\nnamespace of_{name} {{\n{body}\n}}\n"
    return source + "".join(f"\n#undef {key}" for key in {*defines, *re.findall(r"#define (\w+)", body)})
