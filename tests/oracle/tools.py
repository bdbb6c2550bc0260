"""What tests need around an oracle: numbers to start from, finite differences, a distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def float64(array: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """array in float64; a shape other than the given one is refused, so that nothing broadcasts unseen."""
    array = np.asarray(array).astype(np.float64)
    if shape is not None and array.shape != shape:
        raise ValueError(f"got shape {array.shape}, need {shape}")
    return array


def finite_differences(f: Callable[..., float], arrays: dict[str, Any], eps: float = 1e-5) -> dict[str, np.ndarray]:
    """Central differences of the scalar f(**arrays) in every element of every array, in float64, by name."""
    point = {name: float64(array).copy() for name, array in arrays.items()}
    grads = {name: np.zeros(array.shape) for name, array in point.items()}
    for name, array in point.items():
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + eps
            above = f(**point)
            array[index] = value - eps
            below = f(**point)
            array[index] = value
            grads[name][index] = (above - below) / (2 * eps)
    return grads


def relative_error(got: Any, want: Any) -> float:
    """max|got - want| / max|want|, or max|got - want| where want is 0 throughout.

    NaN in either gives NaN, which passes no bound.
    """
    want = float64(want)
    difference = np.abs(float64(got, want.shape) - want)
    if want.size == 0:
        return 0.0
    return float(difference.max() / (np.abs(want).max() or 1.0))


def random_weight(rng: np.random.Generator, D: int, k: int, d: int, columns: int, low_rank: int | None = None) -> Any:
    """weight (D, k, d, columns), or a pair of rank low_rank, such that U has about the variance of x."""

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape) * np.sqrt(3 / shape[-1])

    if low_rank is None:
        return uniform(D, k, d, columns)
    return uniform(D, k, d, low_rank), uniform(low_rank, columns)


def random_inputs(
    rng: np.random.Generator,
    L: int,
    B: int,
    d: int,
    *,
    D: int = 1,
    k: int = 3,
    d_in: int | None = None,
    low_rank: int | None = None,
    v: str = "constant",
) -> dict[str, Any]:
    """Float64 inputs x, weight, bias, v, c0 for sru_forward(**inputs), such that U has about unit variance.

    v is none, constant or per_step; d_in defaults to D*d; low_rank=p gives a weight pair; k = 2 is what
    reset_gate=False takes.
    """
    d_in = D * d if d_in is None else d_in
    G = 1 if k == 2 else 2
    shape = {"none": None, "constant": (D, G, d), "per_step": (L, B, D, G, d)}[v]
    return {
        "x": rng.standard_normal((L, B, d_in)),
        "weight": random_weight(rng, D, k, d, d_in, low_rank),
        "bias": 0.5 * rng.standard_normal((D, G, d)),
        "v": None if shape is None else rng.standard_normal(shape),
        "c0": rng.standard_normal((D, B, d)),
    }


def random_layout(
    rng: np.random.Generator,
    L: int,
    B: int,
    *,
    lengths: bool = False,
    mask: bool = False,
    reset: bool = False,
) -> dict[str, np.ndarray]:
    """Those of the options lengths, mask and reset that are asked for: random, with corner cases put in.

    Sequence 0 has full length and boundaries at t = 0 and at a masked step; of several sequences the last has
    length 0.
    """
    layout: dict[str, np.ndarray] = {}
    if lengths:
        layout["lengths"] = rng.integers(0, L + 1, B)
        layout["lengths"][-1:] = 0
        layout["lengths"][:1] = L
    if mask:
        layout["mask"] = rng.random((L, B)) < 0.3
        layout["mask"][L // 2 : L // 2 + 1, :1] = True
    if reset:
        layout["reset"] = rng.random((L, B)) < 0.3
        layout["reset"][[t for t in (0, L // 2) if t < L], :1] = True
    return layout
