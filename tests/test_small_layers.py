"""Small layers, whose U a kernel forms itself (cuda/gpu_small.h), and the choice of that kernel.

Where x and the weight are multiples of 1/8 and 1/64, sums have one value in whatever order they are formed, so that
results have the bits of a product and a recurrence apart.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import oracle
import sru_rt
import tolerance
from emu import fake_cupy
from gpu_places import Place, forget_kernels, unchanged
from planted import plant
from problems import CELLS, FULL, LAYER_ROWS, LAYOUTS, Problem, name_of
from sru_rt import calls, launch_gpu, machine, on_cupy, one_launch, plan, small
from sru_rt.cells import named_cells
from sru_rt.errors import LibraryError
from sru_rt.variant import Variant
from test_repeat import _moved, remembered

HALVES = ("float16", "bfloat16")
ROWS = [row for row in LAYER_ROWS if row["dtype"] in HALVES and row.get("window", 1) == 1]
# L, B, d: steps in several tiles of 16, in one and in a part of one; channels in several warps, and in a part of one.
SIZES = [(37, 2, 33), (5, 3, 7), (16, 1, 64), (1, 9, 1), (100, 1, 16), (33, 2, 8)]
# A small matrix for sanitizers, which slow kernels down: x that comes by asynchronous copies, and x that does not.
SANITIZED = {
    "layer": (FULL["sru"] | {"dtype": "bfloat16"}, (35, 2, 40), 1, "all"),
    "odd_layer": (FULL["minlstm"] | {"dtype": "float16"}, (19, 1, 9), 2, "lengths"),
}
H200 = machine.named("H200").device
NAMED = {cell.name: cell for cell in named_cells()}

kernels = pytest.mark.kernels


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.delenv("SRU_RT_PLAN", raising=False)


@pytest.fixture
def alone(place, monkeypatch):
    """A place where nothing else forms U."""
    monkeypatch.setenv("SRU_RT_PLAN", "small=1")
    monkeypatch.setattr(on_cupy.CuPy, "_gemm", None)
    return place


def forward(place: Place, problem: Problem, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    given = place.put(problem.given)
    h, last = place.get(tuple(problem.forward(layer=True)(**given, **more)))
    unchanged(place, given, problem.given)
    return h, last


def judge(problem: Problem, h: np.ndarray, last: np.ndarray) -> None:
    wanted = problem.cell.oracle("forward")(**problem.given)
    assert h.dtype.name == problem.dtype and last.dtype.name == "float32"
    for name, got, want in zip(("h", "last"), (h, last), wanted):
        tolerance.check(name, got, want, tolerance.LAYER[problem.dtype])
    assert not np.asarray(h, np.float64)[problem.padded].any(), "h is not 0 at padding"


def of_integers(row: dict[str, Any], size: tuple[int, int, int], D: int, layout: str) -> Problem:
    """x and weight of a problem as integers from -16 to 16 over 8 and over 64; NaN in padding.

    Sums over tens of columns are integers over 512, which float32 has, and which 16-bit types round.
    """
    problem = Problem.make(row, size, D, layout, layer=True, state=True)
    rng = np.random.default_rng(size[0])
    for name, part in (("x", 8), ("weight", 64)):
        array = problem.arrays[name]
        drawn = (rng.integers(-16, 17, array.shape) / part).astype(array.dtype)
        problem.arrays[name] = np.where(np.isnan(array.astype(np.float32)), array, drawn).astype(array.dtype)
    return problem


def same_bits(one: Any, other: Any) -> None:
    for name, a, b in zip(("h", "last"), one, other, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (
            f"{name} differs in {np.argwhere(a != b)[:5].tolist()}"
        )


def same_both_ways(place: Place, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch has the bits of two."""
    results = []
    for way in ("small=1", "small=0"):
        monkeypatch.setenv("SRU_RT_PLAN", way)
        results.append(forward(place, problem))
    same_bits(*results)


# ----------------------------------------------------------------------------------------------------------------------
# Results


@kernels
@pytest.mark.parametrize("row", ROWS[::3], ids=name_of)
def test_layers_match_the_oracle(alone, row):
    n = ROWS.index(row) // 3
    problem = Problem.make(row, SIZES[n % len(SIZES)], 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)], layer=True)
    judge(problem, *forward(alone, problem))


@kernels
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_are_those_of_a_product_and_a_recurrence(place, cell, dtype, monkeypatch):
    """With every layout and direction, and columns of x that fill pieces of 32 and of 8, and that do not."""
    for size, D, layout in zip(SIZES, itertools.cycle((2, 1)), itertools.cycle(LAYOUTS)):
        problem, results = of_integers(FULL[cell] | {"dtype": dtype}, size, D, layout), []
        for way in ("small=1", "small=0"):
            monkeypatch.setenv("SRU_RT_PLAN", way)
            results.append(forward(place, problem, time_parallel=False))
        same_bits(*results)
        if "lengths" not in problem.options or np.max(problem.options["lengths"]):
            assert np.any(results[0][0].astype(np.float32))


