"""Records what derived and hand-written gradients take on a GPU, in tests/derived_gradients.json, with their table.

Run it after a change of a step function, of the derivation or of a gradient in tests/hand_written/:

    python tools/derived_gradients.py           # compiles, writes the record and the table of docs/gpu_budget.md
    python tools/derived_gradients.py --table   # writes the table alone, from the record

It takes what gpu_budget.py takes.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tools")]

import gpu_budget

import nvrtc
from sru_rt import compile_gpu
from sru_rt.bench.problem import setting
from sru_rt.emit import emit

HAND_WRITTEN = ROOT / "tests" / "hand_written"
RECORD = ROOT / "tests" / "derived_gradients.json"
TABLE = "derived gradients"
DTYPES = ("float32", "bfloat16")
PASS = "backward, all states kept"
PLAN = "laps=0"  # where eight steps follow each other without a branch, the order in which they are put blurs counts
_planning = threading.Lock()  # as it is the environment that says so


@dataclass(frozen=True)
class Count:
    """Of a backward kernel: instructions of its steady loop for one channel and step but moves, and registers."""

    instructions: float
    registers: int


def hand_written() -> dict[str, str]:
    """The texts of cells, by their names."""
    return {path.stem: path.read_text() for path in sorted(HAND_WRITTEN.glob("*.cuh"))}


def count(cell: str, dtype: str, text: str | None = None) -> Count:
    """What the backward takes at the usual size, with `text` for the cell in place of the emitted one."""
    entry = gpu_budget.Entry(cell, dtype, PASS)
    with _planning, setting("SRU_RT_PLAN", PLAN):
        variant, made = entry.planned()
    unit, emitted = compile_gpu.unit(variant, made), emit(variant.cell)
    if emitted not in unit:
        raise RuntimeError(f"the compile unit of {cell} does not hold the emitted text")
    unit = unit.replace(emitted, text or emitted)
    code, log = nvrtc.release(gpu_budget.RELEASE).compile(unit, (f"-arch=sm_{entry.arch}", *compile_gpu.FLAGS))
    steady = gpu_budget.steady(nvrtc.disassemble(code), variant, made, entry.kernel)
    return Count(round(steady.instructions - steady.moves, 3), nvrtc.resources(log)[entry.kernel].registers)


def measured() -> dict[str, tuple[Count, Count]]:
    """Derived and hand-written, by cell and dtype."""
    texts = hand_written()
    keys = list(itertools.product(texts, DTYPES))
    with ThreadPoolExecutor(2) as pool:
        derived = pool.map(lambda key: count(*key), keys)
        by_hand = pool.map(lambda key: count(*key, texts[key[0]]), keys)
        return {", ".join(key): pair for key, *pair in zip(keys, derived, by_hand)}


def recorded() -> dict[str, tuple[Count, Count]]:
    record = json.loads(RECORD.read_text())
    return {key: tuple(Count(*numbers) for numbers in pair) for key, pair in record.items()}


def table(counts: dict[str, tuple[Count, Count]]) -> str:
    heads = ["cell", "dtype", "instructions, derived", "by hand", "registers, derived", "by hand"]
    lines = []
    for key, (derived, by_hand) in counts.items():
        cell, dtype = key.split(", ")
        numbers = (f"{derived.instructions:.1f}", f"{by_hand.instructions:.1f}", derived.registers, by_hand.registers)
        lines.append([f"`{cell}`", dtype, *map(str, numbers)])
    return gpu_budget._markdown(heads, lines)


def page(text: str, counts: dict[str, tuple[Count, Count]]) -> str:
    return gpu_budget.page(text, {TABLE: table(counts)})


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(__doc__)
    if not arguments:
        counts = {key: [[c.instructions, c.registers] for c in pair] for key, pair in measured().items()}
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(pair)}" for key, pair in counts.items())
        RECORD.write_text(f"{{\n{lines}\n}}\n")
    gpu_budget.PAGE.write_text(page(gpu_budget.PAGE.read_text(), recorded()))


if __name__ == "__main__":
    main(sys.argv[1:])
