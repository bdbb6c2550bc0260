"""Backwards whose rows are staged in shared memory (cuda/gpu_stage.h), against those that read them twice.

Copies are made as early as may be in odd orders of the emulation, as late as may be in even ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_places import Place, Result, judge, random_problem, run, same
from planted import plant
from problems import CELLS, DTYPES, FULL, LAYOUTS, Problem
from sru_rt import plan

pytestmark = pytest.mark.kernels

ORDERS = (0, 1, 2, 3)


@pytest.fixture
def plans(monkeypatch) -> list[plan.Plan]:
    """Those of backwards, as they are made."""
    made: list[plan.Plan] = []

    def planned(*given: Any) -> plan.Plan:
        found = original(*given)
        made.extend([found] if not found.forward else [])
        return found

    original = plan.plan
    monkeypatch.setattr(plan, "plan", planned)
    return made


def both_ways(
    place: Place, monkeypatch: pytest.MonkeyPatch, problem: Problem, text: str, orders: Any = (0, 3), **more: Any
) -> dict[Any, Result]:
    """The results of both, which must have the same bits; with two buffers in orders 0 and 1, with one in 2 and 3."""
    results = {}
    for staged, order in [(0, 0), *((2 - order % 4 // 2, order) for order in orders)]:
        monkeypatch.setenv("SRU_RT_PLAN", ",".join(filter(None, (text, f"staged={staged}"))))
        monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
        results[staged, order] = run(place, problem, **more)
    same(results)
    return results


SIZES = ((21, 3, 34), (9, 5, 64), (6, 19, 6), (40, 1, 128))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_are_those_of_rows_read_twice(place, cell, dtype, monkeypatch, plans):
    """Of pieces of 2, 3, 32 and 64 steps, which L is no multiple of, by rings that these are no multiple of either."""
    n = list(CELLS).index(cell) + list(DTYPES).index(dtype)
    size, D, layout = SIZES[n % 4], 1 + n % 2, ("plain", "all", "lengths", "reset")[n % 4]
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, size, D, layout)
    ways = (2, ""), (32, "depth=3"), (3, "width=2,depth=2,threads=32"), (64, "width=1,threads=32")
    for save, text in ways[n % 2 :: 2]:
        plans.clear()
        results = both_ways(place, monkeypatch, problem, text, save=save)
        has_room = save < 32 or np.dtype(DTYPES[dtype]).itemsize == 2
        assert not has_room or {made.staged for made in plans} == {0, 1, 2}
    judge(problem, results[0, 0])


@pytest.mark.parametrize("d", [10, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flags_are_read_by_whole_warps(place, layout, d, monkeypatch, plans):
    """Where these lie in one sequence; else rows are read twice."""
    problem = Problem.make(FULL["minlstm"] | {"dtype": "bfloat16"}, (11, 3, d), 2, layout)
    judge(problem, both_ways(place, monkeypatch, problem, "", save=4)[1, 3])
    assert any(made.staged for made in plans) == (layout in ("plain", "lengths") or d == 64)


@pytest.mark.parametrize(
    "width, depth, d, copied", [(1, 1, 10, 2), (1, 5, 10, 2), (2, 8, 10, 2), (1, 2, 32, 8), (2, 5, 64, 8)]
)
def test_no_order_changes_a_bit(place, width, depth, d, copied, monkeypatch, plans):
    """Nor lengths within a warp, half a warp without channels, and pieces that are shorter or longer than a lap."""
    problem = Problem.make(FULL["sru"] | {"dtype": "bfloat16"}, (22, 5, d), 2, "all" if d == 64 else "lengths")
    both_ways(place, monkeypatch, problem, f"width={width},depth={depth},threads=32", ORDERS, save=1 + depth)
    assert {(made.width, made.copied) for made in plans if made.staged} == {(width, copied)}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width, d", [(1, 10), (2, 10), (1, 32), (2, 64)])
def test_inputs_in_either_dtype(place, width, d, wide, monkeypatch, plans):
    """Copies of them have twice the bytes where inputs are wide."""
    L, B, D = 14, 3, 2
    problem = random_problem("float16", L, B, D, d)
    v = np.random.default_rng(5).normal(size=(L, B, D, 2, d)).astype(np.float32 if wide else np.float16)
    problem.arrays["v"] = v
    judge(problem, both_ways(place, monkeypatch, problem, f"width={width},threads=32", save=5)[1, 3])
    assert any(made.staged for made in plans)


def test_after_a_forward_in_chunks(place, monkeypatch, plans):
    """It counts the states that it keeps anew in each chunk, so that pieces are cut short there; of one buffer, too."""
    problem, results = random_problem("float32", 43, 2, 2, 9), {}
    problem.arrays["v"] = None
    for staged in (0, 1, 2):
        monkeypatch.setenv("SRU_RT_PLAN", "chunk=10")
        h, last, saved = problem.forward()(**place.put(problem.given), save=4, time_parallel=True)
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk=43,staged={staged}")
        gradients = problem.cell.library("backward")(saved, **place.put(problem.seeds))
        results[staged] = Result(*place.get((h, last)), place.get({n: getattr(gradients, n) for n in gradients}))
    same(results)
    assert [(made.staged, made.saved_in_chunks, made.parallel) for made in plans] == [
        (staged, True, False) for staged in (0, 1, 2)
    ]


@pytest.mark.parametrize("saved_dtype", ["float16", "float32"])
def test_kept_states_in_either_dtype(place, saved_dtype, monkeypatch, plans):
    problem = random_problem("float16", 17, 3, 1, 10)
    both_ways(place, monkeypatch, problem, "width=1", save=6, saved_dtype=saved_dtype)
    assert any(made.staged for made in plans)


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs: that the tests above pass says something only if these are found.

PLANTED = {
    "wait for one piece too few": ("cp_async_wait<buffers - 1>();", "cp_async_wait<buffers>();"),
    "do not wait for the neighbour's copies": (
        "cp_async_wait<buffers - 1>();\n      meet();",
        "cp_async_wait<buffers - 1>();",
    ),
    "copy into places of rows that the neighbour still needs": (
        "meet();\n        copies.template some",
        "copies.template some",
    ),
    "copy into places of rows still to be read": (
        "work.start(f, at, span.time(pieces[0].last - 1));",
        "work.start(f, at, span.time(pieces[0].last - 1)), copies.template some<Plan::depth>();",
    ),
    "copy what is beside the group": ("thread.j += part_of_mine() - number() * width;", ""),
    "copy one row in place of all": ("span.time(piece.last - 1 - row_of_mine())", "span.time(piece.last - 1)"),
    "leave the last rows of a piece out": ("      copies.others();\n", ""),
    "keep the flags of the piece before": ("flags.read(f.given, at, span, pieces[1]);", ""),
    "take the flags of the step behind": ("step(steps - 1)", "step(steps)"),
    "take one flag for all": ("__ballot_sync(~0u, mine[0])", "(mine[0] ? ~0u : 0u)"),
    "keep the state of the piece before": ("if (pieces[1].steps()) pieces[1].read(f, offset, state);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_planted_bug_is_found(place, bug, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, "gpu_stage.h", *PLANTED[bug])
    # By warps with flags, and by neighbours and warps without: ballots would have threads wait for others as well.
    for d, layout in [(64, "all")] if "flag" in bug else [(10, "plain"), (64, "lengths")]:
        problem = Problem.make(FULL["sru"] | {"dtype": "bfloat16"}, (23, 3, d), 1, layout)
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA_ERROR|differ in"):
            both_ways(place, monkeypatch, problem, "width=1,depth=2,threads=32", ORDERS, save=5)
