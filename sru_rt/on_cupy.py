"""What the core asks of an array library (see `library.Library`), answered by CuPy.

Everything is put on CuPy's current stream, and nothing waits for the device. Products go to cuBLAS as they are: it
reads transposed operands in place and sums 16-bit data in float32.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from . import settings
from .dtypes import name_of, state_dtype, to_numpy
from .errors import ArgumentError, LibraryError
from .memory import Workspace

NDArray = Any  # cupy.ndarray

_NOTHING = nullcontext()
_workspace = Workspace()

# Kernels load up to this many bytes at once. CuPy's own memory begins at multiples of 512; a view may begin anywhere.
ALIGNMENT = 16

_DATA_TYPES = {"float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF", "float32": "CUDA_R_32F", "float64": "CUDA_R_64F"}

# CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy has no name for: where cuBLAS cuts a product into parts,
# these are not rounded to 16 bits before they are added up.
_FULL_SUMS = 16

_LARGEST = 2**31 - 1

# alpha and beta of a product, which cuBLAS reads from the host's memory in the dtype of the sum.
_FACTORS = {name: np.array([0, 1], name) for name in ("float32", "float64")}
_FACTOR_POINTERS = {name: (array.ctypes.data, array.ctypes.data + array.itemsize) for name, array in _FACTORS.items()}


class CuPy:
    """CuPy, on one device."""

    name = "cupy"
    reads_values = False
    layer = None
    row_padding = 0

    def __init__(self, cupy: Any, device: int) -> None:
        self.xp, self.id, self.device = cupy, device, f"cuda:{device}"

    def current(self) -> AbstractContextManager[Any]:
        cuda = self.xp.cuda
        return _NOTHING if cuda.get_device_id() == self.id else cuda.Device(self.id)

    def stream(self) -> int:
        return int(self.xp.cuda.get_current_stream().ptr)

    def plain(self, function: str, name: str, value: Any, origin: str) -> NDArray:
        if not isinstance(value, self.xp.ndarray):
            kind = type(value)
            got = "None" if value is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            way = "pass one" if value is None or name.startswith("out") else f"pass cupy.asarray({name})"
            raise LibraryError(f"{function}: {name} must be a CuPy array, as {origin} is (got {got}); {way}")
        device = value.data.device_id
        if device != self.id:
            raise LibraryError(
                f"{function}: {name} is on cuda:{device}, but {origin} is on {self.device}; move them to one device"
            )
        return value

    def pointer(self, array: NDArray | None) -> int:
        return 0 if array is None else int(array.data.ptr)

    def to_host(self, array: NDArray) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = array if isinstance(array, np.ndarray) else array.get()
        return values

    def from_host(self, array: np.ndarray[Any, Any]) -> NDArray:
        return self.xp.asarray(array)

    def integers(self, array: NDArray) -> NDArray:
        return self.xp.array(array, np.int64)

    def conversion(self, name: str, dtype: str) -> str:
        return f"{name}.astype({dtype!r})"

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
        return self.xp.empty(shape, dtype)

    def workspace(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
        stream = self.stream()
        if self.xp.cuda.runtime.streamIsCapturing(stream):  # a graph may be replayed on another stream
            return self.empty(shape, dtype)
        return _workspace.array((self.id, stream), shape, dtype, self.empty)

    def contiguous(self, array: NDArray, dtype: np.dtype[Any]) -> NDArray:
        array = self.xp.ascontiguousarray(array, dtype)
        return array if array.data.ptr % ALIGNMENT == 0 else array.copy()

    def not_writable(self, array: NDArray) -> str:
        if array.flags.c_contiguous and array.data.ptr % ALIGNMENT == 0:
            return ""
        return f"C-contiguous, with an address that is a multiple of {ALIGNMENT} bytes"

    def times(self, a: NDArray, b: NDArray, plus: NDArray | None = None) -> NDArray:
        out = self.empty((a.shape[0], b.shape[1]), a.dtype) if plus is None else plus
        return self._gemm(a, False, b, False, out, add=plus is not None)

    def times_transposed(self, a: NDArray, b: NDArray, out: NDArray | None = None) -> NDArray:
        out = self.empty((a.shape[0], b.shape[0]), a.dtype) if out is None else out
        return self._gemm(a, False, b, True, out)

    def transposed_times(self, a: NDArray, b: NDArray) -> NDArray:
        shape, dtype = (a.shape[1], b.shape[1]), to_numpy(state_dtype(name_of(a.dtype)))
        if a.shape[0] == 0:
            return self.xp.zeros(shape, dtype)
        return self._gemm(a, True, b, False, self.empty(shape, dtype))

    def _gemm(
        self, a: NDArray, transpose_a: bool, b: NDArray, transpose_b: bool, out: NDArray, add: bool = False
    ) -> NDArray:
        """Writes a (or a.T) times b (or b.T) to `out`, or adds it.

        cuBLAS counts along columns first, so to it each of our matrices is its transpose, and it is asked for
        out.T = b.T a.T.
        """
        inner = a.shape[0] if transpose_a else a.shape[1]
        if out.size == 0:
            return out
        if max(*a.shape, *b.shape, *out.shape) > _LARGEST:
            raise ArgumentError(
                f"sru_rt: the product of matrices {a.shape} and {b.shape} has more than {_LARGEST} rows or columns, "
                "which cuBLAS does not take; give it fewer steps or sequences at a time"
            )
        cublas, runtime = _cublas(self.xp), self.xp.cuda.runtime
        zero, one = _FACTOR_POINTERS[state_dtype(name_of(a.dtype))]
        handle, stream = self.xp.cuda.get_cublas_handle(), self.stream()
        arguments = (
            handle,
            cublas.CUBLAS_OP_T if transpose_b else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_T if transpose_a else cublas.CUBLAS_OP_N,
            out.shape[1],
            out.shape[0],
            inner,
            one,
            b.data.ptr,
            _data_type(runtime, b),
            _row(b),
            a.data.ptr,
            _data_type(runtime, a),
            _row(a),
            one if add else zero,
            out.data.ptr,
            _data_type(runtime, out),
            _row(out),
            _compute_type(cublas, a),
            cublas.CUBLAS_GEMM_DEFAULT,
        )
        mode = cublas.getMathMode(handle)  # the handle is CuPy's
        cublas.setMathMode(handle, _FULL_SUMS)
        try:
            if runtime.streamIsCapturing(stream):
                _capture_gemm(stream, arguments)
            else:
                cublas.gemmEx(*arguments)
        finally:
            cublas.setMathMode(handle, mode)
        return out


@functools.cache
def library(cupy: Any, device: int) -> CuPy:
    """The library object of a device."""
    return CuPy(cupy, device)


def _cublas(cupy: Any) -> Any:
    try:
        return cupy.cuda.cublas
    except ImportError as error:
        raise LibraryError(
            f"sru_rt: CuPy did not find cuBLAS, which forms the products ({error}); install it with "
            "pip install 'sru_rt[cuda12]' or 'sru_rt[cuda13]', whichever matches CuPy"
        ) from None


def _capture_gemm(stream: int, arguments: tuple[int, ...]) -> None:
    """cublasGemmEx on a stream that is being captured into a graph, which CuPy's binding refuses for all of cuBLAS.

    Raises:
        LibraryError: cuBLAS refuses it.
    """
    library = _cublas_library()
    for name, status in (
        ("cublasSetStream", library.cublasSetStream_v2(arguments[0], stream)),
        ("cublasGemmEx", library.cublasGemmEx(*arguments)),
    ):
        if status:
            raise LibraryError(
                f"sru_rt: {name} failed with status {status} in a stream capture; form U outside of it, and capture "
                "the recurrence alone"
            )


@functools.cache
def _cublas_library() -> ctypes.CDLL:
    """The library that CuPy has loaded."""
    pathfinder = importlib.import_module("cuda.pathfinder")  # on which CuPy depends
    library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    matrix = (pointer, number, number)  # address, data type, distance of columns
    library.cublasSetStream_v2.argtypes = (pointer, pointer)
    operations_and_sizes, kinds = (number,) * 5, (number, number)
    library.cublasGemmEx.argtypes = (
        *(pointer, *operations_and_sizes, pointer),
        *(*matrix, *matrix, pointer, *matrix, *kinds),
    )
    return library


def _row(matrix: NDArray) -> int:
    """Numbers from the beginning of a row to that of the next."""
    return max(matrix.shape[1], matrix.strides[0] // matrix.itemsize if matrix.shape[0] > 1 else 1)


def _data_type(runtime: Any, array: NDArray) -> int:
    return int(getattr(runtime, _DATA_TYPES[name_of(array.dtype)]))


def _compute_type(cublas: Any, array: NDArray) -> int:
    dtype = name_of(array.dtype)
    if dtype == "float64":
        return int(cublas.CUBLAS_COMPUTE_64F)
    rounded = dtype == "float32" and settings.tf32()
    return int(cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if rounded else cublas.CUBLAS_COMPUTE_32F)
