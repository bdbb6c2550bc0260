"""The GPU's kernels on the small matrices of gpu_places.py and, in parallel over time, of test_time_parallel.py.

They run under the emulation, in a process with a sanitizer:

    python emu_sanitized.py [--sources FOLDER] [--orders N ...] CASE [CASE ...]

test_gpu_sanitizers.py starts it. The arrays end where their memory ends, so that an element too many is seen. FOLDER
holds the kernels' sources in place of those of the library; emulator.py says what the orders of threads are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path

import pytest

from emu import fake_cupy
from gpu_places import SMALL, Problem, at, judge, run
from test_time_parallel import CHUNKED

CASES = SMALL | CHUNKED


def main(names: list[str], orders: list[int], sources: Path | None) -> None:
    if sources:
        fake_cupy.CUDA_SOURCES = sources
    os.environ["SRU_RT_EMU_RESIDENT"] = "5"  # blocks, some of which wait for others
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as cache,
        at("emulated", patch, lambda _: Path(cache)) as place,
    ):
        for name, order in itertools.product(names, orders):
            os.environ["SRU_RT_EMU_ORDER"] = str(order)
            *what, way = CASES[name]
            problem = Problem.make(*what)
            way.go(patch)
            judge(problem, run(place, problem, save=way.save, time_parallel=name in CHUNKED))
    print(f"ran {len(names) * len(orders)} recurrences: {', '.join(names)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE")
    chosen = parser.parse_args()
    main(chosen.cases, chosen.orders, chosen.sources)
