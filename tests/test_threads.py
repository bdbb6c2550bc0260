"""Threads of the compiled kernels: the same bits however the work is cut, forks, several callers, and the end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

import sru_rt
from sru_rt import launch
from sru_rt.cell import Array, Cell

GRADIENTS = ("u", "x", "bias", "v", "c0")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")


def operands(L, B, D, d, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"u": (L, B, D, 3, d), "x": (L, B, D * d), "bias": (D, 2, d), "v": (D, 2, d), "c0": (D, B, d)}
    arrays = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    return arrays | {"lengths": rng.integers(0, L + 1, B), "reset": rng.random((L, B)) < 0.1}


def results(given, save=True) -> list[bytes]:
    """The bytes of h, c_last and all gradients."""
    h, c_last, saved = sru_rt.sru_recurrence(**given, save=save, alpha=1.5)
    gradients = sru_rt.sru_backward(saved, h, c_last)
    return [a.tobytes() for a in (h, c_last, *(getattr(gradients, name) for name in GRADIENTS))]


class Cuts:
    """The numbers of tasks into which the work was cut."""

    def __init__(self, monkeypatch):
        self.seen = []
        monkeypatch.setattr(launch, "_ELEMENTS_PER_TASK", 1)
        share = launch.share

        def noted(*given):
            found = share(*given)
            self.seen.append(found[1])
            return found

        monkeypatch.setattr(launch, "share", noted)


@pytest.fixture
def cuts(monkeypatch):
    return Cuts(monkeypatch)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float64], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("save", [True, 3, "x"])
@pytest.mark.parametrize(
    "size",
    [
        (7, 16, 1, 33),  # every number of threads cuts it by sequences
        (5, 1, 1, 70),  # by channels; with 8 threads some have none
        (9, 3, 2, 40),  # 6 rows: by sequences up to 5 threads, by channels with 8
        (4, 1, 2, 1),  # one channel
    ],
    ids=str,
)
def test_bits_do_not_depend_on_threads(size, save, dtype, cuts, monkeypatch):
    given = operands(*size, dtype=dtype)
    wanted = None
    for n in (1, 2, 3, 5, 8):
        monkeypatch.setenv("SRU_RT_NUM_THREADS", str(n))
        got = results(given, save)
        wanted = wanted or got
        assert got == wanted, f"{n} threads"
    assert cuts.seen == [n for n in (1, 2, 3, 5, 8) for _ in ("forward", "backward")]


@pytest.mark.parametrize("size", [(40, 16, 1, 2048), (40, 2, 1, 16384)], ids=["sequences", "channels"])
def test_bits_of_large_results_do_not_depend_on_threads(size, monkeypatch):
    """Large results are written past the caches; the number of tasks follows from the size alone."""
    given = operands(*size)
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "1")
    wanted = results(given)
    for n in (3, 8):
        monkeypatch.setenv("SRU_RT_NUM_THREADS", str(n))
        assert results(given) == wanted, f"{n} threads"


@pytest.mark.parametrize("callers", [2, 8])
def test_callers_at_once_get_their_own_results(callers, cuts, monkeypatch):
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "3")
    # The last one is larger than what the system's allocator keeps, so that callers share freed memory.
    given = [operands(6, 5, 2, 40 + seed, seed=seed) for seed in range(callers - 1)] + [operands(64, 8, 1, 1024)]
    wanted = [results(g) for g in given]
    together = threading.Barrier(callers)

    def call(i):
        together.wait(60)
        return [results(given[i]) == wanted[i] for _ in range(20)]

    with ThreadPoolExecutor(callers) as threads:
        for right in [threads.submit(call, i) for i in range(callers)]:
            assert all(right.result(timeout=120))
    assert max(cuts.seen) == 3


def test_callers_at_once_share_one_trace_of_a_cell():
    """Nodes of two traces are different, and one of them does not know the other's values."""
    calls, second_is_inside, first_is_done = [], threading.Event(), threading.Event()

    def step(u, c):
        calls.append(None)
        if len(calls) == 1:
            second_is_inside.wait(5)
        else:
            second_is_inside.set()
            first_is_done.wait(5)
        return c + u, c

    cell = Cell("slow", step, (Array("u", "gates", ("u",)), Array("c0", "state", ("c",))))

    def trace():
        formula = cell.formula
        first_is_done.set()
        return formula

    with ThreadPoolExecutor(2) as threads:
        formulas = [f.result(timeout=60) for f in [threads.submit(trace) for _ in range(2)]]
    assert formulas[0] is formulas[1] is cell.formula


# ----------------------------------------------------------------------------------------------------------------------
# In processes of their own: what hangs is killed there, with the stacks of its threads.

PRELUDE = """
import faulthandler, os, signal, threading, time, warnings
faulthandler.register(signal.SIGALRM, chain=True)
signal.alarm(60)
import numpy as np
import sru_rt
from sru_rt import launch
launch._ELEMENTS_PER_TASK = 1
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # it is, on purpose

def work(dtype="float32", d=33):
    rng = np.random.default_rng(0)
    u, c0 = (rng.normal(size=shape).astype(dtype) for shape in ((9, 4, 1, 3, d), (1, 4, d)))
    h, c_last, saved = sru_rt.sru_recurrence(u, c0=c0, highway=False, save=True)
    gradients = sru_rt.sru_backward(saved, h, c_last)
    return b"".join(a.tobytes() for a in (h, c_last, gradients.u, gradients.c0))

def fork(function):
    # The child goes the whole way to the end of the interpreter, as a program does that calls os.fork().
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        function()
        raise SystemExit(0)
    return pid

def join(pid):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with status {status}"

def same():
    assert work() == wanted, "the child's results differ"

def same_with_workers():
    same()
    if os.path.isdir("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 3, "the child has no threads of its own"
"""


