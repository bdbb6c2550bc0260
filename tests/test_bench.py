"""The bench on the CPU: who takes part, that what is wrong has no speed, that a run can go on, tables and pictures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sru_rt import memory
from sru_rt.__main__ import main
from sru_rt.bench import child, clocks, contestants, parts, problem, record, report, rows, runner
from sru_rt.bench.contest import Contestant, LeftOut, Place
from sru_rt.bench.contestants import BY_NAME, in_arrays
from sru_rt.bench.problem import BACKWARD, BOTH, FORWARD, Problem, errors, fault, reference
from sru_rt.bench.rows import Row
from sru_rt.errors import ArgumentError, LibraryError

HERE = Place("cpu", 1, lambda nbytes: 1)
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
LEVELS = {
    "scan": ("linear",),
    "cell": tuple(problem.CELLS)[:-1],
    "layer": ("SRU", "minGRU positive", "QRNN fo", "own cell"),
    "train": ("SRU",),
}


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    """What a measuring process has made is forgotten, and PyTorch has the threads that it had."""
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    threads = torch.get_num_threads() if torch else 0
    for cache in (child._built, child._checked, reference):
        cache.cache_clear()
    yield
    if torch:
        torch.set_num_threads(threads)


def tiny(level: str, name: str, **more: Any) -> Problem:
    return Problem(level, name, "float32", **{"L": 6, "B": 2, "d": 8, **more})


# ----------------------------------------------------------------------------------------------------------------------
# Who takes part


@pytest.mark.parametrize("one", contestants.ALL, ids=lambda one: one.name)
def test_every_contestant_agrees_with_float64(one: Contestant) -> None:
    if one.missing("cpu"):
        pytest.skip(one.missing("cpu"))
    done = 0
    for level, names in LEVELS.items():
        for name in names:
            for what in (
                tiny(level, name),
                tiny(level, name, D=2),
                tiny(level, name, L=1),
                tiny(level, name, L=1, layers=3),
                tiny(level, name, L=2, B=1, d=4),  # next to nothing, which some alone do
            ):
                if what.L == 2 and done:
                    continue
                wanted = one.passes(what, "cpu") if what.layers == 1 or (one.stacks and level == "layer") else ()
                if not wanted:
                    continue
                built = one.build(what, HERE)
                for which in wanted:
                    built.calls[which][0]()
                if built.results:
                    differences = errors(built.results(), built.expected or reference(what))
                    assert fault(what, differences, one.slack) == "", (one.name, what)
                    assert len(differences) >= 1
                done += 1
    assert done


def test_every_row_has_the_row_that_it_is_held_against() -> None:
    """In its group, so that both are measured in the same rounds."""
    for device in ("cpu", "gpu"):
        for part in parts.PARTS:
            for group in part.groups(device, (), ()):
                names = [one.name for one in contestants.ALL if not one.missing(device)]
                planned = [row for row in rows.planned(part.name, group, device, 2) if row.who in names]
                keys = {rows._key(row) for row in planned}
                assert len(keys) == len(planned)
                for row in planned:
                    against = row.contestant.against(row.problem, row.which, device)
                    if against and against.who in names:
                        assert rows._key(row, against.who, against.which, against.problem) in keys, row
                assert len({runner._key(rows.described(row)) for row in planned}) == len(planned)


def loop(gates: Any, tokens: Any, time: int) -> Any:
    """h = gates*h + tokens along an axis."""
    torch = importlib.import_module("torch")
    h, steps = torch.zeros_like(tokens.select(time, 0)), []
    for t in range(tokens.shape[time]):
        h = gates.select(time, t) * h + tokens.select(time, t)
        steps.append(h)
    return torch.stack(steps, time)


@pytest.mark.parametrize("who", ["accelerated-scan, warp", "accelerated-scan, scalar"])
def test_arrays_of_accelerated_scan(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """(B, d, L), gates before tokens. The library itself needs a GPU."""
    pytest.importorskip("torch", reason="needs PyTorch")
    for module in ("warp", "scalar"):
        stand_in = types.SimpleNamespace(scan=lambda gates, tokens: loop(gates, tokens, 2))
        monkeypatch.setitem(sys.modules, f"accelerated_scan.{module}", stand_in)
    what = tiny("scan", "linear", L=32)
    built = BY_NAME[who].build(what, HERE)
    assert fault(what, errors(built.results(), built.expected)) == ""
    if who.endswith("warp"):
        with pytest.raises(LeftOut, match="powers of two"):
            BY_NAME[who].build(what._replace(L=33), HERE)


@pytest.mark.parametrize("kind", ["fused_recurrent_hgrn", "chunk_hgrn"])
def test_arrays_of_fla(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """(B, L, d), tokens before the logarithms of gates. The library itself needs a GPU."""
    pytest.importorskip("torch", reason="needs PyTorch")
    stand_in = types.SimpleNamespace(**{kind: lambda x, g: (loop(g.exp(), x, 1), None)})
    monkeypatch.setitem(sys.modules, "fla.ops.hgrn", stand_in)
    what = tiny("scan", "linear")
    built = BY_NAME[f"fla, {kind}"].build(what, HERE)
    differences = errors(built.results(), built.expected)
    assert "dg" in differences and fault(what, differences) == ""


def test_sru_without_its_cuda_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute nothing, and say so in a warning alone."""
    pytest.importorskip("torch", reason="needs PyTorch")
    from sru_rt.bench.contestants import sru, tensors

    monkeypatch.setattr(tensors, "device", lambda: "cuda")
    monkeypatch.setattr(sru, "_imported", lambda: (None, "no nvcc"))
    with pytest.raises(LeftOut, match=r"its CUDA code does not build with torch .*: no nvcc"):
        BY_NAME["sru"].made(importlib.import_module("torch"), tiny("cell", "SRU"))