@kernels
@pytest.mark.parametrize("d_in", [1, 7, 8, 31, 32, 40, 64, 100, 128])
def test_columns_of_x(place, d_in, monkeypatch):
    problem = of_integers(FULL["mingru"] | {"dtype": "bfloat16"}, (19, 2, 24), 1, "plain")
    rng = np.random.default_rng(d_in)
    x, weight = rng.integers(-16, 17, (19, 2, d_in)) / 8, rng.integers(-16, 17, (1, 2, 24, d_in)) / 64
    dtype = problem.arrays["x"].dtype
    problem.arrays |= {"x": x.astype(dtype), "weight": weight.astype(dtype)}
    same_both_ways(place, problem, monkeypatch)


@kernels
@pytest.mark.parametrize("cell", CELLS)
def test_plainly_again_and_prepared(alone, cell):
    problem = Problem.make(FULL[cell] | {"dtype": "float16"}, (21, 3, 40), 1, "reset", layer=True, state=True)
    function, given = problem.forward(layer=True), alone.put(problem.given)
    results = [alone.get(tuple(function(**given)))]
    assert remembered() == 1
    results.append(alone.get(tuple(function(**given))))
    moved = {name: _moved(a, alone.xp) if hasattr(a, "dtype") else a for name, a in given.items()}  # which is copied
    results.append(alone.get(tuple(function(**moved))))
    call = sru_rt.prepare(function, **given)
    results.append(alone.get(tuple(call.results)))
    x = given["x"].copy()
    given["x"].fill(0)
    nothing = alone.get(tuple(call.run()))
    given["x"][...] = x
    results.append(alone.get(tuple(call.run())))
    assert nothing[0].tobytes() != results[0][0].tobytes()
    for other in results[1:]:
        same_bits(results[0], other)


@kernels
def test_a_prepared_call_asks_for_no_memory(alone, monkeypatch):
    problem = Problem.make(FULL["sru"] | {"dtype": "bfloat16"}, (5, 2, 16), 2, "plain", layer=True)
    call = sru_rt.prepare(problem.forward(layer=True), **alone.put(problem.given))
    wanted = alone.get(tuple(call.results))
    call.results[0].fill(0)
    monkeypatch.setattr(on_cupy.CuPy, "empty", None)
    fake_cupy.record.clear()
    same_bits(alone.get(tuple(call.run())), wanted)
    if alone.name == "emulated":
        assert [name for name, *_ in fake_cupy.record.launches] == ["forward"]


@kernels
def test_a_sequence_does_not_depend_on_the_others(alone):
    problem = Problem.make(
        FULL["sru"] | {"dtype": "float16", "v": "params"}, (20, 5, 24), 2, "plain", layer=True, state=True
    )
    h, last = forward(alone, problem)
    for b in (0, 4):
        one = {"x": problem.arrays["x"][:, b : b + 1].copy(), "c0": problem.arrays["c0"][:, b : b + 1].copy()}
        single = replace(problem, arrays=problem.arrays | one)
        same_bits(forward(alone, single), (h[:, b : b + 1], last[:, b : b + 1]))


@kernels
@pytest.mark.parametrize("order", range(6))
def test_no_order_of_threads_changes_a_bit(place, order, monkeypatch):
    monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
    problem = of_integers(FULL["sru"] | {"dtype": "bfloat16"}, (70, 3, 34), 2, "all")
    same_both_ways(place, problem, monkeypatch)


@kernels
@pytest.mark.parametrize("cell", CELLS)
def test_one_token(alone, cell):
    row = FULL[cell] | {"dtype": "bfloat16"} | ({"zoneout": "none"} if cell == "qrnn" else {})
    problem = Problem.make(row, (1, 9, 16), 1, "plain", layer=True, state=True)
    state = problem.cell.state
    given = {k: v for k, v in problem.given.items() if k not in ("x", f"{state}0")}
    x, c = problem.arrays["x"][0], problem.arrays[f"{state}0"]
    step = alone.get(tuple(problem.cell.library("step")(**alone.put(given | {"x": x, state: c}))))
    h, last = forward(alone, problem)
    same_bits(step, (h[0], last))


