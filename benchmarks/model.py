"""What the model of sru_rt/predict.py says of a GPU, beside what was measured on one. Needs no GPU.

python benchmarks/model.py                          # an H200, the shapes of the targets
python benchmarks/model.py --gpu L4 --cell mingru
python benchmarks/model.py --measured FILE          # of `sru_rt bench --device gpu`: largest differences first
python benchmarks/model.py --targets                # writes the table of docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sru_rt import chunks, costs, decode, machine, one_launch, plan, predict, small
from sru_rt.bench import problem as bench
from sru_rt.cell import Cell
from sru_rt.cells import named_cells
from sru_rt.choose import LAPS, Task
from sru_rt.dtypes import state_dtype
from sru_rt.machine import Machine
from sru_rt.traffic import ITEMSIZE, moved
from sru_rt.variant import Variant

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- predicted targets -->\n", "<!-- end -->"
CELLS: dict[str, Cell] = {cell.name: cell for cell in named_cells()}
DTYPES = ("bfloat16", "float32", "float16", "float64")
SHAPES = ((2048, 16, 1024, 1), (512, 32, 512, 1), (32, 32, 128, 1), (65536, 1, 1024, 1), (2048, 8, 1024, 2))
SHAPES += tuple((2048, B, 1024, 1) for B in (32, 64, 128))  # L, B, d, D
LARGE = SHAPES[0]
PASSES = ((True, 0), (True, 1), (False, 1), (True, 32), (False, 32))  # forward, every


class Case(NamedTuple):
    """One pass of a recurrence; states are kept before every `every`-th step, 0: not at all."""

    cell: str
    dtype: str
    L: int
    B: int
    d: int
    D: int
    forward: bool
    every: int
    time_parallel: bool | str = "auto"
    saved_dtype: str = ""  # that of the state if empty

    @property
    def variant(self) -> Variant:
        return Variant(CELLS[self.cell], self.dtype, self.saved_dtype or state_dtype(self.dtype))

    @property
    def label(self) -> str:
        policy = {0: "", 1: ", save=True"}.get(self.every, f", save={self.every}")
        return ("forward" if self.forward else "backward") + policy

    @property
    def shape(self) -> str:
        return f"({self.L}, {self.B}, {self.d}{f', D={self.D}' if self.D > 1 else ''})"

    @property
    def task(self) -> Task:
        recomputes = not self.forward and self.every > 1
        in_shared = recomputes and not plan.needs_scratch(self.variant, self.every)
        pairs = ITEMSIZE[self.dtype] == 2 and self.d % 2 == 0
        return Task(
            self.variant,
            self.forward,
            self.every,
            pairs=pairs,
            one_step=self.L == 1,
            in_shared=in_shared,
            laps=LAPS if plan.by_warps(self.dtype, self.d) else (0,),
            staged=(0, 1, 2, 3) if recomputes and (pairs or ITEMSIZE[self.dtype] > 2) else (0,),
        )

    def kernels(self, card: Machine) -> tuple[int, list[predict.Time]]:
        """Steps of a chunk, 0 if time is not cut, and the times of the pass's kernels."""
        row, at = self.D * self.d, self.B * self.D * self.d / card.multiprocessors
        sizes = self.L, self.B, self.D, self.d
        task = self.task._replace(one_kernel=plan.in_one_kernel(self.variant, self.forward, card.device))
        cut = chunks.length(self.variant, sizes, self.forward, self.time_parallel, card.device)
        if cut:
            return cut, list(chunks.in_chunks(task, self.L, cut, row, at, card.device))
        return 0, list(chunks.sequential(task, self.L, row, at, card.device))

    def bytes(self) -> float:
        return sum(moved(self.variant, self.forward, self.every)) * self.L * self.B * self.D * self.d


