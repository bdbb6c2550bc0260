"""Kernels that are parallel over time: against the oracle, against the sequential kernels, and against themselves.

Of forwards whose chunks guess the state that they begin with, test_shooting.py has more.

Every test runs under the emulation, and on a GPU (see gpu_places.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sru_rt
import test_own_cells as own
import tolerance
from gpu_places import Place, Result, Way, judge, random_problem, run, same
from problems import DTYPES, LAYOUTS, Problem
from sru_rt import chunks, launch_gpu, library, recurrence
from sru_rt.cell import Array, Cell
from sru_rt.dtypes import to_numpy
from sru_rt.recurrence import Operands
from test_gpu_kernels import GPU_STRENGTH, covering_rows, title

pytestmark = pytest.mark.kernels

PLAIN = {
    "cell": "sru",
    "kind": "x",
    "activation": "identity",
    "reset_on": "previous",
    "bias": True,
    "v": "none",
    "dropout": False,
}
# Affine or not, adjoints that need the states or do not, gates or inputs or values of a sequence that do not matter.
CELLS: dict[str, dict[str, Any]] = {
    "no_v": PLAIN,
    "no_v_tanh": PLAIN | {"activation": "tanh", "kind": "no_skip"},
    "v": PLAIN | {"v": "params"},
    "v_basic": PLAIN | {"v": "params", "kind": "basic", "reset_on": "current"},
    "v_per_step": PLAIN | {"v": "inputs", "dropout": True},
    "dropout": PLAIN | {"dropout": True, "kind": "projected", "bias": False, "activation": "relu"},
    "qrnn": {"cell": "qrnn", "form": "ifo-x", "bias": True, "zoneout": "numbers"},
    "mingru": {"cell": "mingru", "candidate": "identity", "bias": True},
    "minlstm": {"cell": "minlstm", "candidate": "positive", "bias": True},
}
AFFINE = ("no_v", "no_v_tanh", "dropout", "qrnn", "mingru", "minlstm")

MATRIX: dict[str, tuple[Any, ...]] = {
    "cell": tuple(CELLS),
    "dtype": tuple(DTYPES),
    "D": (1, 2),
    "layout": tuple(LAYOUTS),
    "size": ((21, 3, 7), (8, 5, 3), (13, 2, 34), (6, 19, 8)),
    "chunk": (1, 3, 5, 8, 64),
    "save": (True, 4, "x", 7),
    "plan": ("", "width=1,depth=1,threads=32", "width=2,depth=4,threads=32"),
    "own_batch": (True, False),
    "shared": (True, False),
    "lookahead": (1, 0),
}
# What decides which steps a thread passes, and where it finds states and rows.
TOGETHER = ("chunk", "save"), ("chunk", "D", "layout"), ("shared", "lookahead", "save")

# Less than a lap of the ring and more, pairs of channels, states recomputed in shared memory and in scratch, sums over
# more rows than `sum_up` has threads: for tools that slow kernels down, in the manner of gpu_places.SMALL. Those whose
# names begin with "chunks" go through three kernels.
CHUNKED: dict[str, tuple[dict[str, Any], tuple[int, int, int], int, str, Way]] = {
    "chunks": (
        CELLS["no_v"] | {"dtype": "float32"},
        (9, 5, 7),
        2,
        "all",
        Way("threads=32,depth=4,chunk=2,lookahead=0"),
    ),
    "looking_ahead": (CELLS["no_v"] | {"dtype": "float32"}, (9, 5, 7), 2, "all", Way("threads=32,depth=4,chunk=2")),
    "chunks_recomputed": (
        CELLS["v"] | {"dtype": "float16"},
        (7, 2, 33),
        2,
        "all",
        Way("threads=32,depth=4,chunk=3,lookahead=0", save=2),
    ),
    "looking_ahead_recomputed": (
        CELLS["v"] | {"dtype": "float16"},
        (7, 2, 33),
        2,
        "all",
        Way("threads=32,depth=4,chunk=3,warm_up=1", save=2),
    ),
    "chunks_that_guess": (
        CELLS["v_basic"] | {"dtype": "bfloat16"},
        (11, 2, 34),
        2,
        "all",
        Way("threads=32,width=2,depth=4,chunk=3,warm_up=2"),
    ),
    "chunks_of_pairs": (
        CELLS["no_v_tanh"] | {"dtype": "bfloat16"},
        (8, 3, 34),
        1,
        "lengths",
        Way("threads=32,width=2,depth=4,chunk=3,lookahead=0", own_batch=False, shared=False, save=4),
    ),
    "looking_ahead_in_pairs": (
        CELLS["no_v_tanh"] | {"dtype": "bfloat16"},
        (8, 3, 34),
        1,
        "lengths",
        Way("threads=64,width=2,depth=4,chunk=3"),
    ),
}


def in_chunks(way: Way, chunk: int) -> Way:
    """With guesses of two steps, most of which are wrong, where chunks guess."""
    return replace(way, plan=",".join(filter(None, (way.plan, f"chunk={chunk},warm_up=2"))))


def kernels() -> list[int]:
    """How many kernels each launch that is remembered has: sweeps and sums."""
    return sorted(len(launch.kernels) for launch in launch_gpu._launches.values())


# ----------------------------------------------------------------------------------------------------------------------
# The matrix


def groups(strength: int) -> list[tuple[str, ...]]:
    return [*itertools.combinations(MATRIX, strength), *TOGETHER]


CASES = [
    *(pytest.param("emulated", row, id=f"emulated-{title(row)}") for row in covering_rows(MATRIX, groups(2))),
    *(
        pytest.param("gpu", row, id=f"gpu-{title(row)}", marks=pytest.mark.gpu)
        for row in covering_rows(MATRIX, groups(GPU_STRENGTH))
    ),
]


@pytest.mark.parametrize("place, row", CASES, indirect=["place"])
def test_recurrence_matches_oracle(place, row, monkeypatch):
    L, B, d = row["size"]
    d += d % 2 if "width=2" in row["plan"] else 0
    problem = Problem.make(CELLS[row["cell"]] | {"dtype": row["dtype"]}, (L, B, d), row["D"], row["layout"])
    plan = ",".join(filter(None, (row["plan"], f"lookahead={row['lookahead']}")))
    in_chunks(Way(plan, row["own_batch"], row["shared"]), row["chunk"]).go(monkeypatch)
    judge(problem, run(place, problem, save=row["save"], time_parallel=True))
    composed = 3 - row["lookahead"]
    forward, backward = (composed if row["cell"] in AFFINE else 3, composed) if row["chunk"] < L else (1, 1)
    sums = 1 if CELLS[row["cell"]]["bias"] or CELLS[row["cell"]].get("v") == "params" else 0
    assert kernels() == sorted((forward, backward + sums))


@pytest.mark.parametrize("name", CHUNKED)
def test_small(place, name, monkeypatch):
    options, size, D, layout, way = CHUNKED[name]
    problem = Problem.make(options, size, D, layout)
    way.go(monkeypatch)
    with place.without_pool():
        judge(problem, run(place, problem, save=way.save, time_parallel=True))


@pytest.mark.parametrize("save", [True, 4])
@pytest.mark.parametrize("cell", ["no_v", "v"])
def test_ends_and_boundaries_at_and_in_chunks(place, cell, save, monkeypatch):
    """Sequences that end before, at and in chunks; boundaries at their first and last steps, and beyond an end."""
    L, chunk = 17, 5
    lengths = np.array([0, 1, 4, 5, 6, 10, 15, 16, 17])
    B = len(lengths)
    reset, mask = np.zeros((L, B), bool), np.zeros((L, B), bool)
    for b in range(B):
        reset[[b % 3, 4, 5, 6, 9 + b % 3, 15][:: 1 + b % 2], b] = True
        mask[[b, (2 * b) % L], b] = True
    monkeypatch.setenv("SRU_RT_PLAN", f"chunk={chunk}")
    for layout in ({"lengths": lengths}, {"reset": reset}, {"lengths": lengths, "reset": reset, "mask": mask}):
        problem = random_problem("float32", L, B, 2, 6)
        if cell == "no_v":
            problem.arrays["v"] = None
        padded = np.arange(L)[:, None] >= layout.get("lengths", np.full(B, L))
        problem = replace(problem, options=layout, padded=padded | layout.get("mask", False))
        judge(problem, run(place, problem, save=save, time_parallel=True))


# ----------------------------------------------------------------------------------------------------------------------
# Against the sequential kernels


def apart(name: str, got: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    """1e-6 of the largest, the promise of the docs; in 16 bits one rounding more."""
    bound = 1e-6 + (2 * tolerance.EPS[dtype] if dtype in ("float16", "bfloat16") else 0)
    tolerance.check(name, got, np.asarray(wanted, np.float64), bound)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_cells_are_as_good_as_sequential(place, dtype, chunk, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", f"chunk={chunk}")
    problem = random_problem(dtype, 150, 2, 2, 6)
    problem.arrays["v"] = None
    wanted = run(place, problem, time_parallel=False)
    got = run(place, problem, time_parallel=True)
    apart("h", got.h, wanted.h, dtype)
    apart("c_last", got.last, wanted.last, "float32")
    for name in ("u", "x", "bias", "c0"):
        apart(f"d{name}", got.gradients[name], wanted.gradients[name], wanted.gradients[name].dtype.name)


def test_sequential_and_automatic(place, monkeypatch):
    """What is not cut runs through the sequential kernels: nothing is rounded otherwise."""
    problem = random_problem("float32", 1200, 2, 2, 5)
    problem.arrays["v"] = None
    results = {how: run(place, problem, time_parallel=how) for how in (False, "auto", True)}
    assert kernels() == [1, 2, 2, 3]
    same({how: results[how] for how in ("auto", True)})
    assert results[True].bits()["h"] != results[False].bits()["h"]
    short = random_problem("float32", 200, 2, 2, 5)
    short.arrays["v"] = None
    same({how: run(place, short, time_parallel=how) for how in (False, "auto")})
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=1200")
    same({"one chunk": run(place, problem, time_parallel=True), "False": results[False]})


# ----------------------------------------------------------------------------------------------------------------------
# The same bits

WAYS = (
    Way(),
    Way("width=1,depth=1,threads=32", save=1),
    Way("width=2,depth=2,threads=32", save=5),
    Way("width=2,depth=16,threads=64", save=4),
    Way("width=1,depth=4,threads=96", own_batch=False, save=3),
    Way("width=2,depth=8,threads=32", own_batch=False, shared=False, save=7),
    Way("width=1,depth=32,threads=256", own_batch=False, shared=False, save=100),
)
BITS = {
    "no_v": ("float32", 2, "all"),
    "v": ("bfloat16", 1, "all"),
    "v_per_step": ("float16", 2, "mask"),
    "no_v_tanh": ("float64", 1, "reset"),
}


@pytest.mark.slow
@pytest.mark.parametrize("cell", BITS)
def test_every_plan_and_memory_policy_gives_the_same_bits(place, cell, monkeypatch):
    """Chunks of 6 steps, in which pieces begin at their start or not, and longer pieces than chunks."""
    dtype, D, layout = BITS[cell]
    problem, results = Problem.make(CELLS[cell] | {"dtype": dtype}, (23, 3, 34), D, layout), {}
    for way in WAYS:
        in_chunks(way, 6).go(monkeypatch)
        results[way] = run(place, problem, save=way.save, time_parallel=True)
    judge(problem, results[WAYS[0]])
    same(results)


@pytest.mark.parametrize("cell", ["no_v", "v"])
def test_every_run_gives_the_same_bits(place, cell, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "threads=32,chunk=4,warm_up=1")
    for save in (True, 3):
        problem, results = Problem.make(CELLS[cell] | {"dtype": "float32"}, (9, 9, 40), 2, "all"), {}
        for order in range(5):
            monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
            results[order] = run(place, problem, save=save, time_parallel=True)
        same(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_does_not_change_the_result(place, dtype, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=4")
    problem = Problem.make(CELLS["no_v"] | {"dtype": dtype}, (11, 3, 9), 2, "all")
    given, results = place.put({**problem.arrays, **problem.options}), {}
    for save in (False, True, 3, 9):
        h, c_last, *_ = sru_rt.sru_recurrence(**given, save=save, time_parallel=True)
        results[save] = Result(*place.get((h, c_last)), {})
    same(results)


@pytest.mark.parametrize("save", [True, "x"])
def test_layer(place, save, monkeypatch):
    """Where U is dropped, what was decided of the forward is still known."""
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=4")
    problem = Problem.make(CELLS["no_v"] | {"dtype": "float32"}, (11, 3, 9), 2, "all", layer=True)
    judge(problem, run(place, problem, save=save, layer=True, time_parallel=True), layer=True)


def test_the_backward_goes_by_what_the_forward_kept(place, monkeypatch):
    """Even if chunks have another length by then, or there are none: results differ in rounding alone."""
    problem = random_problem("float32", 23, 2, 2, 6)
    problem.arrays["v"] = None
    given, results = place.put(problem.given), []
    for text in ("chunk=6", "chunk=5", "chunk=23"):
        monkeypatch.setenv("SRU_RT_PLAN", "chunk=6")
        h, c_last, saved = sru_rt.sru_recurrence(**given, save=4, time_parallel=True)
        monkeypatch.setenv("SRU_RT_PLAN", text)
        gradients = sru_rt.sru_backward(saved, *place.put((problem.dh, problem.dlast)))
        results.append(Result(*place.get((h, c_last)), place.get({n: getattr(gradients, n) for n in gradients})))
        judge(problem, results[-1])
    for name, gradient in results[0].gradients.items():
        for other in results[1:]:
            if gradient is not None:
                apart(f"d{name}", other.gradients[name], gradient, "float32")


@pytest.mark.parametrize("save", [True, 3])
def test_what_stands_in_padding_does_not_matter(place, save, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=3")
    results = {}
    for what in (0.0, np.nan, np.inf, 1.0):
        problem = Problem.make(CELLS["no_v_tanh"] | {"dtype": "float32"}, (11, 4, 6), 2, "all")
        for array in (problem.arrays["u"], problem.dh):
            array[problem.padded] = what
        results[what] = run(place, problem, save=save, time_parallel=True)
    same(results)


def test_initial_states_and_last_gradients_are_zeros_by_default(place, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=3")
    problem = random_problem("float32", 8, 3, 2, 9)
    problem.arrays["v"] = None
    zeros = np.zeros_like(problem.arrays["c0"])
    results = {}
    for name, c0, dc_last in (("zeros", zeros, zeros), ("None", None, None)):
        given = replace(problem, arrays=problem.arrays | {"c0": c0}, dlast=dc_last)
        result = run(place, given, time_parallel=True)
        results[name] = replace(result, gradients={n: g for n, g in result.gradients.items() if n != "c0"})
    same(results)


@pytest.mark.parametrize("order", range(4))
def test_the_state_may_be_updated_in_place(place, order, monkeypatch):
    """Whichever chunk is first done."""
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=3")
    monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
    problem = random_problem("float32", 11, 2, 2, 40)
    problem.arrays["v"] = None
    given = place.put(problem.arrays)
    h, c_last = place.get(sru_rt.sru_recurrence(**given, time_parallel=True))
    for save in (False, 4):
        given = place.put(problem.arrays)
        got = sru_rt.sru_recurrence(**given, time_parallel=True, save=save, out=(None, given["c0"]))
        assert got[1].data.ptr == given["c0"].data.ptr
        assert place.get(got[0]).tobytes() == h.tobytes() and place.get(got[1]).tobytes() == c_last.tobytes()


def test_a_new_length_neither_plans_nor_compiles(place, monkeypatch):
    """Nor does another length of chunks."""
    problem = random_problem("float32", 20, 2, 1, 7)
    problem.arrays["v"] = None
    monkeypatch.setattr(chunks, "_SHORTEST", 8)
    run(place, problem, time_parallel=True)
    monkeypatch.setattr(launch_gpu, "_prepare", lambda *_: pytest.fail("planned again"))
    for L, shortest in ((20, 8), (21, 8), (40, 8), (40, 16), (9, 2)):
        monkeypatch.setattr(chunks, "_SHORTEST", shortest)
        other = random_problem("float32", L, 2, 1, 7)
        other.arrays["v"] = None
        judge(other, run(place, other, time_parallel=True))


# ----------------------------------------------------------------------------------------------------------------------
# Cells of one's own: two states, values of a sequence with gradients, constants


def at_place(place: Place, given: Operands, **more: Any) -> Operands:
    """Operands of NumPy, moved to a place."""
    arrays = place.put(dict(given.arrays))
    more |= {name: place.put(getattr(given, name)) for name in ("lengths", "mask", "reset")}
    where = library.of(next(iter(arrays.values())))
    assert where is not None
    return replace(
        given, arrays=arrays, c0=list(place.put(tuple(given.c0))), library=where, time_parallel=True, chunk=None, **more
    )


def both(
    place: Place, given: Operands, every: int, dh: np.ndarray, dc_last: Any, need: Any = None
) -> dict[str, np.ndarray]:
    """Everything that forward and backward give, by name, on the host."""
    h, last, saved = recurrence.forward(given, every)
    found, dc0 = recurrence.backward(
        given, saved, every, place.put(dh), list(place.put(tuple(dc_last))), given.arrays if need is None else need
    )
    initial = [a.name for a in given.cell.arrays if a.kind == "state"]
    results = {"h": h} | {f"last{i}": a for i, a in enumerate(last)}
    results |= {f"d{n}": a for n, a in [*found.items(), *zip(initial, dc0)]}
    return {name: place.get(a) for name, a in results.items()}


EXAMPLES = ("lstm", "mixed", "oscillator", "leaky")


def of_example(place: Place, name: str, dtype: str, every: int, need: Any = None) -> dict[str, np.ndarray]:
    problem = own.make(name, 2, True)
    given = at_place(place, own.operands(problem, dtype))
    dh = problem.dh.astype(to_numpy(dtype))
    dh[~problem.live] = np.nan
    return both(place, given, every, dh, [a.astype(given.accumulator) for a in problem.dc_last], need)


@pytest.mark.parametrize("dtype, chunk", [("float32", 1), ("float32", 3), ("float16", 2), ("float64", 2)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_own_cell_matches_plain_loop(place, name, dtype, chunk, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", f"chunk={chunk}")
    h, c_last, gradients = own.wanted(name, 2, True)
    results = {every: of_example(place, name, dtype, every) for every in (1, 2, 3)}
    for every, got in results.items():
        tolerance.check("h", got["h"], h, tolerance.STEP[dtype])
        for i, last in enumerate(c_last):
            tolerance.check(f"last {i}", got[f"last{i}"], last, tolerance.STEP[got[f"last{i}"].dtype.name])
        for array, wanted in gradients.items():
            gradient = got[f"d{array}"]
            bound = (tolerance.STEP if gradient.ndim > 3 else tolerance.SUM)[gradient.dtype.name]
            tolerance.check(f"d{array}", gradient, wanted, max(bound, 1e-9))
        assert all(got[n].tobytes() == a.tobytes() for n, a in results[1].items()), every


def test_only_what_is_needed(place, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=2")
    everything = of_example(place, "mixed", "float32", 1)
    for need in ([], ["tuning"], ["m", "slope"], ["room"], ["u"], ["x", "room", "b"]):
        got = of_example(place, "mixed", "float32", 1, need)
        assert {f"d{name}" for name in need} <= set(got)
        assert all(array.tobytes() == everything[name].tobytes() for name, array in got.items()), need


# ----------------------------------------------------------------------------------------------------------------------
# Products of Jacobians that overflow


def grow(g, u, c):
    c = g * c + u
    return c, c


def grow_two(g, u, c, e):
    c = g * c + e
    e = 0.5 * e + u
    return c, e, c - e


GROWING = {
    1: Cell("grow", grow, (Array("u", "gates", ("g", "u")), *own.states("c"))),
    2: Cell("grow_two", grow_two, (Array("u", "gates", ("g", "u")), *own.states("c", "e"))),
}


def growing(n_states: int, dtype: str) -> tuple[Operands, np.ndarray, list[np.ndarray]]:
    """States stay 0 until 12 steps before the end, adjoints after the first 12, while 4**80 is beyond float32.

    So it is in every other channel: those beside them forget.
    """
    L, B, D, d = 200, 2, 2, 6
    rng = np.random.default_rng(4)
    u, dh = np.zeros((L, B, D, 2, d), dtype), np.zeros((L, B, D, d), dtype)
    u[..., 0, :] = np.where(np.arange(d) % 2, 0.5, 4)
    for q, (late, early) in enumerate(((slice(-12, None), slice(12)), (slice(12), slice(-12, None)))):
        u[late, :, q, 1] = rng.normal(size=(12, B, d))
        dh[early, :, q] = rng.normal(size=(12, B, d))
    u[:, :, :, 1, 1::2], dh[..., 1::2] = rng.normal(size=(L, B, D, 3)), rng.normal(size=(L, B, D, 3))
    state = np.float64 if dtype == "float64" else np.float32
    zeros = [np.zeros((D, B, d), state) for _ in range(n_states)]
    return Operands(GROWING[n_states], dtype, {"u": u}, zeros), dh, zeros


@pytest.mark.parametrize("every", [1, 3, 90])
@pytest.mark.parametrize("n_states", GROWING)
def test_results_are_finite_where_those_of_the_sequential_kernels_are(place, n_states, every, monkeypatch):
    given, dh, dc_last = growing(n_states, "float32")
    results = {}
    for chunk, width in itertools.product((80, 200), (1, 2)):
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk={chunk},width={width},threads=32")
        results[chunk, width] = both(place, at_place(place, given), every, dh, dc_last)
        assert kernels()[-1] == (2 if chunk == 80 else 1)
        launch_gpu._launches.clear()
    sequential, parallel = results[200, 1], results[80, 1]
    for name, wanted in sequential.items():
        assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0, name
        # Channels that grow are taken step by step, so that they are the same to the last bit.
        assert parallel[name][..., ::2].tobytes() == wanted[..., ::2].tobytes(), name
        apart(name, parallel[name], wanted, "float32")
        assert all(
            result[name].tobytes() == results[chunk, 1][name].tobytes() for (chunk, _), result in results.items()
        )


def test_summaries_do_overflow_there(place, monkeypatch):
    """Otherwise the test above would show nothing."""
    given, dh, dc_last = growing(1, "float32")
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=80")
    carries = []
    original = recurrence._carry

    def carry(operands: Operands, chunk: int, forward: bool) -> Any:
        carries.append(original(operands, chunk, forward))
        return carries[-1]

    monkeypatch.setattr(recurrence, "_carry", carry)
    both(place, at_place(place, given), 1, dh, dc_last)
    assert len(carries) == 2
    for scratch in carries:
        b, A, state = np.moveaxis(place.get(scratch)[: 3 * 72].reshape(3, 3, 2, 2, 6)[:2], 1, 0)
        assert np.isfinite(b[..., 1::2]).all() and np.isfinite(state).all()
        assert np.isinf(A[..., ::2]).any() and np.isfinite(A[..., 1::2]).all()


def test_what_is_not_finite_is_so_in_the_same_places(place, monkeypatch):
    """A NaN or an infinity in one step goes as far as in the sequential kernels: to a boundary, or to the end."""
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=4")
    problem = random_problem("float32", 22, 2, 2, 4)
    problem.arrays["v"] = None
    problem.arrays["u"][6, 0, :, 0, 1], problem.arrays["u"][9, 1, :, 0, 2] = np.nan, np.inf
    reset = np.zeros((22, 2), bool)
    reset[[3, 13]] = True
    problem = replace(problem, options={"reset": reset})
    results: Mapping[bool, Result] = {how: run(place, problem, time_parallel=how) for how in (False, True)}
    for name in ("h", "last", "u", "x", "bias", "c0"):
        sequential, parallel = (getattr(results[how], name) for how in (False, True))
        assert np.array_equal(np.isnan(sequential), np.isnan(parallel)), name
        finite = np.isfinite(sequential)
        assert np.array_equal(finite, np.isfinite(parallel)) and finite.any(), name
        assert not finite.all() or name not in ("h", "u"), name
        apart(name, np.where(finite, parallel, 0), np.where(finite, sequential, 0), "float32")
