"""Kernels on the threads of PyTorch: they run there, and neither forks nor small teams do harm."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import sru_rt
from sru_rt import compile_cpu, launch

torch = pytest.importorskip("torch", reason="needs PyTorch")
from sru_rt.bindings.torch import native

OPENMP = "OpenMP" in torch.__config__.parallel_info().partition("ATen parallel backend:")[2]
pytestmark = [
    pytest.mark.usefixtures("new_plans"),
    pytest.mark.skipif(not (OPENMP and sys.platform == "linux"), reason="needs PyTorch with OpenMP on Linux"),
]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    monkeypatch.delenv("SRU_RT_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "_ELEMENTS_PER_AWAKE_TASK", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def results(leaves: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    u, bias = leaves = leaves or made()
    h, last = sru_rt.sru_recurrence(u, bias=bias, highway=False)
    return [h, last, *torch.autograd.grad((h * h).sum() + last.sum(), leaves)]


def made() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((9, 4, 1, 3, 33), (1, 2, 33))]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.fixture
def wanted(monkeypatch) -> list[torch.Tensor]:
    """Of one thread, of the library's own."""
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "1")
    found = results()
    native._plans.clear()
    monkeypatch.delenv("SRU_RT_NUM_THREADS")
    return found


def test_the_same_bits_on_threads_of_pytorch(wanted, monkeypatch):
    monkeypatch.setattr(compile_cpu, "pool", lambda: pytest.fail("woke the library's own threads"))
    assert native._threads() == (native._openmp(), 3) and native._openmp()
    assert same(results(), wanted)


def test_a_number_of_threads_that_is_asked_for_is_of_the_librarys_own(wanted, monkeypatch):
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "2")
    monkeypatch.setattr(launch, "_ELEMENTS_PER_TASK", 1)
    asked = []
    pool = compile_cpu.pool
    monkeypatch.setattr(compile_cpu, "pool", lambda: asked.append(True) or pool())
    assert native._threads() is None
    assert same(results(), wanted) and asked == [True, True]


def test_without_openmp_the_librarys_own_threads_do_the_work(wanted, monkeypatch):
    def no_openmp(library):
        raise AttributeError("GOMP_parallel")

    monkeypatch.setattr(compile_cpu, "openmp_pool", no_openmp)
    native._openmp.cache_clear()
    try:
        assert native._threads() is None
        assert same(results(), wanted)
    finally:
        native._openmp.cache_clear()


def test_several_callers_at_once(wanted):
    right: list[bool] = []
    callers = [
        threading.Thread(target=lambda: right.extend([same(results(), wanted) for _ in range(20)])) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(right) == 80 and all(right)


PRELUDE = """
import faulthandler, os, signal
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm(100)
import torch
import sru_rt
from sru_rt import launch
from sru_rt.bindings.torch import native
launch._ELEMENTS_PER_AWAKE_TASK = 1
torch.set_num_threads(3)
u = torch.linspace(-2, 2, 9 * 4 * 3 * 33).view(9, 4, 1, 3, 33).requires_grad_()

def work():
    h, last = sru_rt.sru_recurrence(u, highway=False)
    return [h.detach(), last.detach(), *torch.autograd.grad((h * h).sum() + last.sum(), [u])]

def same():
    assert all(torch.equal(a, b) for a, b in zip(work(), wanted))

def fork(function):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        torch.set_num_threads(1)  # as PyTorch's own loaders of data do: its operations would hang
        function()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with status {status}"
"""


def run(code: str, folder: Path, **environment: str) -> str:
    """Runs a program in a folder where only what is installed is found."""
    left_out = ("SRU_RT_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in left_out} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
    return done.stdout


@needs_fork
def test_a_forked_child_has_threads_of_its_own(tmp_path):
    """A team of OpenMP is gone in a child, which would wait for it for ever."""
    run(
        """
        wanted = work()
        assert native._threads()
        fork(same)
        fork(lambda: fork(same))
        same()
    """,
        tmp_path,
    )


def test_a_smaller_team_does_all_of_the_work(tmp_path):
    run(
        """
        wanted = work()
        assert native._threads().number == 3
        os.environ["SRU_RT_NUM_THREADS"] = "1"
        native._plans.clear()
        same()
        """,
        tmp_path,
        OMP_THREAD_LIMIT="2",
    )
