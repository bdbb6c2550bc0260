"""In a measuring process: makes what rows call, checks it, and times it a block at a time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import launch_gpu
from .clocks import Call, Clock, clock_of
from .contest import Built, Contestant, LeftOut, Place
from .contestants.in_arrays import NAME, plan_of
from .problem import Problem, errors, fault, reference
from .rows import Row

REPEATS = 3  # calls whose results must have the same bits

_rows: list[Row] = []
_calls: list[Sequence[Call]] = []
_clocks: list[Clock] = []


def end_with_parent() -> None:
    """Has this process end where the one that started it is killed; else it would wait for it, and hold its memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def prepare(rows: Sequence[Row], device: str) -> list[dict[str, Any]]:
    """Makes all rows; returns what is known of each without its times, of which `fault` says why there are none."""
    for memory in (_rows, _calls):
        memory.clear()
    for cache in (_built, _checked):
        cache.cache_clear()
    warnings.filterwarnings("ignore", category=UserWarning)  # of other libraries, which say what they lack
    for clock in _clocks:
        clock.release()
    _clocks[:] = [clock_of(rows[0].contestant.process.split()[0], device)]
    threads = max(row.threads for row in rows)
    facts = []
    for row in rows:
        found, calls = _made(row, device, row.threads if row.contestant.divides_work else threads)
        if device == "gpu" and row.who == NAME and not row.problem.of_layers:
            found["plan"] = plan_of(row.problem, row.which, launch_gpu.device_facts(0))
        facts.append(found)
        _rows.append(row)
        _calls.append(calls)
    return facts


def _made(row: Row, device: str, threads: int) -> tuple[dict[str, Any], Sequence[Call]]:
    use_threads(row)
    one = row.contestant
    try:
        checked = _checked(one, row.problem, device, threads)
        if checked["fault"]:
            return checked, ()
        calls = _built(one, row.problem, device, threads).calls[row.which]
        return checked | _clocks[0].facts(len(_calls), calls), calls
    except Exception as error:  # other libraries fail in many ways, and each is a reason to leave its rows out
        return {"fault": failure(row, error)}, ()


def failure(row: Row, error: Exception) -> str:
    """What a row says in place of its speed. Where we fail ourselves, other than for lack of memory, it is wrong."""
    if isinstance(error, LeftOut):
        return f"left out: {error}"
    of_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    kind = "left out" if "peers" in row.contestant.process or of_memory else "no speed"
    return f"{kind}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _place(device: str, threads: int, only_one: bool = False) -> Place:
    return Place(device, threads, (lambda nbytes: 1) if only_one else _clocks[0].sets)


@functools.cache
def _built(one: Contestant, problem: Problem, device: str, threads: int) -> Built:
    return one.build(problem, _place(device, threads))


@functools.cache
def _checked(one: Contestant, problem: Problem, device: str, threads: int) -> dict[str, Any]:
    """How far results are from float64, on fewer steps if there are many, and whether they have the same bits."""
    fewer = problem.checked()
    if fewer == problem:
        built = _built(one, problem, device, threads)
    else:
        built = one.build(fewer, _place(device, threads, only_one=True))
    if not built.results:
        return {"fault": ""}
    first = built.results()
    differences = errors(first, built.expected or reference(fewer))
    same = all(_same(first, built.results()) for _ in range(REPEATS - 1))
    found = {"fault": fault(fewer, differences, one.slack), "same_bits": same}
    return found | {"error": float(f"{max(differences.values()):.3g}")}


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes() for name in first)


def use_threads(row: Row) -> None:
    """sru_rt reads it at every call; within PyTorch it is PyTorch's threads that count."""
    os.environ["SRU_RT_NUM_THREADS"] = "" if row.contestant.process.startswith("torch") else str(row.threads)


def block(i: int, seconds: float) -> list[float]:
    """Seconds of calls of a row."""
    use_threads(_rows[i])
    return _clocks[0].block(i, _calls[i], seconds)
