"""The recurrence on NumPy, for machines without a C++ compiler: the same graphs, evaluated on (B, d) arrays.

It takes what a compiled kernel takes, pointers included, so that it can stand in for one anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import abi
from .cell import ADJOINT_OF_H, Cell, adjoint_of
from .dtypes import state_dtype, to_numpy
from .graph import evaluate, topological

NDArray = np.ndarray[Any, Any]


def _view(pointer: int, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
    """The array at `pointer`; strides in elements."""
    if 0 in shape:
        return np.empty(shape, dtype)
    last = sum((n - 1) * s for n, s in zip(shape, strides))
    memory = memoryview((ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(pointer))
    return np.ndarray(shape, dtype, memory, strides=[s * dtype.itemsize for s in strides])


def _contiguous(pointer: int, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return _view(pointer, shape, strides, dtype)


@dataclass
class _Place:
    """One step of one direction: its time, and which sequences are padded or start anew there."""

    s: int
    t: int
    q: int
    padded: NDArray
    starts_anew: NDArray


class _Sweep:
    """The arrays of one call, and the values of the step function at one place."""

    def __init__(self, cell: Cell, dtype: str, saved_dtype: str, wide: int, given: abi.Given) -> None:
        self.cell, self.given = cell, given
        self.io, self.acc, self.saved = to_numpy(dtype), to_numpy(state_dtype(dtype)), to_numpy(saved_dtype)
        input_dtypes = [self.acc if wide >> i & 1 else self.io for i in range(len(cell.inputs))]
        self.gates = [self.steps(slot, self.io) for slot in given.gates]
        self.inputs = [self.steps(slot, dtype) for slot, dtype in zip(given.inputs, input_dtypes)]
        self.input_dtypes = input_dtypes
        self.per_sequence = [self.sequences(slot) for slot in given.per_sequence]
        self.params = [self.directions(slot) for slot in given.params]
        self.constants = dict(zip(cell.constants, map(self.acc.type, given.constants)))
        L, B = given.L, given.B
        lengths = _contiguous(given.lengths, (B,), np.dtype(np.int64)) if given.lengths else np.full(B, L)
        self.lengths = np.clip(lengths, 0, L)
        self.mask = _contiguous(given.mask, (L, B), np.dtype(bool)) if given.mask else np.zeros((L, B), bool)
        self.reset = _contiguous(given.reset, (L, B), np.dtype(bool)) if given.reset else np.zeros((L, B), bool)

    def steps(self, slot: abi.Slot, dtype: np.dtype[Any]) -> NDArray:
        g, row = self.given, slot.stride
        return _view(slot.pointer, (g.L, g.B, g.D, g.d), (g.B * g.D * row, g.D * row, row, 1), dtype)

    def sequences(self, slot: abi.Slot) -> NDArray:
        g, row = self.given, slot.stride
        return _view(slot.pointer, (g.B, g.D, g.d), (g.D * row, row, 1), self.acc)

    def directions(self, slot: abi.Slot) -> NDArray:
        g = self.given
        return _view(slot.pointer, (g.D, g.d), (slot.stride, 1), self.acc)

    def states(self, pointers: Sequence[int]) -> list[NDArray]:
        g = self.given
        return [_contiguous(p, (g.D, g.B, g.d), self.acc) for p in pointers]

    def kept(self, pointers: Sequence[int]) -> list[NDArray]:
        g = self.given
        n = -(-g.L // g.every) if g.every else 0
        return [_contiguous(p, (n, g.B, g.D, g.d), self.saved) for p in pointers]

    def place(self, s: int, q: int) -> _Place:
        L = self.given.L
        t = L - 1 - s if q else s
        boundary = t + 1 if q else t
        starts_anew = np.zeros(self.given.B, bool)
        if boundary < L:
            starts_anew = self.reset[boundary] & (boundary < self.lengths)
        return _Place(s, t, q, (self.mask[t] | (t >= self.lengths))[:, None], starts_anew[:, None])

    def places(self, backward: bool = False) -> Iterator[_Place]:
        for q in range(self.given.D):
            steps = range(self.given.L)
            for s in reversed(steps) if backward else steps:
                yield self.place(s, q)

    def values(self, at: _Place, state: Sequence[NDArray]) -> dict[str, Any]:
        cell, t, q = self.cell, at.t, at.q
        values: dict[str, Any] = dict(self.constants)
        values.update((n, a[t, :, q].astype(self.acc)) for n, a in zip(cell.gates, self.gates))
        values.update((n, a[t, :, q].astype(self.acc)) for n, a in zip(cell.inputs, self.inputs))
        values.update((n, a[:, q]) for n, a in zip(cell.per_sequence, self.per_sequence))
        values.update((n, a[q]) for n, a in zip(cell.params, self.params))
        values.update(zip(cell.state, state))
        return values

    def step(self, at: _Place, state: list[NDArray], order: Any) -> tuple[list[NDArray], NDArray]:
        """New states and h after one step, from the states before it (resets applied)."""
        formula = self.cell.formula
        result = evaluate(order, self.values(at, state), self.acc)
        new = [np.where(at.padded, old, result[node]) for node, old in zip(formula.new_state, state)]
        return new, np.where(at.padded, self.acc.type(0), result[formula.h])


def _begin(at: _Place, state: Sequence[NDArray]) -> list[NDArray]:
    return [np.where(at.starts_anew, a.dtype.type(0), a) for a in state]


def forward(cell: Cell, dtype: str, saved_dtype: str, wide: int, f: abi.Forward) -> None:
    """The forward pass; the arguments are those of a compiled kernel."""
    sweep, given = _Sweep(cell, dtype, saved_dtype, wide, f.given), f.given
    h = _contiguous(f.h, (given.L, given.B, given.D, given.d), sweep.io)
    c_last, saved = sweep.states(f.c_last), sweep.kept(f.saved) if given.every else []
    for last, c0 in zip(c_last, given.c0):
        last[...] = _contiguous(c0, last.shape, sweep.acc) if c0 else 0
    order = topological([*cell.formula.new_state, cell.formula.h])
    with np.errstate(all="ignore"):
        for at in sweep.places():
            state = [last[at.q] for last in c_last]
            if given.every and at.s % given.every == 0:
                for kept, value in zip(saved, state):
                    kept[at.s // given.every, :, at.q] = value
            new, h_at = sweep.step(at, _begin(at, state), order)
            h[at.t, :, at.q] = h_at
            for value, result in zip(state, new):
                value[...] = result


def backward(cell: Cell, dtype: str, saved_dtype: str, wide: int, f: abi.Backward) -> None:
    """The backward pass; the arguments are those of a compiled kernel."""
    sweep, given = _Sweep(cell, dtype, saved_dtype, wide, f.given), f.given
    dh = _contiguous(f.dh, (given.L, given.B, given.D, given.d), sweep.io)
    saved, dstate = sweep.kept(f.saved), sweep.states(f.dc0)
    for running, last in zip(dstate, f.dc_last):
        running[...] = _contiguous(last, running.shape, sweep.acc) if last else 0
    to = {n: sweep.steps(s, sweep.io) for n, s in zip(cell.gates, f.dgates) if s.pointer}
    to |= {n: sweep.steps(s, k) for n, s, k in zip(cell.inputs, f.dinputs, sweep.input_dtypes) if s.pointer}
    sums = {n: sweep.sequences(s) for n, s in zip(cell.per_sequence, f.dper_sequence) if s.pointer}
    for array in sums.values():
        array[...] = 0
    params = {n: sweep.directions(s) for n, s in zip(cell.params, f.dparams) if s.pointer}
    partial = {n: np.zeros((given.B, given.D, given.d), sweep.acc) for n in params}

    formula = cell.formula
    order = topological(formula.gradient.values())
    states = _States(sweep, saved)
    with np.errstate(all="ignore"):
        for at in sweep.places(backward=True):
            values = sweep.values(at, states.before(at))
            values |= {adjoint_of(n): d[at.q] for n, d in zip(cell.state, dstate)}
            values[ADJOINT_OF_H] = dh[at.t, :, at.q].astype(sweep.acc)
            result = evaluate(order, values, sweep.acc)
            zero = sweep.acc.type(0)
            gradient = {n: np.where(at.padded, zero, result[node]) for n, node in formula.gradient.items()}
            for n, array in to.items():
                array[at.t, :, at.q] = gradient[n]
            for n, array in [*sums.items(), *partial.items()]:
                array[:, at.q] += gradient[n]
            for n, d in zip(cell.state, dstate):
                passed = np.where(at.padded, d[at.q], result[formula.gradient[n]])
                d[at.q] = np.where(at.starts_anew, zero, passed)
        for n, array in params.items():
            array[...] = partial[n].sum(axis=0)


class _States:
    """The states before each step, recomputed piece by piece from those that were kept, last piece first."""

    def __init__(self, sweep: _Sweep, saved: list[NDArray]) -> None:
        self.sweep, self.saved = sweep, saved
        self.order = topological([*sweep.cell.formula.new_state, sweep.cell.formula.h])
        self.piece: tuple[int, int] | None = None
        self.states: list[list[NDArray]] = []

    def before(self, at: _Place) -> list[NDArray]:
        every = self.sweep.given.every
        piece = at.s // every
        if self.piece != (at.q, piece):
            self.piece = (at.q, piece)
            self.states = [[kept[piece, :, at.q].astype(self.sweep.acc) for kept in self.saved]]
            for s in range(piece * every, at.s):  # at.s is the last step of its piece
                place = self.sweep.place(s, at.q)
                self.states.append(self.sweep.step(place, _begin(place, self.states[-1]), self.order)[0])
        return _begin(at, self.states[at.s - piece * every])
