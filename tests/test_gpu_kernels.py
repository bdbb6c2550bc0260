"""The GPU's kernels against the float64 oracle, and against themselves: under the emulation, and on a GPU.

Every test runs in both places (see gpu_places.py): those of a GPU carry the marker `gpu`, and are skipped without one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sru_rt
import tolerance
from gpu_places import (
    SMALL,
    Place,
    Result,
    Way,
    judge,
    random_problem,
    run,
    same,
    small_problem,
    unchanged,
    why_no_gpu,
)
from problems import CELLS, DTYPES, FULL, LAYER_ROWS, LAYOUTS, Problem, name_of
from sru_rt import launch_gpu
from sru_rt.calls import Call

pytestmark = pytest.mark.kernels

# ----------------------------------------------------------------------------------------------------------------------
# The matrix

# Beside the options of a cell: what the sizes are, and how the planner might have a recurrence of these sizes run.
# More sequences than sum_partials has rows of threads, more channels than a block has. Not one channel alone, which
# has a test of its own: if an array is one number, the small difference of large ones, its relative error says nothing.
WAYS_AND_SIZES: dict[str, tuple[Any, ...]] = {
    "D": (1, 2),
    "layout": tuple(LAYOUTS),
    "size": ((5, 3, 7), (1, 5, 3), (9, 1, 33), (4, 5, 16), (13, 3, 70), (6, 19, 8)),
    "save": (True, 3, "x", 50),
    "plan": (
        "",
        "width=1,depth=1,threads=32",
        "width=1,depth=8,threads=64",
        "width=2,depth=2,threads=32",
        "width=2,depth=4,threads=96",
    ),
    "own_batch": (True, False),
    "shared": (True, False),
}
# Sizes and plans have little to do with the cell: SRU tries them all, the others some.
FEWER = WAYS_AND_SIZES | {
    "size": ((5, 3, 7), (1, 5, 3), (13, 3, 70), (6, 19, 8)),
    "plan": ("", "width=1,depth=8,threads=64", "width=2,depth=2,threads=32"),
}
MATRIX = {
    name: {"cell": (name,)} | cell.factors | (WAYS_AND_SIZES if name == "sru" else FEWER)
    for name, cell in CELLS.items()
}

# What decides which steps a kernel passes, and where it finds states: combined in full for one cell.
TOGETHER = {"sru": [("D", "layout", "save")]}


@functools.cache
def covering(cell: str, strength: int) -> list[dict[str, Any]]:
    """Rows of the matrix of a cell, in which the values of TOGETHER meet as well."""
    return covering_rows(MATRIX[cell], groups_of(cell, strength))


def covering_rows(matrix: Mapping[str, Sequence[Any]], groups: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Rows in which the factors of each group take every combination of values. Greedy, but always the same."""
    missing = {
        tuple(zip(group, values)): None  # in order, unlike a set
        for group in groups
        for values in itertools.product(*(matrix[name] for name in group))
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in matrix:
            if name not in row:
                with_it = [group for group in groups if name in group and row.keys() | {name} >= set(group)]
                row[name] = max(matrix[name], key=lambda value: _gain(row | {name: value}, with_it, missing))
        for group in groups:
            missing.pop(tuple((name, row[name]) for name in group), None)
        rows.append({name: row[name] for name in matrix})
    return rows


def groups_of(cell: str, strength: int) -> list[tuple[str, ...]]:
    factors = [name for name in MATRIX[cell] if name != "cell"]
    return [*itertools.combinations(factors, strength), *TOGETHER.get(cell, ())]


def _gain(row: Mapping[str, Any], groups: Sequence[Sequence[str]], missing: Mapping[Any, None]) -> int:
    """How many combinations of these groups a row has that are missing."""
    return sum(tuple((name, row[name]) for name in group) in missing for group in groups)


def problem_of(row: Mapping[str, Any]) -> tuple[Problem, Way]:
    L, B, d = row["size"]
    d += d % 2 if "width=2" in row["plan"] else 0
    options = {name: value for name, value in row.items() if name not in WAYS_AND_SIZES}
    problem = Problem.make(options, (L, B, d), row["D"], row["layout"])
    return problem, Way(row["plan"], row["own_batch"], row["shared"], row["save"])


def title(row: Any) -> str:
    return name_of(row).replace(", ", "x") if isinstance(row, dict) else str(row)


# How many options meet on a GPU; where there is none, as many as under the emulation, as looking for them takes long.
GPU_STRENGTH = 2 if why_no_gpu() else 3
MATRIX_CASES = [
    pytest.param(place, row, id=f"{place}-{title(row)}", marks=marks)
    for place, strength, marks in (("emulated", 2, ()), ("gpu", GPU_STRENGTH, pytest.mark.gpu))
    for cell in CELLS
    for row in covering(cell, strength)
]


@pytest.mark.parametrize("place, row", MATRIX_CASES, indirect=["place"])
def test_recurrence_matches_oracle(place, row, monkeypatch):
    problem, way = problem_of(row)
    way.go(monkeypatch)
    judge(problem, run(place, problem, save=way.save))


@pytest.mark.parametrize("cell", CELLS)
def test_the_matrix_covers_all_pairs(cell):
    rows = covering(cell, 2)
    for group in groups_of(cell, 2):
        for values in itertools.product(*(MATRIX[cell][name] for name in group)):
            assert any(tuple(row[name] for name in group) == values for row in rows), (group, values)


@pytest.mark.parametrize("name", SMALL)
def test_small(place, name, monkeypatch):
    """What compute-sanitizer is given to watch, as it slows kernels down."""
    problem, way = small_problem(name), SMALL[name][4]
    way.go(monkeypatch)
    with place.without_pool():
        judge(problem, run(place, problem, save=way.save))


LAYER_CASES = [
    *(pytest.param("emulated", row, id=f"emulated-{name_of(row)}") for row in LAYER_ROWS[::8]),
    *(pytest.param("gpu", row, id=f"gpu-{name_of(row)}", marks=pytest.mark.gpu) for row in LAYER_ROWS),
]


@pytest.mark.parametrize("place, row", LAYER_CASES, indirect=["place"])
def test_layer_matches_oracle(place, row):
    """With the projection: test_cupy_arrays.py has more of it."""
    n = LAYER_ROWS.index(row)
    problem = Problem.make(row, (7, 3, 9), 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)], layer=True)
    judge(problem, run(place, problem, save=(True, 4, "x")[n % 3], layer=True), layer=True)


