"""What the init functions of all cells share: sizes, random numbers, dtype, and the library of the result."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays
from .check import Check
from .dtypes import IO_DTYPES, to_numpy

NDArray = np.ndarray[Any, Any]


class Init:
    """The sizes of one layer, checked, and its random numbers.

    They come from `rng`, a generator or seed of NumPy, or an object with a method `uniform` like a generator's.
    """

    def __init__(
        self, check: Check, d_in: Any, d: Any, directions: Any, low_rank: Any, dtype: Any, rng: Any, window: Any = 1
    ) -> None:
        self.check = check
        self.d_in, self.d = self._size("d_in", d_in), self._size("d", d)
        self.D = self._size("directions", directions)
        check.choice("directions", self.D, (1, 2))
        self.low_rank = None if low_rank is None else self._size("low_rank", low_rank)
        self.columns = self._size("window", window) * self.d_in
        self.dtype = _dtype(check, dtype)
        try:
            self._generator = rng if hasattr(type(rng), "uniform") else np.random.default_rng(rng)
        except (TypeError, ValueError):
            raise check.error(
                "rng", f"must be a numpy.random.Generator or a seed, an integer >= 0 (got {rng!r})"
            ) from None

    def _size(self, name: str, size: Any) -> int:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise self.check.error(name, f"must be a positive integer (got {size!r})")
        return int(size)

    def uniform(self, shape: tuple[int, ...], variance: float) -> NDArray:
        bound = np.sqrt(3 * variance)
        try:
            return self._generator.uniform(-bound, bound, shape)
        except ValueError:
            raise self.check.error("d_in, d", f"ask for an array {shape}, which is larger than any memory") from None

    def weight(self, k: int, scale_of_last: float = 1.0) -> NDArray | tuple[NDArray, NDArray]:
        """Uniform with variance 1 / (number of columns), of each factor of a pair; the last gate may be scaled."""
        inner = self.low_rank or self.columns
        outer = self.uniform((self.D, k, self.d, inner), 1 / inner)
        if scale_of_last != 1.0:
            outer = outer * np.append(np.ones(k - 1), scale_of_last)[:, None, None]
        if not self.low_rank:
            return outer
        return outer, self.uniform((self.low_rank, self.columns), 1 / self.columns)

    def biases(self, *values: float) -> NDArray:
        """(D, number of values, d)."""
        return np.broadcast_to(np.array(values)[:, None], (self.D, len(values), self.d))

    def skip_is_projected(self, project_skip: Any, has_skip: bool) -> bool:
        """What `project_skip` means for a layer of these sizes."""
        check, d_out = self.check, self.D * self.d
        project_skip = check.choice("project_skip", project_skip, ("auto", True, False))
        if project_skip is True and not has_skip:
            raise check.error("project_skip", "is True, but these options have no skip; leave it out")
        if has_skip and project_skip is False and self.d_in != d_out:
            raise check.error(
                "project_skip",
                f"is False, but the skip adds x of size {self.d_in} to h of size {d_out}; use 'auto', or highway=False",
            )
        return has_skip and (project_skip is True or self.d_in != d_out)

    def result(self, params: dict[str, Any], like: Any) -> dict[str, Any]:
        """`params` with arrays in the dtype, and in the library of `like`."""

        def cast(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cast, value))
            return value.astype(self.dtype) if hasattr(value, "astype") else value

        return arrays.like(self.check.function, {name: cast(value) for name, value in params.items()}, like)


def _dtype(check: Check, dtype: Any) -> np.dtype[Any]:
    try:
        name = str(dtype) if dtype is None else np.dtype(dtype).name
    except TypeError:  # bfloat16 is unknown to NumPy by name
        name = str(dtype)
    check.choice("dtype", name, IO_DTYPES)
    return to_numpy(name)
