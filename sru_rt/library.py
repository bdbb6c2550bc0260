"""What the core asks of an array library. One object for each library and device answers, found by `of`.

The leading array of a call (x or u) chooses it, and nothing else in the core knows which library it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from . import on_cupy
from .on_numpy import NUMPY

NDArray = Any  # an array of the library in question


class Library(Protocol):
    """An array library, on one device."""

    @property
    def xp(self) -> Any:
        """The module. What it and NumPy have in common is called by the same name."""

    @property
    def name(self) -> str:
        """The name of the module."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:0``, as `launch.run` takes it."""

    @property
    def reads_values(self) -> bool:
        """Whether values can be looked at without waiting for a device."""

    @property
    def row_padding(self) -> int:
        """By how many numbers rows of partial sums are to be longer than d."""

    def current(self) -> AbstractContextManager[Any]:
        """Makes the device that of the thread."""

    def stream(self) -> int:
        """The current stream's address."""

    def plain(self, function: str, name: str, value: Any, origin: str) -> NDArray:
        """`value` if it is an array of this library on this device, as `origin` is.

        Raises:
            LibraryError: it is not.
        """

    def pointer(self, array: NDArray | None) -> int:
        """The address of the first element, 0 for None."""

    def to_host(self, array: NDArray) -> np.ndarray[Any, Any] | None:
        """As a NumPy array; waits for the device. NumPy arrays are themselves; None of what is traced."""

    def from_host(self, array: np.ndarray[Any, Any]) -> NDArray:
        """A NumPy array as one of this library, on this device."""

    def integers(self, array: NDArray) -> NDArray:
        """A copy as int64, also of a NumPy array."""

    def conversion(self, name: str, dtype: str) -> str:
        """How a user writes that the array `name` is to be converted."""

    @property
    def layer(self) -> Callable[..., tuple[Any, ...]] | None:
        """What runs a layer that has been checked, in place of the core: bindings of frameworks have it.

        It takes the name of the function, the cell, its arrays by name as users give them (see `layer.apart`), the
        initial states, the constants, (lengths, mask, reset), the options, and what is projected, as
        `sru_rt.layer.forward` has them.
        """

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
        """An uninitialised C-contiguous array."""

    def workspace(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
        """As `empty`, for one call: the memory is the next one's that asks in this thread and on this stream."""

    def contiguous(self, array: NDArray, dtype: np.dtype[Any]) -> NDArray:
        """`array` itself if kernels can take it: in that dtype, C-contiguous and aligned; else a copy."""

    def not_writable(self, array: NDArray) -> str:
        """What an array must be for kernels to write to it, if it is not so; else an empty string."""

    # The rows of the factors and of `out` are contiguous, but need not follow upon each other.

    def times(self, a: NDArray, b: NDArray, plus: NDArray | None = None) -> NDArray:
        """a (n, m) times b (m, k), plus `plus` (n, k), which may be written to; in the dtype of `a`."""

    def times_transposed(self, a: NDArray, b: NDArray, out: NDArray | None = None) -> NDArray:
        """a (n, m) times b.T (m, k), in the dtype of `a`; written to `out` (n, k) if it is given."""

    def transposed_times(self, a: NDArray, b: NDArray) -> NDArray:
        """a.T (m, n) times b (n, k), a sum over many rows, in the dtype of the sum: float32 for 16-bit data."""


def of(value: Any) -> Library | None:
    """The library of an array that the core takes as it is; None of anything else."""
    if isinstance(value, np.ndarray):
        return NUMPY
    cupy: Any = sys.modules.get("cupy")  # whoever holds its arrays has imported it
    kind: Any = getattr(cupy, "ndarray", ())
    if isinstance(value, kind):
        return on_cupy.library(cupy, value.data.device_id)
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        binding: Any = importlib.import_module(f"{__package__}.bindings.torch.library")
        return binding.library(value)
    jax: Any = sys.modules.get("jax")
    if jax is not None and isinstance(value, getattr(jax, "Array", ())):
        binding = importlib.import_module(f"{__package__}.bindings.jax.library")
        return binding.library(value)
    return None
