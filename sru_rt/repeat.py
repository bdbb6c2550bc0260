"""Calls like one before: what was checked and planned for the first is not checked and planned again.

Two calls are alike if nothing but addresses and values of arrays differs. A call is remembered if its arrays lie as
kernels take them, in whatever dtype, and if it keeps nothing for a backward; nor may there be lengths, of which the
values are checked, or `out`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import library as libraries
from . import settings, spec
from .dtypes import name_of, to_numpy
from .inputs import Input
from .library import Library, NDArray
from .options import Options
from .passes import Call, Layout, Pass, Passes, declared
from .projection import Projection
from .recurrence import Operands

_MOST = 4096
_PLAIN = (bool, int, float, str, type(None))
_CONTIGUOUS_AND_ALIGNED = 0x101  # of NumPy's flags

_repeats: dict[Hashable, Repeat] = {}


class _Place(NamedTuple):
    """Where an operand is among the arguments, and the dtype that it must be converted to, if it must."""

    position: int
    dtype: np.dtype[Any] | None

    def of(self, given: Sequence[Any], library: Library) -> NDArray:
        array = given[self.position]
        return array if self.dtype is None else library.contiguous(array, self.dtype)


@dataclass(frozen=True, eq=False)
class Repeat:
    """A call of which all but addresses and values is settled.

    `operands` says where those of the recurrence (see `passes`) are among the arguments, None of what is not there;
    where U is formed from x, x stands for it, and `factor` is the position of the weight.
    """

    call: Call
    made: Pass
    library: Library
    operands: Sequence[_Place | None]
    factor: int | None
    window: int
    one_token: bool

    def __call__(self, given: Sequence[Any]) -> tuple[Any, ...]:
        """The results of a call with these arguments."""
        library = self.library
        pointer, empty = library.pointer, library.empty
        with library.current():
            o: list[Any] = [None if place is None else place.of(given, library) for place in self.operands]
            if self.factor is not None:
                o[0] = self._u(o[0], given[self.factor], o[3], o[4])
            results: list[Any] = [None if r is None else empty(*r) for r in self._results]
            addresses = [*self.call.constants, *map(pointer, o), *map(pointer, results)]
            self.made.prepared.run(addresses, library.stream())
        h, last, *_ = results
        return h[0] if self.one_token else h, tuple(last) if self._has_several_states else last

    def _u(self, x: NDArray, factor: NDArray, mask: NDArray | None, reset: NDArray | None) -> NDArray:
        x = x[None] if self.one_token else x
        projection = Projection(self.library, x, (factor,), self.window, None, mask, reset)
        return projection.u(self.library.workspace if self.one_token else self.library.empty)

    @cached_property
    def _results(self) -> list[tuple[tuple[int, ...], np.dtype[Any]] | None]:
        return [None if r is None else (r.shape, to_numpy(r.dtype)) for r in self.made.results]

    @cached_property
    def _has_several_states(self) -> bool:
        return len(spec.cell_of(self.call.cell).state) > 1


class _Asked(threading.local):
    """The call that a thread is at, if it is to be remembered: its key, and its arguments by name."""

    key: Hashable = None
    arguments: Mapping[str, Any] | None = None


_asked = _Asked()


def key(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What calls that are alike have in common; None of a call that is like no other."""
    found: list[Any] = [function, settings.of_calls(), len(args), *kwargs]
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind is np.ndarray:
            if value.flags.num & _CONTIGUOUS_AND_ALIGNED != _CONTIGUOUS_AND_ALIGNED:
                return None
            found.append((value.shape, value.dtype))
        elif kind in _PLAIN:
            found.append((kind, value))
        else:
            layout = _on_gpu(kind, value)
            if layout is None:
                return None
            found.append(layout)
    return tuple(found)


def _on_gpu(kind: type, array: Any) -> Hashable:
    """Layout and device of an array of CuPy; None if kernels do not take it as it is, or of anything else."""
    if kind is not getattr(sys.modules.get("cupy"), "ndarray", None):
        return None
    library: Any = libraries.of(array)
    return None if library.not_writable(array) else (array.shape, array.dtype, library.device)


def known(key: Hashable) -> Repeat | None:
    return _repeats.get(key)


@contextmanager
def asked(key: Hashable, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While a call of this key runs, which is to be remembered if it can be."""
    before = _asked.key, _asked.arguments
    _asked.key, _asked.arguments = key, {**dict(zip(names, args)), **kwargs}
    try:
        yield
    finally:
        _asked.key, _asked.arguments = before


def remember(
    operands: Operands, names: Mapping[str, str], options: Options, projected: Input | None, every: int
) -> None:
    """Remembers the call that this thread is at, if it is one that can be.

    Args:
        names: what the function calls arrays that the cell declares under other names.
    """
    if _asked.key is None or every or options.out is not None or options.lengths is not None:
        return
    cell, library = operands.cell, operands.library
    (u,) = (a.name for a in cell.arrays if a.kind == "gates")
    first = ("x", projected.x) if projected else (u, operands.arrays[u])
    state = operands.c0[0] if len(cell.state) == 1 else None
    if state is None and any(a is not None for a in operands.c0):
        return
    arrays = [(a.name, operands.arrays[a.name]) for a in declared(cell)]
    named = [first, (cell.initial, state), ("lengths", None), ("mask", operands.mask), ("reset", operands.reset)]
    places = [_place(names.get(name, name), array, library) for name, array in (*named, *arrays)]
    factor = _place("weight", projected.factors[0], library) if projected else None
    if any(array is not None and place is None for (_, array), place in zip((*named, *arrays), places)):
        return
    if projected and (factor is None or len(projected.factors) > 1 or projected.source.shape != projected.x.shape):
        return
    o = [operands.arrays[u], state, None, operands.mask, operands.reset, *(array for _, array in arrays)]
    call = Call(spec.text_of(cell), tuple(operands.constants), 1, str(options.time_parallel), keep=False)
    layouts = [None if a is None else Layout(tuple(a.shape), name_of(a.dtype)) for a in o]
    if len(_repeats) >= _MOST:
        _repeats.clear()
    _repeats[_asked.key] = Repeat(
        call,
        Passes(call, layouts, library.device).forward(),
        library,
        places,
        factor and factor.position,
        projected.window if projected else 1,
        options.in_workspace,
    )


def _place(name: str, array: NDArray | None, library: Library) -> _Place | None:
    """Where what became a kernel's array was given; None if it is a copy of another order."""
    if array is None:
        return None
    for i, (given_name, given) in enumerate((_asked.arguments or {}).items()):
        if given_name == name and libraries.of(given) is library and given.size == array.size:
            if given.dtype != array.dtype:
                return _Place(i, to_numpy(name_of(array.dtype)))
            return _Place(i, None) if library.pointer(given) == library.pointer(array) else None
    return None
