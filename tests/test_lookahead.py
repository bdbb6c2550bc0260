"""Chunks of time in one kernel, whose blocks wait for each other (cuda/gpu_lookahead.h).

test_time_parallel.py holds it against the oracle; here it is held against the three kernels that do the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

import sru_rt
from gpu_places import Place, Result, forget_kernels, judge, random_problem, run, same
from planted import plant
from problems import Problem
from sru_rt import launch_gpu, recurrence, shared_memory
from test_time_parallel import AFFINE, CELLS, at_place, both, growing

pytestmark = pytest.mark.kernels

# Orders of threads and blocks, and how many blocks run at once. With many, most find summaries where with few they find
# states; in an ascending order (0) all of them wait at first.
SCHEDULES = [(0, 1), (0, 9), (1, 4), (2, 9), (3, 5), (4, 16)]


@pytest.fixture(autouse=True)
def many_at_once(monkeypatch):
    schedule(monkeypatch, 5, 7)


def schedule(monkeypatch: pytest.MonkeyPatch, order: int, resident: int) -> None:
    monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
    monkeypatch.setenv("SRU_RT_EMU_RESIDENT", str(resident))


def in_both_forms(place: Place, monkeypatch: pytest.MonkeyPatch, problem: Problem, plan: str, **more: Any) -> None:
    results: dict[str, Result] = {}
    for form in ("lookahead=1", "lookahead=0"):
        monkeypatch.setenv("SRU_RT_PLAN", f"{plan},{form}")
        results[form] = run(place, problem, time_parallel=True, **more)
    same(results)


@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_are_those_of_three_kernels(place, cell, monkeypatch):
    for dtype, D, layout, save, width in (("float32", 2, "all", True, 1), ("bfloat16", 1, "lengths", 3, 2)):
        problem = Problem.make(CELLS[cell] | {"dtype": dtype}, (22, 3, 34), D, layout)
        in_both_forms(place, monkeypatch, problem, f"chunk=4,threads=32,width={width}", save=save)


@pytest.mark.parametrize("cell", ["no_v", "v"])
def test_no_schedule_changes_a_bit(place, cell, monkeypatch):
    problem, results = Problem.make(CELLS[cell] | {"dtype": "float32"}, (41, 2, 40), 2, "all"), {}
    monkeypatch.setenv("SRU_RT_PLAN", "threads=32,chunk=2")
    for order, resident in SCHEDULES:
        schedule(monkeypatch, order, resident)
        results[order, resident] = run(place, problem, time_parallel=True)
    judge(problem, results[SCHEDULES[0]])
    same(results)


@pytest.mark.parametrize("cell", ["no_v", "v"])
def test_launches_again_with_the_same_arguments(place, cell, monkeypatch):
    """As a graph does when it is replayed: nothing on the host is asked again."""
    monkeypatch.setenv("SRU_RT_PLAN", "threads=32,chunk=3")
    problem = Problem.make(CELLS[cell] | {"dtype": "float32"}, (20, 3, 33), 2, "all")
    results, original = {"once": run(place, problem, time_parallel=True)}, launch_gpu.launch

    def thrice(*arguments: Any) -> None:
        for _ in range(3):
            original(*arguments)

    monkeypatch.setattr(launch_gpu, "launch", thrice)
    results["thrice"] = run(place, problem, time_parallel=True)
    same(results)


def launched_before(place: Place, monkeypatch: pytest.MonkeyPatch, problem: Problem) -> Any:
    """h and the last state of a call of which each launch is run with other numbers first."""
    given, original = place.put(problem.arrays), launch_gpu.launch

    def twice(*arguments: Any) -> None:
        for _ in range(2):
            given["u"][...] = given["u"] * -1
            original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launch_gpu, "launch", twice)
        return sru_rt.sru_recurrence(**given, time_parallel=True)


def test_launches_again_with_other_numbers(place, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "threads=32,chunk=2")
    problem = random_problem("float32", 80, 2, 2, 33)
    problem.arrays["v"] = None
    wanted = place.get(sru_rt.sru_recurrence(**place.put(problem.arrays), time_parallel=True))
    got = place.get(launched_before(place, monkeypatch, problem))
    same({"once": Result(*wanted, {}), "twice": Result(*got, {})})


@pytest.mark.parametrize("cell", AFFINE)
def test_rows_are_read_from_memory_or_from_a_tile(place, cell, monkeypatch):
    """Chunks of more than 128 steps, wide blocks and blocks without shared memory read all rows twice."""
    problem, results = Problem.make(CELLS[cell] | {"dtype": "float16"}, (70, 2, 6), 1, "all"), {}
    for threads, room in ((32, 48 << 10), (32, 0), (512, 48 << 10)):
        monkeypatch.setenv("SRU_RT_PLAN", f"threads={threads},chunk=32,lookahead=1")
        monkeypatch.setattr(shared_memory, "SHARED_BYTES", room)
        forget_kernels()
        results[threads, room] = run(place, problem, time_parallel=True)
        tiled = [any(k.shared for k in made.kernels) for made in launch_gpu._launches.values()]
        assert tiled == [threads == 32 and room > 0] * 2
    judge(problem, results[32, 0])
    same(results)
    problem = Problem.make(CELLS[cell] | {"dtype": "float16"}, (140, 2, 6), 1, "all")
    for chunk in (65, 129):
        in_both_forms(place, monkeypatch, problem, f"chunk={chunk}")


@pytest.mark.parametrize("order, resident", SCHEDULES)
def test_summaries_of_no_use(place, order, resident, monkeypatch):
    """Whoever meets one waits for the state after that chunk, which its own block publishes once it is done."""
    schedule(monkeypatch, order, resident)
    results = {}
    for n_states, form in itertools.product((1, 2), (1, 0)):
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk=80,threads=32,lookahead={form}")
        given, dh, dc_last = growing(n_states, "float32")
        results[n_states, form] = both(place, at_place(place, given), 1, dh, dc_last)
    for n_states in (1, 2):
        for name, wanted in results[n_states, 0].items():
            assert np.isfinite(wanted).all()
            assert results[n_states, 1][name].tobytes() == wanted.tobytes(), name


def overflowing(L: int, d: int) -> recurrence.Operands:
    """Each channel is 0 where its gates are so large, once or more, that their product over 2 steps is infinite."""
    given, rng = growing(1, "float32")[0], np.random.default_rng(7)
    u = rng.normal(size=(L, 2, 2, 2, d)).astype("float32")
    u[..., 0, :] = 0.5
    for b, q, j in np.ndindex(2, 2, d):
        for k in rng.integers(1, L // 2 - 1, size=1 + j % 3):
            u[2 * k - 2 : 2 * k + 4, b, q, :, j] = 0
            u[2 * k : 2 * k + 2, b, q, 0, j] = 1e25
    return dataclasses.replace(given, arrays={"u": u}, c0=[np.zeros((2, 2, d), "float32")])


def test_summaries_of_no_use_to_some_lanes(place, monkeypatch):
    """Those beside them wait, too, so that all lanes of a warp look at the same flags."""
    given, results = overflowing(160, 37), {}
    for form, (order, resident) in [(0, (0, 2)), *((1, it) for it in SCHEDULES)]:
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk=2,threads=32,lookahead={form}")
        schedule(monkeypatch, order, resident)
        h, last, _ = recurrence.forward(at_place(place, given))
        results[form, order, resident] = Result(*place.get((h, last[0])), {})
    assert np.isfinite(results[0, 0, 2].h).all()
    same(results)


@pytest.mark.parametrize("save", [True, False])
def test_the_last_state_may_take_the_place_of_the_first(place, save, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=2,threads=32")
    problem = random_problem("float32", 31, 2, 2, 40)
    problem.arrays["v"] = None
    h, c_last = place.get(sru_rt.sru_recurrence(**place.put(problem.arrays), time_parallel=True))
    for order, resident in SCHEDULES:
        schedule(monkeypatch, order, resident)
        given = place.put(problem.arrays)
        got = place.get(sru_rt.sru_recurrence(**given, time_parallel=True, save=save, out=(None, given["c0"])))
        assert got[0].tobytes() == h.tobytes() and got[1].tobytes() == c_last.tobytes()


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_what_is_not_finite_stops_nothing(place, what, monkeypatch):
    """From a step that is not finite on no summary is of use, up to the end."""
    problem = random_problem("float32", 40, 2, 1, 5)
    problem.arrays["v"] = None
    problem.arrays["u"][6, 0, :, 0, 1] = what
    in_both_forms(place, monkeypatch, problem, "chunk=3")


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs: that the tests above pass says something only if these are found.

PLANTED = {
    "fold without A": ("sum.apply(state, next);", "for (int i = 0; i < n; i++) next[i] = sum.b[i];", "differ in"),
    "do not clear the number": ("words(a)[i] = 0;", "if (i) words(a)[i] = 0;", "CUDA_ERROR|differ in"),
    "do not clear the flags": ("words(a)[i] = 0;", "if (!i) words(a)[i] = 0;", "CUDA_ERROR|differ in"),
    "trust in the order of blocks": (
        "number = atomicAdd(words(f.given), 1u);",
        "number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);",
        "no progress",
    ),
    "take a useless summary": ("if (!Scan::is_finite(next, lane)) return false;", ";", "differ in"),
    "publish what the chunk itself ends with, in its time": (
        "    if (!late) return;\n",
        "    if (is_last) return;\n    for (int i = 0; i < n; i++) after[i] = state[i];\n",
        "differ in",
    ),
    "take a state from beyond": ("mine < chunk ?", "mine < count ?", "differ in"),
    "take the state behind the last": ("seen.skip(warp - 1 - __clz", "seen.skip(warp - __clz", "differ in"),
    "count chunks without what is known of them": (
        "from += chunks, summaries >>= chunks,",
        "from += chunks,",
        "differ in",
    ),
    "let lanes without a channel go": (
        "    if (chunk)\n      column.look_ahead",
        "    if (chunk && at.idle)\n      __nanosleep(0);\n    else if (chunk)\n      column.look_ahead",
        "deadlock|meets|returned",
    ),
    "let each lane go on": ("by = all ? 0 : warp / 2", "by = 0", "differ in|deadlock|returned"),
    "go on as the quickest lane": ("done = min(done, __shfl", "done = max(done, __shfl", "differ in"),
    "ask no other lane": ("__all_sync(~0u, done == ready)", "done == ready", "deadlock|meets|returned"),
    "do not wait for the first state": ("bool wants_state = true;  //", "bool wants_state = false;  //", "differ in"),
}


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_planted_bug_is_found(place, bug, tmp_path, monkeypatch):
    """By comparison with the three kernels, over schedules."""
    plant(monkeypatch, tmp_path, "gpu_lookahead.h", *PLANTED[bug][:2])
    problem = random_problem("float32", 41, 2, 2, 40)
    problem.arrays["v"] = None
    grows, overflows = growing(1, "float32")[0], overflowing(160, 37)

    def usual() -> tuple[Any, Any]:
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk=2,threads=32,lookahead={form}")
        return launched_before(place, monkeypatch, problem)

    def useless(given: recurrence.Operands, chunk: int) -> tuple[Any, Any]:
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk={chunk},threads=32,lookahead={form}")
        h, last, _ = recurrence.forward(at_place(place, given))
        return h, last[0]

    with pytest.raises((RuntimeError, AssertionError), match=PLANTED[bug][2]):
        for forward in (usual, lambda: useless(grows, 66), lambda: useless(overflows, 2)):
            results = {}
            for form, (order, resident) in [(0, (0, 2)), *((1, it) for it in SCHEDULES)]:
                schedule(monkeypatch, order, resident)
                results[form, order, resident] = Result(*place.get(forward()), {})
                same(results)
