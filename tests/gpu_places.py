"""Where the GPU's kernels are tested: under the emulation, on any machine, and on a GPU. Both take the same tests.

A test asks for the fixture `place` (see conftest.py), moves NumPy arrays there, calls the public functions, and moves
the results back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu import emulator, fake_cupy
from problems import CELLS, FULL, Cell, Problem, Row, compare
from sru_rt import choose, launch_gpu, on_cupy, plan, shared_memory


@dataclass(frozen=True)
class Place:
    """`xp` is CuPy, or what stands in for it."""

    name: str
    xp: Any

    def put(self, value: Any) -> Any:
        """`value` with NumPy arrays replaced by arrays of the place; in dicts and tuples, too."""
        if isinstance(value, dict):
            return {name: self.put(v) for name, v in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self.put, value))
        return self.xp.array(value) if isinstance(value, np.ndarray) else value

    def get(self, value: Any) -> Any:
        """The inverse of `put`."""
        if isinstance(value, dict):
            return {name: self.get(v) for name, v in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self.get, value))
        return value.get() if isinstance(value, self.xp.ndarray) else value

    def without_pool(self) -> AbstractContextManager[Any]:
        """Gives each array memory of its own from the driver, so that tools see where it ends; so it always is in the
        emulation."""
        return self.xp.cuda.using_allocator(None) if self.name == "gpu" else nullcontext()


@functools.cache
def why_no_gpu() -> str:
    """Why nothing can run on a GPU here; empty where it can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # the driver is missing, or too old
        return f"CuPy finds no GPU: {error}"
    return "" if found else "CuPy finds no GPU"


@contextmanager
def at(name: str, monkeypatch: pytest.MonkeyPatch, cache_of: Callable[[str], Path]) -> Iterator[Place]:
    """The place, with an empty cache of kernels at first, and every array that the library makes filled with NaN.

    Skips the test where the place cannot be had.
    """
    if reason := why_no_gpu() if name == "gpu" else emulator.why_not():
        pytest.skip(reason)
    monkeypatch.setenv("SRU_RT_CACHE_DIR", str(cache_of(name)))  # the code of one place is none in the other
    monkeypatch.delenv("SRU_RT_PLAN", raising=False)
    forget_kernels()
    try:
        if name == "gpu":
            import cupy

            monkeypatch.setattr(on_cupy.CuPy, "empty", _poisoned)
            yield Place(name, cupy)
        else:
            with fake_cupy.installed(monkeypatch) as module:  # its empty() fills with NaN by itself
                yield Place(name, module)
    finally:
        forget_kernels()


def _poisoned(library: Any, shape: Any, dtype: Any) -> Any:
    array = library.xp.empty(shape, dtype)
    if array.nbytes:
        array.data.memset_async(0xFF, array.nbytes)  # a NaN in every floating-point format
    return array


def forget_kernels() -> None:
    """Plans and loaded kernels are remembered for a process; but they belong to one place."""
    launch_gpu._launches.clear()
    launch_gpu._load.cache_clear()
    launch_gpu.device_facts.cache_clear()
    plan._batches.clear()
    choose.choose.cache_clear()
    choose.too_long.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# Plans


@dataclass(frozen=True)
class Way:
    """How a recurrence is run; none of it may change a bit of the results."""

    plan: str = ""  # SRU_RT_PLAN
    own_batch: bool = True  # the batch size is compiled in
    shared: bool = True  # recomputed states go to shared memory
    save: Any = True

    def go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SRU_RT_PLAN", self.plan)
        monkeypatch.setattr(plan, "MAX_BATCHES", 8 if self.own_batch else 0)
        monkeypatch.setattr(shared_memory, "SHARED_BYTES", 48 << 10 if self.shared else 0)
        forget_kernels()


# ----------------------------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Result:
    """What a forward and a backward gave, on the host."""

    h: np.ndarray
    last: np.ndarray  # the state
    gradients: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.gradients[name]

    def bits(self) -> dict[str, Any]:
        """Everything, by name, such that equal results are equal bits."""
        arrays = {"h": self.h, "last": self.last} | {f"d{n}": a for n, a in self.gradients.items()}
        return {n: None if a is None else (a.dtype.name, a.shape, a.tobytes()) for n, a in arrays.items()}


def run(
    place: Place,
    problem: Problem,
    *,
    save: Any = True,
    need: Any = None,
    layer: bool = False,
    **more: Any,
) -> Result:
    """Forward and backward of a problem at a place. What it was given must be as before afterwards."""
    given, seeds = place.put(problem.given), place.put(problem.seeds)
    result = place.get(on_device(given, seeds, cell=problem.cell, save=save, need=need, layer=layer, **more))
    unchanged(place, given, problem.given)
    unchanged(place, seeds, problem.seeds)
    return Result(*result)


