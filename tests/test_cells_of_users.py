"""Cells by the decorator `sru_rt.cell`: everything that a built-in cell has, and what is said of mistakes.

The judge is a plain loop that calls the step function, or an equation written once more, on arrays in float64; its
gradients are finite differences. The cells of docs/own_cells.md are run as they stand there.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
import sru_rt
import tolerance
from matrix import matrix
from sru_rt import exp, sigmoid, sqrt, tanh
from sru_rt.dtypes import IO_DTYPES, state_dtype, to_numpy
from sru_rt.errors import ArgumentError, DtypeError, ShapeError, StepError
from sru_rt.own import OwnCell

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own_cells.md"


@functools.cache
def page() -> dict[str, Any]:
    """What the Python of the page defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# ----------------------------------------------------------------------------------------------------------------------
# Cells, and their equations once more: values by name to (new states, h)


@sru_rt.cell(gates="i f o n", params="w_i w_f w_o w_n", state="c y")
def diagonal_lstm(i, f, o, n, w_i, w_f, w_o, w_n, c, y):
    i, f, o = sigmoid(i + w_i * y), sigmoid(f + w_f * y), sigmoid(o + w_o * y)
    c = f * c + i * tanh(n + w_n * y)
    y = o * tanh(c)
    return c, y, y


def lstm_equation(v):
    i, f, o = (logistic(v[g] + v[f"w_{g}"] * v["y"]) for g in "ifo")
    c = f * v["c"] + i * np.tanh(v["n"] + v["w_n"] * v["y"])
    return (c, o * np.tanh(c)), o * np.tanh(c)


@sru_rt.cell(
    gates=["f", "n"], inputs="x, gain", per_sequence="m room", params="b slope", state="c", constants="alpha beta"
)
def everything(f, n, x, gain, m, room, b, slope, c, alpha, beta=-1.25):
    f = sigmoid(f * gain + b)
    c = f * c + (1 - f) * n * room
    return c, tanh(slope * c) * m + alpha * x - beta


def everything_equation(v):
    f = logistic(v["f"] * v["gain"] + v["b"])
    c = f * v["c"] + (1 - f) * v["n"] * v["room"]
    return (c,), np.tanh(v["slope"] * c) * v["m"] + v["alpha"] * v["x"] - v["beta"]


@sru_rt.cell(gates="force", state="place speed")
def oscillator(force, place, speed):
    speed = 0.9 * speed - 0.25 * place + force
    return place + 0.25 * speed, speed, place - speed


def oscillator_equation(v):
    speed = 0.9 * v["speed"] - 0.25 * v["place"] + v["force"]
    return (v["place"] + 0.25 * speed, speed), v["place"] - speed


@sru_rt.cell(gates="g0 g1 g2 g3", params="p", state="a b c")
def three_states(g0, g1, g2, g3, p, a, b, c):
    a, b, c = sigmoid(g0) * b + g3, sigmoid(g1 + p) * c - a, tanh(g2) * a
    return a, b, c, a * b + c


def three_states_equation(v):
    a, b = logistic(v["g0"]) * v["b"] + v["g3"], logistic(v["g1"] + v["p"]) * v["c"] - v["a"]
    c = np.tanh(v["g2"]) * v["a"]
    return (a, b, c), a * b + c


def leaky_equation(v):
    a = logistic(v["a"] + v["b"])
    c = a * v["c"] + (1 - a) * v["n"]
    return (c,), np.tanh(c)


def indrnn_equation(v):
    h = np.maximum(v["u"] + v["w"] * v["h"] + v["b"], 0)
    return (h,), h


def ran_equation(v):
    i, f = (logistic(v[g] + v[f"w_{g}"] * v["y"] + v[f"b_{g}"]) for g in "if")
    c = i * v["n"] + f * v["c"]
    return (c, np.tanh(c)), np.tanh(c)


