"""Passes that are planned without arrays, which spots stand for, and run on arrays of these layouts again and again.

They are planned as those of any call (see `recurrence`), to which spots have memory and addresses, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from . import abi, recurrence
from .library import Library, NDArray
from .prepared import Prepared, place
from .recurrence import Operands
from .variant import Variant


class Spot(NamedTuple):
    """A C-contiguous array that is not there: the `number`-th of a planned pass, if that has a number for it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    number: int = -1

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def of(array: NDArray | None) -> Spot | None:
    """A spot for an array of that layout; None of None."""
    return None if array is None else Spot(tuple(array.shape), np.dtype(array.dtype))


def of_operands(given: Operands) -> list[Any]:
    """What is there of operands, arrays or spots, else None: the declared arrays, then those of a product, states,
    lengths, mask, reset."""
    return [*given.arrays.values(), *(given.product or ()), *given.c0, given.lengths, given.mask, given.reset]


class Spots:
    """What a recurrence on `library` asks of a library (see `library.Library`), with spots for arrays."""

    def __init__(self, library: Library, constants: Sequence[float]) -> None:
        self.device, self.row_padding = library.device, library.row_padding
        self._constants, self._all = len(constants), list[Spot]()

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Spot:
        self._all.append(Spot(tuple(shape), np.dtype(dtype), len(self._all)))
        return self._all[-1]

    def pointer(self, spot: Spot | None) -> int:
        return 0 if spot is None else place(self._constants + spot.number)

    def numbered(self, spot: Spot | None) -> Any:
        return None if spot is None else self.empty(spot.shape, spot.dtype)

    def operands(self, given: Operands) -> Operands:
        """The same with numbered spots, in the order of `of_operands`."""
        arrays = {name: self.numbered(spot) for name, spot in given.arrays.items()}
        others = [self.numbered(spot) for spot in of_operands(given)[len(arrays) :]]
        library: Any = self
        constants = [place(i) for i in range(self._constants)]
        return replace(given.on(arrays, others), library=library, constants=constants)

    def plan(self, variant: Variant, arguments: abi.Forward | abi.Backward, given: int) -> Plan:
        """That of a pass on these spots, of which the first `given` are given to it."""
        prepared = Prepared(variant, arguments, self._constants + len(self._all), self.device)
        return Plan(prepared, [(spot.shape, spot.dtype) for spot in self._all[given:]])

    def __len__(self) -> int:
        return len(self._all)


class Plan(NamedTuple):
    """How a pass runs, shapes and dtypes of what it allocates, and which of these gradients are."""

    prepared: Prepared
    allocated: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]
    gradients: Mapping[str, int] = {}
    dc0: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class Planned:
    """A pass that is planned when it first runs, since many calls never come again."""

    library: Library
    constants: Sequence[float]
    make: Callable[[], Plan]

    @cached_property
    def plan(self) -> Plan:
        return self.make()

    def run(self, at: Sequence[int]) -> list[NDArray]:
        """Runs it on arrays at these addresses, in its order. Returns what it allocates."""
        library, plan = self.library, self.plan
        allocated = [library.empty(shape, dtype) for shape, dtype in plan.allocated]
        plan.prepared.run([*self.constants, *at, *map(library.pointer, allocated)], library.stream())
        return allocated


def forward(operands: Operands, every: int, saved_dtype: str, h: NDArray, last: Sequence[NDArray]) -> Planned:
    """What is given to it: the operands that are there, then results such as `h` and `last`. It allocates the kept
    states first."""
    make = partial(_forward, _without_arrays(operands), every, saved_dtype, [of(array) for array in (h, *last)])
    return Planned(operands.library, operands.constants, make)


def backward(
    operands: Operands,
    saved: Sequence[NDArray],
    every: int,
    dh: NDArray,
    dc_last: Sequence[NDArray | None],
    need: Collection[str],
) -> Planned:
    """What is given to it: the operands that are there, the kept states, `dh` and those of `dc_last` that are there."""
    kept, seeds = [of(array) for array in saved], [of(array) for array in (dh, *dc_last)]
    make = partial(_backward, _without_arrays(operands), kept, every, seeds, need)
    return Planned(operands.library, operands.constants, make)


def _without_arrays(given: Operands) -> Operands:
    arrays = {name: of(array) for name, array in given.arrays.items()}
    return given.on(arrays, [of(array) for array in of_operands(given)[len(arrays) :]])


def _forward(operands: Operands, every: int, saved_dtype: str, results: Sequence[Spot | None]) -> Plan:
    spots = Spots(operands.library, operands.constants)
    numbered, (h, *last) = spots.operands(operands), [spots.numbered(spot) for spot in results]
    given = len(spots)
    made = recurrence.prepared_forward(numbered, every, saved_dtype, h, last)
    return spots.plan(made.variant, made.arguments, given)


def _backward(
    operands: Operands, kept: Sequence[Spot | None], every: int, seeds: Sequence[Spot | None], need: Collection[str]
) -> Plan:
    spots = Spots(operands.library, operands.constants)
    numbered, saved = spots.operands(operands), [spots.numbered(spot) for spot in kept]
    dh, *dc_last = [spots.numbered(spot) for spot in seeds]
    given = len(spots)
    made = recurrence.prepared_backward(numbered, saved, every, dh, dc_last, need)
    gradients = {name: spot.number - given for name, spot in made.gradients.items()}
    dc0 = [spot.number - given for spot in made.dc0]
    return spots.plan(made.variant, made.arguments, given)._replace(gradients=gradients, dc0=dc0)
