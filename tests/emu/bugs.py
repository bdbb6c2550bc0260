"""The kernels of bugs.cuh, right and with their bugs, in every mode of the emulation.

As a script it runs them in the mode that SRU_RT_EMU_MODE names, each in a process of its own, as a sanitizer ends the
process that it finds something in, and prints a list of outcomes as JSON. Compiling is done once, before.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from emu import emulator

SOURCE = Path(__file__).with_name("bugs.cuh")
MODES = ("plain", "asan", "tsan")
STRUCT = np.dtype(
    [("x", "u8"), ("sums", "u8"), ("flags", "u8"), ("rows", "i8"), ("columns", "i8"), ("bug", "i4")], align=True
)

RACE = r"WARNING: ThreadSanitizer: data race"
HEAP = r"AddressSanitizer: heap-buffer-overflow"
POISON = r"AddressSanitizer: use-after-poison"
WRONG = r"^wrong"


@dataclass(frozen=True)
class Planted:
    """A bug, and what must be said about it in each mode that must find it, in this order of threads."""

    kernel: str
    found: dict[str, str]
    order: int = 0


def error(pattern: str, modes: Sequence[str] = MODES) -> dict[str, str]:
    """The launch fails with such a message in these modes."""
    return dict.fromkeys(modes, "^error: .*" + pattern)


UNSANITIZED = ("plain", "asan")  # where ThreadSanitizer does not see something else first
SUMS, TURNS = "column_sums", "rows_in_turn"
PLANTED = {
    "read_past_array": Planted(TURNS, {"asan": HEAP}),
    "write_past_array": Planted(TURNS, {"asan": HEAP}),
    "write_past_static_shared": Planted(TURNS, error("index 40 is out of bounds", UNSANITIZED)),
    "pointer_past_static_shared": Planted(
        TURNS, error("past the end .* shared of block", ["plain"]) | {"asan": POISON}
    ),
    "write_past_dynamic_shared": Planted(TURNS, error("past the end .* given at the", ["plain"]) | {"asan": POISON}),
    "read_past_dynamic_shared": Planted(TURNS, {"asan": POISON}),
    "write_past_local": Planted(TURNS, {"asan": r"AddressSanitizer: stack-buffer-overflow"}),
    "wild_pointer": Planted(TURNS, error("illegal access", ["plain"]) | {"asan": r"AddressSanitizer: SEGV"}),
    "null_pointer": Planted(TURNS, error("null pointer to 'const float'")),
    "misaligned_vector": Planted(TURNS, error("misaligned address .*'const struct float4', which is aligned to 16")),
    "misaligned_instruction": Planted(TURNS, error("misaligned address .*multiple of 8")),
    "shared_as_global": Planted(TURNS, error("is not in global memory")),
    "no_barrier": Planted(SUMS, {"plain": WRONG, "asan": WRONG, "tsan": RACE}),
    "no_barrier_before_reuse": Planted(SUMS, {"tsan": RACE}),
    "two_barriers": Planted(SUMS, error(r"wait at different barriers: .*bugs\.cuh:\d+, .*bugs\.cuh:\d+")),
    "no_syncwarp_after_copy": Planted(SUMS, {"plain": WRONG, "asan": WRONG, "tsan": RACE}, order=2),
    "no_syncwarp_before_reuse": Planted(SUMS, {"tsan": RACE}, order=1),
    "no_wait_for_copy": Planted(SUMS, {"plain": WRONG, "asan": WRONG}),
    "wait_leaves_one_copy_too_many": Planted(SUMS, {"plain": WRONG, "asan": WRONG}),
    "copy_left_pending": Planted(SUMS, error("returns before it has waited", UNSANITIZED)),
    "unwritten_shared": Planted(SUMS, dict.fromkeys(MODES, r"^wrong: \[nan")),
    "shuffle_by_half_a_warp": Planted(SUMS, error("(has returned|deadlock.* for the lanes 0xffff0000)")),
    "shuffles_at_two_lines": Planted(SUMS, error("__shfl_down_sync .* meets __shfl_down_sync")),
    "shuffle_after_exit": Planted(SUMS, error("(names lane 3, which has returned|for the lanes 0x00000008)")),
    "shuffle_from_outside_the_mask": Planted(SUMS, error("lane 0 reads lane 2, which is not in the mask")),
    "lane_outside_its_mask": Planted(SUMS, error("lane 0 is not in its own mask 0xffff0000")),
    "mask_beyond_the_block": Planted(TURNS, error("names lane 8, which does not exist")),
    "barrier_while_others_shuffle": Planted(SUMS, error("deadlock.*__syncthreads.*__syncwarp for .* 0x00000020")),
    "sum_without_atomics": Planted(TURNS, {"tsan": RACE}),
    "blocks_share_an_element": Planted(TURNS, {"tsan": RACE}),
    "flag_without_a_fence": Planted(TURNS, {"tsan": RACE}),
    "trust_in_block_order": Planted(TURNS, error("no progress", ["plain"]), order=1),
    "never_set_flag": Planted(TURNS, error("no progress", ["plain"])),
    "trap": Planted(TURNS, error(r"rows_in_turn: __trap in block \(0,0,0\) thread \(0,0,0\) at .*bugs\.cuh:\d+$")),
    "endless_recursion": Planted(TURNS, error("stack overflow", ["plain"])),
}


@cache
def numbers() -> dict[str, int]:
    """The bugs of the source, in its order."""
    names = re.search(r"enum Bug \{(.*?)\}", SOURCE.read_text(), re.DOTALL)
    assert names
    return {name.strip(): i for i, name in enumerate(names[1].split(","))}


@cache
def module(mode: str | None = None) -> emulator.Module:
    return emulator.Module(SOURCE.read_text(), mode=mode, name=str(SOURCE))


def run(kernel: str, bug: str, order: int, resident: int = 2) -> str:
    """What comes of a launch: "right", "wrong" and the sums, or "error" and the message."""
    columns, rows = (64, 23) if kernel == SUMS else (40, 23)
    x = np.random.default_rng(0).integers(-9, 9, (rows, columns)).astype(np.float32)
    sums, flags = np.full(columns, np.nan, np.float32), np.zeros(5, np.int32)
    given = (x.ctypes.data, sums.ctypes.data, flags.ctypes.data, rows, columns, numbers()[bug])
    grid, block, shared = ((2,), (32, 4), 1024) if kernel == SUMS else ((4,), (40,), 92)
    try:
        module().get_function(kernel)(grid, block, (np.array([given], STRUCT),), shared, order=order, resident=resident)
    except RuntimeError as error:
        return f"error: {error}"
    return "right" if (sums == x.sum(axis=0)).all() else f"wrong: {sums[:4]}"


@dataclass(frozen=True)
class Outcome:
    kernel: str
    bug: str
    status: int
    output: str


def in_child(function: Callable[[], str]) -> tuple[int, str]:
    """Calls it in a fork of this process: its exit status, and what it returned and the sanitizer wrote."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            text = function()
            os.write(1, text.encode() + b"\n")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read().decode(errors="replace")


def outcome(kernel: str, bug: str, orders: Sequence[int]) -> Outcome:
    return Outcome(kernel, bug, *in_child(lambda: "\n".join(run(kernel, bug, order) for order in orders)))


def main(orders: Sequence[int]) -> None:
    """Runs the right kernels in all these orders, and each bug that this mode must find in its own."""
    mode = emulator.default_mode()
    module()
    outcomes = [outcome(kernel, "none", orders) for kernel in (SUMS, TURNS)]
    outcomes += [outcome(p.kernel, bug, [p.order]) for bug, p in PLANTED.items() if mode in p.found]
    print(json.dumps([asdict(o) for o in outcomes]))


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]])
