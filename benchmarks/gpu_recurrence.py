"""Speed of the recurrences on a GPU beside copies of the same bytes and the plainest kernel.

Forward and backward of each cell at the shapes that the project's targets name: one run, one table. Results are
compared with the compiled CPU kernels first, and what differs gets no speed. README.md beside this file explains the
columns.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cpu import environment

import sru_rt
from sru_rt import abi, compile_gpu, launch, on_cupy, plan
from sru_rt.cell import Array, Cell
from sru_rt.cells.sru import Options, sru_cell
from sru_rt.dtypes import state_dtype, to_numpy
from sru_rt.emit import emit, struct_name
from sru_rt.errors import SruRtError
from sru_rt.on_numpy import NUMPY
from sru_rt.source import CPP_TYPES
from sru_rt.variant import Variant

ROOT = Path(__file__).resolve().parents[1]
CELLS: dict[str, tuple[Cell, tuple[float, ...]]] = {  # the cell and its constants
    "sru": (sru_cell(Options()), (math.sqrt(3),)),
}
DTYPES = ("bfloat16", "float32", "float16", "float64")
LARGE = (2048, 16, 1024, 1)
SHAPES = (LARGE, (512, 32, 512, 1), (32, 32, 128, 1), (65536, 1, 1024, 1), (2048, 8, 1024, 2))  # L, B, d, D
SWEEP = (8, 16, 32, 64, 128)  # B at d = 1024: B*d*D from 8k to 128k
ENOUGH_BYTES = 256e6  # what the leanest pass of the sweep moves at least, and where the targets of bandwidth begin
KEPT_EVERY = 32

H200 = plan.Device(90, 132)  # of a dry run
H200_L2, H200_COPY = 60 << 20, 4.3e12  # bytes; bytes a second, an assumption
CHAIN_NS = {"forward": 31, "backward": 15}  # the serial dependency of one step of SRU; an estimate from instructions

CHECKED_STEPS = 200  # the kernel is the same for every L
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 5e-5, "float64": 1e-11}  # of an array's largest magnitude
THREADS = 128  # of a block of the naive kernel

Pointer = Callable[[str], int]  # from the name of an array to its address


class Pass(NamedTuple):
    """One direction of computation under one policy: the state is kept before every `every`-th step, 0: not at all."""

    forward: bool
    every: int

    @property
    def label(self) -> str:
        policy = {0: "", 1: ", save=True"}.get(self.every, f", save={self.every}")
        return ("forward" if self.forward else "backward") + policy


# The last forward before a backward leaves the states that it reads.
PASSES = (Pass(True, 0), Pass(True, 1), Pass(False, 1), Pass(True, KEPT_EVERY), Pass(False, KEPT_EVERY))


class Case(NamedTuple):
    """One recurrence. Half of a ragged one is padding."""

    name: str
    dtype: str
    L: int
    B: int
    d: int
    D: int = 1
    ragged: bool = False

    @property
    def cell(self) -> Cell:
        return CELLS[self.name][0]

    @property
    def channels(self) -> int:
        return self.B * self.D * self.d

    @property
    def elements(self) -> int:
        return self.L * self.channels

    @property
    def state(self) -> str:
        return state_dtype(self.dtype)

    @property
    def variant(self) -> Variant:
        return Variant(self.cell, self.dtype, self.state)

    @property
    def shape(self) -> str:
        directions = f", D={self.D}" if self.D > 1 else ""
        return f"({self.L}, {self.B}, {self.d}{directions}{', ragged' if self.ragged else ''})"


def streams(case: Case, which: Pass) -> tuple[list[float], list[float]]:
    """Bytes that must be read and be written for an element of h, array by array: each value over time counts once."""
    item, state = plan.ITEMSIZE[case.dtype], plan.ITEMSIZE[case.state]
    given = [item] * (len(case.cell.gates) + len(case.cell.inputs))
    kept = [state / which.every] * len(case.cell.state) if which.every else []
    if which.forward:
        return [*given], [item, *kept]
    return [*given, item, *kept], [*given]


def moved(case: Case, which: Pass) -> float:
    """Bytes that one pass must move. Parameters and sums over time, under a hundredth, are left out."""
    reads, writes = streams(case, which)
    return (sum(reads) + sum(writes)) * case.elements


def cases(names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]] | None) -> list[Case]:
    """What to measure, the most telling first."""
    found = []
    for dtype in dtypes:
        for name in names:
            if shapes is not None:
                found += [Case(name, dtype, *shape) for shape in shapes]
                continue
            found += [Case(name, dtype, *shape) for shape in SHAPES]
            found.append(Case(name, dtype, *LARGE, ragged=True))
            for B in SWEEP:
                one = Case(name, dtype, 512, B, 1024)
                while moved(one, PASSES[0]) < ENOUGH_BYTES:
                    one = one._replace(L=2 * one.L)
                found.append(one)
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------------------------
# Arrays and the calls of the waist on them


def layout(case: Case) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array, by name: what the cell declares, results, and ``d`` + name for gradients."""
    L, B, D, d, cell, acc = case.L, case.B, case.D, case.d, case.cell, case.state
    sizes = {"L": L, "B": B, "D": D, "d": d}
    found: dict[str, tuple[tuple[int, ...], str]] = {"h": ((L, B, D, d), case.dtype), "dh": ((L, B, D, d), case.dtype)}
    for array in cell.arrays:
        shape = tuple(sizes[axis] if axis in sizes else int(axis) for axis in array.axes.split())
        dtype = case.dtype if array.kind in ("gates", "inputs") else acc
        found |= {array.name: (shape, dtype), f"d{array.name}": (shape, dtype)}
    for i in range(len(cell.state)):
        found |= {f"last{i}": ((D, B, d), acc), f"saved{i}": ((L, B, D, d), acc)}
        found[f"states{i}"] = ((KEPT_EVERY, B, D, d), acc)
    found["partial"] = ((B, D, len(cell.params), d + NUMPY.row_padding), acc)
    if case.ragged:
        found["lengths"] = ((B,), "int64")
    return found