def test_sru_is_left_out_of_sequences_that_take_it_minutes() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    with pytest.raises(LeftOut, match="on the CPU beyond 2048 steps"):
        BY_NAME["sru"].made(torch, tiny("cell", "SRU", L=2049))


def test_what_is_not_installed_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = ("torch", "jax", "sru", "fla", "accelerated_scan", "minGRU_pytorch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    for what in (tiny("scan", "linear"), tiny("layer", "SRU"), tiny("layer", "minGRU positive")):
        planned = rows.planned("part", [what], "gpu", 1)
        others = {row.who for row in planned if row.which == rows.ALL_PASSES}
        assert others == {one.name for one in contestants.ALL if one.process != "arrays" and one.passes(what, "gpu")}
    assert BY_NAME["sru"].missing("gpu") == "left out: torch is not installed (pip install 'sru_rt[bench]')"
    assert BY_NAME["accelerated-scan, warp"].missing("cpu") == "left out: needs a GPU"


def test_copies_are_made_once_for_every_width() -> None:
    group = [tiny("cell", name) for name in parts.MOST]
    copies = [row for row in rows.planned("cells", group, "cpu", 2) if row.who == "copy"]
    assert {row.which for row in copies if row.which.endswith("B/element")} >= {f"{n} B/element" for n in (20, 24, 40)}
    assert len(copies) == len({(row.which, row.threads) for row in copies})
    assert [one["fault"] for one in child.prepare(copies, "cpu")] == [""] * len(copies)


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong has no speed


def facts_of(who: str, what: Problem) -> dict[str, dict[str, Any]]:
    planned = [row for row in rows.planned("part", [what], "cpu", 1) if row.who == who]
    return {row.which: found for row, found in zip(planned, child.prepare(planned, "cpu"))}


def test_wrong_gradients_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = problem.CELLS["minGRU"]

    def wrong(saved: Any, dh: Any, **more: Any) -> Any:
        """The reference, in float64, is right."""
        return cell.backward(saved, 1.001 * dh if dh.dtype == np.float32 else dh, **more)

    monkeypatch.setitem(problem.CELLS, "minGRU", cell._replace(backward=wrong))
    found = facts_of("sru_rt", tiny("cell", "minGRU"))
    assert found.keys() == {"forward", "forward, save=True", "backward"}
    assert all(one["fault"].startswith("no speed: backward: du differs by ") for one in found.values())
    assert all("peak_mb" not in one for one in found.values())


def test_a_wrong_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax", reason="needs JAX")
    from sru_rt.bench.contestants import jax_scans

    assert facts_of("lax.scan", tiny("scan", "linear"))[FORWARD]["fault"] == ""
    loop = jax_scans._loop
    monkeypatch.setattr(jax_scans, "_loop", lambda a, b: loop(a, b).at[-1].mul(1.01))
    child._checked.cache_clear()
    found = facts_of("lax.scan", tiny("scan", "linear"))
    assert found.keys() == {FORWARD, BACKWARD, BOTH}
    assert all(one["fault"].startswith("no speed: h differs by ") for one in found.values())


def test_a_pass_that_differs_from_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass that is timed is compared."""
    made = in_arrays._recurrence

    def with_wrong_forward(*args: Any) -> Any:
        calls = made(*args)
        forward = calls[FORWARD]

        def first_step_is_off() -> Any:
            h, last = forward()
            h[0] += 1
            return h, last

        return calls | {FORWARD: first_step_is_off}

    monkeypatch.setattr(in_arrays, "_recurrence", with_wrong_forward)
    assert "no speed: forward: h differs" in facts_of("sru_rt", tiny("cell", "SRU"))[BACKWARD]["fault"]


def test_results_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = problem.CELLS["SRU"].recurrence
    rng = np.random.default_rng(0)

    def noisy(*args: Any, **more: Any) -> Any:
        h, *rest = step(*args, **more)
        h += 1e-6 * rng.standard_normal(h.shape)
        return h, *rest

    assert facts_of("sru_rt", tiny("cell", "SRU"))[FORWARD]["same_bits"] is True
    monkeypatch.setitem(problem.CELLS, "SRU", problem.CELLS["SRU"]._replace(recurrence=noisy))
    for cache in (child._built, child._checked):
        cache.cache_clear()
    found = facts_of("sru_rt", tiny("cell", "SRU"))[FORWARD]
    assert (found["fault"], found["same_bits"]) == ("", False)


def test_own_failures_are_wrong_and_those_of_others_are_left_out() -> None:
    ours, peer = (Row("part", tiny("cell", "SRU"), who, FORWARD, 1) for who in ("sru_rt", "lax.scan"))
    assert child.failure(ours, ValueError("a\n b")) == "no speed: ValueError: a b"
    assert child.failure(peer, ValueError("a")) == "left out: ValueError: a"
    assert child.failure(ours, MemoryError()) == "left out: MemoryError: "


# ----------------------------------------------------------------------------------------------------------------------
# Time and memory


def test_the_clock_counts_calls() -> None:
    calls: list[int] = []
    clock = clocks.Clock()
    times = clock.block("row", [lambda: calls.append(0)], 0.01)
    assert 1 <= len(times) <= clocks.MOST_SAMPLES
    assert (len(calls) - 1) % len(times) == 0  # one is not counted, each sample has as many
    assert len(calls) > 100

    class Repeated:
        repeats = 1_000_000  # how often one call does the work

        def __call__(self) -> None:
            """Does nothing."""

    assert max(clock.block("other", [Repeated()], 0.01)) < 1e-9


def test_a_call_that_took_long_is_not_made_once_more() -> None:
    calls: list[int] = []
    clock = clocks.Clock()
    clock._last["row"] = 2.0
    clock.block("row", [lambda: calls.append(0)], 0.01)
    assert len(calls) == 1
    clock.facts("other", [lambda: time.sleep(0.01)])
    assert clock._last["other"] >= 0.01


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_memory_of_a_call() -> None:
    def call() -> None:
        memory.empty((64 << 20,), np.dtype(np.uint8))[...] = 1

    call()  # its memory is kept for the next array, and is not to hide it
    peak = clocks.Clock().peak(call)
    assert peak is not None and 60 << 20 < peak < 80 << 20


# ----------------------------------------------------------------------------------------------------------------------
# Runs


KILLED = """
import os
from sru_rt.bench import runner

if __name__ == "__main__":
    processes = runner.Processes()  # each of several has what keeps the others waiting
    print([processes[name].submit(os.getpid).result() for name in ("arrays", "torch")], flush=True)
    os._exit(9)
"""


def test_processes_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    # It returns when nobody has the pipe any more: a process that lived on would have it.
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 9 and len(json.loads(done.stdout)) == 2


PLAN = runner.Plan("cpu", ("scan", "ragged"), (), (("", (6, 2, 8)),), ("lax.scan",), 1, 2, 1e-3, 0.0, 60.0)


class InThisProcess(dict[str, Any]):
    """Measures here, so that a test is quick and can plant faults; it has each process's rows apart."""

    class One:
        def __init__(self) -> None:
            self.rows: list[Row] = []

        def submit(self, function: Any, *args: Any) -> Any:
            class Answer:
                def result(_) -> Any:
                    if function is child.block:
                        child.prepare(self.rows, "cpu")
                    else:
                        self.rows[:] = args[0]
                    return function(*args)

            return Answer()

    def __missing__(self, name: str) -> Any:
        self[name] = InThisProcess.One()
        return self[name]

    def end(self) -> None:
        self.clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Processes", InThisProcess)
    monkeypatch.setattr(runner, "environment", lambda plan: None)
    monkeypatch.setattr(contestants, "ALL", tuple(one for one in contestants.ALL if one.process == "arrays"))


@pytest.mark.parametrize("after_a_round", [False, True])
def test_a_run_goes_on_where_it_was_cut_off(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_a_round: bool
) -> None:
    path = tmp_path / "new" / "results.json"
    first = runner.run(PLAN, runner.new_report(PLAN), path)
    whole = report.read(path)
    assert whole["rows"] == json.loads(json.dumps(first["rows"]))
    assert {row["part"] for row in whole["rows"]} == {"scan", "ragged"}
    assert all(row["fault"] == "" and row["median_ms"] > 0 and row["whole"] for row in whole["rows"])

    cut = whole | {"rows": [dict(row) for row in whole["rows"]]}
    if after_a_round:
        cut["rows"][-1]["whole"] = False
    else:
        del cut["rows"][-1]
    runner.write(cut, path)
    measured: list[str] = []
    measure = runner.measure
    monkeypatch.setattr(
        runner, "measure", lambda plan, rows, *rest: measured.append(rows[0].part) or measure(plan, rows, *rest)
    )
    again = runner.run(PLAN, runner.resumed(runner.new_report(PLAN), report.read(path), path), path)
    assert measured == ["ragged"]
    assert [runner._key(row) for row in again["rows"]] == [runner._key(row) for row in whole["rows"]]
    scan = [row for row in again["rows"] if row["part"] == "scan"]
    assert scan == [row for row in whole["rows"] if row["part"] == "scan"]
    assert all(row["whole"] for row in report.read(path)["rows"])


@pytest.mark.parametrize("key", ["commit", "machine", "versions", "how"])
def test_a_run_does_not_go_on_elsewhere(tmp_path: Path, key: str) -> None:
    new, path = runner.new_report(PLAN), tmp_path / "results.json"
    runner.write(new | {key: {"other": 1}}, path)
    with pytest.raises(ArgumentError, match=rf"{path.name} cannot be continued.*{key} was .*; .*--out") as caught:
        runner.resumed(new, report.read(path), path)
    others = {"commit", "machine", "versions", "how"} - {key}
    assert not any(f"{other} was" in str(caught.value) for other in others)


def test_out_of_time(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No group begins, and in one that has begun every row is measured once."""
    late = PLAN._replace(budget=-1.0, parts=("scan",))
    assert runner.run(late, runner.new_report(late), tmp_path / "late.json")["rows"] == []
    assert capsys.readouterr().err == "out of time before scan (6, 2, 8)\n"
    planned = next(its for _, its in late.groups())
    rounds = list(runner.measure(late, planned, 0.0, runner.Processes()))
    assert len(rounds) == 1
    assert all(row["n"] > 0 and row["whole"] for row in rounds[0])


def test_a_process_that_dies_leaves_its_rows_out(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def dies(*args: Any) -> Any:
        raise BrokenProcessPool("it was killed")

    planned = next(its for _, its in PLAN.groups())
    monkeypatch.setattr(InThisProcess.One, "submit", lambda self, f, *args: type("A", (), {"result": dies})())
    (found,) = runner.measure(PLAN._replace(rounds=1), planned, 0.0, runner.Processes())
    assert all(row["fault"] == "left out: its process ended (it was killed)" for row in found)


def test_what_is_set_of_libraries_that_compute_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("SRU_RT_CACHE_DIR", "/somewhere")
    settings = record.machine()["set"]
    assert settings["OPENBLAS_CORETYPE"] == "Haswell" and "SRU_RT_CACHE_DIR" not in settings


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A quick run in processes of its own, tables and pictures of it, and what it refuses."""

    def run(*options: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "sru_rt", "bench", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == status, done.stderr
        return done.stdout if not status else done.stderr

    chosen = ("--quick", "--shape", "6,2,8", "--part", "scan", "layers", "train", "--threads", "2")
    run(*chosen, "--out", "result.json")
    found = report.read(tmp_path / "result.json")
    assert {row["part"] for row in found["rows"]} == {"scan", "layers", "train"}
    assert all(row["fault"].startswith("left out: ") or row["median_ms"] > 0 for row in found["rows"])
    elsewhere = {"sru_rt without out=", "clone() of a tensor", "empty custom call of JAX"}  # in the part overhead
    installed = {one.name for one in contestants.ALL if not one.missing("cpu")}
    timed = {row["who"] for row in found["rows"] if not row["fault"]}
    assert timed >= installed - elsewhere
    before = (tmp_path / "result.json").read_text()
    run(*chosen, "--resume", "result.json")
    assert report.read(tmp_path / "result.json")["rows"] == json.loads(before)["rows"]
    assert "cannot be continued" in run(*chosen, "--rounds", "3", "--resume", "result.json", status=2)
    assert run("--table", "result.json").count("\n") == 2 + len(found["rows"])
    line = next(
        line for line in run("--summary", "result.json").splitlines() if "layer of SRU by sru_rt, forward:" in line
    )
    row = next(row for row in found["rows"] if row["label"] == "layer of SRU by sru_rt, forward")
    assert f"{row['value']:.2f}" in line and line.split(" | ")[0].endswith("x products for 3 gates, forward")


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def test_what_is_compared_is_measured_within_a_short_time() -> None:
    group = next(iter(parts.BY_NAME["layers"].groups("cpu", ("float32",), ((32, 32, 128),))))
    found, rng = rows.planned("layers", group, "cpu", 2), np.random.default_rng(1)
    orders = [runner.shuffled(found, rng) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert len(order) == len(found) and set(order) == set(found)
        of = [(row.which, row.contestant.process) for row in order]
        assert len([*itertools.groupby(of)]) == len(set(of))
        assert len([*itertools.groupby(of, key=lambda one: one[0])]) == len({which for which, _ in of})


def row(**more: Any) -> dict[str, Any]:
    one = {"part": "cells", "label": "SRU by sru_rt, forward", "who": "sru_rt", "cell": "SRU", "pass": "forward"}
    one |= {"dtype": "float32", "shape": [4, 2, 8], "D": 1, "ragged": False, "threads": 2, "fault": "", "n": 20}
    one |= {"median_ms": 1.0, "min_ms": 0.9, "max_ms": 2.0, "rate": 12.0, "unit": "GB", "work": 0.012}
    return one | {"against": "copy, 20 B/element", "sense": "of", "value": 0.75, "by_minima": 0.7} | more


def test_table() -> None:
    found = [
        row(target=0.8, reached=False, error=1.2e-7, same_bits=True, peak_mb=3.5),
        row(D=2, ragged=True, same_bits=False, most_us=8.0, in_time=True),
        row(fault="no speed: h differs by 1.0e+00", median_ms=1.0),
    ]
    lines = report.table(found).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1 | 0.9 - 2 | 20 | 12.0 GB/s | 0.75 (0.70) of copy, 20 B/element | >= 0.8 MISSED |" in lines[2]
    assert "| 1.2e-07 | yes | 3.5 |" in lines[2]
    assert "(4, 2, 8, D=2, ragged)" in lines[3] and "<= 8 us reached |  | NO |" in lines[3]
    assert "no speed: h differs by 1.0e+00 |  |" in lines[4] and "0.9" not in lines[4]


def test_summary() -> None:
    found = [
        row(),
        row(threads=1, value=0.5, by_minima=0.5, target=0.8, reached=False),
        row(shape=[8, 2, 8], target=0.7, reached=True),
    ]
    lines = report.summary(found).splitlines()
    assert lines[0] == "| cells | (4, 2, 8) | (8, 2, 8) | target |"
    cells = "0.75 (0.70) / 0.50 | 0.75 (0.70) | >= 0.8 / 0.7: 1 of 2 missed |"
    assert lines[2] == f"| SRU by sru_rt, forward: of copy, 20 B/element | {cells}"


def test_the_results_can_be_read() -> None:
    """Those that docs/performance.md quotes."""
    if not RESULTS.exists():
        pytest.skip("the results are not part of this installation")
    paths = [*RESULTS.glob("*.json")]
    assert paths
    for path in paths:
        found = report.read(path)["rows"]
        assert report.table(found).count("\n") == 1 + len(found)
        assert report.summary(found).count("target |") == len({row["part"] for row in found})


def test_a_file_that_holds_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert main(["bench", "--table", str(tmp_path / "x.json")]) == 2
    assert "x.json is no file of results (KeyError: 'rows'); give one that a run wrote" in capsys.readouterr().err
    assert main(["bench", "--resume", str(tmp_path / "none.json")]) == 2
    assert "FileNotFoundError" in capsys.readouterr().err


def pictured() -> dict[str, Any]:
    shapes = [row(), row(shape=[8, 2, 8]), row(who="sru", shape=[8, 2, 8], median_ms=3.0), row(part="one")]
    about = {"machine": {"cpu": "a CPU"}, "versions": {"sru_rt": "1"}, "commit": "c" * 40, "date": "today"}
    return about | {"rows": [*shapes, row(fault="left out: x")]}


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs Matplotlib")
    (path,) = report.plot(pictured(), tmp_path / "new")
    assert path.name == "cells_SRU_float32_forward.svg"
    assert path.read_text().startswith("<?xml")


def test_pictures_need_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LibraryError, match=r"needs Matplotlib; install it with pip install 'sru_rt\[bench\]'"):
        report.plot(pictured(), tmp_path)


def test_targets() -> None:
    """Of docs/performance.md."""
    layer, cell = (Problem(level, "SRU", "float32", *parts.MIDDLE) for level in ("layer", "cell"))

    def target(what: Problem, who: str, which: str, threads: int = 2) -> float | None:
        return parts.target(what, who, which, "cpu", threads, 32 << 20)

    assert [target(layer, "sru_rt", which) for which in (FORWARD, BOTH)] == [1.10, 1.12]
    assert [target(layer, "sru", which) for which in (FORWARD, BOTH)] == [1.5, 3.0]
    assert target(layer, "torch.nn.LSTM", FORWARD) == 2.5
    assert target(layer._replace(L=32, d=128), "sru_rt", FORWARD) is None
    assert [target(cell, "sru_rt", BACKWARD, threads) for threads in (1, 2)] == [0.8, 0.7]
    assert target(cell._replace(L=8), "sru_rt", BACKWARD) is None  # in the cache
    assert target(cell._replace(L=512, B=16, d=1024), "lax.scan", BOTH) == 3.0


def test_a_list_imports_no_other_library() -> None:
    program = (
        "import sys\nfrom sru_rt.__main__ import main\nassert main(['bench', '--list', '--device', 'gpu']) == 0\n"
        "sys.exit(str({'cupy', 'torch', 'jax', 'matplotlib', 'sru', 'fla'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--part", "scan", "decode", "--peer", "lax.scan", "--threads", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scan: h = a*h + b alone")
    which = "all passes" if importlib.util.find_spec("jax") is None else "backward"
    assert any(line.startswith(f"  float32 (32, 32, 128) scan by lax.scan, {which}, 2 threads") for line in lines)
    assert not any("associative_scan" in line for line in lines)
    assert lines[-1].endswith("at most about 450 s for each of 2 parts")


def test_a_list_of_some_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes of some parts, and our own rows on some arrays."""
    chosen = ["--shape", "scan=6,2,8", "7,2,8", "--binding", "arrays", "torch", "--peer", "torch.nn.LSTM"]
    assert main(["bench", "--list", "--part", "scan", "layers", "--threads", "2", *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = next(i for i, line in enumerate(lines) if line.startswith("layers"))
    assert {line.split(")")[0] for line in lines[1:layers]} == {"  float32 (6, 2, 8", "  float32 (7, 2, 8"}
    assert {line.split(")")[0] for line in lines[layers + 1 : -1]} == {"  float32 (7, 2, 8"}
    assert any("sru_rt in PyTorch" in line for line in lines) and not any("JAX" in line for line in lines)


def test_shapes_of_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--shape", "layer=3,2,4"])
    assert "'layer' in 'layer=3,2,4' is no part; parts are scan, cells" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["3,2", "3,2,4,3", "3,0,4", "3,2,x"])
def test_shapes_that_are_none(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--shape", shape])
    assert caught.value.code == 2
    assert f"'{shape}' is no shape such as 128,32,512" in capsys.readouterr().err
