"""A CuPy without a GPU: arrays in host memory, and every kernel launch written down instead of run.

What the GPU backend's host side does (uploads, products chosen, launches and their arguments) can so be followed on any
machine. Nothing is computed: arrays keep whatever they were made with.
"""

import bisect
import contextlib
import hashlib
import sys
import types
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec

import numpy as np

ALIGNMENT = 1024
"""Of allocations, in bytes."""


class Array(np.ndarray):
    """A numpy array with the attributes that launchers read."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.__array_interface__["data"][0])

    def set(self, values, stream=None):
        if self.nbytes < 1 << 16:
            self[...] = values

    def get(self):
        return np.array(self)


def digest(source):
    """A short name of a kernel's text."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Launch:
    """One launch: kernel name, the text it was built from (a hash), shape, and arguments.

    Pointers are ("array", number of the allocation in the order of first use, offset in bytes).
    """

    name: str
    source: str
    grid: tuple
    block: tuple
    shared: int
    pdl: bool
    args: tuple


@dataclass
class FakeGpu:
    """The card that is pretended, and what was launched on it."""

    arch: int = 90
    multiprocessors: int = 132
    memory: int = 1 << 37
    launches: list = field(default_factory=list)
    faults: dict = field(default_factory=dict)

    def __post_init__(self):
        self._starts, self._sizes, self._owners, self._numbers = [], {}, {}, {}
        self._args, self._keys = (), {}

    @property
    def allocations(self):
        """How many there have been."""
        return len(self._sizes)

    def key(self, job):
        """What Launch.source is for kernels of a build job."""
        from engine.cuda.driver.compiler import kernel_source

        found = self._keys.get(repr(job))
        if found is None:
            found = self._keys[repr(job)] = digest(kernel_source(*job))
        return found

    def restart(self):
        """Forgets launches and the numbers of allocations."""
        self.launches, self._numbers = [], {}

    def ran(self, name, grid, args):
        """Told every launch with its real arguments."""

    def empty(self, shape, dtype=np.float32):
        """A new allocation, aligned as CuPy's."""
        self.call("malloc")
        dtype = np.dtype(dtype)
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        raw = np.zeros(n_bytes + ALIGNMENT, np.uint8)
        first = -raw.__array_interface__["data"][0] % ALIGNMENT
        return self.keep(raw[first : first + n_bytes].view(dtype).reshape(shape))

    def filled(self, values, dtype=None):
        """A new allocation with a copy of values."""
        values = np.asarray(values, dtype)
        array = self.empty(values.shape, values.dtype)
        array[...] = values
        return array

    def keep(self, array):
        """Registers an allocation."""
        array = array.view(Array)
        start = array.data.ptr
        if start not in self._sizes:
            bisect.insort(self._starts, start)
        self._sizes[start], self._owners[start] = array.nbytes, array  # never freed: addresses stay unique
        return array

    def named(self, pointer):
        """A pointer as allocation and offset."""
        at = bisect.bisect_right(self._starts, pointer) - 1
        start = self._starts[at] if at >= 0 else None
        inside = start is not None and pointer <= start + self._sizes[start]
        assert inside, "a pointer outside every allocation"
        return ("array", self._numbers.setdefault(start, len(self._numbers)), pointer - start)

    def call(self, name, *args):
        """A call into CUDA, which fails where failing() says so."""
        if name in self.faults:
            raise self.faults[name]

    def plain(self, arg):
        if isinstance(arg, Array):
            return self.named(arg.data.ptr)
        return arg.item() if isinstance(arg, np.generic) else arg


@contextlib.contextmanager
def failing(gpu, name, status):
    """Calls of that name (see FakeGpu.call) fail meanwhile with a status of CUDA's."""
    gpu.faults[name] = CUDARuntimeError(status)
    try:
        yield
    finally:
        del gpu.faults[name]


class CUDARuntimeError(RuntimeError):
    """CuPy's error of the CUDA runtime; its text is the status."""


class OutOfMemoryError(MemoryError):
    """CuPy's error of its memory pool."""


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"
OutOfMemoryError.__module__ = "cupy.cuda.memory"