def sizes_in_bytes(case: Case) -> dict[str, int]:
    item = plan.ITEMSIZE | {"int64": 8}
    return {name: math.prod(shape) * item[dtype] for name, (shape, dtype) in layout(case).items()}


def arguments(case: Case, pointer: Pointer, which: Pass) -> abi.Forward | abi.Backward:
    """What the waist is given; see sru_rt/abi.py."""
    cell, d, states = case.cell, case.d, range(len(case.cell.state))

    def slots(kind: str, prefix: str = "") -> list[abi.Slot]:
        found = []
        for array in cell.arrays:
            if array.kind == kind:
                item = plan.ITEMSIZE[layout_of(case, array)]
                start, n = pointer(prefix + array.name), len(array.members)
                found += [abi.Slot(start + i * d * item, n * d) for i in range(n)]
        return found

    given = abi.Given(
        L=case.L,
        B=case.B,
        D=case.D,
        d=d,
        every=which.every,
        lengths=pointer("lengths") if case.ragged else 0,
        mask=0,
        reset=0,
        gates=slots("gates"),
        inputs=slots("inputs"),
        per_sequence=slots("per_sequence"),
        params=slots("params"),
        c0=[pointer(array.name) for array in cell.arrays if array.kind == "state"],
        constants=CELLS[case.name][1],
    )
    saved = [pointer(f"saved{i}") if which.every else 0 for i in states]
    if which.forward:
        return abi.Forward(given=given, h=pointer("h"), c_last=[pointer(f"last{i}") for i in states], saved=saved)
    return abi.Backward(
        given=given,
        dh=pointer("dh"),
        dc_last=[0 for _ in states],
        saved=saved,
        states=[pointer(f"states{i}") if which.every > 1 else 0 for i in states],
        partial=abi.Slot(pointer("partial"), d + NUMPY.row_padding),
        dgates=slots("gates", "d"),
        dinputs=slots("inputs", "d"),
        dper_sequence=slots("per_sequence", "d"),
        dparams=slots("params", "d"),
        dc0=[pointer(f"d{array.name}") for array in cell.arrays if array.kind == "state"],
    )


def layout_of(case: Case, array: Array) -> str:
    """The dtype of a declared array."""
    return case.dtype if array.kind in ("gates", "inputs") else case.state


