"""A layer, projection and recurrence together, under a policy of what is kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from ...passes import Call
from ..recompute import every
from . import autodiff, ops, sharding
from .projection import project
from .statement import Stated


def layer(
    cell: str,
    x: Array,
    factors: Sequence[Array],
    arrays: Sequence[Array] = (),
    c0: Array | None = None,
    *,
    window: int = 1,
    lengths: Array | None = None,
    mask: Array | None = None,
    reset: Array | None = None,
    constants: Sequence[float] = (),
    recompute: bool | int | str = False,
    time_parallel: bool | str = "auto",
) -> tuple[Array, Array]:
    """Runs a cell over x (L, B, d_in).

    Args:
        cell: the text of a cell (see `sru_rt.spec`).
        factors: the weight (D, k, d, window*d_in), or a pair (P, Q) of (D, k, d, p) and (p, window*d_in).
        recompute: what the backward computes again: False nothing, K >= 1 all states but every K-th, True these with
            K = 32, "x" these and U.
        arrays, c0, lengths, mask, reset, constants, time_parallel: as `autodiff.recurrence`.

    Returns:
        h (L, B, D*d), and the last states, like c0.
    """
    stated = Stated.of(Call(cell, tuple(constants), every(recompute), str(time_parallel)))
    beside_u = (c0, lengths, mask, reset, *arrays)
    return _jitted(stated, window, recompute == "x", x, tuple(factors), beside_u)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(
    stated: Stated, window: int, again: bool, x: Array, factors: tuple[Array, ...], beside_u: tuple[Any, ...]
) -> tuple[Array, Array]:
    run = partial(_run, stated, window, again)
    return sharding.automatic(run, stated, x, factors[0], 2, x, factors, beside_u)


def _run(
    stated: Stated, window: int, again: bool, x: Array, factors: tuple[Array, ...], beside_u: tuple[Any, ...]
) -> tuple[Array, Array]:
    others = ops.beside_u(stated, x.dtype, factors[0].shape[0], beside_u)
    if not again:
        return autodiff.of_operands(stated, (_u(window, x, factors, others), *others))
    x, *rest = sharding.alike((x, *factors, *others))
    h, last = _layer(stated, window, x, tuple(rest[: len(factors)]), tuple(rest[len(factors) :]))
    return ops.side_by_side(h), last


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(
    stated: Stated, window: int, x: Array, factors: tuple[Array, ...], others: tuple[Any, ...]
) -> tuple[Array, Array]:
    """A layer that keeps x for its backward and not U."""
    h, last, _ = ops.forward(stated._replace(keep=False), (_u(window, x, factors, others), *others))
    return h, last


def _forward(stated: Stated, window: int, *given: Any) -> Any:
    x, factors, others = autodiff.values(given)
    h, last, saved = autodiff.keeping(stated, (_u(window, x, factors, others), *others))
    return (h, last), (x, factors, others, saved)


def _backward(stated: Stated, window: int, residual: Any, seeds: Any) -> Any:
    x, factors, others, saved = residual
    dh, dlast = (None if isinstance(seed, SymbolicZero) else seed for seed in seeds)
    # What is formed again must wait for dh, or XLA would keep the U of the forward instead, as it is the same.
    x, factors, dh, dlast = lax.optimization_barrier((x, factors, dh, dlast))
    u, pullback = jax.vjp(lambda x, factors: _u(window, x, factors, others), x, factors)
    du, *of_others = autodiff.gradients(stated, (u, *others), saved, dh, dlast)
    return *pullback(du), tuple(of_others)


_layer.defvjp(_forward, _backward, symbolic_zeros=True)


def _u(window: int, x: Array, factors: Sequence[Array], others: Sequence[Any]) -> Array:
    _, lengths, mask, reset, *_ = others
    return project(x, factors, window, lengths, mask, reset)
