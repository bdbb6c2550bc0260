"""sigmoid(softplus(x) - softplus(y)), which is one function of cuda/port.h: arguments, values, and limits."""

from __future__ import annotations

import numpy as np

_inf, _nan = np.inf, np.nan
# x, y and the result.
LIMITS = [(0, 0, 0.5), (_inf, 3, 1), (3, _inf, 0), (-_inf, 0, 1 / 3), (0, -_inf, 2 / 3), (-_inf, _inf, 0)]
LIMITS += [(_inf, -_inf, 1), (-_inf, -_inf, 0.5), (1e30, 1e30, 0.5), (1e4, 1e4 - 1, 1 / (1 + np.exp(-1))), (1e30, 0, 1)]
LIMITS += [(_nan, 0, _nan), (0, _nan, _nan), (_nan, _inf, _nan), (_inf, _inf, _nan)]


def samples(dtype: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` arguments of each of several magnitudes; of a third of them x and y are near each other."""
    rng = np.random.default_rng(0)
    x, y = (np.concatenate([rng.uniform(-r, r, n) for r in (1, 5, 20, 100, 3000)]).astype(dtype) for _ in "xy")
    y[::3] = x[::3] + rng.uniform(-8, 8, len(x[::3])).astype(dtype)
    return x, y


def exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(1 + e^x) / (2 + e^x + e^y) as longdouble."""
    top = np.maximum(np.maximum(x, y), 0).astype(np.longdouble)
    part = np.exp(-top) + np.exp(x - top)
    return part / (part + np.exp(-top) + np.exp(y - top))
