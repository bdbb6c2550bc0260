"""Calls like one before that keep something for a backward, write to `out`, have lengths, or go backward."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

import sru_rt
from problems import CELLS, FULL, Problem
from sru_rt import check, repeat
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError
from test_repeat import remembered, two_states

POLICIES = [True, 3, "x"]


def flat(value):
    """The arrays in results and gradients, and in what is kept."""
    if isinstance(value, (tuple, list)):
        return [array for one in value for array in flat(one)]
    if isinstance(value, sru_rt.gradients.Gradients):
        return flat([getattr(value, name) for name in value])
    if isinstance(value, sru_rt.saved.Saved):
        o, p = value.operands, value.projection
        kept = [*o.arrays.values(), *o.c0, o.lengths, o.mask, o.reset, *value.states]
        return flat([*kept, *((p.x, *p.factors, p.lengths, p.mask, p.reset) if p else ())])
    return [] if value is None else [value]


def same_bits(one, other):
    for a, b in zip(flat(one), flat(other), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def copied(value):
    return [array.copy() for array in flat(value)]


@pytest.fixture
def ordinary(monkeypatch):
    """Counts the calls that are checked."""
    found = []
    made = check.Check.__init__

    def counted(self, *args, **names):
        found.append(args[0])
        made(self, *args, **names)

    monkeypatch.setattr(check.Check, "__init__", counted)
    return found


def halves(given):
    """Other values, in other places."""
    halved = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            halved[name] = tuple(halves({0: one})[0] for one in value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fV":
            halved[name] = (np.nan_to_num(value.astype(np.float64)) / 2).astype(value.dtype)
        else:
            halved[name] = value
    return halved


def first_and_again(call, *args, **given):
    """What a call gives as the first of its kind, and as one like one before."""
    repeat._repeats.clear()
    first = call(*args, **given)
    assert remembered() == 1
    again = call(*args, **given)
    assert remembered() == 1
    return first, again


@pytest.mark.parametrize("layout", ["plain", "all"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("save", POLICIES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_kept_is_that_of_an_ordinary_call(cell, dtype, save, layer, layout, backend, ordinary):
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (5, 3, 7), 2, layout, layer=layer, state=True)
    function, backward = problem.forward(layer), CELLS[cell].library("backward")
    earlier = []
    for given in (problem.given, halves(problem.given)):
        first, again = first_and_again(function, **given, save=save)
        same_bits(first, again)
        earlier.append((again, copied(again)))
        assert again[2].nbytes == first[2].nbytes and repr(again[2]) == repr(first[2])
        n = len(ordinary)
        function(**given, save=save)
        assert len(ordinary) == n, "it was not like one before"
    # Backward, from what was kept first and later, in each of which it goes the ordinary way and the short one.
    seeds, kept = problem.seeds, (first[2], again[2])
    found = [backward(saved, **seeds) for saved in kept]
    assert remembered() == 2 and len(ordinary) == n + 1
    repeat._repeats.clear()
    found += [backward(saved, **seeds) for saved in reversed(kept)]
    assert len(ordinary) == n + 2
    for one in found[1:]:
        same_bits(found[0], one)
        assert list(one) == list(found[0]) and repr(one) == repr(found[0])
    same_bits(backward(again[2], **halves(seeds)), backward(function(**given, save=save)[2], **halves(seeds)))
    for results, copies in earlier:
        same_bits(results, copies)  # each has memory of its own


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_each_need_is_a_backward_of_its_own(cell, layer, ordinary):
    problem = Problem.make(FULL[cell] | {"dtype": "float32"}, (5, 3, 7), 1, "plain", layer=layer, state=True)
    problem.arrays["bias"] = None
    saved = problem.forward(layer)(**problem.given, save=True)[2]
    backward, seeds = CELLS[cell].library("backward"), problem.seeds
    names = [name for name, array in problem.arrays.items() if array is not None]
    needs = [None, *names, tuple(names), names[::-1], set(names), frozenset(names[:1]), ()]
    found = [backward(saved, **seeds, need=need) for need in needs]
    n = len(ordinary)
    for need, one in zip(needs, found):
        again = backward(saved, **seeds, need=need)
        same_bits(one, again)
        assert list(again) == list(one)
        assert set(again) == set(problem.arrays if need is None else [need] if isinstance(need, str) else need)
    assert len(ordinary) == n
    assert found[0].bias is None and backward(saved, **seeds).bias is None
    with pytest.raises(AttributeError, match="was not asked for"):
        getattr(backward(saved, **seeds, need=names[0]), names[1])
    for bad in ("bias", "nonsense", 1, [["x"]], [None]):
        for _ in range(2):
            with pytest.raises(ArgumentError, match="need"):
                backward(saved, **seeds, need=bad)


@pytest.mark.parametrize("last", ["none", "own", "float32", "alone"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_seeds_of_each_dtype(dtype, last, ordinary):
    problem = Problem.make(FULL["sru"] | {"dtype": dtype}, (5, 3, 7), 1, "plain", state=True)
    saved = problem.forward()(**problem.given, save=True)[2]
    dh, dc_last = problem.dh, problem.dlast
    dc_last = {"none": None, "own": dc_last.astype(dtype)}.get(last, dc_last)
    for seed in [None] if last == "alone" else [dh, dh.astype(np.float64 if dtype == "float64" else np.float32)]:
        first = sru_rt.sru_backward(saved, seed, dc_last)
        n = len(ordinary)
        same_bits(first, sru_rt.sru_backward(saved, seed, dc_last))
        assert len(ordinary) == n


def test_what_differs_is_another_backward(ordinary):
    problem = Problem.make(FULL["sru"] | {"dtype": "float32"}, (5, 3, 8), 1, "plain", state=True)
    saved = problem.forward()(**problem.given, save=True)[2]
    dh, dlast = problem.dh, problem.dlast
    wanted = sru_rt.sru_backward(saved, dh, dlast)
    n = len(ordinary)
    for one in (np.asfortranarray(dh), dh.repeat(2, -1)[..., ::2], dh.astype(np.float64).astype(np.float32)[::1]):
        same_bits(wanted, sru_rt.sru_backward(saved, one, dlast))
    assert len(ordinary) == n + 2, "only an array of another order is another call"
    for bad, error in (
        ((dh[:4], dlast), ShapeError),
        ((dh, dlast[:, :2]), ShapeError),
        ((dh.astype(np.float64), dlast), DtypeError),
        ((dh.tolist(), dlast), LibraryError),
        ((None, None), ArgumentError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                sru_rt.sru_backward(saved, *bad)
    with pytest.raises(LibraryError):
        sru_rt.sru_backward("saved", dh)


def test_two_states_low_rank_and_states_of_which_one_is_given(ordinary):
    rng = np.random.default_rng(0)
    u, params = rng.normal(size=(5, 2, 1, 2, 3)), rng.normal(size=(1, 1, 3))
    one, other = rng.normal(size=(2, 1, 2, 3))
    for c0 in (None, (one, other), (None, other), [one, None]):
        first, again = first_and_again(two_states.recurrence, u, params, c0, save=2)
        same_bits(first, again)
        for seed in (None, (one, other), (None, other)):
            wanted = two_states.backward(first[2], first[0], seed)
            n = len(ordinary)
            same_bits(wanted, two_states.backward(again[2], first[0], seed))
            assert len(ordinary) == n
    x, pair = rng.normal(size=(5, 2, 4)), (rng.normal(size=(1, 2, 3, 2)), rng.normal(size=(2, 4)))
    first, again = first_and_again(two_states.forward, x, pair, params, save="x")
    same_bits(first, again)
    same_bits(two_states.backward(first[2], first[0]), two_states.backward(again[2], first[0]))
    swapped = two_states.recurrence(u, params, (other, one))
    same_bits(swapped, two_states.recurrence(u, params, (other.copy(), one.copy())))
    assert swapped[0].tobytes() != two_states.recurrence(u, params, (one, other))[0].tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# out


def results_for(h, last):
    return np.full_like(h, np.nan), np.full_like(last, np.nan)


@pytest.mark.parametrize("layout", ["plain", "all"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_results_go_where_out_says(cell, dtype, layer, layout, backend, ordinary):
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (5, 3, 7), 2, layout, layer=layer, state=True)
    function, given = problem.forward(layer), problem.given
    wanted = function(**given)
    outs = [results_for(*wanted) for _ in range(3)]
    for i, out in enumerate(outs):
        n = len(ordinary)
        found = function(**given, out=out)
        assert found[0] is out[0] and found[1] is out[1]
        assert len(ordinary) == n if i else len(ordinary) > n
        same_bits(found, wanted)
    h, last = results_for(*wanted)
    for out in ((h, None), [None, last], (None, None), None):
        for _ in range(2):
            same_bits(function(**given, out=out), wanted)
    same_bits((h, last), wanted)
    kept = [function(**given, out=out, save=2) for out in outs[:2]]
    same_bits(*kept)
    backward = CELLS[cell].library("backward")
    same_bits(*[backward(saved, **problem.seeds) for _, _, saved in kept])


@pytest.mark.parametrize("cell", CELLS)
def test_a_state_is_updated_in_place(cell, ordinary):
    params = getattr(sru_rt, f"{cell}_init")(6, 6, rng=0)
    step, state = getattr(sru_rt, f"{cell}_step"), CELLS[cell].state
    tokens = np.random.default_rng(1).normal(size=(5, 3, 6)).astype(np.float32)
    mine, wanted = np.zeros((1, 3, 6), np.float32), np.zeros((1, 3, 6), np.float32)
    h = np.empty((3, 6), np.float32)
    for i, token in enumerate(tokens):
        n = len(ordinary)
        found = step(token, **params, **{state: mine}, out=(h, mine))
        assert found[0] is h and found[1] is mine and (len(ordinary) > n) == (i == 0)
        again, wanted = step(token, **params, **{state: wanted})
        same_bits(found, (again, wanted))
    elsewhere = np.empty_like(mine)  # after calls in place
    same_bits(step(token, **params, **{state: mine}, out=(h, elsewhere)), step(token, **params, **{state: mine}))


def test_what_overlaps_is_refused_after_what_does_not():
    x, params = np.random.default_rng(0).normal(size=(5, 3, 6)).astype(np.float32), sru_rt.sru_init(6, 6, rng=0)
    memory = np.zeros(400, np.float32)
    h, c = memory[:90].reshape(5, 3, 6), memory[90:108].reshape(1, 3, 6)
    mask = np.zeros((5, 3), np.float32)
    given = {**params, "c0": np.zeros((1, 3, 6), np.float32), "mask": mask}
    wanted = [a.copy() for a in sru_rt.sru_forward(x, **given, out=(h, c))]
    part = memory[60:78].reshape(1, 3, 6)
    for x_, c0, out, message in (
        (h, given["c0"], (h, c), r"out\[0\] overlaps an input"),
        (memory[50:140].reshape(5, 3, 6), given["c0"], (h, c), r"out\[0\] overlaps an input"),
        (x, part, (h, c), r"out\[0\] overlaps an input"),
        (x, memory[100:118].reshape(1, 3, 6), (h, c), r"out\[1\] overlaps an input"),
        (x, given["c0"], (h, part), "out has overlapping arrays"),
        (x, part, (h, part), r"out\[0\] overlaps an input"),
        (x, given["c0"], (h, memory[72:90].reshape(1, 3, 6)), "out has overlapping arrays"),
    ):
        for _ in range(2):
            with pytest.raises(ArgumentError, match=message):
                sru_rt.sru_forward(x_, **(given | {"c0": c0}), out=out)
    same_bits(sru_rt.sru_forward(x, **given, out=(h, c)), wanted)
    # Next to each other is not over each other, and a mask that is converted may be written over.
    c[...] = 0
    same_bits(sru_rt.sru_forward(x, **(given | {"c0": c}), out=(h, c)), wanted)
    over = np.zeros((5, 3, 6), np.float32)
    for _ in range(2):
        over[...] = 0
        same_bits(
            sru_rt.sru_forward(x, **(given | {"mask": over.reshape(-1)[:15].reshape(5, 3)}), out=(over, c)), wanted
        )


def test_a_state_of_another_dtype_is_not_updated_in_place():
    u, memory = np.ones((5, 3, 1, 2, 8), np.float16), np.zeros(24, np.float32)
    h0, last = memory.view(np.float16)[:24].reshape(1, 3, 8), memory.reshape(1, 3, 8)
    sru_rt.mingru_recurrence(u, h0=h0.copy(), out=(None, last))
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"out\[1\] overlaps an input"):
            sru_rt.mingru_recurrence(u, h0=h0, out=(None, last))


def test_states_of_two_may_not_change_places():
    rng = np.random.default_rng(0)
    u, params = rng.normal(size=(5, 2, 1, 2, 3)), rng.normal(size=(1, 1, 3))
    states = [np.zeros((1, 2, 3)) for _ in range(2)]
    h = np.empty((5, 2, 3))
    wanted = two_states.recurrence(u, params, tuple(a.copy() for a in states))
    for _ in range(2):
        for state in states:
            state[...] = 0
        same_bits(two_states.recurrence(u, params, states, out=(h, states)), wanted)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"out\[1\]\[0\] overlaps an input"):
            two_states.recurrence(u, params, states, out=(h, states[::-1]))


def test_out_that_does_not_fit_is_refused_after_what_does():
    u = np.zeros((5, 3, 1, 2, 8), np.float32)
    h, last = np.empty((5, 3, 8), np.float32), np.empty((1, 3, 8), np.float32)
    sru_rt.mingru_recurrence(u, out=(h, last))
    locked = np.empty_like(h)
    locked.flags.writeable = False
    n = remembered()
    for bad, error in (
        ((h[:4], last), ShapeError),
        ((h, last[:, :2]), ShapeError),
        ((h.astype(np.float64), last), DtypeError),
        ((h.astype(h.dtype.newbyteorder()), last), ArgumentError),
        ((locked, last), ArgumentError),
        ((np.asfortranarray(h), last), ArgumentError),
        ((h.tolist(), last), LibraryError),
        ((h,), ArgumentError),
        ((h, last, last), ArgumentError),
        (h, ArgumentError),
    ):
        for _ in range(2):
            with pytest.raises(error, match="out"):
                sru_rt.mingru_recurrence(u, out=bad)
    assert remembered() == n
    with pytest.raises(TypeError):
        sru_rt.mingru_recurrence(u, None, None, None, u)  # an array too many


# ----------------------------------------------------------------------------------------------------------------------
# lengths, values and memory


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.uint64])
def test_lengths_of_each_dtype_are_looked_at(dtype, ordinary):
    u = np.ones((5, 3, 1, 2, 7), np.float32)
    first = sru_rt.mingru_recurrence(u, lengths=np.array([5, 0, 2], dtype), save=True)
    n = len(ordinary)
    lengths = np.array([1, 5, 3], dtype)
    again = sru_rt.mingru_recurrence(u, lengths=lengths, save=True)
    assert len(ordinary) == n
    lengths[...] = 0  # what was kept has a copy
    repeat._repeats.clear()
    same_bits(again, sru_rt.mingru_recurrence(u, lengths=[1, 5, 3], save=True))
    assert first[0].tobytes() != again[0].tobytes()
    sru_rt.mingru_recurrence(u, lengths=lengths)
    for bad in (6, -1 if np.dtype(dtype).kind == "i" else np.iinfo(dtype).max, np.iinfo(dtype).min or 255):
        lengths[1] = bad
        for _ in range(2):
            with pytest.raises(ArgumentError, match=f"lengths must be from 0 to L = 5 .got {bad} for sequence 1"):
                sru_rt.mingru_recurrence(u, lengths=lengths)


def test_no_sequences_and_no_steps():
    for L, B in ((5, 0), (0, 3), (0, 0)):
        u, lengths = np.ones((L, B, 1, 2, 7), np.float32), np.zeros(B, np.int64)
        out = np.empty((L, B, 7), np.float32), np.ones((1, B, 7), np.float32)
        found = [sru_rt.mingru_recurrence(u, lengths=lengths, save=True, out=out) for _ in range(2)]
        same_bits(*found)
        same_bits(*[sru_rt.mingru_backward(saved, h, last) for h, last, saved in found])


def test_the_sign_of_a_zero_counts():
    @sru_rt.cell(gates="a", state="c", constants="k")
    def scaled(a, c, k):
        return c + a, k * a

    u = np.ones((1, 1, 1, 1, 1), np.float32)
    assert [np.signbit(scaled.recurrence(u, k=k)[0]).item() for k in (0.0, -0.0, 0.0, -0.0)] == [0, 1, 0, 1]


def test_the_value_of_a_number_in_an_array_counts():
    u, x = np.ones((2, 1, 1, 3, 4), np.float32), np.ones((2, 1, 4), np.float32)
    for alpha in (1.0, 2.0, 3.0):
        found = sru_rt.sru_recurrence(u, x, alpha=np.array(alpha))
        same_bits(found, sru_rt.sru_recurrence(u, x, alpha=alpha))


def test_backwards_of_other_forwards_are_other_calls(ordinary):
    u = np.random.default_rng(0).normal(size=(5, 3, 1, 2, 7)).astype(np.float32)
    ways = [{"save": True}, {"save": 2}, {"save": True, "candidate": "positive"}, {"save": True, "mask": np.eye(5, 3)}]
    forwards = [sru_rt.mingru_recurrence(u, **way) for way in ways]
    wanted = [sru_rt.mingru_backward(saved, u[:, :, 0, 0]) for _, _, saved in forwards]  # of another order
    for (_, _, saved), one in zip(forwards, wanted):
        for _ in range(3):
            same_bits(one, sru_rt.mingru_backward(saved, u[:, :, 0, 0].copy()))


def test_a_backward_of_a_call_like_no_other_is_not_remembered():
    u = np.asfortranarray(np.ones((5, 3, 1, 2, 7), np.float32))
    h, _, saved = sru_rt.mingru_recurrence(u, save=True)
    assert saved.kind is None
    for _ in range(2):
        sru_rt.mingru_backward(saved, h)
    assert remembered() == 0


def test_settings_count_at_each_backward(monkeypatch):
    u = np.ones((5, 3, 1, 2, 7), np.float32)
    h, _, saved = sru_rt.mingru_recurrence(u, save=True)
    wanted = sru_rt.mingru_backward(saved, h)
    same_bits(wanted, sru_rt.mingru_backward(saved, h))  # which is planned now
    monkeypatch.setenv("SRU_RT_CPU", "nonsense")
    with pytest.raises(ArgumentError, match="SRU_RT_CPU"):
        sru_rt.mingru_backward(saved, h)
    monkeypatch.delenv("SRU_RT_CPU")
    same_bits(wanted, sru_rt.mingru_backward(saved, h))


@pytest.mark.parametrize("save", POLICIES)
def test_no_array_is_held(save):
    """What is remembered has none of the arrays of the calls, neither of the first nor of those like it."""

    references = []

    def new(shape, value=0.5, dtype=np.float32):
        array = np.full(shape, value, dtype)  # which views of it refer to
        references.append(weakref.ref(array))
        return array

    for _ in range(3):
        given = {"x": new((5, 3, 6)), "weight": new((1, 3, 6, 6)), "bias": new((1, 2, 6)), "v": new((1, 2, 6))}
        given |= {"c0": new((1, 3, 6)), "lengths": new(3, 2, np.int64), "mask": new((5, 3), False, bool)}
        out = new((5, 3, 6)), new((1, 3, 6))
        h, c, saved = sru_rt.sru_forward(**given, save=save, out=out)
        sru_rt.sru_backward(saved, h, c)
    assert remembered() == 2
    assert all(reference() is not None for reference in references[-9:])
    del given, out, h, c, saved
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


def test_many_backwards_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr(repeat, "_MOST", 3)
    for L in range(1, 9):
        h, _, saved = sru_rt.mingru_recurrence(np.zeros((L, 1, 1, 2, 2), np.float32), save=True)
        sru_rt.mingru_backward(saved, h)
        assert remembered() <= 3


def test_threads_have_results_of_their_own():
    rng = np.random.default_rng(0)
    params = sru_rt.sru_init(6, 6, rng=0)
    xs = rng.normal(size=(4, 5, 3, 6)).astype(np.float32)

    def trained(x, out):
        h, c, saved = sru_rt.sru_forward(x, **params, save=2, out=out)
        return copied((h, c, sru_rt.sru_backward(saved, h, c)))

    wanted = [trained(x, None) for x in xs]
    failures = []

    def often(i):
        out = np.empty((5, 3, 6), np.float32), np.empty((1, 3, 6), np.float32)
        for _ in range(50):
            try:
                same_bits(trained(xs[i], out), wanted[i])
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=often, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_on_a_gpu(cell, layer, place, ordinary):
    problem = Problem.make(FULL[cell] | {"dtype": "float16"}, (5, 3, 8), 1, "all", layer=layer, state=True)
    given, seeds = place.put(problem.given), place.put(problem.seeds)
    function, backward = problem.forward(layer), CELLS[cell].library("backward")
    wanted, found = [], []
    for results in (wanted, found):
        n = len(ordinary)
        h, last, saved = function(**given, save=2)
        out = tuple(place.xp.empty(array.shape, array.dtype) for array in (h, last))
        results += [h, last, *function(**given, out=out), *flat(backward(saved, **seeds))]
    assert len(ordinary) == n
    same_bits(place.get(tuple(wanted)), place.get(tuple(found)))
    with pytest.raises(ArgumentError, match=r"out\[0\] overlaps an input"):
        function(**given, out=(given["u" if not layer else "x"].reshape(-1)[: h.size].reshape(h.shape), None))


def test_an_array_of_another_order_on_a_gpu(place, ordinary):
    u = np.arange(5 * 4 * 16).reshape(5, 4, 1, 2, 8).astype(np.float32) / 400
    on_gpu, every_other = place.put(u), place.put(u.repeat(2, 1))[:, ::2]
    wanted = sru_rt.mingru_recurrence(on_gpu)
    for _ in range(2):
        n = len(ordinary)
        same_bits(place.get(wanted), place.get(sru_rt.mingru_recurrence(every_other)))
        assert len(ordinary) > n


def test_lengths_with_arrays_on_a_gpu(place, monkeypatch, ordinary):
    u = place.put(np.ones((5, 3, 1, 2, 8), np.float32))
    for lengths in (np.array([5, 0, 2]), place.put(np.array([5, 0, 2]))):
        first = sru_rt.mingru_recurrence(u, lengths=lengths)
        n = len(ordinary)
        same_bits(place.get(first), place.get(sru_rt.mingru_recurrence(u, lengths=lengths)))
        assert len(ordinary) == n
    beyond = np.array([5, 0, 6])
    with pytest.raises(ArgumentError, match="lengths"):
        sru_rt.mingru_recurrence(u, lengths=beyond)
    n = len(ordinary)
    sru_rt.mingru_recurrence(u, lengths=place.put(beyond))  # which waits for nothing, and so looks at no values
    assert len(ordinary) == n
    monkeypatch.setenv("SRU_RT_DEBUG", "1")
    with pytest.raises(ArgumentError, match="lengths"):
        sru_rt.mingru_recurrence(u, lengths=place.put(beyond))
