"""The product U = W x for all steps and both directions at once, and its backward, through the array library's BLAS.

The weight is (D, k, d, d_in), or a pair (P, Q) of (D, k, d, p) and (p, d_in) whose product it is. NumPy has no
16-bit products: they are formed in float32, a block of rows at a time, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import empty

NDArray = np.ndarray[Any, Any]

_ROWS = 2048  # rows of a block: large enough for BLAS, small enough to stay in the cache


@dataclass(frozen=True, eq=False)
class Weight:
    """The matrix of a projection, (D*k*d, d_in), or its two factors (D*k*d, p) and (p, d_in)."""

    factors: tuple[NDArray, ...]

    @classmethod
    def of(cls, arrays: tuple[NDArray, ...]) -> Weight:
        first = np.ascontiguousarray(arrays[0])
        rest = [np.ascontiguousarray(a) for a in arrays[1:]]
        return cls((first.reshape(-1, first.shape[-1]), *rest))


def _wide(a: NDArray) -> NDArray:
    return a.astype(np.float32) if a.itemsize == 2 else a


def product(a: NDArray, b: NDArray, plus: NDArray | None = None) -> NDArray:
    """a (n, m) times b (m, k), plus `plus` (n, k), in the dtype of `a`."""
    out = empty((a.shape[0], b.shape[1]), a.dtype)
    with np.errstate(all="ignore"):  # padding may hold anything, infinities included
        if a.itemsize > 2:
            np.matmul(a, b, out=out)
            if plus is not None:
                out += plus
            return out
        b = _wide(b)
        for begin in range(0, len(a), _ROWS):
            rows = slice(begin, begin + _ROWS)
            block = _wide(a[rows]) @ b
            out[rows] = block if plus is None else block + _wide(plus[rows])
    return out


def product_over_rows(a: NDArray, b: NDArray) -> NDArray:
    """a.T (m, n) times b (n, k), summed over many rows, in the dtype of the sums."""
    with np.errstate(all="ignore"):  # as above
        if a.itemsize > 2:
            return a.T @ b
        total = np.zeros((a.shape[1], b.shape[1]), np.float32)
        for begin in range(0, len(a), _ROWS):
            rows = slice(begin, begin + _ROWS)
            total += _wide(a[rows]).T @ _wide(b[rows])
    return total


def project(x: NDArray, weight: Weight) -> NDArray:
    """x (n, d_in) to U (n, D*k*d)."""
    for factor in reversed(weight.factors):
        x = product(x, factor.T)
    return x


def gradient_of_x(du: NDArray, weight: Weight, plus: NDArray | None = None) -> NDArray:
    """dU (n, D*k*d) to dx (n, d_in), plus what reaches x on another way."""
    for factor in weight.factors[:-1]:
        du = product(du, factor)
    return product(du, weight.factors[-1], plus)


def gradient_of_weight(du: NDArray, x: NDArray, weight: Weight, absent: NDArray | None) -> tuple[NDArray, ...]:
    """The gradients of the factors.

    `absent` (n,) marks rows that are padding. Their du is 0, but a NaN or infinity in their x would still spoil the
    sum, as 0*NaN is NaN; so if the sum is spoilt, it is formed again without them.
    """
    gradients = _gradient_of_weight(du, x, weight)
    if absent is not None and not all(np.isfinite(g).all() for g in gradients):
        gradients = _gradient_of_weight(du, np.where(absent[:, None], x.dtype.type(0), x), weight)
    return gradients


def _gradient_of_weight(du: NDArray, x: NDArray, weight: Weight) -> tuple[NDArray, ...]:
    if len(weight.factors) == 1:
        return (product_over_rows(du, x),)
    p, q = weight.factors
    inner = product(x, q.T)
    return product_over_rows(du, inner), product_over_rows(product(du, p), x)
