"""What a user may get wrong ends in an error that says what to do; what only looks odd works; nothing crashes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from ml_dtypes import bfloat16

import sru_rt
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError, SruRtError

L, B, D, d = 6, 3, 2, 5
LENGTHS = [5, 0, 4]
FORWARDS = ("sru_forward", "sru_recurrence", "sru_step")
OTHER_CELLS = ("qrnn", "mingru", "minlstm")
OTHER_FORWARDS = tuple(f"{cell}_{method}" for cell in OTHER_CELLS for method in ("forward", "recurrence", "step"))
WINDOW = 2  # of qrnn


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    """Nearly all that is tested here happens before a kernel; the tests of results ask for `backend`."""
    monkeypatch.setenv("SRU_RT_CPU", "numpy")


def arguments(function: str, projected: bool = False, dtype: Any = np.float32, D: int = D) -> dict[str, Any]:
    """A valid call that gives every array there is."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    if function.endswith("_init"):
        return {"d_in": d, "d": d}
    if not function.startswith("sru"):
        return other_arguments(function, draw)
    if function == "sru_backward":
        h, c_last, saved = sru_rt.sru_forward(**arguments("sru_forward", projected, dtype, D), save=True)
        return {"saved": saved, "dh": draw(*h.shape), "dc_last": draw(*c_last.shape).astype(c_last.dtype)}
    k, d_in = (4, 7) if projected else (3, D * d)
    result: dict[str, Any] = {"x": draw(L, B, d_in), "weight": draw(D, k, d, d_in)}
    if function == "sru_recurrence":
        result = {"u": draw(L, B, D, k, d)} | ({} if projected else {"x": draw(L, B, d_in)})
    result |= {"bias": draw(D, 2, d), "v": draw(D, 2, d), "dropout_mask": draw(B, D, d)}
    if function == "sru_step":
        return result | {"x": draw(B, d_in), "c": draw(D, B, d)}
    mask, reset = rng.random((2, L, B)) < 0.2
    return result | {"c0": draw(D, B, d), "lengths": np.array(LENGTHS), "mask": mask, "reset": reset}


def other_arguments(function: str, draw: Any) -> dict[str, Any]:
    """Of a QRNN with a window and x as its skip, a minGRU, or a minLSTM."""
    cell, _, method = function.partition("_")
    rng, state, k = np.random.default_rng(0), "c" if cell == "qrnn" else "h", 2 if cell == "mingru" else 3
    if method == "backward":
        h, last, saved = getattr(sru_rt, f"{cell}_forward")(**arguments(f"{cell}_forward"), save=True)
        return {"saved": saved, "dh": draw(*h.shape), f"d{state}_last": draw(*last.shape)}
    d_in = D * d if cell == "qrnn" else 7
    seen = WINDOW * d_in if cell == "qrnn" else d_in
    result: dict[str, Any] = {"x": draw(L, B, d_in), "weight": draw(D, k, d, seen)}
    if method == "recurrence":
        result = {"u": draw(L, B, D, k, d)} | ({"x": draw(L, B, d_in)} if cell == "qrnn" else {})
    result["bias"] = draw(D, k, d)
    if cell == "qrnn":
        result |= {"zoneout_mask": (rng.random((L, B, D, d)) < 0.5).astype(np.float32), "highway": True}
        result |= {"window": WINDOW} if method != "recurrence" else {}
    if method == "step":
        result |= {"zoneout_mask": result["zoneout_mask"][0], "x": draw(WINDOW, B, d_in)} if cell == "qrnn" else {}
        return result | {state: draw(D, B, d)} | ({} if cell == "qrnn" else {"x": draw(B, d_in)})
    mask, reset = rng.random((2, L, B)) < 0.2
    return result | {f"{state}0": draw(D, B, d), "lengths": np.array(LENGTHS), "mask": mask, "reset": reset}


def arrays_of(function: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in arguments(function).items() if isinstance(value, np.ndarray)}