def on_device(
    given: Mapping[str, Any],
    seeds: Mapping[str, Any],
    *,
    cell: Cell = CELLS["sru"],
    save: Any = True,
    need: Any = None,
    layer: bool = False,
    **more: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """h, the last state, and the gradients by name, of arrays that are there already."""
    h, last, saved = cell.library("forward" if layer else "recurrence")(**given, save=save, **more)
    gradients = cell.library("backward")(saved, **seeds, need=need)
    return h, last, {name: getattr(gradients, name) for name in gradients}


def unchanged(place: Place, arrays: Mapping[str, Any], originals: Mapping[str, Any]) -> None:
    for name, original in originals.items():
        if isinstance(original, np.ndarray):
            assert place.get(arrays[name]).tobytes() == original.tobytes(), f"{name} was written to"


def judge(problem: Problem, result: Result, layer: bool = False) -> None:
    """Holds results and gradients against the oracle."""
    compare(problem, (result.h, result.last), result, layer)


def same(results: Mapping[Any, Result]) -> None:
    """Fails unless all results, by what they come from, have the same bits."""
    (first, wanted), *others = ((origin, result.bits()) for origin, result in results.items())
    for origin, bits in others:
        different = [name for name in wanted if bits[name] != wanted[name]]
        assert not different and bits.keys() == wanted.keys(), f"{origin} and {first} differ in {different}"


# A small matrix for tools that slow kernels down: between them all kinds of array, dtypes, ways to keep states, and
# widths; blocks that are full and blocks that are not; more sequences than sum_partials has rows of threads.
SMALL: dict[str, tuple[Row, tuple[int, int, int], int, str, Way]] = {
    # options, (L, B, d), D, layout, way
    "plain": (FULL["sru"] | {"dtype": "float32"}, (5, 11, 7), 2, "plain", Way("threads=32,depth=4")),
    "pairs": (FULL["sru"] | {"dtype": "bfloat16"}, (9, 3, 34), 1, "all", Way("threads=32,width=2,depth=4")),
    "recomputed": (
        FULL["sru"] | {"dtype": "float16", "kind": "projected"},
        (7, 2, 33),
        2,
        "all",
        Way("threads=32,depth=4", save=3),
    ),
    "recomputed_pairs": (
        FULL["sru"] | {"dtype": "float16", "kind": "no_skip", "activation": "tanh"},
        (7, 9, 6),
        1,
        "lengths",
        Way("threads=32,width=2,depth=4", own_batch=False, shared=False, save=4),
    ),
    "staged": (
        FULL["sru"] | {"dtype": "float32"},
        (13, 2, 19),
        2,
        "lengths",
        Way("threads=32,depth=2,staged=1", save=5),
    ),
    "staged_by_warps": (
        FULL["minlstm"] | {"dtype": "bfloat16"},
        (13, 2, 64),
        1,
        "all",
        Way("threads=32,width=1,depth=2,staged=1", save=5),
    ),
    "paired": (
        FULL["qrnn"] | {"dtype": "bfloat16"},
        (23, 2, 64),
        1,
        "all",
        Way("threads=32,width=1,depth=2,staged=2", save=5),
    ),
    "paired_reverse": (
        FULL["minlstm"] | {"dtype": "float32"},
        (11, 1, 32),
        2,
        "lengths",
        Way("threads=32,width=1,depth=3,staged=3", save=7),
    ),
    "staged_by_neighbours": (
        FULL["qrnn"] | {"dtype": "bfloat16"},
        (13, 2, 10),
        1,
        "plain",
        Way("threads=32,width=1,depth=2", save=5),
    ),
    "ring": (
        FULL["minlstm"] | {"dtype": "float32"},
        (19, 3, 32),
        2,
        "all",
        Way("threads=32,laps=4"),
    ),
    "ring_of_pairs": (
        FULL["sru"] | {"dtype": "bfloat16"},
        (29, 2, 64),
        1,
        "lengths",
        Way("threads=32,width=2,laps=5"),
    ),
    "per_step": (
        FULL["sru"] | {"dtype": "float64", "v": "inputs", "dropout": True, "reset_on": "current"},
        (6, 2, 5),
        2,
        "reset",
        Way("threads=32,depth=4"),
    ),
    "basic": (
        FULL["sru"] | {"dtype": "float32", "kind": "basic", "v": "none", "bias": False, "activation": "relu"},
        (1, 5, 3),
        1,
        "mask",
        Way("threads=32"),
    ),
    "qrnn": (FULL["qrnn"] | {"dtype": "float32"}, (5, 9, 7), 2, "all", Way("threads=32,depth=4")),
    "qrnn_recomputed_pairs": (
        FULL["qrnn"] | {"dtype": "bfloat16", "form": "ifo-projected", "zoneout": "bool"},
        (7, 2, 34),
        1,
        "mask",
        Way("threads=32,width=2,depth=4", save=3),
    ),
    "mingru": (
        FULL["mingru"] | {"dtype": "float16", "candidate": "positive"},
        (6, 3, 6),
        2,
        "lengths",
        Way("threads=32,width=2,depth=2", own_batch=False),
    ),
    "minlstm": (
        FULL["minlstm"] | {"dtype": "float32"},
        (7, 3, 5),
        2,
        "reset",
        Way("threads=32,depth=4", shared=False, save=4),
    ),
}


def small_problem(name: str) -> Problem:
    options, size, D, layout, _ = SMALL[name]
    return Problem.make(options, size, D, layout)


def random_problem(dtype: str, L: int, B: int, D: int, d: int, seed: int = 0, **row: Any) -> Problem:
    """A recurrence with every parameter, of any size, and no padding; of an SRU, if `row` does not say otherwise."""
    full = FULL[row.get("cell", "sru")]
    return Problem.make(full | row | {"dtype": dtype}, (L, B, d), D, "plain", state=True, seed=seed)
