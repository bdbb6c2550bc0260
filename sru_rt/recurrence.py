"""Recurrences on arrays: allocates, turns arrays into addresses, and goes through the waist.

Everything here is by name: the arrays that a cell declares, and ``d`` + name for their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import abi, chunks, launch
from .cell import Array, Cell
from .dtypes import name_of, state_dtype, to_numpy
from .library import Library, NDArray
from .on_numpy import NUMPY
from .variant import Variant


class Product(NamedTuple):
    """What a kernel forms U from itself: x (L, B, d_in) and the weight (D, k, d, d_in)."""

    x: NDArray
    weight: NDArray

    @property
    def shape_of_u(self) -> tuple[int, ...]:
        return *self.x.shape[:2], *self.weight.shape[:3]


@dataclass(frozen=True, eq=False)
class Operands:
    """What one recurrence is given: C-contiguous arrays of one library in the dtypes that kernels take (see `operand`).

    `arrays` holds the declared arrays but the states, by name; `c0` one array or None for each state. With a `product`
    there is no U. `chunk` are the steps of the forward's chunks of time, 0 where it has none; it need not be given.
    """

    cell: Cell
    dtype: str
    arrays: Mapping[str, NDArray]
    c0: Sequence[NDArray | None]
    constants: Sequence[float] = ()
    lengths: NDArray | None = None
    mask: NDArray | None = None
    reset: NDArray | None = None
    library: Library = NUMPY
    time_parallel: bool | str = "auto"
    chunk: int | None = None
    product: Product | None = None

    def __post_init__(self) -> None:
        if self.chunk is None:  # decided once, since the backward must know how the forward went
            object.__setattr__(self, "chunk", self._chunk(forward=True))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """L, B, D, d."""
        if self.product:
            L, B, D, _, d = self.product.shape_of_u
        else:
            u = next(a.name for a in self.cell.arrays if a.kind == "gates")
            L, B, D, _, d = self.arrays[u].shape
        return L, B, D, d

    @property
    def accumulator(self) -> np.dtype[Any]:
        return to_numpy(state_dtype(self.dtype))

    def on(self, arrays: Mapping[str, NDArray], others: Sequence[NDArray | None]) -> Operands:
        """The same recurrence on other arrays of these layouts; `others` are x and weight of a product, the states,
        lengths, mask and reset.

        It takes a fifth of the time of `dataclasses.replace`.
        """
        *c0, lengths, mask, reset = others
        made = object.__new__(Operands)
        made.__dict__.update(self.__dict__, arrays=arrays, c0=c0, lengths=lengths, mask=mask, reset=reset)
        if self.product:
            x, weight, *made.__dict__["c0"] = c0
            made.__dict__["product"] = Product(x, weight)
        return made

    def _chunk(self, forward: bool) -> int:
        variant = self.variant(state_dtype(self.dtype))
        return launch.chunk(variant, self.sizes, forward, self.time_parallel, self.library.device)

    def variant(self, saved_dtype: str) -> Variant:
        dtypes = {name: array.dtype for name, array in self.arrays.items()}
        dtype, acc = to_numpy(self.dtype), self.accumulator
        wide = self.cell.bits("inputs", lambda a: dtypes[a.name] != dtype)
        narrow = self.cell.bits("params", lambda a: dtypes[a.name] != acc)
        return Variant(self.cell, self.dtype, saved_dtype, wide, narrow)


def is_own(declared: Array, given: str, dtype: str, device: str) -> bool:
    """Whether kernels beside U of `dtype` take an array given in another dtype in that of U, not that of the state."""
    if declared.kind == "params":
        return given == dtype and device != "cpu"
    return declared.kind == "gates" or (declared.kind == "inputs" and given in (dtype, "bool"))


def operand(declared: Array, array: NDArray, dtype: str, library: Library = NUMPY) -> NDArray:
    """`array` in the dtype in which kernels take it, C-contiguous; itself if it is so already."""
    own = is_own(declared, name_of(array.dtype), dtype, library.device)
    return library.contiguous(array, to_numpy(dtype if own else state_dtype(dtype)))


def _slots(array: NDArray | None, declared: Array, pointer: Callable[[NDArray], int]) -> list[abi.Slot]:
    """One slot for each value that the array holds."""
    n = len(declared.members)
    if array is None:
        return [abi.NOT_WANTED] * n
    d, start = array.shape[-1], pointer(array)
    return [abi.Slot(start + i * d * array.itemsize, n * d) for i in range(n)]


def _slots_of_kind(operands: Operands, kind: str, arrays: Mapping[str, NDArray]) -> list[abi.Slot]:
    pointer = operands.library.pointer
    return [s for a in operands.cell.arrays if a.kind == kind for s in _slots(arrays.get(a.name), a, pointer)]


def _given(operands: Operands, every: int, chunk: int, carry: NDArray | None) -> abi.Given:
    arrays, pointer = operands.arrays, operands.library.pointer
    L, B, D, d = operands.sizes
    return abi.Given(
        L=L,
        B=B,
        D=D,
        d=d,
        every=every,
        lengths=pointer(operands.lengths),
        mask=pointer(operands.mask),
        reset=pointer(operands.reset),
        gates=_slots_of_kind(operands, "gates", arrays),
        inputs=_slots_of_kind(operands, "inputs", arrays),
        per_sequence=_slots_of_kind(operands, "per_sequence", arrays),
        params=_slots_of_kind(operands, "params", arrays),
        c0=[pointer(a) for a in operands.c0],
        constants=operands.constants,
        chunk=chunk,
        carry=pointer(carry),
    )


def _carry(operands: Operands, chunk: int, forward: bool) -> NDArray | None:
    """Scratch for what chunks of time leave to each other."""
    if not chunk:
        return None
    elements = chunks.carried(operands.cell, forward, operands.sizes, chunk)
    return operands.library.empty((elements,), operands.accumulator)


class Prepared(NamedTuple):
    """A forward that is ready to run, and its memory: h (L, B, D, d), last states (D, B, d), kept states, scratch."""

    variant: Variant
    arguments: abi.Forward
    h: NDArray
    last: list[NDArray]
    saved: list[NDArray]
    carry: NDArray | None

    def run(self, library: Library) -> None:
        launch.run(self.variant, self.arguments, library.device, library.stream())


def forward(
    operands: Operands, every: int = 0, saved_dtype: str | None = None
) -> tuple[NDArray, list[NDArray], list[NDArray]]:
    """Runs a recurrence; returns h (L, B, D, d), the last states (D, B, d), and the states kept for the backward."""
    made = prepared_forward(operands, every, saved_dtype)
    made.run(operands.library)
    return made.h, made.last, made.saved


def prepared_forward(
    operands: Operands,
    every: int = 0,
    saved_dtype: str | None = None,
    h: NDArray | None = None,
    c_last: Sequence[NDArray | None] | None = None,
) -> Prepared:
    """A recurrence that is ready to run.

    With `every` = K the states before steps 0, K, 2K, ... are kept, in `saved_dtype`. `h` and `c_last` are written
    to where they are given.
    """
    L, B, D, d = operands.sizes
    acc = operands.accumulator
    saved_dtype = saved_dtype or name_of(acc)
    library, n_states = operands.library, len(operands.cell.state)
    pointer, empty = library.pointer, library.empty
    h = empty((L, B, D, d), to_numpy(operands.dtype)) if h is None else h
    last = [empty((D, B, d), acc) if a is None else a for a in c_last or [None] * n_states]
    chunk = operands.chunk or 0
    kept = chunks.kept(L, chunks.counted_in(operands.cell, chunk) or L, every) if every else 0
    saved = [empty((kept, B, D, d), to_numpy(saved_dtype)) for _ in range(n_states)] if every else []
    carry = _carry(operands, chunk, forward=True)
    arguments = abi.Forward(
        given=_given(operands, every, chunk, carry),
        h=pointer(h),
        c_last=[pointer(a) for a in last],
        saved=[pointer(a) for a in saved] or [0] * n_states,
    )
    if operands.product:
        x, weight = operands.product
        arguments = arguments._replace(x=pointer(x), weight=pointer(weight), d_in=x.shape[2])
    return Prepared(operands.variant(saved_dtype), arguments, h, last, saved, carry)


class PreparedBackward(NamedTuple):
    """A backward that is ready to run, and its memory: gradients by name, those of initial states, scratch."""

    variant: Variant
    arguments: abi.Backward
    gradients: dict[str, NDArray]
    dc0: list[NDArray]
    scratch: Sequence[NDArray | None]


def backward(
    operands: Operands,
    saved: Sequence[NDArray],
    every: int,
    dh: NDArray,
    dc_last: Sequence[NDArray | None],
    need: Collection[str],
) -> tuple[dict[str, NDArray], list[NDArray]]:
    """The gradients of the arrays named in `need`, and of the initial states (D, B, d).

    Gradients of arrays have the dtype in which kernels take these, those of states the states' own.
    """
    library = operands.library
    made = prepared_backward(operands, saved, every, dh, dc_last, need)
    launch.run(made.variant, made.arguments, library.device, library.stream())
    return made.gradients, made.dc0


def prepared_backward(
    operands: Operands,
    saved: Sequence[NDArray],
    every: int,
    dh: NDArray,
    dc_last: Sequence[NDArray | None],
    need: Collection[str],
) -> PreparedBackward:
    """A backward that is ready to run."""
    cell, acc, library = operands.cell, operands.accumulator, operands.library
    pointer, empty = library.pointer, library.empty
    L, B, D, d = operands.sizes
    gradients = {}
    for a in cell.arrays:
        if a.name in need and a.kind != "state":
            array = operands.arrays[a.name]
            gradients[a.name] = empty(array.shape, array.dtype)
    dc0 = [empty((D, B, d), acc) for _ in cell.state]
    variant = operands.variant(name_of(saved[0].dtype))
    scratch = launch.needs_scratch(variant, every, library.device)
    chunk = operands._chunk(forward=False)
    carry, count = _carry(operands, chunk, forward=False), chunks.count(L, chunk) if chunk else 1
    rows = count * min(every, chunk) if chunk else every
    states = [empty((rows, B, D, d), acc) if scratch else None for _ in cell.state]
    row, sums = d + library.row_padding, len(cell.params) + (len(cell.per_sequence) if chunk else 0)
    partial = empty((count, B, D, sums, row), acc)
    arguments = abi.Backward(
        given=_given(operands, every, chunk, carry),
        dh=pointer(dh),
        dc_last=[pointer(a) for a in dc_last],
        saved=[pointer(a) for a in saved],
        states=[pointer(a) for a in states],
        partial=abi.Slot(pointer(partial), row),
        dgates=_slots_of_kind(operands, "gates", gradients),
        dinputs=_slots_of_kind(operands, "inputs", gradients),
        dper_sequence=_slots_of_kind(operands, "per_sequence", gradients),
        dparams=_slots_of_kind(operands, "params", gradients),
        dc0=[pointer(a) for a in dc0],
        saved_chunk=chunks.counted_in(cell, operands.chunk or 0),
    )
    return PreparedBackward(variant, arguments, gradients, dc0, (*states, partial, carry))
