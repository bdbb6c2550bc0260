"""Chooses depths, width and threads of a kernel by comparing what `predict` says of the candidates.

What is chosen depends on the sizes by the load alone, of which there are few, so that all that a layer may need can be
listed: see `calls`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from . import costs, predict
from .cell import Cell
from .dtypes import state_dtype
from .machine import Device, Machine, usual
from .shared_memory import (
    LAP,
    PAIRED_THREADS,
    activations,
    chunk_of_tile,
    fewest_laps,
    lap_of_staged,
    ring_bytes,
    ring_channels,
    shared_channels,
    staged_bytes,
    staged_channels,
    state_bytes,
    tile,
    tile_threads,
)
from .traffic import ITEMSIZE, read, reduced, reduction_reads_state, replayed
from .variant import Variant

DEPTHS = (1, 2, 4, 8, 12, 16, 24, 32)
_DEPTH_OF_NOTHING = 4  # steps of a loop for which all lies in shared memory
LAPS = (0, 3, 4, 6, 8, 12)  # of a ring in shared memory; 0: it is in registers
THREADS = (32, 64, 128, 256)
# Registers that a ring may take of 255; the rest are states, parameters, addresses and what a step computes. A backward
# that recomputes states ("from pieces") holds the addresses of two sweeps, and in chunks of a third, up to the chunk.
_RING_REGISTERS = {"forward": 128, "backward": 112, "from pieces": 72, "replay": 72, "reduce": 112}
_RING_REGISTERS |= {"from pieces in chunks": 48, "replay in chunks": 48, "settle": 80}
# Steps by which a chunk of time begins earlier where it has to guess a state, for each byte of a number of the state:
# 256 in float32. After them SRUs with |v| up to 1.22 and forget biases up to 2 have forgotten all bits of a wrong one.
_WARM_UP = 64
# Latencies for which plans are made, of those that are predicted: reads and writes disturb each other, and a ring of
# registers that is too deep costs less than one that is not deep enough. In shared memory, more copies under way than
# are needed were found to cost some 5 %. Through a ring there a step took 1.5 to 2 us on an H200, divided by the steps
# that were under way, wherever that is longer than a copy takes.
_CAUTION, _CAUTION_IN_SHARED, _CAUTION_IN_RINGS = 1.5, 1.25, 2.25
# Pairs of warps ask for a part of a piece at once. Where memory bounded them they took 1.3 to 1.4 times as long on an
# H200 as its bandwidth has it, single warps 1.3 times with much else to wait for.
_IN_BURSTS = 1.3
# Instructions in the laps of a forward that looks ahead, of which blocks are at all points at once. On an H200 one of
# 3900 (QRNN fo in bfloat16; 5100 as compiled) took 1.7 times as long as three kernels, one of 1100 (minGRU) less. On
# GPUs with shorter latencies rings are shorter, and no forward is so long.
_LONG_KERNEL = 3500
_COPIES_SINCE = 80  # the first architecture with asynchronous copies
_FEW = 192  # channels of a multiprocessor, below which pairs of channels would leave too few warps
_ALIKE = 1.02  # predictions that count as the same
_STEPS = 1 << 20  # so many that what comes before the first one does not count
# What kernels that are parallel over time are planned for, whatever the sizes: chunks of time fill the machine, with
# 1024 channels a multiprocessor where they may be short enough, and a quarter of that is what it takes to be worth it.
_LOAD_IN_CHUNKS = 256.0
_THREADS_IN_CHUNKS = 64

# Channels of a multiprocessor, a quarter of an octave apart; what lies between counts as the lower one.
LOADS = tuple(2 ** (k / 4) for k in range(57))
# Multiples of a load that count as it. Few blocks have room where rows are staged, so that one more may take a turn of
# its own: such a plan has to be good for all of them.
_LIKE = tuple(2 ** (k / 16) for k in range(4))


class Task(NamedTuple):
    """What a choice depends on beside the device. States are kept before every `every`-th step, 0: not at all."""

    variant: Variant
    forward: bool
    every: int
    parallel: bool = False
    flags: int = 0  # arrays of one byte a step
    pairs: bool = False  # whether two channels can be read at once
    one_step: bool = False
    in_shared: bool = False  # whether recomputed states lie in shared memory
    one_kernel: bool = True  # rather than three, for chunks whose steps compose
    tile: int = 0  # steps of a tile, 0 if there is none
    staged: tuple[int, ...] = (0,)  # pieces whose rows may be copied to shared memory: see cuda/gpu_stage.h
    laps: tuple[int, ...] = (0,)  # that a ring in shared memory may have: see cuda/gpu_ring.h

    @property
    def sweep(self) -> str:
        return "forward" if self.forward else "from pieces" if self.every > 1 else "backward"

    @property
    def shoots(self) -> bool:
        """Whether chunks guess the state that they begin with."""
        return self.parallel and shoots(self.variant.cell, self.forward)

    @property
    def looks_ahead(self) -> bool:
        """Whether chunks go through one kernel: see cuda/gpu_lookahead.h."""
        return self.parallel and self.one_kernel and not self.shoots

    def held(self, width: int) -> dict[int, int]:
        """What a tile of `width` channels a thread holds, if there is room: see `shared_memory.tile`."""
        found = tile(self.variant, self.forward, self.every) if self.looks_ahead and self.tile else {}
        return found if tile_threads(self.tile, width * sum(found.values())) else {}

    def block(self, width: int, staged: int = 0, laps: int = 0) -> int:
        """Threads of the largest block."""
        if staged:
            return staged_channels(self.variant, self.every, staged) // width // 32 * 32
        if laps:
            return ring_channels(self.variant, self.forward, laps) // width // 32 * 32
        if held := self.held(width):
            return tile_threads(self.tile, width * sum(held.values()))
        channels = shared_channels(self.variant, self.every) if self.in_shared else 2 * THREADS[-1]
        return channels // width // 32 * 32


class Choice(NamedTuple):
    """The fields of a plan; see plan.Plan."""

    width: int
    depth: int
    replay_depth: int
    reduce_depth: int
    threads: int
    staged: int = 0
    laps: int = 0

    def kernel(self, task: Task) -> predict.Kernel:
        """What the sweep takes, of a tile that is there already."""
        held = [*task.held(self.width).values()]
        states = task.every * state_bytes(task.variant) if task.in_shared else 0
        channel = states + task.tile * sum(held)
        if self.staged:
            channels = self.threads * self.width
            known = activations(task.variant, task.every, self.staged, channels) if self.staged > 1 else 0
            channel = staged_bytes(task.variant, task.every, self.staged, known)
        if self.laps:
            channel = ring_bytes(task.variant, task.forward, self.laps)
        found = costs.sweep(
            task.variant,
            task.forward,
            task.every,
            width=self.width,
            depth=self.depth,
            replay_depth=self.replay_depth,
            threads=self.threads,
            shared=self.threads * self.width * channel,
            held=held,
            staged=self.staged,
            laps=self.laps,
        )
        return found._replace(overlaps=True) if task.parallel else found

    def looking_ahead(self, task: Task, chunk: int) -> tuple[predict.Kernel, predict.Kernel]:
        """What both sweeps of one kernel take over a chunk, which are compiled as one."""
        first, then = _summaries(task, self, self.reduce_depth), self.kernel(task)
        registers = max(first.registers, then.registers)
        if task.every < 2 and not task.held(self.width):
            again = sum(reduced(task.variant, task.forward, keep=1))
            then = then._replace(reads=then.reads - again, again=again, every=chunk)
        return first._replace(registers=registers), then._replace(registers=registers)


def shoots(cell: Cell, forward: bool) -> bool:
    """Whether chunks of time have to guess the state that they begin with, as steps of a forward do not compose."""
    return forward and not (cell.affine and cell.formula.jacobian)


def warm_up(variant: Variant) -> int:
    """Steps that a chunk makes its guess of."""
    return _WARM_UP * ITEMSIZE[state_dtype(variant.dtype)]


def load(channels: int, device: Device) -> float:
    """The load of a device by so many channels of all sequences and directions."""
    return rounded(channels / device.multiprocessors)


def rounded(at: float) -> float:
    """The load that so many channels of a multiprocessor count as."""
    return LOADS[max(0, bisect_right(LOADS, at) - 1)]


def batches(row: int, device: Device) -> Iterator[int]:
    """Batch sizes of which one has each load that any has, where a sequence has `row` channels in all directions."""
    last = None
    for each in LOADS:
        B = max(1, int(each * device.multiprocessors / row))
        while load(B * row, device) < each:
            B += 1
        if last != (last := load(B * row, device)):
            yield B


@lru_cache(maxsize=4096)
def choose(task: Task, at: float, arch: int, multiprocessors: int) -> Choice:
    """The choice for the load `at`."""
    at, machine = _LOAD_IN_CHUNKS if task.parallel else at, _cautious(arch, multiprocessors)
    less, of_rings = (_cautious(arch, multiprocessors, n) for n in (_CAUTION_IN_SHARED, _CAUTION_IN_RINGS))
    # Three sweeps of pairs in both directions would have no room in the registers.
    wide = task.pairs and task.block(2) >= THREADS[0] and not (task.parallel and task.sweep == "from pieces")
    found: dict[Choice, float] = {}  # seconds
    for width in (2, 1) if wide else (1,):
        threads = min(_threads(task, at / width, machine), task.block(width))
        replays, depths = _replays(task, width), _depths(task, task.sweep, _read(task, width), width)
        for depth in depths if 0 in task.laps and 0 in task.staged else ():
            choice = Choice(width, depth, replays[-1], 1, threads)
            found[choice] = _time(machine, choice.kernel(task), at).worst
        for staged, laps in _in_shared(task) if arch >= _COPIES_SINCE else ():
            usual_threads = PAIRED_THREADS if staged > 1 else _threads_in_shared(at / width)
            if fitting := min(usual_threads, task.block(width, staged, laps)):
                lap = lap_of_staged(task.every, staged) if staged else LAP
                choice = Choice(width, lap, lap if staged else 1, 1, fitting, staged, laps)
                times = [_time(of_rings if laps else less, choice.kernel(task), at * more) for more in _LIKE]
                if staged > 1:
                    times = [t._replace(memory=_IN_BURSTS * t.memory) for t in times]
                found[choice] = max((t.best if staged > 1 else t.middle) / more for t, more in zip(times, _LIKE))
    if not found:  # no block has room for what is asked for
        fewer = tuple(range(max(task.staged))) or (0,)
        return choose(task._replace(laps=(0,), staged=fewer), at, arch, multiprocessors)
    most = _ALIKE * min(found.values())
    # Of those that are alike, two channels take fewer instructions, and single ones give more warps where they are few.
    few = at < _FEW
    alike = [choice for choice, seconds in found.items() if seconds <= most]
    best = min(
        alike, key=lambda c: (c.staged == 0, c.staged, c.laps == 0, c.width if few else -c.width, c.laps, c.depth)
    )
    if best.staged or best.laps:
        return best
    rings = {n: best._replace(replay_depth=n).kernel(task) for n in _replays(task, best.width)}
    summarised = {n: _summaries(task, best, n) for n in _reductions(task, best.width)}
    return best._replace(
        replay_depth=_least(machine, rings, at),
        reduce_depth=_least(machine, summarised, at),
    )


@lru_cache(maxsize=256)
def too_long(variant: Variant, arch: int, multiprocessors: int) -> bool:
    """Whether a forward that looks ahead is so long that three kernels are faster: in pairs of channels, see above."""
    any_saved = Variant(variant.cell, variant.dtype, state_dtype(variant.dtype), variant.wide)
    pairs, tile = ITEMSIZE[variant.dtype] == 2, chunk_of_tile(any_saved, forward=True)
    task = Task(any_saved, True, 0, parallel=True, pairs=pairs, tile=tile)
    if not (pairs and task.looks_ahead):
        return False
    choice = choose(task, _LOAD_IN_CHUNKS, arch, multiprocessors)
    first = choice.reduce_depth * _summaries(task, choice, choice.reduce_depth).instructions
    return choice.width * (first + choice.depth * choice.kernel(task).instructions) > _LONG_KERNEL


def _threads_in_shared(packs: float) -> int:
    """Blocks of two warps read longer lines at once, where there are enough of them for each multiprocessor."""
    return THREADS[1] if packs >= THREADS[1] else THREADS[0]


def _in_shared(task: Task) -> Iterator[tuple[int, int]]:
    """Pieces that may be staged in shared memory, and laps that a ring may have there."""
    if not task.parallel:
        yield from ((staged, 0) for staged in task.staged if staged)
        yield from ((0, laps) for laps in task.laps if laps and laps >= fewest_laps(task.forward))


def _least(machine: Machine, kernels: dict[int, predict.Kernel], at: float) -> int:
    """The least depth whose kernel is as good as any."""
    seconds = {depth: _time(machine, kernel, at).worst for depth, kernel in kernels.items()}
    return min(n for n, took in seconds.items() if took <= _ALIKE * min(seconds.values()))


def _time(machine: Machine, kernel: predict.Kernel, at: float) -> predict.Time:
    return predict.sweep(machine, kernel, at * machine.multiprocessors, _STEPS)


@cache
def _cautious(arch: int, multiprocessors: int, factor: float = _CAUTION) -> Machine:
    found = usual(arch, multiprocessors)
    return replace(found, latency=factor * found.latency)


def _threads(task: Task, packs: float, machine: Machine) -> int:
    """The smallest blocks of which half of what a multiprocessor holds suffice, as small ones spread most evenly."""
    most = machine.limits[1] // 2
    enough = next((n for n in THREADS if packs <= n * most), THREADS[-1])
    return _THREADS_IN_CHUNKS if task.parallel else enough


def _read(task: Task, width: int) -> Sequence[int]:
    """Sizes of what a step reads from memory."""
    held = task.held(width)
    return [size for i, size in enumerate(read(task.variant, task.forward, min(task.every, 2))) if i not in held]


def _replays(task: Task, width: int) -> Sequence[int]:
    if task.shoots:  # few threads settle chunks, as many as a sequential kernel has: as deep as registers allow
        return (max(_depths(task, "settle", _read(task, width), width)),)
    used = task.sweep == "from pieces"
    return _depths(task, "replay", replayed(task.variant), width) if used else (1,)


def _reductions(task: Task, width: int) -> Sequence[int]:
    if not task.parallel:
        return (1,)
    recomputes = task.sweep == "from pieces" and reduction_reads_state(task.variant.cell)
    variant = task.variant
    sizes = replayed(variant) if task.shoots else reduced(variant, task.forward, min(task.every, 2))
    return _depths(task, "from pieces" if recomputes else "reduce", sizes, width)


def _summaries(task: Task, choice: Choice, depth: int) -> predict.Kernel:
    if task.shoots:
        return costs.guesses(task.variant, width=choice.width, depth=depth, threads=choice.threads)
    found = costs.summaries(task.variant, task.forward, width=choice.width, depth=depth, threads=choice.threads)
    return found._replace(shared=choice.kernel(task).shared) if task.looks_ahead else found


def _depths(task: Task, sweep: str, streams: Sequence[int], width: int) -> Sequence[int]:
    """The depths of rings that fit into the registers; `streams` are the sizes of what a step reads."""
    if task.one_step:
        return (1,)
    if not streams and not task.flags:
        return (_DEPTH_OF_NOTHING,)
    if task.parallel and sweep in ("from pieces", "replay"):
        sweep += " in chunks"
    words = sum(max(1, size * width // 4) for size in streams) + task.flags
    return [n for n in DEPTHS if n * words <= _RING_REGISTERS[sweep]] or (1,)
