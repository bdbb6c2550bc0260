"""Memory that large arrays leave is used again, within a limit, and never while an array stands on it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import sru_rt
from sru_rt import memory
from sru_rt.errors import ArgumentError

LARGE = (1 << 20,)  # of float32: 4 MiB


@pytest.fixture(autouse=True)
def no_free_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_free", [])


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def empty(shape=LARGE, dtype="f4"):
    return memory.empty(shape, np.dtype(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (7, 11), (3, 1367), LARGE])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1"])
def test_arrays_are_plain_aligned_and_writable(shape, dtype):
    array = empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and type(array) is np.ndarray
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
    assert address(array) % 64 == 0 or array.nbytes <= memory._SMALL
    array[...] = 1
    assert (array == 1).all()


def test_large_arrays_begin_in_the_middle_of_a_page():
    """No lines after arrays of NumPy, whose loads would wait for stores: see `memory`."""
    arrays = [empty((n,), "u1") for n in (1 << 20, (1 << 20) + 1, 3 << 20, 40 << 20)]
    assert {address(a) % 4096 for a in arrays} == {2048}


def test_a_large_array_takes_the_place_of_one_that_is_gone():
    first = empty()
    place = address(first)
    del first
    assert address(empty()) == place


def test_memory_is_not_reused_while_a_view_stands_on_it():
    first = empty()
    first[...] = 7
    view = first[10:20]
    del first
    second = empty()
    second[...] = 0
    assert (view == 7).all()


def test_a_block_is_not_taken_for_something_much_smaller_or_larger():
    first = empty()
    place = address(first)
    del first
    small, large = empty((1 << 19,)), empty((1 << 21,))
    assert place not in (address(small), address(large))
    assert address(empty(((1 << 20) - 1000,))) == place


def test_what_is_kept_stays_within_the_limit(monkeypatch):
    monkeypatch.setenv("SRU_RT_POOL_MB", "10")
    arrays = [empty() for _ in range(5)]
    del arrays
    assert 0 < sum(block.nbytes for block in memory._free) <= 10 << 20
    monkeypatch.setenv("SRU_RT_POOL_MB", "0")
    del [empty()][:]
    assert memory._free == []


def test_a_bad_limit_is_an_error(monkeypatch):
    monkeypatch.setenv("SRU_RT_POOL_MB", "many")
    with pytest.raises(ArgumentError, match=r"SRU_RT_POOL_MB.*'many'"):
        empty()


def test_threads_never_share_a_block():
    failures = []

    def work(value: int) -> None:
        for _ in range(200):
            array = empty()
            array[::1000] = value
            if not (array[::1000] == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_tensors_are_in_memory_that_is_used_again(dtype):
    """Tensors of PyTorch have it, too, and not before those that had it are gone."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    u = torch.randn(64, 32, 1, 2, 512, dtype=getattr(torch, dtype))
    (first, _), (second, _) = sru_rt.mingru_recurrence(u), sru_rt.mingru_recurrence(-u)
    wanted = first.clone(), second.clone()
    assert first.data_ptr() != second.data_ptr() and not memory._free
    leaf = u.clone().requires_grad_()
    h, _ = sru_rt.mingru_recurrence(leaf)
    (h * h).sum().backward()
    assert torch.equal(first, wanted[0]) and torch.equal(second, wanted[1]) and torch.equal(h, first)
    gradient = leaf.grad.clone()
    del first, second, h
    free = len(memory._free)
    third, _ = sru_rt.mingru_recurrence(u)
    assert len(memory._free) == free - 1
    assert torch.equal(third, wanted[0]) and torch.equal(leaf.grad, gradient)
