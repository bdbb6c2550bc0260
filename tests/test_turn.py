"""Matrices that the core turns, for every width of vectors."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import numpy as np
import pytest

from sru_rt import compile_cpu, turn

SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 33, 64)
FLAGS = ["-march=native"]
if platform.machine() == "x86_64":
    FLAGS.append("-march=x86-64")


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    def forget() -> None:
        turn._entry.cache_clear()
        compile_cpu.turn.cache_clear()

    forget()
    yield
    forget()


def turned(matrices: np.ndarray) -> np.ndarray:
    """By the kernel; what lies around the result must be as it was."""
    n, rows, columns = matrices.shape
    around = np.full(matrices.size + 2, -1, matrices.dtype)
    assert turn.turn(matrices.ctypes.data, around[1:].ctypes.data, n, rows, columns)
    assert around[0] == around[-1] == -1
    return around[1:-1].reshape(n, columns, rows)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_matrices_are_turned(compiled_anew, flags, tasks, monkeypatch, request):
    monkeypatch.setenv("SRU_RT_CXXFLAGS", flags)
    if tasks > 1:
        request.getfixturevalue("many_tasks")
    for n in (0, 1, 2, 7):
        for rows in SIZES:
            for columns in SIZES:
                matrices = np.arange(n * rows * columns, dtype=np.int32).reshape(n, rows, columns)
                assert np.array_equal(turned(matrices), matrices.swapaxes(1, 2)), (n, rows, columns)


def test_bits_are_kept(compiled_anew):
    bits = np.random.default_rng(0).integers(0, 2**32, (1, 48, 80), np.uint32)  # of NaNs, too
    assert np.array_equal(turned(bits.view(np.float32)).view(np.uint32), bits.swapaxes(1, 2))


def test_nothing_is_turned_without_a_compiler(compiled_anew, monkeypatch):
    monkeypatch.setenv("SRU_RT_CXX", "no-such-compiler")
    assert not turn.turn(0, 0, 1, 1, 1)
    monkeypatch.delenv("SRU_RT_CXX")
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    assert not turn.turn(0, 0, 1, 1, 1)
