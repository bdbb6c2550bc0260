"""The product U = W x for all steps and both directions, and its backward, through the array library's BLAS.

The weight is (D, k, d, d_in), or a pair (P, Q) of (D, k, d, p) and (p, d_in) whose product it is. With a window of
several tokens, as in Quasi-RNN, a step sees the last tokens side by side, oldest first, and the last axis of the weight
is window*d_in; the reverse direction sees the mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .library import Library, NDArray


@dataclass(frozen=True, eq=False)
class Projection:
    """What U is formed from: C-contiguous arrays of one library.

    Tokens beyond `lengths` (B,) and where `mask` (L, B) is true are padding, and count as zeros in a window that
    reaches them; so do those beyond a boundary, which stands before each step where `reset` (L, B) is true.
    """

    library: Library
    x: NDArray  # (L, B, d_in)
    factors: tuple[NDArray, ...]
    window: int = 1
    lengths: NDArray | None = None
    mask: NDArray | None = None
    reset: NDArray | None = None

    @property
    def is_plain(self) -> bool:
        """Whether each row of U is one product of a row of x and a weight."""
        return self.window == 1 and len(self.factors) == 1

    def u(self, empty: Callable[..., NDArray] | None = None) -> NDArray:
        """(L, B, D, k, d), in memory that `empty` gives; by default, that of the library."""
        L, B, _ = self.x.shape
        D, k, d, _ = self.factors[0].shape
        u = (empty or self.library.empty)((L * B, D * k * d), self.x.dtype)
        for q, columns, first in self._parts():
            rows = self._seen(q, clean=self.window > 1)
            for factor in self.factors[1:]:
                rows = self.library.times_transposed(rows, factor)
            self.library.times_transposed(rows, first, u[:, columns])
        return u.reshape(L, B, D, k, d)

    def gradient_of_x(self, du: NDArray, plus: NDArray | None) -> NDArray:
        """(L, B, d_in) from the gradient of U (L, B, D, k, d).

        `plus` (L, B, d_in) is what reaches x on another way; it may be written to.
        """
        library, (L, B, d_in) = self.library, self.x.shape
        rows, last = [], []
        for _, columns, first in self._parts():
            part = _rows(du)[:, columns]
            rows.append(library.times(part, first) if len(self.factors) > 1 else part)
            last.append(self.factors[1] if len(self.factors) > 1 else first)
        if self.window == 1:
            (seen,), (weight,) = rows, last
        else:  # the steps that see a token are a window, too: that of the other direction
            m = rows[0].shape[1]
            seen = library.empty((L, B, len(rows), self.window, m), self.x.dtype)
            for q, part in enumerate(rows):
                self._fill(seen[:, :, q], part.reshape(L, B, m), reverse=not q)
            seen = seen.reshape(L * B, len(rows) * self.window * m)
            weight = library.empty((len(rows), self.window, m, d_in), self.x.dtype)
            for q, part in enumerate(last):
                _bits(weight)[q] = _bits(part).reshape(m, self.window, d_in).transpose(1, 0, 2)
            weight = weight.reshape(-1, d_in)
        found = library.times(seen, weight, None if plus is None else plus.reshape(L * B, d_in)).reshape(L, B, d_in)
        return found if self.window == 1 else self._without_padding(found)

    def gradient_of_weight(self, du: NDArray) -> tuple[NDArray, ...]:
        """The gradients of the factors, from that of U (L, B, D, k, d).

        At padding du is 0, but a NaN or infinity in x would still spoil the sum, as 0*NaN is NaN. So where values can
        be looked at, a spoilt sum is formed again without these rows; elsewhere they are left out from the beginning.
        """
        if self.window == 1 and self.library.reads_values:
            gradients = self._gradient_of_weight(du, clean=False)
            if self._has_no_padding or all(self.library.xp.isfinite(g).all() for g in gradients):
                return gradients
        return self._gradient_of_weight(du, clean=True)

    def _gradient_of_weight(self, du: NDArray, clean: bool) -> tuple[NDArray, ...]:
        library, (D, k, d, _) = self.library, self.factors[0].shape
        outer, inner = [], None
        for q, columns, first in self._parts():
            part, rows = _rows(du)[:, columns], self._seen(q, clean)
            if len(self.factors) > 1:
                found = library.transposed_times(library.times(part, first), rows)
                inner = found if inner is None else inner + found
                rows = library.times_transposed(rows, self.factors[1])
            outer.append(library.transposed_times(part, rows))
        whole = outer[0] if len(outer) == 1 else library.xp.concatenate(outer)
        whole = whole.reshape(D, k, d, -1)
        return (whole,) if inner is None else (whole, inner)

    def _parts(self) -> Iterator[tuple[int, slice, NDArray]]:
        """Direction, columns of U (L*B, D*k*d), and rows of the first factor, of what one product forms.

        Directions that see the same are one part.
        """
        D, k, d, columns = self.factors[0].shape
        first = self.factors[0].reshape(D * k * d, columns)
        if self.window == 1:
            yield 0, slice(None), first
            return
        for q in range(D):
            part = slice(q * k * d, (q + 1) * k * d)
            yield q, part, first[part]

    def _seen(self, q: int, clean: bool) -> NDArray:
        """What each step of direction `q` sees, (L*B, window*d_in); padding as zeros, if `clean`."""
        L, B, d_in = self.x.shape
        x = self._without_padding(self.x) if clean else self.x
        if self.window == 1:
            return x.reshape(L * B, d_in)
        made = self.library.empty((L, B, self.window, d_in), x.dtype)
        self._fill(made, x, reverse=bool(q))
        return made.reshape(L * B, self.window * d_in)

    def _fill(self, to: NDArray, rows: NDArray, reverse: bool) -> None:
        """Writes each step's window of `rows` (L, B, m) to `to` (L, B, window, m)."""
        L, B, _ = rows.shape
        xp, to, rows = self.library.xp, _bits(to), _bits(rows)
        crossed = xp.zeros((L, B), bool)
        for back in range(self.window):
            tap, n = self.window - 1 - back, max(L - back, 0)
            here, there = (slice(0, n), slice(L - n, L)) if reverse else (slice(L - n, L), slice(0, n))
            nowhere = slice(n, L) if reverse else slice(0, L - n)
            to[nowhere, :, tap] = 0
            if self.reset is None or not back:
                to[here, :, tap] = rows[there]
                continue
            boundary = slice(L - n, L) if reverse else slice(1, n + 1)
            crossed[here] |= self.reset[boundary]
            to[here, :, tap] = _zeros_where(crossed[here], rows[there], xp)

    @property
    def _has_no_padding(self) -> bool:
        return self.lengths is None and self.mask is None

    def _without_padding(self, x: NDArray) -> NDArray:
        """x (L, B, m) with zeros at padding."""
        if self._has_no_padding:
            return x
        xp, (L, B, _) = self.library.xp, x.shape
        absent = xp.zeros((L, B), bool) if self.mask is None else self.mask.copy()
        if self.lengths is not None:
            absent |= xp.arange(L)[:, None] >= self.lengths
        return _zeros_where(absent, _bits(x), xp).view(x.dtype)


def _rows(du: NDArray) -> NDArray:
    """(L, B, D, k, d) as (L*B, D*k*d)."""
    L, B, D, k, d = du.shape
    return du.reshape(L * B, D * k * d)


def _bits(x: NDArray) -> NDArray:
    """The same memory as integers, since not every library moves and selects numbers of every dtype."""
    return x.view(f"u{x.itemsize}")


def _zeros_where(flags: NDArray, bits: NDArray, xp: NDArray) -> NDArray:
    return xp.where(flags[..., None], bits.dtype.type(0), bits)
