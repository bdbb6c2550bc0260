"""What is done for a call like one before (see `repeat`): to allocate, to form U, and to run a planned pass.

This is to take little time beside a kernel that takes none, so addresses are asked for once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import settings, spots
from .library import Library, NDArray
from .projection import Projection
from .recurrence import Operands
from .saved import Saved


class Lengths(NamedTuple):
    """Where lengths are among the arrays, of sequences of up to L steps."""

    position: int
    L: int

    def are_fine(self, given: Sequence[NDArray]) -> bool:
        """Whether the ordinary way takes them, as far as can be told; it does not look at those on a device."""
        array = given[self.position]
        if not isinstance(array, np.ndarray):
            return not settings.debug()
        unsigned = array.astype(np.int64).view(np.uint64)  # in which those below 0 are large
        return bool(np.maximum.reduce(unsigned, initial=0) <= self.L)


class Projected(NamedTuple):
    """Where x, the factors of the weight and flags are among the arrays, of which U becomes the next."""

    x: int
    factors: Sequence[int]
    window: int
    flags: Sequence[int | None]  # lengths, mask, reset
    is_token: bool

    def of(self, arrays: Sequence[NDArray], library: Library) -> Projection:
        x, factors = arrays[self.x], tuple([arrays[i] for i in self.factors])
        lengths, mask, reset = [None if i is None else arrays[i] for i in self.flags]
        return Projection(library, x[None] if self.is_token else x, factors, self.window, lengths, mask, reset)


class Kept(NamedTuple):
    """What is kept for the backward: `like`, which is without arrays, and where its arrays are."""

    like: Saved
    operands: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]  # of operands that were given in another
    others: Sequence[int | None]  # initial states, lengths, mask, reset

    def of(self, arrays: Sequence[NDArray], states: Sequence[NDArray], projection: Projection | None) -> Saved:
        operands = {name: arrays[i] for name, i in self.operands.items()}
        for name, shape in self.shapes.items():
            operands[name] = operands[name].reshape(shape)
        others = [None if i is None else arrays[i] for i in self.others]
        return self.like.on(self.like.operands.on(operands, others), states, projection)


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward of which all but addresses and values of arrays is settled.

    Its arrays are those that are given, U if it is formed, and results that are not given. All that says where an array
    is says which of these it is.

    Args:
        converted: dtypes of the given arrays that have others.
        made: shapes and dtypes of results that are not given.
        order: of the arrays that are given to the pass.
        results: h and the last states.
        sizes: of the given arrays, in bytes; 0 of those that results may overlap.
        written: of the given arrays those that are written to, and with each the state that it may overwrite.
    """

    library: Library
    lengths: Lengths | None
    converted: Sequence[tuple[int, np.dtype[Any]]]
    projected: Projected | None
    made: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]
    planned: spots.Planned
    order: Sequence[int]
    results: Sequence[int]
    sizes: Sequence[int]
    written: Sequence[tuple[int, int | None]]
    kept: Kept | None

    def __call__(self, given: Sequence[NDArray]) -> tuple[Any, ...] | None:
        """The results of a call with these arrays; None if it must go the ordinary way."""
        library, arrays, projection = self.library, [*given], None
        pointer = library.pointer
        with library.current():
            if self.lengths is not None:
                if not self.lengths.are_fine(given):
                    return None
                arrays[self.lengths.position] = library.integers(given[self.lengths.position])
            at = [*map(pointer, arrays)]
            if self.written and self._overlaps(at):
                return None
            for i, dtype in self.converted:
                arrays[i] = library.contiguous(arrays[i], dtype)
                at[i] = pointer(arrays[i])
            if self.projected is not None:
                projection = self.projected.of(arrays, library)
                arrays.append(projection.u(library.workspace if self.projected.is_token else library.empty))
            arrays += [library.empty(shape, dtype) for shape, dtype in self.made]
            at += map(pointer, arrays[len(at) :])
            allocated = self.planned.run([at[i] for i in self.order])
        h, *last = [arrays[i] for i in self.results]
        found = h, (last[0] if len(last) == 1 else tuple(last))
        return found if self.kept is None else (*found, self.kept.of(arrays, allocated[: len(last)], projection))

    def _overlaps(self, at: Sequence[int]) -> bool:
        """Whether what is written to overlaps anything else that is given. A state may be updated in place."""
        for written, state in self.written:
            begin, end = at[written], at[written] + self.sizes[written]
            for i, (other, size) in enumerate(zip(at, self.sizes)):
                if other < end and begin < other + size and i != written and (i != state or other != begin):
                    return True
        return False


@dataclass(frozen=True, eq=False)
class Backward:
    """A backward of which all but addresses and values of arrays is settled.

    Args:
        converted: dtypes of the given gradients of results that are given in others.
        need: names of the gradients that are wanted.
    """

    planned: spots.Planned
    converted: Sequence[tuple[int, np.dtype[Any]]]
    need: Collection[str]

    def __call__(
        self, operands: Operands, states: Sequence[NDArray], given: Sequence[NDArray]
    ) -> tuple[dict[str, NDArray], list[NDArray]]:
        """As `recurrence.backward`."""
        library, seeds = operands.library, [*given]
        for i, dtype in self.converted:
            seeds[i] = library.contiguous(seeds[i], dtype)
        arrays = [*spots.of_operands(operands), *states, *seeds]
        allocated = self.planned.run([library.pointer(array) for array in arrays if array is not None])
        plan = self.planned.plan
        return {name: allocated[i] for name, i in plan.gradients.items()}, [allocated[i] for i in plan.dc0]
