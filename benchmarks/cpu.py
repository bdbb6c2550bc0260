"""Speed of sru_rt on the CPU beside a copy, the matrix products alone, PyPI's `sru`, torch's LSTM and GRU.

    python benchmarks/cpu.py [--quick] [--shapes 128,32,512 ...] [--threads 2] [--out FILE]

One process, one table: SRU with highway, v and bias, float32, d_in = d, one direction. Results are compared
with a float64 loop first, and what differs gets no speed. README.md beside this file explains the rows.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import oracle
import sru_rt

ROOT = Path(__file__).resolve().parents[1]
SMALL, MIDDLE, LARGE = SHAPES = (32, 32, 128), (128, 32, 512), (512, 16, 1024)
THREAD_VARIABLES = [f"{library}_NUM_THREADS" for library in ("OPENBLAS", "MKL", "OMP", "SRU_RT")]
ALPHA = math.sqrt(3)
TOLERANCE = 2e-5  # of an array's largest magnitude: float32 rounding through 512 steps, against float64
PAUSE = 0.1  # seconds of sleep before each block: by then the threads of the last library spin no more

# What the project aims at; a shape that is not named has no target.
TARGETS: dict[str, dict[tuple, float]] = {
    "layer, forward": {MIDDLE: 1.10, LARGE: 1.10},
    "layer, forward + backward": {MIDDLE: 1.12, LARGE: 1.12},
    "sru, forward": {MIDDLE: 1.5, LARGE: 1.3},
    "sru, forward + backward": {MIDDLE: 3, LARGE: 10},
    "LSTM, forward": {SMALL: 2.5, MIDDLE: 2.5, LARGE: 3},
    "LSTM, forward + backward": {SMALL: 2.5, MIDDLE: 2.5, LARGE: 3},
}


class Variant(NamedTuple):
    """One row: what is timed, the bytes or operations in it, and the row that it is held against."""

    label: str
    threads: int
    call: Callable[[], object]
    work: float = 0.0  # in units, for one job
    unit: str = ""  # GB or GF
    against: str = ""  # the label of a row with the same threads
    sense: str = ""  # "of": its time / ours, at least the target; "x": ours / its, at most; else at least
    target: float | None = None
    repeats: int = 1  # how often one call does the job
    fault: str = ""  # why no speed is given


class Problem:
    """The arrays of one shape, the calls of sru_rt on them, and the results that a float64 loop finds."""

    def __init__(self, shape: tuple[int, int, int], threads: int) -> None:
        self.shape, self.threads = shape, threads
        L, B, d = shape
        rng = np.random.default_rng(0)
        self.x, self.dh = rng.standard_normal((2, L, B, d), np.float32)
        self.weight = (rng.uniform(-1, 1, (1, 3, d, d)) * math.sqrt(3 / d)).astype(np.float32)
        self.bias, self.v = rng.uniform(-1, 1, (2, 1, 2, d)).astype(np.float32)
        self.u = (self.x.reshape(-1, d) @ self.weight.reshape(-1, d).T).reshape(L, B, 1, 3, d)
        self.out = np.empty_like(self.x), np.empty((1, B, d), np.float32)
        self.elements = L * B * d
        self.expected = self.expect()

    def expect(self) -> dict[str, Any]:
        """Outputs and gradients of the layer; u and skip are those of the recurrence alone."""
        given = (oracle.project(self.x, self.weight), self.x, self.bias, self.v)
        expected = oracle.sru_recurrence_backward(*given, dh=self.dh, alpha=ALPHA)
        expected["h"], expected["c_last"] = oracle.sru_recurrence(*given, alpha=ALPHA)
        expected["skip"] = expected["x"]
        du, x, weight = expected["u"][:, :, 0], oracle.float64(self.x), oracle.float64(self.weight[0])
        expected["x"] = expected["skip"] + np.tensordot(du, weight, 2)
        expected["weight"] = np.tensordot(du, x, ((0, 1), (0, 1)))[None]
        return expected

    def fault(self, **found: Any) -> str:
        """Empty where everything agrees with the float64 loop, else what differs and by how much."""
        for name, array in found.items():
            error = oracle.relative_error(array, self.expected[name])
            if not error <= TOLERANCE:
                return f"no speed: {name} differs by {error:.1e}"
        return ""

    def recurrence(self, save: bool = False) -> tuple:
        return sru_rt.sru_recurrence(self.u, self.x, self.bias, self.v, alpha=ALPHA, save=save, out=self.out)

    def layer(self, save: bool = False, out: tuple | None = None) -> tuple:
        return sru_rt.sru_forward(self.x, self.weight, self.bias, self.v, alpha=ALPHA, save=save, out=out)

    def layer_and_backward(self) -> tuple:
        h, c_last, saved = self.layer(save=True)
        return h, c_last, sru_rt.sru_backward(saved, self.dh)


def copies(p: Problem) -> list[Variant]:
    """The yardstick: memmove with the bytes and footprint of a recurrence, half read and half written."""
    source, target = np.ones((2, 20 * p.elements), np.uint8)
    pool = ThreadPoolExecutor(p.threads)

    def variant(width: int, threads: int) -> Variant:
        half = width * p.elements // 2
        repeats = max(1, 32_000_000 // half)  # starting the threads costs next to nothing then

        def share(i: int) -> None:
            start, end = half * i // threads, half * (i + 1) // threads
            for _ in range(repeats):
                ctypes.memmove(target.ctypes.data + start, source.ctypes.data + start, end - start)

        def call() -> object:
            return share(0) if threads == 1 else list(pool.map(share, range(threads)))

        return Variant(f"copy, {width} B/element", threads, call, 2e-9 * half, "GB", repeats=repeats)

    def touch_new_memory() -> None:
        for size in (12, 4):  # du and dx of a backward
            np.empty(size * p.elements, np.uint8)[::4096] = 0

    rows = [variant(width, threads) for width in (20, 24, 40) for threads in sorted({1, p.threads})]
    return [*rows, Variant("page faults of 16 B/element", 1, touch_new_memory)]


def recurrences(p: Problem) -> list[Variant]:
    h, c_last, saved = p.recurrence(save=True)
    g = sru_rt.sru_backward(saved, p.dh)
    fault = p.fault(h=h, c_last=c_last, u=g.u, skip=g.x, bias=g.bias, v=g.v) or p.fault(h=p.recurrence()[0])
    rows = []
    for label, width, call in (
        ("recurrence, forward, out=", 20, p.recurrence),
        ("recurrence, forward, save=True, out=", 24, lambda: p.recurrence(save=True)),
        ("recurrence, backward", 40, lambda: sru_rt.sru_backward(saved, p.dh)),
    ):
        moved, copied = width * p.elements, f"copy, {width} B/element"
        outside = moved > max(caches().values(), default=32 << 20)
        for threads in sorted({1, p.threads}):
            target = (0.8 if threads == 1 else 0.7) if outside else None
            rows.append(Variant(label, threads, call, moved / 1e9, "GB", copied, "of", target, fault=fault))
    return rows


def layers(p: Problem) -> list[Variant]:
    """The matrix products, into arrays that exist already, and the layer."""
    d, n = p.shape[2], p.threads
    x, w, u = p.x.reshape(-1, d), p.weight.reshape(-1, d), p.u.reshape(-1, 3 * d)
    u_out, dx, dw = np.empty_like(u), np.empty_like(x), np.empty_like(w)

    def product() -> None:
        np.matmul(x, w.T, out=u_out)

    def products() -> None:
        product()
        np.matmul(u, w, out=dx)
        np.matmul(u.T, x, out=dw)

    h, c_last, g = p.layer_and_backward()
    fault = p.fault(h=h, c_last=c_last, x=g.x, weight=g.weight, bias=g.bias, v=g.v)
    fault = fault or p.fault(h=p.layer(out=p.out)[0])
    work = {"forward": 2e-9 * x.size * len(w), "forward + backward": 6e-9 * x.size * len(w)}

    def layer(which: str, suffix: str, call: Callable) -> Variant:
        target = TARGETS[f"layer, {which}"].get(p.shape)
        label, other = f"layer, {which}{suffix}", f"products, {which}"
        return Variant(label, n, call, work[which], "GF", other, "x", target, fault=fault)

    return [
        Variant("products, forward", n, product, work["forward"], "GF"),
        Variant("products, forward + backward", n, products, work["forward + backward"], "GF"),
        layer("forward", ", out=", lambda: p.layer(out=p.out)),
        layer("forward", "", p.layer),
        layer("forward + backward", "", p.layer_and_backward),
    ]


def peers(p: Problem) -> list[Variant]:
    rows = []
    for name in ("sru", "LSTM", "GRU"):
        calls: dict[str, Callable] = {"forward": int, "forward + backward": int}
        try:
            calls, fault = peer(p, name)
        except Exception as error:  # `sru` builds C++ code when it is imported, which can fail in many ways
            fault = f"not available: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        for which, call in calls.items():
            label, ours = f"{name}, {which}", f"layer, {which}"
            target = TARGETS.get(label, {}).get(p.shape)
            rows.append(Variant(label, p.threads, call, 0, "", ours, "x the time of", target, fault=fault))
    return rows


def peer(p: Problem, name: str) -> tuple[dict[str, Callable], str]:
    """What a peer's rows call, and what is wrong with its results."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(p.threads)
    d = p.shape[2]
    if name != "sru":  # another function: only its shape can be wrong
        calls = torch_calls(torch, getattr(torch.nn, name)(d, d), p)
        return calls, "" if calls["forward"]()[0].shape == p.x.shape else "no speed: another shape"
    cell = importlib.import_module("sru").SRUCell(d, d)
    columns = p.weight[0].transpose(2, 1, 0)  # its gates are innermost
    for parameter, array in zip(cell.parameters(), (columns, p.v, p.bias)):
        parameter.data = torch.from_numpy(np.ascontiguousarray(array)).view(parameter.shape)
    calls = torch_calls(torch, cell, p)
    h, c_last, dx = calls["forward + backward"]()
    dw, dv, db = (parameter.grad.numpy() for parameter in cell.parameters())
    dw, dv, db = dw.reshape(1, d, d, 3).transpose(0, 3, 2, 1), dv.reshape(1, 2, d), db.reshape(1, 2, d)
    fault = p.fault(h=h, c_last=c_last.detach()[None], x=dx, weight=dw, v=dv, bias=db)
    return calls, fault or p.fault(h=calls["forward"]()[0])


