"""Decides whether a recurrence on a GPU runs in parallel over time, and in chunks of how many steps.

The steps of a chunk follow each other, and chunks run at once: see cuda/gpu_scan.h. Results are rounded otherwise than
those of the sequential kernels, by how time is cut, so nothing here depends on what is kept for a backward.
"""

from __future__ import annotations

from functools import lru_cache

from . import plan
from .cell import Cell
from .plan import Device
from .traffic import moved, reduced
from .variant import Variant

_SHORTEST, _LONGEST = 64, 1024
# Channels of a multiprocessor, chunks counted as channels of their own, from which on more would bring nothing.
_CHANNELS = 1024
_SHORTEST_SEQUENCE = 256  # in which three kernels in place of one may pay
_MOST_CHUNKS = 65535  # of a grid, along z


def possible(cell: Cell, forward: bool) -> bool:
    """Whether steps can be composed: of a few states, and in the forward if the new ones are affine in the old.

    Adjoints always are: a backward is linear in them.
    """
    return bool(cell.formula.jacobian) and (cell.affine or not forward)


def count(L: int, chunk: int) -> int:
    """The number of chunks."""
    return -(-L // chunk)


def kept(L: int, chunk: int, every: int) -> int:
    """The number of states that are kept, before every `every`-th step of each chunk."""
    whole, rest = divmod(L, max(1, chunk))
    return whole * count(chunk, every) + count(rest, every)


def length(
    variant: Variant, sizes: tuple[int, int, int, int], forward: bool, time_parallel: bool | str, device: Device
) -> int:
    """Steps of a chunk of one pass of `sizes` L, B, D, d; 0 where a thread is to take all steps.

    Raises:
        ArgumentError: SRU_RT_PLAN is not understood.
    """
    L, B, D, d = sizes
    if time_parallel is False or L < 2 or not B * D * d:
        return 0
    chunk = _length(L, B * D * d, plan.overrides().get("chunk", 0), device)
    if chunk >= L or not possible(variant.cell, forward):
        return 0
    return chunk if time_parallel is True or _pays(variant, L, B * D * d, forward, device) else 0


def _length(L: int, channels: int, chosen: int, device: Device) -> int:
    """The shortest that is a power of two and cuts no more chunks than fill the device, within limits."""
    chunk = chosen or _SHORTEST
    while not chosen and chunk < _LONGEST and chunk * _CHANNELS * device.multiprocessors < L * channels:
        chunk *= 2
    while count(L, chunk) > _MOST_CHUNKS:
        chunk *= 2
    return chunk


@lru_cache(maxsize=1024)
def _pays(variant: Variant, L: int, channels: int, forward: bool, device: Device) -> bool:
    """Whether it is faster. Computed, not measured.

    A sequential kernel takes 1 / share times as long as the memory needs, where it asks for no more than that share
    of what must be in flight to keep it busy; summaries and chunks together read some of the arrays twice.
    """
    reads, writes = moved(variant, forward)
    again = sum(reduced(variant, forward, keep=2)) / (sum(reads) + sum(writes))
    share = plan.best_share(variant, forward, channels / device.multiprocessors)
    return L >= _SHORTEST_SEQUENCE and share * (1 + again) < 1