class Row(NamedTuple):
    """Microseconds of a case: predicted at best and at worst, and measured if it was."""

    case: Case
    best: float
    worst: float
    floor: float  # of a copy of the same bytes
    bound: str  # at best
    bound_at_worst: str
    how: str
    measured: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted: 1 within the two ends, else over the nearer one."""
        if self.measured is None:
            return None
        return self.measured / min(max(self.measured, self.best), self.worst)


def row(case: Case, card: Machine, measured: float | None = None) -> Row:
    cut, times = case.kernels(card)
    best, worst = predict.together(times)
    limits = max(times, key=lambda t: t.best).bound, max(times, key=lambda t: t.worst).bound_at_worst
    how = f"{len(times)} kernels, chunks of {cut}" if cut else "sequential"
    return Row(case, 1e6 * best, 1e6 * worst, 1e6 * case.bytes() / card.bandwidth, *limits, how, measured)


# ----------------------------------------------------------------------------------------------------------------------
# What was measured


def read(path: Path) -> dict[Case, float]:
    """Microseconds of what the bench measured of our recurrences, padding left out."""
    found = {}
    labels = {Case("", "", 0, 0, 0, 0, *which).label: which for which in PASSES}
    for one in json.loads(path.read_text())["rows"]:
        which = labels.get("backward, save=True" if one["pass"] == "backward" else one["pass"])
        cell = bench.CELLS[one["cell"]].core.name
        ours = one["who"] == "sru_rt" and one["level"] == "cell" and not one["ragged"]
        if ours and which and cell in CELLS and "median_ms" in one:
            found[Case(cell, one["dtype"], *one["shape"], one["D"], *which)] = 1e3 * one["median_ms"]
    return found


def difference(one: Row) -> float:
    """By what factor a row is wrong, whichever way."""
    return max(one.ratio, 1 / one.ratio) if one.ratio else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Layers, and the project's targets


def layer(card: Machine, case: Case) -> tuple[float, float]:
    """Microseconds, at best and at worst, of a product U = W x with d_in = d and the recurrence, in one launch or two.

    Of a backward, two products.
    """
    if took := in_one_launch(card, case):
        return 1e6 * took.best, 1e6 * took.worst
    n = len(CELLS[case.cell].gates) * case.d * case.D
    product = predict.product(card, case.dtype, case.L * case.B, n, case.d)
    times = [*case.kernels(card)[1], *[product] * (1 if case.forward else 2)]
    best, worst = predict.together(times)
    return 1e6 * best, 1e6 * worst


def in_one_launch(card: Machine, case: Case) -> predict.Time | None:
    """Of a layer, if it takes one launch."""
    sizes, block = (case.L, case.B, case.D, case.d), small.block_of(case.variant, case.d, case.d, card.arch)
    if not (block and case.forward and not case.every):
        return None
    cut = case.kernels(card)[0]
    if not one_launch.taken(case.variant, sizes, case.d, cut, case.time_parallel, card.device):
        return None
    return one_launch.in_one(case.variant, block, sizes, case.d, card.device)


def naive(card: Machine, case: Case) -> float:
    """Microseconds of one thread for each channel that reads nothing ahead, at best."""
    one = predict.Kernel(*moved(case.variant, case.forward, case.every), threads=128)
    return 1e6 * predict.sweep(card, one, case.B * case.D * case.d, case.L).best


def targets(card: Machine) -> Iterator[tuple[str, str, str, str]]:
    """What, target, predicted, verdict: the rows of the project's targets that the model can say something of."""
    yield from _of_copy(card)
    for dtype in ("float32", "bfloat16"):
        case = Case("sru", dtype, *LARGE, True, 1)
        times = naive(card, case) / row(case, card).worst
        yield (f"SRU {dtype}, forward, `save=True`, against the plainest kernel at (2048, 16, 1024)", ">= 5 x",
               f"{times:.1f} x", _verdict(times >= 5, ""))  # fmt: skip
    yield from _few_channels(card)
    inference = Case("sru", "bfloat16", *LARGE, True, 0)
    yield _below("layer of SRU, inference, bfloat16, (2048, 16, 1024)", 305, layer(card, inference),
                 "U goes to memory and back: it is not yet taken in pieces that the cache holds")  # fmt: skip
    yield _decoding(card)
    yield _below("layer of SRU at (32, 32, 128), bfloat16, in a graph", 8,
                 layer(card, Case("sru", "bfloat16", 32, 32, 128, 1, True, 0)), "launches and waits")  # fmt: skip
    yield _ragged(card)


