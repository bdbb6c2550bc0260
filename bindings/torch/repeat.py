"""Calls of the core's functions like one before: what was checked for the first is not checked again.

`sru_rt.repeat` tells which calls are alike; here is what they do then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import repeat
from ..recompute import every
from . import autograd
from .layer import layer
from .projection import is_autocast


class Operands(NamedTuple):
    """The arrays of a layer, or of a recurrence on a given U, as `autograd.recurrence` and `layer` take them."""

    first: Tensor  # x, or U
    factors: Sequence[Tensor]
    own: Sequence[Tensor]
    states: Sequence[Tensor | None]
    flags: Sequence[Tensor | None]  # lengths, mask, reset


class Run(NamedTuple):
    """A layer, or a recurrence on a given U, of which all but arrays is settled."""

    cell: str
    window: int  # of tokens that a step sees; 0 where U is given
    constants: tuple[float, ...]
    recompute: bool | int | str
    time_parallel: bool | str

    def __call__(self, o: Operands) -> tuple[Any, ...]:
        """h, and the last state or states."""
        lengths, mask, reset = o.flags
        shared: dict[str, Any] = {"lengths": lengths, "mask": mask, "reset": reset, "constants": self.constants}
        shared["time_parallel"] = self.time_parallel
        state = o.states[0] if len(o.states) == 1 else _stacked(o.states)
        if self.window:
            shared |= {"window": self.window, "recompute": self.recompute}
            h, last = layer(self.cell, o.first, o.factors, o.own, state, **shared)
        else:
            h, last = autograd.recurrence(self.cell, o.first, o.own, state, every=every(self.recompute), **shared)
        return h, last if len(o.states) == 1 else tuple(last)


class _Place(NamedTuple):
    """Where an operand is among the arrays of a call, and its shape if it was given in another."""

    index: int
    shape: torch.Size | None

    def of(self, given: Sequence[Tensor]) -> Tensor:
        return given[self.index] if self.shape is None else given[self.index].reshape(self.shape)


class _Repeat(NamedTuple):
    """A call of one of the core's functions, of which all but arrays is settled: places of the fields of `Operands`."""

    run: Run
    first: _Place
    factors: Sequence[_Place]
    own: Sequence[_Place]
    states: Sequence[_Place | None]
    flags: Sequence[_Place | None]
    is_token: bool

    def __call__(self, given: Sequence[Tensor]) -> tuple[Any, ...] | None:
        """Its results for these arrays; None if it must go the ordinary way."""
        if not _is_plain(given):
            return None
        factors, own = [place.of(given) for place in self.factors], [place.of(given) for place in self.own]
        states = [None if place is None else place.of(given) for place in self.states]
        flags = [None if place is None else place.of(given) for place in self.flags]
        h, last = self.run(Operands(self.first.of(given), factors, own, states, flags))
        return h[0] if self.is_token else h, last


def remember(run: Run, o: Operands, is_token: bool) -> None:
    """Remembers the call that this thread is at, if all its arrays are operands as they are."""
    given = repeat.arrays_of_call()
    if not given or o.flags[0] is not None or not all(isinstance(t, Tensor) for t in given) or not _is_plain(given):
        return  # lengths are looked at in each call
    try:
        first, factors, own = _place(o.first, given), _places(o.factors, given), _places(o.own, given)
        states, flags = ([None if t is None else _place(t, given) for t in field] for field in (o.states, o.flags))
    except LookupError:
        return
    used = {place.index for place in (first, *factors, *own, *states, *flags) if place is not None}
    if len(used) == len(given):  # the value of another one, such as alpha, may be part of what is settled
        repeat.remember_call(_Repeat(run, first, factors, own, states, flags, is_token))


def _places(operands: Sequence[Tensor], given: Sequence[Tensor]) -> list[_Place]:
    return [_place(t, given) for t in operands]


def _place(operand: Tensor, given: Sequence[Tensor]) -> _Place:
    """Raises LookupError if an operand is none of the arrays, or may be one or another."""
    found = [i for i, t in enumerate(given) if _is_same(t, operand)]
    if len(found) != 1:
        raise LookupError
    return _Place(found[0], None if given[found[0]].shape == operand.shape else operand.shape)


def _is_same(given: Tensor, operand: Tensor) -> bool:
    """Whether these are the same numbers, in one place and order."""
    if given.data_ptr() != operand.data_ptr() or given.dtype != operand.dtype or given.numel() != operand.numel():
        return False
    if given.shape == operand.shape:
        return given.stride() == operand.stride()
    return given.is_contiguous() and operand.is_contiguous()


def _is_plain(given: Sequence[Tensor]) -> bool:
    """Whether tensors have values, are taken in their own dtypes, and no transformation of PyTorch is at work."""
    return autograd.is_eager(*given) and not is_autocast(given[0].device.type)


def _stacked(states: Sequence[Tensor | None]) -> Tensor | None:
    """Initial states side by side, zeros for those that are None."""
    given = next((s for s in states if s is not None), None)
    if given is None:
        return None
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    return torch.stack([torch.zeros_like(given, dtype=dtype) if s is None else s.to(dtype) for s in states])
