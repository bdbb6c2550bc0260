"""Every array that the library makes is filled with NaN first, so that a value it fails to write is seen."""

from __future__ import annotations

import numpy as np
import pytest

from sru_rt import memory, projection, recurrence


def poisoned(shape, dtype, _empty=memory.empty):
    array = _empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF  # a NaN in every floating-point format
    return array


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    assert np.isnan(poisoned((3, 5), np.dtype(np.float32))).all()
    for module in (recurrence, projection):
        monkeypatch.setattr(module, "empty", poisoned)


@pytest.fixture(params=["compiled", "numpy"])
def backend(request, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", request.param)
    return request.param


@pytest.fixture
def many_tasks(monkeypatch):
    """Cuts even the smallest recurrence into tasks."""
    from sru_rt import launch

    monkeypatch.setattr(launch, "_ELEMENTS_PER_TASK", 1)
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "3")
