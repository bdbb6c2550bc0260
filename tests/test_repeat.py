"""Calls like one before, whose checks and plans are not made again."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

import sru_rt
from problems import CELLS, FULL, Problem
from sru_rt import repeat
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError


@sru_rt.cell(gates="a n", params="b", state="c e")
def two_states(a, n, b, c, e):
    a = sru_rt.sigmoid(a + b)
    c = a * c + (1 - a) * n
    e = a * e + (1 - a) * c
    return c, e, c + e


def remembered() -> int:
    return len(repeat._repeats)


def same_bits(one, other):
    flat = [np.asarray(a) for results in (one, other) for result in results for a in _each(result)]
    half = len(flat) // 2
    for a, b in zip(flat[:half], flat[half:], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _each(value):
    return value if isinstance(value, tuple) else (value,)


def called_twice(function, *args, **kwargs):
    """The second results, which have the bits of the first and are new arrays; and that the call is remembered."""
    first = function(*args, **kwargs)
    assert remembered() == 1
    before = [a.copy() for result in first for a in _each(result)]
    second = function(*args, **kwargs)
    assert remembered() == 1
    same_bits(first, second)
    same_bits([tuple(before)], [tuple(a for result in first for a in _each(result))])
    return second


def without(problem: Problem, *names: str) -> dict:
    return {k: v for k, v in problem.given.items() if k not in names}


@pytest.mark.parametrize("layout", ["plain", "mask", "reset"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_call_like_one_before_has_its_results(cell, dtype, D, layer, layout, backend):
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (5, 3, 7), D, layout, layer=layer, state=True)
    h, _ = called_twice(problem.forward(layer), **problem.given)
    # With other values, in the same places and in others.
    for name in ("x", "u", "weight"):
        if problem.arrays.get(name) is not None:
            problem.arrays[name] = (np.nan_to_num(problem.arrays[name]) / 2).astype(problem.arrays[name].dtype)
    found = problem.forward(layer)(**problem.given)
    assert remembered() == 1
    assert found[0].tobytes() != h.tobytes()
    repeat._repeats.clear()
    same_bits(found, problem.forward(layer)(**problem.given))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_token_like_one_before(cell, dtype):
    params = getattr(sru_rt, f"{cell}_init")(6, 6, dtype=dtype, rng=0)
    x = np.random.default_rng(1).normal(size=(3, 6)).astype(dtype)
    state = np.ones((1, 3, 6), np.float64 if dtype == np.float64 else np.float32)
    step = getattr(sru_rt, f"{cell}_step")
    h, new = called_twice(step, x, **params, **{CELLS[cell].state: state})
    assert h.shape == (3, 6) and new.shape == (1, 3, 6) and not np.shares_memory(new, state)
    assert (state == 1).all()


@pytest.mark.parametrize("B", [1, 4])  # with one sequence the window lies as it is wanted
def test_tokens_with_a_window_are_rearranged_at_each_call(B):
    params = sru_rt.qrnn_init(6, 6, window=3, rng=0)
    rng = np.random.default_rng(0)
    for x in rng.normal(size=(3, 3, B, 6)).astype(np.float32):
        found = [sru_rt.qrnn_step(x, **params) for _ in range(2)][1]
        repeat._repeats.clear()
        same_bits(found, sru_rt.qrnn_step(x, **params))


def test_a_cell_of_two_states():
    rng = np.random.default_rng(0)
    u, params = rng.normal(size=(5, 2, 1, 2, 3)), rng.normal(size=(1, 1, 3))
    _, last = called_twice(two_states.recurrence, u, params)
    assert isinstance(last, tuple) and [a.shape for a in last] == [(1, 2, 3)] * 2
    u = rng.normal(size=u.shape)
    same_bits(two_states.recurrence(u, params), two_states.recurrence(u, params, c0=(None, None)))


def test_another_cell_of_the_same_name_is_another_call():
    def make(scale):
        @sru_rt.cell(gates="a", state="c", name="scaled")
        def step(a, c):
            c = scale * c + a
            return c, c

        return step

    u = np.ones((3, 1, 1, 1, 2), np.float32)
    for scale, want in ((2.0, 7), (3.0, 13), (2.0, 7)):
        cell = make(scale)
        for _ in range(2):
            assert (cell.recurrence(u)[0][-1] == want).all()


@pytest.mark.parametrize(
    "change",
    [
        {"u": lambda u: u[:4]},
        {"u": lambda u: u.astype(np.float64)},
        {"u": lambda u: np.asfortranarray(u)},
        {"u": lambda u: u.repeat(2, -1)[..., ::2]},
        {"h0": lambda h: None},
        {"h0": lambda h: h.astype(np.float64).astype(np.float32)[:, ::-1]},
        {"candidate": lambda _: "positive"},
        {"mask": lambda _: np.eye(5, 3, dtype=bool)},
        {"mask": lambda _: np.eye(5, 3, dtype=np.int8)},
        {"lengths": lambda _: [1, 2, 3]},
        {"lengths": lambda _: np.array([1, 2, 3])},
    ],
)
def test_what_differs_is_another_call(change):
    rng = np.random.default_rng(0)
    given = {
        "u": rng.normal(size=(5, 3, 1, 2, 7)).astype(np.float32),
        "h0": rng.normal(size=(1, 3, 7)).astype(np.float32),
    }
    called_twice(sru_rt.mingru_recurrence, **given)
    changed = given | {name: make(given.get(name)) for name, make in change.items()}
    found = [sru_rt.mingru_recurrence(**changed) for _ in range(2)]
    repeat._repeats.clear()
    contiguous = {k: np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for k, v in changed.items()}
    wanted = sru_rt.mingru_recurrence(**contiguous)
    same_bits(found[0], wanted)
    same_bits(found[1], wanted)


def test_arguments_may_come_by_name_in_any_order():
    rng = np.random.default_rng(0)
    u, h0 = rng.normal(size=(5, 3, 1, 2, 7)), rng.normal(size=(1, 3, 7))
    bias = rng.normal(size=(1, 2, 7))
    wanted = sru_rt.mingru_recurrence(u, bias, h0)
    for _ in range(2):
        same_bits(wanted, sru_rt.mingru_recurrence(h0=h0, u=u, bias=bias))
        same_bits(wanted, sru_rt.mingru_recurrence(bias=bias, h0=h0, u=u))
        same_bits(wanted, sru_rt.mingru_recurrence(u, h0=h0, bias=bias))


def test_names_count_where_layouts_are_the_same():
    rng = np.random.default_rng(0)
    u, one, other = rng.normal(size=(5, 3, 1, 3, 7)), rng.normal(size=(1, 2, 7)), rng.normal(size=(1, 2, 7))
    x = rng.normal(size=(5, 3, 7))
    wanted = sru_rt.sru_recurrence(u, x, bias=one, v=other), sru_rt.sru_recurrence(u, x, v=one, bias=other)
    assert remembered() == 2 and wanted[0][0].tobytes() != wanted[1][0].tobytes()
    for _ in range(2):
        same_bits(wanted[0], sru_rt.sru_recurrence(u, x, one, other))
        same_bits(wanted[1], sru_rt.sru_recurrence(u, x, v=one, bias=other))
        same_bits(wanted[0], sru_rt.sru_recurrence(u, x, v=other, bias=one))


def test_one_array_in_two_places_and_two_in_one_memory():
    x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(1, 3, 4, 4)).astype(np.float32)
    same = np.ones((1, 2, 4), np.float32)
    wanted = sru_rt.sru_forward(x, weight, same, same.copy())
    repeat._repeats.clear()
    sru_rt.sru_forward(x, weight, same, same)  # bias and v are one array, where it was seen first
    found = sru_rt.sru_forward(x, weight, same, 2 * same)
    repeat._repeats.clear()
    same_bits(found, sru_rt.sru_forward(x, weight, same, 2 * same))
    same_bits(sru_rt.sru_forward(x, weight, same, same), wanted)


def test_bad_calls_after_good_ones_are_refused():
    u = np.zeros((5, 3, 1, 2, 7), np.float32)
    h0 = np.zeros((1, 3, 7), np.float32)
    called_twice(sru_rt.mingru_recurrence, u, None, h0)
    for bad, error in (
        ({"h0": h0[:, :2]}, ShapeError),
        ({"h0": h0.astype(np.float64)}, DtypeError),
        ({"h0": h0.tolist()}, LibraryError),
        ({"lengths": [6, 0, 0]}, ArgumentError),
        ({"candidate": "nonsense"}, ArgumentError),
        ({"time_parallel": 1.0}, ArgumentError),
        ({"save": "nonsense"}, ArgumentError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                sru_rt.mingru_recurrence(**({"u": u, "h0": h0} | bad))
    assert remembered() == 1


def test_lengths_are_looked_at_each_time():
    u, lengths = np.zeros((5, 3, 1, 2, 7), np.float32), np.array([5, 0, 2])
    for _ in range(2):
        sru_rt.mingru_recurrence(u, lengths=lengths)
    lengths[1] = 6
    with pytest.raises(ArgumentError, match="lengths"):
        sru_rt.mingru_recurrence(u, lengths=lengths)


def test_settings_count_at_each_call(monkeypatch):
    u = np.zeros((5, 3, 1, 2, 7), np.float32)
    called_twice(sru_rt.mingru_recurrence, u)
    for name in ("SRU_RT_CPU", "SRU_RT_NUM_THREADS", "OMP_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "nonsense")
            with pytest.raises(ArgumentError, match=name):
                sru_rt.mingru_recurrence(u)
    sru_rt.mingru_recurrence(u)
    assert remembered() == 1


def test_many_calls_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr(repeat, "_MOST", 3)
    for L in range(1, 9):
        sru_rt.mingru_recurrence(np.zeros((L, 1, 1, 2, 2), np.float32))
        assert remembered() <= 3


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_on_a_gpu(cell, dtype, layer, place):
    cupy = place.xp
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (5, 3, 8), 1, "reset", layer=layer, state=True)
    given = place.put(problem.given)
    function = problem.forward(layer)
    first = [a.get() for a in function(**given)]
    assert remembered() == 1
    second = [a.get() for a in function(**given)]
    assert remembered() == 1
    same_bits(first, second)
    moved = {k: _moved(v, cupy) if hasattr(v, "dtype") else v for k, v in given.items()}  # which is copied first
    same_bits(first, [a.get() for a in function(**moved)])


def _moved(array, cupy):
    """The same values at an address that kernels do not take."""
    memory = cupy.zeros(array.nbytes + 512, np.uint8)
    part = memory[array.itemsize : array.itemsize + array.nbytes].view(array.dtype).reshape(array.shape)
    part[...] = array
    return part
