"""Records what the GPU kernels take, in tests/gpu_budget.json, and makes the tables of docs/gpu_budget.md from it.

Run it after a change of a kernel, of the planner or of a step function, and look at what changed before you commit it:

    python tools/gpu_budget.py            # compiles, writes both files (a minute or two, no GPU needed)
    python tools/gpu_budget.py --tables   # writes the tables alone, from the record

It takes CuPy, and NVIDIA's wheels nvidia-cuda-nvrtc-cu12==12.9.* and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import nvrtc
from sru_rt import choose, compile_gpu, costs, machine, plan, predict
from sru_rt.cell import Cell
from sru_rt.cells import named_cells
from sru_rt.dtypes import state_dtype
from sru_rt.emit import activations
from sru_rt.graph import topological
from sru_rt.shared_memory import at_once, chunk_of_tile
from sru_rt.traffic import moved, reduced, replayed
from sru_rt.variant import Variant

RECORD = ROOT / "tests" / "gpu_budget.json"
PAGE = ROOT / "docs" / "gpu_budget.md"
RELEASE = 12  # of NVRTC, by which the record is made
ARCHS = tuple(machine.USUAL_MULTIPROCESSORS)

# (forward, every): the passes by what is kept for the backward: nothing, every state, one of 32.
PASSES = {
    "forward, nothing kept": (True, 0),
    "forward, all states kept": (True, 1),
    "forward, 1 of 32 kept": (True, 32),
    "backward, all states kept": (False, 1),
    "backward, 1 of 32 kept": (False, 32),
}
# The same of kernels that are parallel over time: what goes over each chunk twice; and in GUESSED, of forwards that do
# not compose, what guesses and sweeps, and what does so once more.
IN_CHUNKS = {
    "forward, in chunks": (True, 1),
    "backward, in chunks": (False, 1),
    "forward, guesses and chunks": (True, 1),
    "forward, mended chunks": (True, 1),
    "forward, settled chunks": (True, 1),
}
GUESSED = {
    "forward, guesses and chunks": "forward",
    "forward, mended chunks": "mend",
    "forward, settled chunks": "settle",
}
# The small kernels before and behind these, and a forward of one step: as a whole, as no loop makes their time.
SMALL = {
    "forward, one step": (True, 0, "forward"),
    "forward, product and step of a token": (True, 0, "forward"),
    "forward, product and step of 8 tokens": (True, 0, "forward"),
    "backward, sums over sequences": (False, 1, "sum_partials"),
    "forward, words of chunks": (True, 1, "clear"),
    "backward, sums over chunks": (False, 1, "sum_chunks"),
    "forward, product and steps of a layer": (True, 0, "forward"),
}
USUAL = (2048, 16, 1, 1024)  # L, B, D, d
FEW = (65536, 1, 1, 1024)
ONE = (1, 16, 1, 1024)
TOKENS = {"of a token": (1, 1, 1, 1024), "of 8 tokens": (1, 8, 1, 1024)}  # by the ends of names
LAYER = (32, 32, 1, 128)  # with d_in = 128
_COMPILE_SECONDS = 0.3  # that a kernel may take; printed alone, as machines differ


@dataclass(frozen=True)
class Entry:
    """One kernel of the record, for states in the dtype of the state."""

    cell: str
    dtype: str
    which: str  # of PASSES, IN_CHUNKS or SMALL
    sizes: tuple[int, int, int, int] = USUAL
    arch: int = 90

    @property
    def key(self) -> str:
        L, B, D, d = self.sizes
        return f"{self.cell}, {self.dtype}, {self.which}, L={L} B={B} D={D} d={d}, sm_{self.arch}"

    @property
    def kept(self) -> tuple[bool, int]:
        return (PASSES | IN_CHUNKS | {name: found[:2] for name, found in SMALL.items()})[self.which]

    @property
    def kernel(self) -> str:
        if self.which in GUESSED:
            return GUESSED[self.which]
        if self.which in SMALL:
            return SMALL[self.which][2]
        return "forward" if self.kept[0] else "backward"

    @property
    def chunk(self) -> int:
        """Steps of a chunk, 0 if time is not cut."""
        variant = Variant(_cells()[self.cell], self.dtype, state_dtype(self.dtype))
        return chunk_of_tile(variant, self.kept[0]) if "chunk" in self.which else 0

    def planned(self) -> tuple[Variant, plan.Plan]:
        """What the library makes of it. The plan is that of an array whose batch size has its own kernel."""
        forward, every = self.kept
        variant = Variant(_cells()[self.cell], self.dtype, state_dtype(self.dtype))
        d_in = self.sizes[3] if "product" in self.which else 0
        arguments = nvrtc.arguments(variant.cell, self.dtype, self.sizes, forward=forward, every=every, d_in=d_in)
        if self.chunk:
            arguments = arguments._replace(given=arguments.given._replace(chunk=self.chunk, carry=1 << 20))
        device = machine.Device(self.arch, machine.USUAL_MULTIPROCESSORS[self.arch])
        return variant, plan.plan(variant, arguments, device)

    def compile(self, major: int = RELEASE) -> tuple[bytes, str]:
        """Machine code and log, in which a thread that asks for the same again need not wait."""
        return compiled(major, compile_gpu.unit(*self.planned()), self.arch)[:2]


@cache
def compiled(major: int, text: str, arch: int) -> tuple[bytes, str, float]:
    """Machine code, log, and seconds of processor time."""
    began = time.thread_time()
    code, log = nvrtc.release(major).compile(text, (f"-arch=sm_{arch}", *compile_gpu.FLAGS))
    return code, log, time.thread_time() - began


@cache
def _disassembled(code: bytes) -> str:
    return nvrtc.disassemble(code)


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
        if choose.shoots(_cells()[cell], IN_CHUNKS[which][0]) == (which in GUESSED):
            found.append(Entry(cell, dtype, which, FEW))
    for dtype, which in itertools.product(both, SMALL):
        if which.endswith("of a layer"):
            continue
        sizes = FEW if "chunk" in which else ONE if "step" in which else USUAL
        sizes = next((found for end, found in TOKENS.items() if which.endswith(end)), sizes)
        found.append(Entry("sru_no_v" if "chunk" in which else first, dtype, which, sizes))
    found += [
        Entry(cell, "bfloat16", "forward, product and steps of a layer", LAYER) for cell in (first, "qrnn", "mingru")
    ]
    return found


def measure(entry: Entry) -> dict[str, Any]:
    """What one kernel takes; counts of instructions for sm_90 alone."""
    variant, made = entry.planned()
    code, log = entry.compile()
    used = nvrtc.resources(log)[entry.kernel]
    result: dict[str, Any] = {name: getattr(made, name) for name in ("width", "depth", "replay_depth", "threads")}
    result |= {name: getattr(made, name) for name in ("staged", "known", "laps") if getattr(made, name)}
    result |= {"registers": used.registers, "spills": used.spill_stores + used.spill_loads}
    if entry.kernel.startswith("sum_") or entry.kernel == "clear":
        result |= {"width": 1, "depth": 1, "replay_depth": 1, "threads": 256}
    has_states = entry.kernel in ("forward", "backward")
    dynamic = plan.shared_bytes(variant, made, entry.kept[1], entry.chunk) if has_states else 0
    result["shared"] = used.shared + dynamic
    result["warps"] = warps(entry.arch, result)
    if entry.arch == 90 and entry.which in SMALL:
        result["instructions"] = nvrtc.instructions(_disassembled(code), entry.kernel)
    elif entry.arch == 90:
        result |= asdict(steady(_disassembled(code), variant, made, entry.kernel))
    return result


def warps(arch: int, kernel: dict[str, Any]) -> int:
    """Warps that a multiprocessor has room for."""
    sizes = {name: kernel[name] for name in ("threads", "registers", "shared")}
    of_channels = 2 if kernel.get("staged", 0) > 1 else 1
    usual = machine.usual(arch, machine.USUAL_MULTIPROCESSORS[arch])
    blocks = predict.occupancy(usual, predict.Kernel(0, 0, warps=of_channels, **sizes))
    return blocks * of_channels * kernel["threads"] // 32


def steady(text: str, variant: Variant, made: plan.Plan, kernel: str) -> nvrtc.Steady:
    """What the loops over time take of a channel and step."""
    return nvrtc.steady(text, kernel, sweeps(variant, made, kernel), made.width * made.D)


def sweeps(variant: Variant, made: plan.Plan, kernel: str) -> list[tuple[int, float, str]]:
    """Of each loop over time, or over chunks, the steps of a lap, and the loads of a step with their instruction.

    They are those from global memory, or from shared memory where rows come through it.
    """
    states = len(variant.cell.state) if made.keep == 1 else 0
    inputs = len(variant.cell.gates) + len(variant.cell.inputs)
    of_replay = len(replayed(variant))
    if made.staged:
        of_row = _gone_back(variant.cell, made.known) + 1 + len(variant.cell.state) + made.known
        found = [(made.depth, of_row, "LDS"), (made.replay_depth, of_replay, "LDS")]
        copies = made.in_tile.bit_count() * made.width / made.copied
        return [*found, (made.depth, copies, "LDGSTS")] if made.paired else found
    if made.laps:
        return [(at_once(made.forward), made.in_tile.bit_count(), "LDS")]
    of_row = inputs + (0 if made.forward else 1 + states) - made.in_tile.bit_count()
    found = [(made.depth, of_row, "LDG")]
    if made.lookahead:
        found.append((made.reduce_depth, len(reduced(variant, made.forward, made.keep)), "LDG"))
    if made.keep > 1 and not made.forward:
        found.append((made.replay_depth, of_replay, "LDG"))
    if made.shoots and kernel == "forward":
        found.append((made.reduce_depth, of_replay, "LDG"))
    if kernel == "settle":  # the latter as follow_depth of cuda/gpu_shoot.h has it
        found = [(made.replay_depth, inputs, "LDG"), (16, 2, "LDG")]
    return found


def _gone_back(cell: Cell, known: int) -> int:
    """Gates and inputs that a gradient needs, if so many activations are known."""
    nodes = topological(cell.formula.gradient.values(), {*activations(cell)[:known]})
    used = {node.args[0] for node in nodes if node.op == "input"}
    return sum(name in used for name in (*cell.gates, *cell.inputs))


def measured(wanted: list[Entry]) -> dict[str, dict[str, Any]]:
    """By keys. NVRTC and the disassembler leave Python's lock, so that two threads are twice as fast."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((entry.key for entry in wanted), pool.map(measure, wanted)))


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text())["kernels"]  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------------------
# What it means: see sru_rt/predict.py


