"""A cell of a user with everything that a cell can have, for the tests of the bindings."""

from __future__ import annotations

from typing import Any

import numpy as np

import sru_rt


@sru_rt.cell(gates="a n", inputs="x", per_sequence="m", params="b", state="c s", constants="k")
def two_states(a, n, x, m, b, c, s, k=0.5):
    a = sru_rt.sigmoid(a + b * s)
    c = a * c + (1 - a) * n * m
    s = k * s + (1 - k) * sru_rt.tanh(c)
    return c, s, c * x + s


def two_state_problem() -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(3)
    arrays = two_states.init(8, 4, directions=2, rng=1, dtype="float64")
    arrays |= {"x": rng.normal(size=(5, 3, 8)), "m": rng.normal(size=(3, 2, 4))}
    arrays["c0"] = tuple(rng.normal(size=(2, 2, 3, 4)))
    return arrays, {"k": 0.25, "lengths": [5, 1, 3]}
