"""How time and memory are taken: on the CPU, and on a GPU through CuPy, PyTorch or JAX.

A clock is asked for a block, some seconds of calls at a time, so that the rows of a group can take turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import memory
from .problem import setting

Call = Callable[[], Any]  # one that does its work several times has an attribute `repeats`

LEAST = 1e-3  # seconds of one sample on the CPU: shorter calls are made several times
MOST_SAMPLES = 20  # of a block
LAUNCHES = 20  # of a CUDA graph, at least
HOST_CALLS = 100  # in a row, few enough that a GPU's queue takes them all


class Clock:
    """Wall clock, for what is done when a call returns."""

    cache_bytes = 0  # of a cache that calls are to find cold, by going through several sets of arrays

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}

    def sets(self, nbytes: int) -> int:
        """How many sets of arrays to go through in turn, so that none is still in the cache when it is needed."""
        return max(3, min(256, math.ceil(4 * self.cache_bytes / nbytes))) if self.cache_bytes else 1

    def block(self, key: Hashable, calls: Sequence[Call], seconds: float) -> list[float]:
        """Seconds of one call, several times. One is not counted before, unless the last ones took over 1 s."""
        call, first = calls[0], self._last.get(key, 0.0)
        if first <= 1:
            first = self._sample(call, 1)
        repeats = max(1, min(int(LEAST / first), 1000))
        n = min(max(int(seconds / (first * repeats)), 1), MOST_SAMPLES)
        samples = [self._sample(call, repeats) for _ in range(n)]
        self._last[key] = samples[-1]
        work = getattr(call, "repeats", 1)
        return [sample / work for sample in samples]

    def _sample(self, call: Call, repeats: int) -> float:
        before = time.perf_counter()
        for _ in range(repeats):
            found = call()
        self.wait(found)
        return (time.perf_counter() - before) / repeats

    def wait(self, found: Any) -> None:
        """Until what a call gave is there."""

    def facts(self, calls: Sequence[Call]) -> dict[str, Any]:
        """What is measured once: memory of a call beside its arguments, in MB."""
        peak = self.peak(calls[0])
        return {} if peak is None else {"peak_mb": round(peak / 1e6, 3)}

    def peak(self, call: Call) -> float | None:
        """Bytes by which the process grows in a call, where Linux tells; memory that was kept from before is given
        back first."""
        with setting("SRU_RT_POOL_MB", "0"):
            memory.empty((1 << 20,), np.dtype(np.uint8))  # the first block that is not kept takes all others with it
            with contextlib.suppress(OSError, AttributeError):  # another system, or C library
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is
                before = _status("VmRSS")
                call()
                return float(_status("VmHWM") - before)
        return None


def _status(name: str) -> int:
    """Bytes, of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


class _Gpu(Clock):
    """What the clocks of GPUs share: replays of a CUDA graph of many calls, between two events."""

    def __init__(self) -> None:
        super().__init__()
        self._replays: dict[Hashable, tuple[Callable[[], float], int]] = {}

    def block(self, key: Hashable, calls: Sequence[Call], seconds: float) -> list[float]:
        if key not in self._replays:
            n = len(calls) * -(-LAUNCHES // len(calls))
            self._replays[key] = self._replay(calls, n), n
        replay, n = self._replays[key]
        first = replay()
        return [replay() / n for _ in range(min(max(int(seconds / max(first, 1e-6)), 1), MOST_SAMPLES))]

    def facts(self, calls: Sequence[Call]) -> dict[str, Any]:
        """Also microseconds of the host for a call, without waiting for the GPU."""
        found, samples = super().facts(calls), []
        for _ in range(5):
            self.synchronize()
            before = time.perf_counter()
            for i in range(HOST_CALLS):
                calls[i % len(calls)]()
            samples.append((time.perf_counter() - before) / HOST_CALLS)
            self.synchronize()
        return found | {"host_us": round(1e6 * statistics.median(samples), 2)}

    def synchronize(self) -> None:
        raise NotImplementedError

    def _replay(self, calls: Sequence[Call], n: int) -> Callable[[], float]:
        """Seconds of `n` calls, made in turn, as a graph if they can be captured."""
        raise NotImplementedError


class CuPyClock(_Gpu):
    """A GPU through CuPy."""

    def __init__(self) -> None:
        super().__init__()
        self.cupy = importlib.import_module("cupy")
        properties = self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.get_device_id())
        self.cache_bytes = int(properties["l2CacheSize"])

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def peak(self, call: Call) -> float | None:
        pool = self.cupy.get_default_memory_pool()
        call()
        pool.free_all_blocks()
        before = pool.total_bytes()
        call()
        return float(pool.total_bytes() - before)

    def _replay(self, calls: Sequence[Call], n: int) -> Callable[[], float]:
        cuda = self.cupy.cuda
        stream = cuda.Stream(non_blocking=True)
        self.synchronize()  # what was filled on another stream is there
        with stream:
            for call in calls:
                call()  # compiles, loads, and fills the pool of memory
            stream.synchronize()
            stream.begin_capture()
            for i in range(n):
                calls[i % len(calls)]()
            graph = stream.end_capture()

        def replay() -> float:
            begin, end = cuda.Event(), cuda.Event()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            return 1e-3 * float(cuda.get_elapsed_time(begin, end))

        return replay


class TorchClock(_Gpu):
    """A GPU through PyTorch. Calls that say that they cannot be captured are launched one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = importlib.import_module("torch")
        self.cache_bytes = int(self.torch.cuda.get_device_properties(0).L2_cache_size)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def peak(self, call: Call) -> float | None:
        cuda = self.torch.cuda
        call()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        return float(cuda.max_memory_allocated() - before)

    def _replay(self, calls: Sequence[Call], n: int) -> Callable[[], float]:
        def launch() -> None:
            for i in range(n):
                calls[i % len(calls)]()

        if all(getattr(call, "captures", True) for call in calls):
            launch = self._graph(launch)
        return functools.partial(self._timed, launch)

    def _graph(self, launch: Call) -> Call:
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # as PyTorch asks for before a capture
            launch()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            launch()
        replay: Call = graph.replay
        return replay

    def _timed(self, launch: Call) -> float:
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))


class JaxClock(Clock):
    """A GPU through JAX: many calls, of which the last is waited for."""

    def wait(self, found: Any) -> None:
        importlib.import_module("jax").block_until_ready(found)

    def peak(self, call: Call) -> float | None:
        return None  # JAX holds most of the memory, and cannot forget a peak


def clock_of(library: str, device: str) -> Clock:
    """The clock for what runs on arrays of `library`: arrays (of NumPy or CuPy), torch or jax."""
    if device == "cpu":
        return Clock()
    clocks: dict[str, Callable[[], Clock]] = {"arrays": CuPyClock, "torch": TorchClock, "jax": JaxClock}
    return clocks[library]()
