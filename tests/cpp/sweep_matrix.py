"""A small but wide matrix of recurrences, forward and backward, for processes whose C++ code is instrumented.

    python sweep_matrix.py CASE [CASE ...]

test_sanitizers.py starts it. Every array that a kernel reads or writes ends where its block of memory ends, so that a
lane too many is seen, and is aligned to one item only, so that a wrong assumption of alignment is seen. Rows of whole
packs begin at cache lines: only then are results written past the caches.
"""

from __future__ import annotations

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import sru_rt
from sru_rt import launch, on_numpy, turn
from sru_rt.dtypes import to_numpy

# One compiled kernel each; between them all kinds of array, all dtypes of arrays and of kept states.
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(dtype="float32", bias=True, v="params"),
    "tanh": dict(dtype="float64", bias=True, v="params", activation="tanh"),
    "projected": dict(dtype="bfloat16", bias=True, v="params", k=4),
    "no_skip": dict(dtype="float16", bias=True, v="params", highway=False),
    "basic": dict(dtype="float32", bias=True, v="none", k=2, reset_gate=False),
    "on_current": dict(dtype="bfloat16", bias=False, v="none", reset_on="current", saved_dtype="bfloat16"),
    "per_step": dict(dtype="float16", bias=True, v="wide", dropout=True, activation="relu"),
}
# L, B, D, d; the longest rows ask for memory within them, too.
SIZES = [(3, 1, 1, 1), (5, 3, 1, 7), (4, 2, 2, 17), (9, 1, 2, 533), (7, 4, 1, 64)]
POLICIES = [True, 3, "x", False]
PLACES = [(), ("lengths",), ("mask",), ("reset",), ("lengths", "mask", "reset")]
TASKS = ["1", "3"]


# That of the sanitizer, which puts forbidden bytes around each block. Blocks are never freed: there are few.
allocate = ctypes.CDLL(None).memalign
allocate.argtypes, allocate.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_void_p


def exact(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array filled with NaN that ends at the end of its block."""
    offset = 0 if shape and shape[-1] % 64 == 0 else dtype.itemsize
    n = int(np.prod(shape)) * dtype.itemsize + offset
    memory = np.frombuffer((ctypes.c_char * n).from_address(allocate(64, n)), np.uint8)
    memory.fill(0xFF)
    return memory[offset:].view(dtype).reshape(shape)


def placed(array: np.ndarray) -> np.ndarray:
    """A copy in memory of that kind."""
    copy = exact(array.shape, array.dtype)
    copy[...] = array
    return copy


def operands(case: dict[str, Any], L: int, B: int, D: int, d: int, rng: np.random.Generator) -> dict[str, Any]:
    """The arrays and options of one call of sru_recurrence."""
    dtype, k = to_numpy(case["dtype"]), case.get("k", 3)
    state = np.dtype(np.float64 if case["dtype"] == "float64" else np.float32)
    gated = 2 if case.get("reset_gate", True) else 1

    def draw(*shape: int, of: np.dtype[Any] = dtype) -> np.ndarray:
        return placed(rng.normal(size=shape).astype(of))

    values: dict[str, Any] = {"u": draw(L, B, D, k, d), "c0": draw(D, B, d, of=state)}
    if k == 3 and case.get("highway", True):
        values |= {"x": draw(L, B, D * d), "alpha": 1.5}
    if case["bias"]:
        values["bias"] = draw(D, gated, d, of=state)
    if case["v"] == "params":
        values["v"] = draw(D, gated, d, of=state)
    if case["v"] == "wide":
        values["v"] = draw(L, B, D, gated, d, of=state)
    if case.get("dropout"):
        values["dropout_mask"] = draw(B, D, d, of=state)
    return values | {name: case[name] for name in ("activation", "highway", "reset_gate", "reset_on") if name in case}


def places(names: tuple[str, ...], L: int, B: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Lengths from 0 to L, and marks at about every third step."""
    made = {name: placed(rng.random((L, B)) < 0.3) for name in ("mask", "reset") if name in names}
    return made | ({"lengths": placed(rng.integers(0, L + 1, B))} if "lengths" in names else {})


def run(case: dict[str, Any], size: tuple[int, int, int, int], save: Any, at: tuple[str, ...]) -> None:
    """One forward pass and, where states were kept, one backward pass; results must be numbers."""
    L, B, D, d = size
    rng = np.random.default_rng(L * d + len(at))
    options = operands(case, L, B, D, d, rng) | places(at, L, B, rng)
    result = sru_rt.sru_recurrence(**options, save=save, saved_dtype=case.get("saved_dtype"))
    arrays = list(result[:2])
    if save:
        dh = placed(rng.normal(size=result[0].shape).astype(result[0].dtype))
        dc_last = placed(rng.normal(size=result[1].shape).astype(result[1].dtype)) if D == 2 else None
        gradients = sru_rt.sru_backward(result[2], dh, dc_last)
        arrays += [getattr(gradients, name) for name in ("u", "x", "bias", "v", "c0") if name in options]
    for array in arrays:
        assert np.isfinite(np.asarray(array, np.float64)).all()


def layer(dtype: str) -> None:
    """With the projection, U dropped in between and formed again."""
    rng = np.random.default_rng(0)
    params = sru_rt.sru_init(7, 17, directions=2, dtype=dtype, rng=rng)
    x = placed(rng.normal(size=(37, 3, 7)).astype(to_numpy(dtype)))  # more steps than one recomputed piece has
    h, _, saved = sru_rt.sru_forward(x, **params, save="x")
    sru_rt.sru_backward(saved, placed(h))


def turns() -> None:
    """Matrices with all kinds of edges, turned."""
    for n, rows, columns in [(1, 33, 49), (5, 3, 70), (5, 70, 3), (1, 1, 1), (2, 16, 64)]:
        matrices = placed(np.arange(n * rows * columns, dtype=np.float32).reshape(n, rows, columns))
        found = exact((n, columns, rows), matrices.dtype)
        assert turn.turn(matrices.ctypes.data, found.ctypes.data, n, rows, columns)
        assert np.array_equal(found, matrices.swapaxes(1, 2))


def main(names: list[str]) -> None:
    on_numpy.empty = exact
    launch._ELEMENTS_PER_TASK = 1
    n = 0
    for name in names:
        # Each size meets each policy, and both meet each number of tasks.
        for i in range(len(SIZES) * len(POLICIES)):
            os.environ["SRU_RT_NUM_THREADS"] = TASKS[i // 4 % 2]
            run(CASES[name], SIZES[i % 5], POLICIES[i % 4], PLACES[(i + i // 5) % 5])
            n += 1
    os.environ["SRU_RT_NUM_THREADS"] = "3"
    turns()
    if "projected" in names:
        layer(CASES["projected"]["dtype"])
    with ThreadPoolExecutor(2) as callers:
        for done in [callers.submit(run, CASES[name], SIZES[-1], True, ()) for name in names for _ in range(10)]:
            done.result()
    print(f"ran {n} recurrences of {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
