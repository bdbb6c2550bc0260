"""Calls like one before: what was checked and planned for the first is not checked and planned again.

Two calls are alike if nothing but addresses and values of arrays differs. A call is remembered if its arrays lie as
kernels take them, in whatever dtype. Two things are looked at anew, as they depend on addresses and values: whether
`out` overlaps anything, and `lengths`. A call where they are not as they should be goes the ordinary way. Backwards are
alike if the forwards were whose results they take.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from . import library as libraries
from . import settings, spots
from .again import Backward, Forward, Lengths, Place, Projected, Result
from .dtypes import name_of, to_numpy
from .inputs import Input
from .library import Library, NDArray
from .options import Options
from .recurrence import Operands, Prepared
from .saved import Saved

_MOST = 4096
_PLAIN = (bool, int, str, type(None))
_CONTIGUOUS_AND_ALIGNED, _WRITEABLE = 0x101, 0x400  # of NumPy's flags
_FLAGS = _CONTIGUOUS_AND_ALIGNED | _WRITEABLE

_repeats: dict[Hashable, Any] = {}


def key(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Hashable, Sequence[NDArray]]:
    """What calls that are alike have in common, None of a call that is like no other; and the arrays of this one."""
    found: list[Any] = [function, settings.of_calls(), len(args), *kwargs]
    arrays: list[NDArray] = []
    return (tuple(found) if _describe((*args, *kwargs.values()), found, arrays) else None), arrays


def key_of_backward(saved: Saved, dh: Any, dc_last: Any, need: Any) -> tuple[Hashable, Sequence[NDArray]]:
    """The same of a backward."""
    found: list[Any] = [saved.kind, settings.of_calls()]
    arrays: list[NDArray] = []
    names = tuple(need) if isinstance(need, (set, frozenset)) else need
    known = saved.kind is not None and _describe((dh, dc_last, names), found, arrays)
    return (tuple(found) if known else None), arrays


def _describe(values: Iterable[Any], found: list[Any], arrays: list[NDArray]) -> bool:
    """Adds what alike calls have in common to `found`, and arrays to `arrays`; false if no call is like this one."""
    for value in values:
        kind = type(value)
        if kind is np.ndarray:
            flags = value.flags.num & _FLAGS
            if flags & _CONTIGUOUS_AND_ALIGNED != _CONTIGUOUS_AND_ALIGNED:
                return False
            found.append((value.shape, value.dtype, flags))
            arrays.append(value)
        elif kind in _PLAIN:
            found.append((kind, value))
        elif kind is float:
            found.append((kind, value.hex()))  # which tells 0.0 from -0.0
        elif kind is tuple or kind is list:
            found.append((kind, len(value)))
            if not _describe(value, found, arrays):
                return False
        else:
            layout = _on_gpu(kind, value)
            if layout is None:
                return False
            found.append(layout)
            arrays.append(value)
    return True


def _on_gpu(kind: type, array: Any) -> Hashable:
    """Layout and device of an array of CuPy; None if kernels do not take it as it is, or of anything else."""
    if kind is not getattr(sys.modules.get("cupy"), "ndarray", None):
        return None
    library: Any = libraries.of(array)
    return None if library.not_writable(array) else (array.shape, array.dtype, library.device)


def known(key: Hashable) -> Any:
    """The `Forward` or `Backward` of a key, None if there is none yet."""
    return _repeats.get(key)


def _remember(key: Hashable, repeat: Any) -> None:
    if len(_repeats) >= _MOST:
        _repeats.clear()
    _repeats[key] = repeat


class _Asked(threading.local):
    """The call that a thread is at, if it is to be remembered: its key, its arrays, and where they are by name."""

    key: Hashable = None
    given: Sequence[NDArray] = ()
    named: Mapping[str, int] = MappingProxyType({})

    def place(self, name: str, array: NDArray, library: Library, keep: bool = False) -> Place | None:
        """Where what became a kernel's array was given; None if it is a copy of another order.

        With `keep` it is to have the shape of the kernel's array.
        """
        position = self.named.get(name, -1)
        given = self.given[position] if position >= 0 else None
        if given is None or libraries.of(given) is not library or given.size != array.size:
            return None
        shape = array.shape if keep and array.shape != given.shape else None
        if given.dtype != array.dtype:
            return Place(position, to_numpy(name_of(array.dtype)), shape)
        return Place(position, None, shape) if library.pointer(given) == library.pointer(array) else None


_asked = _Asked()


@contextmanager
def asked(
    key: Hashable, given: Sequence[NDArray], names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """While a call of this key runs, which is to be remembered if it can be."""
    before = _asked.key, _asked.given, _asked.named
    leaves = [leaf for name, value in (*zip(names, args), *kwargs.items()) for leaf in _leaves(name, value)]
    rest, named = iter(leaves), dict[str, int]()
    for i, array in enumerate(given):  # in the order of the leaves; what has no name the function refuses
        named[next((name for name, value in rest if value is array), "")] = i
    _asked.key, _asked.given, _asked.named = key, given, named
    try:
        yield
    finally:
        _asked.key, _asked.given, _asked.named = before


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in tuples, by names such as ``out[1]``."""
    if isinstance(value, (tuple, list)):
        for i, one in enumerate(value):
            yield from _leaves(f"{name}[{i}]", one)
    else:
        yield name, value


