"""Passes that are planned without arrays, which spots stand for, and run on arrays of these layouts again and again.

They are planned as those of any call (see `recurrence`), to which spots have memory and addresses, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import abi, recurrence
from .library import Library, NDArray
from .prepared import Prepared, place
from .recurrence import Operands
from .variant import Variant


class Spot(NamedTuple):
    """A C-contiguous array that is not there yet: the `number`-th of a planned pass."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    number: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


class Spots:
    """What a recurrence on `library` asks of a library (see `library.Library`), with spots for arrays."""

    def __init__(self, library: Library, constants: Sequence[float]) -> None:
        self.device, self.row_padding = library.device, library.row_padding
        self.constants, self.all = constants, list[Spot]()

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Spot:
        self.all.append(Spot(tuple(shape), np.dtype(dtype), len(self.all)))
        return self.all[-1]

    def pointer(self, spot: Spot | None) -> int:
        return 0 if spot is None else place(len(self.constants) + spot.number)

    def like(self, array: NDArray | None) -> Spot | None:
        return None if array is None else self.empty(array.shape, array.dtype)

    def operands(self, given: Operands) -> Operands:
        """The same with spots for arrays, in the order of `of_operands`."""
        names, like = [*given.arrays], self.like
        spots = [*map(like, of_operands(given, names))]
        library: Any = self
        places = [place(i) for i in range(len(self.constants))]
        n = len(names)
        return replace(given.on(dict(zip(names, spots)), spots[n:]), library=library, constants=places)

    def planned(self, variant: Variant, arguments: abi.Forward | abi.Backward, given: int) -> Planned:
        """A pass on these spots, of which the first `given` are given to it."""
        prepared = Prepared(variant, arguments, len(self.constants) + len(self.all), self.device)
        return Planned(prepared, self.constants, [(spot.shape, spot.dtype) for spot in self.all[given:]])


def of_operands(given: Operands, names: Sequence[str]) -> list[Any]:
    """All arrays of operands, None of what is not there: those of the names, then states, lengths, mask, reset."""
    arrays = given.arrays
    return [*[arrays[name] for name in names], *given.c0, given.lengths, given.mask, given.reset]


class Planned(NamedTuple):
    """A pass of which all but its arrays is settled."""

    prepared: Prepared
    constants: Sequence[float]
    allocated: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]

    def run(self, library: Library, at: Sequence[int]) -> list[NDArray]:
        """Runs it on arrays at these addresses, in its order. Returns what it allocates."""
        empty = library.empty
        allocated = [empty(shape, dtype) for shape, dtype in self.allocated]
        self.prepared.run([*self.constants, *at, *map(library.pointer, allocated)], library.stream())
        return allocated


def forward(operands: Operands, every: int, saved_dtype: str, h: NDArray, last: Sequence[NDArray]) -> Planned:
    """What is given to it: the operands that are there, results such as `h` and `last`. It allocates the kept states
    first."""
    spots = Spots(operands.library, operands.constants)
    on_spots, results = spots.operands(operands), [*map(spots.like, (h, *last))]
    given = len(spots.all)
    made = recurrence.prepared_forward(on_spots, every, saved_dtype, results[0], results[1:])
    return spots.planned(made.variant, made.arguments, given)


class PlannedBackward(NamedTuple):
    """`gradients` and `dc0` say which of the arrays that it allocates these are."""

    planned: Planned
    gradients: Mapping[str, int]
    dc0: Sequence[int]


def backward(
    operands: Operands,
    saved: Sequence[NDArray],
    every: int,
    dh: NDArray,
    dc_last: Sequence[NDArray | None],
    need: Collection[str],
) -> PlannedBackward:
    """What is given to it: the operands that are there, the kept states, `dh` and those of `dc_last` that are there."""
    spots = Spots(operands.library, operands.constants)
    on_spots = spots.operands(operands)
    kept, seed, last = [*map(spots.like, saved)], spots.like(dh), [*map(spots.like, dc_last)]
    given = len(spots.all)
    made = recurrence.prepared_backward(on_spots, kept, every, seed, last, need)
    planned = spots.planned(made.variant, made.arguments, given)
    gradients = {name: spot.number - given for name, spot in made.gradients.items()}
    return PlannedBackward(planned, gradients, [spot.number - given for spot in made.dc0])
