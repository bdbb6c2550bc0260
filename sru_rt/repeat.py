"""Calls like one before: what was checked and planned for the first is not checked and planned again.

Two calls are alike if nothing but addresses and values of arrays differs. A call is remembered if its arrays lie as
kernels take them, in whatever dtype. Two things are looked at anew, as they depend on addresses and values: whether
`out` overlaps anything, and `lengths`. A call where they are not as they should be goes the ordinary way. Backwards are
alike if the forwards were whose results they take. On tensors of PyTorch its binding says what is done again.
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
from . import on_cupy, settings, spots
from .again import Backward, Forward, Kept, Lengths, Projected
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
            layout = _layout(kind, value)
            if layout is None:
                return False
            found.append(layout)
            arrays.append(value)
    return True


def _layout(kind: type, array: Any) -> Hashable:
    """Layout and device of an array of CuPy, or of a tensor of PyTorch; None of others, or if it is to be converted."""
    if kind is getattr(sys.modules.get("cupy"), "ndarray", None):
        memory = array.data
        if not array.flags.c_contiguous or memory.ptr % on_cupy.ALIGNMENT:
            return None
        return array.shape, array.dtype, memory.device_id
    torch: Any = sys.modules.get("torch")
    if torch is None or not (kind is torch.Tensor or kind is torch.nn.Parameter):
        return None
    is_dense = array.layout is torch.strided and not array.is_nested
    return (array.shape, array.dtype, array.device) if is_dense else None


def known(key: Hashable) -> Any:
    """The `Forward` or `Backward` of a key, or what a binding has in its place; None if there is none yet."""
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

    def position(self, name: str, array: NDArray, library: Library) -> int | None:
        """Where what became a kernel's array was given; None if it is a copy of another order.

        Lengths are copied in any case, and may be on the host.
        """
        position = self.named.get(name)
        if position is None or name == "lengths":
            return position
        given = self.given[position]
        if libraries.of(given) is not library or given.size != array.size:
            return None
        same = given.dtype != array.dtype or library.pointer(given) == library.pointer(array)
        return position if same else None


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


def arrays_of_call() -> Sequence[NDArray]:
    """The arrays that the call was given which this thread is at, if it is to be remembered; none otherwise."""
    return _asked.given


def remember_call(repeat: Callable[[Sequence[NDArray]], tuple[Any, ...] | None]) -> None:
    """Remembers what gives the results of calls like the one of this thread, None where it must go the ordinary way."""
    if _asked.key is not None:
        _remember(_asked.key, repeat)


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
    given, is_token = _asked.given, options.in_workspace
    projected = None if operands.product else projected
    o = None if _asked.key is None else _positions(names, operands, bool(projected))
    from_x = _projected(projected, operands, o[-3:], is_token) if projected and o else None
    if o is None or (projected and not from_x):
        return saved
    results, new = _results(operands, made, len(given) + bool(projected), is_token)
    read = {*o, *((from_x.x, *from_x.factors) if from_x else ())}
    if not read.union(results).issuperset(range(len(given))):
        return saved  # the value of an array, such as alpha, may be part of what is settled
    saved = replace(saved, kind=object()) if saved else None
    repeat = Forward(
        library=operands.library,
        lengths=Lengths(o[-3], operands.sizes[0]) if o[-3] is not None else None,
        converted=_converted(operands, o),
        projected=from_x,
        made=new,
        planned=spots.forward(operands, saved.every if saved else 0, made.variant.saved_dtype, made.h, made.last),
        order=[*(i for i in o if i is not None), *results],
        results=results,
        sizes=[array.nbytes if i != o[-3] else 0 for i, array in enumerate(given)],
        written=_written(results, o[-3 - len(operands.c0) : -3]),
        kept=_kept(saved, o, operands) if saved else None,
    )
    _remember(_asked.key, repeat)
    return saved


def _positions(names: Mapping[str, str], operands: Operands, forms_u: bool) -> list[int | None] | None:
    """Where operands (see `spots.of_operands`) are among the arrays of this thread's call; None if some are not.

    Where U is formed it is the next array.
    """
    state, n = names.get(operands.cell.initial, operands.cell.initial), len(operands.c0)
    states = [state] if n == 1 else [f"{state}[{i}]" for i in range(n)]
    product = ["x", "weight"] if operands.product else []
    named = [*(names.get(name, name) for name in operands.arrays), *product, *states, "lengths", "mask", "reset"]
    found: list[int | None] = []
    for name, array in zip(named, spots.of_operands(operands)):
        position = None
        if array is not None:
            position = len(_asked.given) if forms_u and name == "u" else _asked.position(name, array, operands.library)
            if position is None:
                return None
        found.append(position)
    return found


def _projected(projected: Input, operands: Operands, flags: Sequence[int | None], is_token: bool) -> Projected | None:
    """Where U comes from; None if that is not among the arrays of this thread's call as it is."""
    library, factors = operands.library, projected.factors
    names = ["weight"] if len(factors) == 1 else [f"weight[{i}]" for i in range(len(factors))]
    x, *found = (_asked.position(n, array, library) for n, array in zip(["x", *names], [projected.x, *factors]))
    there = [i for i in found if i is not None]
    if x is None or len(there) < len(factors) or projected.source.shape != projected.x.shape:
        return None
    return Projected(x, there, projected.window, flags, is_token)


