"""The product U = W x for all steps and both directions at once, and its backward, through the array library's BLAS.

The weight is (D, k, d, d_in), or a pair (P, Q) of (D, k, d, p) and (p, d_in) whose product it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from .library import Library, NDArray


@dataclass(frozen=True, eq=False)
class Weight:
    """The matrix of a projection, (D*k*d, d_in), or its two factors (D*k*d, p) and (p, d_in)."""

    factors: tuple[NDArray, ...]
    library: Library

    @classmethod
    def of(cls, arrays: tuple[NDArray, ...], library: Library) -> Weight:
        first, *rest = [library.contiguous(a, a.dtype) for a in arrays]
        return cls((first.reshape(-1, first.shape[-1]), *rest), library)


def project(x: NDArray, weight: Weight) -> NDArray:
    """x (n, d_in) to U (n, D*k*d)."""
    for factor in reversed(weight.factors):
        x = weight.library.times_transposed(x, factor)
    return x


def gradient_of_x(du: NDArray, weight: Weight, plus: NDArray | None = None) -> NDArray:
    """dU (n, D*k*d) to dx (n, d_in), plus what reaches x on another way, which may be written to."""
    for factor in weight.factors[:-1]:
        du = weight.library.times(du, factor)
    return weight.library.times(du, weight.factors[-1], plus)


def gradient_of_weight(du: NDArray, x: NDArray, weight: Weight, absent: NDArray | None) -> tuple[NDArray, ...]:
    """The gradients of the factors.

    `absent` (n,) marks rows that are padding. Their du is 0, but a NaN or infinity in their x would still spoil the
    sum, as 0*NaN is NaN. So where values can be looked at, a spoilt sum is formed again without them; elsewhere they
    are left out from the beginning.
    """
    library = weight.library
    if absent is not None and not library.reads_values:
        return _gradient_of_weight(du, _without(x, absent, library), weight)
    gradients = _gradient_of_weight(du, x, weight)
    if absent is not None and not all(library.xp.isfinite(g).all() for g in gradients):
        gradients = _gradient_of_weight(du, _without(x, absent, library), weight)
    return gradients


def _without(x: NDArray, absent: NDArray, library: Library) -> NDArray:
    """x (n, m) with zeros in the absent rows. Selects bits, as not every library selects in every dtype."""
    bits = x.view(f"u{x.itemsize}")
    return library.xp.where(absent[:, None], bits.dtype.type(0), bits).view(x.dtype)


def _gradient_of_weight(du: NDArray, x: NDArray, weight: Weight) -> tuple[NDArray, ...]:
    library = weight.library
    if len(weight.factors) == 1:
        return (library.transposed_times(du, x),)
    p, q = weight.factors
    inner = library.times_transposed(x, q)
    return library.transposed_times(du, inner), library.transposed_times(library.times(du, p), x)
