"""Builds the CUDA kernels with NVRTC and keeps the cubins on disk.

A kernel file is joined with common.cuh as text, so the cache key (text, options, architecture, compiler version)
covers everything the compiler saw. Compiling needs no GPU; loading a cubin does. This module must not know models.
"""

from __future__ import annotations

import hashlib
import os
from _thread import LockType
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from engine import disk_cache
from engine.concurrency import fork
from engine.errors import DeviceError

_lock = fork.new_lock()
_building: dict[str, LockType] = {}
_cubins: dict[str, bytes] = {}  # what this process has built or read, should the disk cache not be writable
BASE_OPTIONS = ("--std=c++17", "-ftz=true", "-default-device")
OLDEST_ARCH = 75
_SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


@cache
def kernel_files() -> dict[str, Path]:
    """Every kernel file of engine/cuda by its name; each lives beside its launcher, and names are unique."""
    found = [path for path in Path(__file__).parents[1].rglob("*.cu*") if path.suffix in (".cu", ".cuh")]
    files = {path.name: path for path in found}
    assert len(files) == len(found), "two kernel files share a name"
    return files


tables_of: list[Callable[[Iterable[object]], list[str]]] = []
"""Functions that give the text of the tables that values of defines name. The room that owns tables adds its own."""


def kernel_source(names: Sequence[str], defines: Mapping[str, object] | None = None) -> str:
    """The text handed to the compiler: defines, tables that they name, common.cuh, files in order."""
    parts = [f"#define {key} {value}" for key, value in sorted((defines or {}).items())]
    parts += [text for tables in tables_of for text in tables((defines or {}).values())]
    for name in ("common.cuh", *names):
        parts.append(f'#line 1 "{name}"\n{kernel_files()[name].read_text(encoding="utf-8")}')
    return "\n".join(parts) + "\n"


def cache_dir() -> Path:
    """Folder of the cubin cache: $GGUF_ENGINE_CACHE, else $XDG_CACHE_HOME/gguf-engine, else ~/.cache/gguf-engine."""
    named = os.environ.get("GGUF_ENGINE_CACHE")
    if named:
        return Path(named) / "cubin"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gguf-engine" / "cubin"


def shared_limit(arch: int) -> int:
    """Bytes of shared memory one block may use on a compute capability (90 = 9.0)."""
    return _SHARED_LIMIT.get(arch, 64) * 1024


def target(arch: int) -> str:
    """Compiler name of a compute capability: 90 -> 'sm_90a' (wgmma and friends need the 'a'), 86 -> 'sm_86'."""
    return f"sm_{arch}a" if arch == 90 else f"sm_{arch}"


