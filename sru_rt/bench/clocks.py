"""How time and memory are taken: on the CPU, and on a GPU through CuPy, PyTorch or JAX.

A clock is asked for a block, some seconds of calls at a time, so that the rows of a group can take turns.
"""

from __future__ import annotations

import abc
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
HOST_CALLS, QUEUED = 100, 0.05  # calls in a row, and seconds of a GPU, few enough that its queue takes them all


class Clock:
    """Wall clock, for what is done when a call returns."""

    cache_bytes = 0  # of a cache that calls are to find cold, by going through several sets of arrays

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}

    def sets(self, nbytes: int) -> int:
        """How many sets of arrays to go through in turn, so that none is still in the cache when it is needed; of
        large ones the end throws out the beginning."""
        if nbytes >= 8 * self.cache_bytes:
            return 1
        return max(3, min(256, math.ceil(4 * self.cache_bytes / nbytes)))

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

    def release(self) -> None:
        """Gives memory back that is free."""

    def facts(self, key: Hashable, calls: Sequence[Call]) -> dict[str, Any]:
        """What is measured once: memory of a call beside its arguments, in MB."""
        before = time.perf_counter()
        peak = self.peak(calls[0])
        self._last[key] = time.perf_counter() - before  # a slow call has been made once then
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


class _Gpu(Clock, abc.ABC):
    """What the clocks of GPUs share: replays of a CUDA graph of many calls, between two events."""

    def __init__(self) -> None:
        super().__init__()
        self._replays: dict[Hashable, tuple[Callable[[], float], int]] = {}

    def block(self, key: Hashable, calls: Sequence[Call], seconds: float) -> list[float]:
        replay, n = self._replays[key]
        first = replay()
        return [replay() / n for _ in range(min(max(int(seconds / max(first, 1e-6)), 1), MOST_SAMPLES))]

    def facts(self, key: Hashable, calls: Sequence[Call]) -> dict[str, Any]:
        """Also whether calls could be captured, and microseconds of the host for one, without waiting for the GPU."""
        found, samples = super().facts(key, calls), []
        n = len(calls) * -(-LAUNCHES // len(calls))

        def launch(n: int = n) -> None:
            for i in range(n):
                calls[i % len(calls)]()

        replay, how = self._replay(launch, all(getattr(call, "captures", True) for call in calls))
        self._replays[key] = replay, n
        few = min(max(int(QUEUED * n / max(replay(), 1e-6)), 1), HOST_CALLS)
        for _ in range(5):
            self.synchronize()
            before = time.perf_counter()
            launch(few)
            samples.append((time.perf_counter() - before) / few)
            self.synchronize()
        return found | {"launched": how, "host_us": round(1e6 * statistics.median(samples), 2)}

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Waits for the GPU."""

    def _replay(self, launch: Call, captures: bool) -> tuple[Callable[[], float], str]:
        """What takes the seconds of `launch`, as a graph if it can be captured, and how it launches."""
        if captures:
            try:
                return functools.partial(self._timed, self._graph(launch)), "as a graph"
            except RuntimeError as error:  # of the driver, by CuPy and PyTorch
                first: BaseException = error  # the end of a capture only says that there was one
                while first.__context__ is not None:
                    first = first.__context__
                how = f"one by one, as a capture fails: {' '.join(str(first).split())[:100]}"
        else:
            how = "one by one"
        return functools.partial(self._timed, launch), how

    @abc.abstractmethod
    def _graph(self, launch: Call) -> Call:
        """What launches a CUDA graph of the calls."""

    @abc.abstractmethod
    def _timed(self, launch: Call) -> float:
        """Seconds of a launch on the GPU."""


class CuPyClock(_Gpu):
    """A GPU through CuPy. Each graph has memory of its own, as long as it lives: its launches write there."""

    def __init__(self) -> None:
        super().__init__()
        self.cupy = importlib.import_module("cupy")
        properties = self.cupy.cuda.runtime.getDeviceProperties(self.cupy.cuda.get_device_id())
        self.cache_bytes = int(properties["l2CacheSize"])
        self._stream = self.cupy.cuda.Stream(non_blocking=True)

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def peak(self, call: Call) -> float | None:
        pool = self.cupy.cuda.MemoryPool()
        with self.cupy.cuda.using_allocator(pool.malloc):
            call()
        return float(pool.total_bytes())

    def release(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()

    def _graph(self, launch: Call) -> Call:
        stream, pool = self._stream, self.cupy.cuda.MemoryPool()
        self.synchronize()  # what was filled on another stream is there
        with self.cupy.cuda.using_allocator(pool.malloc), stream:
            launch()  # compiles, loads, and fills the pool of memory
            stream.synchronize()
            stream.begin_capture()
            try:
                launch()
            finally:
                graph = stream.end_capture()
        return functools.partial(_launch, graph, stream, pool)

    def _timed(self, launch: Call) -> float:
        cuda, stream = self.cupy.cuda, self._stream
        begin, end = cuda.Event(), cuda.Event()
        with stream:
            begin.record(stream)
            launch()
            end.record(stream)
        end.synchronize()
        return 1e-3 * float(cuda.get_elapsed_time(begin, end))


def _launch(graph: Any, stream: Any, pool: Any) -> None:
    """Launches a graph, which writes to memory of the pool: whoever can launch it keeps that."""
    graph.launch(stream)


class TorchClock(_Gpu):
    """A GPU through PyTorch. All work of the process is on the stream that captures: autograd runs a backward on the
    stream of its forward, and sums gradients on the one where a leaf was first used."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = importlib.import_module("torch")
        self._stream = self.torch.cuda.Stream()
        self.torch.cuda.set_stream(self._stream)
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

    def release(self) -> None:
        self.torch.cuda.empty_cache()

    def _graph(self, launch: Call) -> Call:
        cuda = self.torch.cuda
        launch()  # as PyTorch asks for before a capture
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self._stream):
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