def torch_calls(torch: Any, module: Any, p: Problem) -> dict[str, Callable]:
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

    return {"forward": forward, "forward + backward": forward_and_backward}


def measure(variants: list[Variant], rounds: int, budget: float) -> dict[Variant, list[float]]:
    """Seconds of every call. Each round has one block of every variant, in random order, after a pause: one
    call that is not counted, then 1 to 20 within about 0.2 s. What takes over 1 s has its uncounted call in
    the first round only. No round starts once `budget` seconds have passed."""
    samples: dict[Variant, list[float]] = {v: [] for v in variants if not v.fault}
    start, rng = time.perf_counter(), np.random.default_rng(0)

    def seconds(v: Variant) -> float:
        before = time.perf_counter()
        v.call()
        return (time.perf_counter() - before) / v.repeats

    for _ in range(rounds):
        if time.perf_counter() - start > budget:
            break
        for i in rng.permutation(len(samples)):
            v, times = list(samples.items())[i]
            os.environ["SRU_RT_NUM_THREADS"] = str(v.threads)  # sru_rt reads it at every call
            time.sleep(PAUSE)
            first = times[-1] if times and times[-1] > 1 else seconds(v)
            times += [seconds(v) for _ in range(min(max(int(0.2 / first / v.repeats), 1), 20))]
    return samples


