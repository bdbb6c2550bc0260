"""Backwards whose rows are staged in shared memory, by one warp (cuda/gpu_stage.h) or two that share the work
(cuda/gpu_pair.h), against those that read them twice.

Copies are made as early as may be in odd orders of the emulation, as late as may be in even ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sru_rt
from gpu_places import Place, Result, judge, random_problem, run, same
from planted import plant
from problems import CELLS, DTYPES, FULL, LAYOUTS, Problem
from sru_rt import plan
from test_emit import named_product, product_of_two_uses

pytestmark = pytest.mark.kernels

ORDERS = range(12)
USUAL = 0, 3, 4, 7, 8, 11


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
    place: Place, monkeypatch: pytest.MonkeyPatch, problem: Problem, text: str, orders: Any = USUAL, **more: Any
) -> dict[Any, Result]:
    """The results of both, which must have the same bits; in orders from 4 on by two warps, if they can, else by one.

    From 8 on these copy two pieces ahead.

    Which half of a block recomputes changes with the order, too.
    """
    results = {}
    for staged, order in [(0, 0), *((1 + order // 4, order) for order in orders)]:
        monkeypatch.setenv("SRU_RT_PLAN", ",".join(filter(None, (text, f"staged={staged}"))))
        monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
        results[staged, order] = run(place, problem, **more)
    same(results)
    return results


SIZES = ((21, 3, 64), (9, 5, 64), (6, 19, 6), (40, 1, 128))


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
        wanted = {0, 1, 2, 3} if size[2] % 64 == 0 and save < 32 else {0, 1}
        assert not has_room or wanted <= {made.staged for made in plans}
    judge(problem, results[0, 0])


@pytest.mark.parametrize("d", [10, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flags_are_read_by_whole_warps(place, layout, d, monkeypatch, plans):
    """Where these lie in one sequence; else rows are read twice."""
    problem = Problem.make(FULL["minlstm"] | {"dtype": "bfloat16"}, (11, 3, d), 2, layout)
    judge(problem, both_ways(place, monkeypatch, problem, "", save=4)[2, 7])
    staged = {made.staged for made in plans} - {0}
    assert staged == ({1, 2, 3} if d == 64 else {1} if layout in ("plain", "lengths") else set())


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
    judge(problem, both_ways(place, monkeypatch, problem, f"width={width},threads=32", save=5)[2, 7])
    assert {made.staged for made in plans} == ({0, 1, 2, 3} if d == 64 else {0, 1})


@pytest.mark.parametrize("cell", ["qrnn", "minlstm", "mingru"])
@pytest.mark.parametrize("every", [8, 32, 33, 36])
def test_pieces_of_several_parts(place, cell, every, monkeypatch, plans):
    """Of one lap and more; with sequences of all lengths up to four pieces, and room for all activations or none."""
    options = FULL[cell] | {"dtype": "bfloat16"} | ({"zoneout": "none"} if cell == "qrnn" else {})
    problem = Problem.make(options, (4 * every + 3, 7, 64), 2, "lengths")
    judge(problem, both_ways(place, monkeypatch, problem, "threads=32,width=1", (0, 4, 7, 8, 11), save=every)[2, 7])
    paired = [made for made in plans if made.paired]
    assert all(made.block == 64 for made in paired)
    assert {made.staged: made.depth for made in paired} == {2: min(8, every // 4), 3: min(16, every)}
    known = {2: 2, 3: 1} if cell == "qrnn" else {2: 1, 3: 1}
    assert {made.staged: made.known for made in paired} == (known if every <= 32 else {2: 0, 3: 0})


def many_functions(a, b, e, p, s):
    rate = sru_rt.exp(-sru_rt.softplus(a + p) * sru_rt.sigmoid(e))
    s = sru_rt.where(a > 1, rate * s, sru_rt.sqrt(1 + rate) * s + sru_rt.tanh(b) * sru_rt.log(2 + rate))
    return s, sru_rt.tanh(s) * b


@pytest.mark.parametrize("every", [4, 32])
def test_activations_of_a_cell_of_ones_own(place, every, monkeypatch, plans):
    """All kinds of function, nested and in branches, of which there is room for three or two."""
    cell = sru_rt.cell(gates="a b e", state="s", params="p")(many_functions)
    rng = np.random.default_rng(every)
    u, p = (rng.normal(size=shape).astype(np.float16) for shape in ((41, 3, 1, 3, 64), (1, 1, 64)))
    dh = rng.normal(size=(41, 3, 64)).astype(np.float16)
    bits = {}
    for text in "staged=0", "staged=1", "staged=2", "staged=3":
        monkeypatch.setenv("SRU_RT_PLAN", f"width=1,threads=32,{text}")
        h, _, saved = cell.recurrence(*place.put((u, p)), save=every)
        gradients = cell.backward(saved, place.put(dh))
        found = place.get((h, gradients.u, gradients.params))
        bits[text] = [a.tobytes() for a in found]
    assert bits["staged=0"] == bits["staged=1"] == bits["staged=2"] == bits["staged=3"]
    assert [(made.staged, made.known) for made in plans] == [(0, 0), (1, 0), (2, 3), (3, 2)]


@pytest.mark.parametrize("cell", [named_product, product_of_two_uses])
def test_an_activation_that_the_gradient_would_round_otherwise(place, cell, monkeypatch, plans):
    """No plan and no memory policy changes a bit of float32."""
    gates = "u f o" if cell is product_of_two_uses else "u f"
    own = sru_rt.cell(gates=gates, state="c", params="v")(cell)
    rng = np.random.default_rng(1)
    u, v = (rng.normal(size=shape).astype(np.float32) for shape in ((37, 2, 1, len(gates.split()), 32), (1, 1, 32)))
    dh = rng.normal(size=(37, 2, 32)).astype(np.float32)
    bits = set()
    for text, every in ("", True), ("staged=0", 8), ("staged=1", 8), ("staged=2", 8), ("staged=3", 8):
        monkeypatch.setenv("SRU_RT_PLAN", text)
        _, _, saved = own.recurrence(*place.put((u, v)), save=every)
        gradients = own.backward(saved, place.put(dh))
        bits.add(tuple(a.tobytes() for a in place.get((gradients.u, gradients.params))))
    assert len(bits) == 1 and [made.staged for made in plans] == [0, 0, 1, 2, 3]


def test_after_a_forward_in_chunks(place, monkeypatch, plans):
    """It counts the states that it keeps anew in each chunk, so that pieces are cut short there; of one buffer, too."""
    problem, results = random_problem("float32", 43, 2, 2, 32), {}
    problem.arrays["v"] = None
    for staged in range(4):
        monkeypatch.setenv("SRU_RT_PLAN", "chunk=10")
        h, last, saved = problem.forward()(**place.put(problem.given), save=4, time_parallel=True)
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk=43,staged={staged}")
        gradients = problem.cell.library("backward")(saved, **place.put(problem.seeds))
        results[staged] = Result(*place.get((h, last)), place.get({n: getattr(gradients, n) for n in gradients}))
    same(results)
    assert [(made.staged, made.saved_in_chunks, made.parallel) for made in plans] == [
        (staged, True, False) for staged in range(4)
    ]


@pytest.mark.parametrize("saved_dtype", ["float16", "float32"])
def test_kept_states_in_either_dtype(place, saved_dtype, monkeypatch, plans):
    problem = random_problem("float16", 17, 3, 1, 10)
    both_ways(place, monkeypatch, problem, "width=1", save=6, saved_dtype=saved_dtype)
    assert any(made.staged for made in plans)


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs: that the tests above pass says something only if these are found.

PLANTED = {
    "do not wait for copies": ("cp_async_wait<0>();\n      meet();", "meet();"),
    "do not wait for the neighbour's copies": ("cp_async_wait<0>();\n      meet();", "cp_async_wait<0>();"),
    "copy into places of rows that the neighbour still needs": (
        "meet();\n        copies.template some",
        "copies.template some",
    ),
    "copy into places of rows still to be read": (
        "Backwards backwards(",
        "copies.template some<Plan::depth>();\n      Backwards backwards(",
    ),
    "copy what is beside the group": ("thread.j += part_of_mine() - number() * width;", ""),
    "copy one row in place of all": ("(first_first ? row_of_mine() : -row_of_mine())", "0"),
    "leave the last rows of a piece out": ("      copies.others();\n", ""),
    "keep the flags of the piece before": ("flags.read(f.given, at, span, piece);\n      copies", "copies"),
    "take the flags of the step behind": ("step(steps - 1)", "step(steps)"),
    "take one flag for all": ("__ballot_sync(~0u, mine[0])", "(mine[0] ? ~0u : 0u)"),
    "keep the state of the piece before": (
        "if (piece.steps()) piece.read(f, offset, state);\n      flags",
        "flags",
    ),
}

PLANTED_IN_PAIRS = {
    "wait for one part too few": ("cp_async_wait<ahead * parts - 1>();", "cp_async_wait<ahead * parts>();"),
    "do not wait for the neighbour's copies": ("        Stage::meet();\n", ""),
    "copy before the partner is done": (
        "        ::meet();  // the partner\n        copies.part(of_part);",
        "        copies.part(of_part);\n        ::meet();",
    ),
    "go back before the partner has come to the first piece": ("i < (1 + ahead) * parts", "i < ahead * parts"),
    "lie in the same order always": ("k / Plan::staged % 2", "k / Plan::staged % 1"),
    "lie in the wrong place": ("k + period - ahead", "k + period - ahead - 1"),
    "copy rows beyond a lap": ("smaller(lap, this->left)", "this->left"),
    "copy rows that there are none of": ("smaller(lap, this->left)", "lap"),
    "keep what is known in one place": ("states.advance(k % 2 * Scratch::values * every);", ""),
    "keep the flags of the piece before": ("flags.read(f.given, at, span, coming[1]);", ""),
    "keep the state of the piece before": ("if (coming[1].steps()) coming[1].read(f, offset, state);", ""),
    "let both recompute": (
        "const bool found = (threadIdx.x >= Plan::threads) != (*turned != 0);",
        "const bool found = 1;",
    ),
}


# Where copies are two pieces ahead nothing is mirrored, and rows that come too early find their places free.
OF_MIRRORS = ("lie in the same order always", "copy rows beyond a lap")


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED_IN_PAIRS)
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_bug_planted_in_pairs_is_found(place, bug, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, "gpu_pair.h", *PLANTED_IN_PAIRS[bug])
    problem = Problem.make(FULL["sru"] | {"dtype": "bfloat16"}, (65, 3, 128), 1, "all")
    for orders in (ORDERS[4:8],) if bug in OF_MIRRORS else (ORDERS[4:8], ORDERS[8:]):
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA_ERROR|differ in"):
            for depth, every in (2, 9), (3, 8):
                both_ways(place, monkeypatch, problem, f"width=2,depth={depth},threads=32", orders, save=every)


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("place", ["emulated"], indirect=True)
def test_a_planted_bug_is_found(place, bug, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, "gpu_stage.h", *PLANTED[bug])
    # By warps with flags, and by neighbours and warps without: ballots would have threads wait for others as well.
    for d, layout in [(64, "all")] if "flag" in bug else [(10, "plain"), (64, "lengths")]:
        problem = Problem.make(FULL["sru"] | {"dtype": "bfloat16"}, (23, 3, d), 1, layout)
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA_ERROR|differ in"):
            both_ways(place, monkeypatch, problem, "width=1,depth=2,threads=32", ORDERS[:4], save=5)
