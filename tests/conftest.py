"""Every array that the library makes is filled with NaN first, so that a value it fails to write is seen."""

from __future__ import annotations

import os

import numpy as np
import pytest

from sru_rt import memory, on_numpy, repeat


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One process where tests run on a GPU: some fill its memory, and others want to find it free. Else all cores."""
    import gpu_places

    return 0 if "not gpu" not in config.getoption("markexpr") and not gpu_places.why_no_gpu() else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Processes that are as many as the cores have no use for the threads of a BLAS; they inherit the environment."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def poisoned(shape, dtype, _empty=memory.empty):
    array = _empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF  # a NaN in every floating-point format
    return array


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    assert np.isnan(poisoned((3, 5), np.dtype(np.float32))).all()
    monkeypatch.setattr(on_numpy, "empty", poisoned)


@pytest.fixture(autouse=True)
def new_calls(monkeypatch):
    """The first call of a test is none like one before; what is remembered of others may belong to another place."""
    monkeypatch.setattr(repeat, "_repeats", {})


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


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    """Gives one folder for each name, empty at the start of the session."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
        return folders[name]

    return folder


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request, monkeypatch, kernel_cache):
    """Where the GPU's kernels run: see gpu_places.py."""
    import gpu_places

    with gpu_places.at(request.param, monkeypatch, kernel_cache) as it:
        yield it


@pytest.fixture
def poisoned_tensors(monkeypatch):
    """Tensors of the binding for PyTorch are filled with NaN before they are written, and nothing beyond their ends."""
    from sru_rt.bindings.torch import autograd, native

    margins, margin = [], 64

    def poisoned(tensor):
        if not autograd.is_eager(tensor):  # it has no values, or none of its own
            return tensor.fill_(np.nan)
        memory = tensor.new_full((tensor.numel() + 2 * margin,), np.nan)
        margins.extend((memory[:margin], memory[-margin:]))
        return tensor.set_(memory.untyped_storage(), margin, tensor.shape)

    allocate, empty_like = native._allocate, native._empty_like
    monkeypatch.setattr(native, "_allocate", lambda *args: [t if t is None else poisoned(t) for t in allocate(*args)])
    monkeypatch.setattr(native, "_empty_like", lambda tensor: poisoned(empty_like(tensor)))
    yield
    assert all(one.isnan().all() for one in margins), "something was written beyond the ends of a tensor"


@pytest.fixture
def new_plans(monkeypatch):
    """Plans hold the settings of when they were made."""
    from sru_rt.bindings.torch import native

    monkeypatch.setattr(native, "_plans", {})
