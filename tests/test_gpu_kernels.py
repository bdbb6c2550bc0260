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
from gpu_places import SMALL, Place, Problem, Result, Way, judge, random_problem, run, same, small_problem, unchanged
from sru_rt import launch_gpu
from test_cells import DTYPES, FACTORS, LAYER_ROWS, LAYOUTS, name_of

# ----------------------------------------------------------------------------------------------------------------------
# The matrix

# Beside the options of the cell: what the sizes are, and how the planner might have a recurrence of these sizes run.
# More sequences than sum_partials has rows of threads, more channels than a block has. Not one channel alone, which
# has a test of its own: if an array is one number, the small difference of large ones, its relative error says nothing.
MATRIX: dict[str, tuple[Any, ...]] = FACTORS | {
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


# What decides which steps a kernel passes, and where it finds states: combined in full.
TOGETHER = ("D", "layout", "save")


@functools.cache
def covering(strength: int) -> list[dict[str, Any]]:
    """Rows of the matrix, in which the values of TOGETHER meet as well."""
    return covering_rows(MATRIX, [*itertools.combinations(MATRIX, strength), TOGETHER])


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


def _gain(row: Mapping[str, Any], groups: Sequence[Sequence[str]], missing: Mapping[Any, None]) -> int:
    """How many combinations of these groups a row has that are missing."""
    return sum(tuple((name, row[name]) for name in group) in missing for group in groups)


def problem_of(row: Mapping[str, Any]) -> tuple[Problem, Way]:
    L, B, d = row["size"]
    d += d % 2 if "width=2" in row["plan"] else 0
    options = {name: row[name] for name in FACTORS}
    problem = Problem.make(options, (L, B, d), row["D"], row["layout"])
    return problem, Way(row["plan"], row["own_batch"], row["shared"], row["save"])


def title(row: Any) -> str:
    return name_of(row).replace(", ", "x") if isinstance(row, dict) else str(row)


MATRIX_CASES = [
    *(pytest.param("emulated", row, id=f"emulated-{title(row)}") for row in covering(2)),
    *(pytest.param("gpu", row, id=f"gpu-{title(row)}", marks=pytest.mark.gpu) for row in covering(3)),
]


@pytest.mark.parametrize("place, row", MATRIX_CASES, indirect=["place"])
def test_recurrence_matches_oracle(place, row, monkeypatch):
    problem, way = problem_of(row)
    way.go(monkeypatch)
    judge(problem, run(place, problem, save=way.save))


def test_the_matrix_covers_all_pairs():
    rows = covering(2)
    for group in [*itertools.combinations(MATRIX, 2), TOGETHER]:
        for values in itertools.product(*(MATRIX[name] for name in group)):
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

FULL = {"kind": "x", "activation": "identity", "reset_on": "previous", "bias": True, "v": "params", "dropout": False}

WAYS = (
    Way(),
    Way("width=1,depth=1,threads=32"),
    Way("width=2,depth=2,threads=32", save=1),
    Way("width=2,depth=16,threads=64", save=4),
    Way("width=1,depth=4,threads=96", own_batch=False, save=3),
    Way("width=2,depth=8,threads=32", own_batch=False, shared=False, save=7),
    Way("width=1,depth=32,threads=256", own_batch=False, shared=False, save=100),
)

BITS = {
    "float32": (FULL | {"dtype": "float32"}, (21, 3, 34), 2, "all"),
    "bfloat16": (FULL | {"dtype": "bfloat16", "kind": "projected", "activation": "tanh"}, (21, 11, 70), 1, "all"),
    "float16": (FULL | {"dtype": "float16", "kind": "no_skip", "v": "inputs", "dropout": True}, (21, 2, 6), 2, "mask"),
    "float64": (FULL | {"dtype": "float64", "kind": "basic", "reset_on": "current"}, (21, 3, 2), 1, "reset"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BITS)
def test_every_plan_gives_the_same_bits(place, name, monkeypatch):
    """However many channels a thread has, steps it reads ahead, and states it recomputes."""
    problem, results = Problem.make(*BITS[name]), {}
    for way in WAYS:
        way.go(monkeypatch)
        results[way] = run(place, problem, save=way.save)
    judge(problem, results[WAYS[0]])
    same(results)


def test_every_run_gives_the_same_bits(place, monkeypatch):
    """Whichever thread and block comes first."""
    monkeypatch.setenv("SRU_RT_PLAN", "threads=32")
    for save in (True, 4):
        problem, results = Problem.make(FULL | {"dtype": "float32"}, (9, 19, 40), 2, "all"), {}
        for order in range(5):
            monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
            results[order] = run(place, problem, save=save)
        same(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_does_not_change_the_result(place, dtype):
    problem = Problem.make(FULL | {"dtype": dtype}, (6, 3, 9), 2, "all")
    given = place.put({**problem.arrays, **problem.options})
    results = {}
    for save in (False, True, 4):
        h, c_last, *_ = sru_rt.sru_recurrence(**given, save=save)
        results[save] = Result(*place.get((h, c_last)), {})
    same(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_same_token_in_a_sequence(place, dtype):
    """Given the same U: products of a batch of tokens may round otherwise than those of one token."""
    L, B, d = 7, 5, 37
    rng = np.random.default_rng(3)
    params = sru_rt.sru_init(d, d, rng=rng, dtype=dtype)
    kind = params["weight"].dtype
    params["weight"] = np.round(params["weight"].astype("f4") * 8).astype(kind)  # products are exact in any order
    params["weight"][:, :, :, 4:] = 0
    x = np.round(rng.normal(size=(L, B, d)) * 4).astype(kind)
    x, params = place.put(x), place.put(params)
    h, c_last = sru_rt.sru_forward(x, **params)
    c = None
    for t in range(L):
        h_t, c = sru_rt.sru_step(x[t], c=c, **params)
        assert place.get(h_t).tobytes() == place.get(h[t]).tobytes(), t
    assert place.get(c).tobytes() == place.get(c_last).tobytes()


def test_a_sequence_does_not_depend_on_the_others(place):
    problem = random_problem("float32", 5, 3, 2, 33)
    whole = run(place, problem)
    for b in range(3):
        arrays = {n: np.ascontiguousarray(a[:, b : b + 1]) for n, a in problem.arrays.items() if n in ("u", "x", "c0")}
        one = run(
            place,
            replace(problem, arrays=problem.arrays | arrays, dh=cut(problem.dh, b), dc_last=cut(problem.dc_last, b)),
        )
        assert np.array_equal(one.h, cut(whole.h, b)) and np.array_equal(one.c_last, cut(whole.c_last, b))
        assert np.array_equal(one.u, cut(whole.u, b)) and np.array_equal(one.c0, cut(whole.c0, b))


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("L, B", [(1, 1), (5, 3)])
def test_a_channel_does_not_depend_on_the_others(place, L, B, save):
    """So it is with one channel alone, d = 1."""
    problem = random_problem("float32", L, B, 2, 4)
    whole = run(place, problem, save=save)
    for j in (0, 3):
        arrays = {name: channel(array, j) for name, array in problem.arrays.items()}
        alone = replace(problem, arrays=arrays, dh=channel(problem.dh, j), dc_last=channel(problem.dc_last, j))
        one = run(place, alone, save=save)
        cuts = {name: channel(gradient, j) for name, gradient in whole.gradients.items()}
        same({"the channel": Result(channel(whole.h, j), channel(whole.c_last, j), cuts), "alone": one})


def channel(array: np.ndarray, j: int) -> np.ndarray:
    """One of four channels of both directions."""
    L, B, *rest = array.shape
    split = array.reshape(L, B, 2, 4) if rest == [8] else array
    return np.ascontiguousarray(split[..., j : j + 1]).reshape(*array.shape[:-1], array.shape[-1] // 4)


def cut(array: np.ndarray, b: int) -> np.ndarray:
    return np.ascontiguousarray(array[:, b : b + 1])


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_stands_in_padding_does_not_matter(place, dtype, save):
    results = {}
    for what in (0.0, np.nan, np.inf, 1.0):
        problem = Problem.make(FULL | {"dtype": dtype, "v": "inputs"}, (8, 4, 10), 2, "all")
        for array in (problem.arrays["u"], problem.arrays["x"], problem.arrays["v"], problem.dh):
            array[problem.padded] = what
        results[what] = run(place, problem, save=save)
    same(results)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes without an element


@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("L, B", [(0, 3), (4, 0), (0, 0)])
def test_empty(place, L, B, save):
    problem = random_problem("float32", L, B, 2, 5)
    result = run(place, problem, save=save)
    assert result.h.shape == (L, B, 10) and result.u.shape == (L, B, 2, 3, 5)
    assert np.array_equal(result.c_last, problem.arrays["c0"]) and np.array_equal(result.c0, problem.dc_last)
    for name in ("bias", "v"):
        assert result.gradients[name].shape == (2, 2, 5) and not result.gradients[name].any()


# ----------------------------------------------------------------------------------------------------------------------
# What is given and wanted


def test_initial_states_and_last_gradients_are_zeros_by_default(place):
    problem = random_problem("float32", 5, 3, 2, 9)
    zeros = np.zeros_like(problem.arrays["c0"])
    results = {}
    for name, c0, dc_last in (("zeros", zeros, zeros), ("None", None, None)):
        result = run(place, replace(problem, arrays=problem.arrays | {"c0": c0}, dc_last=dc_last))
        results[name] = replace(result, gradients={n: g for n, g in result.gradients.items() if n != "c0"})
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


NEEDS = [("u",), ("x",), ("bias", "v"), ("c0",), ("u", "v"), ("x", "bias"), ()]


@pytest.mark.parametrize("save", [True, 3])
def test_need(place, save):
    problem = Problem.make(FULL | {"dtype": "float32", "v": "params"}, (5, 9, 7), 2, "all")
    problem.arrays["c0"] = np.ones((2, 9, 7), np.float32)
    everything = run(place, problem, save=save).bits()
    for need in NEEDS:
        some = run(place, problem, save=save, need=need)
        assert set(some.gradients) == set(need)
        assert all(some.bits()[f"d{name}"] == everything[f"d{name}"] for name in need), need


@pytest.mark.parametrize("which", ["both", "h", "c_last"])
def test_out(place, which):
    """Results are written where they are asked for; the state even in place."""
    problem = Problem.make(FULL | {"dtype": "float16"}, (5, 3, 8), 2, "all")
    problem.arrays["c0"] = np.random.default_rng(6).normal(size=(2, 3, 8)).astype(np.float32)
    given = place.put({**problem.arrays, **problem.options})
    wanted = place.get(sru_rt.sru_recurrence(**given))
    h = None if which == "c_last" else place.put(np.full((5, 3, 16), np.nan, np.float16))
    c = None if which == "h" else given["c0"]
    got = sru_rt.sru_recurrence(**given, out=(h, c))
    for array, own, expected in zip(got, (h, c), wanted):
        assert place.get(array).tobytes() == expected.tobytes()
        assert own is None or array.data.ptr == own.data.ptr
    unchanged(place, given, {n: a for n, a in problem.arrays.items() if n != "c0"})


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
    assert np.array_equal(h, results["within"].h) and np.array_equal(c_last, results["within"].c_last)


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
    assert np.array_equal(narrow.h, wide.h) and np.array_equal(narrow.c_last, wide.c_last)
    for name, wanted in wide.gradients.items():
        tolerance.check(f"d{name}", narrow.gradients[name], wanted.astype("f8"), 4 * tolerance.EPS[dtype])
    assert any(narrow.bits()[f"d{name}"] != wide.bits()[f"d{name}"] for name in wide.gradients)


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place, sizes", BIG_CASES, indirect=["place"])
def test_as_on_the_cpu(place, sizes, dtype, save, monkeypatch):
    """Against the compiled kernels of the CPU, as the oracle would take too long."""
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    problem = random_problem(dtype, *sizes)
    got = run(place, problem, save=save)
    h, c_last, saved = sru_rt.sru_recurrence(**problem.arrays, save=save)
    gradients = sru_rt.sru_backward(saved, problem.dh, problem.dc_last)
    tolerance.check("h", got.h, h.astype("f8"), apart(dtype))
    tolerance.check("c_last", got.c_last, c_last.astype("f8"), apart("float32"))
    for name in gradients:
        wanted = getattr(gradients, name)
        tolerance.check(f"d{name}", got.gradients[name], wanted.astype("f8"), 4 * apart(wanted.dtype.name))


def apart(dtype: str) -> float:
    """Both may be rounded to the other side, and a long sequence gathers more error than the table has in mind."""
    return 2 * tolerance.EPS[dtype] + 1024 * tolerance.EPS["float32"]


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
    problem = random_problem("float16", 61, B, 1, d, k=2, reset_gate=False)
    u, dh = (repeated(place, a, L) for a in (problem.arrays["u"], problem.dh))
    fixed = place.put({"bias": problem.arrays["bias"][:, :1], "v": problem.arrays["v"][:, :1], "reset_gate": False})
    c = place.put(problem.arrays["c0"])
    dc = place.put(problem.dc_last)

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
