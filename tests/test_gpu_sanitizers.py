"""The GPU's kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and planted bugs.

They run under the emulation, in processes of their own. A bug planted in a copy of the sources must be reported:
otherwise a clean run of the sources themselves says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import planted
from emu import emulator

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "emu_sanitized.py"


@dataclass(frozen=True)
class Job:
    """One process: the small cases that it runs, in which orders, and the bug in its copy of the sources.

    ThreadSanitizer takes a millisecond for every thread, so it is given few.
    """

    mode: str
    cases: str
    orders: tuple[int, ...] = (0, 1, 2, 3)
    old: str = ""  # in `file`
    new: str = ""
    report: str = ""  # what the sanitizer must say
    file: str = "gpu_sweep.h"


CLEAN = {
    "asan": Job("asan", "plain pairs recomputed recomputed_pairs per_step basic"),
    "asan, other cells": Job("asan", "qrnn qrnn_recomputed_pairs mingru minlstm", (0, 2)),
    "asan, chunks": Job("asan", "chunks chunks_recomputed chunks_of_pairs chunks_that_guess"),
    "asan, looking ahead": Job("asan", "looking_ahead looking_ahead_recomputed looking_ahead_in_pairs"),
    "asan, staged": Job("asan", "staged staged_by_neighbours staged_by_warps"),
    "tsan, staged": Job("tsan", "staged staged_by_neighbours staged_by_warps", (1, 2)),
    "asan, pairs of warps": Job("asan", "paired paired_reverse"),
    "tsan, pairs of warps": Job("tsan", "paired paired_reverse", (1, 2)),
    "asan, rings": Job("asan", "ring ring_of_pairs"),
    "tsan, rings": Job("tsan", "ring ring_of_pairs", (1, 2)),
    "asan, small layers": Job("asan", "layer odd_layer", (0, 1, 2)),
    "tsan, small layers": Job("tsan", "layer odd_layer", (1, 2)),
    "tsan, 1": Job("tsan", "pairs basic", (1, 2)),
    "tsan, 2": Job("tsan", "recomputed_pairs recomputed", (3,)),
    "tsan, 3": Job("tsan", "plain per_step", (2,)),
    "tsan, other cells": Job("tsan", "qrnn_recomputed_pairs mingru minlstm", (1,)),
    "tsan, chunks": Job("tsan", "chunks chunks_recomputed chunks_of_pairs chunks_that_guess", (1,)),
    "tsan, looking ahead": Job("tsan", "looking_ahead looking_ahead_recomputed looking_ahead_in_pairs", (2,)),
    "asan, tokens": Job("asan", "token token_of_narrow_lines", (0, 2)),
    "tsan, tokens": Job("tsan", "token token_of_narrow_lines", (1,)),
}

HEAP = r"AddressSanitizer: heap-buffer-overflow"
RACE = r"ThreadSanitizer: data race"

PLANTED = {
    "read ahead beyond the last row": Job(
        "asan",
        "plain",
        (0,),
        "if (k + depth < left) ring[k] = from.read(k + depth);",
        "ring[k] = from.read(k + depth);",
        HEAP,
    ),
    "let idle threads write": Job(
        "asan",
        "plain",
        (0,),
        "idle = n >= batch(a) * packs;",
        "idle = false;",
        HEAP,
    ),
    "sum up one sequence too many": Job(
        "asan",
        "plain",
        (0,),
        "to && i < n; i += groups",
        "to && i <= n; i += groups",
        HEAP,
    ),
    "recompute one state too many": Job(
        "asan",
        "recomputed",
        (0,),
        "store(to.value[i] + k * to.step, narrow<acc>(state[i]));",
        "store(to.value[i] + (k + 1) * to.step, narrow<acc>(state[i]));",
        r"AddressSanitizer: (use-after-poison|heap-buffer-overflow)",
    ),
    "begin pairs at odd places": Job(
        "asan",
        "pairs",
        (0,),
        "j = (n - b * packs) * width;",
        "j = (n - b * packs) * width + 1;",
        r"misaligned",
    ),
    "add up without waiting for the others": Job(
        "tsan",
        "pairs",
        (1,),
        "    __syncthreads();\n",
        "",
        RACE,
    ),
    "form U where it is still read": Job(
        "tsan",
        "layer",
        (1,),
        "      work.form(t);\n",
        "      work.form(t);\n      if (t + 1 < tiles(n)) work.form(t + 1);\n",
        RACE,
        "gpu_small.h",
    ),
    "wait for x behind the barrier": Job(
        "tsan",
        "layer",
        (2,),
        "    cp_async_wait<stages - 2>();\n    meet();\n",
        "    meet();\n    cp_async_wait<stages - 2>();\n",
        RACE,
        "gpu_small.h",
    ),
    "read a row of x too many": Job(
        "asan",
        "layer",
        (0,),
        "if (row >= left) break;",
        "if (row > left) break;",
        HEAP,
        "gpu_small.h",
    ),
    "share one row of partial sums": Job(
        "tsan",
        "pairs",
        (0,),
        "f.partial.data + row * n_sums * f.partial.stride",
        "f.partial.data",
        RACE,
    ),
    "share recomputed states": Job(
        "tsan",
        "recomputed",
        (2,),
        "(acc *)(sru_shared + a.every * before) + thread() * width",
        "(acc *)(sru_shared + a.every * before)",
        RACE,
    ),
    "read a line beyond the weight": Job(
        "asan",
        "token",
        (0,),
        "(lane < lines % 32)",
        "1",
        r"AddressSanitizer: (use-after-poison|heap-buffer-overflow)",
        "gpu_decode.h",
    ),
    "let a warp without a channel write": Job(
        "asan",
        "token",
        (0,),
        "channel < Plan::d ? channel : Plan::d - 1",
        "channel",
        HEAP,
        "gpu_decode.h",
    ),
    "multiply before x is there": Job(
        "tsan",
        "token",
        (1,),
        "    __syncthreads();\n",
        "",
        RACE,
        "gpu_decode.h",
    ),
    "summarise one chunk too many": Job(
        "asan",
        "chunks",
        (0,),
        "work.sum.write(a, at, reverse, blockIdx.z);",
        "work.sum.write(a, at, reverse, blockIdx.z + 2);",
        HEAP,
        "gpu_scan.h",
    ),
    "go beyond the last chunk": Job(
        "asan",
        "chunks",
        (0,),
        "to = clamp(from + a.chunk, 0, L);",
        "to = from + a.chunk;",
        HEAP,
    ),
    "mend one chunk too many": Job(
        "asan",
        "chunks_that_guess",
        (0,),
        "const index_t chunk = blockIdx.z + 1;",
        "const index_t chunk = blockIdx.z + 2;",
        HEAP,
        "gpu_shoot.h",
    ),
    "begin with what is being mended": Job(
        "tsan",
        "chunks_that_guess",
        (1,),
        "read(a, at, reverse, chunk - 1, ended, state);",
        "read(a, at, reverse, chunk - 1, mended, state);",
        RACE,
        "gpu_shoot.h",
    ),
    "end all chunks in one place": Job(
        "tsan",
        "chunks_that_guess",
        (1,),
        "write(a, at, reverse, span.chunk, ended, work.state);",
        "write(a, at, reverse, 0, ended, work.state);",
        RACE,
        "gpu_shoot.h",
    ),
    "share summaries": Job(
        "tsan",
        "chunks",
        (1,),
        "((chunk * carry_rows + i) * batch(a) * Plan::D + at.row(q))",
        "(i * batch(a) * Plan::D + at.row(q))",
        RACE,
    ),
    "publish a summary before all have written": Job(
        "tsan",
        "looking_ahead_in_pairs",
        (0,),
        "column.write(chunk, sum);\n      __syncthreads();\n",
        "column.write(chunk, sum);\n",
        RACE,
        "gpu_lookahead.h",
    ),
    "read a summary at the sight of its flag": Job(
        "tsan",
        "looking_ahead",
        (0,),
        "acquire_flag(flags + mine)",
        "atomicOr(flags + mine, 0u)",
        RACE,
        "gpu_lookahead.h",
    ),
    "read summaries of which other lanes have seen the flag": Job(
        "tsan",
        "looking_ahead",
        (0,),
        "__syncwarp();  //",
        "//",
        RACE,
        "gpu_lookahead.h",
    ),
    "share words of flags": Job(
        "tsan",
        "looking_ahead",
        (0,),
        "(q * columns(a) + block) * count",
        "q * columns(a) * count",
        RACE,
        "gpu_lookahead.h",
    ),
    "copy a lap beyond the end": Job(
        "asan",
        "ring",
        (1,),
        "if (k + Stage::row_of_mine() < left)",
        "if (left > 0)",
        HEAP,
        "gpu_ring.h",
    ),
    "take the place of a lap that others still read": Job(
        "tsan",
        "ring_of_pairs",
        (1, 2),
        "Stage::meet();  // what",
        "// what",
        RACE,
        "gpu_ring.h",
    ),
    "copy a row too many": Job(
        "asan",
        "staged",
        (1,),
        "while (left > 0) {\n        if (row_of_mine() < left) row(0);",
        "while (left >= 0) {\n        row(0);",
        HEAP,
        "gpu_stage.h",
    ),
    "copy without waiting for the neighbour": Job(
        "tsan",
        "staged_by_neighbours",
        (1, 2),
        "meet();\n        copies.template some",
        "copies.template some",
        RACE,
        "gpu_stage.h",
    ),
    "read without waiting for the warp": Job(
        "tsan",
        "staged_by_warps",
        (1, 2),
        "cp_async_wait<0>();\n      meet();",
        "cp_async_wait<0>();",
        RACE,
        "gpu_stage.h",
    ),
    "copy rows that a pair has none of": Job(
        "asan", "paired", (1,), "smaller(lap, this->left)", "lap", HEAP, "gpu_pair.h"
    ),
    "go on without the partner": Job(
        "tsan",
        "paired",
        (1, 2),
        "        ::meet();  // the partner\n        copies.part(of_part);",
        "        copies.part(of_part);\n        ::meet();",
        RACE,
        "gpu_pair.h",
    ),
    "read copies of the warp without waiting for it": Job(
        "tsan", "paired", (1, 2), "        Stage::meet();\n", "", RACE, "gpu_pair.h"
    ),
    "go beyond the tile": Job(
        "asan",
        "looking_ahead",
        (0,),
        "step_bytes = Plan::tile_bytes * Plan::threads",
        "step_bytes = Plan::tile_bytes * Plan::threads * 64",
        r"AddressSanitizer: use-after-poison",
        "gpu_tile.h",
    ),
}


def start(job: Job, folder: Path) -> tuple[int, str]:
    command = [str(SCRIPT), *job.cases.split(), "--orders", *map(str, job.orders)]
    if job.old:
        command += ["--sources", str(planted.sources(folder, job.file, job.old, job.new))]
    return emulator.run_sanitized(command, job.mode)


@pytest.fixture
def outcome(tmp_path) -> Callable[[str], tuple[int, str]]:
    """Runs a job, and gives what its process did."""

    def run(name: str) -> tuple[int, str]:
        job = (CLEAN | PLANTED)[name]
        if reason := emulator.preload(job.mode)[1]:
            pytest.skip(reason)
        return start(job, tmp_path)

    return run


@pytest.mark.parametrize("name", CLEAN)
def test_the_kernels_are_clean(name, outcome):
    status, output = outcome(name)
    assert status == 0, output[-4000:]
    assert "runtime error" not in output and "Sanitizer" not in output, output[-4000:]
    cases = CLEAN[name].cases.split()
    assert output.startswith(f"ran {len(cases) * len(CLEAN[name].orders)} recurrences: {', '.join(cases)}")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_reported(name, outcome):
    status, output = outcome(name)
    assert re.search(PLANTED[name].report, output), f"status {status}\n{output[-4000:]}"
    assert re.search(r"(gpu_\w+|port_gpu|ptx)\.h:\d+", output), output[-4000:]
    assert status != 0
