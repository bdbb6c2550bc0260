"""The GPU's kernels on small matrices: of gpu_places.py, in parallel over time of test_time_parallel.py, on tokens, and
where they form U of sequences of test_small_layers.py.

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
from gpu_places import SMALL, Place, Problem, at, judge, run
from test_decode import arguments, step_of
from test_repeat import same_bits
from test_small_layers import SANITIZED, forward
from test_small_layers import judge as judge_forward
from test_time_parallel import CHUNKED

# Whose kernel forms U: more lines than the ring holds, and narrow ones; blocks that are not full.
TOKENS = {
    "token": ("sru", "bfloat16", (3, 2, 5, 1320)),
    "token_of_narrow_lines": ("minlstm", "float16", (5, 1, 6, 333)),
}
CASES = SMALL | CHUNKED | TOKENS | SANITIZED


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
            if name in TOKENS:
                step(place, name, patch)
                continue
            if name in SANITIZED:
                patch.setenv("SRU_RT_PLAN", "small=1")
                problem = Problem.make(*SANITIZED[name], layer=True)
                judge_forward(problem, *forward(place, problem))
                continue
            *what, way = CASES[name]
            problem = Problem.make(*what)
            way.go(patch)
            judge(problem, run(place, problem, save=way.save, time_parallel=name in CHUNKED))
    print(f"ran {len(names) * len(orders)} recurrences: {', '.join(names)}")


def step(place: Place, name: str, patch: pytest.MonkeyPatch) -> None:
    """Takes a step both ways, where these have the same bits."""
    cell, *what = TOKENS[name]
    given, found = place.put(arguments(cell, *what, exact=True)), []
    for way in ("", "decode=0,small=0"):
        patch.setenv("SRU_RT_PLAN", way)
        found.append(place.get(step_of(cell)(**given)))
    same_bits(*found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE")
    chosen = parser.parse_args()
    main(chosen.cases, chosen.orders, chosen.sources)