@cache
def best_target(arch: int) -> int:
    """The newest architecture NVRTC knows that a device of compute capability `arch` runs as cubin.

    Raises:
        DeviceError: the device is older than 7.5, or newer than every family this NVRTC knows.
    """
    from cupy_backends.cuda.libs import nvrtc

    if arch < OLDEST_ARCH:
        raise DeviceError(
            f"the GPU has compute capability {arch // 10}.{arch % 10}; 7.5 or newer is needed: use device='cpu'"
        )
    same_family = [known for known in nvrtc.getSupportedArchs() if known <= arch and known // 10 == arch // 10]
    if not same_family:
        raise DeviceError(
            f"this CUDA compiler (NVRTC {'.'.join(map(str, nvrtc.getVersion()))}) does not know compute capability "
            f"{arch // 10}.{arch % 10}: update with pip install -U 'gguf-engine[cuda]'"
        )
    return int(max(same_family))


def compile_cubin(source: str, arch: int, options: Sequence[str] = (), name: str = "kernels.cu") -> bytes:
    """Compiles CUDA C++ text to machine code for one architecture; needs NVRTC but no GPU.

    Raises:
        DeviceError: the compiler refused; the text holds its log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*BASE_OPTIONS, f"-arch={target(arch)}", *options))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise DeviceError(f"a CUDA kernel failed to build ({name}, {target(arch)}): {error}\n{log}") from None
        return bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


def cached_cubin(source: str, arch: int, options: Sequence[str] = (), name: str = "kernels.cu") -> bytes:
    """As compile_cubin, through the disk cache; a cache that cannot be written only costs time."""
    from cupy_backends.cuda.libs import nvrtc

    content = repr((source, target(arch), BASE_OPTIONS, tuple(options), nvrtc.getVersion()))
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    with _lock:
        building = _building.setdefault(key, fork.new_lock())
    with building:  # a second thread waits and finds the cubin built
        if key not in _cubins:
            _cubins[key] = _read_or_compile(source, arch, options, name, key)
        return _cubins[key]


def _read_or_compile(source: str, arch: int, options: Sequence[str], name: str, key: str) -> bytes:
    path = cache_dir() / f"{Path(name).stem}-{target(arch)}-{key}.cubin"
    cubin = disk_cache.read(path)  # never a damaged one: the driver would crash on it
    if cubin is None:
        cubin = compile_cubin(source, arch, options, name)
        disk_cache.write(path, cubin)
    return cubin


class Kernel:
    """One loaded kernel: its name, the driver's function handle, and the module that keeps it alive."""

    def __init__(self, name: str, function: Any, module: Any) -> None:
        self.name = name
        self.function = function
        self.ptr: int = int(function.ptr)
        self._module = module
        _prefer_shared(self.ptr)
        self._leaves_cache = False
        self._shared_limit = 16 * 1024  # static shared memory counts as well: up to 32 KiB of it are safe below this

    def allow_shared(self, n_bytes: int) -> None:
        """Raises the kernel's limit of dynamic shared memory to at least n_bytes (the default is 48 KiB)."""
        if n_bytes > self._shared_limit:
            from cupy_backends.cuda.api import driver

            max_dynamic_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(self.ptr, max_dynamic_shared, n_bytes)
            self._shared_limit = n_bytes

    def leave_cache(self, n_bytes: int) -> None:
        """Takes no more shared memory than one block's n_bytes: the rest of it becomes cache."""
        if not self._leaves_cache:
            most = 228 << 10  # of a multiprocessor; every block takes one KiB more than it asks for
            _prefer_shared(self.ptr, min(100, -(-(n_bytes + 1024) * 100 // most)))
            self._leaves_cache = True


def _prefer_shared(function: int, percent: int = 100) -> None:
    """Asks for the largest shared memory: a kernel starts beside another one only where both agree on its size."""
    from cupy_backends.cuda.api import driver

    preferred_carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    driver.funcSetAttribute(function, preferred_carveout, percent)


class Module:
    """A loaded cubin. `module.get("name")` gives an extern "C" kernel of it."""

    def __init__(self, cubin: bytes, names: Sequence[str]) -> None:
        from cupy.cuda.function import Module as DriverModule

        self._module = DriverModule()
        self._module.load(cubin)
        self._names = tuple(names)
        self._kernels: dict[str, Kernel] = {}

    def get(self, name: str) -> Kernel:
        """The kernel of that name.

        Raises:
            DeviceError: the files hold no such kernel.
        """
        if name not in self._kernels:
            try:
                function = self._module.get_function(name)
            except Exception as error:
                if "NOT_FOUND" not in str(error):  # loading may be put off until here
                    raise
                raise DeviceError(f"no CUDA kernel {name!r} in {', '.join(self._names)}: {error}") from None
            self._kernels[name] = Kernel(name, function, self._module)
        return self._kernels[name]


_modules: dict[tuple[Any, ...], Module] = {}


def device_arch() -> int:
    """Compute capability of the current device as two digits: 90 for 9.0, 120 for 12.0."""
    import cupy

    return int(cupy.cuda.Device().compute_capability)


def build(
    names: Sequence[str],
    *,
    defines: Mapping[str, object] | None = None,
    options: Sequence[str] = (),
    arch: int | None = None,
) -> Module:
    """Builds (or takes from the cache) and loads kernel files for the current device.

    Args:
        names: kernel files of engine/cuda, joined in this order behind common.cuh.
        defines: preprocessor names and values put in front of the text.
        options: further NVRTC options.
        arch: compute capability; the current device's when left out.

    Raises:
        DeviceError: a kernel does not compile, or the device is too old.
    """
    import cupy

    # Launchers call this for every launch: nothing here may read files before the module is found.
    device = cupy.cuda.runtime.getDevice()
    key = (device, arch, tuple(names), tuple(sorted((defines or {}).items())), tuple(options))
    module = _modules.get(key)
    if module is None:
        chosen = best_target(device_arch() if arch is None else arch)
        source = kernel_source(names, defines)
        module = Module(cached_cubin(source, chosen, options, names[-1]), names)
        with _lock:
            module = _modules.setdefault(key, module)
    return module


def prebuild(
    jobs: Sequence[tuple[Sequence[str], Mapping[str, object] | None]],
    arch: int,
    status: Callable[[str], None] = lambda _: None,
) -> None:
    """Fills the cubin caches for several (names, defines) pairs at once; NVRTC runs without the GIL.

    Raises:
        DeviceError: one of them does not compile.
    """
    chosen = best_target(arch)
    with ThreadPoolExecutor(max_workers=max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        pending = [pool.submit(cached_cubin, kernel_source(*job), chosen, (), job[0][-1]) for job in jobs]
        for done, future in enumerate(pending, 1):
            future.result()
            status(f"building GPU kernels {done}/{len(pending)}")