def _module(gpu):
    """The module cupy."""
    cupy = types.ModuleType("cupy")
    cupy.__spec__ = ModuleSpec("cupy", None)
    for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "uint32", "uint64", "dtype"):
        setattr(cupy, name, getattr(np, name))
    cupy.empty = cupy.zeros = gpu.empty
    cupy.asarray = gpu.filled
    cupy.ndarray = lambda shape, dtype, memory: gpu.keep(memory.array.view(dtype)[: int(np.prod(shape))].reshape(shape))
    cupy.cuda = types.SimpleNamespace()

    class Device:
        def __init__(self, index=0):
            self.id = index
            self.attributes = {"MultiProcessorCount": gpu.multiprocessors, "L2CacheSize": 1 << 20}

        @property
        def compute_capability(self):
            gpu.call("device")
            return str(gpu.arch)

        def __enter__(self):
            gpu.call("device")
            return self

        def __exit__(self, *_):
            return None

    class Stream:
        ptr = 0

        def __init__(self, non_blocking=False):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def synchronize(self):
            gpu.call("synchronize")

        capturing = False

        def begin_capture(self):
            self.capturing = True

        def is_capturing(self):
            return self.capturing

        def end_capture(self):
            assert self.capturing
            self.capturing = False
            gpu.call("instantiate")
            return types.SimpleNamespace(launch=lambda stream: gpu.call("replay"))

    class Event:
        def __init__(self, **_):
            pass

        def record(self, stream=None):
            gpu.call("record", self)

        def synchronize(self):
            gpu.call("synchronize", self)

    class MemoryPool:
        malloc = None
        freed = False

        def free_all_blocks(self):
            gpu.call("free")
            self.freed = True

        def total_bytes(self):
            return 0

    class Pinned(np.ndarray):
        @property
        def ptr(self):
            return self.__array_interface__["data"][0]

    def pinned(n_bytes):
        gpu.call("pinned")
        return np.zeros(n_bytes, np.uint8).view(Pinned)

    cuda = cupy.cuda
    cuda.Device, cuda.Stream, cuda.Event, cuda.MemoryPool = Device, Stream, Event, MemoryPool
    cuda.using_allocator = lambda malloc: contextlib.nullcontext()
    cuda.get_current_stream = Stream
    cuda.get_elapsed_time = lambda begin, end: 1.0
    cuda.alloc_pinned_memory = pinned
    cuda.UnownedMemory = lambda pointer, n_bytes, owner: owner
    cuda.MemoryPointer = lambda memory, offset: types.SimpleNamespace(array=np.asarray(memory)[offset:])
    cuda.memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    cuda.driver = types.SimpleNamespace(CUDADriverError=CUDARuntimeError)
    cuda.device = types.SimpleNamespace(get_cublas_handle=lambda: 0)
    cuda.runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDevice=lambda: 0,
        getDeviceCount=lambda: gpu.call("count") or 1,
        getDeviceProperties=lambda index: {"name": b"fake", "multiProcessorCount": gpu.multiprocessors},
        memGetInfo=lambda: (gpu.memory, gpu.memory),
        memsetAsync=lambda *args: None,
        memcpyAsync=lambda to, at, size, kind, stream: gpu.call("memcpy", to, at, size),
        memcpy2DAsync=lambda *args: None,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        memcpyDeviceToDevice=3,
    )
    return cupy


class _Kernel:
    """A kernel by name and by the text it was built from."""

    def __init__(self, name, source, ptr):
        self.name, self.source, self.ptr, self.function = name, source, ptr, None

    def allow_shared(self, n_bytes):
        pass

    def leave_cache(self, n_bytes):
        pass


def install(monkeypatch, gpu):
    """Puts the pretended card in CuPy's place for engine.cuda; monkeypatch takes it back."""
    from engine.cuda.driver import compiler
    from engine.cuda.driver import launch as launcher
    from engine.cuda.formats import dequant
    from engine.cuda.matrix import matvec

    kernels = []

    class Module:
        def __init__(self, cubin, names):
            self._source, self._found = cubin.decode(), {}

        def get(self, name):
            if name not in self._found:
                self._found[name] = _Kernel(name, self._source, len(kernels))
                kernels.append(self._found[name])
            return self._found[name]

    def text(source, arch, options=(), name="kernels.cu"):
        return digest(source).encode()

    real_pack = launcher.pack

    def pack(args):
        gpu._args = args
        return real_pack(args)

    def enqueue(config, ptr, address, extra):
        gpu.call("launch")
        kernel = kernels[ptr]
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        args = tuple(map(gpu.plain, gpu._args))
        gpu.launches.append(
            Launch(kernel.name, kernel.source, grid, block, config.sharedMemBytes, bool(config.attrs), args)
        )
        gpu.ran(kernel.name, grid, gpu._args)
        return (0,)

    def gemm(handle, ta, tb, n, rows, k, alpha, w, kind, ldw, x, kind_x, ldx, beta, out, kind_out, ldo, *rest):
        args = (n, rows, k, gpu.named(w), kind, ldw, gpu.named(x), ldx, gpu.named(out), ldo)
        gpu.launches.append(Launch("cublas", "", (), (), 0, False, args))

    driver = types.SimpleNamespace(
        CUlaunchConfig=lambda: types.SimpleNamespace(attrs=[]),
        CUlaunchAttribute=lambda: types.SimpleNamespace(value=types.SimpleNamespace()),
        CUlaunchAttributeID=types.SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=0),
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=0),
        cuLaunchKernelEx=enqueue,
    )
    cublas = types.SimpleNamespace(setStream=lambda handle, stream: None, gemmEx=gemm)
    monkeypatch.setitem(sys.modules, "cupy", _module(gpu))
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["cupy_backends.cuda.libs"].cublas = cublas
    sys.modules["cupy_backends.cuda.libs"].nvrtc = types.SimpleNamespace(getVersion=lambda: (13, 0))
    monkeypatch.setattr(compiler, "_modules", {})
    monkeypatch.setattr(compiler, "best_target", lambda arch: arch)
    monkeypatch.setattr(compiler, "Module", Module)
    monkeypatch.setattr(compiler, "cached_cubin", text)
    monkeypatch.setattr(launcher, "pack", pack)
    monkeypatch.setattr(launcher, "_bindings", lambda: driver)
    monkeypatch.setattr(launcher, "_calls", launcher._Calls())
    for cached in (dequant._kernel, matvec.multiprocessor_count):
        cached.cache_clear()
    return gpu
