"""The bench on a GPU: what it counts and how it judges, and its kernels and clocks under the emulation."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")  # which the stand-in for CuPy needs, and bfloat16 on the CPU

from sru_rt import compile_gpu
from sru_rt.bench import child, clocks, command, parts, rows
from sru_rt.bench.contest import APART, RECOMPUTED, Place
from sru_rt.bench.contestants import BY_NAME, copies, naive, sru
from sru_rt.bench.problem import BACKWARD, FORWARD, SAVE, Problem, errors, fault, moved, reference, streams
from sru_rt.bench.rows import Row
from sru_rt.machine import Device

ONE_SET = Place("gpu", 1, lambda nbytes: 1)


class Stream:
    """Streams that can be captured: a graph is the calls that were made, and replays do nothing."""

    graphs = 0
    ptr = 0

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        Stream.graphs += 1

    def end_capture(self) -> Any:
        return types.SimpleNamespace(launch=lambda stream: None)


class Event:
    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Pool:
    """Of memory, in which 1000 bytes are found."""

    current: Any = None  # whose malloc() the library calls

    def malloc(self) -> None:
        """Only its name is asked for: arrays of the emulation are made elsewhere."""

    def total_bytes(self) -> int:
        return 1000

    def free_all_blocks(self) -> None:
        pass


@contextlib.contextmanager
def using_allocator(malloc: Any) -> Iterator[None]:
    before, Pool.current = Pool.current, malloc.__self__
    yield
    Pool.current = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulated GPU, on which the replay of a graph takes 100 us, with the memory of a process that measures."""
    from emu import fake_cupy

    with fake_cupy.installed(monkeypatch) as cupy:
        facts = cupy.cuda.runtime.getDeviceProperties(0) | {"l2CacheSize": 2_000}
        add = {
            cupy.cuda: {
                "Stream": Stream,
                "Event": Event,
                "get_elapsed_time": lambda begin, end: 0.1,
                "MemoryPool": Pool,
                "using_allocator": using_allocator,
            },
            cupy.cuda.runtime: {
                "getDeviceProperties": lambda device: facts,
                "memcpyAsync": lambda *_: None,
                "memcpyDeviceToDevice": 3,
            },
            cupy: {"get_default_memory_pool": Pool},
        }
        for module, members in add.items():
            for name, member in members.items():
                monkeypatch.setattr(module, name, member, raising=False)
        monkeypatch.setattr(copies, "GPU_BYTES", 4096)
        forget()
        yield cupy
        forget()


def forget() -> None:
    for one in (copies.function, child._built, child._checked, reference):
        one.cache_clear()
    for memory in (child._rows, child._calls, child._clocks):
        memory.clear()


# ----------------------------------------------------------------------------------------------------------------------
# What is counted


@pytest.mark.parametrize(
    "dtype, expected",
    [  # forward: four reads and h; backward: five reads and four writes; and c, in the dtype of the state
        ("bfloat16", [10, 14, 22, 10 + 4 / 32, 18 + 4 / 32]),
        ("float16", [10, 14, 22, 10 + 4 / 32, 18 + 4 / 32]),
        ("float32", [20, 24, 40, 20 + 4 / 32, 36 + 4 / 32]),
        ("float64", [40, 48, 80, 40 + 8 / 32, 72 + 8 / 32]),
    ],
)
def test_bytes_moved(dtype: str, expected: list[float]) -> None:
    problem = Problem("cell", "SRU", dtype, 6, 5, 4, 2)
    assert [moved(problem, which) for which in (*APART, *RECOMPUTED)] == [240 * n for n in expected]


