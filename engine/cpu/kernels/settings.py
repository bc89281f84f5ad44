"""Settings of numba, from environment variables or its own file: those that cannot work here are named in an error.

numba and LLVM themselves would end the process, or raise errors that name no variable.
"""

import os

from engine.errors import DeviceError


def check_before_import() -> None:
    """Refuse a variable with which numba cannot be imported.

    Raises:
        DeviceError: names the variable.
    """
    threads = os.environ.get("NUMBA_NUM_THREADS", "").strip()
    if threads.lstrip("+-").isdigit() and int(threads) < 1:
        raise DeviceError(f"NUMBA_NUM_THREADS is {threads}; allowed are numbers from 1 on: change or unset it")


def check() -> None:
    """Refuse settings with which nothing can be compiled, or nothing that runs here.

    Raises:
        DeviceError: names the setting.
    """
    from llvmlite import binding
    from numba import config

    if config.DISABLE_JIT:
        raise DeviceError(
            "the CPU runs compiled kernels, and NUMBA_DISABLE_JIT (environment or .numba_config.yaml) forbids "
            "compiling: unset it"
        )
    here = binding.get_host_cpu_features()
    entries = [entry for entry in (config.CPU_FEATURES or "").split(",") if entry]
    malformed = [entry for entry in entries if not entry.startswith(("+", "-"))]
    if malformed:
        raise DeviceError(
            f"NUMBA_CPU_FEATURES has {', '.join(map(repr, malformed))}; allowed is a list like '+avx2,-avx512f', in "
            "which each name has its sign: mend or unset it"
        )
    lacking = [entry[1:].strip() for entry in entries if entry[0] == "+" and here.get(entry[1:].strip()) is False]
    if lacking:
        raise DeviceError(
            f"NUMBA_CPU_FEATURES asks for instructions that this processor lacks: {', '.join(lacking)}; unset it"
        )
