"""Records what the GPU kernels take, in tests/gpu_budget.json, and makes the tables of docs/gpu_budget.md from it.

Run it after a change of a kernel, of the planner or of a step function, and look at what changed before you commit it:

    python tools/gpu_budget.py            # compiles, writes both files (a minute or two, no GPU needed)
    python tools/gpu_budget.py --tables   # writes the tables alone, from the record

It takes CuPy, and NVIDIA's wheels nvidia-cuda-nvrtc-cu12==12.9.* and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import nvrtc  # noqa: E402
from sru_rt import chunks, compile_gpu, plan  # noqa: E402
from sru_rt.cell import ADJOINT_OF_H, Cell, adjoint_of  # noqa: E402
from sru_rt.cells import named_cells  # noqa: E402
from sru_rt.dtypes import state_dtype  # noqa: E402
from sru_rt.graph import Node  # noqa: E402
from sru_rt.traffic import ITEMSIZE, reduced, replayed  # noqa: E402
from sru_rt.variant import Variant  # noqa: E402

RECORD = ROOT / "tests" / "gpu_budget.json"
PAGE = ROOT / "docs" / "gpu_budget.md"
RELEASE = 12  # of NVRTC, by which the record is made
ARCHS = tuple(plan.USUAL_MULTIPROCESSORS)

# (forward, every): the passes by what is kept for the backward: nothing, every state, one of 32.
PASSES = {
    "forward, nothing kept": (True, 0),
    "forward, all states kept": (True, 1),
    "forward, 1 of 32 kept": (True, 32),
    "backward, all states kept": (False, 1),
    "backward, 1 of 32 kept": (False, 32),
}
# The same of kernels that are parallel over time: what chunks are summarised by, and then swept by.
IN_CHUNKS = {
    "forward, summaries of chunks": (True, 1),
    "forward, chunk by chunk": (True, 1),
    "backward, summaries of chunks": (False, 1),
    "backward, chunk by chunk": (False, 1),
}
USUAL = (2048, 16, 1, 1024)  # L, B, D, d
FEW = (65536, 1, 1, 1024)


@dataclass(frozen=True)
class Entry:
    """One kernel of the record, for states in the dtype of the state."""

    cell: str
    dtype: str
    which: str  # of PASSES or IN_CHUNKS
    sizes: tuple[int, int, int, int] = USUAL
    arch: int = 90

    @property
    def key(self) -> str:
        L, B, D, d = self.sizes
        return f"{self.cell}, {self.dtype}, {self.which}, L={L} B={B} D={D} d={d}, sm_{self.arch}"

    @property
    def kept(self) -> tuple[bool, int]:
        return (PASSES | IN_CHUNKS)[self.which]

    @property
    def kernel(self) -> str:
        return "reduce" if "summaries" in self.which else "forward" if self.kept[0] else "backward"

    def planned(self) -> tuple[Variant, plan.Plan]:
        """What the library makes of it. The plan is that of an array whose batch size has its own kernel."""
        forward, every = self.kept
        variant = Variant(_cells()[self.cell], self.dtype, state_dtype(self.dtype))
        arguments = nvrtc.arguments(variant.cell, self.dtype, self.sizes, forward=forward, every=every)
        if self.which in IN_CHUNKS:
            arguments = arguments._replace(given=arguments.given._replace(chunk=512, carry=1 << 20))
        device = plan.Device(self.arch, plan.USUAL_MULTIPROCESSORS[self.arch])
        return variant, plan.plan(variant, arguments, device)

    def compile(self, major: int = RELEASE) -> tuple[bytes, str]:
        text = compile_gpu.unit(*self.planned())
        return nvrtc.release(major).compile(text, (f"-arch=sm_{self.arch}", *compile_gpu.FLAGS))


@cache
def _cells() -> dict[str, Cell]:
    return {cell.name: cell for cell in named_cells()}


def entries() -> list[Entry]:
    """Every cell at the usual size; the first one also in all dtypes, at other sizes and for other architectures."""
    usual = [which for which in PASSES if which != "forward, 1 of 32 kept"]
    first = "sru"
    both = ("float32", "bfloat16")
    found = [Entry(*names) for names in itertools.product(_cells(), both, usual)]
    found += [Entry(first, dtype, "forward, 1 of 32 kept") for dtype in both]
    found += [Entry(first, *names) for names in itertools.product(("float16", "float64"), usual)]
    for dtype, B in itertools.product(both, (8, 32, 64, 128)):
        found += [Entry(first, dtype, which, (2048, B, 1, 1024)) for which in usual if B == 128 or "1 of" not in which]
    found += [Entry(first, "bfloat16", which, (2048, 16, 2, 1024)) for which in usual[1:3]]
    for arch, dtype, which in itertools.product(ARCHS, both, usual[1:]):
        if arch != 90:
            found.append(Entry(first, dtype, which, arch=arch))
    for cell, dtype, which in itertools.product((first, "sru_no_v"), both, IN_CHUNKS):
        if chunks.possible(_cells()[cell], IN_CHUNKS[which][0]):
            found.append(Entry(cell, dtype, which, FEW))
    return found


def measure(entry: Entry) -> dict[str, Any]:
    """What one kernel takes; counts of instructions for sm_90 alone."""
    variant, made = entry.planned()
    code, log = entry.compile()
    used = nvrtc.resources(log)[entry.kernel]
    result: dict[str, Any] = {name: getattr(made, name) for name in ("width", "depth", "replay_depth", "threads")}
    result |= {"registers": used.registers, "spills": used.spill_stores + used.spill_loads}
    if entry.kernel == "reduce":
        result["depth"] = made.reduce_depth
    result["shared"] = used.shared + plan.shared_bytes(variant, made, entry.kept[1])
    if entry.arch == 90:
        text = nvrtc.disassemble(code)
        loops = sweeps(variant, made)
        if entry.kernel == "reduce":
            loops = [(made.reduce_depth, len(reduced(variant, made.forward, made.keep)))]
        counted = nvrtc.steady(text, entry.kernel, loops, made.width * made.D)
        result |= asdict(counted)
    return result


def sweeps(variant: Variant, made: plan.Plan) -> list[tuple[int, int]]:
    """Of each loop over time, the steps of a lap and the loads from global memory of a step."""
    states = len(variant.cell.state) if made.keep == 1 else 0
    inputs = len(variant.cell.gates) + len(variant.cell.inputs)
    found = [(made.depth, inputs + (0 if made.forward else 1 + states))]
    if made.keep > 1 and not made.forward:
        found.append((made.replay_depth, len(replayed(variant))))
    return found


def measured(wanted: list[Entry]) -> dict[str, dict[str, Any]]:
    """By keys. NVRTC and the disassembler leave Python's lock, so that two threads are twice as fast."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((entry.key for entry in wanted), pool.map(measure, wanted)))


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text())["kernels"]  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------------------
# What it means: a prediction for one H200, from nothing but the record and these constants

