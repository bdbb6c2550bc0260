"""U = W x for all steps, and back: low-rank weights, and windows of several tokens.

With window > 1 the columns of the weight are taps, oldest first: tap j of step t sees the token window-1-j steps
before t, in the order in which the direction goes. It sees zeros where there is no such token: beyond the ends and
lengths, at masked steps, and on the other side of a boundary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .frame import Layout, boundaries, live_steps
from .tools import float64


def full_weight(weight: Any) -> np.ndarray:
    """weight in float64 as (D, k, d, window*d_in); a pair (P, Q) is multiplied out."""
    if isinstance(weight, tuple | list):
        P, Q = weight
        return float64(P) @ float64(Q)
    return float64(weight)


def project(x: Any, weight: Any, window: int = 1, **layout: Any) -> np.ndarray:
    """U (L, B, D, k, d) of x (L, B, d_in); the layout is lengths, mask, reset."""
    x, w = float64(x), full_weight(weight)
    seen = _windows(x, len(w), window, Layout(**layout))
    return np.stack([np.tensordot(seen[q], w[q], axes=([2], [2])) for q in range(len(w))], axis=2)


def project_backward(
    x: Any, weight: Any, du: np.ndarray, window: int = 1, **layout: Any
) -> tuple[np.ndarray, np.ndarray | tuple[np.ndarray, np.ndarray]]:
    """Gradients of x and of weight from that of U, which is 0 at padding."""
    x, w = float64(x), full_weight(weight)
    seen = _windows(x, len(w), window, Layout(**layout))
    # u[l,b,q,k,j] = sum_i weight[q,k,j,i] * seen[q,l,b,i], so each gradient is du against the other factor.
    dw = np.stack([np.tensordot(du[:, :, q], seen[q], axes=([0, 1], [0, 1])) for q in range(len(w))])
    dseen = np.stack([np.tensordot(du[:, :, q], w[q], axes=([2, 3], [0, 1])) for q in range(len(w))])
    dx = np.zeros(x.shape)
    for q, columns, t, source, visible in _taps(*x.shape, len(w), window, Layout(**layout)):
        dx[source] += np.where(visible, dseen[q, t, :, columns], 0.0)
    if not isinstance(weight, tuple | list):
        return dx, dw
    P, Q = (float64(factor) for factor in weight)
    # weight[q,k,j,i] = sum_p P[q,k,j,p] * Q[p,i]
    return dx, (dw @ Q.T, np.tensordot(P, dw, axes=([0, 1, 2], [0, 1, 2])))


def _windows(x: np.ndarray, D: int, window: int, layout: Layout) -> np.ndarray:
    """(D, L, B, window*d_in), what each step of each direction sees."""
    L, B, d_in = x.shape
    seen = np.zeros((D, L, B, window * d_in))
    for q, columns, t, source, visible in _taps(L, B, d_in, D, window, layout):
        # x may be NaN where it is not seen, and 0 * NaN is NaN.
        seen[q, t, :, columns] = np.where(visible, x[source], 0.0)
    return seen


def _taps(
    L: int, B: int, d_in: int, D: int, window: int, layout: Layout
) -> Iterator[tuple[int, slice, int, int, np.ndarray]]:
    """The direction, columns and step of each tap, the token it sees, and by which sequences (B, 1) it is seen."""
    live = live_steps(L, B, layout.lengths, layout.mask)
    # Two tokens are of one segment where as many boundaries lie before the one as before the other.
    segment = boundaries(L, B, layout).cumsum(axis=0)
    for q in range(D):
        for tap in range(window):
            back = window - 1 - tap
            for t in range(L):
                source = t - back if q == 0 else t + back
                if 0 <= source < L:
                    visible = live[source] & (segment[source] == segment[t])
                    yield q, slice(tap * d_in, (tap + 1) * d_in), t, source, visible[:, None]
