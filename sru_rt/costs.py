"""What kernels take for a channel and step, as far as it can be told without compiling them: for `predict`.

Bytes and chains follow from the formula. Instructions and registers are estimates, fitted to the record of compiled
kernels (tests/gpu_budget.json), of which tests/test_machine.py says how near they come.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from . import shared_memory
from .cell import ADJOINT_OF_H, Cell, adjoint_of
from .decode import THREADS, Reads
from .dtypes import state_dtype
from .emit import activations
from .graph import LEAVES, Node, topological
from .predict import Kernel, Token
from .simplify import count_uses, softplus_shares
from .traffic import ITEMSIZE, moved, read, reduced, replayed
from .variant import Variant

# Clocks from an operand to the result; assumptions.
OPERATION, SPECIAL_OPERATION, SHUFFLE = 4, 20, 28
_CHAINS = {"sigmoid": 2 * OPERATION + 2 * SPECIAL_OPERATION, "tanh": 4 * OPERATION + 2 * SPECIAL_OPERATION}
_SHUFFLES = 5  # of a sum over a warp
# Instructions: of an operation, of a step beside its operations, of a load, of a store, of a 16-bit value.
_OPERATION, _STEP, _LOAD, _STORE, _HALF = 0.9, 4.0, 1.0, 1.2, 0.8
_COPY, _AGAIN = 2.5, 5.0  # the same of a copy of 16 bytes to shared memory; of a step that has a ring of its own
_ALONE = 2.6  # clocks of an instruction of a warp that has a scheduler nearly for itself, as measured on an H200
_MEETING = 150  # clocks that two warps lose where they meet, likewise
_OF = {"softplus_share": 19, "sigmoid": 4.4, "tanh": 15, "softplus": 14.5, "exp": 3, "log": 12, "sqrt": 8, "/": 8}
_SPECIAL_OF = {"softplus_share": 3, "sigmoid": 2, "tanh": 2, "softplus": 2, "exp": 1, "log": 1, "sqrt": 1, "/": 1}
_DOUBLE = 70  # instructions of a function in float64
_FOLD_WORDS, _FOLD_STEPS = 64, 16  # of the ring of summaries: see fold_depth in cuda/gpu_scan.h


def sweep(
    variant: Variant,
    forward: bool,
    every: int,
    *,
    width: int = 1,
    depth: int = 1,
    replay_depth: int = 1,
    threads: int = 32,
    shared: int = 0,
    held: Sequence[int] = (),
    staged: int = 0,
    laps: int = 0,
) -> Kernel:
    """A sweep over all steps or over those of a chunk; states are kept before every `every`-th step, 0: not at all.

    `held` are the sizes of what it reads from shared memory. If pieces are `staged` there, one is under way at least;
    if one alone is, each begins with a latency, if more are, another warp recomputes the states. With `laps` all comes
    through a ring in shared memory.
    """
    again = not forward and every > 1
    reads, writes = moved(variant, forward, every)
    twice, paired = again and not staged, staged > 1
    known = shared_memory.activations(variant, every, staged, threads * width) if paired else 0
    instructions, special = _instructions(variant, forward, width, known)
    pace = 0.0
    if again:
        more, special_more = _recomputing(variant, known)
        pace = max(instructions, more)
        instructions, special = instructions + more + (0 if staged else _AGAIN), special + special_more
    if staged:
        instructions += _COPY * sum(shared_memory.staged(variant).values()) / 16
        pace = _ALONE * width * (pace if paired else instructions)
    ahead = every if staged else depth
    if paired:
        part = shared_memory.part_of_pairs(every, staged)
        ahead, pace = max(1, (staged - 1) * every - part), pace + _MEETING / part
    if laps:
        ahead = shared_memory.ahead(forward, laps)
        instructions += _COPY * sum(shared_memory.ring(variant, forward).values()) / 16
    forwards, backwards = chain(variant.cell, True, False), chain(variant.cell, forward, False)
    return Kernel(
        reads=reads - sum(held),
        writes=writes,
        again=sum(replayed(variant)) if twice else 0,
        width=width,
        depth=ahead,
        replay_depth=replay_depth if twice else 0,
        refills=2 if twice else int(staged == 1),
        every=max(1, every),
        threads=threads,
        warps=2 if paired else 1,
        registers=_lap_registers(variant, forward, width, ring=laps > 0, paired=paired)
        if staged or laps
        else _registers(variant, forward, again, width, depth, replay_depth, _words(held, width)),
        shared=shared,
        instructions=instructions,
        special=special,
        pace=pace if staged else 0,
        chain=max(forwards, backwards) if paired else chain(variant.cell, forward, again),
        overlaps=staged > 0 or laps > 0,
        path=path(variant.cell, forward, again),
    )


def summaries(variant: Variant, forward: bool, *, width: int = 1, depth: int = 1, threads: int = 64) -> Kernel:
    """The kernel that summarises chunks, with all states kept."""
    cell, formula = variant.cell, variant.cell.formula
    results = formula.new_state if forward else [formula.gradient[name] for name in cell.state]
    arithmetic, special = _arithmetic(variant.dtype, [*results, *formula.jacobian])
    reads = reduced(variant, forward, keep=1)
    n = len(cell.state)
    return Kernel(
        reads=sum(reads),
        writes=0,
        width=width,
        depth=depth,
        threads=threads,
        registers=min(255, 40 + _words(reads, width) * depth),
        instructions=arithmetic + n * n * n + _STEP / width + _LOAD * len(reads),
        special=special,
        chain=max(chain(cell, forward, False), OPERATION * n),
    )


def guesses(variant: Variant, *, width: int = 1, depth: int = 1, threads: int = 64) -> Kernel:
    """The steps that a chunk makes its guess of."""
    arithmetic, special = _arithmetic(variant.dtype, variant.cell.formula.new_state)
    reads = replayed(variant)
    return Kernel(
        reads=sum(reads),
        writes=0,
        width=width,
        depth=depth,
        threads=threads,
        registers=min(255, 40 + _words(reads, width) * depth),
        instructions=arithmetic + _STEP / width + _LOAD * len(reads),
        special=special,
        chain=chain(variant.cell, True, False),
    )


def ends(variant: Variant, width: int = 1, threads: int = 64) -> Kernel:
    """A kernel that compares what chunks began and ended with; its steps are chunks."""
    n, size = len(variant.cell.state), ITEMSIZE[state_dtype(variant.dtype)]
    return Kernel(
        reads=2 * n * size,
        writes=n * size,
        width=width,
        depth=_FOLD_STEPS,
        threads=threads,
        registers=80,
        instructions=8 * n + _STEP / width,
        chain=OPERATION * n,
    )


def fold(variant: Variant, width: int = 1, threads: int = 64) -> Kernel:
    """The kernel that goes over the summaries; its steps are chunks."""
    n, size = len(variant.cell.state), ITEMSIZE[state_dtype(variant.dtype)]
    rows = n * (n + 1)
    words = rows * width * size // 4
    depth = max(1, _FOLD_WORDS // words) if words > 4 else _FOLD_STEPS
    return Kernel(
        reads=rows * size,
        writes=n * size,
        width=width,
        depth=depth,
        threads=threads,
        registers=min(255, 40 + words * depth),
        instructions=4 * rows + _STEP / width,
        chain=OPERATION * n,
    )


def token(variant: Variant, B: int, d_in: int, reads: Reads) -> Token:
    """The kernel that forms U of one token of B sequences, and takes the step."""
    gates, item = len(variant.cell.gates), ITEMSIZE[variant.dtype]
    in_line, halves = reads.line // item, 1 if item == 2 else 0
    # Of each element: of the weight a conversion and a product for each sequence; of x a conversion.
    elements = in_line * (gates * (halves + B) + B * halves)
    return Token(
        lines=d_in // in_line,
        depth=reads.depth,
        gates=gates,
        line=reads.line,
        x=B * d_in * item,
        threads=THREADS,
        instructions=elements + _STEP + _LOAD * (gates + B),
        chain=_SHUFFLES * SHUFFLE + chain(variant.cell, True, False),
    )


def clear() -> Kernel:
    """The kernel that clears the words of chunks that look ahead; its channels are words."""
    return Kernel(reads=0, writes=4, threads=256, instructions=_STEP)


def sums(variant: Variant) -> Kernel:
    """The kernel that adds up sums of sequences and chunks, eight threads a column; its steps are rows of a thread."""
    return Kernel(reads=ITEMSIZE[state_dtype(variant.dtype)], writes=0, depth=4, threads=256, instructions=4, chain=4)


def _words(streams: Iterable[int], width: int) -> int:
    """Registers of one step that is read ahead."""
    return sum(max(1, size * width // 4) for size in streams)


@lru_cache(maxsize=4096)
def _registers(
    variant: Variant, forward: bool, again: bool, width: int, depth: int, replay_depth: int, held: int
) -> int:
    """`held` are the words of a step that no ring has."""
    item = ITEMSIZE[variant.dtype]
    steps = [item] * (len(variant.cell.gates) + len(variant.cell.inputs))
    if forward:
        return min(255, round(24 + 1.45 * depth * (_words(steps, width) - held)))
    kept = [ITEMSIZE[state_dtype(variant.dtype)] * (width if again else 1)] * len(variant.cell.state)
    ring = depth * (_words([*steps, item, *kept], width) - held)
    if again:
        return min(255, round(60 + 1.1 * (ring + replay_depth * _words(replayed(variant), width))))
    return min(255, round(50 + 1.1 * ring + 14 * (width - 1)))


def _lap_registers(variant: Variant, forward: bool, width: int, ring: bool, paired: bool) -> int:
    """Of a lap, in which rows are read from shared memory as they are needed, whatever its steps."""
    words = _words(read(variant, forward, keep=1 if ring else 2), width)
    if paired:
        return round(45 + 4.5 * words)
    if not ring:
        return 50 + 6 * words
    return round(40 + (8.5 if forward else 7) * words)


@lru_cache(maxsize=1024)
def _instructions(variant: Variant, forward: bool, width: int, known: int) -> tuple[float, float]:
    """Instructions and special functions of a step, or of its gradient if `known` activations need not be computed."""
    cell, formula = variant.cell, variant.cell.formula
    results = [*formula.new_state, formula.h] if forward else [*formula.gradient.values()]
    found, special = _arithmetic(variant.dtype, results, activations(cell)[:known])
    steps = len(cell.gates) + len(cell.inputs)
    loads, stores = (steps, 1 + len(cell.state)) if forward else (steps + 1 + len(cell.state), steps)
    return found + _STEP / width + _LOAD * loads + _STORE * stores + _halves(variant, loads + stores), special


@lru_cache(maxsize=1024)
def _recomputing(variant: Variant, known: int) -> tuple[float, float]:
    """Instructions and special functions of the new states, of a step whose first `known` activations are kept."""
    found, special = _arithmetic(variant.dtype, variant.cell.formula.new_state)
    loads = len(replayed(variant))
    return found + _LOAD * loads + _STORE * known + _halves(variant, loads), special


def _halves(variant: Variant, moved: int) -> float:
    return moved * _HALF if ITEMSIZE[variant.dtype] == 2 else 0


def _arithmetic(dtype: str, results: Iterable[Any], known: Collection[Node] = ()) -> tuple[float, float]:
    outputs = [r for r in results if isinstance(r, Node)]
    order = topological(outputs, frozenset(known))
    shares = softplus_shares(order, count_uses(order, outputs))
    skipped = {*known, *(part for parts in shares.values() for part in parts)}
    ops = [
        "softplus_share" if node in shares else node.op
        for node in order
        if node.op not in LEAVES and node not in skipped
    ]
    special = sum(_SPECIAL_OF.get(op, 0) for op in ops)
    if dtype == "float64":
        return sum(_DOUBLE if op in _OF else 1.0 for op in ops), special / 2
    return sum(_OF.get(op, _OPERATION) for op in ops), special


@cache
def chain(cell: Cell, forward: bool, again: bool) -> int:
    """Clocks from the state before a step to that after it; backwards of their adjoints, and of recomputed states."""
    formula = cell.formula
    forwards = _longest({formula.leaves[name] for name in cell.state}, formula.new_state)
    if forward:
        return forwards
    adjoints = {adjoint_of(name) for name in cell.state}
    results = [formula.gradient[name] for name in cell.state]
    nodes = topological(r for r in results if isinstance(r, Node))
    seeds = {n for n in nodes if n.op == "input" and n.args[0] in adjoints and n.args[0] != ADJOINT_OF_H}
    return _longest(seeds, results) + (forwards if again else 0)


@cache
def path(cell: Cell, forward: bool, again: bool) -> int:
    """Clocks from what a step reads to all that it gives, of which a backward may have to recompute the state first."""
    formula = cell.formula
    steps = [[*formula.new_state, formula.h] if forward else [*formula.gradient.values()]]
    steps += [[*formula.new_state]] if again else []
    return sum(_longest(set(), results, of_all=True) for results in steps)


def _longest(first: set[Node], results: Iterable[Any], of_all: bool = False) -> int:
    """The longest way to the results from the nodes `first`, or from all that there are."""

    @cache
    def length(node: Any) -> float:
        if node in first:
            return 0
        if not isinstance(node, Node) or not node.args or node.op in LEAVES:
            return 0 if of_all else -math.inf
        return max(length(a) for a in node.args) + _CHAINS.get(node.op, OPERATION)

    return int(max(0, *(length(result) for result in results)))
