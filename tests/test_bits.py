"""What must agree to the last bit: repetition, memory policies, threads, single steps, other sequences in the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

import sru_rt
from matrix import matrix
from problems import CELLS, FULL, Cell, Problem

L, B, d = 19, 5, 37


class Case(NamedTuple):
    """A form of a cell: options of its `init`, and of the other functions."""

    name: str
    init: dict[str, Any]
    options: dict[str, Any]

    @property
    def cell(self) -> Cell:
        return CELLS[self.name]

    def __str__(self) -> str:
        return "-".join([self.name, *(str(value) for value in (self.init | self.options).values())])

    def params(self, d_in: int, directions: int, **more: Any) -> dict[str, Any]:
        found = self.cell.library("init")(d_in, d, directions=directions, **self.init, **more)
        return {**found, **self.init, **self.options}


CASES = [
    Case("sru", {}, {}),
    Case("sru", {}, {"activation": "tanh", "reset_on": "current"}),
    Case("sru", {}, {"highway": False}),
    Case("qrnn", {"pooling": "f"}, {}),
    Case("qrnn", {"pooling": "ifo", "highway": True}, {}),
    Case("qrnn", {"window": 2}, {}),
    Case("mingru", {"candidate": "identity"}, {}),
    Case("mingru", {"candidate": "positive"}, {}),
    Case("minlstm", {"candidate": "identity"}, {}),
    Case("minlstm", {"candidate": "positive"}, {}),
]
EVERY_CASE = pytest.mark.parametrize("case", matrix(CASES, 4), ids=str)


def problem(case: Case, dtype: str, D: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = case.params(D * d, D, rng=rng, dtype=dtype)
    c0 = rng.normal(size=(D, B, d)).astype("f8" if dtype == "float64" else "f4")
    lengths = rng.integers(0, L + 1, B)
    reset = rng.random((L, B)) < 0.15
    x = rng.normal(size=(L, B, D * d)).astype(params["weight"].dtype)
    return {"x": x, **params, case.cell.initial: c0, "lengths": lengths, "reset": reset}


def backward(case: Case, saved: Any, like: np.ndarray) -> Any:
    rng = np.random.default_rng(1)
    dh = rng.normal(size=like.shape).astype(like.dtype)
    return case.cell.library("backward")(saved, dh)


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_same(a: Any, b: Any) -> None:
    for name in a:
        assert getattr(a, name) is None or same_bits(getattr(a, name), getattr(b, name)), name


@EVERY_CASE
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_memory_policies_give_the_same_bits(dtype, D, case, backend):
    given, forward = problem(case, dtype, D), case.cell.library("forward")
    h, last, saved = forward(**given, save=True)
    wanted = backward(case, saved, h)
    for save in (True, 2, 7, 100, "x"):
        other, other_last, saved = forward(**given, save=save)
        assert same_bits(h, other) and same_bits(last, other_last), save
        assert_same(wanted, backward(case, saved, h))


@pytest.mark.parametrize("case", [case for case in CASES if case.init or not case.options], ids=str)
@pytest.mark.parametrize("D", [1, 2])
def test_threads_give_the_same_bits(D, case, monkeypatch):
    from sru_rt import launch

    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    monkeypatch.setattr(launch, "_ELEMENTS_PER_TASK", 1)
    results = []
    for threads in (1, 2, 3, 7, 64):
        monkeypatch.setenv("SRU_RT_NUM_THREADS", str(threads))
        h, last, saved = case.cell.library("forward")(**problem(case, "float32", D), save=True)
        results.append((h, last, backward(case, saved, h)))
    for h, last, gradients in results[1:]:
        assert same_bits(h, results[0][0]) and same_bits(last, results[0][1])
        assert_same(results[0][2], gradients)


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_step_is_the_same_token_in_a_sequence(dtype, case, backend):
    """Given the same U: the products of a batch of tokens may round otherwise than those of one token."""
    rng = np.random.default_rng(3)
    cell, params = case.cell, case.params(d, 1, rng=rng, dtype=dtype)
    kind, window = params["weight"].dtype, params.get("window", 1)
    params["weight"] = np.round(params["weight"].astype("f4") * 8).astype(kind)  # products are exact in any order
    params["weight"].reshape(1, -1, d, window, d)[..., 4:] = 0
    assert params["weight"].any()
    x = np.round(rng.normal(size=(L, B, d)) * 4).astype(kind)
    h, last = cell.library("forward")(x, **params)
    padded, state = np.concatenate([np.zeros((window - 1, B, d), kind), x]), None
    for t in range(L):
        tokens = padded[t : t + window] if window > 1 else x[t]
        h_t, state = cell.library("step")(tokens, **params, **{cell.state: state})
        assert same_bits(h_t, h[t]), t
    assert same_bits(state, last)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_does_not_depend_on_the_others(cell, D, backend):
    whole = Problem.make(FULL[cell] | {"dtype": "float32"}, (L, B, d), D, "plain", state=True)
    (h, last), gradients = whole.run(save=True)

    def cut(name: str, value: Any, b: int) -> Any:
        """All but parameters have the sequences in their second axis."""
        if name in ("bias", "v") or not isinstance(value, np.ndarray):
            return value
        return np.ascontiguousarray(value[:, b : b + 1])

    for b in range(B):
        arrays, options, seeds = (
            {name: cut(name, value, b) for name, value in values.items()}
            for values in (whole.arrays, whole.options, {"dh": whole.dh, "dlast": whole.dlast})
        )
        (one, one_last), alone = replace(whole, arrays=arrays, options=options, **seeds).run(save=True)
        assert same_bits(cut("h", h, b), one) and same_bits(cut("last", last, b), one_last)
        for name in set(arrays) - {"bias", "v"}:
            assert same_bits(cut(name, getattr(gradients, name), b), getattr(alone, name)), name


def test_states_in_16_bits_cost_half_the_memory_and_little_accuracy():
    case = CASES[0]
    given = problem(case, "bfloat16", 1)
    h, _, wide = sru_rt.sru_forward(**given, save=True)
    other, _, narrow = sru_rt.sru_forward(**given, save=True, saved_dtype="bfloat16")
    assert same_bits(h, other), "the state itself is carried in float32"
    assert narrow.nbytes == wide.nbytes - 2 * L * B * d
    a, b = backward(case, wide, h), backward(case, narrow, h)
    for name in ("x", "weight", "bias", "v"):
        wanted, got = getattr(a, name).astype("f4"), getattr(b, name).astype("f4")
        assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max(), name
    assert any(not same_bits(getattr(a, n), getattr(b, n)) for n in ("x", "weight", "bias", "v"))


def test_memory_kept_for_the_backward():
    """U and 4/K bytes an element beyond x with save=K, 4/32 alone with save="x"."""
    L, B, d = 256, 4, 64
    x = np.zeros((L, B, d), "f4")
    params = sru_rt.sru_init(d, d, rng=0)
    kept = {save: sru_rt.sru_forward(x, **params, save=save)[2].nbytes for save in (True, 16, 32, "x")}
    elements, fixed = L * B * d, sum(params[name].nbytes for name in ("weight", "bias", "v"))
    assert kept[True] - fixed == elements * (4 + 3 * 4 + 4)
    assert kept[16] - fixed == elements * (4 + 3 * 4) + elements * 4 // 16
    assert kept["x"] - fixed == elements * 4 + elements * 4 // 32