def test_bytes_of_every_cell() -> None:
    """The paper's tables, in values of x's width for the forward and, with states kept, the backward."""
    streams = {"SRU": (5, 10), "QRNN fo": (4, 8), "QRNN ifo with highway": (6, 12), "minGRU": (3, 6), "minLSTM": (4, 8)}
    for name, (forward, backward) in streams.items():
        problem = Problem("cell", name, "float32", 1, 1, 1)
        assert (moved(problem, FORWARD) / 4, moved(problem, BACKWARD) / 4) == (forward, backward)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_copy_has_the_streams_of_its_pass(dtype: str) -> None:
    problem = Problem("cell", "SRU", dtype, 6, 5, 4, 2)
    item = {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    for which in APART:
        reads, writes = copies.counts(problem, which)
        assert (reads + writes) * item * problem.elements == moved(problem, which)
        assert writes * item == sum(streams(problem, which)[1])


def test_sets_exceed_the_cache() -> None:
    clock = clocks.Clock()
    assert clock.sets(0) == clock.sets(1) == 1
    clock.cache_bytes = 60 << 20
    n = clock.sets(2_000_000)
    assert n * 2_000_000 >= 4 * (60 << 20) > (n - 1) * 2_000_000
    assert (clock.sets(100 << 20), clock.sets(1 << 30), clock.sets(1)) == (3, 1, 256)


def test_default_cases_hold_the_targets_shapes() -> None:
    for dtype in ("bfloat16", "float32"):
        groups = [p for name in ("cells", "batch") for g in parts.BY_NAME[name].groups("gpu", [dtype], ()) for p in g]
        enough = {p.channels for p in groups if p.name == "SRU" and moved(p, FORWARD) >= parts.ENOUGH_BYTES}
        assert enough >= {n << 10 for n in (8, 16, 32, 64, 128)}
        assert {(p.L, p.B, p.d) for p in groups} >= {(2048, 16, 1024), (32, 32, 128), (512, 32, 512), (65536, 1, 1024)}


# ----------------------------------------------------------------------------------------------------------------------
# How it is judged


def judged(problem: Problem, which: str, us: float, who: str = "sru_rt", others: dict[Any, float] | None = None) -> Any:
    """A row as if measured, on a GPU that copies 4 TB/s."""
    shared = problem._replace(level="cell", name="SRU", ragged=False)
    copy = Row("cells", shared, "copy", "1 GiB", 1)
    samples = {copy: [2 * copies.GPU_BYTES / 4e12], Row("cells", problem, who, which, 1): [us * 1e-6]}
    for (name, other), took in (others or {}).items():
        samples[Row("cells", other, name, which, 1)] = [took * 1e-6]
    facts = {row: {"fault": ""} for row in samples}
    return rows.finished(samples, facts, "gpu", 32 << 20)[1]


@pytest.mark.parametrize(
    "shape, which, us, target, reached",
    [  # 335.5 MB forward, 738.2 MB backward at the first shape
        ((2048, 16, 1024), FORWARD, 93.0, 0.9, True),
        ((2048, 16, 1024), FORWARD, 94.0, 0.9, False),
        ((2048, 16, 1024), BACKWARD, 217.0, 0.85, True),
        ((512, 64, 1024), FORWARD, 104.0, 0.8, True),
        ((512, 64, 1024), FORWARD, 106.0, 0.8, False),
    ],
)
def test_targets_of_bandwidth(shape: Any, which: str, us: float, target: float, reached: bool) -> None:
    row = judged(Problem("cell", "SRU", "bfloat16", *shape), which, us)
    assert (row["target"], row["reached"]) == (target, reached)
    assert row["against"] == "copy, 1 GiB" and row["value"] == pytest.approx(row["rate"] / 4000, rel=1e-2)
    assert "in_time" not in row


@pytest.mark.parametrize(
    "shape, us, most, in_time",
    [
        ((65536, 1, 1024), 321.0, 320.0, False),
        ((512, 32, 512), 27.0, 27.1, True),  # 1.15 times the floor of 21.0, and 3
        ((512, 32, 512), 28.0, 27.1, False),
        ((32, 32, 128), 4.0, 4.1, True),  # 1.15 times the chain of 0.99, and 3
    ],
)
def test_targets_of_time(shape: Any, us: float, most: float, in_time: bool) -> None:
    row = judged(Problem("cell", "SRU", "bfloat16", *shape), FORWARD, us)
    assert (row["most_us"], row["in_time"]) == (most, in_time)
    assert "reached" not in row


def test_naive_and_ragged_rows_are_held_against_ours() -> None:
    problem = Problem("cell", "SRU", "bfloat16", 2048, 16, 1024)
    row = judged(problem, FORWARD, 500.0, "naive kernel", {("sru_rt", problem): 100.0})
    assert (row["value"], row["target"], row["reached"]) == (5.0, 5.0, True)
    assert row["against"] == "SRU by sru_rt, forward"
    row = judged(problem._replace(ragged=True), FORWARD, 100.0, others={("sru_rt", problem): 170.0})
    assert (row["value"], row["target"], row["reached"], row["unit"]) == (1.7, 1.8, False, "")  # padding is not read


# ----------------------------------------------------------------------------------------------------------------------
# What runs


def small(level: str, name: str, dtype: str = "float32", **more: Any) -> Problem:
    return Problem(level, name, dtype, **{"L": 35, "B": 3, "d": 16, **more})


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("who", ["sru_rt", "naive kernel"])
@pytest.mark.parametrize("name", ["SRU", "minGRU", "own cell"])
def test_results_agree_with_float64(gpu: Any, who: str, name: str, dtype: str) -> None:
    problem = small("cell", name, dtype, D=2)
    differences = errors(BY_NAME[who].build(problem, ONE_SET).results(), reference(problem))
    assert fault(problem, differences) == ""
    prefixes = {"forward", "forward, save=True", "backward", "forward, save=32", "backward, save=32"}
    assert {name.rpartition(": ")[0] for name in differences} == ({""} if who == "naive kernel" else prefixes)


@pytest.mark.parametrize("problem", [small("layer", "SRU"), small("layer", "SRU", L=1), small("train", "SRU", L=5)])
def test_layers_agree_with_float64(gpu: Any, problem: Problem) -> None:
    differences = errors(BY_NAME["sru_rt"].build(problem, ONE_SET).results(), reference(problem))
    assert fault(problem, differences) == ""


@pytest.mark.parametrize("ragged", [False, True])
def test_a_group_is_prepared_and_timed(gpu: Any, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "LAUNCHES", 2)
    monkeypatch.setattr(clocks, "HOST_CALLS", 2)
    problem = small("cell", "SRU", "bfloat16", ragged=ragged)
    planned = [row for row in rows.planned("cells", [problem], "gpu", 1) if row.contestant.process == "arrays"]
    unpadded = set() if ragged else {"matched copy", "naive kernel", "sru_rt, prepared"}
    assert {row.who for row in planned} == {"copy", "sru_rt"} | unpadded
    facts = child.prepare(planned, "gpu")
    assert [one["fault"] for one in facts] == [""] * len(planned)
    assert all(one["same_bits"] and one["error"] > 0 for row, one in zip(planned, facts) if row.who == "sru_rt")
    assert all(one["host_us"] > 0 and one["peak_mb"] == 0.001 for one in facts)
    assert {"plan" in one for row, one in zip(planned, facts) if row.who == "sru_rt"} == {True}
    samples = {row: child.block(i, 1e-4) for i, row in enumerate(planned)}
    assert all(one["launched"] == "as a graph" for one in facts)
    assert all(times and max(times) == pytest.approx(1e-4 / 2) for times in samples.values())
    found = rows.finished(samples, dict(zip(planned, facts)), "gpu", 32 << 20)
    assert all("value" in row for row in found if row["who"] != "copy" and not ragged)


def test_what_is_wrong_has_no_speed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A naive kernel that forgets its first steps, and one that never runs."""
    problem = small("cell", "SRU")
    planned = [row for row in rows.planned("cells", [problem], "gpu", 1) if row.who == "naive kernel"]
    run = naive._Arrays.run

    def forgets(self: Any, which: str) -> None:
        run(self, which)
        self.arrays["h"][:3] = 0

    for wrong, message in ((forgets, "no speed: h differs by "), (lambda self, which: None, "h differs by nan")):
        forget()
        monkeypatch.setattr(naive._Arrays, "run", wrong)
        facts = child.prepare(planned, "gpu")
        assert all(message in one["fault"] and "peak_mb" not in one for one in facts)


def test_copy_kernel(gpu: Any) -> None:
    arrays = [gpu.asarray(np.random.default_rng(i).integers(0, 256, 4096).astype(np.uint8)) for i in range(5)]
    pointers = [array.data.ptr for array in arrays]
    copies.copy(pointers[:3], pointers[3:], 4096)
    expected = arrays[0].get() ^ arrays[1].get() ^ arrays[2].get()
    assert all((array.get() == expected).all() for array in arrays[3:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_kernels_compile(dtype: str) -> None:
    pytest.importorskip("cupy")
    for text in (naive.text(Problem("cell", "SRU", dtype, 2048, 16, 1024)), copies.copy_text(7, 4)):
        _, log = compile_gpu.compile(text, ("-arch=sm_90", *compile_gpu.FLAGS))
        assert "0 bytes spill stores" in log


def test_every_set_has_its_turn(gpu: Any) -> None:
    calls: list[int] = []
    clock, three = clocks.CuPyClock(), [lambda i=i: calls.append(i) for i in range(3)]
    found = clock.facts("row", three)
    assert (found["launched"], found["peak_mb"]) == ("as a graph", 0.001) and found["host_us"] > 0
    turns = [0, *([0, 1, 2] * 14)]  # once for its memory; to compile and load, then a graph of 21
    assert calls[: len(turns)] == turns
    del calls[:]
    assert clock.block("row", three, 3.1e-4) == pytest.approx([1e-4 / 21] * 3)
    assert calls == []


def test_each_graph_has_memory_of_its_own(gpu: Any) -> None:
    """Else what one call of a row frees is given back, or to another row, and its graph writes there all the same."""
    clock, used = clocks.CuPyClock(), []
    for row in range(2):
        clock.facts(row, [lambda: used.append(Pool.current)])
    memory = [pool for pool in dict.fromkeys(used) if pool]
    assert len(memory) == 4  # of a peak and of a graph, for each row
    assert {replay.args[0].args[2] for replay, _ in clock._replays.values()} == {memory[1], memory[3]}


def test_what_cannot_be_captured_is_launched_one_by_one(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> Any:
        raise RuntimeError("cudaErrorStreamCapture\nUnsupported")

    monkeypatch.setattr(Stream, "end_capture", fails)
    calls: list[int] = []
    clock, one = clocks.CuPyClock(), [lambda: calls.append(0)]
    how = clock.facts("row", one)["launched"]
    assert how == "one by one, as a capture fails: cudaErrorStreamCapture Unsupported"
    before = len(calls)
    assert clock.block("row", one, 1e-4) == pytest.approx([1e-4 / 20])
    assert len(calls) == before + 2 * 20


def test_clock_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be captured becomes a graph of many calls, what cannot is called as often."""
    torch, calls = fake_torch(), []
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setitem(sys.modules, "torch", torch)
    clock = clocks.TorchClock()
    one = lambda: calls.append(0)  # noqa: E731  (it gets an attribute below)
    assert clock.facts("captured", [one])["launched"] == "as a graph"
    before = len(calls), torch.cuda.replays
    assert clock.block("captured", [one], 2e-4) == pytest.approx([1e-4 / 20] * 2)
    assert (len(calls), torch.cuda.replays) == (before[0], before[1] + 3)
    one.captures = False  # type: ignore[attr-defined]
    assert clock.facts("eager", [one])["launched"] == "one by one"
    before = len(calls), torch.cuda.replays
    clock.block("eager", [one], 2e-4)
    assert (len(calls), torch.cuda.replays) == (before[0] + 3 * 20, before[1])


def test_what_launches_on_the_legacy_stream_is_in_order_with_the_one_that_is_timed() -> None:
    """In both directions, and is captured by none."""
    seen: list[Any] = []

    def stream(name: str) -> Any:
        return types.SimpleNamespace(name=name, wait_stream=lambda other: seen.append((name, "waits for", other.name)))

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        seen.append(("on", stream.name))
        yield
        seen.append(("off", stream.name))

    ours, legacy = stream("ours"), stream("legacy")
    cuda = types.SimpleNamespace(current_stream=lambda: ours, default_stream=lambda: legacy, stream=on)
    call = sru._OnLegacyStream(types.SimpleNamespace(cuda=cuda), lambda: seen.append("launch") or 7)
    assert call() == 7 and not call.captures
    assert seen == [
        ("legacy", "waits for", "ours"),
        ("on", "legacy"),
        "launch",
        ("off", "legacy"),
        ("ours", "waits for", "legacy"),
    ]


def fake_torch() -> Any:
    """As much of torch.cuda as the clock uses. A replay takes 100 us."""

    class Context:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: Any) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            cuda.replays += 1

    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 0.1)
    cuda = types.SimpleNamespace(
        Stream=object,
        set_stream=lambda stream: None,
        graph=lambda g, stream: Context(),
        CUDAGraph=Graph,
        Event=lambda enable_timing: event,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 0,
        max_memory_allocated=lambda: 1000,
        replays=0,
    )
    return types.SimpleNamespace(cuda=cuda)


def test_a_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from sru_rt.__main__ import main

    assert main(["bench", "--list", "--device", "gpu", "--part", "cells", "--shape", "2048,16,1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "bfloat16 (2048, 16, 1024) SRU by sru_rt, forward:" in line)
    plan = command.plan_of(_first(), FORWARD, Device(90, 132))
    assert plan == "1 x 64 threads, 48 ahead, through shared memory"
    assert line.endswith(f": 10 B/element; on an H200 {plan}")
    assert lines[-1].endswith("of 1 parts")


def _first() -> Problem:
    return Problem("cell", "SRU", "bfloat16", 2048, 16, 1024)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from sru_rt.__main__ import main

    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert main(["bench", "--device", "gpu", "--out", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("there is no GPU to measure: ")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_saved_states_count_where_they_are_kept() -> None:
    problem = _first()
    assert moved(problem, SAVE) - moved(problem, FORWARD) == 4 * problem.elements