def taken(entry: Entry, kernel: dict[str, Any]) -> predict.Kernel:
    """What a kernel of the record takes."""
    variant = entry.planned()[0]
    forward, every = entry.kept
    names = ("width", "depth", "replay_depth", "threads", "shared")
    shared = {name: kernel.get(name, 0) for name in ("staged", "laps")}
    found = costs.sweep(variant, forward, every, **{name: kernel[name] for name in names}, **shared)
    counted = {"registers": kernel["registers"], "instructions": kernel["instructions"], "special": kernel["mufu"]}
    return found._replace(pace=found.pace * kernel["instructions"] / found.instructions, **counted)


def predicted(entry: Entry, kernel: dict[str, Any]) -> predict.Time:
    """The time of a kernel of the record on the usual card of its architecture."""
    L, B, D, d = entry.sizes
    usual = machine.usual(entry.arch, machine.USUAL_MULTIPROCESSORS[entry.arch])
    return predict.sweep(usual, taken(entry, kernel), B * D * d, L)


# ----------------------------------------------------------------------------------------------------------------------
# Tables

_BEGIN, _END = "<!-- {} -->\n", "<!-- end -->"


def tables(kernels: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The tables of the page, by name."""
    known = [(entry, kernels[entry.key]) for entry in entries()]
    usual = [(e, k) for e, k in known if e.sizes == USUAL and e.arch == 90 and e.which in PASSES]
    other = [(e, k) for e, k in known if e.arch == 90 and e.sizes[1:3] != USUAL[1:3] and e.which in PASSES]
    in_chunks = [(e, k) for e, k in known if e.which in IN_CHUNKS]
    archs = [(e, k) for e, k in known if e.arch != 90]
    return {
        "usual size": _budget_table(usual),
        "other sizes": _budget_table(other, sized=True),
        "in chunks": _chunks_table(in_chunks),
        "small kernels": _small_table([(e, k) for e, k in known if e.which in SMALL]),
        "other architectures": _arch_table(archs),
    }


def _budget_table(rows: list[tuple[Entry, dict[str, Any]]], sized: bool = False) -> str:
    heads = ["cell", "dtype", "pass", "bytes read + written", "width, depth, threads", "registers", "warps"]
    heads += ["loads", "instructions", "special", "chain", "us", "bound by, at best", "of a copy"]
    lines = []
    for entry, k in rows:
        forward, every = entry.kept
        chain, expected = taken(entry, k).chain, predicted(entry, k)
        reads, writes = moved(entry.planned()[0], forward, every)
        _, B, D, _ = entry.sizes
        where = f"`{entry.cell}`" if not sized else f"`{entry.cell}`, B {B}, D {D}"
        single = entry.dtype != "float64"
        lines.append(
            [
                where,
                entry.dtype,
                entry.which,
                f"{reads:.4g} + {writes:.4g}",
                _plan(k),
                str(k["registers"]),
                str(k["warps"]),
                _loads(k),
                f"{k['instructions']:.1f}",
                f"{k['mufu']:.1f}",
                f"{chain}" if single else "",
                f"{expected.best * 1e6:.0f} to {expected.worst * 1e6:.0f}" if single else "",
                expected.bound if single else "",
                f"{expected.memory / expected.worst:.0%} to {expected.memory / expected.best:.0%}" if single else "",
            ]
        )
    return _markdown(heads, lines)


def _plan(kernel: dict[str, Any]) -> str:
    """Width, depth, threads, and of how many pieces rows are staged, with what else, or the laps of a ring there."""
    numbers = ", ".join(str(kernel[name]) for name in ("width", "depth", "threads"))
    return ", ".join([numbers, *(f"{name} {kernel[name]}" for name in ("staged", "known", "laps") if name in kernel)])


def _loads(kernel: dict[str, Any]) -> str:
    """Loads of a thread and step: how many, of how many bits."""
    return ", ".join(f"{n * kernel['width']:.3g} x {bits}" for bits, n in kernel["load_bits"].items())


def _chunks_table(rows: list[tuple[Entry, dict[str, Any]]]) -> str:
    heads = [
        "cell",
        "dtype",
        "kernel",
        "loads",
        "width, depth, threads",
        "registers",
        "warps",
        "instructions",
        "special",
    ]
    lines = [
        [
            f"`{entry.cell}`",
            entry.dtype,
            entry.which,
            _loads(k),
            _plan(k),
            str(k["registers"]),
            str(k["warps"]),
            f"{k['instructions']:.1f}",
            f"{k['mufu']:.1f}",
        ]
        for entry, k in rows
    ]
    return _markdown(heads, lines)


def _small_table(rows: list[tuple[Entry, dict[str, Any]]]) -> str:
    heads = ["cell", "dtype", "kernel", "threads", "registers", "warps", "shared memory", "all instructions"]
    lines = [
        [
            f"`{e.cell}`",
            e.dtype,
            e.which,
            *(str(k[n]) for n in ("threads", "registers", "warps", "shared", "instructions")),
        ]
        for e, k in rows
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


def seconds_of_compiling(wanted: list[Entry]) -> str:
    """A table of what took longest, and of all."""
    took = {e.key: compiled(RELEASE, compile_gpu.unit(*e.planned()), e.arch)[2] for e in wanted}
    ordered = sorted(took, key=lambda key: -took[key])
    slow = sum(seconds > _COMPILE_SECONDS for seconds in took.values())
    lines = [f"{took[key]:6.2f} s  {key}" for key in ordered[:20]]
    median = took[ordered[len(ordered) // 2]]
    lines.append(
        f"{slow} of {len(took)} take more than {_COMPILE_SECONDS} s of processor time; half of all {median:.2f} s"
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--tables"]):
        sys.exit(__doc__)
    if not arguments:
        version = ".".join(map(str, nvrtc.release(RELEASE).version))
        kernels = measured(entries())
        RECORD.write_text(json.dumps({"nvrtc": version, "kernels": kernels}, indent=1) + "\n")
        sys.stdout.write(seconds_of_compiling(entries()))
    PAGE.write_text(page(PAGE.read_text(), tables(recorded())))


if __name__ == "__main__":
    main(sys.argv[1:])
