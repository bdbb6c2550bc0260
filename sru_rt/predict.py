"""A model of how long a GPU takes for a kernel of this library: the longest of a few things that each take their time.

It is arithmetic on the numbers of `machine` and on what a kernel takes, and was not measured. The planner compares
plans by it; the tables of docs/gpu_budget.md and benchmarks/model.py print it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .machine import REGISTERS, SCHEDULERS, Machine

_LINES = 2  # latencies before the first step: of what is read once, and of the ring
_OF_WARPS = 0.6  # of the rate of large products: what instructions of one warp reach, and a block that forms a little
_HOP = 0.2e-6  # seconds until what is known of one chunk is known of the next one, as measured on an H100
_LOOKS = 5  # latencies of a block that looks ahead: of its number, of words twice, of summaries, of a publication


class Kernel(NamedTuple):
    """What a sweep over time takes: bytes, instructions and clocks are those of one channel and step."""

    reads: float  # bytes from memory
    writes: float
    again: float = 0  # bytes that are read once more soon afterwards, by a sweep that recomputes states
    width: int = 1  # channels of a thread
    depth: int = 1  # steps that are read ahead
    replay_depth: int = 0  # the same of a sweep that recomputes states, 0 if there is none
    every: int = 1  # steps of a piece whose states are recomputed
    refills: int = 0  # latencies that each begins with
    threads: int = 32  # of a block, each with channels of its own
    warps: int = 1  # that share the work of the same channels
    registers: int = 32
    shared: int = 0  # bytes of a block
    instructions: float = 0
    special: float = 0  # instructions on the special function unit
    pace: float = 0  # clocks of a warp, with all its channels, that has a scheduler nearly for itself
    chain: float = 0  # clocks from the state before a step to the state after it
    path: float = 0  # clocks from what a step reads to all that it gives
    overlaps: bool = True  # whether steps are computed while a warp waits: others of its own, or those of many warps


class Own(NamedTuple):
    """What blocks take that form U of a sequence themselves, while they go over the steps of what they have formed."""

    weight: float  # bytes that a block reads before
    operations: float  # of a tile of U
    tile: int  # steps of it
    rows: int  # steps of what is on its way from memory
    warps: int  # of a block, of those that go over the steps


class Time(NamedTuple):
    """Seconds of a kernel, if nothing but one thing took time; the last three come before or beside the others."""

    memory: float
    cache: float  # second-level cache, and what one multiprocessor takes from it
    in_flight: float  # loads that are too few to hide their latency
    issue: float
    special: float
    chain: float
    refill: float  # of rings, in sweeps that recompute states
    fill: float  # until the first step
    launch: float
    products: float = 0  # of a kernel that forms U itself
    alone: float = 0  # of a warp that computes nothing while it waits: loads, and one step after the other

    @property
    def best(self) -> float:
        """If a warp does all its other work while it waits for the chain."""
        return self._total(max(self.issue, self.chain))

    @property
    def worst(self) -> float:
        """If it does none of it then."""
        return self._total(self.issue + self.chain)

    @property
    def middle(self) -> float:
        """If it does half of what could be done then."""
        return self._total((max(self.issue, self.chain) + self.issue + self.chain) / 2)

    def _total(self, arithmetic: float) -> float:
        steps = max(self.in_flight, arithmetic, self.special, self.products, self.alone) + self.refill
        return max(self.memory, self.cache, steps) + self.fill + self.launch

    @property
    def bound(self) -> str:
        """What takes the time at best."""
        return self._bound({"instructions": self.issue, "chain": self.chain})

    @property
    def bound_at_worst(self) -> str:
        return self._bound({"instructions and chain": self.issue + self.chain})

    def _bound(self, arithmetic: dict[str, float]) -> str:
        steps = {"loads in flight": self.in_flight, "special functions": self.special, **arithmetic}
        steps |= {"waits of a warp": self.alone} if self.alone else {}
        steps |= {"products": self.products} if self.products else {}
        name = max(steps, key=lambda key: steps[key])
        limits = {"memory": self.memory, "cache": self.cache}
        limits[f"{name} and refills" if self.refill else name] = steps[name] + self.refill
        bound = max(limits, key=lambda key: limits[key])
        return bound if limits[bound] >= self.fill + self.launch else "launch and latency"


def sweep(machine: Machine, kernel: Kernel, channels: float, steps: float) -> Time:
    """The time of one kernel that takes `channels` over `steps` steps, chunks of time counted as channels."""
    k, clock, most = kernel, machine.clock, machine.multiprocessors
    warps, here = k.warps * k.threads / 32, occupancy(machine, k)
    fullest = -(-max(1, -(-channels // (k.width * k.threads))) // most)  # blocks of one multiprocessor
    waves = -(-fullest // here)  # those that there is no room for come after the others
    turns = -(-fullest * warps // SCHEDULERS)  # warps of one scheduler
    work = turns * k.width * steps / k.warps
    moved = k.reads + k.writes
    laps = 1 / k.depth + (1 / k.replay_depth if k.replay_depth else 0)
    in_flight = waves * steps * laps * machine.latency
    # A piece that the cache does not hold comes from memory twice.
    running = min(channels, here * most * k.threads * k.width)
    again = k.again if running * k.every * moved > machine.l2_bytes else 0
    scheduled = -(-min(fullest, here) * warps // SCHEDULERS)  # warps of one scheduler at once
    return Time(
        memory=channels * steps * (moved + again) / machine.bandwidth,
        cache=max(
            channels * steps * (moved + k.again) / machine.cache_bandwidth,
            fullest * k.threads * k.width * steps * (moved + k.again) / machine.port_bandwidth,
        ),
        in_flight=in_flight,
        issue=max(work * k.instructions, waves * steps * k.pace) / clock,
        special=work * SCHEDULERS * 32 * k.special / machine.special_rate,
        chain=waves * steps * k.chain / clock,
        refill=waves * steps / k.every * k.refills * machine.latency / scheduled,
        fill=waves * _LINES * machine.latency,
        launch=machine.launch,
        alone=0 if k.overlaps else in_flight + waves * steps * (k.path + k.width * k.instructions) / clock,
    )


def looking_ahead(machine: Machine, first: Kernel, then: Kernel, channels: float, steps: float, chunks: int) -> Time:
    """The time of a kernel that takes chunks, counted as channels, by two sweeps, and looks ahead in between.

    Blocks are at all points of this at once, so that while one waits, others move bytes.
    """
    before, behind = (sweep(machine, kernel, channels, steps) for kernel in (first, then))
    looks = before.fill * _LOOKS / _LINES
    if not then.reads + then.again:  # all of it lies in shared memory
        behind = behind._replace(in_flight=0, fill=0)
    total = Time(*map(sum, zip(before, behind)))
    waits = total.fill + looks
    return total._replace(
        in_flight=max(total.in_flight + waits, chunks * _HOP), fill=_LINES * machine.latency, launch=machine.launch
    )


class Token(NamedTuple):
    """What a kernel takes that forms U of one token and takes the step, a warp for each channel."""

    lines: int  # of a row of the weight, 32 of which a warp reads at once
    depth: int  # those that are read ahead
    gates: int  # rows of a channel
    line: int  # bytes of a line
    x: int  # bytes of x, which every block fetches
    threads: int
    instructions: float  # of a lane for a line of each row
    chain: float  # clocks from the last product to the state


def token(machine: Machine, kernel: Token, channels: int, in_cache: bool) -> Time:
    """The time of such a kernel, of which the second-level cache has the weight if it is `in_cache`.

    All loads of a lane are under way before the first one arrives, up to `depth` lines.
    """
    k, clock = kernel, machine.clock
    warps = k.threads // 32
    blocks = -(-channels // warps)
    fullest = -(-blocks // machine.multiprocessors)  # blocks of one multiprocessor
    laps = -(-k.lines // 32)
    weight = channels * k.gates * k.lines * k.line
    of_one = fullest * (weight / blocks + k.x)
    return Time(
        memory=0 if in_cache else weight / machine.bandwidth,
        cache=max((weight + blocks * k.x) / machine.cache_bandwidth, of_one / machine.port_bandwidth),
        in_flight=(-(-laps // k.depth) - 1) * machine.latency,
        issue=-(-fullest * warps // SCHEDULERS) * laps * k.instructions / clock,
        special=0,
        chain=k.chain / clock,
        refill=0,
        fill=machine.latency,
        launch=machine.launch,
    )


def small_layer(
    machine: Machine, kernel: Kernel, own: Own, dtype: str, sequences: int, channels: int, steps: float
) -> Time:
    """The time of a kernel whose blocks form U themselves (cuda/gpu_small.h), of `channels` of each of `sequences`.

    Both directions of a sequence count as two. Nothing else runs while a block reads its weight and forms the first
    tile.
    """
    k, clock, most = kernel, machine.clock, machine.multiprocessors
    fullest = -(-sequences // most)
    waves, elements = -(-fullest // occupancy(machine, k)), sequences * channels * steps
    at_once = fullest / waves  # blocks of one multiprocessor
    work = -(-fullest * own.warps // SCHEDULERS) * steps
    tile = at_once * own.operations * most / (_OF_WARPS * machine.product_rate(dtype))
    moved = elements * (k.reads + k.writes)
    weight = own.weight * max(at_once / machine.port_bandwidth, sequences / waves / machine.cache_bandwidth)
    return Time(
        memory=(moved + own.weight) / machine.bandwidth,
        cache=moved / machine.cache_bandwidth,
        in_flight=waves * steps / own.rows * machine.latency,
        issue=work * k.instructions / clock,
        special=work * SCHEDULERS * 32 * k.special / machine.special_rate,
        chain=waves * steps * k.chain / clock,
        refill=0,
        fill=waves * (_LINES * machine.latency + weight + tile),
        launch=machine.launch,
        products=waves * max(0, steps / own.tile - 1) * tile,
    )


def occupancy(machine: Machine, kernel: Kernel) -> int:
    """Blocks that a multiprocessor holds at once: by threads, blocks, registers and shared memory."""
    threads, blocks, shared = machine.limits
    block = kernel.threads * kernel.warps
    here = min(threads // block, blocks, REGISTERS // (-(-kernel.registers // 8) * 8 * block))
    if kernel.shared:
        here = min(here, shared // (kernel.shared + 1024))  # of which the system takes a KiB
    return max(1, here)


def product(machine: Machine, dtype: str, m: int, n: int, k: int, tf32: bool = False) -> Time:
    """The time of a matrix product (m, k) by (k, n) of cuBLAS: operations, or bytes that are moved once."""
    size = {"float32": 4, "float64": 8}.get(dtype, 2)
    moved = size * (m * k + k * n + m * n)
    issue = 2 * m * n * k / machine.product_rate(dtype, tf32)
    fill = _LINES * machine.latency
    return Time(moved / machine.bandwidth, moved / machine.cache_bandwidth, 0, issue, 0, 0, 0, fill, machine.launch)


def together(times: Iterable[Time]) -> tuple[float, float]:
    """Seconds of kernels that follow each other, at best and at worst."""
    listed = list(times)
    return sum(t.best for t in listed), sum(t.worst for t in listed)
