"""A stand-in for CuPy on the memory of the CPU, for tests: `install` puts it in the place of the module `cupy`.

It has what the library uses of CuPy and no more, under the same names (test_cupy_arrays.py compares them), and is as
strict: arrays convert to nothing by themselves, belong to one of two devices and can only be used while it is the
current one. Kernels run under the emulation of emulator.py; NVRTC's machine code is the source text. What a GPU would
be given, and what the host would wait for, stands in `record`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import operator
import re
import sys
import threading
import types
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from sru_rt import dependent, launch_gpu, plan

from . import emulator

with suppress(ImportError):  # before its place is taken: parts of it that are imported meanwhile would not fit together
    importlib.import_module("cupy")

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "cuda"
DEVICES = 2

_CUBIN = b"emulated\0"


@dataclass
class Record:
    """What was asked of the devices since `install`."""

    reads: list[str] = field(default_factory=list)  # of values by the host, each of which would wait
    launches: list[tuple[str, int, int]] = field(default_factory=list)  # kernel, device, stream
    products: list[dict[str, Any]] = field(default_factory=list)
    imports: list[int] = field(default_factory=list)  # streams that were handed to __dlpack__

    def clear(self) -> None:
        for name in vars(self):
            getattr(self, name).clear()


record = Record()


# ----------------------------------------------------------------------------------------------------------------------
# Devices and streams


class CUDARuntimeError(RuntimeError):
    pass


class _Here(threading.local):
    """What is current in a thread."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Any] = {}


_here = _Here()


class Device:
    def __init__(self, device: Any = None) -> None:
        self.id = _here.device if device is None else int(getattr(device, "id", device))
        self._previous: list[int] = []

    def __enter__(self) -> Device:
        self._previous.append(_here.device)
        self.use()
        return self

    def __exit__(self, *_: Any) -> None:
        _here.device = self._previous.pop()

    def use(self) -> None:
        if not 0 <= self.id < DEVICES:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        _here.device = self.id

    def synchronize(self) -> None:
        record.reads.append("Device.synchronize")

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def attributes(self) -> dict[str, int]:
        return {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 << 10}


class _AnyStream:
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr = ptr
        self.device_id = device_id
        self._previous: list[Any] = []

    def __enter__(self) -> _AnyStream:
        self._previous.append(get_current_stream())
        _here.streams[_here.device] = self
        return self

    def __exit__(self, *_: Any) -> None:
        _here.streams[_here.device] = self._previous.pop()

    def use(self) -> _AnyStream:
        _here.streams[_here.device] = self
        return self

    def synchronize(self) -> None:
        record.reads.append("Stream.synchronize")

    def begin_capture(self, mode: Any = None) -> None:
        _capturing.add(self.ptr)

    def end_capture(self) -> None:
        _capturing.remove(self.ptr)


_capturing: set[int] = set()  # streams; what is put on them is done at once nevertheless


class ExternalStream(_AnyStream):
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        warnings.warn("ExternalStream is deprecated since CuPy v14.0", DeprecationWarning, stacklevel=2)
        super().__init__(ptr, device_id)


class Stream(_AnyStream):
    _numbers = itertools.count(0x1000)

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        super().__init__(0 if null else next(Stream._numbers), _here.device)

    @classmethod
    def from_external(cls, obj: Any) -> Stream:
        made = cls()
        version, made.ptr = obj.__cuda_stream__()
        if version != 0 or made.ptr == 0:
            raise TypeError("a stream of another library is (0, its address)")
        return made


Stream.null = Stream(null=True)  # type: ignore[attr-defined]


def get_current_stream(device_id: int = -1) -> Any:
    return _here.streams.get(_here.device if device_id < 0 else device_id, Stream.null)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


