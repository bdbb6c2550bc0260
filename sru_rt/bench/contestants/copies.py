"""The yardstick: copies of the bytes of a recurrence."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ... import compile_gpu
from ...traffic import ITEMSIZE
from ..clocks import Call
from ..contest import APART, Against, Built, Contestant, Place
from ..problem import Problem, moved, streams

GPU_BYTES = 1 << 30
FAULTS = "page faults of 16 B/element"
SOME_BYTES = 32_000_000  # copied at least in one call: starting the threads costs next to nothing then


class Copy(Contestant):
    """On the CPU a memmove with the bytes and the footprint of a recurrence, half read and half written; on a GPU the
    faster of the driver's copy and a kernel's, from one large array to another."""

    name = "copy"
    process = "arrays"
    divides_work = True

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        if problem.of_layers:
            return ()
        if device == "gpu":
            return ("1 GiB",)
        widths = [f"{moved(problem, which) / problem.elements:g} B/element" for which in APART]
        return (*widths, *([FAULTS] if problem.name == "SRU" else []))

    def label(self, problem: Problem, which: str) -> str:
        return which if which == FAULTS else f"copy, {which}"

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        if which == FAULTS:
            return 0.0, ""
        return 1e-9 * (2 * GPU_BYTES if which == "1 GiB" else float(which.split()[0]) * problem.elements), "GB"

    def build(self, problem: Problem, place: Place) -> Built:
        if place.device == "gpu":
            return Built({"1 GiB": [_large_copy()]})
        return Built(_HostCopies(problem, place.threads))


class _HostCopies(dict[str, list[Call]]):
    """Copies of one problem, made when they are asked for: other cells want other widths."""

    def __init__(self, problem: Problem, threads: int) -> None:
        super().__init__()
        self._problem, self._threads = problem, threads

    def __missing__(self, which: str) -> list[Call]:
        self[which] = [_host_copy(self._problem, which, self._threads)]
        return self[which]


def _host_copy(problem: Problem, which: str, threads: int) -> Call:
    if which == FAULTS:

        def touch() -> None:
            for width in (12, 4):  # du and dx of SRU's backward
                np.empty(width * problem.elements, np.uint8)[::4096] = 0

        return touch
    half = int(float(which.split()[0]) * problem.elements) // 2
    source, target = np.ones((2, half), np.uint8)
    pool = ThreadPoolExecutor(threads)
    repeats = max(1, min(SOME_BYTES // half, 1000))

    def share(i: int) -> None:
        start, end = half * i // threads, half * (i + 1) // threads
        to, origin = target.ctypes.data + start, source.ctypes.data + start
        for _ in range(repeats):
            ctypes.memmove(to, origin, end - start)

    def copy() -> None:
        if threads == 1:
            share(0)
        else:
            list(pool.map(share, range(threads)))

    copy.repeats = repeats  # type: ignore[attr-defined]  # how often one call does the work
    return copy


def _large_copy(nbytes: int = 0) -> Call:
    """The faster way, by a few looks at each: in the first ones the clocks of the GPU may still be low."""
    cupy: Any = importlib.import_module("cupy")
    nbytes = nbytes or GPU_BYTES
    source, target = (cupy.empty((nbytes,), np.uint8) for _ in range(2))
    source.fill(0x5A)
    a, b, runtime = source.data.ptr, target.data.ptr, cupy.cuda.runtime

    def by_driver() -> None:
        stream = cupy.cuda.get_current_stream().ptr
        runtime.memcpyAsync(b, a, nbytes, runtime.memcpyDeviceToDevice, stream)

    def by_kernel() -> None:
        copy([a], [b], nbytes)

    def look(way: Call) -> float:
        begin.record()
        for _ in range(20):
            way()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end))

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    took = [(look(by_driver), look(by_kernel)) for _ in range(4)]
    fastest = (by_driver, by_kernel)[int(np.argmin(np.min(took, axis=0)))]
    fastest.keeps = source, target  # type: ignore[attr-defined]  # the memory lives as long as the call
    return fastest


class MatchedCopy(Contestant):
    """On a GPU, a kernel that reads and writes as many arrays as a pass, at once, and computes nothing."""

    name = "matched copy"
    process = "arrays"
    only = "gpu"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        return APART if device == "gpu" and not problem.of_layers and not problem.ragged else ()

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against("copy", "1 GiB", "of")

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        return 1e-9 * moved(problem, which), "GB"

    def build(self, problem: Problem, place: Place) -> Built:
        cupy: Any = importlib.import_module("cupy")
        calls: dict[str, list[Call]] = {}
        for which in APART:
            reads, writes = counts(problem, which)
            size = ITEMSIZE[problem.dtype] * problem.elements // 16 * 16
            sets = [cupy.zeros((reads + writes, size), np.uint8) for _ in range(place.sets(size * (reads + writes)))]
            calls[which] = [functools.partial(_copy_within, memory, reads) for memory in sets]
        return Built(calls)


def counts(problem: Problem, which: str) -> tuple[int, int]:
    """How many arrays of the width of x a pass reads and writes; a state in a wider dtype counts as several."""
    reads, writes = streams(problem, which)
    size = ITEMSIZE[problem.dtype]
    return int(sum(reads)) // size, int(sum(writes)) // size


def _copy_within(memory: Any, reads: int) -> None:
    places = [memory.data.ptr + i * memory.shape[1] for i in range(memory.shape[0])]
    copy(places[:reads], places[reads:], memory.shape[1])


def copy(reads: Sequence[int], writes: Sequence[int], nbytes: int) -> None:
    """Puts a copy of so many bytes of each array on CuPy's current stream."""
    n = nbytes // 16
    kernel = function(copy_text(len(reads), len(writes)), "copy")
    stream = importlib.import_module("cupy").cuda.get_current_stream()
    kernel((-(-n // 256), 1, 1), (256, 1, 1), (*reads, *writes, n), stream=stream)


def copy_text(reads: int, writes: int) -> str:
    """A kernel that reads some arrays of n times 16 bytes and writes their combination to some others."""
    names = [*(f"const uint4 *r{i}" for i in range(reads)), *(f"uint4 *w{i}" for i in range(writes))]
    fields = (" ^ ".join(f"x{i}.{field}" for i in range(reads)) for field in "xyzw")
    lines = itertools.chain(
        [f'extern "C" __global__ void copy({", ".join(names)}, long long n) {{'],
        ["  const long long i = blockIdx.x * 256ll + threadIdx.x;", "  if (i >= n) return;"],
        (f"  const uint4 x{i} = r{i}[i];" for i in range(reads)),
        [f"  const uint4 x = make_uint4({', '.join(fields)});"],
        (f"  w{i}[i] = x;" for i in range(writes)),
        ["}\n"],
    )
    return "\n".join(lines)


@functools.cache
def function(text: str, name: str) -> Any:
    """A kernel of the bench, compiled for the current GPU like those of the library."""
    cupy: Any = importlib.import_module("cupy")
    arch = int(cupy.cuda.Device().compute_capability)
    module = cupy.cuda.Module()
    module.load(compile_gpu.compile(text, (f"-arch=sm_{compile_gpu.target(arch)}", *compile_gpu.FLAGS))[0])
    return module.get_function(name)
