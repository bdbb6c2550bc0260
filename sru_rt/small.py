"""What a kernel of cuda/gpu_small.h holds, which forms U of a small layer itself: warps, registers, shared memory.

It knows sizes alone; `one_launch` decides who is given such a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

from . import costs
from .predict import Kernel, Own
from .shared_memory import SHARED_BYTES
from .traffic import ITEMSIZE
from .variant import Variant

TILE = 16  # steps of U that are formed at once
OLDEST = 80  # architecture whose tensor cores multiply bfloat16
_STAGES = 4  # tiles of x in shared memory
_WARPS = 16  # of a block at most: then a thread may have 128 registers
_PRODUCT_REGISTERS = 84  # of a thread for the weight and for sums at most, so that none spill
_OTHER_REGISTERS = 64  # beside these; an estimate
_RING_REGISTERS = 48  # of what is read ahead from memory
_DEPTHS = (32, 16, 8)  # like the shortest one, multiples of `ahead` in the kernel
_SHORTEST = 4


class Block(NamedTuple):
    """A block, which takes one sequence in one direction."""

    step_warps: int
    product_warps: int
    registers: int  # of a thread, for the weight and for sums
    shared: int  # bytes

    @property
    def threads(self) -> int:
        return 32 * (self.step_warps + self.product_warps)


def block(k: int, d: int, d_in: int) -> Block | None:
    """The block of a layer of k gates, d channels and d_in columns of x; None if one cannot hold it."""
    octets, pieces, step_warps = -(-k * d // 8), -(-d_in // 32), -(-d // 32)
    room = _WARPS - step_warps
    if room < 1 or not octets * pieces:
        return None
    each = -(-octets // room)
    x_row, u_row = 32 * (pieces | 1), -(-k * d // 64) * 64 + 8
    shared = 2 * TILE * (_STAGES * x_row + 2 * u_row)
    registers = 4 * each * (pieces + 1)
    if registers > _PRODUCT_REGISTERS or shared > SHARED_BYTES:
        return None
    return Block(step_warps, -(-octets // each), registers, shared)


def block_of(variant: Variant, d: int, d_in: int, arch: int) -> Block | None:
    """The same for a kernel: None as well where tensor cores do not multiply its dtype."""
    if ITEMSIZE[variant.dtype] != 2 or arch < OLDEST:
        return None
    return block(len(variant.cell.gates), d, d_in)


def depth(variant: Variant, flags: int) -> int:
    """Steps that are read ahead of inputs and `flags`; gates are not read from memory."""
    words = len(variant.cell.inputs) + flags
    depths = _DEPTHS if words else ()
    return next((n for n in depths if n * words <= _RING_REGISTERS), _SHORTEST)


def takes(variant: Variant, d: int, d_in: int, block: Block) -> tuple[Kernel, Own]:
    """What the kernel takes, for `predict.small_layer`. Registers are an estimate."""
    k, size = len(variant.cell.gates), ITEMSIZE[variant.dtype]
    ring, held = depth(variant, 0), [size] * k
    steps = costs.sweep(variant, True, 0, depth=ring, threads=block.threads, shared=block.shared, held=held)
    registers = min(2048 // block.threads * 32, _OTHER_REGISTERS + block.registers)
    rows = TILE * (_STAGES - 1)
    own = Own(
        weight=size * k * d * d_in,
        operations=2 * TILE * k * d * d_in,
        tile=TILE,
        rows=min(rows, ring) if variant.cell.inputs else rows,
        warps=block.step_warps,
    )
    return steps._replace(reads=steps.reads + size * d_in / d, registers=registers), own