class MemoryPointer:
    def __init__(self, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id, self.device = ptr, device_id, Device(device_id)


class Flags:
    def __init__(self, array: np.ndarray) -> None:
        self.c_contiguous = array.flags.c_contiguous


class ndarray:
    __module__ = "cupy"

    def __init__(self, *_: Any) -> None:
        raise TypeError("the stand-in for CuPy makes arrays by empty(), array() and the like")

    @classmethod
    def _of(cls, host: np.ndarray, device: int | None = None) -> ndarray:
        _check_dtype(host.dtype)
        made = object.__new__(cls)
        made._memory, made._device = host, _here.device if device is None else device
        return made

    @property
    def _host(self) -> np.ndarray:
        """The values, for work on the device."""
        if self._device != _here.device:
            raise RuntimeError(f"an array of device {self._device} is used while device {_here.device} is current")
        return self._memory

    def _read(self, how: str) -> np.ndarray:
        """The values, for the host."""
        record.reads.append(how)
        return self._memory

    shape = property(lambda self: self._memory.shape)
    dtype = property(lambda self: self._memory.dtype)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)
    strides = property(lambda self: self._memory.strides)
    flags = property(lambda self: Flags(self._memory))
    device = property(lambda self: Device(self._device))
    T = property(lambda self: self._view(self._memory.T))

    @property
    def data(self) -> MemoryPointer:
        address = self._memory.__array_interface__["data"][0] if self._memory.size else 0
        return MemoryPointer(address, self._device)

    def _view(self, host: np.ndarray) -> ndarray:
        return ndarray._of(host, self._device)

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, index: Any) -> ndarray:
        return self._view(np.asarray(self._memory[_hosts(index)]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_hosts(index)] = _hosts(value)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        made = self._memory.reshape(*shape, order=order)
        return self._view(made) if np.may_share_memory(made, self._memory) else ndarray._of(_own(made))

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self._memory.transpose(*axes))

    def view(self, dtype: Any) -> ndarray:
        return self._view(self._memory.view(dtype))

    def copy(self, order: str = "C") -> ndarray:
        return ndarray._of(_own(self._host))

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> ndarray:
        if not copy and self.dtype == np.dtype(dtype):
            return self
        with np.errstate(all="ignore"):
            return ndarray._of(_own(self._host.astype(dtype)))

    def fill(self, value: Any) -> None:
        self._host.fill(value)

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        return self._read("get").copy()

    def item(self, *index: Any) -> Any:
        return self._read("item").item(*index)

    def tolist(self) -> Any:
        return self._read("tolist").tolist()

    def __bool__(self) -> bool:
        return bool(self._read("__bool__"))

    def __int__(self) -> int:
        return int(self._read("__int__"))

    def __float__(self) -> float:
        return float(self._read("__float__"))

    def __repr__(self) -> str:
        return repr(self._read("__repr__"))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()` to make one explicitly.")

    def __array_function__(self, *_: Any) -> Any:
        raise TypeError("a function of NumPy was called with an array of CuPy")

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an operation of NumPy was called with an array of CuPy")

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        record.imports.append(stream)
        return _Capsule(self._memory)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._device

    __hash__ = None  # type: ignore[assignment]


def _operator(name: str) -> Any:
    def apply(self: ndarray, other: Any) -> Any:
        with np.errstate(all="ignore"):
            result = getattr(operator, name)(self._host, _hosts(other))
        return self if name.startswith("__i") else ndarray._of(_own(result))

    return apply


for _name in ("lt", "le", "eq", "ne", "ge", "gt", "add", "sub", "mul", "and", "or", "iadd", "iand", "ior"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _hosts(value: Any) -> Any:
    """`value` with arrays replaced by their memory; NumPy arrays but scalars are refused, as by CuPy."""
    if isinstance(value, tuple):
        return tuple(map(_hosts, value))
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value._host if isinstance(value, ndarray) else value


def _check_dtype(dtype: np.dtype) -> None:
    if not dtype.isnative or (dtype.kind not in "biufc" and dtype != bfloat16) or dtype == np.longdouble:
        raise ValueError(f"Unsupported dtype {dtype}")


def _own(host: Any) -> np.ndarray:
    """A C-contiguous copy in memory of its own, which ends where the array ends."""
    host = np.asarray(host)
    made = empty(host.shape, host.dtype)._memory
    made[...] = host
    return made


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    host = np.empty(shape, dtype)
    host.reshape(-1).view(np.uint8)[...] = 0xFF  # a NaN in every floating-point format
    return ndarray._of(host)


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray._of(np.zeros(shape, dtype))


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    return ndarray._of(np.arange(start, dtype=dtype) if stop is None else np.arange(start, stop, step, dtype))


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, copy=bool(copy))
    if get_current_stream().ptr in _capturing:
        raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
    return ndarray._of(_own(np.asarray(obj, dtype)))


def asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    return array(a, dtype, copy=False)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else a.copy()


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    return ndarray._of(_own(np.where(*map(_hosts, (condition, x, y)))))


def concatenate(tup: Any, axis: int = 0) -> ndarray:
    return ndarray._of(_own(np.concatenate([a._host for a in tup], axis)))


def moveaxis(a: ndarray, source: int, destination: int) -> ndarray:
    return a._view(np.moveaxis(a._memory, source, destination))


def may_share_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    return a._device == b._device and np.may_share_memory(a._memory, b._memory)


def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    kind, number = array.__dlpack_device__()
    if kind not in (2, 13):
        raise ValueError(f"the stand-in for CuPy imports from CUDA devices alone (got type {kind})")
    capsule = array.__dlpack__(stream=get_current_stream().ptr or 1)
    return ndarray._of(capsule.memory, number)


@dataclass
class _Capsule:
    """What this module hands to itself; NumPy's own, before 1.25, hold no bool."""

    memory: np.ndarray


# ----------------------------------------------------------------------------------------------------------------------
# cuBLAS

_DATA_TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16), 14: np.dtype(bfloat16)}
_COMPUTE_TYPES = {68: np.dtype(np.float32), 70: np.dtype(np.float64), 77: np.dtype(np.float32)}
_TF32 = 77
_SUPPORTED = {  # compute type, type of A and B, type of C
    *((68, a, c) for a in (2, 14) for c in (a, 0)),
    (68, 0, 0),
    (77, 0, 0),
    (70, 1, 1),
}
_math_modes: dict[int, int] = {}


class CUBLASError(RuntimeError):
    pass


def get_cublas_handle() -> int:
    return 0xB1A5 + _here.device


def getMathMode(handle: int) -> int:
    return _math_modes.get(handle, 0)


def setMathMode(handle: int, mode: int) -> None:
    _math_modes[handle] = mode


def gemmEx(
    handle: int,
    transa: int,
    transb: int,
    m: int,
    n: int,
    k: int,
    alpha: int,
    A: int,
    Atype: int,
    lda: int,
    B: int,
    Btype: int,
    ldb: int,
    beta: int,
    C: int,
    Ctype: int,
    ldc: int,
    computeType: int,
    algo: int,
) -> None:
    """C (m, n) = alpha*op(A)*op(B) + beta*C, all with columns of lda, ldb, ldc numbers."""
    if get_current_stream().ptr in _capturing:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    sizes = (m, n, k, lda, ldb, ldc)
    if any(not isinstance(size, int) or size >= 2**31 for size in sizes):
        raise OverflowError(f"value too large to convert to int: {sizes}")
    rows_a, rows_b = (k if transa else m), (n if transb else k)
    if min(sizes) < 1 or lda < rows_a or ldb < rows_b or ldc < m or handle != get_cublas_handle():
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE")
    if (computeType, Atype, Ctype) not in _SUPPORTED or Atype != Btype or transa not in (0, 1) or transb not in (0, 1):
        raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")
    record.products.append(
        {
            "sizes": (m, n, k),
            "types": (_DATA_TYPES[Atype].name, _DATA_TYPES[Ctype].name),
            "compute": computeType,
            "math_mode": getMathMode(handle),
            "stream": get_current_stream().ptr,
        }
    )
    wide = _COMPUTE_TYPES[computeType]
    factors = [ctypes.cast(p, ctypes.POINTER(np.ctypeslib.as_ctypes_type(wide)))[0] for p in (alpha, beta)]
    a, b = _columns(A, rows_a, m if transa else k, lda, Atype), _columns(B, rows_b, k if transb else n, ldb, Btype)
    c = _columns(C, m, n, ldc, Ctype)
    a, b = (_rounded(x.astype(wide), computeType == _TF32) for x in (a.T if transa else a, b.T if transb else b))
    with np.errstate(all="ignore"):
        total = factors[0] * (a @ b)
        if factors[1]:  # what C holds does not matter otherwise
            total += factors[1] * c.astype(wide)
        c[...] = total


def _columns(address: int, rows: int, columns: int, stride: int, kind: int) -> np.ndarray:
    dtype = _DATA_TYPES[kind]
    count = stride * (columns - 1) + rows
    memory = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), (dtype.itemsize, stride * dtype.itemsize))


def _rounded(values: np.ndarray, to_tf32: bool) -> np.ndarray:
    """To the ten bits that TF32 keeps."""
    if not to_tf32:
        return values
    return ((np.ascontiguousarray(values).view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# NVRTC, modules and kernels


class NVRTCError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


_programs: dict[int, dict[str, Any]] = {}
_program_numbers = itertools.count(1)


def createProgram(src: str, name: str, headers: Any, include_names: Any) -> int:
    if not isinstance(src, str) or len(headers) != len(include_names):
        raise TypeError("createProgram(str src, str name, headers, include_names)")
    number = next(_program_numbers)
    _programs[number] = {"source": src, "names": {bytes(n).decode() for n in include_names}}
    return number


def compileProgram(prog: int, options: Any) -> None:
    program = _programs[prog]
    program["log"] = "ptxas info    : Used 32 registers"
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', program["source"], re.M):
        if name not in program["names"]:
            program["log"] = f'sru_rt.cu: catastrophic error: cannot open source file "{name}"'
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")
    if any(not isinstance(option, str) for option in options):
        raise TypeError("options are strings")
    program["cubin"] = _CUBIN + program["source"].encode()


def getCUBIN(prog: int) -> bytes:
    return _programs[prog]["cubin"]


def getProgramLog(prog: int) -> str:
    return _programs[prog]["log"]


def destroyProgram(prog: int) -> None:
    del _programs[prog]


def getVersion() -> tuple[int, int]:
    return 12, 99  # so that the cache holds nothing of ours under the name of a real kernel


def getSupportedArchs() -> tuple[int, ...]:
    return 75, 80, 86, 89, 90, 100, 120


class Module:
    def __init__(self) -> None:
        self._emulated: Any = None
        self._device = _here.device

    def load(self, cubin: bytes) -> None:
        if not cubin.startswith(_CUBIN):
            raise CUDADriverError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution")
        self._emulated = _emulated(cubin.removeprefix(_CUBIN).decode(), emulator.default_mode())
        self._device = _here.device

    def get_function(self, name: str) -> Function:
        return Function._of(self._emulated.get_function(name), self._device)


@functools.cache
def _emulated(source: str, mode: str) -> Any:
    return emulator.Module(source, include=(CUDA_SOURCES,), mode=mode)


class Function:
    @classmethod
    def _of(cls, kernel: Any, device: int) -> Function:
        made = object.__new__(cls)
        made._kernel, made._device = kernel, device
        return made

    @property
    def ptr(self) -> int:
        _functions[id(self)] = self
        return id(self)

    def __call__(
        self,
        grid: Any,
        block: Any,
        args: Any,
        shared_mem: int = 0,
        stream: Any = None,
        enable_cooperative_groups: Any = 0,
    ) -> None:
        if self._device != _here.device:
            raise CUDADriverError("CUDA_ERROR_INVALID_HANDLE: the kernel is loaded on another device")
        ptr = get_current_stream().ptr if stream is None else stream.ptr
        record.launches.append((self._kernel.name, _here.device, ptr))
        self._kernel(grid, block, args, shared_mem)


_functions: dict[int, Function] = {}  # of those that were asked for their address


def launch_kernel(
    function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int, at: int, extra: int
) -> None:
    """CuPy's `driver.launchKernel`, of kernels with one parameter."""
    found = _functions[function]
    (size,) = found._kernel.argument_sizes
    value = ctypes.string_at(ctypes.c_void_p.from_address(at).value or 0, size)
    found((gx, gy, gz), (bx, by, bz), (np.frombuffer(value, np.dtype((np.void, size))),), shared, ExternalPtr(stream))


class ExternalPtr:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


# ----------------------------------------------------------------------------------------------------------------------
# The modules


def _module(name: str, *members: Any, **named: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for member in members:
        setattr(module, member.__name__, member)
    vars(module).update(named)
    return module


runtime = _module(
    "cupy_backends.cuda.api.runtime",
    CUDARuntimeError,
    CUDA_R_32F=0,
    CUDA_R_64F=1,
    CUDA_R_16F=2,
    CUDA_R_16BF=14,
    getDevice=lambda: _here.device,
    getDeviceCount=lambda: DEVICES,
    streamIsCapturing=lambda stream: stream in _capturing,
    driverGetVersion=lambda: 12090,
    runtimeGetVersion=lambda: 12090,
    getDeviceProperties=lambda device: {
        "name": b"stand-in",
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "sharedMemPerBlockOptin": 227 << 10,
        "totalGlobalMem": 1 << 30,
    },
)
driver = _module("cupy_backends.cuda.api.driver", CUDADriverError, launchKernel=launch_kernel)
cublas = _module(
    "cupy_backends.cuda.libs.cublas",
    CUBLASError,
    gemmEx,
    getMathMode,
    setMathMode,
    CUBLAS_OP_N=0,
    CUBLAS_OP_T=1,
    CUBLAS_GEMM_DEFAULT=-1,
    CUBLAS_COMPUTE_32F=68,
    CUBLAS_COMPUTE_64F=70,
    CUBLAS_COMPUTE_32F_FAST_TF32=_TF32,
)
nvrtc = _module(
    "cupy_backends.cuda.libs.nvrtc",
    NVRTCError,
    createProgram,
    compileProgram,
    getCUBIN,
    getProgramLog,
    destroyProgram,
    getVersion,
    getSupportedArchs,
)
cuda = _module(
    "cupy.cuda",
    Device,
    ExternalStream,
    Function,
    MemoryPointer,
    Module,
    Stream,
    get_cublas_handle,
    get_current_stream,
    cublas=cublas,
    driver=driver,
    get_device_id=lambda: _here.device,
    memory=_module("cupy.cuda.memory", MemoryPointer, OutOfMemoryError),
    nvrtc=nvrtc,
    runtime=runtime,
)
cupy = _module(
    "cupy",
    arange,
    array,
    asarray,
    ascontiguousarray,
    asnumpy,
    concatenate,
    empty,
    from_dlpack,
    may_share_memory,
    moveaxis,
    ndarray,
    where,
    zeros,
    __version__="14.2.0",
    __path__=[],
    cuda=cuda,
)


@contextmanager
def installed(monkeypatch: Any) -> Any:
    """Puts the stand-in in the place of CuPy, with nothing on record, device 0 and the null stream current."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setitem(sys.modules, "cupy.cuda", cuda)
        # What the library remembers of devices and kernels for a process belongs to one CuPy.
        patch.setattr(launch_gpu, "_launches", {})
        patch.setattr(launch_gpu, "_load", functools.cache(launch_gpu._load.__wrapped__))
        patch.setattr(launch_gpu, "device_facts", functools.cache(launch_gpu.device_facts.__wrapped__))
        patch.setattr(plan, "_batches", {})
        patch.setattr(dependent, "launcher", lambda driver_version: None)  # of a true driver, if there is one
        record.clear()
        _math_modes.clear()
        _here.device, _here.streams = 0, {}
        try:
            yield cupy
        finally:
            _here.device, _here.streams = 0, {}
