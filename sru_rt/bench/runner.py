"""Runs parts: each group in rounds, in which every row has a block, in random order, in processes by library.

Peers have processes of their own, as what one library leaves in the heap decides whether another one's new arrays cost
page faults. The file is written after every round, and a group that it holds whole is not measured again.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError
from . import child, parts, record
from .rows import Row, described, finished, planned

QUICK_CELLS = 2  # of a group, with --quick

Report = dict[str, Any]


class Plan(NamedTuple):
    """What is to be measured, and how."""

    device: str
    parts: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[str, parts.Shape], ...]  # of a part, or with "" of all
    peers: tuple[str, ...]
    threads: int
    rounds: int
    seconds: float  # of a block
    pause: float  # seconds of sleep before each block: by then the threads of the last block spin no more
    budget: float  # of a part
    quick: bool = False  # the first shape of each part alone
    bindings: tuple[str, ...] = ()  # of our own rows only those on these arrays

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """The parts, and the rows of each of their groups."""
        for name in self.parts:
            shapes = [shape for part, shape in self.shapes if part in ("", name)]
            groups = list(parts.BY_NAME[name].groups(self.device, self.dtypes, shapes))
            for group in groups[:1] if self.quick else groups:
                group = group[:QUICK_CELLS] if self.quick else group
                rows = planned(name, group, self.device, self.threads, self.peers, self.bindings)
                if rows:
                    yield name, rows


def new_report(plan: Plan) -> Report:
    """Without rows."""
    how = {name: getattr(plan, name) for name in ("device", "threads", "rounds", "seconds", "pause")}
    about = {"date": str(datetime.date.today()), **record.environment(plan.device), "how": how}
    return json.loads(json.dumps(about | {"load": [], "clocks": [], "rows": []}))


def resumed(report: Report, earlier: Report, path: Path) -> Report:
    """The earlier report, to which rows are added.

    Raises:
        ArgumentError: it was made elsewhere, of other versions, or otherwise.
    """
    different = [
        f"{key} was {earlier.get(key)} and is {report.get(key)}"
        for key in ("commit", "machine", "versions", "gpu", "how")
        if earlier.get(key) != report.get(key)
    ]
    if different:
        raise ArgumentError(
            f"sru_rt bench: {path} cannot be continued, since times would not compare: {'; '.join(different)}; "
            "restore what it was, or write a new file with --out"
        )
    return earlier


def run(plan: Plan, report: Report, path: Path) -> Report:
    """Measures what the report does not hold yet, and writes it to `path` as it grows."""
    environment(plan)
    groups = list(plan.groups())
    ends: dict[str, float] = {}
    processes = Processes()
    report["load"].append(os.getloadavg() if hasattr(os, "getloadavg") else None)
    for i, (part, rows) in enumerate(groups):
        if _holds(report, rows):
            continue
        end = ends.setdefault(part, time.perf_counter() + plan.budget)
        left = sum(1 for name, _ in groups[i:] if name == part)
        share = time.perf_counter() + (end - time.perf_counter()) / left
        if time.perf_counter() > end:
            print(f"out of time before {part} {rows[0].problem.shape}", file=sys.stderr)
            continue
        for found in measure(plan, rows, share, processes):
            replace(report, found)
            write(report, path)
        if plan.device == "cpu" and not plan.quick:  # what one group leaves in the heap must not help the next
            processes.end()
        print(f"{part} {rows[0].problem.dtype} {rows[0].problem.shape} done", file=sys.stderr)
    processes.end()
    report["load"].append(os.getloadavg() if hasattr(os, "getloadavg") else None)
    if plan.device == "gpu":
        report["clocks"].append(record.clocks())
    write(report, path)
    return report


def environment(plan: Plan) -> None:
    """What libraries read when a measuring process loads them."""
    for library in ("OPENBLAS", "MKL", "OMP"):
        os.environ[f"{library}_NUM_THREADS"] = str(plan.threads)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if plan.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(plan.threads > 1).lower()}"


class Processes(dict[str, ProcessPoolExecutor]):
    """Those that measure, by name, started when they are asked for."""

    def __missing__(self, name: str) -> ProcessPoolExecutor:
        self[name] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), child.end_with_parent)
        return self[name]

    def end(self) -> None:
        """All of them."""
        while self:
            self.popitem()[1].shutdown()


def measure(plan: Plan, rows: Sequence[Row], end: float, processes: Processes) -> Iterator[list[dict[str, Any]]]:
    """The rows of a group, after each round. A row that has no time yet is measured even after the end."""
    facts, numbers = _prepared(plan, rows, processes)
    samples: dict[Row, list[float]] = {row: [] for row in rows}
    rng = np.random.default_rng(0)
    for done in range(1, plan.rounds + 1):
        for row in shuffled(rows, rng):
            if not facts[row]["fault"] and (time.perf_counter() < end or not samples[row]):
                time.sleep(plan.pause)
                try:
                    asked = processes[row.contestant.process].submit(child.block, numbers[row], plan.seconds)
                    samples[row] += asked.result()
                except Exception as error:  # as in child.prepare
                    facts[row] = {"fault": child.failure(row, error)}
        late = time.perf_counter() >= end
        for row in rows:
            facts[row] = {**facts[row], "whole": late or done == plan.rounds}
        yield finished(samples, facts, plan.device, record.cache_bytes())
        if late:
            return


def shuffled(rows: Sequence[Row], rng: np.random.Generator) -> list[Row]:
    """Rows in a random order in which those of one pass follow each other, and among these those of one process.

    So what is compared is measured within a short time: the speed of a shared machine changes from minute to minute.
    """
    places = {key: rng.random() for row in rows for key in (row.which, (row.which, row.contestant.process))}

    def place(row: Row) -> tuple[float, ...]:
        return places[row.which], places[row.which, row.contestant.process], rng.random()

    return sorted(rows, key=place)


def _prepared(
    plan: Plan, rows: Sequence[Row], processes: Processes
) -> tuple[dict[Row, dict[str, Any]], dict[Row, int]]:
    """What is known of each row, and its number in its process."""
    facts: dict[Row, dict[str, Any]] = {}
    of_process: dict[str, list[Row]] = {}
    for row in rows:
        missing = row.contestant.missing(plan.device)
        if missing:
            facts[row] = {"fault": missing}
        else:
            of_process.setdefault(row.contestant.process, []).append(row)
    asked = [(its, processes[name].submit(child.prepare, its, plan.device)) for name, its in of_process.items()]
    for its, answer in asked:
        try:
            facts |= zip(its, answer.result())
        except BrokenProcessPool as error:  # a crash of a library, or no memory
            facts |= {row: {"fault": f"left out: its process ended ({error})"} for row in its}
    return facts, {row: i for its in of_process.values() for i, row in enumerate(its)}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("part", "label", "dtype", "shape", "D", "ragged", "layers", "threads")
    return tuple(str(row.get(name)) for name in names)


def _holds(report: Report, rows: Sequence[Row]) -> bool:
    """Whether the report has all these rows, measured to the end."""
    whole = {_key(row) for row in report["rows"] if row.get("whole")}
    return all(_key(described(row)) in whole for row in rows)


def replace(report: Report, found: Sequence[dict[str, Any]]) -> None:
    """Puts rows in the place of those of the same name, the rest at the end."""
    new = {_key(row): row for row in found}
    report["rows"] = [new.pop(_key(row), row) for row in report["rows"]] + list(new.values())


def write(report: Report, path: Path) -> None:
    """One row on a line, so that files can be compared; whole or not at all."""
    head = json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    part.replace(path)
