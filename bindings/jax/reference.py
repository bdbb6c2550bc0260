"""A recurrence as a `lax.scan` of JAX's own operations, from the same graph as the kernels: slow, and differentiable.

It is what gradients of gradients come from, and what runs where there are no kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ... import spec
from ...evaluate import evaluate
from ...passes import ARRAYS, declared
from .statement import Stated

_OPERATIONS: dict[str, Callable[..., Array]] = {
    "+": jnp.add,
    "-": jnp.subtract,
    "*": jnp.multiply,
    "/": jnp.divide,
    "neg": jnp.negative,
    "<": jnp.less,
    "<=": jnp.less_equal,
    ">": jnp.greater,
    ">=": jnp.greater_equal,
    "where": jnp.where,
    "minimum": lambda a, b: jnp.where(a <= b, a, b),
    "maximum": lambda a, b: jnp.where(a >= b, a, b),
    "exp": jnp.exp,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
}


def state_dtype(dtype: Any) -> Any:
    """The dtype of states and sums beside U of `dtype`."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def recurrence(stated: Stated, o: Sequence[Any]) -> tuple[Array, Array]:
    """h (L, B, D, d) and the last states of a recurrence, whose operands are as in `ops`."""
    h, last, _ = keeping(stated, o)
    return h, last


def keeping(stated: Stated, o: Sequence[Any]) -> tuple[Array, Array, Array]:
    """Also the states before each step, in the order in which each direction goes."""
    D, n = o[0].shape[2], len(spec.cell_of(stated.cell).state)
    each = [_direction(stated, o, q) for q in range(D)]
    h = jnp.stack([h for h, _, _ in each], 2).astype(o[0].dtype)
    last = jnp.stack([last for _, last, _ in each], 1)  # (n, D, B, d)
    before = jnp.stack([before for _, _, before in each], 3)  # (n, L, B, D, d)
    return (h, last[0], before[0]) if n == 1 else (h, last, before)


def _direction(stated: Stated, o: Sequence[Any], q: int) -> tuple[Array, Array, Array]:
    """h (L, B, d), the last states (n, B, d), and those before each step (n, L, B, d)."""
    cell, u, c0 = spec.cell_of(stated.cell), o[0], o[1]
    (_, B, D, _, d), acc = u.shape, state_dtype(u.dtype)
    first = zeros(u, (len(cell.state), B, d), acc) if c0 is None else c0.reshape(len(cell.state), D, B, d)[:, q]
    padded, starts_anew = _flags(o, q)
    steps = _rows(stated, o, q, padded)

    def step(state: Array, given: Any) -> tuple[Array, tuple[Array, Array]]:
        rows, is_padded, is_new = given
        before = jnp.where(is_new, 0, state)
        new, h = _step(stated, o, q, rows, list(before))
        after = jnp.where(is_padded, before, jnp.stack(new))
        return after, (jnp.where(is_padded, 0, h), state)

    last, (h, before) = lax.scan(step, first, (steps, padded, starts_anew), reverse=bool(q))
    before = before[::-1] if q else before
    return h, last, jnp.moveaxis(before, 1, 0)


def product_of_jacobians(stated: Stated, o: Sequence[Any]) -> Array:
    """What all steps make of the initial states of a cell that is affine in them: matrices (n, n, D, B, d).

    Where there are flags the state is carried, or forgotten, as everywhere.
    """
    return jnp.stack([_product_of_jacobians(stated, o, q) for q in range(o[0].shape[2])], 2)


