"""Which library the arguments of a call belong to, and calls with arrays of other libraries through DLPack.

A library is looked up by the name of the type's module and never imported: whoever holds its arrays has imported it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from .errors import ArgumentError, DtypeError, LibraryError

F = TypeVar("F", bound=Callable[..., Any])

_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost of the DLPack standard


def array_function(function: F) -> F:
    """Lets a function on NumPy arrays take arrays of any library with `__dlpack__` in the memory of the CPU.

    Results come back in the library that was given, where it can import DLPack, else as NumPy arrays.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        foreign = _foreign_library(function.__name__, args, kwargs)
        if foreign is None:
            return function(*args, **kwargs)
        return _call_through_dlpack(function, foreign, args, kwargs)

    return call  # type: ignore[return-value]


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


def _foreign_library(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The library of the arrays among the arguments, None for NumPy; arrays of two libraries are an error."""
    found: set[str] = set()
    for value in _leaves((*args, *kwargs.values())):
        if isinstance(value, np.ndarray):
            found.add("numpy")
        elif hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
            found.add(library(value))
    if len(found) > 1:
        raise LibraryError(
            f"{function}: the arguments are arrays of different libraries ({', '.join(sorted(found))}); convert them "
            "to one"
        )
    return next(iter(found - {"numpy"}), None)


def library(array: Any) -> str:
    """The name of the top-level package that an array's type comes from."""
    for kind in type(array).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("torch", "cupy", "jax", "tensorflow", "paddle", "mlx"):
            return root
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def _call_through_dlpack(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("save") or kwargs.get("out") is not None:
        option = "save" if kwargs.get("save") else "out"
        raise LibraryError(
            f"{function.__name__}: {option}= is not available for arrays of {name}, which are served forward only; "
            "pass "
            "NumPy arrays (for instance numpy.from_dlpack(x))"
        )
    example = next(v for v in _leaves((*args, *kwargs.values())) if hasattr(v, "__dlpack__"))

    def convert(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(convert, value))
        return to_numpy(function.__name__, value) if hasattr(value, "__dlpack__") else value

    result = function(*map(convert, args), **{k: convert(v) for k, v in kwargs.items()})
    return from_numpy(result, example)


def to_numpy(function: str, array: Any) -> np.ndarray[Any, Any]:
    """A view of a foreign array in the CPU's memory; it is only read."""
    name = library(array)
    if getattr(array, "requires_grad", False):
        raise LibraryError(
            f"{function}: a {name} array requires a gradient, which would be lost here; pass x.detach(), or use NumPy "
            "arrays with save=True and the backward function"
        )
    try:
        device = array.__dlpack_device__()[0]
        if device not in _CPU_DEVICES:
            raise LibraryError(
                f"{function}: a {name} array is on device type {int(device)} of DLPack; this version computes on the "
                "CPU: move it there"
            )
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, LibraryError):
            raise
        if "bfloat16" in str(getattr(array, "dtype", "")):
            raise DtypeError(
                f"{function}: NumPy cannot take bfloat16 from {name} through DLPack; convert the arrays to float32"
            ) from None
        raise LibraryError(f"{function}: a {name} array cannot be read through DLPack: {error}") from None


def from_numpy(value: Any, example: Any) -> Any:
    """NumPy results (arrays, or tuples, dicts of them) in the library of `example`."""
    if isinstance(value, tuple):
        return tuple(from_numpy(v, example) for v in value)
    if isinstance(value, dict):
        return {k: from_numpy(v, example) for k, v in value.items()}
    importer = _importer(example)
    return importer(value) if isinstance(value, np.ndarray) and importer else value


def _importer(example: Any) -> Callable[[Any], Any] | None:
    """The function `from_dlpack` of the library of `example`, None where it has none."""
    name = library(example)
    if name == "tensorflow":  # takes a capsule
        dlpack = sys.modules["tensorflow"].experimental.dlpack
        return lambda array: dlpack.from_dlpack(array.__dlpack__())
    candidates = [sys.modules.get(f"{name}.numpy") if name == "jax" else None, sys.modules.get(name)]
    if hasattr(example, "__array_namespace__"):
        candidates.append(example.__array_namespace__())
    return next((found for m in candidates if (found := getattr(m, "from_dlpack", None))), None)


def like(function: str, value: Any, example: Any) -> Any:
    """NumPy results in the library of `example`; None and NumPy arrays leave them as they are."""
    if example is None or isinstance(example, np.ndarray):
        return value
    if not hasattr(example, "__dlpack__"):
        raise ArgumentError(
            f"{function}: like must be an array (got {type(example).__qualname__}); leave it out for NumPy arrays"
        )
    return from_numpy(value, example)