@kernels
@pytest.mark.parametrize("L, B", [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_do(place, L, B, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "small=1")
    problem = Problem.make(FULL["sru"] | {"dtype": "float16"}, (L, B, 8), 1, "plain", layer=True, state=True)
    judge(problem, *forward(place, problem))


@kernels
def test_sequences_without_steps(alone):
    problem = Problem.make(FULL["minlstm"] | {"dtype": "float16"}, (18, 4, 40), 2, "lengths", layer=True, state=True)
    problem.options["lengths"] = np.array([0, 18, 0, 17])
    live = oracle.live_steps(18, 4, problem.options["lengths"], None)
    problem.arrays["x"][live] = np.nan_to_num(problem.arrays["x"][live])
    problem.padded = ~live
    judge(problem, *forward(alone, problem))


@kernels
def test_results_go_where_out_says(alone):
    problem = Problem.make(FULL["sru"] | {"dtype": "float16"}, (5, 2, 8), 1, "plain", layer=True, state=True)
    given, wanted = alone.put(problem.given), forward(alone, problem)
    h = alone.xp.empty(wanted[0].shape, "float16")
    problem.forward(layer=True)(**given, out=(h, given["c0"]) if given["c0"].dtype.name == "float32" else (h, None))
    assert h.get().tobytes() == wanted[0].tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# The choice


def taken(
    cell: str = "sru",
    dtype: str = "bfloat16",
    sizes: tuple[int, int, int, int] = (32, 32, 1, 128),
    d_in: int = 128,
    device: machine.Device = H200,
    time_parallel: Any = "auto",
) -> bool:
    variant = Variant(NAMED[cell], dtype, "float32")
    return one_launch.taken(variant, sizes, d_in, 0, time_parallel, device)


def test_small_layers_take_one_launch():
    assert taken() and taken(dtype="float16") and taken("mingru") and taken(sizes=(1, 32, 1, 128))
    assert taken(sizes=(512, 16, 2, 64))


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype="float32"),
        dict(sizes=(32, 2048, 1, 128)),  # blocks come in many turns
        dict(sizes=(32, 32, 1, 1024), d_in=1024),
        dict(sizes=(32, 32, 1, 128), d_in=512),
        dict(device=machine.Device(75, 40)),
        dict(time_parallel=True),
        dict(sizes=(0, 32, 1, 128)),
        dict(sizes=(1, 8, 1, 128)),  # a token of few sequences, which has a kernel of its own
    ],
)
def test_others_do_not(change, monkeypatch):
    assert not taken(**change)
    monkeypatch.setenv("SRU_RT_PLAN", "small=1")
    assert taken(**change) == (change.get("sizes") == (32, 2048, 1, 128))


def test_more_sequences_than_a_machine_takes_at_once():
    """132 multiprocessors take a block each of the largest layers; a product then has more to do for its launch."""
    found = [taken(sizes=(32, B, 1, 128)) for B in (1, 32, 132, 264, 528, 2112)]
    assert found[:3] == [True] * 3 and not found[-1]
    assert found == sorted(found, reverse=True)


def test_the_setting(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "small=0")
    assert not taken()
    monkeypatch.setenv("SRU_RT_PLAN", "small=1")
    assert taken(sizes=(32, 2048, 1, 128))


@kernels
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
@pytest.mark.parametrize("what", ["save", "low rank", "window", "time_parallel", "float32", "nothing"])
def test_layers_that_have_a_product(place, what):
    row = FULL["qrnn"] | {"dtype": "float32" if what == "float32" else "bfloat16", "form": "fo"}
    row |= {"window": 2} if what == "window" else {}
    problem = Problem.make(row, (5, 2, 8), 1, "plain", layer=True)
    given = place.put(problem.given)
    if what == "low rank":
        given["weight"] = (given["weight"], place.xp.array(np.eye(11).astype(given["x"].dtype)))
    options = {"save": dict(save=True), "time_parallel": dict(time_parallel=True)}.get(what, {})
    fake_cupy.record.clear()
    problem.forward(layer=True)(**given, **options)
    assert bool(fake_cupy.record.products) == (what != "nothing")


