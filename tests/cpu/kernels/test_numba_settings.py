"""Settings of numba: kernels are made for the processor that numba compiles for, and what cannot work is named."""

import os
import subprocess
import sys

import pytest

from engine.cpu.kernels.processor import best

X86 = "x86_64-unknown-linux-gnu"

ONE_KERNEL = """
from engine.errors import EngineError
try:
    from engine.cpu.products.integer import instructions
    from engine.cpu.kernels import processor
    from engine.cpu.kernels.build import kernel
    kernel("dot_panels", "Q4_0/" + instructions())
    print(processor.host())
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

    from engine.cpu.kernels import settings
    from engine.errors import DeviceError

    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx": True, "avx2": False})
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx,+avx2,+tuned,-sse3")
    with pytest.raises(DeviceError, match="NUMBA_CPU_FEATURES asks for instructions that this processor lacks: avx2;"):
        settings.check()
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx")
    settings.check()
    for wrong in ("avx2", "+avx, -avx2", "+avx;avx2,x"):
        monkeypatch.setattr(config, "CPU_FEATURES", wrong)
        with pytest.raises(DeviceError, match=r"NUMBA_CPU_FEATURES has '.*each name has its sign"):
            settings.check()


def test_settings_that_end_numba_or_llvm(tmp_path):
    """The one raises while it is imported, the other ends the process."""
    for threads in ("0", "-3"):
        found = compiled(tmp_path, NUMBA_NUM_THREADS=threads)
        assert found.startswith(f"DeviceError NUMBA_NUM_THREADS is {threads}")
    assert compiled(tmp_path, NUMBA_CPU_FEATURES="none").startswith("DeviceError NUMBA_CPU_FEATURES has 'none'")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("", "portable"),
        ("+avx2", "avx2"),
        ("-avx2", "portable"),
        ("+avx2,-avx", "portable"),  # without the one there is not the other
        ("+avx2,-avx,-avx2,+f16c,+fma", "portable"),  # NUMBA_ENABLE_AVX=0 on a processor that has it all
        ("+avx512vnni,+avx512vl", "vnni512"),
        ("+avx512vnni,+avx512vl,-avx512f", "avx2"),
        ("+avxvnni", "vnni"),
        ("+avxvnni,-avx2,+avx2", "avx2"),
    ],
)
def test_features_as_llvm_takes_them(features, expected):
    assert best(X86, features) == expected
