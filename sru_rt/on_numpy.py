"""What the core asks of an array library (see `library.Library`), answered by NumPy.

NumPy has no 16-bit products: they are formed in float32, a block of rows at a time, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .errors import LibraryError
from .memory import Workspace, address, empty

NDArray = np.ndarray[Any, Any]

_ROWS = 2048  # rows of a block: large enough for BLAS, small enough to stay in the cache
_NOTHING = nullcontext()
_workspace = Workspace()


class NumPy:
    """NumPy, on the CPU."""

    xp = np
    name = "numpy"
    device = "cpu"
    reads_values = True
    layer = None
    row_padding = 80  # so that rows do not all begin at the same place of a page and push each other out of the cache

    def current(self) -> AbstractContextManager[Any]:
        return _NOTHING

    def stream(self) -> int:
        return 0

    def plain(self, function: str, name: str, value: Any, origin: str) -> NDArray:
        if not isinstance(value, np.ndarray):
            kind = type(value)
            module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
            got = "None" if value is None else f"{module}{kind.__qualname__}"
            way = "pass one" if value is None or name.startswith("out") else f"pass numpy.asarray({name})"
            way = f"pass {name}.get()" if kind.__module__ == "cupy" else way  # NumPy converts none of these
            raise LibraryError(f"{function}: {name} must be an array (got {got}); {way}")
        # Looked for last, as the name alone imports a large module.
        if type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):
            raise LibraryError(
                f"{function}: {name} must be a plain array (got a masked one, whose mask would be ignored); pass "
                f"{name}.filled(...), and mask= or lengths= for padding"
            )
        return np.asarray(value)

    def pointer(self, array: NDArray | None) -> int:
        return 0 if array is None else address(array)

    def to_host(self, array: NDArray) -> NDArray:
        return array

    def from_host(self, array: np.ndarray[Any, Any]) -> NDArray:
        return array

    def integers(self, array: NDArray) -> NDArray:
        return np.array(array, np.int64)

    def conversion(self, name: str, dtype: str) -> str:
        return f"{name}.astype({dtype!r})"

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
        return empty(shape, dtype)

    def contiguous(self, array: NDArray, dtype: np.dtype[Any]) -> NDArray:
        array = np.ascontiguousarray(array, dtype)
        return array if array.flags.aligned else array.copy()

    def not_writable(self, array: NDArray) -> str:
        flags = array.flags
        if flags.c_contiguous and flags.writeable and array.dtype.isnative and flags.aligned:
            return ""
        return "C-contiguous, aligned, writeable and of native byte order"

    def workspace(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
        return _workspace.array(None, shape, dtype, empty)

    def times(self, a: NDArray, b: NDArray, plus: NDArray | None = None, out: NDArray | None = None) -> NDArray:
        out = empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out
        with np.errstate(all="ignore"):  # padding may hold anything, infinities included
            if a.itemsize > 2:
                np.matmul(a, b, out=out)
                if plus is not None:
                    out += plus
                return out
            b = _wide(b)
            for begin in range(0, len(a), _ROWS):
                rows = slice(begin, begin + _ROWS)
                block = _wide(a[rows]) @ b
                out[rows] = block if plus is None else block + _wide(plus[rows])
        return out

    def times_transposed(self, a: NDArray, b: NDArray, out: NDArray | None = None) -> NDArray:
        return self.times(a, b.T, out=out)

    def transposed_times(self, a: NDArray, b: NDArray) -> NDArray:
        with np.errstate(all="ignore"):  # as above
            if a.itemsize > 2:
                return a.T @ b
            total = np.zeros((a.shape[1], b.shape[1]), np.float32)
            for begin in range(0, len(a), _ROWS):
                rows = slice(begin, begin + _ROWS)
                total += _wide(a[rows]).T @ _wide(b[rows])
        return total


NUMPY = NumPy()


def _wide(a: NDArray) -> NDArray:
    return a.astype(np.float32) if a.itemsize == 2 else a
