"""The matrix: every option of a cell, in every dtype, against the float64 oracle, forward and backward."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import oracle
import sru_rt
import tolerance

DTYPES = {"float16": np.float16, "bfloat16": bfloat16, "float32": np.float32, "float64": np.float64}

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": ("x", "projected", "no_skip", "basic"),
    "activation": ("identity", "tanh", "relu"),
    "reset_on": ("previous", "current"),
    "bias": (True, False),
    "v": ("params", "inputs", "none"),
    "dropout": (False, True),
    "dtype": tuple(DTYPES),
}
LAYOUTS = {
    "plain": {},
    "lengths": {"lengths": True},
    "mask": {"mask": True},
    "reset": {"reset": True},
    "all": {"lengths": True, "mask": True, "reset": True},
}
SIZES = [(5, 3, 7), (1, 1, 1), (9, 2, 33), (4, 5, 16), (13, 1, 70), (6, 4, 8)]  # L, B, d
POLICIES = [True, 3, 1, "x", 50]


def covering(strength: int) -> list[dict[str, Any]]:
    """Rows in which every choice of `strength` factors takes every combination of values; greedy, deterministic."""
    names = list(FACTORS)
    rows = [dict(zip(names, values)) for values in itertools.product(*FACTORS.values())]
    groups = list(itertools.combinations(names, strength))
    covered = {id(row): {(group, tuple(row[n] for n in group)) for group in groups} for row in rows}
    missing = set().union(*covered.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(covered[id(row)] & missing))
        chosen.append(best)
        missing -= covered[id(best)]
    return chosen


@dataclass
class Problem:
    """One call and its options, in the dtype under test, with values that dtype holds exactly."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    dh: np.ndarray
    dc_last: np.ndarray
    dtype: str
    padded: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def make(cls, row: dict[str, Any], size: tuple[int, int, int], D: int, layout: str, layer: bool = False) -> Problem:
        L, B, d = size
        key = f"{sorted(row.items())} {size} {D} {layout} {layer}"
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        dtype = DTYPES[row["dtype"]]
        state = np.float64 if row["dtype"] == "float64" else np.float32
        small = dtype if rng.integers(2) else state if state == np.float32 else dtype

        def draw(*shape: int, dtype: Any = dtype) -> np.ndarray:
            return rng.normal(size=shape).astype(dtype)

        gated = 1 if row["kind"] == "basic" else 2
        k = 1 + gated + (row["kind"] == "projected")
        arrays: dict[str, Any] = {"u": draw(L, B, D, k, d)}
        if layer:
            d_in = D * d if row["kind"] == "x" else D * d + 3
            arrays = {
                "x": draw(L, B, d_in),
                "weight": (draw(D, k, d, d_in, dtype=np.float64) / np.sqrt(d_in)).astype(dtype),
            }
        elif row["kind"] == "x":
            arrays["x"] = draw(L, B, D * d)
        arrays["bias"] = draw(D, gated, d, dtype=small) if row["bias"] else None
        arrays["v"] = {
            "none": lambda: None,
            "params": lambda: draw(D, gated, d, dtype=small),
            "inputs": lambda: draw(L, B, D, gated, d, dtype=small),
        }[row["v"]]()
        arrays["c0"] = draw(D, B, d, dtype=small) if rng.integers(2) else None
        options: dict[str, Any] = {"alpha": 1.3} if row["kind"] == "x" else {}
        options |= {"activation": row["activation"], "reset_on": row["reset_on"]}
        options |= {"highway": False} if row["kind"] == "no_skip" else {}
        options |= {"reset_gate": False} if row["kind"] == "basic" else {}
        if row["dropout"]:
            options["dropout_mask"] = (rng.integers(0, 2, size=(B, D, d)) * 2).astype(small)
        options |= oracle.random_layout(rng, L, B, **LAYOUTS[layout])
        padded = ~oracle.live_steps(L, B, options.get("lengths"), options.get("mask"))
        dh, dc_last = draw(L, B, D * d), draw(D, B, d, dtype=state)
        for name in ("u", "x"):
            if name in arrays:
                arrays[name][padded] = np.nan  # what stands in padding must not matter
        return cls(arrays, options, dh, dc_last, row["dtype"], padded)

    def wanted(self, layer: bool = False) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        forward = oracle.sru_forward if layer else oracle.sru_recurrence
        backward = oracle.sru_backward if layer else oracle.sru_recurrence_backward
        h, c_last = forward(**self.arrays, **self.options)
        return h, c_last, backward(**self.arrays, **self.options, dh=self.dh, dc_last=self.dc_last)


def name_of(row: dict[str, Any]) -> str:
    return "-".join(str(v) if not isinstance(v, bool) else f"{n}{int(v)}" for n, v in row.items())


def compare(problem: Problem, result: tuple[Any, ...], gradients: Any, layer: bool = False) -> None:
    """Holds results and gradients against the oracle, dtype and tolerance included."""
    h, c_last, wanted = problem.wanted(layer)
    state = "float64" if problem.dtype == "float64" else "float32"
    step, summed = (tolerance.LAYER, tolerance.LAYER) if layer else (tolerance.STEP, tolerance.SUM)
    assert result[0].dtype == DTYPES[problem.dtype] and result[1].dtype.name == state
    tolerance.check("h", result[0], h, step[problem.dtype])
    assert not np.asarray(result[0], np.float64)[problem.padded].any(), "h is not 0 at padding"
    tolerance.check("c_last", result[1], c_last, step[problem.dtype if layer else state])
    for name, array in problem.arrays.items():
        gradient = getattr(gradients, name)
        if array is None:
            assert gradient is None
            continue
        assert gradient.dtype == array.dtype, name
        kind = array.dtype.name if not layer else max(array.dtype.name, problem.dtype, key=tolerance.LAYER.get)
        tolerance.check(f"d{name}", gradient, wanted[name], (step if name in ("u", "x") else summed)[kind])


