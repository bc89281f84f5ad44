"""CUDA kernel files compiled as C++ for the CPU, and launchers that run them there on numpy arrays.

The threads of a block run in turns (tests/cuda/blocks_on_host.h), so shapes must be small.
"""

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest

from engine.cuda.driver.compiler import kernel_files
from tests.conftest import ROOT

_COMPILER = shutil.which("g++")
_FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w")
_MACRO = re.compile(r"#define ([A-Z_]+) ((?:[^\n]*\\\n)*[^\n]*)")
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([\w, ]+\)\s+(\w+)\(([^)]*)\)')


def host_library(folder, source):
    """C++ compiled for this processor and loaded; a machine without g++ skips the test. Headers are in tests/cuda."""
    if _COMPILER is None:
        pytest.skip("no g++ to compile the kernels for the CPU")
    (folder / "kernels.cpp").write_text(source)
    target = folder / "kernels.so"
    command = [_COMPILER, *_FLAGS, f"-I{ROOT / 'tests' / 'cuda'}", "-o", str(target), str(folder / "kernels.cpp")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:5000]
    return ctypes.CDLL(str(target))


def address(array):
    """Where an array begins, as kernels take it."""
    return ctypes.c_void_p(array.ctypes.data)


class HostModule:
    """What compiler.build gives, for one job."""

    def __init__(self, library, index):
        self._library, self._index = library, index

    def get(self, name):
        return getattr(self._library, f"{name}_{self._index}")


class HostKernels:
    """Jobs, (files, defines) each, as one shared library in a folder."""

    def __init__(self, folder, jobs):
        self._jobs = list({repr(job): job for job in jobs}.values())
        text = {name: path.read_text(encoding="utf-8") for name, path in kernel_files().items()}
        source = '#include "blocks_on_host.h"\n'
        for i, (files, defines) in enumerate(self._jobs):
            source += "".join(f"\n#define {name} {value}" for name, value in defines.items())
            # In a namespace of its own; C linkage would make one function of all of them.
            body = "".join(text[name] for name in files).replace('extern "C" __global__', "static")
            body = re.sub(r"extern __shared__ (.*?)\[\];", r"static \1[227 << 10];", body)
            body = re.sub(r'asm\("ex2\..*?;\n', "y = exp2f(x);\n", body)
            source += f"\nnamespace of_{i} {{\n{body}"
            macros = {name: value.replace("\\\n", "").strip() for name, value in _MACRO.findall(body)}
            for name, parameters in _KERNEL.findall(text[files[-1]]):
                parameters = macros.get(parameters, parameters)
                names = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
                source += f'\nextern "C" void {name}_{i}(int bx, int by, int threads, {parameters}) {{\n'
                source += f"    launch_blocks(bx, by, threads, [&] {{ {name}({names}); }});\n}}"
            source += "\n}"
            source += "".join(f"\n#undef {name}" for name in {*defines, *re.findall(r"#define (\w+)", body)})
        self._library = host_library(folder, source)

    def build(self, files, *, defines):
        """See compiler.build."""
        return HostModule(self._library, [repr(job) for job in self._jobs].index(repr((tuple(files), defines))))

    @staticmethod
    def launch(kernel, grid, threads, args, *, shared=0, stream=None):
        """See launch.launch."""
        assert stream is None
        assert shared <= 227 << 10
        given = [_argument(arg) for arg in args]
        kernel(*(grid if isinstance(grid, tuple) else (grid, 1)), threads, *given)

    def install(self, monkeypatch, *modules):
        """Launchers of these modules build and run on the CPU."""
        for module in modules:
            monkeypatch.setattr(module, "build", self.build)
            monkeypatch.setattr(module, "launch", self.launch)


def _argument(arg):
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, np.ndarray):
        return address(arg)
    if isinstance(arg, np.uint64):
        return ctypes.c_uint64(int(arg))
    return ctypes.c_float(arg) if isinstance(arg, float) else arg


class Memory:
    """Where the arrays of a test are: "host" or "gpu"."""

    def __init__(self, kind):
        self.kind = kind

    def up(self, array):
        """A copy for the kernels."""
        if self.kind == "host":
            return np.array(array)
        import cupy

        return cupy.asarray(array)

    @staticmethod
    def down(array):
        """A copy as a numpy array."""
        return array.copy() if isinstance(array, np.ndarray) else array.get()