BANDWIDTH = 4.3e12  # bytes a second: what a copy reaches
MULTIPROCESSORS, SCHEDULERS = 132, 4
CLOCK = 1.75e9
MUFU_PER_CLOCK, _REGISTERS = 16, 1 << 16  # of a multiprocessor
LATENCY = 0.8e-6  # from a load to its value, with the memory busy
# Clocks from an operand to the result.
OPERATION, SPECIAL_OPERATION = 4, 20


def traffic(cell: Cell, dtype: str, forward: bool, every: int) -> tuple[float, float]:
    """Bytes that are read and written for one channel and step, each array once."""
    item, state = ITEMSIZE[dtype], ITEMSIZE[state_dtype(dtype)]
    steps = len(cell.gates) + len(cell.inputs)
    kept = len(cell.state) * state / every if every else 0
    if forward:
        return item * steps, item + kept
    return item * (steps + 1) + kept, item * steps


def chain(cell: Cell, forward: bool, every: int) -> int:
    """Clocks from the state before a step to that after it; backwards of their adjoints, and of recomputed states."""
    formula = cell.formula
    forwards = _longest({formula.leaves[name] for name in cell.state}, formula.new_state)
    if forward:
        return forwards
    adjoints = {adjoint_of(name) for name in cell.state}
    results = [formula.gradient[name] for name in cell.state]
    seeds = {n for n in nodes(results) if n.op == "input" and n.args[0] in adjoints and n.args[0] != ADJOINT_OF_H}
    return _longest(seeds, results) + (forwards if every > 1 else 0)


