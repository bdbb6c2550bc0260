"""The arguments of a recurrence kernel, packed as cuda/arguments.h declares them.

Every field takes eight bytes, so one `struct.Struct` per cell and pass is the whole conversion.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import NamedTuple

from .cell import Cell


class Slot(NamedTuple):
    """One scalar of the step function as an array: address of its first element, elements from row to row."""

    pointer: int
    stride: int


NOT_WANTED = Slot(0, 0)


class Given(NamedTuple):
    """What both passes are given; the fields of RecurrenceArguments."""

    L: int
    B: int
    D: int
    d: int
    every: int
    lengths: int
    mask: int
    reset: int
    gates: Sequence[Slot]
    inputs: Sequence[Slot]
    per_sequence: Sequence[Slot]
    params: Sequence[Slot]
    c0: Sequence[int]
    constants: Sequence[float]
    chunk: int = 0
    carry: int = 0


class Forward(NamedTuple):
    """The fields of ForwardArguments."""

    given: Given
    h: int
    c_last: Sequence[int]
    saved: Sequence[int]
    x: int = 0
    weight: int = 0
    d_in: int = 0


class Backward(NamedTuple):
    """The fields of BackwardArguments."""

    given: Given
    dh: int
    dc_last: Sequence[int]
    saved: Sequence[int]
    states: Sequence[int]
    partial: Slot
    dgates: Sequence[Slot]
    dinputs: Sequence[Slot]
    dper_sequence: Sequence[Slot]
    dparams: Sequence[Slot]
    dc0: Sequence[int]
    saved_chunk: int = 0


def pack(cell: Cell, arguments: Forward | Backward) -> bytes:
    """The struct that a kernel of `cell` reads."""
    return layout(cell, isinstance(arguments, Forward)).pack(*values(arguments))


def values(arguments: Forward | Backward) -> list[int | float]:
    """The fields of the struct, in their order."""
    found = _given(arguments.given)
    if isinstance(arguments, Forward):
        f = arguments
        return [*found, f.h, *f.c_last, *f.saved, f.x, f.weight, f.d_in]
    b = arguments
    found += [b.dh, *b.dc_last, *b.saved, *b.states, *b.partial]
    found += _slots(b.dgates) + _slots(b.dinputs) + _slots(b.dper_sequence) + _slots(b.dparams)
    return [*found, *b.dc0, b.saved_chunk]


@cache
def layout(cell: Cell, forward: bool) -> struct.Struct:
    """Sizes and order of the fields; sizeof() of the C++ struct is compared to it when a kernel is loaded."""
    slots = [len(cell.gates), len(cell.inputs), len(cell.per_sequence), len(cell.params)]
    integers = 2 * sum(max(1, n) for n in slots)
    states = len(cell.state)
    given = f"{8 + integers + states}q{max(1, len(cell.constants))}d2q"
    if forward:
        return struct.Struct(f"={given}{4 + 2 * states}q")
    return struct.Struct(f"={given}{3 + 3 * states + integers + states + 1}q")


def _given(g: Given) -> list[int | float]:
    values: list[int | float] = [g.L, g.B, g.D, g.d, g.every, g.lengths, g.mask, g.reset]
    values += _slots(g.gates) + _slots(g.inputs) + _slots(g.per_sequence) + _slots(g.params)
    return [*values, *g.c0, *(g.constants or (0.0,)), g.chunk, g.carry]


def _slots(slots: Iterable[Slot]) -> list[int | float]:
    return list(chain.from_iterable(slots or (NOT_WANTED,)))
