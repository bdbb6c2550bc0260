"""Which library the arguments of a call belong to, and the ways in for each.

NumPy and CuPy arrays go to the core as they are, others through DLPack (see `dlpack`). A library is looked up by the
name of the type's module and never imported: whoever holds its arrays has imported it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from . import dlpack, repeat, replay
from . import library as libraries
from .errors import ArgumentError, LibraryError

F = TypeVar("F", bound=Callable[..., Any])


def array_function(function: F) -> F:
    """Lets a function on NumPy or CuPy arrays take arrays of any library with `__dlpack__`.

    Results come back in the library that was given, where it can import DLPack, else as NumPy or CuPy arrays. CuPy's
    current device is the arrays' own during the call.
    """

    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def on_any_arrays(*args: Any, **kwargs: Any) -> Any:
        return call(function, function.__name__, names, args, kwargs)

    return on_any_arrays  # type: ignore[return-value]


def call(
    function: Callable[..., Any], name: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls a function on NumPy or CuPy arrays, called `name` and with parameters `names`, with arrays of any library.

    See `array_function`.
    """
    key, given = (None, ()) if replay.is_recording() else repeat.key(function, args, kwargs)
    if key is None:
        return _call(function, name, names, args, kwargs)
    known = repeat.known(key)
    results = None if known is None else known(given)
    if results is not None:
        return results
    with repeat.asked(key, given, names, args, kwargs):
        return _call(function, name, names, args, kwargs)


def _call(
    function: Callable[..., Any], name: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    found = {kind for value in _leaves((*args, *kwargs.values())) if (kind := _library_of(value))}
    if found <= {"numpy"}:
        return function(*args, **kwargs)
    named = [*zip(names, args), *kwargs.items()]
    example = next(filter(dlpack.is_foreign, _leaves((*args, *kwargs.values()))))
    own = libraries.of(example)
    on_device = own is not None or dlpack.on_cuda(example)
    checked = [(n, value) for n, value in named if not (on_device and _are_host_lengths(n, value))]
    if len({_library_of(leaf) for _, value in checked for leaf in _leaves([value])} - {None}) > 1:
        raise _mixed(name, checked)
    if own is not None:
        with own.current():
            return function(*args, **kwargs)
    return dlpack.call(function, name, names, args, kwargs, example)


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
    return dlpack.library(value) if dlpack.is_foreign(value) else None


def _are_host_lengths(name: str, value: Any) -> bool:
    """The lengths of sequences that are on a GPU are often known to the host."""
    return name == "lengths" and isinstance(value, np.ndarray)


def _mixed(function: str, named: Sequence[tuple[str, Any]]) -> LibraryError:
    by_library: dict[str, list[str]] = {}
    for name, value in named:
        for found in dict.fromkeys(filter(None, map(_library_of, _leaves([value])))):
            by_library.setdefault(found, []).append(name)
    text = "; ".join(f"{', '.join(names)} of {found}" for found, names in by_library.items())
    return LibraryError(f"{function}: the arguments are arrays of different libraries ({text}); convert them to one")


def like(function: str, value: Any, example: Any) -> Any:
    """NumPy results in the library of `example`, on its device; None and NumPy arrays leave them as they are."""
    if example is None or isinstance(example, np.ndarray):
        return value
    if not dlpack.is_foreign(example):
        raise ArgumentError(
            f"{function}: like must be an array (got {type(example).__qualname__}); leave it out for NumPy arrays"
        )
    own = libraries.of(example)
    if own is None:
        return dlpack.like(function, value, example)
    with own.current():
        return dlpack.each_array(value, own.from_host)
