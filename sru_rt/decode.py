"""One token of a few sequences on a GPU: when one kernel forms U and takes the step, and how that kernel reads.

It saves a launch, and U's way to memory and back. See cuda/gpu_decode.h.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from . import settings
from .traffic import ITEMSIZE

MOST = 8  # sequences: with more, a lane would spend more time on sums than a load takes
THREADS = 128  # of a block, which has a channel for each 32
X_BYTES = 48 << 10  # the shared memory of a block that need not ask for it, in which x has to have room
_LINE = 16  # the bytes of the widest load
_RING_REGISTERS = 64  # of a lane's lines that are on their way


class Reads(NamedTuple):
    """The fields of a plan: bytes of a load, and loads of each row that are under way at once."""

    line: int
    depth: int


def has_kernel(dtype: str, sizes: tuple[int, int, int, int], d_in: int) -> bool:
    """Whether there is such a kernel for a token of `sizes` L, B, D, d, with a weight (D, k, d, d_in)."""
    L, B, _, d = sizes
    return L == 1 and 0 < B <= MOST and d > 0 and 0 < B * d_in * ITEMSIZE[dtype] <= X_BYTES


def fits(dtype: str, sizes: tuple[int, int, int, int], d_in: int) -> bool:
    """Whether such a token goes by it."""
    return has_kernel(dtype, sizes, d_in) and bool(settings.plan().get("decode", 1))


def reads(dtype: str, gates: int, d_in: int, x: int, weight: int) -> Reads:
    """Lines that rows are a whole number of, and that the addresses of x and weight are multiples of."""
    row = d_in * ITEMSIZE[dtype]
    line = gcd(_LINE, row, x, weight)
    room = _RING_REGISTERS // (gates * max(1, line // 4))
    return Reads(line, max(1, min(room, -(-row // (32 * line)))))