def nodes(results: list[Node]) -> Iterator[Node]:
    todo, seen = list(results), set()
    while todo:
        node = todo.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            yield node
            todo += node.args


def _longest(first: set[Node], results: Any) -> int:
    cost = {"sigmoid": 2 * OPERATION + 2 * SPECIAL_OPERATION, "tanh": 4 * OPERATION + 2 * SPECIAL_OPERATION}

    @cache
    def length(node: Any) -> float:
        if node in first:
            return 0
        if not isinstance(node, Node) or not node.args:
            return -math.inf
        return max(length(a) for a in node.args) + cost.get(node.op, OPERATION)

    return int(max(0, *(length(result) for result in results)))


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step of all channels, if nothing but one thing took time."""

    memory: float
    in_flight: float  # loads that are too few to hide their latency
    issue: float
    special: float
    chain: float
    refill: float  # adds to the others

    @property
    def best(self) -> float:
        """If a warp does all its other work while it waits for the chain."""
        return max(self.memory, max(self.in_flight, self.issue, self.special, self.chain) + self.refill)

    @property
    def worst(self) -> float:
        """If it does none of it then."""
        return max(self.memory, max(self.in_flight, self.issue + self.chain, self.special) + self.refill)

    @property
    def bound(self) -> str:
        """What takes the time at best."""
        others = {"loads in flight": self.in_flight, "instructions": self.issue, "special functions": self.special}
        others["chain"] = self.chain
        name = max(others, key=lambda key: others[key])
        if self.best == self.memory:
            return "memory"
        return f"{name} and refills" if self.refill else name


def predict(entry: Entry, kernel: dict[str, Any]) -> Prediction:
    """For an H200. `kernel` is the entry's record."""
    forward, every = entry.kept
    _, B, D, d = entry.sizes
    cell = _cells()[entry.cell]
    channels, width, threads = B * D * d, kernel["width"], kernel["threads"]
    blocks = math.ceil(math.ceil(channels / width / threads) / MULTIPROCESSORS)  # of the fullest multiprocessor
    warps = math.ceil(blocks * threads / 32 / SCHEDULERS)
    # Those that registers leave no room for come after the others.
    resident = min(16, _REGISTERS // (SCHEDULERS * 32 * -(-kernel["registers"] // 8) * 8))
    waves = math.ceil(warps / resident)
    two_sweeps = every > 1 and not forward
    laps = 1 / kernel["depth"] + (1 / kernel["replay_depth"] if two_sweeps else 0)
    return Prediction(
        memory=channels * sum(traffic(cell, entry.dtype, forward, every)) / BANDWIDTH,
        in_flight=waves * laps * LATENCY,
        issue=warps * width * kernel["instructions"] / CLOCK,
        special=warps * SCHEDULERS * 32 * width * kernel["mufu"] / MUFU_PER_CLOCK / CLOCK,
        chain=waves * chain(cell, forward, every) / CLOCK,
        # The ring is empty at the start of each of the two sweeps over a piece; other warps of a scheduler fill in.
        refill=2 * LATENCY / every / min(warps, resident) if two_sweeps else 0,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Tables

_BEGIN, _END = "<!-- {} -->\n", "<!-- end -->"


def tables(kernels: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of the page, by name."""
    known = [(entry, kernels[entry.key]) for entry in entries()]
    usual = [(e, k) for e, k in known if e.sizes == USUAL and e.arch == 90 and e.cell in _cells()]
    other = [(e, k) for e, k in known if e.arch == 90 and e.sizes[1:3] != USUAL[1:3] and e.which in PASSES]
    in_chunks = [(e, k) for e, k in known if e.which in IN_CHUNKS]
    archs = [(e, k) for e, k in known if e.arch != 90]
    return {
        "usual size": _budget_table(usual),
        "other sizes": _budget_table(other, sized=True),
        "in chunks": _chunks_table(in_chunks),
        "other architectures": _arch_table(archs),
    }


def _budget_table(rows: list[tuple[Entry, dict[str, Any]]], sized: bool = False) -> str:
    heads = ["cell", "dtype", "pass", "bytes read + written", "width, depth, threads", "registers", "instructions"]
    heads += ["special", "chain", "ns a step", "bound by, at best", "of a copy"]
    lines = []
    for entry, k in rows:
        forward, every = entry.kept
        cell, expected = _cells()[entry.cell], predict(entry, k)
        reads, writes = traffic(cell, entry.dtype, forward, every)
        _, B, D, _ = entry.sizes
        where = f"`{entry.cell}`" if not sized else f"`{entry.cell}`, B {B}, D {D}"
        single = entry.dtype != "float64"
        lines.append(
            [
                where,
                entry.dtype,
                entry.which,
                f"{reads:.4g} + {writes:.4g}",
                f"{k['width']}, {k['depth']}, {k['threads']}",
                str(k["registers"]),
                f"{k['instructions']:.1f}",
                f"{k['mufu']:.1f}",
                f"{chain(cell, forward, every)}" if single else "",
                f"{expected.best * 1e9:.0f} to {expected.worst * 1e9:.0f}" if single else "",
                expected.bound if single else "",
                f"{expected.memory / expected.worst:.0%} to {expected.memory / expected.best:.0%}" if single else "",
            ]
        )
    return _markdown(heads, lines)


def _chunks_table(rows: list[tuple[Entry, dict[str, Any]]]) -> str:
    heads = ["cell", "dtype", "kernel", "loads", "width, depth, threads", "registers", "instructions", "special"]
    lines = [
        [
            f"`{entry.cell}`",
            entry.dtype,
            entry.which,
            f"{k['loads'] * k['width']:.0f}",
            f"{k['width']}, {k['depth']}, {k['threads']}",
            str(k["registers"]),
            f"{k['instructions']:.1f}",
            f"{k['mufu']:.1f}",
        ]
        for entry, k in rows
    ]
    return _markdown(heads, lines)


def _arch_table(rows: list[tuple[Entry, dict[str, Any]]]) -> str:
    names = sorted({(e.dtype, e.which) for e, _ in rows}, key=lambda n: [*n[::-1]])
    found = {(e.dtype, e.which, e.arch): k["registers"] for e, k in rows}
    archs = sorted({e.arch for e, _ in rows})
    lines = [[f"{dtype}, {which}", *(str(found[dtype, which, a]) for a in archs)] for dtype, which in names]
    return _markdown(["registers", *(f"sm_{a}" for a in archs)], lines)


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str, made: dict[str, str]) -> str:
    """The page with new tables. Raises ValueError if it has no place for one."""
    for name, table in made.items():
        begin = _BEGIN.format(name)
        head, found, rest = text.partition(begin)
        _, end, tail = rest.partition(_END)
        if not found or not end:
            raise ValueError(f"{PAGE.name} needs the lines {begin.strip()} and {_END}")
        text = f"{head}{begin}{table}{end}{tail}"
    return text


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--tables"]):
        sys.exit(__doc__)
    if not arguments:
        version = ".".join(map(str, nvrtc.release(RELEASE).version))
        kernels = measured(entries())
        RECORD.write_text(json.dumps({"nvrtc": version, "kernels": kernels}, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), tables(recorded())))


if __name__ == "__main__":
    main(sys.argv[1:])
