"""Decides whether a recurrence on a GPU runs in parallel over time, and in chunks of how many steps.

The steps of a chunk follow each other, and chunks run at once: see cuda/gpu_lookahead.h, gpu_scan.h and gpu_shoot.h.
Results of the former two are rounded otherwise than those of the sequential kernels, by how time is cut, so nothing
here depends on what is kept for a backward. What is faster the model of `predict` says, by the load alone (see
`choose`), so that `calls` can list what may be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from . import costs, overrides, plan, predict
from .cell import Cell
from .choose import LAPS, Choice, Task, choose, load, rounded, shoots, warm_up
from .dtypes import state_dtype
from .machine import Device, Machine, of
from .shared_memory import chunk_of_tile, tile_steps
from .traffic import ITEMSIZE, reduced
from .variant import Variant

_SHORTEST, _LONGEST = 64, 1024
_MOST_CHUNKS = 65535  # of a grid, along z
_MIDDLE = 2**0.125  # of the channels that count as one load
# Where chunks guess and all guesses are wrong, time goes to all of them twice and to the sequential kernel once.
_WORTH_A_GUESS = 0.5
# Where steps compose, chunks took 1.2 to 1.6 times as long as predicted on an H100, sequential kernels 1.0 to 1.2.
_WORTH_CHUNKS = 0.7
_MANY = 1 << 20  # steps; what does not pay for so many is not done for fewer


def possible(cell: Cell, forward: bool) -> bool:
    """Whether time can be cut: in every forward, and in backwards of a few states.

    These are linear in the adjoints, so that their steps compose.
    """
    return forward or bool(cell.formula.jacobian)


def counted_in(cell: Cell, chunk: int) -> int:
    """Steps of the chunks in which a forward counts the states that it keeps anew; 0 if it counts them through.

    It does where chunks end up with the states of the sequential kernel.
    """
    return 0 if shoots(cell, forward=True) else chunk


def carried(cell: Cell, forward: bool, sizes: tuple[int, int, int, int], chunk: int) -> int:
    """Elements of the scratch for what chunks of `sizes` L, B, D, d leave to each other, in the dtype of the state.

    For each chunk, three states where it guesses; or A and b, and unless SRU_RT_PLAN has three kernels what one needs
    beside them: a state, and of up to 32 channels a word, with one more in all (see cuda/gpu_lookahead.h).
    """
    (L, B, D, d), n = sizes, len(cell.state)
    rows, words = n * (n + 1), 0
    if shoots(cell, forward):
        rows = 3 * n
    elif overrides.in_one_kernel(overrides.read()):
        rows, words = n * (n + 2), count(L, chunk) * D * count(B * d, 32) + 1
    return count(L, chunk) * rows * B * D * d + words


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
    if time_parallel is False:
        return 0
    chosen = overrides.read()
    ways = plan.in_one_kernel(variant, forward, device), overrides.in_one_kernel(chosen)
    return _length(variant, sizes, forward, time_parallel, device, chosen.get("chunk", 0), *ways)


@lru_cache(maxsize=4096)
def _length(
    variant: Variant,
    sizes: tuple[int, int, int, int],
    forward: bool,
    time_parallel: bool | str,
    device: Device,
    chosen: int,
    one_kernel: bool,
    of_tile: bool,
) -> int:
    L, B, D, d = sizes
    if L < 2 or not B * D * d or not possible(variant.cell, forward):
        return 0
    task = _task(variant, forward, d, one_kernel)
    at = _MIDDLE * load(B * D * d, device)
    chunk = _fitting(L, chosen) if chosen else _best(task, L, D * d, at, device, of_tile)
    if chunk >= L:
        return 0
    return chunk if time_parallel is True or _pays(task, L, chunk, D * d, at, device, of_tile) else 0


def _fitting(L: int, chunk: int) -> int:
    """So long that a grid holds the chunks."""
    while count(L, chunk) > _MOST_CHUNKS:
        chunk *= 2
    return chunk


def _task(variant: Variant, forward: bool, d: int, one_kernel: bool = True) -> Task:
    """What is compared: nothing is kept in a forward, every state in a backward, in its own dtype."""
    usual = Variant(variant.cell, variant.dtype, state_dtype(variant.dtype), variant.wide)
    pairs = ITEMSIZE[variant.dtype] == 2 and d % 2 == 0
    laps = LAPS if plan.by_warps(variant.dtype, d) else (0,)
    return Task(usual, forward, 0 if forward else 1, pairs=pairs, one_kernel=one_kernel, laps=laps)


@lru_cache(maxsize=1024)
def _best(task: Task, L: int, row: int, at: float, device: Device, of_tile: bool) -> int:
    """The power of two that the model finds fastest, within limits and below L if there is one.

    If it is to be `of_tile`, and steps compose, that of a tile. `row` is D*d.
    """
    if of_tile and not shoots(task.variant.cell, task.forward):
        return _fitting(L, chunk_of_tile(task.variant, task.forward))
    shortest = _fitting(L, _SHORTEST)
    longest = max(shortest, min(_LONGEST, L - 1))
    lengths = [n for k in range(31) if shortest <= (n := _SHORTEST << k) <= longest]
    return min(lengths, key=lambda chunk: predict.together(in_chunks(task, L, chunk, row, at, device))[1])


@lru_cache(maxsize=1024)
def _pays(task: Task, L: int, chunk: int, row: int, at: float, device: Device, of_tile: bool) -> bool:
    """Whether the model finds it faster than a thread that takes all steps, in long sequences too."""
    alone, cut = (
        predict.together(times)[1]
        for times in (sequential(task, L, row, at, device), in_chunks(task, L, chunk, row, at, device))
    )
    longer = _fitting(_MANY, chunk) if L >= _MANY else _best(task, _MANY, row, at, device, of_tile)
    enough = _WORTH_A_GUESS if shoots(task.variant.cell, task.forward) else _WORTH_CHUNKS
    return cut < enough * alone and (L >= _MANY or _pays(task, _MANY, longer, row, at, device, of_tile))


def sequential(task: Task, L: float, row: int, at: float, device: Device) -> Iterator[predict.Time]:
    """The kernels of a pass in which a thread takes all steps, of `at` channels for each multiprocessor."""
    machine, choice = of(device), _chosen(task, at, device)
    yield predict.sweep(machine, choice.kernel(task), at * machine.multiprocessors, L)
    yield from _sums(task, machine, 1, row, at)


def in_chunks(task: Task, L: int, chunk: int, row: int, at: float, device: Device) -> Iterator[predict.Time]:
    """The kernels of a pass in parallel over time, in their order."""
    machine, task = of(device), task._replace(parallel=True, tile=tile_steps(chunk))
    choice, n, channels = _chosen(task, at, device), count(L, chunk), at * machine.multiprocessors
    width, threads = choice.width, choice.threads
    if task.shoots:
        guess = costs.guesses(task.variant, width=width, depth=choice.reduce_depth, threads=threads)
        yield predict.sweep(machine, guess, channels * n, min(L, warm_up(task.variant)))._replace(launch=0)
        yield predict.sweep(machine, choice.kernel(task), channels * n, chunk)
        yield predict.sweep(machine, costs.ends(task.variant, width, threads), channels * (n - 1), 1)
        yield predict.sweep(machine, costs.ends(task.variant, width, threads), channels, n - 1)
        return
    if task.looks_ahead:
        yield predict.sweep(machine, costs.clear(), channels * n / (width * threads), 1)
        yield predict.looking_ahead(machine, *choice.looking_ahead(task, chunk), channels * n, chunk, n)
        yield from _sums(task, machine, n, row, at)
        return
    first = costs.summaries(task.variant, task.forward, width=width, depth=choice.reduce_depth, threads=threads)
    yield predict.sweep(machine, first, channels * (n - 1), chunk)
    yield predict.sweep(machine, costs.fold(task.variant, width, threads), channels, n - 1)
    sweep = choice.kernel(task)
    if task.every < 2:  # what summaries have read comes from the cache, if all of it has room there
        again = sum(reduced(task.variant, task.forward, keep=1))
        sweep = sweep._replace(reads=sweep.reads - again, again=again, every=L)
    yield predict.sweep(machine, sweep, channels * n, chunk)
    yield from _sums(task, machine, n, row, at)


def _chosen(task: Task, at: float, device: Device) -> Choice:
    return choose(task, rounded(at), device.arch, device.multiprocessors)


def _sums(task: Task, machine: Machine, n: int, row: int, at: float) -> Iterator[predict.Time]:
    """The kernel that adds up the gradients of parameters, of `n` chunks."""
    params = len(task.variant.cell.params)
    if not task.forward and params:
        rows = n * max(1, at * machine.multiprocessors / row)
        yield predict.sweep(machine, costs.sums(task.variant), 8 * params * row, rows / 8)
