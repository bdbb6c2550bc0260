"""A recurrence as a loop of PyTorch's own operations, from the same graph as the kernels: slow, and differentiable.

It is what gradients of gradients come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import spec
from ...evaluate import evaluate
from ...passes import ARRAYS, Call, declared
from .native import Operands, state_dtype

_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
    "neg": torch.neg,
    "<": torch.lt,
    "<=": torch.le,
    ">": torch.gt,
    ">=": torch.ge,
    "where": torch.where,
    "minimum": lambda a, b: torch.where(a <= b, a, b),
    "maximum": lambda a, b: torch.where(a >= b, a, b),
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),  # PyTorch's own one is rounded beyond 20
}


def recurrence(call: Call, o: Operands) -> tuple[Tensor, Tensor]:
    """h (L, B, D, d) and the last states of a recurrence, whose operands are as in `native`."""
    D, n = o[0].shape[2], len(spec.cell_of(call.cell).state)
    each = [_direction(call, o, q) for q in range(D)]
    h = torch.stack([h for h, _ in each], 2)
    last = torch.stack([torch.stack(states) for _, states in each], 1)  # (n, D, B, d)
    return h.to(o[0].dtype), last[0] if n == 1 else last


def _direction(call: Call, o: Operands, q: int) -> tuple[Tensor, list[Tensor]]:
    cell, u, c0 = spec.cell_of(call.cell), o[0], o[1]
    (L, B, _, _, d), acc = u.shape, state_dtype(u.dtype)
    c0 = u.new_zeros((len(cell.state), B, d), dtype=acc) if c0 is None else c0.reshape(-1, *c0.shape[-3:])[:, q]
    state, h = list(c0), [u.new_zeros((B, d), dtype=acc)] * L
    for t in reversed(range(L)) if q else range(L):
        padded, starts_anew = _flags(o, t, q)
        before = [torch.where(starts_anew, 0, s) for s in state]
        new, h_t = _step(call, o, t, q, before)
        state = [torch.where(padded, old, value) for old, value in zip(before, new)]
        h[t] = torch.where(padded, 0, h_t)
    stacked = torch.stack(h) if L else u.new_zeros((0, B, d), dtype=acc)
    return stacked, state


def _flags(o: Operands, t: int, q: int) -> tuple[Tensor, Tensor]:
    """Which sequences are padded at a step, and which start anew before it; (B, 1)."""
    u, _, lengths, mask, reset, *_ = o
    no = torch.zeros(u.shape[1], dtype=torch.bool, device=u.device)
    padded = no if mask is None else mask[t]
    boundary = t + 1 if q else t
    starts_anew = no if reset is None or boundary >= u.shape[0] else reset[boundary]
    if lengths is not None:
        padded = padded | (t >= lengths)
        starts_anew = starts_anew & (boundary < lengths)
    return padded[:, None], starts_anew[:, None]


def _step(call: Call, o: Operands, t: int, q: int, state: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    cell, u, acc = spec.cell_of(call.cell), o[0], state_dtype(o[0].dtype)
    padded, _ = _flags(o, t, q)
    values: dict[str, Any] = dict(zip(cell.constants, call.constants))
    values |= zip(cell.gates, _clean(u[t, :, q].to(acc), padded[..., None]).unbind(1))
    for a, tensor in zip(declared(cell), o[ARRAYS:]):
        if a.kind == "inputs":
            rows = tensor[t, :, q].to(acc)
            rows = rows if a.stacked else rows[:, None]
            values |= zip(a.members, _clean(rows, padded[..., None]).unbind(1))
        elif a.kind == "per_sequence":
            values |= zip(a.members, [tensor[:, q]])
        else:
            values |= zip(a.members, tensor[q].to(acc))
    values |= zip(cell.state, state)
    like = state[0]
    found = evaluate(
        [*cell.formula.new_state, cell.formula.h],
        values,
        _OPERATIONS,
        lambda value: value if isinstance(value, Tensor) else like.new_full((), value),
    )
    *new, h = [one.expand_as(like) for one in found]
    return new, h


def _clean(rows: Tensor, padded: Tensor) -> Tensor:
    """Padding may hold anything, and even a NaN that is not used would spoil a gradient, as 0*NaN is NaN."""
    return torch.where(padded, 0, rows)
