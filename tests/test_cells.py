"""The matrix: every option of every cell, in every dtype, against the float64 oracle, forward and backward.

problems.py says what the options of each cell are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import oracle
import tolerance
from matrix import matrix
from problems import (
    CELLS,
    DTYPES,
    LAYER_ROWS,
    LAYOUTS,
    POLICIES,
    ROWS,
    SIZES,
    SMOOTH_ROWS,
    SRU_ROWS,
    Problem,
    Row,
    all_rows,
    away_from_kinks,
    compare,
    name_of,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", matrix(ROWS), ids=name_of)
def test_recurrence_matches_oracle(row, D, layout, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    recurrence_matches_oracle(row, D, layout, ROWS.index(row) + 10 * D + 3 * list(LAYOUTS).index(layout))


@pytest.mark.parametrize("row", matrix(SRU_ROWS), ids=name_of)
def test_every_three_options_of_sru_match_oracle(row, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    n = SRU_ROWS.index(row)
    for D in (1, 2):
        recurrence_matches_oracle(row, D, list(LAYOUTS)[(n + D) % len(LAYOUTS)], n + 2 * D)


def recurrence_matches_oracle(row: Row, D: int, layout: str, n: int) -> None:
    """`n` chooses the sizes and the memory policy."""
    problem = Problem.make(row, SIZES[n % len(SIZES)], D, layout)
    result, gradients = problem.run(save=POLICIES[n % len(POLICIES)])
    compare(problem, result, gradients)
    again = problem.forward()(**problem.given)
    assert all(np.array_equal(a, b) for a, b in zip(again, result)), "saving changes the result"


OPTIONS = [row for cell in CELLS.values() for row in all_rows(cell) if row["dtype"] == "float16"]


@pytest.mark.parametrize("row", matrix(OPTIONS), ids=name_of)
def test_every_combination_of_options_on_numpy(row, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    n = OPTIONS.index(row)
    row = row | {"dtype": list(DTYPES)[n % len(DTYPES)]}
    problem = Problem.make(row, SIZES[n % 3], 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)])
    compare(problem, *problem.run(save=POLICIES[n % len(POLICIES)]))


@pytest.mark.parametrize("save", [True, 4, "x"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", matrix(LAYER_ROWS), ids=name_of)
def test_layer_matches_oracle(row, D, save, backend):
    layout = list(LAYOUTS)[LAYER_ROWS.index(row) % len(LAYOUTS)]
    problem = Problem.make(row, (7, 3, 9), D, layout, layer=True)
    compare(problem, *problem.run(layer=True, save=save), layer=True)


LOW_RANK = {"sru": {}, "qrnn": {"window": 2, "highway": True}, "mingru": {}, "minlstm": {}}


@pytest.mark.parametrize("save", [True, "x"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", LOW_RANK)
def test_low_rank_matches_oracle(cell, dtype, save):
    rng = np.random.default_rng(7)
    params = CELLS[cell].library("init")(12, 6, directions=2, low_rank=4, rng=rng, dtype=dtype, **LOW_RANK[cell])
    x = rng.normal(size=(8, 3, 12)).astype(DTYPES[dtype])
    arrays = {"x": x} | {name: value for name, value in params.items() if isinstance(value, (np.ndarray, tuple))}
    options = {name: value for name, value in params.items() if name not in arrays}
    dh = rng.normal(size=x.shape).astype(x.dtype)
    dlast = np.ones((2, 3, 6), "f8" if dtype == "float64" else "f4")
    problem = Problem(CELLS[cell], arrays, options, dh, dlast, dtype, np.zeros((8, 3), bool))
    assert isinstance(problem.arrays["weight"], tuple)
    compare(problem, *problem.run(layer=True, save=save), layer=True)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", matrix(SMOOTH_ROWS), ids=name_of)
def test_gradients_by_finite_differences(row, D):
    """Independent of the oracle: the library's backward against its own forward."""
    problem = away_from_kinks(row, (4, 2, 3), D, "all", layer=True)

    def loss(**arrays: Any) -> float:
        h, last = problem.forward(layer=True)(**{**problem.given, **arrays})
        return float((h * problem.dh).sum() + (last * problem.dlast).sum())

    _, gradients = problem.run(layer=True, save=3)
    given = {name: array for name, array in problem.arrays.items() if array is not None}
    for name, wanted in oracle.finite_differences(loss, given).items():
        tolerance.check(f"d{name}", getattr(gradients, name), wanted, 1e-7)
