"""What a block of a GPU holds in shared memory, and how much has room there.

A tile is what a block of cuda/gpu_lookahead.h keeps of its chunk of time when it first reads it. A block that
recomputes states holds them, and where they are staged the rows of one piece (cuda/gpu_stage.h), or the rows of two or
three and the states of two (cuda/gpu_pair.h). Other sequential kernels may have a ring of laps there (cuda/gpu_ring.h).
"""

from __future__ import annotations

from dataclasses import replace

from . import emit
from .dtypes import state_dtype
from .traffic import ITEMSIZE, USUAL_EVERY, read, summarised
from .variant import Variant

SHARED_BYTES = 48 << 10  # of one block, on every architecture
LAP = 8  # steps, of rows that are in shared memory
PAIRED_THREADS = 32  # of a block that have a partner each: more pairs would need barriers, of which there are few
# Steps of chunks that have a tile; what is read twice of longer ones comes from memory twice. The longest is that of
# chunks whose length is given (see SRU_RT_PLAN): whether it is faster has not been measured.
_TILES = (32, 64, 128)


def state_bytes(variant: Variant) -> int:
    return ITEMSIZE[state_dtype(variant.dtype)] * len(variant.cell.state)


def shared_channels(variant: Variant, every: int) -> int:
    """Channels of which a block has room for the states of a piece."""
    return SHARED_BYTES // (every * state_bytes(variant))


def parts_of_pairs(pieces: int) -> int:
    """How often pairs of warps meet in a piece of which so many are staged: see cuda/gpu_pair.h."""
    return 4 if pieces == 2 else 1


def lap_of_staged(every: int, pieces: int) -> int:
    """Steps that are gone through at once, of so many staged pieces of `every` steps.

    By pairs at most those of a part. The more, the less is waited for.
    """
    if pieces == 1:
        return LAP
    return min(LAP if pieces == 2 else 2 * LAP, -(-every // parts_of_pairs(pieces)))


def part_of_pairs(every: int, pieces: int) -> int:
    """Steps after which they meet: whole laps, but for the end of a piece."""
    lap = lap_of_staged(every, pieces)
    return min(every, -(-every // (parts_of_pairs(pieces) * lap)) * lap)


def staged(variant: Variant) -> dict[int, int]:
    """Sizes of what is staged of each step, by the number in `traffic.read`: all but states."""
    sizes = read(variant, False, keep=2)
    return dict(enumerate(sizes[: len(sizes) - len(variant.cell.state)]))


def staged_bytes(variant: Variant, every: int, pieces: int, known: int = 0) -> int:
    """Of a channel of which `pieces` of `every` steps are staged; of two at most the states, and so many activations of
    each step."""
    each = state_bytes(variant) + known * ITEMSIZE[state_dtype(variant.dtype)]
    return every * (pieces * sum(staged(variant).values()) + min(pieces, 2) * each)


def activations(variant: Variant, every: int, pieces: int, channels: int) -> int:
    """Those of a step for which a block of so many channels has room where two or more pieces are staged.

    The same number for all pieces of up to `USUAL_EVERY` steps, and so on, as it is compiled in.
    """
    steps = -(-every // USUAL_EVERY) * USUAL_EVERY
    room = SHARED_BYTES // channels - staged_bytes(variant, steps, pieces)
    each = 2 * steps * ITEMSIZE[state_dtype(variant.dtype)]
    return max(0, min(len(emit.activations(variant.cell)), room // each))


def staged_channels(variant: Variant, every: int, pieces: int) -> int:
    """Channels of which a block has room for that, without activations."""
    return SHARED_BYTES // staged_bytes(variant, every, pieces)


def ring(variant: Variant, forward: bool) -> dict[int, int]:
    """Sizes of what a ring holds of each step, by the number in `traffic.read`: all of it."""
    return dict(enumerate(read(variant, forward, keep=1)))


def at_once(forward: bool) -> int:
    """Steps of a ring that are gone through without a branch, so that one is computed while another waits.

    Those of a backward are longer, and wait less for each other.
    """
    return 2 * LAP if forward else LAP


def fewest_laps(forward: bool) -> int:
    """Of a ring: as many steps as are gone through at once are on their way."""
    return 2 * at_once(forward) // LAP


def ahead(forward: bool, laps: int) -> int:
    """Steps that a ring of so many laps has on their way."""
    return laps * LAP - at_once(forward)


def ring_bytes(variant: Variant, forward: bool, laps: int) -> int:
    """Of a channel, of a ring of so many laps."""
    return laps * LAP * sum(ring(variant, forward).values())


def ring_channels(variant: Variant, forward: bool, laps: int) -> int:
    """Channels of which a block has room for one."""
    return SHARED_BYTES // ring_bytes(variant, forward, laps)


def tile_steps(chunk: int) -> int:
    """Steps that a tile of chunks has room for; 0 where they are too long for one."""
    return next((steps for steps in _TILES if chunk <= steps), 0)


def tile_threads(steps: int, step_bytes: int) -> int:
    """The most threads of a block whose tile has room, with `step_bytes` of a thread; there is a word more in that."""
    return max(0, SHARED_BYTES - 1) // max(1, steps * step_bytes) // 32 * 32


def tile(variant: Variant, forward: bool, every: int) -> dict[int, int]:
    """Sizes of what a tile holds of each step, by the number in `traffic.read`; nothing where states are recomputed."""
    if not forward and every > 1:
        return {}
    used = summarised(variant, forward)
    return {i: size for i, size in enumerate(read(variant, forward, keep=1)) if used >> i & 1}


def chunk_of_tile(variant: Variant, forward: bool) -> int:
    """Steps of the longest usual chunks that have a tile, whatever is kept for the backward; else of the longest."""
    pair = 2 if ITEMSIZE[variant.dtype] == 2 else 1
    step = pair * sum(tile(replace(variant, saved_dtype=state_dtype(variant.dtype)), forward, 1).values())
    usual = _TILES[:-1]
    return next((steps for steps in reversed(usual) if tile_threads(steps, step)), usual[-1])
