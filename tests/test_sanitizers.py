"""The compiled CPU code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and planted bugs.

A bug planted in a copy of the sources must be reported: otherwise a clean run of the sources themselves says nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import sru_rt
from sru_rt import source

pytestmark = pytest.mark.slow

MATRIX = Path(__file__).parent / "cpp" / "sweep_matrix.py"


@dataclass(frozen=True)
class Mode:
    """How a kernel is instrumented, and what its process needs."""

    flags: str
    runtime: tuple[str, ...]  # to be loaded before Python
    environment: dict[str, str]


# -O0 leaves every access in place and halves the time to compile, as do calls in place of inlined checks. Results of
# every size are written past the caches where they are aligned, and asked for before elsewhere.
MODES = {
    "address": Mode(
        "-DSRU_STREAMING_BYTES=64 -DSRU_FAR_BYTES=1 -O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all "
        "--param asan-instrumentation-with-call-threshold=0",
        ("libasan.so", "libstdc++.so"),  # the latter, because the former looks for its exceptions at the start
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=66", "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66"},
    ),
    "thread": Mode(
        "-DSRU_STREAMING_BYTES=64 -DSRU_FAR_BYTES=1 -O1 -g1 -fsanitize=thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
    ),
}
HEAP = r"AddressSanitizer: heap-buffer-overflow"
RACE = r"ThreadSanitizer: data race"


@dataclass(frozen=True)
class Job:
    """One process: the cases of the matrix that it runs, and the bug in its copy of the sources."""

    mode: str
    cases: str
    file: str = ""
    old: str = ""
    new: str = ""
    report: str = ""  # what the sanitizer must say


CLEAN = {
    "address, 1": Job("address", "plain tanh projected on_current"),
    "address, 2": Job("address", "no_skip basic per_step"),
    "thread": Job("thread", "plain projected basic per_step"),
}

PLANTED = {
    "load one pack too many": Job(
        "address",
        "basic",
        "cpu_sweep.h",
        "for (; j + real::width <= part.to; j += real::width)",
        "for (; j < part.to; j += real::width)",
        HEAP,
    ),
    "store a whole pack at the end of a row": Job(
        "address",
        "basic",
        "port_cpu.h",
        "  for (int i = 0; i < n; i++) p[i] = lanes[i];\n}\n\n// ---",
        "  store(p, a);\n}\n\n// ---",
        HEAP,
    ),
    "recompute one step too many": Job(
        "address",
        "basic",
        "cpu_sweep.h",
        "if (s + 1 < end) step_row",
        "step_row",
        HEAP,
    ),
    "take the natural alignment for granted": Job(
        "address",
        "basic",
        "port_cpu.h",
        "vector_size(sizeof(T) * W), aligned(sizeof(T)), may_alias",
        "vector_size(sizeof(T) * W), may_alias",
        r"runtime error: (load of|store to) misaligned address",
    ),
    "read one gate too many": Job(
        "address",
        "basic",
        "cpu_sweep.h",
        "for (int i = 0; i < Cell::n_gates; i++) gate[i] = (const Io *)",
        "for (int i = 0; i <= Cell::n_gates; i++) gate[i] = (const Io *)",
        r"runtime error: index \d+ out of bounds",
    ),
    "count elements in int": Job(
        "address",
        "basic",
        "cpu_sweep.h",
        "const index_t channels = a.L * a.B * a.D * a.d;",
        "const index_t channels = int(a.L) * int(a.B) * int(a.D) * int(a.d) * (1 << 30);",
        r"runtime error: signed integer overflow",
    ),
    "turn a whole tile at an edge": Job(
        "address",
        "basic",
        "turn.cpp",
        "if (width == tile && height == tile)",
        "if (width == tile || height == tile)",
        HEAP,
    ),
    "take a task without the lock": Job(
        "thread",
        "basic",
        "pool.cpp",
        "    const int i = p->next++;\n    const Task task = p->task;\n    void *const argument = p->argument;\n"
        "    pthread_mutex_unlock(&p->lock);\n",
        "    const Task task = p->task;\n    void *const argument = p->argument;\n"
        "    pthread_mutex_unlock(&p->lock);\n    const int i = p->next++;\n",
        RACE,
    ),
    "sum up in one row for all sequences": Job(
        "thread",
        "basic",
        "cpu_sweep.h",
        "partial_row(f, at.sequence, i)",
        "partial_row(f, 0, i)",
        RACE,
    ),
}


def preload(mode: Mode) -> str:
    """The run-time libraries of a mode for LD_PRELOAD. Skips the test where one is missing or does not work."""
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        pytest.skip("needs Linux and g++")
    found = []
    for name in mode.runtime:
        path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"g++ has no {name}")
        found.append(path)
    environment = os.environ | {"LD_PRELOAD": " ".join(found)} | mode.environment
    probe = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"Python does not start with {mode.runtime[0]}: {probe.stderr.strip()[:300]}")
    return " ".join(found)


def planted(job: Job, folder: Path) -> Path:
    """A copy of the package with the bug in it."""
    package = Path(sru_rt.__file__).parent
    copy = Path(shutil.copytree(package, folder / "sru_rt", ignore=shutil.ignore_patterns("__pycache__", "cuda")))
    sources = Path(shutil.copytree(source.cuda_dir(), copy / "cuda"))
    text = (sources / job.file).read_text()
    assert text.count(job.old) == 1, f"{job.old!r} does not stand in {job.file} exactly once; plant the bug anew"
    (sources / job.file).write_text(text.replace(job.old, job.new))
    return folder


def start(job: Job, libraries: str, folder: Path) -> subprocess.CompletedProcess[str]:
    mode = MODES[job.mode]
    environment = os.environ | mode.environment
    environment |= {
        "LD_PRELOAD": libraries,
        "SRU_RT_CPU": "compiled",
        "SRU_RT_CXX": "g++",
        "SRU_RT_CXXFLAGS": mode.flags,
        "SRU_RT_CACHE_DIR": str(folder / "cache"),
        "OPENBLAS_NUM_THREADS": "1",  # its threads are not instrumented, so they would be reported
    }
    if job.file:
        environment["PYTHONPATH"] = str(planted(job, folder / "tree"))
    command = [sys.executable, str(MATRIX), *job.cases.split()]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture
def outcome(tmp_path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a job, and gives what its process did."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        job = (CLEAN | PLANTED)[name]
        return start(job, preload(MODES[job.mode]), tmp_path)

    return run


@pytest.mark.parametrize("name", CLEAN)
def test_the_sources_are_clean(name, outcome):
    done = outcome(name)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "Sanitizer" not in done.stderr, done.stderr[-4000:]
    cases = CLEAN[name].cases.split()
    assert done.stdout.split("\n")[0] == f"ran {20 * len(cases)} recurrences of {', '.join(cases)}"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_reported(name, outcome):
    done = outcome(name)
    assert re.search(PLANTED[name].report, done.stderr), f"status {done.returncode}\n{done.stderr[-4000:]}"
    assert done.returncode == 66