def flat(value: Any) -> list[np.ndarray]:
    """The arrays in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [array for item in value for array in flat(item)]
    return [value] if isinstance(value, np.ndarray) and value.dtype != object else []


def content(values: Any) -> list[tuple[Any, ...]]:
    return [(a.shape, a.dtype, a.tobytes()) for a in flat(values)]


def refused(function: str, call: dict[str, Any], error: type[SruRtError], *says: str) -> str:
    """Checks that a call raises just `error`, and that the message says what it must; returns the message."""
    before = content(list(call.values()))
    with pytest.raises(SruRtError) as caught:
        getattr(sru_rt, function)(**call)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(f"{function}: "), message
    for text in says:
        assert text in message
    assert content(list(call.values())) == before, "an argument was changed"
    return message


def has_word(message: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) is not None


def test_errors_are_also_those_of_python():
    for error, kind in ((ArgumentError, ValueError), (ShapeError, ValueError), (DtypeError, TypeError)):
        assert issubclass(error, SruRtError)
        assert issubclass(error, kind)
    assert issubclass(LibraryError, SruRtError)
    assert issubclass(LibraryError, TypeError)


@pytest.mark.parametrize(
    "function",
    [*FORWARDS, *OTHER_FORWARDS, *(f"{cell}_{m}" for cell in ("sru", *OTHER_CELLS) for m in ("backward", "init"))],
)
def test_valid_calls_are_valid(function):
    """What the tests below spoil in one place is right in all others."""
    getattr(sru_rt, function)(**arguments(function))


# ----------------------------------------------------------------------------------------------------------------------
# Every array of every function, spoilt in every axis, its rank, its dtype and its type

FUNCTIONS = (*FORWARDS, "sru_backward", *OTHER_FORWARDS, *(f"{cell}_backward" for cell in OTHER_CELLS))
ARRAYS = [(f, name) for f in FUNCTIONS for name in arrays_of(f)]


@pytest.mark.parametrize(
    ("function", "name", "axis"),
    [(f, name, axis) for f, name in ARRAYS for axis in range(arrays_of(f)[name].ndim)],
)
def test_wrong_size_of_an_axis(function, name, axis):
    call = arguments(function)
    wrong = call[name].take(range(call[name].shape[axis] - 1), axis)
    message = refused(function, call | {name: wrong}, ShapeError)
    assert has_word(message, name), "neither as the argument nor as where a size comes from"
    assert has_word(message, str(wrong.shape[axis])), "what it got"
    assert re.search(r"it needs|must be|highway", message)


@pytest.mark.parametrize(("function", "name"), ARRAYS)
@pytest.mark.parametrize("change", ["one less", "one more", "none"])
def test_wrong_rank(function, name, change):
    call = arguments(function)
    given = call[name]
    wrong = {"one less": given[..., 0], "one more": given[None], "none": np.zeros((), given.dtype)}[change]
    message = refused(function, call | {name: wrong}, ShapeError, f"{name} has {wrong.ndim} axes, shape {wrong.shape}")
    assert re.search(r"it needs \(.*\w", message)


BAD_DTYPES = [
    dtype
    for dtype in ("int32", "complex64", "O", "longdouble", "bool", "S4", "datetime64[s]", "float64", "float16", "f4,i4")
    if np.dtype(dtype).name != "float64" or dtype == "float64"  # longdouble is float64 on some machines
]


def takes(function: str, name: str, dtype: str) -> bool:
    """Whether an argument may have that dtype where x, or else u, and all others are float32."""
    kind = np.dtype(dtype).kind
    if name == "u" and "x" not in arguments(function):  # the others may be float32 beside it
        return kind == "f"
    if name == "lengths":
        return kind in "iu"
    if name in ("mask", "reset"):
        return kind in "biuf"
    return name in ("dropout_mask", "zoneout_mask") and kind == "b"


@pytest.mark.parametrize(
    ("function", "name", "dtype"), [(f, n, dtype) for f, n in ARRAYS for dtype in BAD_DTYPES if not takes(f, n, dtype)]
)
def test_wrong_dtype(function, name, dtype):
    call = arguments(function)
    wrong = np.zeros(call[name].shape, dtype) if dtype == "f4,i4" else call[name].astype(dtype)
    message = refused(function, call | {name: wrong}, DtypeError, wrong.dtype.name, "it needs")
    assert has_word(message, name), "neither as the argument nor as what the others follow"
    assert "astype(" in message


@pytest.mark.parametrize(("function", "name"), ARRAYS)
@pytest.mark.parametrize(
    "value",
    [3, 2.5, "text", b"text", {"a": 1}, object(), np.float32(3), memoryview(b"a"), [1.5], iter([])],
    ids=lambda value: type(value).__name__,  # the same in every process, unlike repr
)
def test_no_array(function, name, value):
    message = refused_type(function, arguments(function) | {name: value}, name, value)
    assert has_word(message, name)


def refused_type(function: str, call: dict[str, Any], name: str, value: Any) -> str:
    if isinstance(value, list) and name == "weight":
        return refused(function, call, ShapeError, "pair")
    if isinstance(value, list) and name == "lengths":
        return refused(function, call, DtypeError, "lengths has dtype float64", "integer")
    return refused(function, call, LibraryError, f"{name} must be an array", type(value).__name__)


NEEDED = [(f, "u" if f[:3] == "min" and "recurrence" in f else "x") for f in (*FORWARDS, *OTHER_FORWARDS)]


@pytest.mark.parametrize(("function", "name"), [*NEEDED, ("sru_forward", "weight"), ("minlstm_forward", "weight")])
def test_none_where_an_array_is_needed(function, name):
    error = ArgumentError if function in ("sru_recurrence", "qrnn_recurrence") else LibraryError
    message = refused(function, arguments(function) | {name: None}, error)
    assert has_word(message, name)
    assert "None" in message
    assert "asarray" not in message, "asarray(None) is no way on"


# ----------------------------------------------------------------------------------------------------------------------
# A table of all else: function, what is wrong, the error, and what its message must say


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


NAN, INF = float("nan"), float("inf")
LENGTHS_CASES = [
    ([5, 0, 7], ArgumentError, ("0 to L = 6", "got 7", "sequence 2")),
    ([-1, 0, 4], ArgumentError, ("0 to L = 6", "got -1", "sequence 0")),
    (np.array([5, 0, 2**64 - 1], np.uint64), ArgumentError, ("0 to L = 6", str(2**64 - 1))),
    ([2**70, 1, 1], DtypeError, ("integer",)),
    ([5.0, 0.0, 4.0], DtypeError, ("float64", "integer")),
    (np.array([NAN, 0, 1]), DtypeError, ("float64", "integer")),
    ([True, False, True], DtypeError, ("bool", "integer")),
    (["5", "0", "4"], DtypeError, ("integer",)),
    ([None, 0, 4], DtypeError, ("object", "integer")),
    ([5, 0], ShapeError, ("(2,)", "B = 3 comes from")),
    ([[5, 0, 4]], ShapeError, ("(1, 3)", "B = 3 comes from")),
    ([[5, 0], [4]], ShapeError, ("[[5, 0], [4]]", "(B,)")),
    ([], ShapeError, ("(0,)", "B = 3 comes from")),
    (np.ma.array(LENGTHS), LibraryError, ("masked", "filled")),
]
OPTIONS = [
    ("alpha", [NAN, INF, -INF], ArgumentError, ("finite",)),
    ("alpha", ["x", "3", None, [1], 1j, np.ones(2), 10**400], ArgumentError, ("number",)),
    ("activation", ["Tanh", "", None, 3, ["tanh"], np.array(["tanh"])], ArgumentError, ("'identity', 'tanh', 'relu'",)),
    ("reset_on", ["next", None, True], ArgumentError, ("'previous', 'current'",)),
    ("highway", [None, 2, "yes", np.ones(2)], ArgumentError, ("True, False",)),
    ("reset_gate", [None, 2, "no", np.ones(2)], ArgumentError, ("True, False",)),
]
SEQUENCE_OPTIONS = [
    ("time_parallel", [None, "yes", 2, np.ones(2)], ArgumentError, ("'auto', True, False",)),
    ("save", [0, -1, 2.5, "y", "", NAN, [], np.ones(2), 1e3], ArgumentError, ("K >= 1", "'x'")),
    ("saved_dtype", ["float16", "float64", "", "real", 3, object()], ArgumentError, ("float32",)),
    *[("lengths", [value], error, says) for value, error, says in LENGTHS_CASES],
    *[(n, [zeros(B, L, dtype=bool)], ShapeError, ("(3, 6)", "(L, B) = (6, 3)")) for n in ("mask", "reset")],
    *[(n, [zeros(L, dtype=bool)], ShapeError, ("(6,)", "(L, B) = (6, 3)")) for n in ("mask", "reset")],
    *[
        (n, [zeros(L, B, dtype=t)], DtypeError, ("bool",))
        for n in ("mask", "reset")
        for t in ("O", "c8", "S1", "M8[s]")
    ],
    *[(n, [0, True, [[0] * B] * L], LibraryError, ("array", "asarray")) for n in ("mask", "reset")],
    ("v", [zeros(1, 1, D, 2, d)], ShapeError, ("(L, B, D, 2, d) = (6, 3, 2, 2, 5)",)),
    ("v", [zeros(L, B, D, 1, d)], ShapeError, ("(6, 3, 2, 1, 5)", "(6, 3, 2, 2, 5)")),
]


OTHER_OPTIONS = [
    ("pooling", ["F", "", None, 3, ["fo"], np.array(["fo"])], ArgumentError, ("'f', 'fo', 'ifo'",)),
    ("highway", [None, 2, "yes", np.ones(2)], ArgumentError, ("True, False",)),
    ("window", [0, -1, 2.0, "2", None, True, [2], np.ones(1)], ArgumentError, ("positive integer",)),
    ("candidate", ["Positive", "", None, 3, ["identity"]], ArgumentError, ("'identity', 'positive'",)),
]


def short(value: Any) -> str | None:
    """Names a case; None leaves that to pytest."""
    return repr(value)[:40] if isinstance(value, (int, float, list, np.ndarray)) else None


SHARED = [
    *[(f, n, v, *rest) for f in FORWARDS for n, values, *rest in OPTIONS for v in values],
    *[(f, n, v, *rest) for f in FORWARDS[:2] for n, values, *rest in SEQUENCE_OPTIONS for v in values],
    *[
        (f, n, v, *rest)
        for f in OTHER_FORWARDS
        for n, values, *rest in OTHER_OPTIONS
        for v in values
        if (f[:4] == "qrnn") == (n != "candidate") and not (n == "window" and "recurrence" in f)
    ],
    *[
        (f, n, v, *rest)
        for f in OTHER_FORWARDS
        for n, values, *rest in SEQUENCE_OPTIONS
        for v in values[:1]
        if "step" not in f and n != "v"
    ],
]


@pytest.mark.parametrize(("function", "name", "value", "error", "says"), SHARED, ids=short)
def test_options(function, name, value, error, says):
    message = refused(function, arguments(function) | {name: value}, error, *says)
    assert message.startswith(f"{function}: {name} ")
    if isinstance(value, (int, float, str)) and not isinstance(value, bool) and error is ArgumentError:
        assert repr(value) in message


GATES = [
    *[(dict(highway=True, reset_gate=True), k, "3 or 4") for k in (1, 2, 5)],
    *[(dict(highway=False, reset_gate=True), k, "3") for k in (1, 2, 4, 5)],
    *[(dict(highway=on, reset_gate=False), k, "2") for k in (1, 3, 4) for on in (True, False)],
]


@pytest.mark.parametrize(("flags", "k", "needed"), GATES)
def test_gates_that_do_not_fit_the_flags(flags, k, needed):
    says = (f"k = {k}", f"it needs {needed}", *(f"{name}={value}" for name, value in flags.items()))
    x, weight = zeros(L, B, d), zeros(1, k, d, d)
    for function, call in (
        ("sru_forward", {"x": x, "weight": weight}),
        ("sru_step", {"x": x[0], "weight": weight}),
        ("sru_recurrence", {"u": zeros(L, B, 1, k, d)}),
    ):
        refused(function, call | flags, ShapeError, "u has" if "u" in call else "weight has", *says)


X, W, U = zeros(L, B, D * d), zeros(D, 3, d, D * d), zeros(L, B, D, 3, d)
P, Q = zeros(D, 3, d, 2), zeros(2, D * d)
H, C, TWO = zeros(L, B, D * d), zeros(D, B, d), zeros(D + 1, B, d)


# fmt: off
def forward(**changes: Any) -> dict[str, Any]:
    return {"x": X, "weight": W} | changes


MORE = [
    # QRNN, minGRU, minLSTM
    ("qrnn_forward", dict(x=zeros(L, B, 7), weight=zeros(D, 4, d, 7)),
     ShapeError, "weight has k = 4 gates", "pooling='fo', highway=False", "needs 3", "qrnn_init"),
    ("qrnn_forward", dict(x=zeros(L, B, 7), weight=zeros(D, 6, d, 7), pooling="ifo", highway=True),
     ShapeError, "weight has k = 6 gates", "needs 4 or 5"),
    ("qrnn_forward", dict(x=zeros(L, B, 7), weight=zeros(D, 2, d, 7), pooling="f", highway=True),
     ArgumentError, "highway is True", "no output gate", "'fo' or 'ifo'"),
    ("qrnn_forward", dict(x=zeros(L, B, 7), weight=zeros(D, 3, d, 7), highway=True),
     ShapeError, "x has ", "7", "10", "one more gate", "highway=False"),
    ("qrnn_forward", dict(x=zeros(L, B, 7), weight=zeros(D, 3, d, 7), window=2),
     ShapeError, "weight has shape", "window*d_in = 14", "window = 2 and d_in = 7 of x"),
    ("qrnn_recurrence", dict(u=U, highway=True), ArgumentError, "x is None", "pass x", "one more gate"),
    ("qrnn_recurrence", dict(u=U, x=zeros(L, B, D * d)), ArgumentError, "x is given", "leave x out"),
    ("qrnn_step", dict(x=zeros(B, 7), weight=zeros(D, 3, d, 14), window=2),
     ShapeError, "x has 2 axes", "(window, B, d_in)"),
    ("mingru_forward", dict(x=zeros(L, B, 7), weight=zeros(D, 3, d, 7)),
     ShapeError, "weight has k = 3 gates", "it needs 2: z, n", "mingru_init"),
    ("minlstm_recurrence", dict(u=zeros(L, B, D, 2, d)), ShapeError, "u has k = 2 gates", "it needs 3: f, i, n"),
    ("qrnn_init", dict(d_in=7, d=d, pooling="f", highway=True), ArgumentError, "highway is True", "no output gate"),
    ("qrnn_init", dict(d_in=7, d=d, highway=True, project_skip=False),
     ArgumentError, "project_skip is False", "7", "5", "highway=False"),
    ("qrnn_init", dict(d_in=7, d=d, window=0), ArgumentError, "window must be a positive integer"),
    ("qrnn_init", dict(d_in=7, d=d, forget_bias=INF), ArgumentError, "forget_bias must be finite"),
    ("mingru_init", dict(d_in=7, d=d, candidate="tanh"), ArgumentError, "candidate must be one of"),
    ("minlstm_init", dict(d_in=7, d=0), ArgumentError, "d must be a positive integer"),
    # SRU
    # the skip
    ("sru_forward", forward(x=zeros(L, B, 7), weight=zeros(D, 3, d, 7)),
     ShapeError, "x has ", "7", "10", "one more gate", "highway=False"),
    ("sru_forward", forward(x=zeros(L, B, d), weight=zeros(D, 3, d, d)),
     ShapeError, "x has ", "5", "10", "one more gate", "highway=False"),
    ("sru_recurrence", dict(u=U), ArgumentError, "x is None", "pass x", "one more gate", "highway=False"),
    ("sru_recurrence", dict(u=U, x=X, highway=False), ArgumentError, "x is given", "leave x out"),
    ("sru_recurrence", dict(u=zeros(L, B, D, 4, d), x=X), ArgumentError, "x is given", "leave x out"),
    ("sru_recurrence", dict(u=U, x=zeros(L, B, 7)), ShapeError, "x has ", "7", "10", "one more gate", "highway=False"),
    ("sru_recurrence", dict(u=U, x=X[:4]), ShapeError, "x has shape (4, 3, 10)", "L = 6", "from u"),
    ("sru_recurrence", dict(u=U, x=X.astype("f8")), DtypeError, "x has dtype float64", "needs float32", "give u "),
    # directions
    ("sru_forward", forward(weight=zeros(3, 3, d, D * d)), ShapeError, "weight has D = 3", "D is 1", "or 2"),
    ("sru_forward", forward(weight=zeros(0, 3, d, D * d)), ShapeError, "weight has D = 0", "D is 1", "or 2"),
    ("sru_recurrence", dict(u=zeros(L, B, 3, 3, d)), ShapeError, "u has D = 3", "D is 1", "or 2"),
    # low rank
    ("sru_forward", forward(weight=(P,)), ShapeError, "weight", "of 1", "pair (P, Q)"),
    ("sru_forward", forward(weight=[P, Q, Q]), ShapeError, "weight", "of 3", "pair (P, Q)"),
    ("sru_forward", forward(weight=()), ShapeError, "weight", "of 0", "pair (P, Q)"),
    ("sru_forward", forward(weight=(P, zeros(3, D * d))),
     ShapeError, "weight[1] has shape (3, 10)", "(p, d_in) = (2, 10)", "p = 2 comes from weight[0]"),
    ("sru_forward", forward(weight=(P, Q.T)), ShapeError, "weight[1] has shape (10, 2)", "(p, d_in) = (2, 10)"),
    ("sru_forward", forward(weight=(Q, P)), ShapeError, "weight[0] has 2 axes", "(D, k, d, p)"),
    ("sru_forward", forward(weight=(P, Q.astype("f8"))), DtypeError, "weight[1] has dtype float64", "needs float32"),
    ("sru_forward", forward(weight=(P, None)), LibraryError, "weight[1]", "None"),
    ("sru_forward", forward(weight=((P, Q), Q)), LibraryError, "weight[0]", "tuple"),
    # nothing to compute: a mistake, while no steps and no sequences happen in practice
    ("sru_forward", forward(x=zeros(L, B, 0), weight=zeros(D, 4, d, 0)),
     ShapeError, "x has shape (6, 3, 0)", "d_in", "at least 1"),
    ("sru_forward", forward(weight=zeros(D, 3, 0, D * d)),
     ShapeError, "weight has shape (2, 3, 0, 10)", "d = 0", "at least 1"),
    ("sru_forward", forward(weight=(P[..., :0], Q[:0])), ShapeError, "weight[0]", "p = 0", "at least 1"),
    ("sru_recurrence", dict(u=zeros(L, B, D, 3, 0), x=zeros(L, B, 0)),
     ShapeError, "u has shape (6, 3, 2, 3, 0)", "at least 1"),
    ("sru_step", forward(x=zeros(B, 0), weight=zeros(D, 4, d, 0)), ShapeError, "x has shape (3, 0)", "at least 1"),
    # parameters of the basic form
    ("sru_forward", forward(weight=W[:, :2], bias=zeros(D, 2, d), reset_gate=False),
     ShapeError, "bias has shape (2, 2, 5)", "(2, 1, 5)"),
    ("sru_forward", forward(weight=W[:, :2], v=zeros(D, 2, d), reset_gate=False),
     ShapeError, "v has shape (2, 2, 5)", "(2, 1, 5)"),
    ("sru_step", forward(x=X[0], v=zeros(2, B, D, 2, d)), ShapeError, "v has shape (2, 3, 2, 2, 5)", "(1, 3, 2, 2, 5)"),
    # subclasses whose meaning would be lost
    ("sru_forward", forward(x=np.ma.array(X)), LibraryError, "x ", "masked", "x.filled("),
    ("sru_recurrence", dict(u=U, x=np.ma.array(X)), LibraryError, "x ", "masked", "x.filled("),
    ("sru_step", forward(x=X[0], c=np.ma.array(C)), LibraryError, "c ", "masked", "c.filled("),
    ("sru_forward", forward(weight=np.ones((4, 4), "f4").view(np.matrix)),
     ShapeError, "weight has 2 axes", "(D, k, d, d_in)"),
    # out
    ("sru_forward", forward(out=3), ArgumentError, "out must be a pair", "int"),
    ("sru_forward", forward(out=H), ArgumentError, "out must be a pair", "ndarray"),
    ("sru_forward", forward(out=(H,)), ArgumentError, "out must be a pair"),
    ("sru_forward", forward(out=(H, C, C)), ArgumentError, "out must be a pair"),
    ("sru_forward", forward(out=([1], None)), LibraryError, "out[0] must be an array", "list"),
    ("sru_forward", forward(out=(None, 3)), LibraryError, "out[1] must be an array", "int"),
    ("sru_forward", forward(out=(H[:4], None)), ShapeError, "out[0] has shape (4, 3, 10)", "(6, 3, 10)"),
    ("sru_forward", forward(out=(None, C[0])), ShapeError, "out[1] has 2 axes", "(D, B, d)"),
    ("sru_forward", forward(out=(H.astype("f8"), None)),
     DtypeError, "out[0] has dtype float64", "needs float32", "numpy.empty"),
    ("sru_forward", forward(out=(None, C.astype("f2"))),
     DtypeError, "out[1] has dtype float16", "needs float32", "numpy.empty"),
    ("sru_forward", forward(out=(zeros(L, B, 4 * d)[..., ::2], None)),
     ArgumentError, "out[0]", "C-contiguous", "numpy.empty"),
    ("sru_forward", forward(out=(None, C[::-1])), ArgumentError, "out[1]", "C-contiguous", "numpy.empty"),
    ("sru_forward", forward(out=(read_only(H), None)), ArgumentError, "out[0]", "writeable", "numpy.empty"),
    ("sru_forward", forward(out=(H.astype(">f4"), None)), ArgumentError, "out[0]", "byte order", "numpy.empty"),
    ("sru_forward", forward(out=(np.ma.array(H), None)), LibraryError, "out[0]", "masked"),
    ("sru_forward", forward(out=(X, None)), ArgumentError, "out[0] overlaps an input", "memory of its own"),
    ("sru_forward", forward(out=(None, X.reshape(-1)[: C.size].reshape(C.shape))), ArgumentError, "out[1] overlaps"),
    ("sru_forward", forward(c0=TWO[:D], out=(None, TWO[1:])), ArgumentError, "out[1] overlaps"),
    ("sru_forward", forward(out=(H, H.reshape(-1)[: C.size].reshape(C.shape))), ArgumentError, "out ", "overlap"),
    ("sru_step", forward(x=X[0], out=(H[:1], None)), ShapeError, "out[0] has 3 axes", "(B, D*d) = (3, 10)"),
    ("sru_step", forward(x=X[0], out=(X[0], None)), ArgumentError, "out[0] overlaps"),
]
# fmt: on


@pytest.mark.parametrize(("function", "call", "error", "says"), [(f, c, e, says) for f, c, e, *says in MORE])
def test_other_mistakes(function, call, error, says):
    refused(function, call, error, *says)


@pytest.mark.parametrize("saved", [None, 3, "text", (), X, type])
def test_backward_of_something_else(saved):
    refused("sru_backward", {"saved": saved, "dh": H}, LibraryError, "saved", type(saved).__name__, "save=", "forward")


def test_backward_of_the_whole_result():
    result = sru_rt.sru_forward(X, W, save=True)
    refused("sru_backward", {"saved": result, "dh": H}, LibraryError, "saved", "tuple", "third result")


@pytest.mark.parametrize("need", [3, True, "u", "dropout", ("x", "q"), [None], [["x"]], "dropout_mask"])
def test_need(need):
    call = arguments("sru_backward") | {"need": need}
    refused("sru_backward", call, ArgumentError, "need ", "x, weight, bias, v, c0")


def test_need_of_what_was_not_given():
    saved = sru_rt.sru_forward(X, W, save=True)[2]
    call = {"saved": saved, "dh": H, "need": "bias"}
    refused("sru_backward", call, ArgumentError, "need has 'bias'", "None", "leave it out")


def test_no_gradient_at_all():
    call = arguments("sru_backward") | {"dh": None, "dc_last": None}
    refused("sru_backward", call, ArgumentError, "dh", "dc_last", "None", "at least one")


def test_names_of_gradients():
    """Those of all inputs, None where an input was None, and nothing else."""
    saved = sru_rt.sru_forward(X, W, save=True)[2]
    assert list(sru_rt.sru_backward(saved, H)) == ["x", "weight", "bias", "v", "c0"]
    grads = sru_rt.sru_backward(saved, H, need=("weight",))
    assert list(grads) == ["weight"]
    with pytest.raises(AttributeError, match="gradient of x was not asked for; add it to need="):
        _ = grads.x
    with pytest.raises(AttributeError, match="no gradient of 'y'; there are those of x, weight, bias, v, c0"):
        _ = grads.y


INIT = [
    *[(n, v, "positive integer") for n in ("d_in", "d", "directions") for v in (0, -1, 2.5, "4", True, None, [4])],
    *[("low_rank", v, "positive integer") for v in (0, -2, 1.5, "2", True)],
    ("directions", 3, "1, 2"),
    *[("project_skip", v, "'auto', True, False") for v in (None, "yes", 2)],
    *[(n, v, "True, False") for n in ("recurrent", "highway", "reset_gate") for v in (None, "no", 2)],
    *[("highway_bias", v, "number") for v in ("a", None, [0.0], 1j)],
    *[("highway_bias", v, "finite") for v in (NAN, INF)],
    *[("highway_bias", v, repr(v)) for v in (1e4, -1e4)],
    *[("dtype", v, "'float16', 'bfloat16', 'float32', 'float64'") for v in ("int32", int, None, 3, "real", object)],
    *[("rng", v, "seed") for v in ("abc", -3, 2.5, np.random)],
    *[("like", v, "array") for v in (3, [1.0], "torch", np, np.ndarray)],
    ("d_in", 2**62, "memory"),
]


@pytest.mark.parametrize(("name", "value", "says"), INIT)
def test_init(name, value, says):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refused("sru_init", arguments("sru_init") | {name: value}, ArgumentError, says)
    assert message.startswith(f"sru_init: {name}")


def test_init_options_that_contradict_each_other():
    call = {"d_in": 6, "d": 5, "project_skip": False}
    refused("sru_init", call, ArgumentError, "project_skip", "6", "5", "'auto'", "highway=False")
    for name in ("highway", "reset_gate"):
        call = {"d_in": 5, "d": 5, "project_skip": True, name: False}
        refused("sru_init", call, ArgumentError, "project_skip", "no skip", "leave it out")


# ----------------------------------------------------------------------------------------------------------------------
# What only looks odd


class Subclass(np.ndarray):
    pass


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    result = memory.view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def sliced(array: np.ndarray) -> np.ndarray:
    memory = np.zeros([2 * n for n in array.shape], array.dtype)
    memory[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return memory[tuple(slice(None, None, 2) for _ in array.shape)]


LAYOUTS = {
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "zero strides": lambda a: np.broadcast_to(a[:1], a.shape),
    "sliced": sliced,
    "unaligned": unaligned,
    "read-only": read_only,
    "subclass": lambda a: a.view(Subclass),
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
}


def run(call: dict[str, Any], seeds: tuple[Any, Any] = (None, None), function: str = "sru_forward") -> list[np.ndarray]:
    """h, c_last and all gradients of the given inputs."""
    h, c_last, saved = getattr(sru_rt, function)(**call, save=2)
    dh = np.linspace(-1, 1, h.size).astype(h.dtype).reshape(h.shape) if seeds[0] is None else seeds[0]
    dc_last = np.ones_like(c_last) if seeds[1] is None else seeds[1]
    grads = sru_rt.sru_backward(saved, dh, dc_last)
    return flat([h, c_last, [getattr(grads, name) for name in grads]])


def assert_same_bits(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=")
        assert a.shape == b.shape
        assert a.astype(b.dtype).tobytes() == b.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_layout_of_the_given_arrays(backend, layout, projected, dtype):
    call = arguments("sru_forward", projected, dtype)
    dh, dc_last = np.sin(np.arange(L * B * D * d)).reshape(L, B, D * d).astype(dtype), np.ones((D, B, d), np.float32)
    odd = {name: LAYOUTS[layout](value) for name, value in call.items()}
    seeds = LAYOUTS[layout](dh), LAYOUTS[layout](dc_last)
    plain = {name: np.array(value, value.dtype.newbyteorder("="), order="C") for name, value in odd.items()}
    before = content([list(odd.values()), seeds])
    got = run(odd, seeds)
    assert content([list(odd.values()), seeds]) == before
    assert all(type(a) is np.ndarray for a in got)
    assert_same_bits(got, run(plain, tuple(np.array(a, a.dtype.newbyteorder("="), order="C") for a in seeds)))


@pytest.mark.parametrize("function", ["sru_recurrence", "sru_step"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_for_other_functions(function, layout):
    odd = {name: LAYOUTS[layout](value) for name, value in arguments(function).items()}
    plain = {name: np.array(value, value.dtype.newbyteorder("="), order="C") for name, value in odd.items()}
    before = content(list(odd.values()))
    if function == "sru_step":
        assert_same_bits(flat(sru_rt.sru_step(**odd)), flat(sru_rt.sru_step(**plain)))
    else:
        assert_same_bits(run(odd, function=function), run(plain, function=function))
    assert content(list(odd.values())) == before


def test_layout_of_a_low_rank_weight(backend):
    call = {name: value for name, value in arguments("sru_forward").items() if name in ("x", "bias", "v")}
    P, Q = np.float32(np.cos(np.arange(D * 3 * d * 2))).reshape(D, 3, d, 2), np.float32(np.eye(2, D * d))
    wanted = run(call | {"weight": (P, Q)})
    for layout in set(LAYOUTS) - {"zero strides"}:
        assert_same_bits(run(call | {"weight": [LAYOUTS[layout](P), LAYOUTS[layout](Q)]}), wanted)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i4", list, tuple])
def test_integers_for_lengths(dtype):
    call = arguments("sru_forward")
    wanted = run(call)
    lengths = dtype(LENGTHS) if dtype in (list, tuple) else np.array(LENGTHS, dtype)
    assert_same_bits(run(call | {"lengths": lengths}), wanted)


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.float16, np.float64, bfloat16, ">i4", ">f8"])
@pytest.mark.parametrize("name", ["mask", "reset"])
def test_numbers_for_flags(name, dtype):
    """What is not 0 is true."""
    call = arguments("sru_forward")
    assert_same_bits(run(call | {name: call[name].astype(dtype) * np.array(3, dtype)}), run(call))


@pytest.mark.parametrize("save", [np.int64(2), np.uint8(2), True, 10**9, 10**30, "x", np.str_("x")])
def test_save(save):
    call = arguments("sru_forward")
    h, c_last, saved = sru_rt.sru_forward(**call, save=save)
    assert_same_bits([h, c_last], list(sru_rt.sru_forward(**call)))
    other = sru_rt.sru_forward(**call, save=2)[2]
    assert_same_bits([sru_rt.sru_backward(saved, h).x], [sru_rt.sru_backward(other, h).x])


@pytest.mark.parametrize("alpha", [np.float32(2), np.float64(2), 2, np.array(2.0), np.int8(2)])
def test_numbers_for_alpha(alpha):
    call = arguments("sru_forward")
    assert_same_bits(list(sru_rt.sru_forward(**call, alpha=alpha)), list(sru_rt.sru_forward(**call, alpha=2.0)))


@pytest.mark.parametrize("need", ["x", ["x"], {"x": 1}, {"x"}, ("x", "x"), np.array(["x"]), (n for n in "x")])
def test_ways_to_name_a_gradient(need):
    call = arguments("sru_backward")
    assert_same_bits([sru_rt.sru_backward(**call, need=need).x], [sru_rt.sru_backward(**call).x])


def test_need_nothing():
    assert list(sru_rt.sru_backward(**arguments("sru_backward"), need=())) == []


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("c_in_place", [False, True])
def test_out(backend, projected, c_in_place):
    call = arguments("sru_forward", projected)
    wanted = run(call)
    h, c = np.full_like(wanted[0], np.nan), np.full_like(wanted[1], np.nan)
    if c_in_place:
        c[...] = call["c0"]
        call["c0"] = c
    got = run(call | {"out": (h, c)})
    assert np.shares_memory(got[0], h)
    assert np.shares_memory(got[1], c)
    assert_same_bits(got, wanted)
    assert_same_bits([h, c], wanted[:2])


def test_out_of_one_result():
    call = arguments("sru_forward")
    wanted = list(sru_rt.sru_forward(**call))
    for i in (0, 1):
        out: list[Any] = [None, None]
        out[i] = np.full_like(wanted[i], np.nan)
        assert_same_bits(list(sru_rt.sru_forward(**call, out=out)), wanted)
        assert_same_bits([out[i]], [wanted[i]])


def test_step_in_place(backend):
    call = arguments("sru_step")
    wanted = list(sru_rt.sru_step(**call))
    h, c = np.full_like(wanted[0], np.nan), call["c"].copy()
    assert_same_bits(list(sru_rt.sru_step(**call | {"c": c}, out=(h, c))), wanted)
    assert_same_bits([h, c], wanted)


def test_results_are_no_views_of_what_was_given():
    for dtype in (np.float32, np.float64):
        call = arguments("sru_forward", dtype=dtype)
        for size in (L, 0):
            less = call | {n: call[n][:size] for n in ("x", "mask", "reset")} | {"lengths": None}
            dc_last = np.ones((D, B, d), dtype)
            for result in run(less, (None, dc_last)):
                assert not any(np.may_share_memory(result, a) for a in [*flat(list(less.values())), dc_last])


@pytest.mark.parametrize("function", ["sru_forward", "sru_recurrence"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("L", "B"), [(0, 3), (6, 0), (0, 0)])
@pytest.mark.parametrize("save", [True, 3, "x"])
def test_no_steps_or_no_sequences(backend, function, projected, D, L, B, save):
    """The state passes through, so does its gradient, and those of the parameters are 0."""
    call = arguments(function, projected, D=D)
    call |= {name: call[name][:L, :B] for name in ("u", "x", "mask", "reset") if name in call}
    call |= {"c0": call["c0"][:, :B], "dropout_mask": call["dropout_mask"][:B], "lengths": [0] * B}
    h, c_last, saved = getattr(sru_rt, function)(**call, save=save)
    assert h.shape == (L, B, D * d)
    assert_same_bits([c_last], [call["c0"]])
    dc_last = np.full_like(c_last, 2.5)
    for seeds in ((np.ones_like(h), dc_last), (None, dc_last)):
        grads = sru_rt.sru_backward(saved, *seeds)
        assert_same_bits([grads.c0], [dc_last])
        for name in set(grads) & set(call) - {"c0"}:
            assert getattr(grads, name).shape == call[name].shape
            assert not getattr(grads, name).any()
    assert not sru_rt.sru_backward(saved, np.ones_like(h)).c0.any()


def test_no_sequences_in_a_step(backend):
    call = arguments("sru_step")
    h, c = sru_rt.sru_step(**call | {"x": call["x"][:0], "c": call["c"][:, :0], "dropout_mask": None})
    assert (h.shape, c.shape) == ((0, D * d), (D, 0, d))


def test_many_steps_and_a_very_large_interval(backend):
    L = 20_000 if backend == "compiled" else 300
    x, weight = np.linspace(-1, 1, L, dtype=np.float32).reshape(L, 1, 1), np.ones((1, 3, 1, 1), np.float32)
    wanted = None
    for save in (1, 7, L - 1, 10**12):
        h, c_last, saved = sru_rt.sru_forward(x, weight, save=save)
        grads = sru_rt.sru_backward(saved, np.ones_like(h))
        results = [h, c_last, grads.x, grads.weight]
        wanted = wanted or results
        assert_same_bits(results, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Values that are no numbers


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_stays_in_its_sequence(backend, projected, value):
    call = arguments("sru_forward", projected) | {"lengths": None, "mask": None}
    h, c_last, dx, _, _, _, dc0 = run(call)
    x = call["x"].copy()
    x[2, 1, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spoilt = run(call | {"x": x})
    assert np.isnan(spoilt[0][2:, 1]).any()
    others = [0, 2]
    for wanted, got in ((h, spoilt[0]), (c_last, spoilt[1]), (dx, spoilt[2]), (dc0, spoilt[6])):
        assert_same_bits([got[:, others]], [wanted[:, others]])


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_values_of_padding_have_no_effect(backend, low_rank, projected, value):
    call = arguments("sru_forward", projected)
    if low_rank:
        P = np.cos(np.arange(D * call["weight"].shape[1] * d * 2, dtype=np.float32)).reshape(D, -1, d, 2)
        call["weight"] = (P, call["weight"][0, :2, 0])
    padding = call["mask"] | (np.arange(L)[:, None] >= call["lengths"])
    wanted = run(call)
    assert all(np.isfinite(a).all() for a in wanted)
    assert not wanted[0][padding].any()
    assert not wanted[2][padding].any()
    x = call["x"].copy()
    x[padding] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(run(call | {"x": x}), wanted)


def test_values_of_padded_gates_have_no_effect(backend):
    call = arguments("sru_recurrence")
    padding = call["mask"] | (np.arange(L)[:, None] >= call["lengths"])
    wanted = run(call, function="sru_recurrence")
    call["u"][padding] = np.nan
    call["x"][padding] = np.inf
    assert_same_bits(run(call, function="sru_recurrence"), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Random calls, spoilt in random places: each succeeds as documented or raises an error of the library

ODD = [None, 0, 1, -1, 2.5, "x", "auto", True, False, np.int64(3), np.array([1, 2]), [], (), {}, NAN, object(), 10**30]
SPOIL: dict[str, Any] = {
    "less axes": lambda a: a[0],
    "more axes": lambda a: a[None],
    "shorter": lambda a: a[..., :-1],
    "fewer": lambda a: a[:-1],
    "longer": lambda a: np.concatenate([a, a], -1),
    "no channels": lambda a: a[..., :0],
    "nothing": lambda a: a[:0],
    "no axes": lambda a: np.zeros((), a.dtype),
    "list": lambda a: a.tolist(),
    "None": lambda a: None,
    "number": lambda a: 3,
    "text": lambda a: "text",
    "masked": np.ma.array,
    "NaN": lambda a: np.full_like(a, np.nan) if a.dtype.kind == "f" else a,
    "large": lambda a: np.full_like(a, 100),
    "negative": lambda a: a * np.array(-1).astype(a.dtype) if a.dtype != bool else ~a,
    **{to: (lambda a, to=to: a.astype(to)) for to in ("i4", "i8", "f2", "f8", ">f4", "c8", "?", "O")},
    **LAYOUTS,
}


@st.composite
def random_calls(draw, few_kernels: bool) -> tuple[str, dict[str, Any]]:
    """A function and its arguments; with `few_kernels`, options that do not change the formula."""
    function = draw(st.sampled_from(FORWARDS))
    dtype = draw(st.sampled_from([np.float32] if few_kernels else [np.float32, np.float16, np.float64, bfloat16]))
    call = arguments(function, draw(st.booleans()), dtype, draw(st.sampled_from([1, 2])))
    droppable = ["lengths", "mask", "reset", "c0", "c"] + ([] if few_kernels else ["bias", "v", "dropout_mask"])
    for name in draw(st.sets(st.sampled_from(droppable))):
        call.pop(name, None)
    options = ["alpha", "save", "out", "time_parallel", "saved_dtype"]
    options += [] if few_kernels else ["activation", "highway", "reset_gate", "reset_on"]
    if function == "sru_step":
        options = [name for name in options if name not in ("save", "time_parallel", "saved_dtype")]
    elif draw(st.booleans()):
        call["save"] = draw(st.sampled_from([True, 1, 2, 50, "x"]))
    kept = ("bias", "v", "dropout_mask") if few_kernels else ()
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*call, *options]))
        if isinstance(call.get(name), np.ndarray):
            harms = [harm for harm in SPOIL if harm != "None" or name not in kept]
            harm = draw(st.sampled_from(harms))
            once_more = call[name].ndim > 0 and call[name].dtype.kind != "c"
            call[name] = SPOIL[harm](call[name]) if once_more else call[name]
        else:
            call[name] = draw(st.sampled_from(ODD))
    return function, call


def outcome(function: str, call: dict[str, Any]) -> str:
    """Makes the call, and checks what it returns or raises."""
    before = content(list(call.values()))
    try:
        result = getattr(sru_rt, function)(**call)
    except SruRtError as error:
        assert str(error).startswith(f"{function}: ")
        assert content(list(call.values())) == before
        return "refused"
    given = np.asarray(call["u"] if function == "sru_recurrence" else call["x"])
    weight = call.get("weight")
    D, d = (given.shape[2], given.shape[4]) if weight is None else (weight.shape[0], weight.shape[2])
    dtype = given.dtype.newbyteorder("=")
    state = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    steps = given.shape[:2] if weight is None else given.shape[:-1]
    assert (result[0].shape, result[0].dtype) == ((*steps, D * d), dtype)
    assert (result[1].shape, result[1].dtype) == ((D, steps[-1], d), state)
    assert content(list(call.values())) == before
    if len(result) == 2:
        return "computed"
    grads = sru_rt.sru_backward(result[2], np.ones_like(result[0]))
    for name in grads:
        gradient = getattr(grads, name)
        assert (gradient is None) == (call.get(name) is None)
        if gradient is not None:
            assert (gradient.shape, gradient.dtype) == (call[name].shape, call[name].dtype)
    assert content(list(call.values())) == before
    return "computed with gradients"


def fuzz(few_kernels: bool, examples: int) -> dict[str, int]:
    """Makes random calls; returns how often each outcome was seen."""
    seen: dict[str, int] = {}

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(random_calls(few_kernels))
    def one(call):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = outcome(*call)
        seen[result] = seen.get(result, 0) + 1

    one()
    return seen


def test_random_calls():
    seen = fuzz(few_kernels=False, examples=1000)
    assert min(seen.get(key, 0) for key in ("refused", "computed", "computed with gradients")) > 20, seen


def test_random_calls_of_compiled_kernels():
    """In a process of its own, so that a crash is a failure with a traceback and not the end of the tests."""
    code = "import test_errors; print(test_errors.fuzz(few_kernels=True, examples=600))"
    environment = os.environ | {"SRU_RT_CPU": "compiled"}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "computed with gradients" in done.stdout
