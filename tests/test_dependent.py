"""Launches that let a kernel begin early: what the driver is given. On a GPU, test_decode.py is the test of them."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import pytest

from sru_rt import dependent

SIZES = (5, 4, 3, 128, 2, 1, 1000)


@pytest.fixture(autouse=True)
def forgotten():
    dependent.launcher.cache_clear()
    yield
    dependent.launcher.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    """A function in the place of cuLaunchKernelEx, with what it was given and what it is to return."""
    found = types.SimpleNamespace(seen=[], status=0)

    @ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)
    def entry(config: Any, function: Any, parameters: Any, extra: Any) -> int:
        # As cuda.h declares them: seven unsigned ints, a stream, a pointer to attributes of 72 bytes, their number.
        numbers = (ctypes.c_uint * 7).from_address(config)
        stream, attributes = (ctypes.c_void_p * 2).from_address(config + 32)
        (n,) = (ctypes.c_uint * 1).from_address(config + 48)
        words = (ctypes.c_int * 18).from_address(attributes)
        found.seen.append(([*numbers], stream, n, [*words], function, parameters, extra))
        return found.status

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(dependent._Config), *(ctypes.c_void_p,) * 3)
    library = types.SimpleNamespace(cuLaunchKernelEx=kind(ctypes.cast(entry, ctypes.c_void_p).value or 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    yield found


def test_what_the_driver_is_given(driver):
    launch = dependent.launcher(12030)
    assert launch is not None
    launch(0x1234, *SIZES, 0x5678, 0x9ABC, 0)
    assert driver.seen == [([*SIZES], 0x5678, 1, [6, 0, 1, *[0] * 15], 0x1234, 0x9ABC, None)]


def test_what_the_driver_refuses(driver):
    driver.status = 1
    launch = dependent.launcher(13000)
    assert launch is not None
    with pytest.raises(RuntimeError, match=r"refuses a launch of \(5, 4, 3, 128, 2, 1, 1000\) with CUresult 1"):
        launch(0x1234, *SIZES, 0, 0x9ABC, 0)


def test_an_older_driver_has_none(driver):
    assert dependent.launcher(12020) is None and not driver.seen


@pytest.mark.parametrize("missing", [OSError, AttributeError])
def test_without_the_drivers_library(missing, monkeypatch):
    def fail(name: str) -> Any:
        raise missing

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert dependent.launcher(13000) is None
