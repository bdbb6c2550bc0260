"""Writes the emitted text of the built-in cells to cuda/cells/, for people and editors to read.

Run it after a change of a step function, of the tracer or of the emitter: python tools/write_cells.py
"""

from __future__ import annotations

from pathlib import Path

from sru_rt.cells import named_cells
from sru_rt.emit import emit

FOLDER = Path(__file__).resolve().parent.parent / "cuda" / "cells"


def texts() -> dict[str, str]:
    """File names and what they should hold."""
    return {f"{cell.name}.cuh": emit(cell) for cell in named_cells()}


if __name__ == "__main__":
    wanted = texts()
    for stale in {path.name for path in FOLDER.glob("*.cuh")} - set(wanted):
        (FOLDER / stale).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
