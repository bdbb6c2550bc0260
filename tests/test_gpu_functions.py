"""The functions of step functions, as the GPU's kernels compute them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import shares
import sru_rt

pytestmark = pytest.mark.kernels


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Bounds for float32, relative and absolute, of which one must hold; the emulation's ex2 and rcp are right to a unit in
# the last place, those of a GPU nearly so.
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[float, float], float]] = {
    "exp": (np.exp, (-80, 80), 3e-7),
    "log": (np.log, (1e-30, 1e30), 3e-7),
    "sqrt": (np.sqrt, (0, 1e30), 1.2e-7),
    "tanh": (np.tanh, (-20, 20), 3e-7),
    "relu": (lambda x: np.maximum(x, 0), (-1e30, 1e30), 0),
    "sigmoid": (logistic, (-20, 200), 4e-6),  # the argument of 2^x is rounded: 6e-8 for each unit of x below 0
    "softplus": (lambda x: np.logaddexp(0, x), (-60, 200), 6e-6),  # likewise
}


def compute(place, name: str, x: np.ndarray) -> np.ndarray:
    """A function of each number, by a cell whose output it is."""

    @sru_rt.cell(gates="a", state="c", name=f"{name}_of")
    def step(a, c):
        return c, getattr(sru_rt, name)(a)

    return place.get(step.recurrence(place.put(x.reshape(1, 1, 1, 1, -1)))[0]).ravel()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(place, name, dtype):
    function, (low, high), bound = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(low, high, 1000), rng.uniform(max(low, -4), min(high, 4), 1000)]).astype(dtype)
    got, want = compute(place, name, x), function(x.astype("f8"))
    bound = bound if dtype == "float32" else 1e-14
    np.testing.assert_array_less(np.abs(got - want), bound * np.abs(want) + np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name, want",
    [
        ("exp", [np.nan, np.inf, 0, 1, 1]),
        ("tanh", [np.nan, 1, -1, 0, -0.0]),
        ("relu", [np.nan, np.inf, 0, 0, 0]),
        ("sigmoid", [np.nan, 1, 0, 0.5, 0.5]),
        ("softplus", [np.nan, np.inf, 0, np.log(2), np.log(2)]),
    ],
)
def test_limits(place, name, want, dtype):
    got = compute(place, name, np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype))
    np.testing.assert_allclose(got, want, rtol=2e-7)


def test_softplus_keeps_its_digits_near_0(place):
    """Where the argument is moderate, to the last digits, on both sides."""
    x = np.linspace(-4, 4, 4001, dtype=np.float32)
    want = np.logaddexp(0, x.astype("f8"))
    assert (np.abs(compute(place, "softplus", x) - want) <= 5e-7 * want).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_of_a_difference_of_softpluses(place, dtype):
    """It is one function of cuda/port.h, right in every digit that counts, however large both arguments are."""

    @sru_rt.cell(gates="a b", state="c", name="softplus_share")
    def step(a, b, c):
        return c, sru_rt.sigmoid(sru_rt.softplus(a) - sru_rt.softplus(b))

    def share(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return place.get(step.recurrence(place.put(np.stack([x, y]).astype(dtype)[None, None, None]))[0]).ravel()

    x, y = shares.samples(dtype, 500)
    got, want = share(x, y), shares.exact(x, y)
    relative, absolute = {"float32": (3e-6, 5e-7), "float64": (2e-15, 3e-16)}[dtype]
    np.testing.assert_array_less(np.abs(got - want), absolute)
    counts = want > 1e-6
    np.testing.assert_array_less(np.abs(got - want)[counts], relative * want[counts])
    x, y, want = np.array(shares.LIMITS).T
    np.testing.assert_allclose(share(x, y), want, rtol=4e-7, atol=1e-36)
