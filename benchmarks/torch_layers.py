"""Speed of the PyTorch module of SRU on the CPU beside its matrix products, PyPI's `sru`, torch's LSTM and GRU.

One run, one table, as `cpu.py` measures and prints; float32, d_in = d, one layer, one direction. Results are compared
with float64 first. Then what the operator alone costs where there is next to nothing to compute.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from typing import Any

import cpu
import torch
from cpu import ALPHA, PASSES, ROWS, TARGETS, Layer, Row, Shape, torch_calls
from sru_rt.bindings.torch import MinGRU, SRUCell
from sru_rt.bindings.torch.autograd import recurrence

from sru_rt import spec
from sru_rt.cells.sru import Options, sru_cell

PEERS = ("sru", "LSTM", "GRU")


def modules(p: Layer) -> list[Row]:
    """The products, into memory that exists already, and our modules."""
    torch.set_num_threads(p.threads)
    L, B, d = p.shape
    x, w = torch.from_numpy(p.x).view(-1, d), torch.from_numpy(p.weight).view(-1, d).t().contiguous()
    u, dx, dw = x @ w, torch.empty_like(x), torch.empty_like(w)

    def products() -> None:
        torch.mm(x, w, out=u)
        torch.mm(u, w.t(), out=dx)
        torch.mm(x.t(), u, out=dw)

    cell = SRUCell(d, d)
    cpu.give(cell, p)
    calls = {"SRUCell": torch_calls(torch, cell, p), "MinGRU": torch_calls(torch, MinGRU(d, d), p)}
    fault = cpu.fault_of(p, cell, calls["SRUCell"])
    rows = []
    for which, alone, times in zip(PASSES, (functools.partial(torch.mm, x, w, out=u), products), (1, 3)):
        work, label = 2e-9 * times * L * B * d * 3 * d, f"products, {which}"
        rows.append(Row(label, p.threads, alone, work, "GF"))
        target = TARGETS[f"layer, {which}"].get(p.shape)
        rows.append(
            Row(f"SRUCell, {which}", p.threads, calls["SRUCell"][which], work, "GF", label, "x", target, fault=fault)
        )
        call, against = calls["MinGRU"][which], f"SRUCell, {which}"
        rows.append(Row(f"MinGRU, {which}", p.threads, call, work * 2 / 3, "GF", against, "x"))
    return rows


def prepare(shape: Shape, threads: int, group: str) -> list[Row]:
    """In a measuring process: sets ROWS, and returns them without their calls."""
    warnings.filterwarnings("ignore", module=r"sru\.")
    p = Layer(shape, threads)
    ROWS.extend(cpu.peers(p, against="SRUCell") if group == "peers" else modules(p))
    return [row._replace(call=None) for row in ROWS]


def overhead(rounds: int = 20, calls: int = 2000) -> dict[str, float]:
    """Microseconds of the operator of SRU where there is next to nothing to compute: (L, B, d) = (2, 1, 4)."""
    torch.set_num_threads(1)
    cell = spec.text_of(sru_cell(Options()))
    shapes = ((2, 1, 1, 3, 4), (2, 1, 1, 4), (1, 2, 4), (1, 2, 4), (1, 1, 4))
    u, x, bias, v, c0 = (torch.randn(shape) for shape in shapes)
    leaves = [t.clone().requires_grad_() for t in (u, x, bias, v, c0)]
    seed = torch.ones(2, 1, 4)

    def forward(u: Any, x: Any, bias: Any, v: Any, c0: Any) -> Any:
        return recurrence(cell, u, (x, bias, v), c0, constants=(ALPHA,))[0]

    timed = {
        "forward, no gradient": lambda: forward(u, x, bias, v, c0),
        "forward, recorded": lambda: forward(*leaves),
        "forward + backward": lambda: forward(*leaves).backward(seed),
        "clone() of a tensor, for comparison": lambda: x.clone(),
    }
    found = {}
    for name, call in timed.items():
        times = []
        for _ in range(rounds):
            before = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - before) / calls * 1e6)
        found[name] = {"median_us": round(statistics.median(times), 2), "min_us": round(min(times), 2)}
    return found


def main() -> int:
    args = cpu.options(__doc__, "torch-cpu").parse_args()
    report = cpu.run(args, prepare, SRU_RT_NUM_THREADS="")
    report["operator"] = overhead(*((2, 200) if args.quick else ()))
    status = cpu.finish(args, report)
    print("\n| the operator at (2, 1, 4) | median us | min us |\n| --- | --- | --- |")
    for name, found in report["operator"].items():
        print(f"| {name} | {found['median_us']} | {found['min_us']} |")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