class Memory:
    """The arrays of one case as plain bytes in memory of NumPy or CuPy, so that dtypes are of no concern to either.

    Inputs hold normally distributed numbers, the same on every device; everything else holds NaN.
    """

    def __init__(self, case: Case, library: Any) -> None:
        self.case, self.library = case, library
        self.bytes = {name: library.empty((size,), np.dtype(np.uint8)) for name, size in sizes_in_bytes(case).items()}
        given = {array.name for array in case.cell.arrays} | {"dh"}
        for i, (name, memory) in enumerate(self.bytes.items()):
            if name == "lengths":
                memory[...] = library.xp.asarray(lengths(case).view(np.uint8))
            elif name in given:
                fill(memory, pattern(layout(case)[name][1], library), i)
            else:
                memory[...] = 0xFF

    def pointer(self, name: str) -> int:
        return self.library.pointer(self.bytes[name])

    def call(self, which: Pass) -> Callable[[], None]:
        """Puts one pass on the current stream."""
        packed, library = arguments(self.case, self.pointer, which), self.library
        return lambda: launch.run(self.case.variant, packed, library.device, library.stream())

    def read(self, name: str) -> np.ndarray:
        """The array as float64 on the host."""
        shape, dtype = layout(self.case)[name]
        host = self.library.to_host(self.bytes[name]).view(to_numpy(dtype))
        with np.errstate(invalid="ignore"):  # where nothing was written, it is NaN
            return host.astype(np.float64).reshape(shape)


def lengths(case: Case) -> np.ndarray:
    """Evenly spread from 1 to L, so that half is padding, in random order."""
    return np.random.default_rng(1).permutation(np.linspace(1, case.L, case.B)).astype(np.int64)


@functools.lru_cache(maxsize=8)
def pattern(dtype: str, library: Any) -> Any:
    """The bytes of a million random numbers."""
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(to_numpy(dtype))
    return library.xp.asarray(values.view(np.uint8))


def fill(memory: Any, source: Any, turn: int) -> None:
    """Repeats `source` over `memory`, beginning elsewhere in it at every `turn`."""
    done = 0
    start = turn * 16_000 % source.size
    while done < memory.size:
        n = min(source.size - start, memory.size - done)
        memory[done : done + n] = source[start : start + n]
        done, start = done + n, 0


# ----------------------------------------------------------------------------------------------------------------------
# Agreement


def results(case: Case, library: Any, run: Callable[[Memory, Pass], None], passes: Sequence[Pass]) -> dict[str, Any]:
    """What every pass writes, as float64."""
    memory, found = Memory(case, library), {}
    for which in passes:
        run(memory, which)
        states = range(len(case.cell.state))
        if which.forward:
            names = ["h", *(f"last{i}" for i in states)]
            found |= {f"{which.label}: saved{i}": kept(memory.read(f"saved{i}"), which) for i in states if which.every}
        else:
            names = [f"d{array.name}" for array in case.cell.arrays]
        found |= {f"{which.label}: {name}": memory.read(name) for name in names}
    return found