def rg_lru_equation(v):
    r, i = logistic(v["r"] + v["b_r"]), logistic(v["i"] + v["b_i"])
    log_a = -v["scale"] * np.log1p(np.exp(v["decay"])) * r
    h = np.exp(log_a) * v["h"] + np.sqrt(1 - np.exp(2 * log_a)) * i * v["x"]
    return (h,), h


@dataclass(frozen=True, eq=False)
class Example:
    cell: OwnCell
    equation: Callable[[dict[str, Any]], tuple[tuple[Any, ...], Any]]
    affine: bool
    constants: tuple[tuple[str, float], ...] = ()  # that are given
    defaults: tuple[tuple[str, float], ...] = ()


@functools.cache
def examples() -> dict[str, Example]:
    docs = page()
    return {
        "lstm": Example(diagonal_lstm, lstm_equation, False),
        "everything": Example(everything, everything_equation, True, (("alpha", 0.75),), (("beta", -1.25),)),
        "oscillator": Example(oscillator, oscillator_equation, True),
        "three_states": Example(three_states, three_states_equation, True),
        "leaky": Example(docs["leaky"], leaky_equation, True),
        "indrnn": Example(docs["indrnn"], indrnn_equation, False),
        "ran": Example(docs["ran"], ran_equation, False),
        "rg_lru": Example(docs["rg_lru"], rg_lru_equation, True, (), (("scale", 8.0),)),
    }


NAMES = ("lstm", "everything", "oscillator", "three_states", "leaky", "indrnn", "ran", "rg_lru")

# ----------------------------------------------------------------------------------------------------------------------
# Numbers, the plain loop, and its derivatives