def results(p: Problem, rounds: int, budget: float) -> list[dict[str, Any]]:
    """One dictionary for each row of this shape."""
    variants = copies(p) + recurrences(p) + layers(p) + peers(p)
    samples = measure(variants, rounds, budget)
    best = {(v.label, v.threads): (float(np.median(times)), min(times)) for v, times in samples.items()}
    rows = []
    for v in variants:
        row: dict[str, Any] = {"shape": p.shape, "what": v.label, "threads": v.threads, "note": v.fault}
        rows.append(row)
        if v.fault:
            continue
        own, other = best[v.label, v.threads], best.get((v.against, v.threads))
        times = {"median_ms": own[0], "min_ms": own[1], "max_ms": max(samples[v])}
        row |= {name: round(1e3 * t, 4) for name, t in times.items()} | {"n": len(samples[v])}
        row |= {"rate": round(v.work / own[0], 2), "unit": v.unit + "/s"} if v.work else {}
        if other:
            values = [b / a if v.sense == "of" else a / b for a, b in zip(own, other)]
            row |= {"value": round(values[0], 3), "by_minima": round(values[1], 3)}
            row |= {"sense": v.sense, "against": v.against}
            if v.target:
                reached = values[0] <= v.target if v.sense == "x" else values[0] >= v.target
                row |= {"target": v.target, "reached": reached}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["(L, B, d) | what | threads | median ms | min - max | n | rate | compared | target"]
    lines.append(" | ".join(["---"] * 9))
    for row in rows:
        cells = ["{shape} | {what} | {threads}"]
        cells += ["{median_ms:.2f} | {min_ms:.2f} - {max_ms:.2f} | {n}" if "n" in row else "{note} | |"]
        cells += ["{rate:.1f} {unit}" if "unit" in row else ""]
        cells += ["{value:.2f} ({by_minima:.2f}) {sense} {against}" if "value" in row else ""]
        sign = "<=" if row.get("sense") == "x" else ">="
        verdict = {None: "", True: "reached", False: "MISSED"}[row.get("reached")]
        cells += [f"{sign} {{target}} {verdict}" if verdict else ""]
        lines.append(" | ".join(cells).format(**row))
    return "\n".join(f"| {line} |" for line in lines)


