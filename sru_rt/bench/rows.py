"""What is listed, measured and written: rows, and what becomes of their times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import contestants, parts
from .contest import Contestant
from .problem import Problem

ALL_PASSES = "all passes"  # of a contestant that is left out
AT_ONE_THREAD_TOO = ("copy", "sru_rt")  # at levels without products


class Row(NamedTuple):
    """One contestant, one problem, one pass."""

    part: str
    problem: Problem
    who: str
    which: str
    threads: int

    @property
    def contestant(self) -> Contestant:
        return contestants.BY_NAME[self.who]

    @property
    def label(self) -> str:
        return self.contestant.label(self.problem, self.which)


def planned(
    part: str,
    group: Sequence[Problem],
    device: str,
    threads: int,
    who: Sequence[str] = (),
    bindings: Sequence[str] = (),
) -> list[Row]:
    """The rows of a group; `who` names contestants beside our own and the yardsticks, `bindings` are the arrays that
    these are on, all by default."""
    found = []
    for one in contestants.ALL:
        missing = bool(one.missing(device))
        asked, name = (who, one.name) if "peers" in one.process else (bindings, one.process)
        if asked and name not in asked:
            continue
        for problem in group:
            passes = one.passes(problem, device) if one.stacks or problem.layers == 1 else ()
            for which in (ALL_PASSES,) * bool(passes) if missing else passes:
                several = {1, threads} if one.name in AT_ONE_THREAD_TOO and device == "cpu" else {threads}
                for n in sorted(several if not problem.of_layers else {threads}):
                    found.append(Row(part, _shared(one, problem), one.name, which, n))
    return list(dict.fromkeys(found))


def _shared(one: Contestant, problem: Problem) -> Problem:
    """Copies, and products of one size, are the same for several problems."""
    return problem._replace(level="cell", name="SRU", ragged=False) if one.name == "copy" else problem


def described(row: Row) -> dict[str, Any]:
    """A row of the file, before it is measured."""
    problem, (work, unit) = row.problem, row.contestant.work(row.problem, row.which)
    about: dict[str, Any] = {
        "part": row.part,
        "label": row.label,
        "level": problem.level,
        "cell": problem.name,
        "dtype": problem.dtype,
    }
    about |= {"shape": [problem.L, problem.B, problem.d], "D": problem.D, "ragged": problem.ragged}
    about |= {"layers": problem.layers}
    return about | {"who": row.who, "pass": row.which, "threads": row.threads, "work": work, "unit": unit}


def finished(
    samples: Mapping[Row, Sequence[float]], facts: Mapping[Row, Mapping[str, Any]], device: str, cache_bytes: int
) -> list[dict[str, Any]]:
    """Rows of the file: times in milliseconds, and comparisons by medians and by minima."""
    best = {_key(row): (statistics.median(t), min(t)) for row, t in samples.items() if t}
    found = []
    for row, times in samples.items():
        one = described(row) | dict(facts[row]) | {"n": len(times)}
        found.append(one)
        if one["fault"] or not times:
            continue
        own = best[_key(row)]
        in_ms = {"median_ms": own[0], "min_ms": own[1], "max_ms": max(times)}
        one |= {name: float(f"{1e3 * t:.5g}") for name, t in in_ms.items()}
        one["rate"] = round(one["work"] / own[0], 2)
        one |= _compared(row, own, best, device, cache_bytes)
    return found


def _key(row: Row, who: str = "", which: str = "", problem: Problem | None = None) -> tuple[Any, ...]:
    who = who or row.who
    return who, which or row.which, row.threads, _shared(contestants.BY_NAME[who], problem or row.problem)


def _compared(
    row: Row, own: tuple[float, float], best: Mapping[Any, tuple[float, float]], device: str, cache_bytes: int
) -> dict[str, Any]:
    problem, against, found = row.problem, row.contestant.against(row.problem, row.which, device), dict[str, Any]()
    if against:
        other = best.get(_key(row, against.who, against.which, against.problem))
        yardstick = contestants.BY_NAME[against.who]
        named = yardstick.label(against.problem or problem, against.which)
        found |= {"against": named, "sense": against.sense}
        if other:
            works = (row.contestant.work(problem, row.which)[0], yardstick.work(problem, against.which)[0])
            value, by_minima = (_ratio(against.sense, a, b, works) for a, b in zip(own, other))
            found |= {"value": round(value, 3), "by_minima": round(by_minima, 3)}
            target = parts.target(problem, row.who, row.which, device, row.threads, cache_bytes)
            if target:
                found |= {"target": target, "reached": value <= target if against.sense == "x" else value >= target}
    copy = best.get(("copy", "1 GiB", row.threads, _shared(contestants.BY_NAME["copy"], problem)))
    rate = 1e9 * contestants.BY_NAME["copy"].work(problem, "1 GiB")[0] / copy[0] if copy else None
    most = parts.most_us(problem, row.who, row.which, device, rate)
    return found | ({"most_us": round(most, 1), "in_time": 1e6 * own[0] <= most} if most else {})


def _ratio(sense: str, own: float, other: float, works: tuple[float, float]) -> float:
    if sense == "of":  # rates: the work of both is in the same unit
        return works[0] / own / (works[1] / other)
    return other / own if sense == "x faster than" else own / other