def remember(
    names: Mapping[str, str],
    options: Options,
    projected: Input | None,
    operands: Operands,
    made: Prepared,
    saved: Saved | None,
) -> Saved | None:
    """Remembers the forward that this thread is at, if it is one that can be. Returns `saved`, with its kind then.

    Args:
        names: what the function calls arrays that the cell declares under other names.
    """
    places = None if _asked.key is None else _places(names, projected, operands, keep=saved is not None)
    if places is None:
        return saved
    found, from_x = places
    results = _results(operands, made, found, options.in_workspace)
    there = [*found, *results, *([from_x.x, *from_x.factors] if from_x else [])]
    if len({one.position for one in there if one} - {None}) < len(_asked.given):
        return saved  # the value of an array, such as alpha, may be part of what is settled
    like = None
    if saved is not None:
        saved = replace(saved, kind=object())
        none = [None] * (len(made.last) + 3)
        like = replace(saved, operands=operands.on((), none), states=(), projection=None)
    _remember(
        _asked.key,
        Forward(
            planned=spots.forward(operands, saved.every if saved else 0, made.variant.saved_dtype, made.h, made.last),
            library=operands.library,
            sizes=[0 if i == _asked.named.get("lengths") else array.nbytes for i, array in enumerate(_asked.given)],
            operands=found,
            projected=from_x,
            results=results,
            one_token=options.in_workspace,
            names=tuple(saved.operands.arrays) if saved else (),
            like=like,
        ),
    )
    return saved


def _results(
    operands: Operands, made: Prepared, found: Sequence[Place | Lengths | None], one_token: bool
) -> list[Result]:
    """Where h and the last states go."""
    L, B, D, d = operands.sizes
    shape, n = (B, D * d) if one_token else (L, B, D * d), len(made.last)
    results = [Result(_asked.named.get("out[0]"), shape, made.h.dtype)]
    names = ["out[1]"] if n == 1 else [f"out[1][{i}]" for i in range(n)]
    for name, array, state in zip(names, made.last, found[len(operands.arrays) :]):
        own = state.position if isinstance(state, Place) and state.dtype is None else None
        results.append(Result(_asked.named.get(name), array.shape, array.dtype, own))
    return results


def _places(
    names: Mapping[str, str], projected: Input | None, operands: Operands, keep: bool
) -> tuple[list[Place | Lengths | None], Projected | None] | None:
    """Where operands, and what U is formed from, are among the arrays of this thread's call; None if some are not."""
    cell, library = operands.cell, operands.library
    state, n, u = names.get(cell.initial, cell.initial), len(operands.c0), list(operands.arrays).index("u")
    states = [state] if n == 1 else [f"{state}[{i}]" for i in range(n)]
    named = [*(names.get(name, name) for name in operands.arrays), *states, "lengths", "mask", "reset"]
    arrays = spots.of_operands(operands, [*operands.arrays])
    found: list[Place | Lengths | None] = [
        None if array is None else _asked.place(name, array, library, keep) for name, array in zip(named, arrays)
    ]
    if operands.lengths is not None and "lengths" in _asked.named:
        found[-3] = Lengths(_asked.named["lengths"], operands.sizes[0])
    missing = [i for i, array in enumerate(arrays) if array is not None and found[i] is None]
    if not projected:
        return None if missing else (found, None)
    x = _asked.place("x", projected.x, library)
    weights = ["weight"] if len(projected.factors) == 1 else [f"weight[{i}]" for i in range(len(projected.factors))]
    factors = [_asked.place(name, factor, library) for name, factor in zip(weights, projected.factors)]
    there = [factor for factor in factors if factor]
    if missing != [u] or x is None or len(there) < len(factors) or projected.source.shape != projected.x.shape:
        return None
    return found, Projected(x, there, projected.window, u)


def remember_backward(
    key: Hashable,
    given: Sequence[NDArray],
    saved: Saved,
    operands: Operands,
    seeds: Sequence[NDArray | None],
    arrays: Collection[str],
    need: Collection[str],
) -> None:
    """Remembers a backward of this key, if it is not None.

    Args:
        given: the gradients of h and of the last states that were given.
        seeds: these as kernels take them, None of states that none was given of.
        arrays: names of the arrays whose gradients kernels form.
        need: names of the gradients that are wanted.
    """
    if key is None:
        return
    places, rest = list[Place | None](), iter(enumerate(given))
    for seed in seeds:
        if seed is None:
            places.append(None)
            continue
        position, array = next(rest)
        places.append(Place(position, None if array.dtype == seed.dtype else to_numpy(name_of(seed.dtype))))
    dh, *last = seeds
    planned = spots.backward(operands, saved.states, saved.every, dh, last, arrays)
    _remember(key, Backward(planned, tuple(operands.arrays), places, need))
