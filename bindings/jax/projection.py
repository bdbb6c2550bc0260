"""The product U = W x in JAX's operations, as `sru_rt.projection` forms it."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def project(
    x: Array,
    factors: Sequence[Array],
    window: int = 1,
    lengths: Array | None = None,
    mask: Array | None = None,
    reset: Array | None = None,
) -> Array:
    """U (L, B, D, k, d) of x (L, B, d_in).

    `factors` are a weight (D, k, d, window*d_in), or (D, k, d, p) and (p, window*d_in). Padding, which may hold
    anything, counts as zeros; so do tokens beyond an end or a boundary.
    """
    D, k, d, _ = factors[0].shape
    first = factors[0].reshape(D * k * d, factors[0].shape[3])
    x = without_padding(x, lengths, mask)
    if window == 1:
        u = _product(x, first, factors[1:])
        return u.reshape(*u.shape[:2], D, k, d)
    u = [
        _product(_seen(x, window, reset, reverse=bool(q)), first[q * k * d : (q + 1) * k * d], factors[1:])
        for q in range(D)
    ]
    return jnp.stack([one.reshape(*one.shape[:2], k, d) for one in u], 2)


def without_padding(x: Array, lengths: Array | None, mask: Array | None) -> Array:
    """x (L, B, ...) with zeros at padding, whose gradient then is zero, too, whatever it holds."""
    if lengths is None and mask is None:
        return x
    absent = jnp.zeros((), bool) if mask is None else mask.astype(bool)
    if lengths is not None:
        absent = absent | (jnp.arange(x.shape[0])[:, None] >= lengths)
    return jnp.where(absent[..., None], jnp.zeros((), x.dtype), x)


def _product(rows: Array, first: Array, inner: Sequence[Array]) -> Array:
    for factor in inner:
        rows = rows @ factor.T
    return rows @ first.T


def _seen(x: Array, window: int, reset: Array | None, reverse: bool) -> Array:
    """The last tokens of each step side by side, oldest first, (L, B, window*d_in); of the reverse, the next ones."""
    # A token is seen if no boundary lies between it and the step, so if both come after as many.
    piece = None if reset is None else jnp.cumsum(reset.astype(jnp.int32), 0)
    taps = [x]
    for back in range(1, window):
        tap = _shifted(x, back, reverse)
        if piece is not None:
            same = _shifted(piece, back, reverse) == piece
            tap = jnp.where(same[..., None], tap, jnp.zeros((), tap.dtype))
        taps.append(tap)
    return jnp.concatenate(taps[::-1], -1)


def _shifted(x: Array, back: int, reverse: bool) -> Array:
    """x of `back` steps ago, or of `back` steps later; zeros beyond the ends."""
    zeros = jnp.zeros((back, *x.shape[1:]), x.dtype)
    return jnp.concatenate([x, zeros])[back:] if reverse else jnp.concatenate([zeros, x])[: x.shape[0]]
