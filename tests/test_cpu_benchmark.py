"""The benchmarks on the CPU: every cell has its rows, and what differs from float64 has no speed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "cpu.py"


@pytest.fixture(scope="module")
def program() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_cpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where NamedTuple looks for the names in annotations
    spec.loader.exec_module(module)
    return module


def test_every_cell_has_a_row_and_a_copy_for_each_pass(program: types.ModuleType) -> None:
    rows = program.recurrences((5, 3, 19), threads=2)
    assert [row.fault for row in rows] == [""] * len(rows)
    assert len({row.label for row in rows}) == 3 * len(program.CELLS)
    assert len({(row.label, row.threads) for row in rows}) == len(rows) == 3 * 2 * len(program.CELLS)
    copies = {row.label for row in program.copies((5, 3, 19), threads=1)}
    assert {row.against for row in rows} <= copies
    assert {row.against for row in rows if " SRU" in row.label} == {f"copy, {n} B/element" for n in (20, 24, 40)}


def test_what_differs_from_float64_has_no_speed(program: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = program.CELLS[3]
    first = program.sru_rt.mingru_backward
    calls = []

    def wrong(saved: object, dh: object) -> object:
        """The reference, which is asked first, is right."""
        calls.append(saved)
        return first(saved, dh if len(calls) == 1 else 1.001 * dh)  # type: ignore[operator]

    monkeypatch.setattr(program, "CELLS", [cell._replace(backward=wrong)])
    for row in program.recurrences((5, 3, 19), threads=1):
        assert row.fault.startswith("no speed: du differs by ")


@pytest.mark.slow
def test_a_run_and_its_summary(tmp_path: Path) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, str(SCRIPT), *options]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("--quick", "--shapes", "8,3,20", "--out", "result.json")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert all(row["fault"].startswith("not available") or row["median_ms"] > 0 for row in rows)
    lines = run("--summary", "result.json").splitlines()
    assert lines[0] == "|  | (8, 3, 20) | target |"
    backward = next(row for row in rows if row["label"] == "recurrence of minLSTM, backward")
    line = next(line for line in lines if line.startswith("| recurrence of minLSTM, backward: of copy, 32 B/element |"))
    assert f"| {backward['value']:.2f}" in line


@pytest.mark.slow
def test_a_run_with_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs PyTorch")
    command = [sys.executable, str(SCRIPT.with_name("torch_layers.py")), "--quick", "--shapes", "8,3,20"]
    result = subprocess.run([*command, "--out", "x.json"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    ours = [row for row in report["rows"] if row["label"].startswith("SRUCell")]
    assert [row["fault"] for row in ours] == ["", ""]
    assert all(row["value"] > 0 and row["against"].startswith("products") for row in ours)
    assert all(found["min_us"] > 0 for found in report["operator"].values())