def kept(saved: np.ndarray, which: Pass) -> np.ndarray:
    """The part of the memory for states that is used."""
    return saved[: -(-len(saved) // which.every)]


def differences(case: Case, library: Any, run: Callable[[Memory, Pass], None] | None = None) -> dict[str, float]:
    """By how much results on the device differ from those of the CPU's kernels, of each array's largest magnitude."""
    few = case._replace(L=min(case.L, CHECKED_STEPS))
    passes = PASSES if run is None else [which for which in PASSES if is_naive(few, which)]
    expected = results(few, NUMPY, lambda memory, which: memory.call(which)(), passes)
    found = results(few, library, run or (lambda memory, which: memory.call(which)()), passes)
    skipped = () if run is None else ("dbias", "dv")  # which the naive kernel leaves as partial sums
    return {
        name: float(np.abs(found[name] - array).max() / np.abs(array).max())
        for name, array in expected.items()
        if not name.endswith(skipped or "\0")
    }


def fault(errors: dict[str, float], dtype: str) -> str:
    """What differs and by how much; empty if everything agrees."""
    wrong = [f"{name} differs by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[dtype]]
    return "no speed: " + ", ".join(wrong) if wrong else ""


# ----------------------------------------------------------------------------------------------------------------------
# Kernels to compare with


def naive_text(case: Case) -> str:
    """The compile unit of naive_sweep.h for one case."""
    cell = case.cell
    types = {"naive_cell": struct_name(cell), "io": CPP_TYPES[case.dtype], "saved_io": CPP_TYPES[case.state]}
    sizes = {"Forward": abi.layout(cell, True).size, "Backward": abi.layout(cell, False).size}
    return "\n".join(
        [
            '#include "arguments.h"',
            emit(cell),
            *(f"typedef {there} {here};" for here, there in types.items()),
            Path(__file__).with_name("naive_sweep.h").read_text(),
            *(
                f'static_assert(sizeof({kind}Arguments<naive_cell>) == {n}, "not as abi.py");'
                for kind, n in sizes.items()
            ),
            "",
        ]
    )


def is_naive(case: Case, which: Pass) -> bool:
    """Whether the naive kernel can do this pass."""
    return which.every <= 1 and not case.ragged


def copy_text(reads: int, writes: int) -> str:
    """A kernel that reads some arrays of n times 16 bytes and writes their combination to some others."""
    names = [*(f"const uint4 *r{i}" for i in range(reads)), *(f"uint4 *w{i}" for i in range(writes))]
    lines = [f"  const uint4 x{i} = r{i}[i];" for i in range(reads)]
    fields = (" ^ ".join(f"x{i}.{field}" for i in range(reads)) for field in "xyzw")
    return "\n".join(
        [
            f'extern "C" __global__ void copy({", ".join(names)}, long long n) {{',
            "  const long long i = blockIdx.x * 256ll + threadIdx.x;",
            "  if (i >= n) return;",
            *lines,
            f"  const uint4 x = make_uint4({', '.join(fields)});",
            *(f"  w{i}[i] = x;" for i in range(writes)),
            "}\n",
        ]
    )


def copied_arrays(case: Case, which: Pass) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The arrays that a copy with the streams of a pass reads and writes: name, and by how many bytes in it begins
    a stream of one element of x's dtype for each element of h.

    States in a wider dtype count as several streams; states that are kept only now and then are left out.
    """
    item, state = plan.ITEMSIZE[case.dtype], plan.ITEMSIZE[case.state]
    size = item * case.elements

    def parts(kinds: tuple[str, ...], prefix: str = "") -> list[tuple[str, int]]:
        arrays = [array for array in case.cell.arrays if array.kind in kinds]
        return [(prefix + array.name, i * size) for array in arrays for i in range(len(array.members))]

    given = parts(("gates", "inputs"))
    states = range(len(case.cell.state)) if which.every == 1 else ()
    kept_states = [(f"saved{i}", part * size) for i in states for part in range(state // item)]
    if which.forward:
        return given, [("h", 0), *kept_states]
    return [*given, ("dh", 0), *kept_states], parts(("gates", "inputs"), "d")


# ----------------------------------------------------------------------------------------------------------------------
# Time


class Timer:
    """A GPU, and how time is taken on it."""

    def __init__(self, cupy: Any, rounds: int, launches: int) -> None:
        self.cupy, self.rounds, self.launches = cupy, rounds, launches
        self.library = on_cupy.library(cupy, cupy.cuda.get_device_id())
        self.properties = cupy.cuda.runtime.getDeviceProperties(self.library.id)
        self.facts = plan.Device(
            10 * self.properties["major"] + self.properties["minor"], self.properties["multiProcessorCount"]
        )

    @functools.cached_property
    def l2_bytes(self) -> int:
        return int(self.properties["l2CacheSize"])

    @functools.cache  # noqa: B019  (there is one timer)
    def function(self, text: str, name: str) -> Callable[..., None]:
        """A kernel of this file, compiled like those of the library."""
        options = (f"-arch=sm_{compile_gpu.target(self.facts.arch)}", *compile_gpu.FLAGS)
        module = self.cupy.cuda.Module()
        module.load(compile_gpu.compile(text, options)[0])
        return module.get_function(name)

    def naive(self, memory: Memory, which: Pass) -> None:
        case = memory.case
        packed = abi.pack(case.cell, arguments(case, memory.pointer, which))
        kernel = self.function(naive_text(case), "forward" if which.forward else "backward")
        values = (np.frombuffer(packed, np.dtype((np.void, len(packed)))),)
        kernel((-(-case.channels // THREADS), 1, 1), (THREADS, 1, 1), values, stream=self.stream())

    def copy(self, reads: Sequence[int], writes: Sequence[int], nbytes: int) -> None:
        kernel = self.function(copy_text(len(reads), len(writes)), "copy")
        n = nbytes // 16
        kernel((-(-n // 256), 1, 1), (256, 1, 1), (*reads, *writes, n), stream=self.stream())

    def stream(self) -> Any:
        return self.cupy.cuda.get_current_stream()

    def times(self, calls: Sequence[Callable[[], None]]) -> dict[str, Any]:
        """Microseconds of one of the calls, which are made in turn: events around replays of one graph of them."""
        cuda = self.cupy.cuda
        n = len(calls) * -(-self.launches // len(calls))
        with cuda.Stream(non_blocking=True) as stream:
            self.cupy.cuda.Device().synchronize()  # what was filled on another stream is there
            for call in calls[:2]:
                call()  # compiles and loads
            stream.synchronize()
            stream.begin_capture()
            for i in range(n):
                calls[i % len(calls)]()
            graph = stream.end_capture()
            graph.launch(stream)
            stream.synchronize()
            samples = []
            for _ in range(self.rounds):
                begin, end = cuda.Event(), cuda.Event()
                begin.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                samples.append(1e3 * cuda.get_elapsed_time(begin, end) / n)
        return statistics_of(samples) | {"sets": len(calls)}


def statistics_of(microseconds: Sequence[float]) -> dict[str, Any]:
    return {
        "median_us": round(statistics.median(microseconds), 3),
        "min_us": round(min(microseconds), 3),
        "max_us": round(max(microseconds), 3),
        "n": len(microseconds),
    }


def number_of_sets(case: Case, l2_bytes: int) -> int:
    """How many sets of arrays to go through in turn, so that none is still in the cache when it is needed again."""
    return max(3, math.ceil(4 * l2_bytes / moved(case, PASSES[0])))


def copy_rates(timer: Timer, nbytes: int) -> dict[str, Any]:
    """Bytes a second, read and written, of the driver's copy and of a kernel's, between two large arrays."""
    source, target = (timer.library.empty((nbytes,), np.dtype(np.uint8)) for _ in range(2))
    fill(source, pattern("float32", timer.library), 0)
    a, b = (timer.library.pointer(array) for array in (source, target))
    runtime = timer.cupy.cuda.runtime
    ways = {
        "memcpy": lambda: runtime.memcpyAsync(b, a, nbytes, runtime.memcpyDeviceToDevice, timer.stream().ptr),
        "kernel": lambda: timer.copy([a], [b], nbytes),
    }
    found: dict[str, Any] = {"bytes": 2 * nbytes}
    for name, call in ways.items():
        took = timer.times([call])
        found[name] = took | {"rate": 2e6 * nbytes / took["median_us"]}
    return found | {"rate": max(found[name]["rate"] for name in ways)}


def measure(case: Case, timer: Timer, rate: float) -> Iterator[dict[str, Any]]:
    """The rows of one case. `rate` is that of the faster copy."""
    errors = differences(case, timer.library)
    wrong = fault(errors, case.dtype)
    naive_wrong = "" if case.ragged else fault(differences(case, timer.library, timer.naive), case.dtype)
    count = number_of_sets(case, timer.l2_bytes)
    needed = count * sum(sizes_in_bytes(case).values())
    free = timer.cupy.cuda.runtime.memGetInfo()[0] + timer.cupy.get_default_memory_pool().free_bytes()
    if needed > 0.95 * free:
        wrong = wrong or f"not measured: takes {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    sets = [] if wrong else [Memory(case, timer.library) for _ in range(count)]
    for which in PASSES:
        row = described(case, which, timer.facts) | {"fault": wrong, "largest_error": max(errors.values())}
        if not wrong:
            row |= compared(case, which, speeds(case, which, timer, sets, naive_wrong), rate)
        yield row


def speeds(case: Case, which: Pass, timer: Timer, sets: Sequence[Memory], naive_wrong: str) -> dict[str, Any]:
    """Times of one pass, of its copy and of the naive kernel. Leaves behind what the pass computes."""
    found: dict[str, Any] = {}
    reads, writes = copied_arrays(case, which)
    nbytes = plan.ITEMSIZE[case.dtype] * case.elements

    def copy(memory: Memory) -> Callable[[], None]:
        places = [[memory.pointer(name) + offset for name, offset in side] for side in (reads, writes)]
        return lambda: timer.copy(places[0], places[1], nbytes)

    if not case.ragged:
        found["matched"] = timer.times([copy(memory) for memory in sets])
        found["matched"]["rate"] = 1e6 * nbytes * (len(reads) + len(writes)) / found["matched"]["median_us"]
    if is_naive(case, which):
        naive = [functools.partial(timer.naive, memory, which) for memory in sets]
        found["naive"] = {"fault": naive_wrong} if naive_wrong else timer.times(naive)
    calls = [memory.call(which) for memory in sets]
    found["cold"] = timer.times(calls)
    if moved(case, which) < 2 * timer.l2_bytes:
        found["warm"] = timer.times(calls[:1])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def described(case: Case, which: Pass, facts: plan.Device) -> dict[str, Any]:
    """What a row is about, and the plan on a GPU."""
    made = plan.plan(case.variant, arguments(case, lambda name: 1 << 12, which), facts)
    chosen = {name: getattr(made, name) for name in ("width", "depth", "threads", "B", "scratch_in_shared")}
    return {
        "cell": case.name,
        "dtype": case.dtype,
        "shape": {"L": case.L, "B": case.B, "d": case.d, "D": case.D, "ragged": case.ragged},
        "pass": which.label,
        "bytes": moved(case, which),
        "streams": streams(case, which),
        "plan": chosen | {"blocks": math.prod(made.grid(case.B))},
    }


def compared(case: Case, which: Pass, found: dict[str, Any], rate: float) -> dict[str, Any]:
    """The speeds of a row, and how they stand to the copies, the naive kernel and the target."""
    took = found["cold"]["median_us"]
    row = dict(found)
    if not case.ragged:  # padding is not read
        row["rate"] = 1e6 * moved(case, which) / took
        row["of_copy"] = round(row["rate"] / rate, 3)
        row["of_matched"] = round(row["rate"] / found["matched"]["rate"], 3)
        row["floor_us"] = round(1e6 * moved(case, which) / rate, 3)
    if "median_us" in found.get("naive", {}):
        row["naive_over_ours"] = round(found["naive"]["median_us"] / took, 3)
    return row | verdicts(case, which, row)


def verdicts(case: Case, which: Pass, row: dict[str, Any]) -> dict[str, Any]:
    """The project's targets for a row, and whether they are reached."""
    found = []
    took = row["cold"]["median_us"]
    if "of_copy" in row and moved(case, which) >= ENOUGH_BYTES and 8 << 10 <= case.channels <= 128 << 10:
        large = (0.9 if which.forward else 0.85) if (case.L, case.B, case.d, case.D) == LARGE else 0.8
        found.append((f">= {large} of copy", row["of_copy"] >= large))
    elif "of_copy" in row and moved(case, which) < ENOUGH_BYTES:
        chain = 1e-3 * CHAIN_NS["forward" if which.forward else "backward"] * case.L
        most = 1.15 * max(row["floor_us"], chain) + 3
        found.append((f"<= {most:.1f} us", took <= most))
    if "naive_over_ours" in row:
        times = 5 if (case.L, case.B, case.d, case.D) == LARGE else 1
        found.append((f">= {times} x naive", row["naive_over_ours"] >= times))
    return {"targets": [{"target": text, "reached": bool(reached)} for text, reached in found]}


def compare_ragged(rows: list[dict[str, Any]]) -> None:
    """Adds to ragged rows the time of the same shape without padding over theirs."""
    whole = {key(row): row for row in rows if not row["shape"]["ragged"]}
    for row in rows:
        other = whole.get(key(row))
        if row["shape"]["ragged"] and "cold" in row and other and "cold" in other:
            ratio = other["cold"]["median_us"] / row["cold"]["median_us"]
            row["padded_over_ours"] = round(ratio, 3)
            row["targets"] = [{"target": ">= 1.8 x padded", "reached": ratio >= 1.8}]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    shape = row["shape"]
    return row["cell"], row["dtype"], row["pass"], *(shape[axis] for axis in ("L", "B", "d", "D"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    titles = "cell|dtype|(L, B, d)|pass|MB|plan|cold us|min - max|warm us|TB/s|of copy|of matched copy|x naive|targets"
    lines = [titles.replace("|", " | "), " | ".join(["---"] * len(titles.split("|")))]
    for row in rows:
        case = Case(row["cell"], row["dtype"], **row["shape"])
        plan_text = "{width} x {threads} x {blocks}, {depth} ahead".format(**row["plan"])
        cells = [case.name, case.dtype, case.shape, row["pass"], f"{row['bytes'] / 1e6:.0f}", plan_text]
        if "cold" not in row:
            lines.append(" | ".join([*cells, row.get("fault", ""), *[""] * 7]))
            continue
        cold, warm = row["cold"], row.get("warm")
        cells += [f"{cold['median_us']:.1f}", f"{cold['min_us']:.1f} - {cold['max_us']:.1f}"]
        cells.append(f"{warm['median_us']:.1f}" if warm else "")
        cells.append(f"{row['rate'] / 1e12:.2f}" if "rate" in row else "")
        cells += [f"{row[name]:.2f}" if name in row else "" for name in ("of_copy", "of_matched", "naive_over_ours")]
        judged = [f"{t['target']} {'reached' if t['reached'] else 'MISSED'}" for t in row["targets"]]
        lines.append(" | ".join([*cells, "; ".join(judged)]))
    return "\n".join(f"| {line} |" for line in lines)


def dry_table(chosen: Sequence[Case]) -> str:
    """What would be run, with the plan for an H200 and the time at an assumed bandwidth."""
    lines = ["cell | dtype | (L, B, d) | pass | MB | bytes/element | sets | plan | floor us", "--- | " * 8 + "---"]
    for case in chosen:
        for which in PASSES:
            row = described(case, which, H200)
            plan_text = "{width} x {threads} x {blocks}, {depth} ahead".format(**row["plan"])
            cells = [case.name, case.dtype, case.shape, which.label, f"{row['bytes'] / 1e6:.0f}"]
            cells += [f"{row['bytes'] / case.elements:.4g}", str(number_of_sets(case, H200_L2)), plan_text]
            lines.append(" | ".join([*cells, f"{1e6 * row['bytes'] / H200_COPY:.1f}"]))
    return "\n".join(f"| {line} |" for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# The host


def host_times(timer: Timer) -> dict[str, Any]:
    """Microseconds of the host for a call at (32, 32, 128) in float32, without waiting for the GPU."""
    case = Case("sru", "float32", 32, 32, 128)
    memory, xp = Memory(case, timer.library), timer.cupy
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return xp.asarray(rng.standard_normal(shape).astype(np.float32))

    L, B, d = case.L, case.B, case.d
    x, u, weight, bias, v = array(L, B, d), array(L, B, 1, 3, d), array(1, 3, d, d), array(1, 2, d), array(1, 2, d)
    out = xp.empty((L, B, d), np.float32), xp.empty((1, B, d), np.float32)
    saved = sru_rt.sru_recurrence(u, x, bias, v, save=True)[2]
    calls: dict[str, Callable[[], object]] = {
        "launch.run, forward": memory.call(Pass(True, 0)),
        "sru_recurrence, out=": lambda: sru_rt.sru_recurrence(u, x, bias, v, out=out),
        "sru_backward": lambda: sru_rt.sru_backward(saved, x),
        "sru_forward, out=": lambda: sru_rt.sru_forward(x, weight, bias, v, out=out),
    }
    return {name: statistics_of([host_time(call, timer) for _ in range(timer.rounds)]) for name, call in calls.items()}


def host_time(call: Callable[[], object], timer: Timer, n: int = 100) -> float:
    """Of `n` calls in a row, few enough that the GPU's queue takes them all."""
    call()
    timer.cupy.cuda.Device().synchronize()
    before = time.perf_counter()
    for _ in range(n):
        call()
    took = time.perf_counter() - before
    timer.cupy.cuda.Device().synchronize()
    return 1e6 * took / n


def clocks() -> str:
    """What nvidia-smi says of the clocks, or why it says nothing."""
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    try:
        asked = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    return (asked.stdout or asked.stderr).strip()


def gpu_environment(timer: Timer) -> dict[str, Any]:
    runtime = timer.cupy.cuda.runtime
    installed = sorted((found.metadata["Name"] or "", found.version) for found in importlib.metadata.distributions())
    wanted = {name: version for name, version in installed if name.startswith(("cupy", "nvidia-", "ml_dtypes"))}
    return {
        "device": timer.properties["name"].decode(),
        "multiprocessors": timer.facts.multiprocessors,
        "l2_bytes": timer.l2_bytes,
        "memory_bytes": int(timer.properties["totalGlobalMem"]),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "nvrtc": compile_gpu.version(),
        "packages": wanted,
    }


def gpu_or_reason() -> Any:
    """CuPy, or why there is no GPU to measure."""
    try:
        import cupy

        if cupy.cuda.is_available():
            return cupy
        return "CuPy finds none"
    except Exception as error:  # what CuPy raises for a missing library has many types
        return str(error)


def shape_of(text: str) -> tuple[int, ...]:
    shape = tuple(map(int, text.split(",")))
    if len(shape) not in (3, 4) or min(shape) < 1 or shape[3:] > (2,):
        raise ValueError(text)
    return shape


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = ROOT / "benchmarks/results" if (ROOT / ".git").exists() else Path()
    option = parser.add_argument
    option("--cell", nargs="+", choices=CELLS, default=list(CELLS), help="default: all")
    option("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: all")
    option("--shape", nargs="+", type=shape_of, metavar="L,B,d[,D]", help="default: those of the targets")
    option("--rounds", type=int, default=9, help="replays of a graph, of which each is timed; default: %(default)s")
    option("--launches", type=int, default=20, help="of a graph, at least; default: %(default)s")
    option("--budget", type=float, default=480, help="seconds, after which no case begins; default: %(default)s")
    option("--quick", action="store_true", help="the first shape, three replays")
    option("--dry-run", action="store_true", help="print what would be run; needs no GPU")
    option("--out", type=Path, default=folder / f"gpu-{datetime.date.today()}.json", help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    chosen = cases(args.cell, args.dtype, args.shape)
    if args.quick:
        chosen, args.rounds = [case for case in chosen if case[2:] == chosen[0][2:]], 3
    if args.dry_run:
        print(dry_table(chosen))
        return 0
    cupy = gpu_or_reason()
    if isinstance(cupy, str):
        print(f"there is no GPU to measure: {cupy}; --dry-run prints what would be run", file=sys.stderr)
        return 1
    os.environ.setdefault("SRU_RT_CPU", "compiled")  # what results are compared with
    timer = Timer(cupy, args.rounds, args.launches)
    report = run(chosen, timer, args)
    print(table(report["rows"]), f"\nwritten: {args.out}")
    return int(any(row["fault"].startswith("no speed") for row in report["rows"]))


def run(chosen: Sequence[Case], timer: Timer, args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes the report after every case, so that a run that is cut off leaves what it has."""
    end = time.perf_counter() + args.budget
    rows: list[dict[str, Any]] = []
    report = {"date": str(datetime.date.today()), **environment(ROOT), "gpu": gpu_environment(timer)}
    copies = copy_rates(timer, (64 if args.quick else 1024) << 20)
    report |= {"copies": copies, "host_us": host_times(timer), "clocks": [clocks()], "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        if time.perf_counter() > end:
            print(f"out of time before {case}", file=sys.stderr)
            break
        try:
            rows += measure(case, timer, copies["rate"])
        except (SruRtError, MemoryError) as error:
            failed = {"fault": f"no speed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            rows.append(described(case, PASSES[0], timer.facts) | failed)
        compare_ragged(rows)
        args.out.write_text(json.dumps(report | {"clocks": [*report["clocks"], clocks()]}, indent=1) + "\n")
        timer.cupy.get_default_memory_pool().free_all_blocks()
        print(f"{case.name} {case.dtype} {case.shape} done", file=sys.stderr)
    return report


if __name__ == "__main__":
    raise SystemExit(main())
