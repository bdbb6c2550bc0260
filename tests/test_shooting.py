"""Forwards in parallel over time whose chunks guess the state that they begin with: the bits of the sequential kernel.

Every test runs under the emulation, and on a GPU (see gpu_places.py). Nearly all make guesses of so few steps that most
are wrong, and see in what chunks leave to each other that they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import sru_rt
import test_own_cells as own
from emu import fake_cupy
from gpu_places import Place, Way, random_problem
from problems import DTYPES, LAYOUTS, Problem
from sru_rt import chunks, launch_gpu, recurrence
from sru_rt.cell import Array, Cell
from sru_rt.graph import relu, tanh
from sru_rt.recurrence import Operands
from test_gpu_kernels import GPU_STRENGTH, covering_rows, title
from test_time_parallel import CELLS, PLAIN, at_place, kernels

pytestmark = pytest.mark.kernels

SHOT = {name: CELLS[name] for name in ("v", "v_basic", "v_per_step")}
SHOT["v_tanh"] = PLAIN | {"v": "params", "activation": "tanh", "kind": "projected", "reset_on": "current"}

MATRIX: dict[str, tuple[Any, ...]] = {
    "cell": tuple(SHOT),
    "dtype": tuple(DTYPES),
    "D": (1, 2),
    "layout": tuple(LAYOUTS),
    "size": ((21, 3, 7), (13, 2, 34), (6, 19, 8), (150, 2, 6)),
    "chunk": (1, 3, 5, 8, 64),
    "warm_up": (1, 3, 16, 256),
    "save": (False, True, 4, 7),
    "plan": ("", "width=1,depth=1,threads=32", "width=2,depth=4,threads=32"),
    "own_batch": (True, False),
}
GROUPS = [*itertools.combinations(MATRIX, 2), ("chunk", "save", "D"), ("chunk", "D", "layout")]
CASES = [
    *(pytest.param("emulated", row, id=f"emulated-{title(row)}") for row in covering_rows(MATRIX, GROUPS)),
    *(
        pytest.param("gpu", row, id=f"gpu-{title(row)}", marks=pytest.mark.gpu)
        for row in covering_rows(MATRIX, [*itertools.combinations(MATRIX, GPU_STRENGTH), *GROUPS])
    ),
]


def forward(place: Place, problem: Problem, how: bool | str, save: Any = True) -> dict[str, bytes]:
    """The bits of h, of the last state and of the states that are kept."""
    h, last, *saved = problem.cell.library("recurrence")(**place.put(problem.given), save=save, time_parallel=how)
    found = {"h": h, "last": last, **({"states": saved[0].states[0]} if saved else {})}
    return {name: place.get(array).tobytes() for name, array in found.items()}


def of_operands(place: Place, given: Operands, how: bool | str, every: int = 1) -> dict[str, bytes]:
    """The same of operands of NumPy."""
    h, last, saved = recurrence.forward(replace(at_place(place, given), time_parallel=how, chunk=None), every)
    found = {"h": h} | {f"last {i}": a for i, a in enumerate(last)} | {f"states {i}": a for i, a in enumerate(saved)}
    return {name: place.get(array).tobytes() for name, array in found.items()}


def differing(got: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [name for name in wanted if got[name] != wanted[name]]


@pytest.fixture
def repairs(place, monkeypatch) -> Iterator[Any]:
    """A function that tells of the last pass in chunks in how many cases mend() changed how a chunk ends, and in how
    many settle() found that a chunk had not begun with what the one before ended with. It takes one state."""
    carries: list[Any] = []
    original = recurrence._carry

    def carry(operands: Operands, chunk: int, forward: bool) -> Any:
        found = original(operands, chunk, forward)
        if found is not None:
            carries.append((found, chunks.count(operands.sizes[0], chunk)))
        return found

    def count() -> tuple[int, int]:
        carry, n = carries[-1]
        scratch = place.get(carry).reshape(n, 3, -1)
        bits = scratch.view(np.int64 if scratch.dtype == np.float64 else np.int32)
        started, ended, mended = bits[:, 0], bits[:, 1], bits[:, 2]
        changed = ended[1:] != mended[1:]
        true = np.concatenate([ended[:1], mended[1:-1]])
        return int(changed.sum()), int((started[1:] != true).sum())

    monkeypatch.setattr(recurrence, "_carry", carry)
    yield count


# ----------------------------------------------------------------------------------------------------------------------
# Every option


@pytest.mark.parametrize("place, row", CASES, indirect=["place"])
def test_every_bit_is_that_of_the_sequential_kernel(place, row, monkeypatch):
    L, B, d = row["size"]
    d += d % 2 if "width=2" in row["plan"] else 0
    problem = Problem.make(SHOT[row["cell"]] | {"dtype": row["dtype"]}, (L, B, d), row["D"], row["layout"])
    ways = [f"chunk={row['chunk']},warm_up={row['warm_up']}", row["plan"]]
    Way(",".join(filter(None, ways)), row["own_batch"]).go(monkeypatch)
    got, wanted = (forward(place, problem, how, row["save"]) for how in (True, False))
    assert not differing(got, wanted)
    assert kernels() == sorted([1, 3 if row["chunk"] < L else 1][: 2 if row["chunk"] < L else 1])


# ----------------------------------------------------------------------------------------------------------------------
# Guesses that are right, that mend() puts right, and that only settle() does


def scaled(dtype: str, L: int, v: float, bias: float, **row: Any) -> Problem:
    """A recurrence with |v| up to `v` and forget biases about `bias`, in two directions."""
    problem = random_problem(dtype, L, 2, 2, 16, **row)
    generator = np.random.default_rng(3)
    arrays = problem.arrays
    arrays["v"] = generator.uniform(-v, v, arrays["v"].shape).astype(arrays["v"].dtype)
    arrays["bias"][:, 0] = bias
    return problem


# What is to be mended and settled of 2 * 64 channels and all chunks but the first: none, some, or nearly all.
NONE, SOME, MOST = "none", "some", "most"
REPAIRED: dict[str, tuple[str, int, float, float, str, str, str]] = {
    # dtype, L, |v|, forget bias, chunk and warm-up, mended, settled
    "usual": ("float32", 1100, 1.22, 1.0, "chunk=64", NONE, NONE),
    "usual, of 16 bits": ("bfloat16", 1100, 1.22, 0.0, "chunk=64", NONE, NONE),
    "usual, of 64 bits": ("float64", 2100, 1.22, 1.0, "chunk=256", NONE, NONE),
    "mended": ("float32", 700, 1.22, 0.0, "chunk=64,warm_up=8", NONE, NONE),
    "settled": ("float32", 700, 1.22, 1.0, "chunk=40,warm_up=8", SOME, SOME),
    "bistable": ("float32", 700, 6.0, 0.0, "chunk=64,warm_up=32", SOME, SOME),
    "bistable, of 16 bits": ("float16", 700, 4.0, 0.0, "chunk=100,warm_up=32", SOME, SOME),
    "remembers": ("float32", 700, 1.22, 6.0, "chunk=100,warm_up=32", MOST, MOST),
    "hardly forgets": ("float32", 500, 1.22, 8.0, "chunk=64,warm_up=64", MOST, MOST),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_however_many_guesses_are_wrong(place, name, repairs, monkeypatch):
    dtype, L, v, bias, text, mended, settled = REPAIRED[name]
    monkeypatch.setenv("SRU_RT_PLAN", text)
    problem = scaled(dtype, L, v, bias)
    for save in (False, True, 24):
        wanted = forward(place, problem, False, save)
        assert not differing(forward(place, problem, True, save), wanted)
        chunk = int(text.partition(",")[0].partition("=")[2])
        cases = 64 * (chunks.count(L, chunk) - 1)
        for count, expected in zip(repairs(), (mended, settled)):
            assert {NONE: count == 0, SOME: 0 < count < cases / 2, MOST: cases / 2 < count}[expected], (count, cases)


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("lengths", [[90, 64, 63, 65, 1, 0], [77, 128, 31, 32, 33, 130]])
def test_padding_and_boundaries_in_and_at_chunks(place, lengths, every, repairs, monkeypatch):
    """Sequences that end at, before and after the first and last steps of chunks; boundaries there, and masks."""
    L, B, chunk = 130, 6, 32
    monkeypatch.setenv("SRU_RT_PLAN", f"chunk={chunk},warm_up=4")
    reset, mask = np.zeros((L, B), bool), np.zeros((L, B), bool)
    for b in range(B):
        reset[[chunk - 1 + b % 3, 2 * chunk, 3 * chunk - 1, 3 * chunk][:: 1 + b % 2], b] = True
        mask[[chunk - 1, chunk, 40 + b], b] = True
    problem = random_problem("float32", L, B, 2, 4)
    problem.arrays["bias"][:, 0] = 4  # so that guesses are wrong
    ends = {"lengths": np.array(lengths)}
    for layout in (ends, {"reset": reset}, {"mask": mask}, ends | {"reset": reset, "mask": mask}):
        given = replace(problem, options=layout)
        assert not differing(forward(place, given, True, every), forward(place, given, False, every))
        assert min(repairs()) > 0


def test_guesses_are_of_steps_of_the_sequence(place, repairs, monkeypatch):
    """Those of chunks beyond its end, too, and from c0 where that is near: there is nothing to put right."""
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=64")
    problem = scaled("float32", 700, 1.22, 0.0)
    lengths = np.array([100, 500])
    padded = np.arange(700)[:, None] >= lengths
    for array in (problem.arrays["u"], problem.arrays["x"]):
        array[padded] = np.nan
    given = replace(problem, options={"lengths": lengths})
    assert not differing(forward(place, given, True), forward(place, given, False))
    assert repairs() == (0, 0)


def test_the_state_may_be_updated_in_place(place, monkeypatch):
    """Though c_last is written to the memory from which several chunks read c0, whichever is first done."""
    problem = random_problem("float32", 11, 2, 2, 40)
    for order, warm_up in itertools.product(range(4), (1, 30)):
        monkeypatch.setenv("SRU_RT_PLAN", f"chunk=3,warm_up={warm_up}")
        monkeypatch.setenv("SRU_RT_EMU_ORDER", str(order))
        given = place.put(problem.arrays)
        wanted = place.get(sru_rt.sru_recurrence(**given, time_parallel=False))
        got = sru_rt.sru_recurrence(**given, time_parallel=True, out=(None, given["c0"]))
        assert got[1].data.ptr == given["c0"].data.ptr
        assert [a.tobytes() for a in place.get(got)] == [a.tobytes() for a in wanted]


class Watch:
    """Fills h with NaN when a kernel is about to be launched, to see what it writes."""

    def __init__(self, kernel: str, h: Any) -> None:
        self.kernel, self.h, self.original = kernel, h, launch_gpu.load

    def __call__(self, *arguments: Any) -> Any:
        functions = self.original(*arguments)
        return {**functions, self.kernel: Watched(functions[self.kernel], self.h)}


@dataclass(frozen=True)
class Watched:
    function: Any
    h: Any

    @property
    def ptr(self) -> int:
        """Its address, which is asked for at each launch."""
        self.h.fill(np.nan)
        return self.function.ptr


@pytest.mark.parametrize(
    "kernel, text, bias, least, most",
    [
        ("mend", "chunk=64", 0.0, 0, 0),
        ("settle", "chunk=64,warm_up=8", 0.0, 0, 0),
        ("mend", "chunk=64,warm_up=8", 0.0, 1, 48),
        ("settle", "chunk=64,warm_up=8", 8.0, 64, 64),
    ],
)
def test_only_what_was_wrong_runs_once_more(place, kernel, text, bias, least, most, monkeypatch):
    """Each chunk up to the step where both states are the same, and none that began with the right one."""
    monkeypatch.setenv("SRU_RT_PLAN", text)
    problem = scaled("float32", 6 * 64, 1.22, bias)
    h = place.xp.empty((6 * 64, 2, 2 * 16), "float32")
    monkeypatch.setattr(launch_gpu, "load", Watch(kernel, h))
    sru_rt.sru_recurrence(**place.put(problem.given), time_parallel=True, out=(h, None))
    found = place.get(h).reshape(6, 64, 2, 2, 16)
    found = np.stack([found[:, :, :, 0], found[::-1, ::-1, :, 1]])  # as each direction goes
    written = ~np.isnan(found)
    steps = written.sum(2)
    assert np.array_equal(written, np.arange(64)[:, None, None] < steps[:, :, None])
    assert not steps[:, 0].any() and steps.max() <= most
    again = steps[:, 1 if kernel == "mend" else 2 :]  # mend() has put right the chunk after the first one
    assert np.mean(again >= least) > 0.9


@pytest.mark.parametrize("place", ["emulated"], indirect=True)
@pytest.mark.parametrize("bias", [0.0, 8.0])
def test_the_host_launches_the_same_and_waits_for_nothing(place, bias, monkeypatch):
    """Whether guesses are right or wrong."""
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=64,warm_up=64")
    given = place.put(scaled("float32", 300, 1.22, bias).given)
    fake_cupy.record.clear()
    sru_rt.sru_recurrence(**given, time_parallel=True)
    assert [kernel for kernel, *_ in fake_cupy.record.launches] == ["forward", "mend", "settle"]
    assert fake_cupy.record.reads == []


# ----------------------------------------------------------------------------------------------------------------------
# Cells of one's own


def cubic(g, u, c):
    c = g * c * c * c + u
    return c, c


def accumulate(g, u, c):
    c = relu(c + g) + u
    return c, 1 / c


def tangled(g, u, p, q, r):
    p, q, r = tanh(q + g), tanh(r - p), 0.9 * r + tanh(p * u)
    return p, q, r, p + q * r


OWN = {
    "cubic": Cell("cubic", cubic, (Array("u", "gates", ("g", "u")), *own.states("c"))),
    "accumulate": Cell("accumulate", accumulate, (Array("u", "gates", ("g", "u")), *own.states("c"))),
    "tangled": Cell("tangled", tangled, (Array("u", "gates", ("g", "u")), *own.states("p", "q", "r"))),
}


def own_problem(name: str, what: str, dtype: str) -> Operands:
    L, B, D, d = 90, 2, 2, 6
    rng = np.random.default_rng(5)
    u = rng.normal(size=(L, B, D, 2, d)).astype(dtype)
    state = np.float64 if dtype == "float64" else np.float32
    c0 = [rng.normal(size=(D, B, d)).astype(state) for _ in OWN[name].state]
    if what == "zeros":  # which keep their sign
        u[..., 0, :], u[..., 1, :], c0[0][:] = 1, -0.0, -0.0
    if what == "overflow":  # to infinities of either sign, and their difference
        u[..., 0, :] = 4
    if what == "nan":
        c0[0][..., ::2], u[30, :, :, 1, 3] = np.nan, np.nan
    if what == "infinite":
        c0[0][..., ::2], u[::7, :, :, 1, 3] = -np.inf, np.inf
    return Operands(OWN[name], dtype, {"u": u}, c0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("what", ["plain", "zeros", "overflow", "nan", "infinite"])
@pytest.mark.parametrize("name", OWN)
def test_own_cells(place, name, what, dtype, monkeypatch):
    given = own_problem(name, what, dtype)
    for text, every in (("chunk=8,warm_up=3", 1), ("chunk=13,warm_up=20,width=1,depth=1", 3)):
        monkeypatch.setenv("SRU_RT_PLAN", text)
        wanted = of_operands(place, given, False, every)
        assert not differing(of_operands(place, given, True, every), wanted)