ROWS = covering(3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_recurrence_matches_oracle(row, D, layout, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    n = ROWS.index(row) + 10 * D + 3 * list(LAYOUTS).index(layout)
    problem = Problem.make(row, SIZES[n % len(SIZES)], D, layout)
    *result, saved = sru_rt.sru_recurrence(**problem.arrays, **problem.options, save=POLICIES[n % len(POLICIES)])
    compare(problem, result, sru_rt.sru_backward(saved, problem.dh, problem.dc_last))
    again = sru_rt.sru_recurrence(**problem.arrays, **problem.options)
    assert all(np.array_equal(a, b) for a, b in zip(again, result)), "saving changes the result"


ALL_ROWS = [dict(zip(FACTORS, values)) for values in itertools.product(*FACTORS.values())]


@pytest.mark.parametrize("row", ALL_ROWS[:: len(DTYPES)], ids=name_of)
def test_every_combination_of_options_on_numpy(row, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    n = ALL_ROWS.index(row) // len(DTYPES)
    row = row | {"dtype": list(DTYPES)[n % len(DTYPES)]}
    problem = Problem.make(row, SIZES[n % 3], 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)])
    *result, saved = sru_rt.sru_recurrence(**problem.arrays, **problem.options, save=POLICIES[n % len(POLICIES)])
    compare(problem, result, sru_rt.sru_backward(saved, problem.dh, problem.dc_last))


LAYER_ROWS = covering(2)


@pytest.mark.parametrize("save", [True, 4, "x"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", LAYER_ROWS, ids=name_of)
def test_layer_matches_oracle(row, D, save, backend):
    layout = list(LAYOUTS)[LAYER_ROWS.index(row) % len(LAYOUTS)]
    problem = Problem.make(row, (7, 3, 9), D, layout, layer=True)
    *result, saved = sru_rt.sru_forward(**problem.arrays, **problem.options, save=save)
    compare(problem, result, sru_rt.sru_backward(saved, problem.dh, problem.dc_last), layer=True)


@pytest.mark.parametrize("save", [True, "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_matches_oracle(dtype, save):
    rng = np.random.default_rng(7)
    params = sru_rt.sru_init(12, 6, directions=2, low_rank=4, rng=rng, dtype=dtype)
    x = rng.normal(size=(8, 3, 12)).astype(DTYPES[dtype])
    alpha = params.pop("alpha")
    problem = Problem(
        {"x": x, **params},
        {"alpha": alpha},
        rng.normal(size=x.shape).astype(x.dtype),
        np.ones((2, 3, 6), "f4"),
        dtype,
    )
    problem = replace(
        problem,
        padded=np.zeros((8, 3), bool),
        dc_last=problem.dc_last.astype("f8" if dtype == "float64" else "f4"),
    )
    *result, saved = sru_rt.sru_forward(x, **params, alpha=alpha, save=save)
    gradients = sru_rt.sru_backward(saved, problem.dh, problem.dc_last)
    h, c_last = oracle.sru_forward(x, **params, alpha=alpha)
    wanted = oracle.sru_backward(x, **params, alpha=alpha, dh=problem.dh, dc_last=problem.dc_last)
    tolerance.check("h", result[0], h, tolerance.LAYER[dtype])
    tolerance.check("c_last", result[1], c_last, tolerance.LAYER[dtype])
    for factor in (0, 1):
        assert gradients.weight[factor].dtype == x.dtype
        tolerance.check(
            f"dweight[{factor}]", gradients.weight[factor], wanted["weight"][factor], tolerance.LAYER[dtype]
        )
    tolerance.check("dx", gradients.x, wanted["x"], tolerance.LAYER[dtype])


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", [r | {"dtype": "float64"} for r in LAYER_ROWS], ids=name_of)
def test_gradients_by_finite_differences(row, D):
    """Independent of the oracle: the library's backward against its own forward."""
    row = row | {"activation": "tanh" if row["activation"] == "relu" else row["activation"]}  # relu has a kink
    problem = Problem.make(row, (4, 2, 3), D, "all", layer=True)
    problem.arrays["x"] = np.nan_to_num(problem.arrays["x"])

    def loss(**arrays: Any) -> float:
        h, c_last = sru_rt.sru_forward(**{**problem.arrays, **arrays}, **problem.options)
        return float((h * problem.dh).sum() + (c_last * problem.dc_last).sum())

    given = {n: a for n, a in problem.arrays.items() if a is not None}
    *_, saved = sru_rt.sru_forward(**problem.arrays, **problem.options, save=3)
    gradients = sru_rt.sru_backward(saved, problem.dh, problem.dc_last)
    for name, wanted in oracle.finite_differences(loss, given).items():
        tolerance.check(f"d{name}", getattr(gradients, name), wanted, 1e-7)