def _product_of_jacobians(stated: Stated, o: Sequence[Any], q: int) -> Array:
    cell, u = spec.cell_of(stated.cell), o[0]
    n, (L, B, _, _, d), acc = len(cell.state), u.shape, state_dtype(u.dtype)
    padded, starts_anew = _flags(o, q)
    values = _values(stated, o, q, _rows(stated, o, q, padded))
    entries = evaluate(cell.formula.jacobian, values, _OPERATIONS, lambda value: jnp.asarray(value, acc))
    steps = jnp.stack([jnp.broadcast_to(one, (L, B, d)) for one in entries]).reshape(n, n, L, B, d)
    same = jnp.eye(n, dtype=acc).reshape(n, n, 1, 1, 1)
    steps = jnp.moveaxis(jnp.where(starts_anew, 0, jnp.where(padded, same, steps)), 2, 0)
    if n == 1:
        return steps.prod(0)

    def times(found: Array, step: Array) -> tuple[Array, None]:
        return (step[:, :, None] * found[None]).sum(1), None

    return lax.scan(times, zeros(u, (n, n, B, d), acc) + same[:, :, 0], steps, reverse=bool(q))[0]


def _rows(stated: Stated, o: Sequence[Any], q: int, padded: Array) -> dict[str, Array]:
    """U and the inputs of every step, (L, B, members, d).

    Padding may hold anything, and even a NaN that is not used would spoil a gradient, as 0*NaN is NaN.
    """
    acc = state_dtype(o[0].dtype)
    steps: dict[str, Any] = {"u": o[0][:, :, q].astype(acc)}
    for i, (a, array) in enumerate(zip(declared(spec.cell_of(stated.cell)), o[ARRAYS:])):
        if a.kind == "inputs":
            rows = array[:, :, q].astype(acc)
            steps[f"array {i}"] = rows if a.stacked else rows[:, :, None]
    return {name: jnp.where(padded[..., None], 0, rows) for name, rows in steps.items()}


def zeros(u: Array, shape: Sequence[Any], dtype: Any) -> Array:
    """Zeros that vary over the same axes of a mesh as u does."""
    return jnp.zeros(shape, dtype) + u.ravel()[:0].sum(dtype=dtype)


def _flags(o: Sequence[Any], q: int) -> tuple[Array, Array]:
    """Which sequences are padded at each step, and which start anew before it; (L, B, 1)."""
    u, _, lengths, mask, reset, *_ = o
    L, B, *_ = u.shape
    steps = jnp.arange(L)[:, None]
    boundary = steps + q
    padded = jnp.zeros((L, B), bool) if mask is None else mask
    starts_anew = jnp.zeros((L, B), bool)
    if reset is not None:
        starts_anew = jnp.concatenate([reset, jnp.zeros((q, B), bool)])[q:]
    if lengths is not None:
        padded = padded | (steps >= lengths)
        starts_anew = starts_anew & (boundary < lengths)
    return padded[..., None], starts_anew[..., None]


def _step(stated: Stated, o: Sequence[Any], q: int, rows: Any, state: list[Array]) -> tuple[list[Array], Array]:
    cell, like = spec.cell_of(stated.cell), state[0]
    values = _values(stated, o, q, rows) | dict(zip(cell.state, state))
    found = evaluate(
        [*cell.formula.new_state, cell.formula.h],
        values,
        _OPERATIONS,
        lambda value: value if isinstance(value, Array) else jnp.asarray(value, like.dtype),
    )
    *new, h = [jnp.broadcast_to(one, like.shape) for one in found]
    return new, h


def _values(stated: Stated, o: Sequence[Any], q: int, rows: dict[str, Array]) -> dict[str, Any]:
    """What a step function is given but states, of one step or of all."""
    cell = spec.cell_of(stated.cell)
    values: dict[str, Any] = dict(zip(cell.constants, stated.call.constants))
    values |= zip(cell.gates, jnp.moveaxis(rows["u"], -2, 0))
    for i, (a, array) in enumerate(zip(declared(cell), o[ARRAYS:])):
        if a.kind == "inputs":
            values |= zip(a.members, jnp.moveaxis(rows[f"array {i}"], -2, 0))
        elif a.kind == "per_sequence":
            values |= zip(a.members, [array[:, q]])
        else:
            values |= zip(a.members, array[q])
    return values
