"""What a window of several tokens sees where sequences come piece by piece, or token by token."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from .projection import without_padding


def unfold(
    x: Array, tokens: Array, lengths: Array | None, mask: Array | None, reset: Array | None
) -> tuple[Array, Array]:
    """What each step sees, and the tokens that the next piece needs.

    Args:
        x: (L, B, n), a piece of sequences.
        tokens: (window-1, B, n), what came before it, zeros where there was nothing.
        lengths, mask, reset: of the piece. Padding counts as zeros, and so does what is beyond a boundary of `reset`.

    Returns:
        (L, B, window*n), oldest tokens first, and (window-1, B, n).
    """
    (L, B, _), before = x.shape, tokens.shape[0]
    x = without_padding(x, lengths, mask)
    line = jnp.concatenate([tokens.astype(x.dtype), x])
    if reset is None:
        return jnp.concatenate([line[j : j + L] for j in range(before + 1)], -1), _last(line, L, before, lengths)
    # Two tokens are of one segment where as many boundaries lie before the one as before the other.
    segment = jnp.concatenate([jnp.zeros((before, B), jnp.int32), jnp.cumsum(reset.astype(jnp.int32), 0)])
    now = segment[before:]
    seen = [_where(segment[j : j + L] == now, line[j : j + L]) for j in range(before + 1)]
    segment = _last(segment, L, before, lengths)
    return jnp.concatenate(seen, -1), _where(segment == segment[-1], _last(line, L, before, lengths))


def _last(line: Array, L: int, before: int, lengths: Array | None) -> Array:
    """The last tokens of each sequence, of a line (window-1 + L, B, ...) whose sequences begin at window-1."""
    if lengths is None:
        return line[L:]
    index = jnp.clip(lengths, 0, L) + jnp.arange(before)[:, None]
    return jnp.take_along_axis(line, index.reshape(index.shape + (1,) * (line.ndim - 2)), 0)


def _where(kept: Array, x: Array) -> Array:
    """x (L, B, n), and zeros where `kept` (L, B) is false."""
    return jnp.where(kept[..., None], x, jnp.zeros((), x.dtype))