def _of_copy(card: Machine) -> Iterator[tuple[str, str, str, str]]:
    """Parts of a copy's speed, the worst of all cells."""
    for forward, every, wanted in ((True, 1, 0.9), (False, 1, 0.85), (False, 32, 0.85)):
        rows = [row(Case(name, dtype, *LARGE, forward, every), card) for name in CELLS for dtype in DTYPES[:2]]
        yield _worst(f"every cell, {rows[0].case.label}, (2048, 16, 1024)", wanted, rows)
    for forward, every in ((True, 0), (True, 1), (False, 1), (False, 32)):
        cases = [
            Case(name, dtype, 2048 * max(1, 64 // B), B, 1024, 1, forward, every)
            for name in CELLS for dtype in DTYPES[:2] for B in (8, 16, 32, 64, 128)
        ]  # fmt: skip
        rows = [row(case, card) for case in cases]
        yield _worst(f"every cell, {rows[0].case.label}, B*d*D from 8k to 128k", 0.8, rows)


def _worst(what: str, wanted: float, rows: Sequence[Row]) -> tuple[str, str, str, str]:
    missed = [r for r in rows if r.floor / r.worst < wanted]
    least = min(rows, key=lambda r: r.floor / r.worst)
    text = f"{least.floor / least.worst:.2f} to {least.floor / least.best:.2f}: `{least.case.cell}` {least.case.dtype}"
    limits = ", ".join(dict.fromkeys(r.bound_at_worst for r in missed))
    verdict = _verdict(not missed, f"{len(missed)} of {len(rows)}: {limits}")
    return what, f">= {wanted} of copy", f"{text}, {least.case.shape}", verdict


def _few_channels(card: Machine) -> Iterator[tuple[str, str, str, str]]:
    """In 16-bit data; of the first cell states are kept in them, of the others nothing is."""
    for cell, every, limit in (("sru_no_v", 1, 235), ("mingru", 0, 130), ("sru", 0, 320)):
        case = Case(cell, "bfloat16", 65536, 1, 1024, 1, True, every, saved_dtype="bfloat16")
        one = row(case, card)
        what = f"`{cell}`, bfloat16, {case.label}, (65536, 1, 1024)"
        yield _below(what, limit, (one.best, one.worst), one.bound_at_worst)


def token(card: Machine, cell: str, dtype: str, B: int, d: int, in_cache: bool) -> predict.Time:
    """One token of a layer with d_in = d, whose kernel forms U."""
    variant = Case(cell, dtype, 1, B, d, 1, True, 0).variant
    reads = decode.reads(dtype, len(variant.cell.gates), d, 0, 0)
    return predict.token(card, costs.token(variant, B, d, reads), d, in_cache)


def _decoding(card: Machine) -> tuple[str, str, str, str]:
    """At best the second-level cache has the weights of all layers, from the token before."""
    layers, d = 6, 1024
    times = [token(card, "sru", "bfloat16", 1, d, in_cache) for in_cache in (True, False)]
    before = 1e6 * layers * (times[0].launch + times[0].fill)
    why = f"launches and waits for memory alone are {before:.3g} us; at best weights come from the cache"
    what = f"six layers of SRU, d = {d}, B = 1, one token, bfloat16, in one graph"
    return _below(what, 15, (1e6 * layers * times[0].best, 1e6 * layers * times[1].worst), why)


def _ragged(card: Machine) -> tuple[str, str, str, str]:
    """Lengths from 1 to L: half of the bytes are read, all of h is written, and the longest takes as many steps."""
    case = Case("sru", "float32", *LARGE, True, 0)
    (whole,) = case.kernels(card)[1]
    reads, writes = moved(case.variant, True, 0)
    part = (reads / 2 + writes) / (reads + writes)
    half = whole._replace(memory=part * whole.memory, cache=part * whole.cache)
    ratio = whole.worst / half.worst
    why = f"zeros are written into padding; then {half.bound_at_worst}"
    return (
        "ragged lengths, half of it padding, SRU float32 forward",
        ">= 1.8 x",
        f"{ratio:.2f} x",
        _verdict(ratio >= 1.8, why),
    )


def _below(what: str, limit: float, took: tuple[float, float], why: str) -> tuple[str, str, str, str]:
    return what, f"<= {limit} us", f"{took[0]:.3g} to {took[1]:.3g} us", _verdict(took[1] <= limit, why)


def _verdict(reached: bool, why: str) -> str:
    return "expected" if reached else f"missed: {why}" if why else "missed"


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *lines))


def table(rows: Sequence[Row]) -> str:
    heads = ["cell", "dtype", "(L, B, d)", "pass", "predicted us", "of copy", "bound by, at best", "how"]
    heads += ["measured us", "measured / predicted"] if any(r.measured for r in rows) else []
    lines = []
    for r in rows:
        c = r.case
        cells = [c.cell, c.dtype, c.shape, c.label, f"{r.best:.1f} to {r.worst:.1f}"]
        cells += [f"{r.floor / r.worst:.2f} to {r.floor / r.best:.2f}", r.bound, r.how]
        if len(heads) > 8:
            cells += [f"{r.measured:.1f}", f"{r.ratio:.2f}"] if r.measured and r.ratio else ["", ""]
        lines.append(cells)
    return markdown(heads, lines)


def page(text: str, card: Machine) -> str:
    """docs/performance.md with the predicted targets of `card`. Raises ValueError if it has no place for them."""
    head, found, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN.strip()} and {END}")
    made = markdown(["", "target", f"predicted, {card.name}", "expected"], list(targets(card)))
    return f"{head}{BEGIN}{made}{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    names = [card.name.lower().replace(" ", "") for card in machine.CARDS]
    option("--gpu", type=lambda name: name.lower().replace(" ", ""), choices=names, default=names[0])
    option("--cell", nargs="+", choices=CELLS, default=["sru", "sru_no_v", "qrnn", "mingru", "minlstm"])
    option("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    option("--measured", type=Path, metavar="FILE", help="what `python -m sru_rt bench` wrote on that GPU")
    option("--targets", action="store_true", help="write the table of docs/performance.md")
    args = parser.parse_args(argv)
    card = machine.named(args.gpu)
    if args.targets:
        PAGE.write_text(page(PAGE.read_text(), card))
        return 0
    measured: dict[Case, Any] = read(args.measured) if args.measured else {}
    cases = measured or [Case(c, t, *s, *p) for c in args.cell for t in args.dtype for s in SHAPES for p in PASSES]
    rows = [row(case, card, measured.get(case)) for case in cases]
    sys.stdout.write(table(sorted(rows, key=difference, reverse=True)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
