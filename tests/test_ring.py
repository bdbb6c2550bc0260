"""Sequential kernels whose rows come through a ring in shared memory (cuda/gpu_ring.h), against those with registers.

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


@pytest.fixture
def laps(monkeypatch) -> list[int]:
    """Of each plan that is made."""
    made: list[int] = []

    def planned(*given: Any) -> plan.Plan:
        found = original(*given)
        made.append(found.laps)
        return found

    original = plan.plan
    monkeypatch.setattr(plan, "plan", planned)
    return made


def both_ways(
    place: Place, monkeypatch: pytest.MonkeyPatch, problem: Problem, text: str = "", rings: Any = (4, 5, 7), **more: Any
) -> dict[Any, Result]:
    """The results with registers and with rings of so many laps, each in another order; all must have the same bits."""
    results = {}
    for order, n in enumerate((0, *rings)):
        monkeypatch.setenv("SRU_RT_PLAN", ",".join(filter(None, (text, f"laps={n}"))))
        monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
        results[n] = run(place, problem, time_parallel=False, **more)
    same(results)
    return results


SIZES = ((53, 3, 64), (17, 5, 64), (6, 2, 192), (80, 1, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_are_those_of_registers(place, cell, dtype, monkeypatch, laps):
    """Of sequences that are no whole laps, in one direction and in two, with some states kept and with all."""
    n = list(CELLS).index(cell) + list(DTYPES).index(dtype)
    size, D, layout = SIZES[n % 4], 1 + n % 2, ("plain", "all", "lengths", "reset")[n % 4]
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, size, D, layout)
    text = ("", "threads=32", "threads=64,width=1", "width=2,threads=32")[n % 4]
    rings = (2, 4, 5, 7)  # a forward has none of 2 laps
    if dtype in ("float32", "float64"):  # of whose rows fewer have room
        text, rings = "threads=32,width=1", rings[:3] if dtype == "float32" else (2, 4)
    judge(problem, both_ways(place, monkeypatch, problem, text, rings)[4])
    assert set(laps) == {0, *rings}
    laps.clear()
    both_ways(place, monkeypatch, problem, text, (4,), save=5)
    assert laps == [0, 0, 4, 0]  # a backward that recomputes states has no ring


@pytest.mark.parametrize("L", [1, 2, 7, 8, 16, 17, 31, 63, 65, 130])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flags_and_lengths_of_any_length(place, layout, L, monkeypatch, laps):
    """Flags come 64 at a time. One step has a kernel of its own, without a ring."""
    problem = Problem.make(FULL["qrnn"] | {"dtype": "float32"}, (L, 3, 64), 2, layout)
    judge(problem, both_ways(place, monkeypatch, problem, "threads=32", (5,))[5])
    assert set(laps) == ({0} if L == 1 else {0, 5})


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("saved_dtype", ["float16", "float32"])
def test_inputs_and_kept_states_in_either_dtype(place, wide, saved_dtype, monkeypatch, laps):
    """Copies of them have twice the bytes where they are wide."""
    L, B, D, d = 39, 2, 2, 64
    problem = random_problem("float16", L, B, D, d)
    v = np.random.default_rng(5).normal(size=(L, B, D, 2, d)).astype(np.float32 if wide else np.float16)
    problem.arrays["v"] = v
    for width in (1, 2):
        more = {"saved_dtype": saved_dtype}
        results = both_ways(place, monkeypatch, problem, f"width={width},threads=32", (4,), **more)
        if saved_dtype == "float32":  # in float16 states are rounded
            judge(problem, results[4])
    assert laps == [0, 0, 4, 4] * 2


@pytest.mark.parametrize("d, aligned", [(64, True), (96, False), (36, False)])
def test_where_warps_would_lie_in_two_sequences(place, d, aligned, monkeypatch, laps):
    problem = random_problem("bfloat16", 10, 3, 1, d)
    judge(problem, both_ways(place, monkeypatch, problem, "", (4,))[4])
    assert laps == [0, 0, *([4, 4] if aligned else [0, 0])]


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs: that the tests above pass says something only if these are found.

PLANTED = {
    "wait for one lap too few": ("cp_async_wait<laps - 2 * at_once>()", "cp_async_wait<laps - 2 * at_once + 1>()"),
    "do not wait at the end": ("    cp_async_wait<0>();\n", ""),
    "do not wait for what others copy": ("Stage::meet();  // what", "// what"),
    "do not meet at the end": ("    Stage::meet();\n    for (; n > 0", "    for (; n > 0"),
    "copy into the places of the laps at hand": ("int i = at_once; i < laps", "int i = at_once - 1; i < laps"),
    "leave out the last row": ("k + Stage::row_of_mine() < left", "k + Stage::row_of_mine() + 1 < left"),
    "copy one row in place of all": ("span.begin + Stage::row_of_mine()", "span.begin"),
    "the same on the way back": ("last - Stage::row_of_mine()", "last"),
    "copy what is of another thread": ("f, Stage::copied_by(at), span", "f, at, span"),
    "leave out the states": (
        "for (int i = 0; i < Cell::n_state; i++) copy(from.state[i]",
        "for (int i = 0; i < 0; i++) copy(from.state[i]",
    ),
    "keep the flags of the lap before": ("padded >>= lap, starts_anew >>= lap;", "padded >>= 0;"),
    "take the flags of the step behind": ("marks.put(row, step + k);", "marks.put(row, step + k + 1);"),
    "do not ask for the next flags": ("from.advance(bits);\n      left -= bits;\n      coming.read(from, left);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_planted_bug_is_found(place, bug, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, "gpu_ring.h", *PLANTED[bug])
    # Ballots of flags would have threads wait for others as well.
    problem = Problem.make(FULL["sru"] | {"dtype": "bfloat16"}, (75, 3, 64), 1, "all" if "flag" in bug else "lengths")
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA_ERROR|differ in"):
        both_ways(place, monkeypatch, problem, "width=1,threads=32", (4, 5, 6))
