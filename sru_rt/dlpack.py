"""Calls with arrays of libraries that the core does not know, through DLPack: forward only.

Arrays in the memory of the CPU become NumPy arrays, those on a CUDA device CuPy arrays, without a copy.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from .errors import DtypeError, LibraryError

_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost of the DLPack standard
_CUDA_DEVICES = (2, 13)  # kDLCUDA and kDLCUDAManaged

_CUPY_WITH_BFLOAT16 = (14, 1)  # earlier ones crash on it


def is_foreign(value: Any) -> bool:
    """Whether it is an array of another library than NumPy."""
    return hasattr(value, "__dlpack__") and not isinstance(value, (np.ndarray, np.generic, type))


def library(array: Any) -> str:
    """The name of the top-level package that an array's type comes from."""
    for kind in type(array).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("torch", "cupy", "jax", "tensorflow", "paddle", "mlx"):
            return root
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def on_cuda(array: Any) -> bool:
    """Whether an array says that it is on a CUDA device."""
    try:
        return int(array.__dlpack_device__()[0]) in _CUDA_DEVICES
    except Exception:  # what is wrong with it is said where it is converted
        return False


def each_array(value: Any, convert: Callable[[Any], Any]) -> Any:
    """`value` with the arrays in it (tuples, dicts) converted."""
    if isinstance(value, tuple):
        return tuple(each_array(v, convert) for v in value)
    if isinstance(value, dict):
        return {k: each_array(v, convert) for k, v in value.items()}
    return convert(value) if hasattr(value, "dtype") else value


def call(
    function: Callable[..., Any],
    name: str,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    example: Any,
) -> Any:
    """Calls a function on NumPy or CuPy arrays with views of foreign ones; results are of the library of `example`."""
    on_device = next(filter(on_cuda, _foreign((*args, *kwargs.values()))), None)
    convert = to_numpy if on_device is None else to_cupy
    _refuse_options(name, kwargs, example, "NumPy" if on_device is None else "CuPy")

    def converted(argument: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(converted(f"{argument}[{i}]", v) for i, v in enumerate(value))
        if not is_foreign(value):
            return value
        if argument == "lengths" and not on_cuda(value):  # the core takes them from the host too
            return to_numpy(name, argument, value)
        return convert(name, argument, value)

    names += ("an argument",) * len(args)  # of too many arguments the function itself complains
    with nullcontext() if on_device is None else _current(name, on_device):
        positional = map(converted, names, args)
        result = function(*positional, **{argument: converted(argument, value) for argument, value in kwargs.items()})
        return give_back(name, result, example)


def _foreign(values: Any) -> Iterator[Any]:
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from _foreign(value)
    elif is_foreign(values):
        yield values


def _refuse_options(function: str, kwargs: dict[str, Any], example: Any, core: str) -> None:
    for option in ("save", "out"):
        if kwargs.get(option) is not None and kwargs[option] is not False:
            raise LibraryError(
                f"{function}: {option}= is not available for arrays of {library(example)}, which are served "
                f"forward only; pass {core} arrays (for instance {core.lower()}.from_dlpack(x))"
            )


@contextmanager
def _current(function: str, array: Any) -> Iterator[Any]:
    """Makes the CUDA device of a foreign array CuPy's current one."""
    name, device = library(array), int(array.__dlpack_device__()[1])
    cupy = _cupy(function, name)
    with cupy.cuda.Device(device):
        try:
            yield cupy
        finally:
            # What the stream of this library is, nobody says. It may use the memory of the arrays anew as soon as our
            # views of them are gone.
            cupy.cuda.get_current_stream().synchronize()


def _cupy(function: str, name: str) -> Any:
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # a CuPy that does not go with the driver fails in many ways
        raise LibraryError(
            f"{function}: arrays of {name} on a CUDA device are served through CuPy, which does not work here "
            f"({error}); install it with pip install 'sru_rt[cuda12]', or 'sru_rt[cuda13]' where {name} is built for "
            "CUDA 13, or move the arrays to the CPU"
        ) from None
    return cupy


def to_numpy(function: str, argument: str, array: Any) -> np.ndarray[Any, Any]:
    """A view of a foreign array in the CPU's memory; it is only read."""
    name, array = library(array), _with_values(function, argument, array)
    try:
        device = int(array.__dlpack_device__()[0])
        if device in _CPU_DEVICES:
            return np.from_dlpack(array)
    except Exception as error:
        if _is_bfloat16(array):
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
        "DLPack); this version computes on the CPU and on CUDA devices: move it there"
    )


