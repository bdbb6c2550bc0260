"""Calls that are made ready once and run again with what their arrays then hold."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import sru_rt
from emu import fake_cupy
from problems import CELLS, FULL, Problem
from sru_rt import on_cupy
from sru_rt.errors import ArgumentError, LibraryError, ShapeError
from test_repeat import same_bits, two_states


def halved(arrays):
    """Other values in the same memory."""
    for array in arrays.values():
        for one in array if isinstance(array, tuple) else (array,):
            if getattr(one, "dtype", None) is not None and one.dtype.kind in "fV":
                one[...] = (one.astype(np.float32) / 2).astype(one.dtype)


def flat(results):
    return [a for r in results for a in (r if isinstance(r, tuple) else (r,))]


def runs_again(function, given, place=None):
    """A prepared call gives what a call gives, before and after its arrays have changed, in the same memory."""
    get = place.get if place else lambda a: a
    copies = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in given.items()}
    arrays = place.put(given) if place else given
    call = sru_rt.prepare(function, **arrays)
    same_bits(get(tuple(call.results)), function(**copies))
    places = [id(a) for a in flat(call.results)]
    halved(copies)
    halved(arrays) if not place else [arrays[k].__setitem__(..., place.put(copies[k])) for k in _arrays(copies)]
    assert [id(a) for a in flat(call.run())] == places
    wanted = function(**(place.put(copies) if place else copies))
    same_bits(get(tuple(call.results)), get(tuple(wanted)))
    for k in _arrays(copies):
        assert get(arrays[k]).tobytes() == copies[k].tobytes(), f"{k} was written to"
    return call


def _arrays(given):
    return [k for k, v in given.items() if isinstance(v, np.ndarray) and v.dtype.kind in "fV"]


@pytest.mark.parametrize("layout", ["plain", "all"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_prepared_call_runs_again(cell, dtype, D, layer, layout, backend):
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (5, 3, 7), D, layout, layer=layer, state=True)
    runs_again(problem.forward(layer), problem.given)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_on_a_gpu(cell, layer, place, monkeypatch):
    problem = Problem.make(FULL[cell] | {"dtype": "float16"}, (5, 3, 8), 1, "reset", layer=layer, state=True)
    given = problem.given
    function = problem.forward(layer)
    arrays = place.put(given)
    call = sru_rt.prepare(function, **arrays)
    wanted = place.get(tuple(function(**arrays)))
    for result in call.results:
        result.fill(0)
    with monkeypatch.context() as patch:
        patch.setattr(on_cupy.CuPy, "empty", None)
        patch.setattr(on_cupy.CuPy, "workspace", None)
        fake_cupy.record.clear()
        call.run()
        assert not fake_cupy.record.reads  # on a GPU nobody writes to it
    same_bits(place.get(tuple(call.results)), wanted)


@pytest.mark.parametrize("place", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_a_run_is_captured_into_a_graph(place):
    cupy = place.xp
    params = sru_rt.sru_init(64, 64, dtype="float16", rng=0, like=cupy.zeros(1))
    x, c = cupy.zeros((3, 64), "float16"), cupy.zeros((1, 3, 64), "float32")
    h = cupy.empty_like(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call = sru_rt.prepare(sru_rt.sru_step, x, **params, c=c, out=(h, c))
        stream.begin_capture()
        call.run()
        graph = stream.end_capture()
    rng = np.random.default_rng(0)
    state = cupy.zeros_like(c)
    stream.synchronize()
    c.fill(0)
    for _ in range(3):
        x[...] = cupy.asarray(rng.normal(size=x.shape))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        wanted, state = sru_rt.sru_step(x, **params, c=state)
        same_bits((h.get(), c.get()), (wanted.get(), state.get()))


def test_each_call_has_memory_of_its_own():
    params = sru_rt.sru_init(6, 6, rng=0)
    x = np.ones((3, 6), np.float32)
    calls = [sru_rt.prepare(sru_rt.sru_step, x, **params) for _ in range(2)]
    assert not np.shares_memory(calls[0]._forward.u, calls[1]._forward.u)
    assert not np.shares_memory(calls[0].results[0], calls[1].results[0])


@pytest.mark.parametrize("cell", CELLS)
def test_tokens_in_place(cell):
    """The state is updated where it is, token by token."""
    letter = CELLS[cell].state
    step, forward = getattr(sru_rt, f"{cell}_step"), getattr(sru_rt, f"{cell}_forward")
    params = getattr(sru_rt, f"{cell}_init")(6, 6, rng=0)
    x = np.random.default_rng(1).normal(size=(5, 3, 6)).astype(np.float32)
    token, state, h = np.empty((3, 6), np.float32), np.empty((1, 3, 6), np.float32), np.empty((3, 6), np.float32)
    token[...] = 0
    call = sru_rt.prepare(step, token, **params, **{letter: state}, out=(h, state))
    state[...] = 0
    found = []
    for one in x:
        token[...] = one
        assert np.shares_memory(call.run()[0], h)
        found.append(h.copy())
    wanted, last = forward(x, **params)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("B", [1, 4])
def test_a_window_of_tokens(B):
    params = sru_rt.qrnn_init(6, 6, window=3, rng=0)
    x = np.random.default_rng(1).normal(size=(3, B, 6)).astype(np.float32)
    runs_again(sru_rt.qrnn_step, {"x": x, "c": np.ones((1, B, 6), np.float32), "window": 3, **params})


def test_what_is_copied_for_the_kernels_is_copied_in_each_run():
    rng = np.random.default_rng(0)
    given = {
        "x": rng.normal(size=(5, 12, 3)).astype(np.float16).transpose(0, 2, 1)[..., ::2],  # (5, 3, 6), not contiguous
        "weight": rng.normal(size=(6, 6, 3, 1)).astype(np.float16).T,
        "bias": rng.normal(size=(1, 2, 6)).astype(np.float16),
        "v": np.asfortranarray(rng.normal(size=(1, 2, 6)).astype(np.float32)),
        "c0": rng.normal(size=(1, 3, 6)).astype(np.float16),
        "mask": rng.integers(0, 2, size=(5, 3)),
    }
    call = sru_rt.prepare(sru_rt.sru_forward, **given)
    halved(given)
    given["mask"][...] = 1 - given["mask"]
    same_bits(call.run(), sru_rt.sru_forward(**given))


def test_a_low_rank_weight_and_several_states():
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(1, 3, 6, 2)), rng.normal(size=(2, 6))
    x, c0 = rng.normal(size=(5, 3, 6)), rng.normal(size=(1, 3, 6))
    call = sru_rt.prepare(sru_rt.sru_forward, x, pair, c0=c0)
    halved({"x": x, "pair": pair, "c0": c0})
    same_bits(call.run(), sru_rt.sru_forward(x, pair, c0=c0))
    u, params = rng.normal(size=(5, 3, 1, 2, 6)), rng.normal(size=(1, 1, 6))
    states = (np.zeros((1, 3, 6), np.float64), None)
    call = sru_rt.prepare(two_states.recurrence, u, params, states)
    halved({"u": u})
    states[0][...] = 1
    same_bits(call.run(), two_states.recurrence(u, params, states))


@pytest.mark.parametrize("save", [True, 2, "x"])
def test_what_is_kept_is_that_of_the_last_run(save):
    rng = np.random.default_rng(0)
    params = sru_rt.sru_init(6, 6, rng=0)
    x = rng.normal(size=(5, 3, 6)).astype(np.float32)
    call = sru_rt.prepare(sru_rt.sru_forward, x, **params, save=save)
    x[...] = rng.normal(size=x.shape)
    h, _, saved = call.run()
    wanted_h, _, wanted = sru_rt.sru_forward(x, **params, save=save)
    same_bits((h,), (wanted_h,))
    found, wanted = sru_rt.sru_backward(saved, h), sru_rt.sru_backward(wanted, h)
    for name in ("x", "weight", "bias", "v"):
        assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes()


def test_results_go_where_out_says():
    u = np.ones((5, 3, 1, 2, 7), np.float32)
    h = np.zeros((5, 3, 7), np.float32)
    call = sru_rt.prepare(sru_rt.mingru_recurrence, u, out=(h, None))
    h[...] = 0
    call.run()
    same_bits((h,), (sru_rt.mingru_recurrence(u)[0],))


def test_calls_of_other_threads_are_not_recorded():
    u = np.ones((5, 3, 1, 2, 7), np.float32)
    inside, go_on = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        inside.set()
        assert go_on.wait(60)
        return sru_rt.mingru_recurrence(*args, **kwargs)

    made = []
    thread = threading.Thread(target=lambda: made.append(sru_rt.prepare(slow, u)))
    thread.start()
    assert inside.wait(60)
    sru_rt.mingru_recurrence(2 * u)
    go_on.set()
    thread.join()
    same_bits(made[0].results, sru_rt.mingru_recurrence(u))


@pytest.mark.parametrize(
    "function",
    [
        None,
        "sru_forward",
        len,
        lambda u: sru_rt.sru_init(3, 3),
        lambda u: (sru_rt.mingru_recurrence(u), sru_rt.mingru_recurrence(u)),
    ],
)
def test_what_cannot_be_prepared(function):
    with pytest.raises(ArgumentError, match=r"prepare: function must be "):
        sru_rt.prepare(function, np.ones((5, 3, 1, 2, 7), np.float32))


def test_errors_are_those_of_the_function():
    with pytest.raises(ShapeError, match=r"mingru_recurrence: u has 1 axes"):
        sru_rt.prepare(sru_rt.mingru_recurrence, np.ones(3, np.float32))
    u = np.ones((5, 3, 1, 2, 7), np.float32)
    with pytest.raises(LibraryError):
        sru_rt.prepare(sru_rt.mingru_recurrence, u.tolist())
    with pytest.raises(ArgumentError, match="save"):
        sru_rt.prepare(sru_rt.mingru_recurrence, u, save="nonsense")
    assert len(sru_rt.mingru_recurrence(u)) == 2  # nothing is left of it


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="arrays of NumPy or CuPy"):
        sru_rt.prepare(sru_rt.mingru_recurrence, torch.ones(5, 3, 1, 2, 7))
