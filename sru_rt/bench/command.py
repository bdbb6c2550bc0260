"""The options of `python -m sru_rt bench`, and what it does with them."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import SruRtError
from ..machine import Device
from . import contestants, parts, record, report, runner
from .contestants.in_arrays import NAME, plan_of
from .problem import moved
from .rows import Row
from .runner import Plan

H200 = Device(90, 132)
QUICK_BUDGET = 100  # seconds, of all parts


def run(options: argparse.Namespace) -> int:
    """The exit status: 0; 1 if a result is wrong, or there is no GPU to measure; 2 for what cannot be done."""
    try:
        if options.table or options.summary:
            shown = report.read(options.table or options.summary)["rows"]
            print((report.table if options.table else report.summary)(shown))
            return 0
        if options.plot:
            file, folder = options.plot
            for path in report.plot(report.read(Path(file)), Path(folder)):
                print(path)
            return 0
        return _run(options)
    except SruRtError as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    plan = _plan(options)
    if options.list:
        print(listed(plan))
        return 0
    missing = record.why_no_gpu() if plan.device == "gpu" else ""
    if missing:
        print(f"there is no GPU to measure: {missing}; --list shows what would be run", file=sys.stderr)
        return 1
    made = runner.new_report(plan)
    path = options.resume or options.out or Path(f"{plan.device}-{datetime.date.today()}.json")
    if options.resume:
        made = runner.resumed(made, report.read(path), path)
    made = runner.run(plan, made, path)
    print(report.table(made["rows"]), f"\nwritten: {path}")
    return int(any(row["fault"].startswith("no speed") for row in made["rows"]))


def _plan(options: argparse.Namespace) -> Plan:
    quick = options.quick
    chosen = tuple(options.part or (parts.QUICK if quick else parts.BY_NAME))
    threads = options.threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(2))
    return Plan(
        device=options.device,
        parts=chosen,
        dtypes=tuple(options.dtype),
        shapes=tuple(options.shape),
        peers=tuple(options.peer),
        bindings=tuple(options.binding),
        threads=min(threads, 2) if options.threads is None else threads,
        rounds=options.rounds or (1 if quick else 7 if options.device == "cpu" else 3),
        seconds=0.2 if options.device == "cpu" and not quick else 0.03,
        pause=0.02 if quick else 0.1 if options.device == "cpu" else 0.0,
        budget=options.budget or (QUICK_BUDGET / len(chosen) if quick else 450),
        quick=quick,
    )


def listed(plan: Plan) -> str:
    """The rows that would be measured. Needs no GPU."""
    lines, groups = [], list(plan.groups())
    for name in plan.parts:
        part, its = parts.BY_NAME[name], [rows for one, rows in groups if one == name]
        lines += [f"{name}: {part.about} ({sum(map(len, its))} rows)"]
        for rows in its:
            where = f"{rows[0].problem.dtype} {rows[0].problem.shape}"
            for row in rows:
                why = row.contestant.missing(plan.device)
                threads = f", {row.threads} threads" if plan.device == "cpu" else ""
                more = f" ({why})" if why else "" if plan.device == "cpu" else _on_h200(row)
                lines.append(f"  {where} {row.label}{threads}{more}")
    total = sum(len(rows) for _, rows in groups)
    lines.append(f"{total} rows; at most about {plan.budget:.0f} s for each of {len(plan.parts)} parts")
    return "\n".join(lines)


def _on_h200(row: Row) -> str:
    """Bytes of an element, and the plan, of our own recurrences."""
    problem, which = row.problem, row.which
    if row.who != NAME or problem.of_layers:
        return ""
    width = moved(problem, which) / problem.elements
    return f": {width:.4g} B/element; on an H200 {plan_of(problem, which, H200)}"


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    option: Callable[..., object] = parser.add_argument
    peers = [one.name for one in contestants.ALL if "peers" in one.process]
    option("--device", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    option("--quick", action="store_true", help="one short round of the first shapes, within two minutes")
    option("--part", nargs="+", choices=parts.BY_NAME, default=[], metavar="NAME", help="parts; default: all")
    option("--list", action="store_true", help="write the rows that would be measured, and measure nothing")
    option("--out", type=Path, metavar="FILE", help="default: DEVICE-DATE.json in this folder")
    option("--resume", type=Path, metavar="FILE", help="add to FILE what is missing in it")
    option("--budget", type=float, metavar="S", help="seconds of a part (default: 450; with --quick, 100 of all)")
    option("--rounds", type=int, metavar="N", help="blocks of each row (default: 7 on the CPU, 3 on a GPU)")
    option("--threads", type=int, metavar="N", help="of sru_rt, BLAS and peers on the CPU (default: 2)")
    option("--dtype", nargs="+", choices=("float16", "bfloat16", "float32", "float64"), default=[], help="of x")
    shape = "in place of those of the parts; of one part as in layers=128,32,512"
    option("--shape", nargs="+", type=_shape, default=[], metavar="[PART=]L,B,d[,D]", help=shape)
    option("--peer", nargs="+", choices=peers, default=[], metavar="NAME", help=f"of {', '.join(peers)}; default: all")
    libraries = ("arrays", "torch", "jax")
    option("--binding", nargs="+", choices=libraries, default=[], help="our own rows on these; default: all")
    option("--table", type=Path, metavar="FILE", help="measure nothing; write FILE as a table")
    option("--summary", type=Path, metavar="FILE", help="likewise, comparisons alone, by shapes")
    option("--plot", nargs=2, metavar=("FILE", "FOLDER"), help="likewise, as pictures in FOLDER")


def _shape(text: str) -> tuple[str, parts.Shape]:
    part, _, sizes = text.rpartition("=")
    try:
        shape = tuple(map(int, sizes.split(",")))
    except ValueError:
        shape = ()
    if len(shape) not in (3, 4) or min(shape) < 1 or max(shape[3:], default=1) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 128,32,512, or 128,32,512,2 for two directions")
    if part and part not in parts.BY_NAME:
        raise argparse.ArgumentTypeError(f"{part!r} in {text!r} is no part; parts are {', '.join(parts.BY_NAME)}")
    return part, shape