# ----------------------------------------------------------------------------------------------------------------------
# The same bits

WAYS = (
    Way(),
    Way("width=1,depth=1,threads=32"),
    Way("width=2,depth=2,threads=32", save=1),
    Way("width=2,depth=16,threads=64", save=4),
    Way("width=1,depth=4,threads=96", own_batch=False, save=3),
    Way("width=2,depth=8,threads=32", own_batch=False, shared=False, save=7),
    Way("width=1,depth=32,threads=256", own_batch=False, shared=False, save=100),
)

_SRU = FULL["sru"]
BITS = {
    "float32": (_SRU | {"dtype": "float32"}, (21, 3, 34), 2, "all"),
    "bfloat16": (_SRU | {"dtype": "bfloat16", "kind": "projected", "activation": "tanh"}, (21, 11, 70), 1, "all"),
    "float16": (_SRU | {"dtype": "float16", "kind": "no_skip", "v": "inputs", "dropout": True}, (21, 2, 6), 2, "mask"),
    "float64": (_SRU | {"dtype": "float64", "kind": "basic", "reset_on": "current"}, (21, 3, 2), 1, "reset"),
    "qrnn": (FULL["qrnn"] | {"dtype": "float16", "form": "ifo-x"}, (21, 3, 34), 2, "all"),
    "mingru": (FULL["mingru"] | {"dtype": "bfloat16", "candidate": "positive"}, (21, 9, 6), 1, "all"),
    "minlstm": (FULL["minlstm"] | {"dtype": "float32"}, (21, 2, 10), 2, "all"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BITS)
def test_every_plan_gives_the_same_bits(place, name, monkeypatch):
    """However many channels a thread has, steps it reads ahead, and states it recomputes."""
    problem, results = Problem.make(*BITS[name]), {}
    for way in WAYS if problem.cell.name == "sru" else WAYS[::2]:
        way.go(monkeypatch)
        results[way] = run(place, problem, save=way.save)
    judge(problem, results[WAYS[0]])
    same(results)


@pytest.mark.parametrize("cell", CELLS)
def test_every_run_gives_the_same_bits(place, cell, monkeypatch):
    """Whichever thread and block comes first."""
    monkeypatch.setenv("SRU_RT_PLAN", "threads=32")
    for save in (True, 4):
        problem, results = Problem.make(FULL[cell] | {"dtype": "float32"}, (9, 19, 40), 2, "all"), {}
        for order in range(5) if cell == "sru" else (1, 2):
            monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
            results[order] = run(place, problem, save=save)
        same(results)


CELLS_AND_DTYPES = [("sru", dtype) for dtype in DTYPES]
CELLS_AND_DTYPES += [("qrnn", "bfloat16"), ("mingru", "float32"), ("minlstm", "float16")]


@pytest.mark.parametrize("cell, dtype", CELLS_AND_DTYPES)
def test_saving_does_not_change_the_result(place, cell, dtype):
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (6, 3, 9), 2, "all")
    given = place.put(problem.given)
    results = {}
    for save in (False, True, 4):
        h, last, *_ = problem.forward()(**given, save=save)
        results[save] = Result(*place.get((h, last)), {})
    same(results)