def _results(
    operands: Operands, made: Prepared, n: int, is_token: bool
) -> tuple[list[int], list[tuple[tuple[int, ...], Any]]]:
    """Where h and the last states go, and shapes and dtypes of those that are not given, of which `n` is the first."""
    L, B, D, d = operands.sizes
    states = ["out[1]"] if len(made.last) == 1 else [f"out[1][{i}]" for i in range(len(made.last))]
    shapes = [(B, D * d) if is_token else (L, B, D * d), *((D, B, d) for _ in states)]
    found, new = list[int](), list[tuple[tuple[int, ...], Any]]()
    for name, shape, array in zip(["out[0]", *states], shapes, [made.h, *made.last]):
        if name not in _asked.named:
            new.append((shape, array.dtype))
        found.append(_asked.named.get(name, n + len(new) - 1))
    return found, new


def _written(results: Sequence[int], states: Sequence[int | None]) -> list[tuple[int, int | None]]:
    """The given arrays that are written to, each with the state that it may overwrite."""
    given, found = _asked.given, list[tuple[int, int | None]]()
    for i, state in zip(results, [None, *states]):
        if i < len(given):
            alike = state is not None and given[state].dtype == given[i].dtype
            found.append((i, state if alike else None))
    return found


def _converted(operands: Operands, o: Sequence[int | None]) -> list[tuple[int, np.dtype[Any]]]:
    """The given arrays that kernels take in other dtypes; but lengths."""
    given, found = _asked.given, list[tuple[int, np.dtype[Any]]]()
    for i, array in zip(o, spots.of_operands(operands)):
        if i is not None and i < len(given) and i != o[-3] and given[i].dtype != array.dtype:
            found.append((i, to_numpy(name_of(array.dtype))))
    return found


def _kept(saved: Saved, o: Sequence[int | None], operands: Operands) -> Kept:
    """What is kept for the backward, which has no U if it is to be formed again."""
    given, shapes, n = _asked.given, dict[str, tuple[int, ...]](), len(operands.arrays)
    at = {name: i for name, i in zip(operands.arrays, o) if i is not None and name in saved.operands.arrays}
    for name, i in at.items():
        shape = operands.arrays[name].shape
        if i < len(given) and given[i].shape != shape:
            shapes[name] = shape
    like = saved.on(operands.on({}, [None] * len(o[n:])), (), None)
    return Kept(like, at, shapes, o[n:])


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
    converted = [
        (i, to_numpy(name_of(seed.dtype)))
        for i, (array, seed) in enumerate(zip(given, (seed for seed in seeds if seed is not None)))
        if array.dtype != seed.dtype
    ]
    dh, *last = seeds
    planned = spots.backward(operands, saved.states, saved.every, dh, last, arrays)
    _remember(key, Backward(planned, converted, need))
