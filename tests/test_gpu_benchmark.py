"""The benchmark of the GPU's kernels: what it counts and how it judges, and a run of it under the emulation."""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")  # which the stand-in for CuPy needs, and bfloat16 on the CPU
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks are not part of this installation")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_recurrence

    return gpu_recurrence


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
    def record(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def timer(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A timer on the emulated GPU, on which the replay of a graph takes 100 us."""
    from emu import fake_cupy

    with fake_cupy.installed(monkeypatch) as cupy:
        facts = cupy.cuda.runtime.getDeviceProperties(0) | {"l2CacheSize": 20_000}
        add = {
            cupy.cuda: {"Stream": Stream, "Event": Event, "get_elapsed_time": lambda begin, end: 0.1},
            cupy.cuda.runtime: {
                "getDeviceProperties": lambda device: facts,
                "memGetInfo": lambda: (1 << 30, 1 << 30),
                "memcpyAsync": lambda *_: None,
                "memcpyDeviceToDevice": 3,
            },
            cupy: {
                "get_default_memory_pool": lambda: types.SimpleNamespace(
                    free_bytes=lambda: 0, free_all_blocks=lambda: None
                )
            },
        }
        for module, members in add.items():
            for name, member in members.items():
                monkeypatch.setattr(module, name, member, raising=False)
        bench.pattern.cache_clear()
        yield bench.Timer(cupy, rounds=7, launches=20)
        bench.pattern.cache_clear()


@pytest.mark.parametrize(
    "dtype, expected",
    [  # forward: four reads and h; backward: five reads and four writes; and c, in the dtype of the state
        ("bfloat16", [10, 14, 22, 10 + 4 / 32, 18 + 4 / 32]),
        ("float16", [10, 14, 22, 10 + 4 / 32, 18 + 4 / 32]),
        ("float32", [20, 24, 40, 20 + 4 / 32, 36 + 4 / 32]),
        ("float64", [40, 48, 80, 40 + 8 / 32, 72 + 8 / 32]),
    ],
)
def test_bytes_moved(bench: Any, dtype: str, expected: list[float]) -> None:
    case = bench.Case("sru", dtype, 6, 5, 4, 2)
    assert [bench.moved(case, which) for which in bench.PASSES] == [240 * n for n in expected]
    labels = "forward; forward, save=True; backward, save=True; forward, save=32; backward, save=32"
    assert [which.label for which in bench.PASSES] == labels.split("; ")


def test_default_cases(bench: Any) -> None:
    chosen = bench.cases(["sru"], bench.DTYPES, None)
    assert len(set(chosen)) == len(chosen)
    assert (chosen[0].L, chosen[0].B, chosen[0].d) == (2048, 16, 1024)
    for dtype in bench.DTYPES:
        own = [case for case in chosen if case.dtype == dtype]
        enough = {case.channels for case in own if bench.moved(case, bench.PASSES[0]) >= 256e6}
        assert enough >= {n << 10 for n in (8, 16, 32, 64, 128)}
        assert {(case.L, case.B, case.d) for case in own} >= {(32, 32, 128), (512, 32, 512), (65536, 1, 1024)}
        assert sum(case.ragged for case in own) == 1
        assert {case.D for case in own} == {1, 2}


def test_given_cases(bench: Any) -> None:
    assert bench.cases(["sru"], ["float32"], [(3, 2, 4), (3, 2, 4, 2)]) == [
        bench.Case("sru", "float32", 3, 2, 4),
        bench.Case("sru", "float32", 3, 2, 4, 2),
    ]
    assert bench.shape_of("3,2,4") == (3, 2, 4)
    for wrong in ("3,2", "3,2,4,3", "3,0,4", "3,2,x"):
        with pytest.raises(ValueError):
            bench.shape_of(wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_copy_has_the_streams_of_its_pass(bench: Any, dtype: str) -> None:
    case = bench.Case("sru", dtype, 6, 5, 4, 2)
    sizes, size = bench.sizes_in_bytes(case), bench.plan.ITEMSIZE[dtype] * case.elements
    for which in bench.PASSES[:3]:
        reads, writes = bench.copied_arrays(case, which)
        assert (len(reads) + len(writes)) * size == bench.moved(case, which)
        for side in (reads, writes):
            assert len(set(side)) == len(side)
            assert all(offset % size == 0 and offset + size <= sizes[name] for name, offset in side)
        given, made = {name for name, _ in reads}, {name for name, _ in writes}
        assert made == ({"h", "saved0"} if which == bench.Pass(True, 1) else {"h"} if which.forward else {"du", "dx"})
        assert given == ({"u", "x"} if which.forward else {"u", "x", "dh", "saved0"})


def test_sets_exceed_the_cache(bench: Any) -> None:
    case = bench.Case("sru", "bfloat16", 32, 32, 128)
    n = bench.number_of_sets(case, 60 << 20)
    assert n * bench.moved(case, bench.PASSES[0]) >= 4 * (60 << 20) > (n - 1) * bench.moved(case, bench.PASSES[0])
    assert bench.number_of_sets(case._replace(L=2048, B=32, d=1024), 60 << 20) == 3


def test_lengths_are_half_padding(bench: Any) -> None:
    lengths = bench.lengths(bench.Case("sru", "float32", 100, 40, 8, ragged=True))
    assert lengths.min() == 1 and lengths.max() == 100
    assert abs(lengths.mean() - 50) < 2
    assert list(lengths) != sorted(lengths)


def test_dry_run_needs_no_gpu(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry-run", "--dtype", "bfloat16", "--shape", "2048,16,1024", "32,32,128,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(bench.PASSES)
    assert lines[2].startswith("| sru | bfloat16 | (2048, 16, 1024) | forward | 336 | 10 | 3 | ")
    assert lines[2].endswith(" ahead | 78.0 |")
    assert "(32, 32, 128, D=2)" in lines[-1]
    assert bench.main(["--dry-run", "--quick", "--dtype", "float32"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(bench.PASSES)


def test_without_a_gpu_it_says_so(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert bench.main(["--out", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("there is no GPU to measure: ")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def took(microseconds: float) -> dict[str, Any]:
    return {"median_us": microseconds, "min_us": microseconds, "max_us": microseconds, "n": 9, "sets": 3}


def row_of(bench: Any, case: Any, which: Any, cold: float, naive: float | None = None) -> dict[str, Any]:
    """A row as if measured, on a GPU that copies 4 TB/s."""
    found = {"cold": took(cold)}
    if not case.ragged:
        found["matched"] = took(cold) | {"rate": 3e12}
    if naive:
        found["naive"] = took(naive)
    described = bench.described(case, which, bench.H200) | {"fault": ""}
    return described | bench.compared(case, which, found, rate=4e12)


@pytest.mark.parametrize(
    "shape, which, cold, naive, expected",
    [  # 335.5 MB forward, 738.2 MB backward at the first shape
        ((2048, 16, 1024), (True, 0), 93.0, 500.0, [(">= 0.9 of copy", True), (">= 5 x naive", True)]),
        ((2048, 16, 1024), (True, 0), 94.0, 460.0, [(">= 0.9 of copy", False), (">= 5 x naive", False)]),
        ((2048, 16, 1024), (False, 1), 217.0, None, [(">= 0.85 of copy", True)]),
        ((512, 64, 1024), (True, 0), 104.0, 100.0, [(">= 0.8 of copy", True), (">= 1 x naive", False)]),
        ((512, 64, 1024), (True, 0), 106.0, None, [(">= 0.8 of copy", False)]),
        ((65536, 1, 1024), (True, 0), 1000.0, None, []),  # too few channels for a sequential kernel
        ((512, 32, 512), (True, 0), 27.0, None, [("<= 27.1 us", True)]),  # 1.15 times the floor of 21.0, and 3
        ((512, 32, 512), (True, 0), 28.0, None, [("<= 27.1 us", False)]),
        ((32, 32, 128), (True, 0), 4.0, None, [("<= 4.1 us", True)]),  # 1.15 times the chain of 0.99, and 3
    ],
)
def test_verdicts(bench: Any, shape: Any, which: Any, cold: float, naive: Any, expected: Any) -> None:
    row = row_of(bench, bench.Case("sru", "bfloat16", *shape), bench.Pass(*which), cold, naive)
    assert [(one["target"], one["reached"]) for one in row["targets"]] == expected


def test_comparisons_of_a_row(bench: Any) -> None:
    row = row_of(bench, bench.Case("sru", "bfloat16", 2048, 16, 1024), bench.PASSES[0], 100.0, 650.0)
    assert row["bytes"] == 335544320
    assert row["rate"] == pytest.approx(3.3554e12, rel=1e-4)
    assert (row["of_copy"], row["of_matched"], row["naive_over_ours"]) == (0.839, 1.118, 6.5)
    assert row["floor_us"] == pytest.approx(83.886)
    assert row["plan"].keys() == {"width", "depth", "threads", "B", "scratch_in_shared", "blocks"}


def test_ragged_rows_are_held_against_whole_ones(bench: Any) -> None:
    case = bench.Case("sru", "float32", 2048, 16, 1024)
    rows = [row_of(bench, case, bench.PASSES[0], 180.0), row_of(bench, case, bench.PASSES[1], 400.0)]
    rows += [row_of(bench, case._replace(ragged=True), which, 100.0) for which in bench.PASSES[:3]]
    bench.compare_ragged(rows)
    assert [row.get("padded_over_ours") for row in rows] == [None, None, 1.8, 4.0, None]
    assert rows[2]["targets"] == [{"target": ">= 1.8 x padded", "reached": True}]
    assert "of_copy" not in rows[2]  # padding is not read


def test_table(bench: Any) -> None:
    case = bench.Case("sru", "bfloat16", 2048, 16, 1024)
    rows = [row_of(bench, case, bench.PASSES[0], 100.0, 650.0)]
    rows.append(bench.described(case, bench.PASSES[1], bench.H200) | {"fault": "no speed: h differs by 1.0e+00"})
    lines = bench.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 100.0 | 100.0 - 100.0 |  | 3.36 | 0.84 | 1.12 | 6.50 |" in lines[2]
    assert ">= 0.9 of copy MISSED; >= 5 x naive reached" in lines[2]
    assert "no speed: h differs by 1.0e+00" in lines[3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("ragged", [False, True])
def test_results_agree_with_the_cpu(bench: Any, timer: Any, dtype: str, ragged: bool) -> None:
    case = bench.Case("sru", dtype, 35, 3, 6, 2, ragged)
    errors = bench.differences(case, timer.library)
    assert bench.fault(errors, dtype) == ""
    names = "h last0 saved0 du dx dbias dv dc0".split()
    assert {name.split(": ")[1] for name in errors} == set(names)
    if not ragged:
        naive = bench.differences(case, timer.library, timer.naive)
        assert bench.fault(naive, dtype) == ""
        assert {name.split(": ")[0] for name in naive} == {"forward", "forward, save=True", "backward, save=True"}


def test_disagreement_takes_the_speed_away(bench: Any, timer: Any) -> None:
    case = bench.Case("sru", "float32", 9, 2, 4)

    def forgets_the_first_steps(memory: Any, which: Any) -> None:
        timer.naive(memory, which)
        if which.forward:
            memory.bytes["h"][:32] = 0

    errors = bench.differences(case, timer.library, forgets_the_first_steps)
    assert bench.fault(errors, "float32").startswith("no speed: forward: h differs by ")
    never = bench.differences(case, timer.library, lambda memory, which: None)
    assert "h differs by nan" in bench.fault(never, "float32")


def test_copy_kernel(bench: Any, timer: Any) -> None:
    arrays = [timer.cupy.asarray(np.random.default_rng(i).integers(0, 256, 4096).astype(np.uint8)) for i in range(5)]
    pointers = [array.data.ptr for array in arrays]
    timer.copy(pointers[:3], pointers[3:], 4096)
    expected = arrays[0].get() ^ arrays[1].get() ^ arrays[2].get()
    assert all((array.get() == expected).all() for array in arrays[3:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_kernels_compile(bench: Any, dtype: str) -> None:
    pytest.importorskip("cupy")
    case = bench.Case("sru", dtype, 2048, 16, 1024)
    for text in (bench.naive_text(case), bench.copy_text(7, 4)):
        _, log = bench.compile_gpu.compile(text, ("-arch=sm_90", *bench.compile_gpu.FLAGS))
        assert "0 bytes spill stores" in log


def test_every_set_has_its_turn(timer: Any) -> None:
    calls: list[int] = []
    found = timer.times([lambda i=i: calls.append(i) for i in range(3)])
    assert calls == [0, 1, *([0, 1, 2] * 7)]  # two to compile and load, then a graph of 21
    assert found == took(round(100 / 21, 3)) | {"n": 7}


def test_host_time_counts_calls(bench: Any, timer: Any) -> None:
    calls: list[int] = []
    assert bench.host_time(lambda: calls.append(0), timer, 50) > 0
    assert len(calls) == 51


def test_a_whole_run(
    bench: Any, timer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_rates = bench.copy_rates
    monkeypatch.setattr(bench, "copy_rates", lambda timer, nbytes: copy_rates(timer, 4096))
    monkeypatch.setattr(bench, "host_times", lambda timer: {})
    small = [bench.Case("sru", "bfloat16", 35, 2, 8, 2), bench.Case("sru", "bfloat16", 35, 2, 8, 2, ragged=True)]
    too_large = bench.Case("sru", "float32", 1 << 20, 2, 64)
    args = argparse.Namespace(out=tmp_path / "new" / "gpu.json", budget=1000.0, quick=True)
    report = bench.run([*small, too_large], timer, args)
    stored = json.loads(args.out.read_text())
    assert stored.keys() >= {"date", "commit", "machine", "versions", "gpu", "copies", "host_us", "clocks", "rows"}
    assert stored["gpu"]["device"] == "stand-in" and stored["gpu"]["nvrtc"] == "12.99"
    assert len(stored["clocks"]) == 2
    assert stored["copies"]["rate"] == max(stored["copies"][way]["rate"] for way in ("memcpy", "kernel"))
    assert stored["copies"]["rate"] == pytest.approx(8192 / 5e-6)  # 4096 bytes read and as many written in 5 us
    assert [row["pass"] for row in stored["rows"]] == [which.label for which in bench.PASSES] * 3
    whole, ragged, large = (stored["rows"][i : i + 5] for i in (0, 5, 10))
    assert all(not row["fault"] and row["cold"]["n"] == 7 and "of_copy" in row for row in whole)
    assert ["naive" in row for row in whole] == [True, True, True, False, False]
    assert all(not row["fault"] and row["padded_over_ours"] > 0 and "rate" not in row for row in ragged)
    assert all(row["fault"].startswith("not measured: takes ") and "cold" not in row for row in large)
    assert len(bench.table(report["rows"]).splitlines()) == 2 + 15
    capsys.readouterr()
    bench.run(small, timer, argparse.Namespace(out=tmp_path / "late.json", budget=-1.0, quick=True))
    assert "out of time" in capsys.readouterr().err