@pytest.mark.parametrize("cell, dtype", CELLS_AND_DTYPES)
def test_a_step_is_the_same_token_in_a_sequence(place, cell, dtype):
    """Given the same U: products of a batch of tokens may round otherwise than those of one token."""
    L, B, d = 7, 5, 37
    rng = np.random.default_rng(3)
    cell, options = CELLS[cell], {"highway": True} if cell == "qrnn" else {}
    params = cell.library("init")(d, d, rng=rng, dtype=dtype, **options)
    kind = params["weight"].dtype
    params["weight"] = np.round(params["weight"].astype("f4") * 8).astype(kind)  # products are exact in any order
    params["weight"][:, :, :, 4:] = 0
    x = np.round(rng.normal(size=(L, B, d)) * 4).astype(kind)
    x, params = place.put(x), place.put(params)
    h, last = cell.library("forward")(x, **params)
    state = None
    for t in range(L):
        h_t, state = cell.library("step")(x[t], **params, **{cell.state: state})
        assert place.get(h_t).tobytes() == place.get(h[t]).tobytes(), t
    assert place.get(state).tobytes() == place.get(last).tobytes()


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_does_not_depend_on_the_others(place, cell):
    problem = random_problem("float32", 5, 3, 2, 33, cell=cell)
    whole = run(place, problem)
    for b in range(3):
        arrays = {n: a if n in ("bias", "v") else cut(a, b) for n, a in problem.arrays.items()}
        options = {n: cut(a, b) if isinstance(a, np.ndarray) else a for n, a in problem.options.items()}
        one = run(
            place,
            replace(problem, arrays=arrays, options=options, dh=cut(problem.dh, b), dlast=cut(problem.dlast, b)),
        )
        mine = {n: cut(a, b) for n, a in whole.gradients.items() if n not in ("bias", "v")}
        assert mine.keys() >= {"u", problem.cell.initial}
        alone = {n: a for n, a in one.gradients.items() if n in mine}
        same(
            {"in the batch": Result(cut(whole.h, b), cut(whole.last, b), mine), "alone": replace(one, gradients=alone)}
        )


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("L, B", [(1, 1), (5, 3)])
@pytest.mark.parametrize("cell", CELLS)
def test_a_channel_does_not_depend_on_the_others(place, cell, L, B, save):
    """So it is with one channel alone, d = 1."""
    problem = random_problem("float32", L, B, 2, 4, cell=cell)
    whole = run(place, problem, save=save)
    for j in (0, 3):
        arrays = {name: channel(array, j) for name, array in problem.arrays.items()}
        options = {n: channel(a, j) if isinstance(a, np.ndarray) else a for n, a in problem.options.items()}
        dh, dlast = channel(problem.dh, j), channel(problem.dlast, j)
        one = run(place, replace(problem, arrays=arrays, options=options, dh=dh, dlast=dlast), save=save)
        cuts = {name: channel(gradient, j) for name, gradient in whole.gradients.items()}
        same({"the channel": Result(channel(whole.h, j), channel(whole.last, j), cuts), "alone": one})


