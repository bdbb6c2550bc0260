"""Decides whether a layer on a GPU takes one launch, in which a kernel forms U itself (cuda/gpu_small.h), or two.

The model of `predict` compares both ways. A product of cuBLAS uses the whole machine, but costs a launch and a wait,
and U goes to memory and back; that outweighs that each block of one launch reads the whole weight, as long as there are
no more sequences than the machine takes at once. Only forwards that keep nothing are given one launch: a backward would
form U again with sums in another order, from which other states would follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from . import chunks, decode, overrides, plan, predict, small
from .choose import Task, load
from .machine import Device, of
from .traffic import ITEMSIZE
from .variant import Variant

Sizes = tuple[int, int, int, int]  # L, B, D, d


def possible(variant: Variant, d: int, d_in: int, time_parallel: bool | str, device: Device) -> small.Block | None:
    """The block of a kernel for such a layer; None if there is no kernel, or one in parallel over time is asked for."""
    return None if time_parallel is True else small.block_of(variant, d, d_in, device.arch)


def taken(variant: Variant, sizes: Sizes, d_in: int, chunk: int, time_parallel: bool | str, device: Device) -> bool:
    """Whether a forward takes one launch whose recurrence would otherwise be cut into chunks of `chunk` steps, 0: not.

    One step of few sequences does not: where it is a token it has a kernel of its own, see `decode`.

    Raises:
        ArgumentError: SRU_RT_PLAN is not understood.
    """
    block = possible(variant, sizes[3], d_in, time_parallel, device)
    if block is None or 0 in sizes or decode.has_kernel(variant.dtype, sizes, d_in):
        return False
    chosen = overrides.read()
    if "small" in chosen:
        return bool(chosen["small"])
    one_kernel = plan.in_one_kernel(variant, True, device)
    return _pays(variant, block, sizes, d_in, chunk, one_kernel, device)


@lru_cache(maxsize=4096)
def _pays(
    variant: Variant, block: small.Block, sizes: Sizes, d_in: int, chunk: int, one_kernel: bool, device: Device
) -> bool:
    one, two = in_one(variant, block, sizes, d_in, device), in_two(variant, sizes, d_in, chunk, one_kernel, device)
    return one.worst < predict.together(two)[1]


def in_one(variant: Variant, block: small.Block, sizes: Sizes, d_in: int, device: Device) -> predict.Time:
    """The time of one launch."""
    L, B, D, d = sizes
    kernel, own = small.takes(variant, d, d_in, block)
    return predict.small_layer(of(device), kernel, own, variant.dtype, B * D, d, L)


def in_two(
    variant: Variant, sizes: Sizes, d_in: int, chunk: int, one_kernel: bool, device: Device
) -> Iterator[predict.Time]:
    """The times of a product and of the kernels of the recurrence."""
    L, B, D, d = sizes
    machine, at = of(device), load(B * D * d, device)
    pairs = ITEMSIZE[variant.dtype] == 2 and d % 2 == 0
    task = Task(variant, True, 0, pairs=pairs, one_step=L == 1, one_kernel=one_kernel)
    yield predict.product(machine, variant.dtype, L * B, len(variant.cell.gates) * D * d, d_in)
    if chunk:
        yield from chunks.in_chunks(task, L, chunk, D * d, at, device)
    else:
        yield from chunks.sequential(task, L, D * d, at, device)
