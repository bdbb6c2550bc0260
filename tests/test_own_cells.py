"""Cells of every make through both CPU paths, against a plain loop and its finite differences in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import oracle
import tolerance
from matrix import matrix
from sru_rt import exp, recurrence, sigmoid, softplus, sqrt, tanh
from sru_rt.cell import Array, Cell
from sru_rt.dtypes import IO_DTYPES, state_dtype, to_numpy
from sru_rt.recurrence import Operands

L, B, d = 5, 3, 19  # more than the widest pack of channels, and not a multiple of any


@dataclass(frozen=True, eq=False)
class Example:
    """A cell, and its equation once more on plain arrays: ``equation(values by name) = (new states, h)``."""

    cell: Cell
    equation: Callable[[dict[str, Any]], tuple[list[Any], Any]]
    constants: tuple[float, ...] = ()
    wide: tuple[str, ...] = ()  # inputs given in the dtype of the state


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def states(*names: str) -> tuple[Array, ...]:
    return tuple(Array(f"{name}0", "state", (name,)) for name in names)


# An LSTM whose matrix on the previous output is diagonal: two states, neither update affine.


def lstm_step(ui, uf, uo, un, w_i, w_f, w_o, w_n, c, y):
    i = sigmoid(ui + w_i * y)
    f = sigmoid(uf + w_f * y)
    o = sigmoid(uo + w_o * y)
    n = tanh(un + w_n * y)
    c = f * c + i * n
    y = o * tanh(c)
    return c, y, y


def lstm_equation(v):
    i, f, o = (logistic(v[f"u{g}"] + v[f"w_{g}"] * v["y"]) for g in "ifo")
    c = f * v["c"] + i * np.tanh(v["un"] + v["w_n"] * v["y"])
    y = o * np.tanh(c)
    return [c, y], y


LSTM = Example(
    Cell(
        "diagonal_lstm",
        lstm_step,
        (
            Array("u", "gates", ("ui", "uf", "uo", "un")),
            Array("w", "params", ("w_i", "w_f", "w_o", "w_n")),
            *states("c", "y"),
        ),
    ),
    lstm_equation,
)


# Every kind of array and constants: the gates are not declared first, and two of the inputs are in the state's dtype.


def mixed_step(f, n, x, gain, shift, m, room, b, slope, c, alpha, beta):
    f = sigmoid(f * gain + b)
    c = f * c + (1 - f) * n * room
    return c, (tanh(slope * c) + shift) * m + alpha * x - beta


def mixed_equation(v):
    f = logistic(v["f"] * v["gain"] + v["b"])
    c = f * v["c"] + (1 - f) * v["n"] * v["room"]
    return [c], (np.tanh(v["slope"] * c) + v["shift"]) * v["m"] + v["alpha"] * v["x"] - v["beta"]


MIXED = Example(
    Cell(
        "mixed",
        mixed_step,
        (
            Array("x", "inputs", ("x",)),
            Array("tuning", "inputs", ("gain", "shift"), stacked=True),
            Array("m", "per_sequence", ("m",)),
            Array("u", "gates", ("f", "n")),
            Array("room", "per_sequence", ("room",)),
            Array("b", "params", ("b",)),
            *states("c"),
            Array("slope", "params", ("slope",)),
        ),
        ("alpha", "beta"),
    ),
    mixed_equation,
    (0.75, -1.25),
    ("tuning",),
)


# A damped oscillator: gates and states alone, affine in both states together.


def oscillator_step(force, damping, place, speed):
    speed = (speed - 0.5 * place + force) / (1 + softplus(damping))
    place = place + 0.25 * speed
    return place, speed, place - speed


def oscillator_equation(v):
    speed = (v["speed"] - 0.5 * v["place"] + v["force"]) / (1 + np.log1p(np.exp(v["damping"])))
    place = v["place"] + 0.25 * speed
    return [place, speed], place - speed


OSCILLATOR = Example(
    Cell("oscillator", oscillator_step, (Array("u", "gates", ("force", "damping")), *states("place", "speed"))),
    oscillator_equation,
)


# The output is the state itself.


def leaky_step(a, n, b, c):
    a = sigmoid(a + b)
    c = a * c + (1 - a) * n
    return c, c


def leaky_equation(v):
    a = logistic(v["a"] + v["b"])
    c = a * v["c"] + (1 - a) * v["n"]
    return [c], c


LEAKY = Example(
    Cell("leaky", leaky_step, (Array("u", "gates", ("a", "n")), Array("b", "params", ("b",)), *states("c"))),
    leaky_equation,
)


# Twelve gates, in two arrays, each used in its own way.

TWELVE = tuple(f"g{i}" for i in range(12))


def many_step(g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, c):
    new = sigmoid(g0) * c + tanh(g1) * g2 - sigmoid(g3 + g4) * g5
    h = tanh(new + g6) * exp(-g7 * g7) + g8 / sqrt(1 + g9 * g9) + g10 * c - g11
    return new, h


def many_equation(v):
    g = [v[name] for name in TWELVE]
    new = logistic(g[0]) * v["c"] + np.tanh(g[1]) * g[2] - logistic(g[3] + g[4]) * g[5]
    return [new], np.tanh(new + g[6]) * np.exp(-(g[7] ** 2)) + g[8] / np.sqrt(1 + g[9] ** 2) + g[10] * v["c"] - g[11]


MANY = Example(
    Cell("many", many_step, (Array("u", "gates", TWELVE[:9]), Array("w", "gates", TWELVE[9:]), *states("c"))),
    many_equation,
)

EXAMPLES = {"lstm": LSTM, "mixed": MIXED, "oscillator": OSCILLATOR, "leaky": LEAKY, "many": MANY}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers for an example, the plain loop, and its derivatives


@dataclass(eq=False)
class Problem:
    """What a cell is given, in float64, with values that every dtype under test holds exactly."""

    example: Example
    D: int
    arrays: dict[str, np.ndarray]  # states included
    dh: np.ndarray
    dc_last: list[np.ndarray]
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def live(self) -> np.ndarray:
        return oracle.live_steps(L, B, self.layout.get("lengths"), self.layout.get("mask"))

    @property
    def cell(self) -> Cell:
        return self.example.cell


def shape_of(declared: Array, D: int) -> tuple[int, ...]:
    sizes = {"L": L, "B": B, "D": D, "d": d}
    return tuple(sizes.get(axis) or int(axis) for axis in declared.axes.split())


@functools.cache
def make(name: str, D: int, layout: bool) -> Problem:
    rng = np.random.default_rng([ord(c) for c in name] + [D, layout])

    def draw(shape: tuple[int, ...], coarse: bool) -> np.ndarray:
        x = rng.normal(size=shape)  # multiples of 1/32 below 4 have 7 digits: every dtype holds them
        return np.clip(np.round(x * 32) / 32, -3, 3) if coarse else x.astype(np.float32).astype(np.float64)

    example = EXAMPLES[name]
    arrays = {
        a.name: draw(shape_of(a, D), a.kind in ("gates", "inputs") and a.name not in example.wide)
        for a in example.cell.arrays
    }
    options = oracle.random_layout(rng, L, B, lengths=True, mask=True, reset=True) if layout else {}
    dh, dc_last = draw((L, B, D, d), True), [draw((D, B, d), False) for _ in example.cell.state]
    problem = Problem(example, D, arrays, dh, dc_last, options)
    if layout:
        # A boundary just beyond the end of a sequence, which does not exist: the reverse direction keeps its c0.
        options["lengths"][1], options["reset"][3, 1], options["mask"][2, 1] = 3, True, False
    return problem


def values_at(cell: Cell, arrays: dict[str, np.ndarray], t: int, b: int, q: int) -> Iterator[tuple[str, np.ndarray]]:
    for a in cell.arrays:
        place = {"gates": (t, b, q), "inputs": (t, b, q), "per_sequence": (b, q), "params": (q,)}.get(a.kind)
        if place is not None:
            row = arrays[a.name][place]
            yield from zip(a.members, row if row.ndim == 2 else [row])


def plain_loop(problem: Problem, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """h (L, B, D, d) and the last states (D, B, d), one sequence and one step at a time."""
    cell, constants = problem.cell, dict(zip(problem.cell.constants, problem.example.constants))
    c0 = [arrays[a.name] for a in cell.arrays if a.kind == "state"]
    h, c_last = np.zeros((L, B, problem.D, c0[0].shape[-1])), [a.copy() for a in c0]
    lengths = problem.layout.get("lengths", np.full(B, L))
    reset = problem.layout.get("reset", np.zeros((L, B), bool))
    for q in range(problem.D):
        for b in range(B):
            state = [a[q, b] for a in c0]
            steps = range(lengths[b])
            for t in reversed(steps) if q else steps:
                boundary = t + 1 if q else t
                if boundary < lengths[b] and reset[boundary, b]:
                    state = [np.zeros_like(a) for a in state]
                if problem.live[t, b]:
                    values = dict(values_at(cell, arrays, t, b, q)) | dict(zip(cell.state, state)) | constants
                    state, h[t, b, q] = problem.example.equation(values)
            for last, value in zip(c_last, state):
                last[q, b] = value
    return h, c_last


@functools.cache
def wanted(name: str, D: int, layout: bool) -> tuple[np.ndarray, list[np.ndarray], dict[str, np.ndarray]]:
    """What the plain loop gives, and its gradients."""
    problem = make(name, D, layout)
    return *plain_loop(problem, problem.arrays), finite_differences(problem)


def places(problem: Problem) -> list[tuple[Array, tuple[Any, ...]]]:
    """Parts of every array, by an index, in which each loss per channel depends on one element alone."""
    found: list[tuple[Array, tuple[Any, ...]]] = []
    everything = slice(None)
    for a in problem.cell.arrays:
        has_member_axis = a.stacked or a.kind in ("gates", "params")
        for i in range(len(a.members)):
            member = (i,) if has_member_axis else ()
            if a.kind in ("gates", "inputs"):
                found += [(a, (t, everything, everything, *member)) for t in range(L)]
            else:
                found.append((a, (everything, *member)))
    return found


def finite_differences(problem: Problem, step: float = 1e-3) -> dict[str, np.ndarray]:
    """Derivatives of sum(dh*h) + sum(dc_last*c_last) by central differences with an error of order step**4.

    Channels have nothing to do with each other, so each place gets copies of all channels for itself, and one run of
    the loop serves all places.
    """
    todo = places(problem)
    n = len(todo)

    def loss(offset: float) -> np.ndarray:
        arrays = {name: np.tile(array, n) for name, array in problem.arrays.items()}
        for i, (a, index) in enumerate(todo):
            array = arrays[a.name]
            array.reshape(*array.shape[:-1], n, d)[index][..., i, :] += offset
        h, c_last = plain_loop(problem, arrays)
        total = (h * np.tile(problem.dh, n)).sum(axis=0)
        for last, weight in zip(c_last, problem.dc_last):
            total += (last * np.tile(weight, n)).swapaxes(0, 1)
        return total.reshape(B, problem.D, n, d)

    slope = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)
    gradients = {name: np.empty_like(array) for name, array in problem.arrays.items()}
    for i, (a, index) in enumerate(todo):
        part = slope[:, :, i]
        part = part.sum(axis=0) if a.kind == "params" else part.swapaxes(0, 1) if a.kind == "state" else part
        gradients[a.name][index] = part
    return gradients


def operands(problem: Problem, dtype: str) -> Operands:
    """The problem as kernels take it; what stands in padding is NaN."""
    cell, arrays, c0 = problem.cell, {}, []
    accumulator = to_numpy(state_dtype(dtype))
    for a in cell.arrays:
        array = problem.arrays[a.name]
        if a.kind == "state":
            c0.append(array.astype(accumulator))
            continue
        kept = a.name in problem.example.wide or a.kind not in ("gates", "inputs")
        arrays[a.name] = recurrence.operand(a, array.astype(accumulator if kept else to_numpy(dtype)), dtype)
        if a.kind in ("gates", "inputs"):
            arrays[a.name][~problem.live] = np.nan
    layout = problem.layout
    lengths = np.ascontiguousarray(layout["lengths"], np.int64) if "lengths" in layout else None
    return Operands(
        cell, dtype, arrays, c0, problem.example.constants, lengths, layout.get("mask"), layout.get("reset")
    )


def backward(problem: Problem, given: Operands, saved: Any, every: int, need: Any = None) -> Any:
    dh = problem.dh.astype(to_numpy(given.dtype))
    dh[~problem.live] = np.nan
    dc_last = [a.astype(given.accumulator) for a in problem.dc_last]
    return recurrence.backward(given, saved, every, dh, dc_last, given.arrays if need is None else need)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [False, True], ids=["plain", "lengths-mask-reset"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", IO_DTYPES)
@pytest.mark.parametrize("name", matrix(EXAMPLES, 3))
def test_cell_matches_plain_loop(name, dtype, D, layout, backend):
    problem, given = make(name, D, layout), operands(make(name, D, layout), dtype)
    h, c_last, gradients = wanted(name, D, layout)
    state = state_dtype(dtype)
    for every in (1, 3):
        got_h, got_last, saved = recurrence.forward(given, every)
        assert got_h.dtype == to_numpy(dtype) and saved[0].shape == (-(-L // every), B, D, d)
        tolerance.check("h", got_h, h, tolerance.STEP[dtype])
        assert not np.asarray(got_h, np.float64)[~problem.live].any(), "h is not 0 at padding"
        for member, got, last in zip(problem.cell.state, got_last, c_last):
            assert got.dtype == to_numpy(state)
            tolerance.check(f"last {member}", got, last, tolerance.STEP[state])

        found, dc0 = backward(problem, given, saved, every)
        initial = [a.name for a in problem.cell.arrays if a.kind == "state"]
        for array_name, gradient in [*found.items(), *zip(initial, dc0)]:
            if array_name in given.arrays:
                assert gradient.dtype == given.arrays[array_name].dtype
            bound = (tolerance.STEP if gradient.ndim > 3 else tolerance.SUM)[gradient.dtype.name]
            # A finite difference is right to about 1e-11.
            tolerance.check(f"d{array_name}", gradient, gradients[array_name], max(bound, 1e-9))


def test_examples_are_what_they_are_for():
    kinds = {name: {a.kind for a in example.cell.arrays} for name, example in EXAMPLES.items()}
    assert len(LSTM.cell.state) == 2 and not LSTM.cell.affine
    assert kinds["mixed"] == {"gates", "inputs", "per_sequence", "params", "state"} and MIXED.cell.constants
    assert MIXED.cell.arrays[0].kind != "gates"
    assert kinds["oscillator"] == {"gates", "state"} and not OSCILLATOR.cell.constants
    assert len(OSCILLATOR.cell.state) == 2 and OSCILLATOR.cell.affine
    assert LEAKY.cell.formula.h is LEAKY.cell.formula.new_state[0] and LEAKY.cell.affine
    assert len(MANY.cell.gates) == 12


@pytest.mark.parametrize(("dtype", "wide"), [("float16", 0b110), ("bfloat16", 0b110), ("float32", 0), ("float64", 0)])
def test_wide_inputs_are_known_as_such(dtype, wide):
    given = operands(make("mixed", 1, False), dtype)
    assert given.variant(state_dtype(dtype)).wide == wide
    narrow = recurrence.operand(MIXED.cell.arrays[1], given.arrays["tuning"].astype(to_numpy(dtype)), dtype)
    assert narrow.dtype == to_numpy(dtype)


@pytest.mark.parametrize("name", EXAMPLES)
def test_tasks_do_not_change_a_bit(name, many_tasks, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    problem, given = make(name, 2, True), operands(make(name, 2, True), "float32")

    def run() -> list[bytes]:
        h, c_last, saved = recurrence.forward(given, 3)
        found, dc0 = backward(problem, given, saved, 3)
        return [np.asarray(a).tobytes() for a in (h, *c_last, *found.values(), *dc0)]

    divided = run()
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "1")
    assert run() == divided


def test_only_what_is_needed(backend):
    problem, given = make("mixed", 2, True), operands(make("mixed", 2, True), "float32")
    _, _, saved = recurrence.forward(given, 1)
    everything, dc0 = backward(problem, given, saved, 1)
    for need in ([], ["tuning"], ["m", "slope"], ["u"], ["x", "room", "b"]):
        found, again = backward(problem, given, saved, 1, need)
        assert sorted(found) == sorted(need)
        assert all(found[n].tobytes() == everything[n].tobytes() for n in need)
        assert [a.tobytes() for a in again] == [a.tobytes() for a in dc0]


def test_absent_states_are_zeros(backend):
    problem = make("oscillator", 2, True)
    given = operands(problem, "float64")
    zeros = Operands(**{**vars(given), "c0": [np.zeros_like(a) for a in given.c0]})
    absent = Operands(**{**vars(given), "c0": [None, None]})
    half = Operands(**{**vars(given), "c0": [None, np.zeros_like(given.c0[1])]})
    results = []
    for each in (zeros, absent, half):
        h, c_last, saved = recurrence.forward(each, 3)
        dh = problem.dh.copy()
        gradients, dc0 = recurrence.backward(each, saved, 3, dh, [None, None], each.arrays)
        results.append([a.tobytes() for a in (h, *c_last, *saved, *gradients.values(), *dc0)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_kept_in_16_bits(dtype, backend):
    """Forward results are the same; gradients are those of states that were rounded."""
    problem, given = make("lstm", 2, True), operands(make("lstm", 2, True), dtype)
    h, c_last, saved = recurrence.forward(given, 1)
    narrow_h, narrow_last, narrow = recurrence.forward(given, 1, saved_dtype=dtype)
    assert narrow_h.tobytes() == h.tobytes()
    assert [a.tobytes() for a in narrow_last] == [a.tobytes() for a in c_last]
    for a, b in zip(saved, narrow):
        assert b.dtype == to_numpy(dtype)
        np.testing.assert_array_equal(a.astype(b.dtype).astype(a.dtype), b.astype(a.dtype))
    gradients = wanted("lstm", 2, True)[2]
    found, _ = backward(problem, given, narrow, 1)
    for name, gradient in found.items():
        tolerance.check(f"d{name}", gradient, gradients[name], 8 * tolerance.EPS[dtype])
