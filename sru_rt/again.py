"""What is done for a call like one before (see `repeat`): to allocate, to form U, and to run a planned pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import settings, spots
from .library import Library, NDArray
from .projection import Projection
from .recurrence import Operands
from .saved import Saved


class Place(NamedTuple):
    """Where an operand is among the arrays, and the dtype and shape that it is to have, if it has others."""

    position: int
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None = None

    def of(self, given: Sequence[NDArray], library: Library) -> NDArray:
        array = given[self.position]
        if self.dtype is not None:
            array = library.contiguous(array, self.dtype)
        return array if self.shape is None else array.reshape(self.shape)


class Lengths(NamedTuple):
    """Where lengths are among the arrays, of sequences of up to L steps."""

    position: int
    L: int

    def of(self, given: Sequence[NDArray], library: Library) -> NDArray:
        return library.integers(given[self.position])

    def are_fine(self, given: Sequence[NDArray]) -> bool:
        """Whether the ordinary way takes them, as far as can be told; it does not look at those on a device."""
        array = given[self.position]
        if not isinstance(array, np.ndarray):
            return not settings.debug()
        unsigned = array.astype(np.int64).view(np.uint64)  # in which those below 0 are large
        return bool(np.maximum.reduce(unsigned, initial=0) <= self.L)


class Projected(NamedTuple):
    """Where x and the factors of the weight are among the arrays, and U among the operands."""

    x: Place
    factors: Sequence[Place]
    window: int
    u: int


class Result(NamedTuple):
    """Where a result is to go among the arrays, or an array to allocate; and where a state is that it may overwrite."""

    position: int | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    state: int | None = None

    def to(self, given: Sequence[NDArray], library: Library) -> NDArray:
        return library.empty(self.shape, self.dtype) if self.position is None else given[self.position]


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward of which all but addresses and values of arrays is settled.

    Args:
        sizes: of the arrays that are given, in bytes; 0 of those that results may overlap.
        operands: where those of the recurrence are (see `spots.of_operands`), None of what is not there, or formed.
        results: h and the last states.
        names: of the arrays that are kept for the backward.
        like: what is kept for the backward, but without arrays; None if nothing is.
    """

    planned: spots.Planned
    library: Library
    sizes: Sequence[int]
    operands: Sequence[Place | Lengths | None]
    projected: Projected | None
    results: Sequence[Result]
    one_token: bool
    names: Sequence[str] = ()
    like: Saved | None = None

    def __call__(self, given: Sequence[NDArray]) -> tuple[Any, ...] | None:
        """The results of a call with these arrays; None if it must go the ordinary way."""
        library, lengths = self.library, self.operands[-3]
        if isinstance(lengths, Lengths) and not lengths.are_fine(given):
            return None
        if self._writes and self._overlaps(given):
            return None
        with library.current():
            o = [None if place is None else place.of(given, library) for place in self.operands]
            projection = self._formed(given, o)
            results = [result.to(given, library) for result in self.results]
            allocated = self.planned.run(library, [*o, *results])
        h, *last = results
        found = h, (last[0] if len(last) == 1 else tuple(last))
        return (*found, self._saved(self.like, o, allocated[: len(last)], projection)) if self.like else found

    @cached_property
    def _writes(self) -> bool:
        """Whether it writes to arrays that are given."""
        return any(result.position is not None for result in self.results)

    def _overlaps(self, given: Sequence[NDArray]) -> bool:
        """Whether what is written to overlaps anything else. A state may be updated in place."""
        pointer = self.library.pointer
        at = [(pointer(array), size) if size else (0, 0) for array, size in zip(given, self.sizes)]
        for position, _, _, state in self.results:
            if position is None:
                continue
            begin, size = at[position]
            for i, (other, length) in enumerate(at):
                apart = other + length <= begin or begin + size <= other or (i == state and other == begin)
                if not apart and i != position:
                    return True
        return False

    def _formed(self, given: Sequence[NDArray], o: list[NDArray | None]) -> Projection | None:
        """Puts U among the operands, if it is formed from x."""
        if self.projected is None:
            return None
        library, (x, factors, window, u) = self.library, self.projected
        first = x.of(given, library)
        first = first[None] if self.one_token else first
        projection = Projection(library, first, tuple([f.of(given, library) for f in factors]), window, *o[-3:])
        o[u] = projection.u(library.workspace if self.one_token else library.empty)
        return projection

    def _saved(
        self, like: Saved, o: list[NDArray | None], states: Sequence[NDArray], projection: Projection | None
    ) -> Saved:
        if self.projected and "u" not in self.names:  # it is to be formed again
            del o[self.projected.u]
        operands = like.operands.on(self.names, o)
        return Saved(like.function, like.given, operands, like.sizes, states, like.every, projection, like.kind)


@dataclass(frozen=True, eq=False)
class Backward:
    """A backward of which all but addresses and values of arrays is settled.

    Args:
        names: of the arrays among the operands.
        seeds: where the gradients of h and of the last states are among the arrays, None of those that are zeros.
        need: names of the gradients that are wanted.
    """

    planned: spots.PlannedBackward
    names: Sequence[str]
    seeds: Sequence[Place | None]
    need: Collection[str]

    def __call__(
        self, operands: Operands, states: Sequence[NDArray], given: Sequence[NDArray]
    ) -> tuple[dict[str, NDArray], list[NDArray]]:
        """As `recurrence.backward`."""
        library, (planned, gradients, dc0) = operands.library, self.planned
        seeds = [None if place is None else place.of(given, library) for place in self.seeds]
        allocated = planned.run(library, [*spots.of_operands(operands, self.names), *states, *seeds])
        return {name: allocated[i] for name, i in gradients.items()}, [allocated[i] for i in dc0]