def to_cupy(function: str, argument: str, array: Any) -> Any:
    """A view of a foreign array on a CUDA device, in order on CuPy's current stream; it is only read."""
    name, array = library(array), _with_values(function, argument, array)
    if not on_cuda(array):
        raise LibraryError(
            f"{function}: {argument} is an array of {name} on device {getattr(array, 'device', 'cpu')}, but others are "
            "on a CUDA device; move it there"
        )
    cupy = sys.modules["cupy"]
    try:
        if _is_bfloat16(array) and _version(cupy) < _CUPY_WITH_BFLOAT16:
            raise TypeError(f"this is CuPy {cupy.__version__}")
        return cupy.from_dlpack(array)
    except Exception as error:
        if _is_bfloat16(array):
            raise DtypeError(
                f"{function}: {argument} has dtype bfloat16, which CuPy takes through DLPack from version 14.1 on, "
                f"with the package ml_dtypes ({error}); install both, or convert the arrays to float32"
            ) from None
        raise LibraryError(
            f"{function}: {argument} is an array of {name} that cannot be read through DLPack ({error}); pass a dense "
            "one"
        ) from None


def _with_values(function: str, argument: str, array: Any) -> Any:
    """An array whose memory holds all that it stands for: without a gradient."""
    name = library(array)
    if getattr(array, "requires_grad", False):
        raise LibraryError(
            f"{function}: {argument} is an array of {name} that requires a gradient, which would be lost here; use "
            f"{'CuPy' if on_cuda(array) else 'NumPy'} arrays with save=True and the backward function"
        )
    return array


def _is_bfloat16(array: Any) -> bool:
    return "bfloat16" in str(getattr(array, "dtype", ""))


def _version(module: Any) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(number) for number in re.findall(r"\d+", module.__version__)[:2])


def give_back(function: str, value: Any, example: Any) -> Any:
    """Results (arrays, or tuples, dicts of them) in the library of `example`."""
    importer = _importer(example)

    def imported(array: Any) -> Any:
        try:
            return importer(array) if importer else array
        except Exception as error:
            raise DtypeError(
                f"{function}: results of dtype {array.dtype.name} cannot be given to {library(example)} through DLPack "
                f"({error}); ask for float32, and convert"
            ) from None

    return each_array(value, imported)


def _importer(example: Any) -> Callable[[Any], Any] | None:
    """The function `from_dlpack` of the library of `example`, None where it has none."""
    name = library(example)
    if name == "tensorflow":  # takes a capsule
        dlpack = sys.modules["tensorflow"].experimental.dlpack
        return lambda array: dlpack.from_dlpack(array.__dlpack__())
    candidates = [example.__array_namespace__()] if hasattr(example, "__array_namespace__") else []
    candidates.append(sys.modules.get(name))
    return next((found for m in candidates if (found := getattr(m, "from_dlpack", None))), None)


def like(function: str, value: Any, example: Any) -> Any:
    """NumPy results in the library of a foreign array, on its device."""
    try:
        device = int(example.__dlpack_device__()[0])
    except Exception as error:
        raise LibraryError(
            f"{function}: like is an array of {library(example)} without DLPack's device ({error}); pass another"
        ) from None
    if device in _CUDA_DEVICES:
        with _current(function, example) as cupy:
            return give_back(function, each_array(value, cupy.asarray), example)
    if device not in _CPU_DEVICES:
        raise LibraryError(
            f"{function}: like is on device {getattr(example, 'device', '')} (type {device} of DLPack); this "
            "version makes arrays on the CPU and on CUDA devices: pass one that is there, and move the results"
        )
    return give_back(function, value, example)