def channel(array: np.ndarray, j: int) -> np.ndarray:
    """One of four channels of both directions."""
    L, B, *rest = array.shape
    split = array.reshape(L, B, 2, 4) if rest == [8] else array
    return np.ascontiguousarray(split[..., j : j + 1]).reshape(*array.shape[:-1], array.shape[-1] // 4)


def cut(array: np.ndarray, b: int) -> np.ndarray:
    return np.ascontiguousarray(array[:, b : b + 1])


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize(
    "cell, dtype", [("sru", "float16"), ("sru", "float32"), ("qrnn", "float32"), ("minlstm", "bfloat16")]
)
def test_what_stands_in_padding_does_not_matter(place, cell, dtype, save):
    results = {}
    for what in (0.0, np.nan, np.inf, 1.0):
        row = FULL[cell] | {"dtype": dtype} | ({"v": "inputs"} if cell == "sru" else {})
        problem = Problem.make(row, (8, 4, 10), 2, "all")
        per_step = [problem.given.get(name) for name in ("u", "x", "v", "zoneout_mask")]
        for array in (*per_step, problem.dh):
            if array is not None:
                array[problem.padded] = what
        results[what] = run(place, problem, save=save)
    same(results)


# What a cell has little to do with is tested with these, of which one calls its state c, and the other h.
SOME = ("sru", "minlstm")

# ----------------------------------------------------------------------------------------------------------------------
# Sizes without an element


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("L, B", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("cell", SOME)
def test_empty(place, cell, L, B, save):
    problem = random_problem("float32", L, B, 2, 5, cell=cell)
    result, c0 = run(place, problem, save=save), problem.cell.initial
    assert result.h.shape == (L, B, 10)
    assert {n: a.shape for n, a in result.gradients.items()} == {n: a.shape for n, a in problem.arrays.items()}
    if L == 0:
        assert np.array_equal(result.last, problem.arrays[c0])
        assert np.array_equal(result.gradients[c0], problem.dlast)
    for name in {"bias", "v"} & result.gradients.keys():
        assert not result.gradients[name].any()


# ----------------------------------------------------------------------------------------------------------------------
# What is given and wanted


@pytest.mark.parametrize("cell", SOME)
def test_initial_states_and_last_gradients_are_zeros_by_default(place, cell):
    problem = random_problem("float32", 5, 3, 2, 9, cell=cell)
    c0 = problem.cell.initial
    zeros = np.zeros_like(problem.arrays[c0])
    results = {}
    for name, state, dlast in (("zeros", zeros, zeros), ("None", None, None)):
        result = run(place, replace(problem, arrays=problem.arrays | {c0: state}, dlast=dlast))
        results[name] = replace(result, gradients={n: g for n, g in result.gradients.items() if n != c0})
    same(results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [False, True])
def test_v_per_step_in_either_dtype(place, dtype, wide, monkeypatch):
    """In the dtype of x, or in that of the state."""
    L, B, D, d = 6, 3, 2, 10
    problem = random_problem(dtype, L, B, D, d)
    v = np.random.default_rng(5).normal(size=(L, B, D, 2, d)).astype(np.float32 if wide else DTYPES[dtype])
    problem.arrays["v"] = v
    results = {}
    for text in ("", "width=2,depth=4"):
        monkeypatch.setenv("SRU_RT_PLAN", text)
        results[text] = run(place, problem)
        assert results[text].v.dtype == v.dtype
    judge(problem, results[""])
    same(results)


NEEDS = {
    "sru": [("u",), ("x",), ("bias", "v"), ("c0",), ("u", "v"), ("x", "bias"), ()],
    "minlstm": [("u",), ("bias",), ("h0",), ()],
}


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("cell", SOME)
def test_need(place, cell, save):
    problem = Problem.make(FULL[cell] | {"dtype": "float32"}, (5, 9, 7), 2, "all", state=True)
    everything = run(place, problem, save=save).bits()
    for need in NEEDS[cell]:
        some = run(place, problem, save=save, need=need)
        assert set(some.gradients) == set(need)
        assert all(some.bits()[f"d{name}"] == everything[f"d{name}"] for name in need), need


@pytest.mark.parametrize("which", ["both", "h", "last"])
@pytest.mark.parametrize("cell", SOME)
def test_out(place, cell, which):
    """Results are written where they are asked for; the state even in place."""
    problem = Problem.make(FULL[cell] | {"dtype": "float16"}, (5, 3, 8), 2, "all")
    c0 = problem.cell.initial
    problem.arrays[c0] = np.random.default_rng(6).normal(size=(2, 3, 8)).astype(np.float32)
    given = place.put(problem.given)
    wanted = place.get(problem.forward()(**given))
    h = None if which == "last" else place.put(np.full((5, 3, 16), np.nan, np.float16))
    c = None if which == "h" else given[c0]
    got = problem.forward()(**given, out=(h, c))
    for array, own, expected in zip(got, (h, c), wanted):
        assert place.get(array).tobytes() == expected.tobytes()
        assert own is None or array.data.ptr == own.data.ptr
    unchanged(place, given, {n: a for n, a in problem.arrays.items() if n != c0})


@pytest.mark.parametrize("save", [True, 3])
def test_lengths_of_a_device_are_clamped(place, save):
    """They cannot be checked without waiting for it."""
    lengths = np.array([-7, 0, 3, 5, 6, 2**40])
    results = {}
    for name, given in (
        ("beyond", lengths),
        ("within", np.clip(lengths, 0, 5)),
        ("int32", np.clip(lengths, 0, 5).astype(np.int32)),
    ):
        results[name] = run(
            place, replace(random_problem("float32", 5, 6, 2, 3), options={"lengths": given}), save=save
        )
    same(results)
    problem = random_problem("float32", 5, 6, 2, 3)
    given = place.put(problem.arrays)
    h, c_last = place.get(sru_rt.sru_recurrence(**given, lengths=[0, 0, 3, 5, 5, 5]))
    assert np.array_equal(h, results["within"].h) and np.array_equal(c_last, results["within"].last)


@pytest.mark.parametrize("save", [True, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_kept_in_16_bits(place, dtype, save, monkeypatch):
    """The results stay the same, as the state is carried in float32; gradients change a little, in every plan alike."""
    problem = random_problem(dtype, 9, 3, 2, 6)
    wide, results = run(place, problem, save=save), {}
    for text in ("", "width=2,depth=4"):
        monkeypatch.setenv("SRU_RT_PLAN", text)
        results[text] = run(place, problem, save=save, saved_dtype=dtype)
    same(results)
    narrow = results[""]
    assert np.array_equal(narrow.h, wide.h) and np.array_equal(narrow.last, wide.last)
    for name, wanted in wide.gradients.items():
        tolerance.check(f"d{name}", narrow.gradients[name], wanted.astype("f8"), 4 * tolerance.EPS[dtype])
    assert any(narrow.bits()[f"d{name}"] != wide.bits()[f"d{name}"] for name in wide.gradients)


@pytest.mark.parametrize("wide", [False, True])
def test_parameters_in_either_dtype(place, wide, monkeypatch):
    """Kernels take those of 16 bits as they are; `sru_rt.calls`, which `warm` compiles by, knows."""
    problem, found = Problem.make(FULL["sru"] | {"dtype": "bfloat16", "wide": wide}, (6, 2, 8), 1, "plain"), []
    prepare = launch_gpu._prepare
    monkeypatch.setattr(launch_gpu, "_prepare", lambda variant, *rest: found.append(variant) or prepare(variant, *rest))
    judge(problem, run(place, problem))
    assert found == [Call(found[0].cell, "bfloat16", 1, 8, every=1, wide_params=wide).variant] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Large sizes


def test_launches_are_remembered(place, monkeypatch):
    """A second call of the same sizes neither plans nor loads; neither does one of another length."""
    run(place, random_problem("float32", 5, 3, 1, 7))
    monkeypatch.setattr(launch_gpu, "_prepare", lambda *_: pytest.fail("planned again"))
    for L in (5, 6, 2, 40):
        problem = random_problem("float32", L, 3, 1, 7)
        judge(problem, run(place, problem))


BIG_CASES = [
    pytest.param("emulated", (33, 3, 1, 64), id="emulated"),
    pytest.param("gpu", (512, 32, 1, 512), id="gpu", marks=pytest.mark.gpu),
    pytest.param("gpu", (256, 5, 2, 1001), id="gpu-odd", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("save", [True, 32])
@pytest.mark.parametrize(
    "cell, dtype",
    [("sru", "float32"), ("sru", "bfloat16"), ("qrnn", "bfloat16"), ("mingru", "float32"), ("minlstm", "float32")],
)
@pytest.mark.parametrize("place, sizes", BIG_CASES, indirect=["place"])
def test_as_on_the_cpu(place, sizes, cell, dtype, save, monkeypatch):
    """As near as those of the CPU to what these make of the same in float64, as the oracle would take too long.

    Some of so many channels magnify an error from step to step. GPUs have sigmoids of their own, with errors that are
    three times as large; emulated with ex2 and rcp as far off as they may be, results were up to 13 times as far off.
    """
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    problem = random_problem(dtype, *sizes, cell=cell)
    got = run(place, problem, save=save)
    (h, last), gradients = problem.run(save=save)
    (h_exact, last_exact), exact = in_float64(problem).run(save=save)
    near("h", got.h, h, h_exact)
    near("last", got.last, last, last_exact)
    for name in gradients:
        near(f"d{name}", got.gradients[name], getattr(gradients, name), getattr(exact, name))


def in_float64(problem: Problem) -> Problem:
    def wide(value: Any) -> Any:
        return value.astype("f8") if isinstance(value, np.ndarray) and value.dtype.kind not in "bi" else value

    arrays, options = ({n: wide(v) for n, v in given.items()} for given in (problem.arrays, problem.options))
    return replace(
        problem, arrays=arrays, options=options, dh=wide(problem.dh), dlast=wide(problem.dlast), dtype="float64"
    )


def near(name: str, got: np.ndarray, of_the_cpu: np.ndarray, exact: np.ndarray) -> None:
    rounding = 2 * tolerance.EPS[of_the_cpu.dtype.name]
    tolerance.check(name, got, exact, rounding + 32 * tolerance.error(of_the_cpu, exact))


OFFSET_CASES = [
    pytest.param("emulated", (97, 2, 6), 24, id="emulated"),
    # U has 2^31 elements and 129 rows more, 4 GiB; so has its gradient.
    pytest.param("gpu", (16384 + 129, 128, 512), 4096, id="gpu", marks=[pytest.mark.gpu, pytest.mark.slow]),
]


@pytest.mark.parametrize("save", [True, 64])
@pytest.mark.parametrize("place, sizes, piece", OFFSET_CASES, indirect=["place"])
def test_offsets_beyond_31_bits(place, sizes, piece, save):
    """A recurrence has the same bits as its pieces, each of which is given the state of the one before."""
    if place.name == "gpu" and place.xp.cuda.runtime.memGetInfo()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free memory on the GPU")
    L, B, d = sizes
    # Content repeats every 61 steps, which no power of two is a multiple of: a wrong offset meets other content.
    problem = random_problem("float16", 61, B, 1, d, kind="basic")
    u, dh = (repeated(place, a, L) for a in (problem.arrays["u"], problem.dh))
    fixed = place.put({"bias": problem.arrays["bias"], "v": problem.arrays["v"], **problem.options})
    c = place.put(problem.arrays["c0"])
    dc = place.put(problem.dlast)

    h, c_last, saved = sru_rt.sru_recurrence(u, c0=c, save=save, **fixed)
    du = sru_rt.sru_backward(saved, dh, dc, need=("u", "c0"))
    del saved
    pieces = [slice(start, start + piece) for start in range(0, L, piece)]
    kept = []
    for part in pieces:
        h_part, c, saved = sru_rt.sru_recurrence(u[part], c0=c, save=save, **fixed)
        assert equal(place, h_part, h[part]), part
        kept.append(saved)
    assert equal(place, c, c_last)
    for part, saved in zip(reversed(pieces), reversed(kept)):
        gradients = sru_rt.sru_backward(saved, dh[part], dc, need=("u", "c0"))
        assert equal(place, gradients.u, du.u[part]), part
        dc = gradients.c0
    assert equal(place, dc, du.c0)


def repeated(place: Place, array: np.ndarray, L: int) -> Any:
    """`array` again and again along its first axis, until that has length L."""
    block = place.put(np.ascontiguousarray(array))
    whole = place.xp.empty((L, *array.shape[1:]), array.dtype)
    for start in range(0, L, len(array)):
        whole[start : start + len(array)] = block[: L - start]
    return whole


def equal(place: Place, a: Any, b: Any) -> bool:
    """Bit by bit, in portions, as the host may have less memory."""
    portions: Sequence[slice] = [slice(start, start + 1024) for start in range(0, len(a), 1024)]
    return a.shape == b.shape and all(place.get(a[p]).tobytes() == place.get(b[p]).tobytes() for p in portions)