@pytest.mark.parametrize(
    "k, d, d_in", [*itertools.product((1, 2, 3, 4, 5), (1, 33, 64, 128, 250, 480), (1, 64, 128, 300))]
)
def test_blocks(k, d, d_in):
    """All columns have a place, no thread has more of the weight than it has registers for, and memory suffices."""
    block, octets, warps = small.block(k, d, d_in), -(-k * d // 8), 16 - -(-d // 32)
    if block is None:
        registers = 4 * -(-octets // warps) * (-(-d_in // 32) + 1)
        bare_bytes = 2 * (4 * 16 * d_in + 2 * 16 * k * d)
        assert registers > 84 or bare_bytes > 36 << 10
        return
    each = -(-octets // block.product_warps)
    assert 32 * block.step_warps >= d and block.threads <= 512
    assert 4 * each * (-(-d_in // 32) + 1) == block.registers <= 84
    assert (block.product_warps - 1) * each < octets, "a warp has nothing to do"
    assert block.shared <= 48 << 10


def test_kernels_that_there_are_not():
    variant = Variant(NAMED["sru"], "float32", "float32")
    given = calls.Call(NAMED["sru"], "float32", 1, 128)._forward(2)._replace(x=512, weight=512, d_in=128)
    with pytest.raises(LibraryError, match=r"no kernel for sm_90 forms U of float32 .* give it U"):
        plan.plan(variant, given, H200)


def test_the_most_steps():
    call = calls.Call(NAMED["sru"], "bfloat16", 1, 64, L=2**31)
    with pytest.raises(LibraryError, match="takes L < 2"):
        plan.plan(call.variant, call._forward(9)._replace(x=512, weight=512, d_in=64), H200)


@pytest.mark.parametrize("d_in, every, expected", [(128, 0, 1), (0, 0, 0), (512, 0, 0), (128, 1, 0)])
def test_what_warm_compiles(d_in, every, expected):
    """The plan is that of every call, whatever the batch size."""
    call = calls.Call(NAMED["sru"], "bfloat16", 1, 128, every=every, d_in=d_in)
    for plans in (call.general_plans("forward", H200), call.plans("forward", 32, H200)):
        assert sum(p.is_small for p in plans) == expected


@kernels
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_call_takes_a_plan_that_warm_knows(place, monkeypatch):
    made: list[Any] = []
    original = launch_gpu.load
    monkeypatch.setattr(launch_gpu, "load", lambda *a: made.append(a[:2]) or original(*a))
    params = sru_rt.sru_init(64, 64, dtype="bfloat16", rng=0, like=place.xp.zeros(1))
    for L, B in ((3, 2), (1, 9)):
        sru_rt.sru_forward(place.xp.zeros((L, B, 64), params["weight"].dtype), **params)
    (variant, used), *others = made
    assert all(one == (variant, used) for one in others)
    device = launch_gpu.device_facts(0)
    assert used in calls.Call(variant.cell, "bfloat16", 1, 64, d_in=64).general_plans("forward", device)


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs: that the tests above pass says something only if these are found.

PLANTED = {
    "x of another tile": ("memory().x[t % stages][g] + 8 * c", "memory().x[(t + 1) % stages][g] + 8 * c"),
    "rows change places": ("{above.x, below.x, above.y, below.y}", "{above.x, above.y, below.x, below.y}"),
    "columns of the weight change places": (
        "column = 8 * (warp + i * product_warps) + g",
        "column = 8 * (warp * each + i) + g",
    ),
    "U is cut, not rounded": (
        "narrow<Io>(pair).words",
        "(__float_as_uint(pair.v[0]) >> 16 | (__float_as_uint(pair.v[1]) & 0xffff0000u))",
    ),
    "one tile of U": ("memory().u[t % 2][g + 8 * part]", "memory().u[0][g + 8 * part]"),
    "the weight of the other direction": ("index_t(reverse) * columns", "index_t(!reverse && Plan::D == 2) * columns"),
    "x as the forward direction sees it": (
        "const index_t time = span.time(",
        "const index_t time = (",
    ),
    "padding of x is not cleared": (
        "memory().x[row / tile][row % tile] + 8 * (first + i % count)) = zeros()",
        "memory().x[row / tile][row % tile] + 8 * (first + i % count)) = uint4{~0u, 0, 0, 0}",
    ),
    "do not wait for x": ("      cp_async_wait<stages - 2>();\n", "      cp_async_wait<stages - 1>();\n"),
    "the last piece is left out": (
        "for (int p = 0; p < pieces; p++) {\n        const uint4 above",
        "for (int p = 0; p < pieces - 1; p++) {\n        const uint4 above",
    ),
    "gates of the step before": (
        "memory().u[s / tile % 2][s % tile]",
        "memory().u[s / tile % 2][(s + tile - 1) % tile]",
    ),
    "tiles are fetched too late": (
        "work.fetch(t + stages - 1);\n      work.form(t);",
        "work.form(t);\n      work.fetch(t + stages - 2);",
    ),
    "gates before they are there": (
        "if (k == 0 && s % tile == 0) meet();",
        "if (k == 0 && s % tile == 0 && s) meet();",
    ),
}


@kernels
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_planted_bug_is_found(place, bug, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, "gpu_small.h", *PLANTED[bug])
    sizes = {"minlstm": (70, 1, 34), "sru": (70, 1, 64)}
    problems = [of_integers(FULL[cell] | {"dtype": "bfloat16"}, size, 2, "plain") for cell, size in sizes.items()]
    monkeypatch.setenv("SRU_RT_PLAN", "small=0")
    wanted = [forward(place, problem) for problem in problems]
    monkeypatch.setenv("SRU_RT_PLAN", "small=1")
    with pytest.raises((RuntimeError, AssertionError)):
        for order, (problem, expected) in itertools.product("012", zip(problems, wanted)):
            monkeypatch.setenv("SRU_RT_EMU_ORDER", order)
            forget_kernels()
            same_bits(forward(place, problem), expected)