def run(code: str, **environment: str) -> str:
    """Runs a program, which must end by itself with status 0 and without a word to standard error."""
    settings = {"OPENBLAS_NUM_THREADS": "1", "SRU_RT_NUM_THREADS": "3"} | environment
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env={k: v for k, v in (os.environ | settings).items() if v},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"status {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
    return done.stdout


@needs_fork
def test_fork_after_use():
    run("""
        wanted = work()
        join(fork(same_with_workers))
        join(fork(lambda: (same(), join(fork(same_with_workers)))))  # a child's child
        same()
        join(fork(same))
    """)


@needs_fork
def test_fork_while_another_thread_is_inside_the_pool():
    run("""
        wanted = work()
        going, calls = True, 0

        def keep_busy():
            global calls
            while going:
                same()
                calls += 1

        threads = [threading.Thread(target=keep_busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        while calls < 10:
            time.sleep(0.001)
        for child in [fork(same_with_workers) for _ in range(12)]:
            join(child)
        going = False
        for thread in threads:
            thread.join()
    """)


@needs_fork
def test_multiprocessing_by_fork():
    run("""
        import multiprocessing
        wanted = work()

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=same_with_workers) for _ in range(4)]
        for p in children:
            p.start()
        for p in children:
            p.join(60)
        assert [p.exitcode for p in children] == [0] * 4
    """)


@pytest.fixture
def slow_compiler(tmp_path) -> dict[str, str]:
    """Settings for a compiler that says when it begins and takes a second longer, and for an empty cache."""
    script = tmp_path / "slow++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-o*) touch {tmp_path}/begun; sleep 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return {
        "SRU_RT_CXX": str(script),
        "SRU_RT_CXXFLAGS": "-O0",
        "SRU_RT_CACHE_DIR": str(tmp_path / "cache"),
        "BEGUN": str(tmp_path / "begun"),
    }


@needs_fork
def test_fork_while_another_thread_compiles(slow_compiler, tmp_path):
    run(
        """
        wanted = None

        def compile_and_work():
            global wanted
            wanted = work()

        thread = threading.Thread(target=compile_and_work)
        thread.start()
        while not os.path.exists(os.environ["BEGUN"]):
            time.sleep(0.001)
        idle = fork(lambda: None)
        busy = fork(work)
        join(idle)
        join(busy)
        thread.join()
        assert wanted == work(), "the parent did not come to its results"
        """,
        **slow_compiler,
    )
    litter = [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".so"]
    assert not litter


@needs_fork
def test_fork_while_another_thread_traces_a_cell():
    run("""
        from sru_rt.cell import Array, Cell
        inside, go_on = threading.Event(), threading.Event()

        def slow_step(u, c):
            inside.set()
            go_on.wait()
            return u + c, u

        def step(u, c):
            return u + c, u

        arrays = (Array("u", "gates", ("u",)), Array("c", "state", ("c",)))
        slow, other = Cell("slow", slow_step, arrays), Cell("other", step, arrays)
        thread = threading.Thread(target=lambda: slow.formula, daemon=True)
        thread.start()
        inside.wait()
        child = fork(lambda: other.formula)
        join(child)
        go_on.set()
        thread.join()
        assert slow.formula.h is slow.formula.leaves["u"]
    """)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "settings, workers",
    [
        ({"SRU_RT_NUM_THREADS": "5", "OMP_NUM_THREADS": "2"}, 4),
        ({"SRU_RT_NUM_THREADS": "", "OMP_NUM_THREADS": "2"}, 1),
        ({"SRU_RT_NUM_THREADS": "", "OMP_NUM_THREADS": "3,2"}, 2),
        ({"SRU_RT_NUM_THREADS": "1", "OMP_NUM_THREADS": "4"}, 0),
        ({"SRU_RT_NUM_THREADS": "", "OMP_NUM_THREADS": "", "CORES": "1"}, 0),
    ],
)
def test_number_of_threads(settings, workers):
    out = run(
        """
        if os.environ.get("CORES"):
            os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
        before = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            work()
        print(len(os.listdir("/proc/self/task")) - before)
        """,
        **settings,
    )
    assert int(out) == workers


def test_small_work_stays_on_the_callers_thread(monkeypatch):
    monkeypatch.setenv("SRU_RT_NUM_THREADS", "8")
    monkeypatch.setattr(launch.compile_cpu, "pool", lambda: pytest.fail("woke the pool"))
    results(operands(4, 3, 1, 33))


def test_the_setting_is_read_at_each_call(cuts, monkeypatch):
    given = operands(4, 9, 1, 33)
    for n in ("2", "1", "4"):
        monkeypatch.setenv("SRU_RT_NUM_THREADS", n)
        results(given)
    assert cuts.seen == [2, 2, 1, 1, 4, 4]


def test_a_process_ends_after_use():
    run("work()")


def test_a_process_ends_after_use_by_a_thread():
    run("""
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    """)


@pytest.mark.parametrize("times", range(3))
def test_a_process_ends_while_a_daemon_thread_is_inside_a_call(times):
    run("""
        u = np.ones((200, 16, 1, 3, 512), np.float32)
        work()
        begun = threading.Event()

        def endless():
            while True:
                begun.set()
                sru_rt.sru_recurrence(u, highway=False)

        for _ in range(2):
            threading.Thread(target=endless, daemon=True).start()
        begun.wait()
        time.sleep(0.05)
    """)
