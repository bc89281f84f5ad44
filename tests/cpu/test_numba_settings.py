"""Settings of numba: kernels are made for the processor that numba compiles for, and what cannot work is named."""

import os
import subprocess
import sys

import pytest

from engine.cpu.kernels.isa import best

X86 = "x86_64-unknown-linux-gnu"

ONE_KERNEL = """
from engine.cpu.integer import instructions
from engine.cpu.kernels import isa
from engine.cpu.kernels.build import kernel
from engine.errors import EngineError
try:
    kernel("dot_panels", "Q4_0/" + instructions())
    print(isa.host())
except EngineError as error:
    print(type(error).__name__, error)
"""


def compiled(folder, **settings):
    """What a process prints that compiles one kernel under these environment variables."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "GGUF_ENGINE_CPU"))}
    environment = others | {"NUMBA_CACHE_DIR": str(folder)} | settings
    run = subprocess.run(
        [sys.executable, "-c", ONE_KERNEL], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return run.stdout.strip()


def test_a_processor_without_vector_extensions(tmp_path):
    assert compiled(tmp_path, NUMBA_CPU_NAME="generic") == "portable"


def test_no_compiling(tmp_path):
    assert compiled(tmp_path, NUMBA_DISABLE_JIT="1").startswith(
        "DeviceError the CPU runs compiled kernels, and NUMBA_D"
    )


def test_instructions_that_the_processor_lacks(monkeypatch):
    from llvmlite import binding
    from numba import config

    from engine.cpu.kernels import build
    from engine.errors import DeviceError

    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx": True, "avx2": False})
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx,+avx2,+tuned,-sse3")
    with pytest.raises(DeviceError, match="NUMBA_CPU_FEATURES asks for instructions that this processor lacks: avx2;"):
        build._check_settings()
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx")
    build._check_settings()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("", "portable"),
        ("+avx2", "avx2"),
        ("-avx2", "portable"),
        ("+avx2,-avx", "portable"),  # without the one there is not the other
        ("+avx2,-avx,-avx2,+f16c,+fma", "portable"),  # NUMBA_ENABLE_AVX=0 on a processor that has it all
        ("+avx512vnni,+avx512vl", "vnni"),
        ("+avx512vnni,+avx512vl,-avx512f", "avx2"),
        ("+avxvnni", "vnni"),
        ("+avxvnni,-avx2,+avx2", "avx2"),
    ],
)
def test_features_as_llvm_takes_them(features, expected):
    assert best(X86, features) == expected