L, B, d = 5, 3, 5


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of `recurrence` in float64, with values that every dtype holds exactly; c0 is a tuple here."""

    example: Example
    D: int
    arrays: dict[str, Any]
    layout: dict[str, Any]
    dh: np.ndarray
    dc_last: tuple[np.ndarray, ...]

    @property
    def live(self) -> np.ndarray:
        return oracle.live_steps(L, B, self.layout.get("lengths"), self.layout.get("mask"))


@functools.cache
def problem_of(name: str, D: int, layout: bool) -> Problem:
    example = examples()[name]
    core = example.cell._cell
    rng = np.random.default_rng([*map(ord, name), D, layout])

    def draw(*shape: int) -> np.ndarray:  # multiples of 1/32 below 4 have 7 digits
        return np.clip(np.round(rng.normal(size=shape) * 32) / 32, -3, 3)

    arrays: dict[str, Any] = {"u": draw(L, B, D, len(core.gates), d)}
    if core.params:
        arrays["params"] = draw(D, len(core.params), d)
    arrays["c0"] = tuple(draw(D, B, d) for _ in core.state)
    arrays |= {n: draw(L, B, D * d) for n in core.inputs} | {n: draw(B, D, d) for n in core.per_sequence}
    options = oracle.random_layout(rng, L, B, lengths=True, mask=True, reset=True) if layout else {}
    if name == "indrnn":  # away from the kink of relu, which finite differences would see
        arrays["u"] = np.abs(arrays["u"]) + 0.5
        arrays["params"][:, 0] = np.abs(arrays["params"][:, 0]) / 4
        arrays["params"][:, 1] = np.abs(arrays["params"][:, 1])
        arrays["c0"] = (np.abs(arrays["c0"][0]),)
    return Problem(example, D, arrays, options, draw(L, B, D * d), tuple(draw(D, B, d) for _ in core.state))


def plain_loop(problem: Problem, arrays: dict[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    """h (L, B, D*d) and the last states, by the equation, for all sequences at once, step after step."""
    core, D, layout = problem.example.cell._cell, problem.D, problem.layout
    lengths, reset = layout.get("lengths", np.full(B, L)), layout.get("reset", np.zeros((L, B), bool))
    h, last = np.zeros((L, B, D, d)), [a.copy() for a in arrays["c0"]]
    numbers = dict(problem.example.constants + problem.example.defaults)
    for q in range(D):
        state = [a[q] for a in arrays["c0"]]
        fixed = numbers | {n: arrays[n][:, q] for n in core.per_sequence}
        fixed |= {n: arrays["params"][q, i] for i, n in enumerate(core.params)}
        for t in reversed(range(L)) if q else range(L):
            boundary = t + 1 if q else t
            if boundary < L:
                anew = (reset[boundary] & (boundary < lengths))[:, None]
                state = [np.where(anew, 0.0, s) for s in state]
            step = {n: arrays["u"][t, :, q, i] for i, n in enumerate(core.gates)}
            step |= {n: arrays[n][t].reshape(B, D, d)[:, q] for n in core.inputs}
            new, out = problem.example.equation(fixed | step | dict(zip(core.state, state)))
            live = problem.live[t][:, None]
            h[t, :, q] = np.where(live, out, 0.0)
            state = [np.where(live, a, b) for a, b in zip(new, state)]
        for array, value in zip(last, state):
            array[q] = value
    return h.reshape(L, B, D * d), last


@functools.cache
def wanted(name: str, D: int, layout: bool) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    problem = problem_of(name, D, layout)
    flat = {n: a for n, a in problem.arrays.items() if n != "c0"}
    flat |= {f"c0[{i}]": a for i, a in enumerate(problem.arrays["c0"])}

    def loss(**arrays: Any) -> float:
        states = tuple(arrays.pop(f"c0[{i}]") for i in range(len(problem.dc_last)))
        h, last = plain_loop(problem, arrays | {"c0": states})
        return float((h * problem.dh).sum() + sum((a * b).sum() for a, b in zip(last, problem.dc_last)))

    found = oracle.finite_differences(loss, flat)
    found["c0"] = tuple(found.pop(f"c0[{i}]") for i in range(len(problem.dc_last)))
    return *plain_loop(problem, problem.arrays), found


def given(problem: Problem, dtype: str, mixed: bool) -> dict[str, Any]:
    """The arguments in `dtype`, half of them in the dtype of the state if `mixed`; what stands in padding is NaN."""
    kinds = itertools.cycle([to_numpy(state_dtype(dtype)), to_numpy(dtype)] if mixed else [to_numpy(dtype)])
    made: dict[str, Any] = {}
    for name, array in problem.arrays.items():
        kind = to_numpy(dtype) if name == "u" else next(kinds)
        made[name] = tuple(a.astype(kind) for a in array) if name == "c0" else array.astype(kind)
        if name in ("u", *problem.example.cell._cell.inputs):
            made[name][~problem.live] = np.nan
    if len(made["c0"]) == 1:
        made["c0"] = made["c0"][0]
    return made | dict(problem.example.constants) | problem.layout


def compare(problem: Problem, dtype: str, result: Any, gradients: Any, arguments: dict[str, Any]) -> None:
    h, last, derivatives = wanted(
        next(n for n, e in examples().items() if e is problem.example), problem.D, bool(problem.layout)
    )
    got_last = result[1] if isinstance(result[1], tuple) else (result[1],)
    assert result[0].dtype == to_numpy(dtype)
    tolerance.check("h", result[0], h, tolerance.STEP[dtype])
    assert not np.asarray(result[0], np.float64)[~problem.live].any(), "h is not 0 at padding"
    for got, one in zip(got_last, last, strict=True):
        assert got.dtype.name == state_dtype(dtype)
        tolerance.check("last state", got, one, tolerance.STEP[state_dtype(dtype)])
    for name, one in derivatives.items():
        found, of = getattr(gradients, name), arguments[name]
        pairs = zip(found, of, one, strict=True) if isinstance(found, tuple) else [(found, of, one)]
        for gradient, array, right in pairs if name != "c0" or isinstance(found, tuple) else [(found, of, one[0])]:
            assert gradient.dtype == array.dtype, name
            bound = (tolerance.STEP if name in ("u", *problem.example.cell._cell.inputs) else tolerance.SUM)[
                gradient.dtype.name
            ]
            # A finite difference in float64 is right to about 1e-9.
            tolerance.check(f"d{name}", gradient, right, max(bound, 2e-8))


# ----------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("layout", [False, True], ids=["plain", "lengths-mask-reset"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", IO_DTYPES)
@pytest.mark.parametrize("name", matrix(NAMES, 4))
def test_recurrence_matches_plain_loop(name, dtype, D, layout, backend):
    problem, cell = problem_of(name, D, layout), examples()[name].cell
    for save in (True, 3):
        arguments = given(problem, dtype, mixed=dtype == "float16")  # one kernel for each dtype
        *result, saved = cell.recurrence(**arguments, save=save)
        compare(problem, dtype, result, cell.backward(saved, *seeds(problem, dtype)), arguments)


def seeds(problem: Problem, dtype: str) -> tuple[np.ndarray, Any]:
    state = to_numpy(state_dtype(dtype))
    dh = problem.dh.astype(to_numpy(dtype))
    dh[~problem.live] = np.nan
    last = tuple(a.astype(state) for a in problem.dc_last)
    return dh, last if len(last) > 1 else last[0]


@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, D", [("float32", 2), ("bfloat16", 1), ("float64", 2)])
def test_recurrence_matches_plain_loop_on_gpus(place, name, dtype, D):
    problem, cell = problem_of(name, D, True), examples()[name].cell
    for save, mixed in ((True, True), (2, False)):
        arguments = given(problem, dtype, mixed)
        *result, saved = cell.recurrence(**place.put(arguments), save=save)
        gradients = cell.backward(saved, *place.put(seeds(problem, dtype)))
        found = {n: place.get(getattr(gradients, n)) for n in gradients}
        compare(problem, dtype, place.get(tuple(result)), type("Found", (), found), arguments)


@pytest.mark.parametrize("low_rank", [None, 2])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", matrix(NAMES, 4))
def test_layer_is_projection_and_recurrence(name, D, low_rank, backend):
    """In float64: results are those of the recurrence on U = W x, gradients follow by the chain rule."""
    problem, cell = problem_of(name, D, True), examples()[name].cell
    core, rng = cell._cell, np.random.default_rng(1)
    d_in = D * d if "x" in core.inputs else 4
    rest = given(problem, "float64", False)
    del rest["u"]
    x = rest.pop("x", None)
    x = rng.normal(size=(L, B, d_in)) if x is None else np.where(problem.live[..., None], x, np.nan)
    weight = cell.init(d_in, d, directions=D, low_rank=low_rank, rng=2, dtype="float64")["weight"]
    whole = weight[0] @ weight[1] if low_rank else weight

    u = np.einsum("qkji,lbi->lbqkj", whole, x)
    beside = {"x": x} if "x" in core.inputs else {}
    *right, saved = cell.recurrence(u, **rest, **beside, save=True)
    grads = cell.backward(saved, *seeds(problem, "float64"))
    for save in (True, 2, "x"):
        *got, saved = cell.forward(x, weight, **rest, save=save)
        found = cell.backward(saved, *seeds(problem, "float64"))
        same_to_rounding(got, right)
        clean = np.where(problem.live[..., None], x, 0.0)
        dx = np.einsum("lbqkj,qkji->lbi", grads.u, whole) + (grads.x if beside else 0.0)
        dw = np.einsum("lbqkj,lbi->qkji", grads.u, clean)
        same_to_rounding(found.x, dx)
        same_to_rounding(
            found.weight, (dw @ weight[1].T, np.einsum("qkjp,qkji->pi", weight[0], dw)) if low_rank else dw
        )
        for n in grads:
            if n not in ("u", "x"):
                same_to_rounding(getattr(found, n), getattr(grads, n))


def same_to_rounding(got: Any, right: Any) -> None:
    if isinstance(right, (tuple, list)):
        for a, b in zip(got, right, strict=True):
            same_to_rounding(a, b)
    else:
        np.testing.assert_allclose(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", matrix(NAMES, 4))
def test_a_step_is_the_same_token_in_a_sequence(name, dtype, backend):
    """And writes where it is told to, the states in place."""
    problem, cell = problem_of(name, 1, False), examples()[name].cell
    core = cell._cell
    arguments = given(problem, dtype, False)
    # The product with these weights is exact: it selects channels.
    x = arguments.pop("x") if "x" in core.inputs else arguments["u"][:, :, 0, 0].copy()
    weight = np.broadcast_to(np.eye(d), (1, len(core.gates), d, d)).astype(x.dtype)
    del arguments["u"], arguments["c0"]
    h, last = cell.forward(x, weight, **arguments)
    state: Any = tuple(np.zeros((1, B, d), np.float32) for _ in core.state)
    state = state if len(state) > 1 else state[0]
    for t in range(L):
        now = {n: a[t] if n in core.inputs else a for n, a in arguments.items()}
        out = np.full((B, d), np.nan, x.dtype)
        got, _ = cell.step(x[t], weight, c=state, out=(out, state), **now)
        assert np.shares_memory(got, out) and got.tobytes() == h[t].tobytes(), t
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (state, last)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_results_in_the_library_that_was_given():
    torch = pytest.importorskip("torch")
    given = diagonal_lstm.init(4, 6, rng=0)
    x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype("f4")
    c0 = (np.ones((1, 2, 6), "f4"), np.zeros((1, 2, 6), "f4"))
    h, states = diagonal_lstm.forward(x, **given, c0=c0)
    as_torch = {n: torch.from_numpy(a) for n, a in given.items()}
    got, got_states = diagonal_lstm.forward(torch.from_numpy(x), **as_torch, c0=tuple(map(torch.from_numpy, c0)))
    assert isinstance(got, torch.Tensor) and isinstance(got_states, tuple)
    np.testing.assert_allclose(got, h, rtol=1e-5, atol=1e-6)  # its product is rounded otherwise
    for a, b in zip(got_states, states):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_flags_have_no_gradient():
    problem = problem_of("everything", 1, False)
    arguments = given(problem, "float32", False)
    arguments["m"] = arguments["m"] > 0
    *_, saved = everything.recurrence(**arguments, save=True)
    gradients = everything.backward(saved, problem.dh.astype("f4"))
    assert "m" not in list(gradients) and "room" in list(gradients)
    with pytest.raises(ArgumentError, match="need has 'm'"):
        everything.backward(saved, problem.dh.astype("f4"), need=("m",))


# ----------------------------------------------------------------------------------------------------------------------
# What a cell says of itself


def test_affine():
    for name in NAMES:
        assert examples()[name].cell.affine == examples()[name].affine, name


def test_a_cell_is_still_its_function():
    assert diagonal_lstm.__name__ == diagonal_lstm.name == "diagonal_lstm"
    place, speed, h = oscillator(1.0, place=2.0, speed=3.0)
    assert (place, speed, h) == (2 + 0.25 * 3.2, 3.2, 2 - 3.2)
    assert pickle.loads(pickle.dumps(oscillator)) is oscillator
    assert copy.deepcopy(oscillator) is oscillator
    assert repr(oscillator) == "<cell oscillator: gates force, state place speed>"


def test_graph_shows_formula_and_derivatives():
    assert page()["leaky"].graph() == (
        "leaky: gates a n; params b; state c\n"
        "affine in the state\n\n"
        "  a2 = sigmoid(a + b)\n"
        "  c = a2*c' + (1 - a2)*n\n"
        "  h = tanh(c)\n\n"
        "Derivatives, where c' is the state before the step, and dc_next, dh are the gradients of the new\n"
        "state and of h:\n\n" + page()["leaky"].graph().partition("state and of h:\n\n")[2]
    )
    # They are Python, but for the quote of the old state: run, they give the derivatives.
    values = {"a": 0.3, "n": -0.8, "b": 0.5, "c_old": 0.7, "dc_next": 0.2, "dh": -1.1, "sigmoid": sigmoid, "tanh": tanh}
    for line in page()["leaky"].graph().partition("state and of h:\n\n")[2].replace("c'", "c_old").splitlines():
        exec(line.strip(), values)

    def loss(a, n, b, c):
        new, h = page()["leaky"](a, n, b, c)
        return 0.2 * new - 1.1 * h

    point = {"a": 0.3, "n": -0.8, "b": 0.5, "c": 0.7}
    for name in point:
        e = 1e-6
        slope = (loss(**point | {name: point[name] + e}) - loss(**point | {name: point[name] - e})) / (2 * e)
        assert values["dc_old" if name == "c" else f"d{name}"] == pytest.approx(slope, rel=1e-8)


def test_the_page_shows_what_graph_writes():
    shown = "".join(f"    {line}\n" if line else "\n" for line in page()["leaky"].graph().splitlines()[:6])
    assert shown in PAGE.read_text()


def test_source_is_what_is_compiled():
    text = diagonal_lstm.source()
    assert "struct diagonal_lstm_cell" in text and "void step(" in text and "void gradient(" in text
    assert "const real f = sigmoid(fma(w_f, y_prev, f_))" in text or "fma(w_f, y_prev" in text


def test_options_around_the_function():
    def made(squash: bool) -> OwnCell:
        @sru_rt.cell(gates="n", state="c", name="squashed" if squash else "plain")
        def step(n, c):
            c = 0.5 * c + n
            return c, tanh(c) if squash else c

        return step

    u = np.ones((3, 1, 1, 1, 2), "f4")
    plain, squashed = (made(flag).recurrence(u)[0] for flag in (False, True))
    assert made(True).name == "squashed"
    np.testing.assert_allclose(np.tanh(plain), squashed, rtol=1e-6)


def test_initial_values():
    given = diagonal_lstm.init(40, 500, directions=2, rng=0, params={"w_f": 2.0, "w_n": np.arange(500.0)})
    assert given["weight"].shape == (2, 4, 500, 40) and given["params"].shape == (2, 4, 500)
    assert given["weight"].var() == pytest.approx(1 / 40, rel=0.02)
    assert (given["params"][:, 1] == 2).all() and (given["params"][:, 3] == np.arange(500)).all()
    assert not given["params"][:, [0, 2]].any()
    assert list(oscillator.init(3, 2)) == ["weight"]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes in a step function: the file and line, and the way on

ANY = {"gates": "a n", "state": "c"}


def branches(a, n, c):
    if a > 0:  # here
        return c, c
    return n, n


def unknown_function(a, n, c):
    return sigmod(a) * c, c  # noqa: F821  # here


def of_math(a, n, c):
    return math.sin(a) * c, n  # here


def of_numpy(a, n, c):
    return np.sin(a) * c, n  # here


def method(a, n, c):
    return a.sigmoid() * c, n  # here


def operator(a, n, c):
    a = a + n
    return a % n, c  # here


def undeclared(a, n, c):
    c = a * c + bias  # noqa: F821  # here
    return c, c


def one_result(a, n, c):  # here
    return a * c + n


def too_many(a, n, c):  # here
    return c, c, n


def not_taken(a, c):  # here
    return a * c, c


def not_declared(a, n, c, b):  # here
    return a * c + b, n


def helper(a):
    return a @ a  # here, too


def calls_a_helper(a, n, c):
    return helper(a), c


MISTAKES = [
    (branches, "cannot branch on a value.*sru_rt.where"),
    (unknown_function, "name 'sigmod' is not defined.*functions of sru_rt: .*sigmoid"),
    (of_math, "cannot become a Python number; use the functions of sru_rt"),
    (of_numpy, "numpy.sin cannot be traced; use the functions of sru_rt"),
    (method, "no attribute 'sigmoid'.*the functions of sru_rt"),
    (operator, r"unsupported operand type.*with \+ - \* /"),
    (undeclared, "name 'bias' is not defined; a step function sees its arguments, which are declared"),
    (one_result, r"returns one value; it must return \(c, h\)"),
    (too_many, r"returns 3 values; it must return \(c, h\)"),
    (not_taken, "n is declared, but the step function does not take it by name; it takes a, c"),
    (not_declared, "takes b, which is not declared; declared are a, n, c: name it among gates"),
    (calls_a_helper, r"unsupported operand type\(s\) for @"),
]


@pytest.mark.parametrize("step, says", MISTAKES, ids=lambda v: getattr(v, "__name__", ""))
def test_mistakes_are_explained_where_they_are_made(step, says):
    with pytest.raises(StepError, match=says) as caught:
        sru_rt.cell(**ANY)(step)
    marked = helper if step is calls_a_helper else step
    lines = Path(__file__).read_text().splitlines()
    first = marked.__code__.co_firstlineno
    line = next(n for n in range(first, first + 5) if "# here" in lines[n - 1])
    assert str(caught.value).startswith(f"{__file__}:{line}: ")


@pytest.mark.parametrize(
    "declared, says",
    [
        ({"gates": "", "state": "c"}, "at least one gate and one state"),
        ({"gates": "a n", "state": ""}, "at least one gate and one state"),
        ({"gates": "a a", "state": "c"}, "'a' is declared twice"),
        ({"gates": "a n", "state": "a"}, "'a' is declared twice"),
        ({"gates": "a n!", "state": "c"}, "'n!' cannot be the name"),
        ({"gates": "a n", "state": "c", "inputs": "lengths"}, "'lengths' cannot be the name of one of its inputs"),
        ({"gates": "a n", "state": "c", "per_sequence": "x"}, "'x' cannot be the name of one of its per_sequence"),
        ({"gates": "a n", "state": "c", "constants": "out"}, "'out' cannot be the name of one of its constants"),
        ({"gates": "a n", "state": "c", "name": "no name"}, "'no name' cannot be the name of a cell"),
    ],
)
def test_mistakes_in_declarations(declared, says):
    def step(**values):
        return values["c"], values["a"]

    with pytest.raises(StepError, match=re.escape(says)):
        sru_rt.cell(**declared)(step)


def test_a_lambda_needs_a_name():
    with pytest.raises(StepError, match="'<lambda>' cannot be the name of a cell"):
        sru_rt.cell(gates="a", state="c")(lambda a, c: (a * c, c))
    made = sru_rt.cell(gates="a", state="c", name="product")(lambda a, c: (a * c, c))
    assert made.name == "product"


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes in calls

X = np.zeros((L, B, 2 * d), np.float32)
MASKS = {"m": np.ones((B, 2, d), np.float32), "room": np.ones((B, 2, d), np.float32)}
GAIN = {"gain": np.zeros((L, B, 2 * d), np.float32)}


def call(method: str, cell: OwnCell = everything, **changed: Any) -> Any:
    arguments = {"x": X, **everything.init(2 * d, d, directions=2, rng=0), **MASKS, **GAIN, "alpha": 1.0}
    if method == "step":
        arguments |= {"x": X[0], "gain": GAIN["gain"][0]}
    arguments = {n: a for n, a in (arguments | changed).items() if a is not ...}
    return getattr(cell, method)(**arguments)


WRONG = [
    ("forward", {"m": ...}, ArgumentError, "everything.forward: m is missing, .* pass m="),
    ("forward", {"alpha": ...}, ArgumentError, "everything.forward: alpha is missing"),
    ("forward", {"gamma": 1.0}, ArgumentError, "gamma is no argument, .*: it declares gain, m, room, alpha, beta"),
    ("forward", {"alpha": "much"}, ArgumentError, "everything.forward: alpha must be a number"),
    ("forward", {"m": MASKS["m"][:, :1]}, ShapeError, r"m has shape \(3, 1, 5\); it needs \(B, D, d\) = \(3, 2, 5\)"),
    ("forward", {"gain": GAIN["gain"][:, :, 1:]}, ShapeError, r"gain has shape .* it needs \(L, B, D\*d\)"),
    ("forward", {"gain": GAIN["gain"].astype("f8")}, DtypeError, "gain has dtype float64; it needs float32"),
    ("forward", {"params": None}, ArgumentError, r"params is None; the cell has 2 \(b, slope\): pass \(D, 2, d\)"),
    ("forward", {"params": np.zeros((2, 3, d), "f4")}, ShapeError, r"params has shape \(2, 3, 5\); it needs"),
    ("forward", {"x": X[:, :, 1:]}, ShapeError, "everything.forward: weight has shape"),
    ("forward", {"weight": np.zeros((2, 3, d, 2 * d), "f4")}, ShapeError, "k = 3 gates; it needs 2: f, n"),
    ("step", {"gain": GAIN["gain"]}, ShapeError, r"everything.step: gain has 3 axes.* it needs \(B, D\*d\)"),
    ("step", {"c": np.zeros((1, B, d), "f4")}, ShapeError, r"everything.step: c has shape .* it needs \(D, B, d\)"),
]


@pytest.mark.parametrize("method, changed, error, says", WRONG)
def test_mistakes_in_calls(method, changed, error, says):
    with pytest.raises(error, match=says) as caught:
        call(method, **changed)
    assert type(caught.value) is error
    call(method)  # is right without the change


def test_mistakes_with_several_states():
    given = diagonal_lstm.init(4, d, rng=0)
    x, one = np.zeros((L, B, 4), "f4"), np.zeros((1, B, d), "f4")
    with pytest.raises(ArgumentError, match=r"diagonal_lstm.forward: c0 must be a tuple of 2.*\(got ndarray\)"):
        diagonal_lstm.forward(x, **given, c0=one)
    with pytest.raises(ShapeError, match=r"c0\[1\] has shape"):
        diagonal_lstm.forward(x, **given, c0=(one, one[:, :1]))
    with pytest.raises(ArgumentError, match=r"out\[1\] must be a tuple of 2"):
        diagonal_lstm.forward(x, **given, out=(None, one))
    with pytest.raises(ArgumentError, match="out has overlapping arrays"):
        diagonal_lstm.forward(x, **given, out=(None, (one, one)))
    states = (one, one.copy())
    with pytest.raises(ArgumentError, match=r"out\[1\]\[0\] overlaps an input"):
        diagonal_lstm.forward(x, **given, c0=states, out=(None, (states[1], states[0])))
    diagonal_lstm.forward(x, **given, c0=states, out=(None, states))
    *_, saved = diagonal_lstm.forward(x, **given, save=True)
    with pytest.raises(ArgumentError, match=r"diagonal_lstm.backward: dc_last must be a tuple of 2"):
        diagonal_lstm.backward(saved, np.zeros((L, B, d), "f4"), one)


def test_mistakes_in_initial_values():
    with pytest.raises(ArgumentError, match=r"oscillator.init: params has a value for 'b', but the cell declares none"):
        oscillator.init(3, 2, params={"b": 1})
    with pytest.raises(
        ArgumentError, match=r"params\['w_i'\] must be a number or an array that broadcasts to \(1, 2\)"
    ):
        diagonal_lstm.init(3, 2, params={"w_i": np.zeros(3)})
    with pytest.raises(ArgumentError, match=r"oscillator.forward: params is given, but the cell declares none"):
        oscillator.forward(X, np.zeros((1, 1, d, 2 * d), "f4"), np.zeros((1, 1, d), "f4"))


def test_functions_are_known_by_name_in_a_page():
    """The page's own imports are enough for its cells."""
    assert {"exp", "relu", "sigmoid", "softplus", "sqrt", "tanh"} <= set(page())
    assert page()["exp"] is exp and page()["sqrt"] is sqrt
