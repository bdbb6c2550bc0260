"""Speed of sru_rt on the CPU beside a copy, the matrix products alone, PyPI's `sru`, torch's LSTM and GRU.

One run, one table: the recurrence of every cell, and layers of SRU; float32, d_in = d, one direction. Results are
compared with float64 first, and what differs gets no speed. README.md beside this file explains the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import oracle
import sru_rt

ROOT = Path(__file__).resolve().parents[1]
Shape = tuple[int, int, int]  # L, B, d
PASSES = "forward", "forward + backward"
SMALL, MIDDLE, LARGE = SHAPES = (32, 32, 128), (128, 32, 512), (512, 16, 1024)
ALPHA = math.sqrt(3)
TOLERANCE = 2e-5  # of an array's largest magnitude: float32 rounding through 512 steps, against float64
PAUSE = 0.1  # seconds of sleep before each block: by then the threads of the last block spin no more
ROWS: list[Row] = []  # in a measuring process: what it measures
# What the project aims at; a shape that is not named has no target.
TARGETS = {
    "layer, forward": {MIDDLE: 1.10, LARGE: 1.10},
    "layer, forward + backward": {MIDDLE: 1.12, LARGE: 1.12},
    "sru, forward": {MIDDLE: 1.5, LARGE: 1.3},
    "sru, forward + backward": {MIDDLE: 3, LARGE: 10},
    "LSTM, forward": {SMALL: 2.5, MIDDLE: 2.5, LARGE: 3},
    "LSTM, forward + backward": {SMALL: 2.5, MIDDLE: 2.5, LARGE: 3},
}


class Row(NamedTuple):
    """What is timed, the work in it, and the row that it is held against."""

    label: str
    threads: int
    call: Callable[[], object] | None  # None outside of the process that measures it
    work: float = 0.0  # in units
    unit: str = ""  # GB or GF
    against: str = ""  # the label of a row with the same threads
    sense: str = ""  # "of": its time / ours, at least the target; "x": ours / its, at most; else at least
    target: float | None = None
    repeats: int = 1  # how often one call does the work
    fault: str = ""  # why no speed is given


class Cell(NamedTuple):
    """A recurrence that is timed."""

    name: str
    forward: Callable[..., tuple]  # its arguments beside u are given by name
    backward: Callable
    gates: int
    skip: bool  # whether it is given x
    params: dict[str, int]  # its parameters, and how many each holds for a channel
    options: dict[str, Any]

    @property
    def bytes(self) -> dict[str, int]:
        """What each pass reads and writes for an element of h, in float32: gates, x, state, h and gradients."""
        read = self.gates + self.skip
        return {"forward": 4 * read + 4, "forward, save=True": 4 * read + 8, "backward": 8 * read + 8}


@sru_rt.cell(gates="uf uc ug", params="b_f", state="c", constants="lowest")
def hgru(uf, uc, ug, b_f, c, lowest):
    """The cell of examples/own_cell.py."""
    f = lowest + (1 - lowest) * sru_rt.sigmoid(uf + b_f)
    c = f * c + (1 - f) * uc * sru_rt.sigmoid(uc)
    return c, c * sru_rt.sigmoid(ug)


CELLS = [
    Cell("SRU", sru_rt.sru_recurrence, sru_rt.sru_backward, 3, True, {"bias": 2, "v": 2}, {"alpha": ALPHA}),
    Cell("QRNN fo", sru_rt.qrnn_recurrence, sru_rt.qrnn_backward, 3, False, {"bias": 3}, {}),
    Cell(
        "QRNN ifo with highway", sru_rt.qrnn_recurrence, sru_rt.qrnn_backward, 4, True, {"bias": 4},
        {"pooling": "ifo", "highway": True},
    ),
    Cell("minGRU", sru_rt.mingru_recurrence, sru_rt.mingru_backward, 2, False, {"bias": 2}, {}),
    Cell("minLSTM", sru_rt.minlstm_recurrence, sru_rt.minlstm_backward, 3, False, {"bias": 3}, {}),
    Cell("own cell", hgru.recurrence, hgru.backward, 3, False, {"params": 1}, {"lowest": 0.5}),
]  # fmt: skip


class Layer:
    """The arrays of an SRU layer of one shape, the calls of sru_rt on them, and the results of a float64 loop."""

    def __init__(self, shape: Shape, threads: int) -> None:
        self.shape, self.threads = shape, threads
        L, B, d = shape
        rng = np.random.default_rng(0)
        self.x, self.dh = rng.standard_normal((2, L, B, d), np.float32)
        self.weight = (rng.uniform(-1, 1, (1, 3, d, d)) * math.sqrt(3 / d)).astype(np.float32)
        self.bias, self.v = rng.uniform(-1, 1, (2, 1, 2, d)).astype(np.float32)
        self.expected = self.expect()

    def expect(self) -> dict[str, Any]:
        """Outputs and gradients."""
        given = (oracle.project(self.x, self.weight), self.x, self.bias, self.v)
        h, c_last = oracle.sru_recurrence(*given, alpha=ALPHA)
        g = oracle.sru_recurrence_backward(*given, dh=self.dh, alpha=ALPHA)
        du, x, weight = g["u"][:, :, 0], oracle.float64(self.x), oracle.float64(self.weight[0])
        dx, dweight = g["x"] + np.tensordot(du, weight, 2), np.tensordot(du, x, ((0, 1), (0, 1)))
        return {"h": h, "c_last": c_last, "x": dx, "weight": dweight[None], "bias": g["bias"], "v": g["v"]}

    def fault(self, **found: Any) -> str:
        return compare(found, self.expected)

    def forward(self, save: bool = False) -> tuple:
        return sru_rt.sru_forward(self.x, self.weight, self.bias, self.v, alpha=ALPHA, save=save)

    def forward_and_backward(self) -> tuple:
        h, c_last, saved = self.forward(save=True)
        return h, c_last, sru_rt.sru_backward(saved, self.dh)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Empty where everything agrees with float64, else what differs and by how much."""
    errors = {name: oracle.relative_error(array, expected[name]) for name, array in found.items()}
    wrong = [f"{name} differs by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    return "no speed: " + ", ".join(wrong) if wrong else ""


@contextlib.contextmanager
def on_numpy() -> Iterator[None]:
    """Within it sru_rt does not use compiled code."""
    before = os.environ.get("SRU_RT_CPU", "")
    os.environ["SRU_RT_CPU"] = "numpy"
    try:
        yield
    finally:
        os.environ["SRU_RT_CPU"] = before


def copies(shape: Shape, threads: int) -> list[Row]:
    """The yardstick: memmove with the bytes and footprint of a recurrence, half read and half written."""
    elements, widths = math.prod(shape), sorted({width for cell in CELLS for width in cell.bytes.values()})
    source, target = np.ones((2, widths[-1] * elements // 2), np.uint8)
    pool = ThreadPoolExecutor(threads)

    def copy_row(width: int, threads: int) -> Row:
        half = width * elements // 2
        repeats = max(1, 32_000_000 // half)  # starting the threads costs next to nothing then

        def share(i: int) -> None:
            start, end = half * i // threads, half * (i + 1) // threads
            to, origin = target.ctypes.data + start, source.ctypes.data + start
            for _ in range(repeats):
                ctypes.memmove(to, origin, end - start)

        call = (lambda: share(0)) if threads == 1 else (lambda: list(pool.map(share, range(threads))))
        return Row(f"copy, {width} B/element", threads, call, 2e-9 * half, "GB", repeats=repeats)

    def touch() -> None:
        for width in (12, 4):  # du and dx of SRU's backward
            np.empty(width * elements, np.uint8)[::4096] = 0

    rows = [copy_row(width, one) for width in widths for one in sorted({1, threads})]
    return [*rows, Row("page faults of 16 B/element", 1, touch)]


def recurrences(shape: Shape, threads: int) -> list[Row]:
    """Every cell; they share x, the memory of u, and that of the results."""
    L, B, d = shape
    rng = np.random.default_rng(1)
    x, dh, *gates = rng.standard_normal((2 + max(cell.gates for cell in CELLS), L, B, d), np.float32)
    u = np.concatenate(gates).reshape(-1)
    out = np.empty_like(x), np.empty((1, B, d), np.float32)
    rows = []
    for cell in CELLS:
        arrays = {"u": u[: L * B * cell.gates * d].reshape(L, B, 1, cell.gates, d)} | ({"x": x} if cell.skip else {})
        arrays |= {name: rng.uniform(-1, 1, (1, n, d)).astype(np.float32) for name, n in cell.params.items()}
        rows += recurrence(cell, arrays, dh, out, threads)
    return rows


def recurrence(cell: Cell, arrays: dict[str, Any], dh: Any, out: tuple, threads: int) -> list[Row]:
    def run(arrays: dict[str, Any], dh: Any, **keywords: Any) -> tuple[dict[str, Any], Any]:
        h, last, saved = cell.forward(**arrays, **cell.options, save=True, **keywords)
        g = cell.backward(saved, dh)
        return {"h": h, "last": last} | {f"d{name}": getattr(g, name) for name in arrays}, saved

    with on_numpy():
        expected, _ = run({name: oracle.float64(array) for name, array in arrays.items()}, oracle.float64(dh))
    found, saved = run(arrays, dh, out=out)
    wrong = compare(found, expected)
    forward = functools.partial(cell.forward, **arrays, **cell.options, out=out)
    wrong = wrong or compare({"h": forward()[0]}, expected)
    calls = forward, functools.partial(forward, save=True), functools.partial(cell.backward, saved, dh)
    rows = []
    for (which, width), call in zip(cell.bytes.items(), calls):
        moved, copied = width * dh.size, f"copy, {width} B/element"
        in_cache = moved <= max(caches().values(), default=32 << 20)
        for one in sorted({1, threads}):
            target = None if in_cache else 0.8 if one == 1 else 0.7
            label = f"recurrence of {cell.name}, {which}"
            rows.append(Row(label, one, call, moved / 1e9, "GB", copied, "of", target, fault=wrong))
    return rows


def layers(p: Layer) -> list[Row]:
    """The matrix products, into arrays that exist already, and the layer."""
    d = p.shape[2]
    x, w = p.x.reshape(-1, d), p.weight.reshape(-1, d)
    u, dx, dw = x @ w.T, np.empty_like(x), np.empty_like(w)
    product = functools.partial(np.matmul, x, w.T, out=u)

    def products() -> None:
        product()
        np.matmul(u, w, out=dx)
        np.matmul(u.T, x, out=dw)

    h, c_last, g = p.forward_and_backward()
    fault = p.fault(h=h, c_last=c_last, x=g.x, weight=g.weight, bias=g.bias, v=g.v) or p.fault(h=p.forward()[0])
    rows = []
    for which, alone, call, times in zip(PASSES, (product, products), (p.forward, p.forward_and_backward), (1, 3)):
        work, label, target = 2e-9 * times * x.size * len(w), f"products, {which}", TARGETS[f"layer, {which}"]
        rows.append(Row(label, p.threads, alone, work, "GF"))
        rows.append(Row(f"layer, {which}", p.threads, call, work, "GF", label, "x", target.get(p.shape), fault=fault))
    return rows


def peers(p: Layer, against: str = "layer") -> list[Row]:
    rows = []
    for name in ("sru", "LSTM", "GRU"):
        try:
            calls, fault = peer(p, name)
        except Exception as error:  # `sru` builds C++ code when it is imported, which can fail in many ways
            calls, fault = dict.fromkeys(PASSES, int), f"not available: {error!r}"[:120]
        for which, call in calls.items():
            label, ours, sense = f"{name}, {which}", f"{against}, {which}", "x the time of"
            target = TARGETS.get(label, {}).get(p.shape)
            rows.append(Row(label, p.threads, call, 0, "", ours, sense, target, fault=fault))
    return rows


def peer(p: Layer, name: str) -> tuple[dict[str, Callable], str]:
    """What a peer's rows call, and what is wrong with its results."""
    torch, d = importlib.import_module("torch"), p.shape[2]
    torch.set_num_threads(p.threads)
    if name != "sru":  # another function: only its shape can be wrong
        calls = torch_calls(torch, getattr(torch.nn, name)(d, d), p)
        return calls, "" if calls["forward"]()[0].shape == p.x.shape else "no speed: another shape"
    cell = importlib.import_module("sru").SRUCell(d, d)
    give(cell, p)
    calls = torch_calls(torch, cell, p)
    return calls, fault_of(p, cell, calls)


def give(cell: Any, p: Layer) -> None:
    """Gives a cell of `sru`, or one that has its parameters, those of the layer: gates innermost."""
    torch = importlib.import_module("torch")
    for parameter, array in zip(cell.parameters(), (p.weight[0].transpose(2, 1, 0), p.v, p.bias)):
        parameter.data = torch.from_numpy(np.ascontiguousarray(array)).view(parameter.shape)


def fault_of(p: Layer, cell: Any, calls: dict[str, Callable]) -> str:
    """What is wrong with the results and gradients of such a cell."""
    d = p.shape[2]
    h, c_last, dx = calls["forward + backward"]()
    dw, dv, db = (parameter.grad.numpy() for parameter in cell.parameters())
    dw, dv, db = dw.reshape(1, d, d, 3).transpose(0, 3, 2, 1), dv.reshape(1, 2, d), db.reshape(1, 2, d)
    fault = p.fault(h=h, c_last=c_last.detach()[None], x=dx, weight=dw, v=dv, bias=db)
    return fault or p.fault(h=calls["forward"]()[0])


def torch_calls(torch: Any, module: Any, p: Layer) -> dict[str, Callable]:
    """Forward in evaluation mode without gradients; forward + backward to x and all parameters."""
    evaluation, x, dh = copy.deepcopy(module).eval(), torch.from_numpy(p.x), torch.from_numpy(p.dh)
    leaf = x.clone().requires_grad_()

    def forward() -> Any:
        with torch.no_grad():
            return evaluation(x)

    def forward_and_backward() -> tuple:
        for tensor in (leaf, *module.parameters()):
            tensor.grad = None  # else this pass adds to the last one's
        h, state = module(leaf)
        h.backward(dh)
        return h.detach(), state, leaf.grad

    return dict(zip(PASSES, (forward, forward_and_backward)))


def ours(shape: Shape, threads: int) -> list[Row]:
    return copies(shape, threads) + recurrences(shape, threads) + layers(Layer(shape, threads))


def prepare(shape: Shape, threads: int, group: str) -> list[Row]:
    """In a measuring process: sets ROWS, and returns them without their calls. Peers have a process of their own,
    as what one library leaves in the heap decides whether another one's new arrays cost page faults."""
    warnings.filterwarnings("ignore", module=r"sru\.")  # it has no CUDA, and minds gradients on the CPU
    ROWS.extend(peers(Layer(shape, threads)) if group == "peers" else ours(shape, threads))
    return [row._replace(call=None) for row in ROWS]


def block(i: int, last: float) -> list[float]:
    """Seconds of 1 to 20 calls, within about 0.2 s; one is not counted before, unless `last` took over 1 s."""
    row = ROWS[i]
    os.environ["SRU_RT_NUM_THREADS"] = str(row.threads)  # sru_rt reads it at every call

    def seconds() -> float:
        before = time.perf_counter()
        row.call()
        return (time.perf_counter() - before) / row.repeats

    first = last if last > 1 else seconds()
    return [seconds() for _ in range(min(max(int(0.2 / first / row.repeats), 1), 20))]


def measure(
    shape: Shape, threads: int, rounds: int, budget: float, prepare: Callable[..., list[Row]]
) -> dict[Row, list[float]]:
    """Seconds of every counted call. A round has one block of every row, in random order, after a pause."""
    spawn, rng = multiprocessing.get_context("spawn"), np.random.default_rng(0)
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as others:
        where, samples = {}, {}
        for pool, group in ((ours, "ours"), (others, "peers")):
            for i, row in enumerate(pool.submit(prepare, shape, threads, group).result()):
                where[row], samples[row] = (pool, i), []
        end = time.perf_counter() + budget
        for _ in range(rounds):
            for row in [list(samples)[i] for i in rng.permutation(len(samples))]:
                if not row.fault and (time.perf_counter() < end or not samples[row]):
                    time.sleep(PAUSE)
                    pool, i = where[row]
                    samples[row] += pool.submit(block, i, samples[row][-1] if samples[row] else 0.0).result()
    return samples


def results(shape: Shape, samples: dict[Row, list[float]]) -> list[dict[str, Any]]:
    """Row by row what was timed, the times in milliseconds, and the comparison, by medians and by minima."""
    best = {(row.label, row.threads): (float(np.median(t)), min(t)) for row, t in samples.items() if t}
    found = []
    for row, times in samples.items():
        one = {"shape": shape, **row._replace(call=None)._asdict(), "n": len(times)}
        found.append(one)
        if row.fault:
            continue
        own, other = best[row.label, row.threads], best.get((row.against, row.threads))
        in_ms = {"median_ms": own[0], "min_ms": own[1], "max_ms": max(times)}
        one |= {name: round(1e3 * t, 4) for name, t in in_ms.items()} | {"rate": round(row.work / own[0], 2)}
        if other:
            value, by_minima = (b / a if row.sense == "of" else a / b for a, b in zip(own, other))
            one |= {"value": round(value, 3), "by_minima": round(by_minima, 3)}
            if row.target:
                one["reached"] = value <= row.target if row.sense == "x" else value >= row.target
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["(L, B, d) | what | threads | median ms | min - max | n | rate | compared | target", "--- | " * 8 + "---"]
    for row in rows:
        cells = ["{shape} | {label} | {threads}"]
        cells += ["{fault} | |" if row["fault"] else "{median_ms:.3f} | {min_ms:.3f} - {max_ms:.3f} | {n}"]
        cells += ["{rate:.1f} {unit}/s" if row["unit"] and not row["fault"] else ""]
        cells += ["{value:.2f} ({by_minima:.2f}) {sense} {against}" if "value" in row else ""]
        bound, verdict = "<=" if row["sense"] == "x" else ">=", "reached" if row.get("reached") else "MISSED"
        cells += [f"{bound} {{target}} {verdict}" if "reached" in row else ""]
        lines.append(" | ".join(cells).format(**row))
    return "\n".join(f"| {line} |" for line in lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """What docs/performance.md shows, as a table: a row for each comparison, a column for each shape."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    lines = [["", *map(str, shapes), "target"], ["---"] * (len(shapes) + 2)]
    compared = [row for row in rows if "value" in row or row["fault"]]
    for label in dict.fromkeys(row["label"] for row in compared):
        of_label = [row for row in compared if row["label"] == label]
        cells = {shape: [ratio(row) for row in of_label if tuple(row["shape"]) == shape] for shape in shapes}
        targets, reached = ([row[key] for row in of_label if "reached" in row] for key in ("target", "reached"))
        bound, missed = "<=" if of_label[0]["sense"] == "x" else ">=", len(reached) - sum(reached)
        verdict = (
            "reached" if not missed else "missed" if missed == len(reached) else f"{missed} of {len(reached)} missed"
        )
        goal = f"{bound} {' / '.join(f'{target:g}' for target in dict.fromkeys(targets))}: {verdict}" if reached else ""
        against = f"{of_label[0]['sense']} {of_label[0]['against']}"
        lines.append([f"{label}: {against}", *(" / ".join(cells[shape]) for shape in shapes), goal])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(row: dict[str, Any]) -> str:
    """By medians; in brackets by minima where the two differ by more than 5 %, as something else was running."""
    if row["fault"]:
        return str(row["fault"])
    apart = abs(row["value"] / row["by_minima"] - 1) > 0.05
    return f"{row['value']:.2f}" + (f" ({row['by_minima']:.2f})" if apart else "")


def caches() -> dict[str, int]:
    """Bytes of the caches of core 0, by level and kind, where the system tells."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return {f"L{level} {kind}": int(size.rstrip("K")) << 10 for level, kind, size in read}


def environment(root: Path) -> dict[str, Any]:
    """Machine, versions, and the commit, which is known if sru_rt is imported from this checkout."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.partition("model name")[2].partition("\n")[0].strip(" :\t") or platform.machine()
    blas = getattr(np.__config__, "CONFIG", {}).get("Build Dependencies", {}).get("blas", {})  # from numpy 1.26 on
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    versions = {name: installed.get(name, "not installed") for name in ("numpy", "torch", "sru")}
    versions |= {"blas": f"{blas.get('name')} {blas.get('version')}", "sru_rt": sru_rt.__version__}
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    ours = root in Path(sru_rt.__file__).resolve().parents
    commit = ours and subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "caches": caches(), "python": platform.python_version()}
    return {"commit": commit or "unknown", "machine": machine, "versions": versions}


def options(description: str, name: str) -> argparse.ArgumentParser:
    """What every benchmark of this kind takes; its results are called `name` and the date."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    folder, option = ROOT / "benchmarks/results" if (ROOT / ".git").exists() else Path(), parser.add_argument
    option("--shapes", nargs="+", metavar="L,B,d", default=[",".join(map(str, s)) for s in SHAPES])
    option("--threads", type=int, default=2, help="of sru_rt, BLAS and peers; default: %(default)s")
    option("--rounds", type=int, default=7, help="blocks of each row; default: %(default)s")
    option("--budget", type=float, default=600, help="seconds for one shape; default: %(default)s")
    option("--quick", action="store_true", help="one round of the first shape")
    default = folder / f"{name}-{datetime.date.today()}.json"
    option("--out", type=Path, default=default, help="default: %(default)s")
    return parser


def run(args: argparse.Namespace, prepare: Callable[..., list[Row]], **environment_of_processes: str) -> dict[str, Any]:
    """Measures what `prepare` makes for each shape; returns the report."""
    for library in ("OPENBLAS", "MKL", "OMP"):  # read when a measuring process loads them
        os.environ[f"{library}_NUM_THREADS"] = str(args.threads)
    os.environ |= environment_of_processes
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # ninja, for `sru`
    rows, report, load = [], {"date": str(datetime.date.today()), **environment(ROOT)}, os.getloadavg()
    for text in args.shapes[:1] if args.quick else args.shapes:
        shape = tuple(map(int, text.split(",")))
        rows += results(shape, measure(shape, args.threads, 1 if args.quick else args.rounds, args.budget, prepare))
        print(f"{text} done", file=sys.stderr)
    return report | {"threads": args.threads, "load": [load, os.getloadavg()], "rows": rows}


def finish(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Writes and prints a report; returns the status of the command."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]), f"\nwritten: {args.out}")
    return int(any(row["fault"].startswith("no speed") for row in report["rows"]))


def main() -> int:
    parser = options(__doc__, "cpu")
    text = "measure nothing; print the summary of an earlier run's FILE"
    parser.add_argument("--summary", type=Path, metavar="FILE", help=text)
    args = parser.parse_args()
    if args.summary:
        print(summary(json.loads(args.summary.read_text())["rows"]))
        return 0
    return finish(args, run(args, prepare))


if __name__ == "__main__":
    raise SystemExit(main())
