"""Which instruction set of isa.py the processor at hand, as numba compiles for it, runs fastest.

Independent of what is computed.
"""

import ctypes
import sys
from functools import cache

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
"""Number of the system call on x86-64, its operation that asks for a part of a processor's state, and that part."""

REQUIRES = {
    "avx": "sse2",
    "avx2": "avx",
    "avx512f": "avx2",
    "avx512vl": "avx512f",
    "avx512vnni": "avx512f",
    "avx512bf16": "avx512f",
    "avxvnni": "avx2",
    "amx-int8": "amx-tile",
    "dotprod": "neon",
    "i8mm": "neon",
}
"""What else LLVM switches on with a feature, and whose absence switches it off."""


def best(triple: str, features: str) -> str:
    """The fastest of ISAS on a processor that has LLVM's `features`, a list like "+avx2,-avx512f"."""
    have = enabled(features)
    if triple.startswith("x86_64"):
        if {"avx512vnni", "avx512vl"} <= have:
            return "amx" if "amx-int8" in have else "vnni512"
        if "avxvnni" in have:
            return "vnni"
        if "avx2" in have:
            return "avx2"
    elif triple.startswith(("aarch64", "arm64")) and "dotprod" in have:
        return "i8mm" if "i8mm" in have else "neon"
    return "portable"


def is_amd() -> bool:
    """Whether numba compiles for one of AMD's Zen processors."""
    return target()[1].startswith("znver")


def target() -> tuple[str, str, str]:
    """LLVM's triple, name of the processor and list of features that numba compiles for.

    That is this machine, less what environment variables like NUMBA_CPU_NAME or NUMBA_ENABLE_AVX leave out.
    """
    from engine.cpu.kernels import settings  # numba is slow to import, and tables of this module are read without it

    settings.check()  # LLVM ends the process for some of them
    from numba.core.registry import cpu_target

    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features


def enabled(features: str) -> set[str]:
    """What LLVM's list of features, like "+avx2,-avx512f", comes to, entry after entry."""
    have: set[str] = set()
    for entry in features.split(","):
        name: str | None = entry[1:].strip()
        if entry.startswith("+"):
            while name:
                have.add(name)
                name = REQUIRES.get(name)
        elif entry.startswith("-"):
            have = {feature for feature in have if name not in _chain(feature)}
    return have


def _chain(feature: str) -> list[str]:
    """A feature and all that it requires."""
    chain = [feature]
    while chain[-1] in REQUIRES:
        chain.append(REQUIRES[chain[-1]])
    return chain


def host() -> str:
    """The fastest of ISAS that numba compiles for here: an instruction that the target lacks would end the process."""
    triple, _, features = target()
    found = best(triple, features)
    return found if found != "amx" or may_use_tiles() else usable(found)[1]


@cache
def may_use_tiles() -> bool:
    """Asks Linux for AMX's tile registers, which a process may use only after that; threads and children inherit it.

    False where the system has no such call, or refuses (a signal stack of a thread is too small for the registers).
    """
    if sys.platform != "linux":
        return False
    try:
        system = ctypes.CDLL(None, use_errno=True).syscall
        refused = system(
            *(ctypes.c_long(number) for number in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA))
        )
    except (AttributeError, OSError, TypeError):
        return False
    return bool(refused == 0)


def usable(found: str) -> tuple[str, ...]:
    """What a machine whose best is `found` can run.

    Every x86 processor with VNNI has AVX2.
    """
    return {
        "amx": ("amx", "vnni512", "vnni", "avx2", "portable"),
        "vnni512": ("vnni512", "vnni", "avx2", "portable"),
        "vnni": ("vnni", "avx2", "portable"),
        "avx2": ("avx2", "portable"),
        "i8mm": ("i8mm", "neon", "portable"),
        "neon": ("neon", "portable"),
        "portable": ("portable",),
    }[found]
