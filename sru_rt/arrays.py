"""Which library the arguments of a call belong to, and calls with arrays of other libraries through DLPack.

A library is looked up by the name of the type's module and never imported: whoever holds its arrays has imported it.
"""

from __future__ import annotations

import functools
import inspect
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

    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        libraries = {name for value in _leaves((*args, *kwargs.values())) if (name := _library_of(value))}
        if libraries <= {"numpy"}:
            return function(*args, **kwargs)
        if len(libraries) > 1:
            raise _mixed(function.__name__, [*zip(names, args), *kwargs.items()])
        return _call_through_dlpack(function, libraries.pop(), names, args, kwargs)

    return call  # type: ignore[return-value]


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


def _library_of(value: Any) -> str | None:
    """The library of an array, None of anything else."""
    if isinstance(value, np.ndarray):
        return "numpy"
    return library(value) if _is_foreign(value) else None


def _is_foreign(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, (np.ndarray, np.generic, type))


def _mixed(function: str, named: Iterable[tuple[str, Any]]) -> LibraryError:
    by_library: dict[str, list[str]] = {}
    for name, value in named:
        for found in dict.fromkeys(filter(None, map(_library_of, _leaves([value])))):
            by_library.setdefault(found, []).append(name)
    text = "; ".join(f"{', '.join(names)} of {found}" for found, names in by_library.items())
    return LibraryError(f"{function}: the arguments are arrays of different libraries ({text}); convert them to one")


def library(array: Any) -> str:
    """The name of the top-level package that an array's type comes from."""
    for kind in type(array).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("torch", "cupy", "jax", "tensorflow", "paddle", "mlx"):
            return root
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def _call_through_dlpack(
    function: Callable[..., Any],
    library_name: str,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    for option in ("save", "out"):
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise LibraryError(
                f"{function.__name__}: {option}= is not available for arrays of {library_name}, which are served "
                "forward only; pass NumPy arrays (for instance numpy.from_dlpack(x))"
            )
    example = next(filter(_is_foreign, _leaves((*args, *kwargs.values()))))

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(convert(f"{name}[{i}]", v) for i, v in enumerate(value))
        return to_numpy(function.__name__, name, value) if _is_foreign(value) else value

    names += ("an argument",) * len(args)  # of too many arguments the function itself complains
    result = function(*map(convert, names, args), **{name: convert(name, value) for name, value in kwargs.items()})
    return from_numpy(function.__name__, result, example)


def to_numpy(function: str, argument: str, array: Any) -> np.ndarray[Any, Any]:
    """A view of a foreign array in the CPU's memory; it is only read."""
    name = library(array)
    if getattr(array, "requires_grad", False):
        array = _without_gradient(function, argument, name, array)
    kind = type(array).__name__
    if kind == "FakeTensor" or (name == "jax" and "Tracer" in kind):
        raise LibraryError(
            f"{function}: {argument} is a {kind} of {name}, which has no values; this function cannot be traced (by "
            "jit, grad, vmap or compile): call it outside of them, on arrays with values"
        )
    if name == "torch" and array.is_neg():
        array = array.resolve_neg()  # DLPack would leave the sign out
    try:
        device = int(array.__dlpack_device__()[0])
        if device in _CPU_DEVICES:
            return np.from_dlpack(array)
    except Exception as error:
        if "bfloat16" in str(getattr(array, "dtype", "")):
            raise DtypeError(
                f"{function}: {argument} has dtype bfloat16, which NumPy cannot take from {name} through DLPack; "
                "convert the arrays to float32"
            ) from None
        raise LibraryError(
            f"{function}: {argument} is an array of {name} that cannot be read through DLPack ({error}); pass a dense "
            "one in the memory of the CPU"
        ) from None
    raise LibraryError(
        f"{function}: {argument} is an array of {name} on device {getattr(array, 'device', '')} (type {device} of "
        "DLPack); this version computes on the CPU: move it there"
    )


def _without_gradient(function: str, argument: str, name: str, array: Any) -> Any:
    if name == "torch" and not sys.modules["torch"].is_grad_enabled():
        return array.detach()
    raise LibraryError(
        f"{function}: {argument} is an array of {name} that requires a gradient, which would be lost here; pass "
        f"{argument}.detach(), or use NumPy arrays with save=True and the backward function"
    )


def from_numpy(function: str, value: Any, example: Any) -> Any:
    """NumPy results (arrays, or tuples, dicts of them) in the library of `example`."""
    if isinstance(value, tuple):
        return tuple(from_numpy(function, v, example) for v in value)
    if isinstance(value, dict):
        return {k: from_numpy(function, v, example) for k, v in value.items()}
    importer = _importer(example)
    if not isinstance(value, np.ndarray) or importer is None:
        return value
    try:
        return importer(value)
    except Exception as error:
        raise DtypeError(
            f"{function}: results of dtype {value.dtype.name} cannot be given to {library(example)} through DLPack "
            f"({error}); ask for float32, and convert"
        ) from None


def _importer(example: Any) -> Callable[[Any], Any] | None:
    """The function `from_dlpack` of the library of `example`, None where it has none."""
    name = library(example)
    if name == "tensorflow":  # takes a capsule
        dlpack = sys.modules["tensorflow"].experimental.dlpack
        return lambda array: dlpack.from_dlpack(array.__dlpack__())
    candidates = [example.__array_namespace__()] if hasattr(example, "__array_namespace__") else []
    candidates += [sys.modules.get(f"{name}.numpy") if name == "jax" else None, sys.modules.get(name)]
    return next((found for m in candidates if (found := getattr(m, "from_dlpack", None))), None)


def like(function: str, value: Any, example: Any) -> Any:
    """NumPy results in the library of `example`; None and NumPy arrays leave them as they are."""
    if example is None or isinstance(example, np.ndarray):
        return value
    if not _is_foreign(example):
        raise ArgumentError(
            f"{function}: like must be an array (got {type(example).__qualname__}); leave it out for NumPy arrays"
        )
    try:
        device = int(example.__dlpack_device__()[0])
    except Exception as error:
        raise LibraryError(
            f"{function}: like is an array of {library(example)} without DLPack's device ({error}); pass another"
        ) from None
    if device not in _CPU_DEVICES:
        raise LibraryError(
            f"{function}: like is on device {getattr(example, 'device', '')} (type {device} of DLPack); this "
            "version makes arrays on the CPU: pass one that is there, and move the results"
        )
    return from_numpy(function, value, example)