def caches() -> dict[str, int]:
    """Bytes of the caches that core 0 sees, by level and kind, where the system tells."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return found


def environment() -> dict[str, Any]:
    """Machine, versions, and the commit, which is known if sru_rt is imported from this checkout."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.partition("model name")[2].partition("\n")[0].strip(" :\t") or platform.machine()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = {"python": platform.python_version(), "blas": f"{blas.get('name')} {blas.get('version')}"}
    modules = [sys.modules[name] for name in ("sru_rt", "numpy", "torch", "sru") if name in sys.modules]
    versions |= {module.__name__: module.__version__ for module in modules}
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    ours = ROOT in Path(sru_rt.__file__).resolve().parents
    commit = ours and subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "caches": caches(), "system": platform.system()}
    return {"commit": commit or "unknown", "machine": machine, "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option, folder = parser.add_argument, ROOT / "benchmarks/results" if (ROOT / ".git").exists() else Path()
    option("--shapes", nargs="+", metavar="L,B,d", default=[",".join(map(str, s)) for s in SHAPES])
    option("--threads", type=int, default=2, help="of sru_rt, BLAS and torch; default: %(default)s")
    option("--rounds", type=int, default=7, help="blocks of each variant; default: %(default)s")
    option("--budget", type=float, default=300, help="seconds for one shape; default: %(default)s")
    option("--quick", action="store_true", help="one round of the first shape")
    option("--out", type=Path, default=folder / f"cpu-{datetime.date.today()}.json")
    args = parser.parse_args()
    threads = {name: str(args.threads) for name in THREAD_VARIABLES}
    if not threads.items() <= os.environ.items():  # BLAS has read them already: start again with them set
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")  # ninja, for `sru`
        return subprocess.call([sys.executable, *sys.argv], env=os.environ | threads | {"PATH": path})
    warnings.filterwarnings("ignore", module=r"sru\.")  # it has no CUDA, and does not like gradients on a CPU
    shapes, rounds = (args.shapes[:1], 1) if args.quick else (args.shapes, args.rounds)
    rows, load = [], os.getloadavg()
    for shape in shapes:
        rows += results(Problem(tuple(map(int, shape.split(","))), args.threads), rounds, args.budget)
        print(f"{shape} done", file=sys.stderr)
    report = {"date": str(datetime.date.today()), **environment(), "threads": args.threads}
    report |= {"load before and after": [load, os.getloadavg()], "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows), f"\nwritten: {args.out}")
    return int(any(row["note"].startswith("no speed") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
