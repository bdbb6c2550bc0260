"""The gradient of a recurrence: the fused backward, and through the reference the gradient of that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from ... import spec
from ...passes import Call, declared
from . import ops, reference, sharding
from .ops import Operands, put
from .statement import Stated


def recurrence(
    cell: str,
    u: Array,
    arrays: Sequence[Array] = (),
    c0: Array | None = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    reset: Array | None = None,
    constants: Sequence[float] = (),
    every: int = 1,
    time_parallel: bool | str = "auto",
) -> tuple[Array, Array]:
    """Runs a recurrence on a given U.

    Args:
        cell: the text of a cell (see `sru_rt.spec`).
        u: (L, B, D, k, d).
        arrays: what the cell declares beside gates and states, in that order.
        c0: (D, B, d), or (n, D, B, d) for n > 1 states; zeros if None.
        every: for the backward, the state is kept every so many steps.

    Returns:
        h (L, B, D*d) in u's dtype, and the last states, like c0.

    Raises:
        ShapeError, DtypeError, ArgumentError: naming what does not fit.
    """
    stated = Stated.of(Call(cell, tuple(constants), every, str(time_parallel)))
    return _jitted(stated, (u, c0, lengths, mask, reset, *arrays))


def of_operands(stated: Stated, o: Operands) -> tuple[Array, Array]:
    """h (L, B, D*d) and the last states of operands, differentiable."""
    h, last = _recurrence(stated, sharding.alike(o))
    return ops.side_by_side(h), last


@partial(jax.jit, static_argnums=0)
def _jitted(stated: Stated, given: Operands) -> tuple[Array, Array]:
    # Outside of other programs JAX would trace a function with a gradient of its own at each call.
    def run(given: Operands) -> tuple[Array, Array]:
        return of_operands(stated, ops.operands(stated, given))

    return sharding.automatic(run, stated, given[0], given[0], 4, given)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(stated: Stated, o: Operands) -> tuple[Array, Array]:
    """Keeps nothing where no gradient is asked for."""
    h, last, _ = ops.forward(stated._replace(keep=False), o)
    return h, last


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def keeping(stated: Stated, o: Operands) -> tuple[Array, Array, Array]:
    """Also the states that are kept for the backward, through which no gradient goes."""
    return ops.forward(stated, o)


def _recurrence_forward(stated: Stated, given: Any) -> Any:
    o = values(given)
    h, last, saved = keeping(stated, o)
    return (h, last), (o, saved)


def _keeping_forward(stated: Stated, given: Any) -> Any:
    o = values(given)
    h, last, saved = keeping(stated, o)
    return (h, last, saved), (o, saved)


def _backward(stated: Stated, residual: Any, seeds: Any) -> tuple[Any]:
    o, saved = residual
    dh, dlast = (None if isinstance(seed, SymbolicZero) else seed for seed in seeds[:2])
    return (gradients(stated, o, saved, dh, dlast),)


_recurrence.defvjp(_recurrence_forward, _backward, symbolic_zeros=True)
keeping.defvjp(_keeping_forward, _backward, symbolic_zeros=True)


def values(given: Any) -> Any:
    """What a rule for the forward is given.

    JAX also says by what a program is differentiated, but must not be told: what a forward leaves to its backward has
    one structure for all uses of a program that was traced once. So all gradients are formed.
    """
    return jax.tree.map(lambda one: one.value, given, is_leaf=lambda one: hasattr(one, "perturbed"))


def _is_floating(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def gradients(
    stated: Stated, o: Operands, saved: Array, dh: Array | None, dlast: Array | None
) -> tuple[Array | None, ...]:
    """The gradients of the operands, differentiable; None of flags. dh is (L, B, D, d)."""
    of_flags, of_arrays = (False,) * 3, (a.differentiable for a in declared(spec.cell_of(stated.cell)))
    has_one = (True, True, *of_flags, *of_arrays)
    need = tuple(one is not None and has and _is_floating(one) for one, has in zip(o, has_one))
    if dh is None and dlast is None:
        return _with_zeros(o, [None] * len(o))
    if dh is None:
        L, B, D, _, d = o[0].shape
        dh = reference.zeros(o[0], (L, B, D, d), o[0].dtype)
    found = iter(_gradients(stated, need, o, saved, dh, dlast))
    return _with_zeros(o, [next(found) if is_wanted else None for is_wanted in need])


def _with_zeros(given: Sequence[Any], found: Sequence[Array | None]) -> tuple[Array | None, ...]:
    """Zeros for what has no gradient but a dtype that could have one. So the structure is always the same, too."""
    return tuple(
        jnp.zeros_like(one) if gradient is None and one is not None and _is_floating(one) else gradient
        for one, gradient in zip(given, found)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(
    stated: Stated, need: tuple[bool, ...], o: Operands, saved: Array, dh: Array, dlast: Array | None
) -> tuple[Array, ...]:
    """The fused backward as a function of its own, whose gradient the reference gives."""
    return tuple(g for g in ops.backward(stated, o, saved, dh, dlast, need) if g is not None)


def _gradients_forward(
    stated: Stated, need: tuple[bool, ...], o: Operands, saved: Array, dh: Array, dlast: Array | None
) -> Any:
    return _gradients(stated, need, o, saved, dh, dlast), (o, dh, dlast)


def _gradients_backward(stated: Stated, need: tuple[bool, ...], residual: Any, seeds: Any) -> Any:
    o, *of_results = residual
    given = (*o, *of_results)
    chosen = [i for i, one in enumerate(given) if one is not None and _is_floating(one)]

    def backward_of(*some: Array) -> tuple[Array, ...]:
        *o, dh, dlast = put(given, chosen, some)
        return _reference_backward(stated, need, o, dh, dlast)

    _, pullback = jax.vjp(backward_of, *(given[i] for i in chosen))
    *of_o, ddh, ddlast = put([None] * len(given), chosen, pullback(seeds))
    return tuple(of_o), None, ddh, ddlast


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _reference_backward(
    stated: Stated, need: tuple[bool, ...], o: Sequence[Any], dh: Array, dlast: Array | None
) -> tuple[Array, ...]:
    """What `_gradients` returns, of operations that JAX can differentiate."""
    chosen = [i for i, is_wanted in enumerate(need) if is_wanted]
    (_, last), pullback = jax.vjp(
        lambda *some: reference.recurrence(stated, put(o, chosen, some)), *(o[i] for i in chosen)
    )
    return pullback((dh, jnp.zeros_like(last) if dlast is None else dlast))
