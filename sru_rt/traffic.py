"""What one step of a recurrence reads and writes in memory, in bytes of each element."""

from __future__ import annotations

from functools import cache

from .cell import ADJOINT_OF_H, Cell
from .dtypes import state_dtype
from .graph import topological
from .variant import Variant

# Steps between kept states where the user leaves it to us: long enough that they weigh little beside x and h, short
# enough that a recomputed piece stays in the cache, or in the shared memory of a GPU's block.
USUAL_EVERY = 32
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def read(variant: Variant, forward: bool, keep: int) -> list[int]:
    """Sizes of what one step reads; of a backward, all states are kept if `keep` is 1, else recomputed."""
    sizes = [*_inputs(variant).values()]
    if not forward:
        sizes += [ITEMSIZE[variant.dtype], *_states(variant, keep)]
    return sizes


def _states(variant: Variant, keep: int) -> list[int]:
    """Sizes of the states that a backward reads."""
    dtype = variant.saved_dtype if keep == 1 else state_dtype(variant.dtype)
    return [ITEMSIZE[dtype]] * len(variant.cell.state)


def moved(variant: Variant, forward: bool, every: int) -> tuple[float, float]:
    """Bytes that one step reads and writes, each array once.

    States are kept before every `every`-th step, 0: not at all. What is recomputed is read once more.
    """
    given = sum(_inputs(variant).values())
    kept = len(variant.cell.state) * ITEMSIZE[variant.saved_dtype] / every if every else 0
    h = ITEMSIZE[variant.dtype]
    return (given, h + kept) if forward else (given + h + kept, given)


def replayed(variant: Variant) -> list[int]:
    """Sizes of what one step reads of which only the new state is wanted."""
    nodes = topological(variant.cell.formula.new_state)
    used = {node.args[0] for node in nodes if node.op == "input"}
    return [size for name, size in _inputs(variant).items() if name in used]


def reduced(variant: Variant, forward: bool, keep: int) -> list[int]:
    """Sizes of what one step reads where a chunk of time is summarised; empty for a cell of too many states."""
    used = _in_summary(variant.cell, forward)
    sizes = [size for name, size in _inputs(variant).items() if name in used]
    if ADJOINT_OF_H in used:
        sizes.append(ITEMSIZE[variant.dtype])
    return sizes if forward or not reduction_reads_state(variant.cell) else sizes + _states(variant, keep)


def summarised(variant: Variant, forward: bool) -> int:
    """The same as bits: bit i stands for element i of `read`."""
    used, cell = _in_summary(variant.cell, forward), variant.cell
    names = [*_inputs(variant)]
    if not forward:
        names += [ADJOINT_OF_H, *cell.state]
        used |= set(cell.state) if reduction_reads_state(cell) else set()
    return sum(1 << i for i, name in enumerate(names) if name in used)


def reduction_reads_state(cell: Cell) -> bool:
    """Whether summaries of a backward depend on the states."""
    return not _in_summary(cell, forward=False).isdisjoint(cell.state)


@cache
def _in_summary(cell: Cell, forward: bool) -> frozenset[str]:
    """The names of all that the new states, or the adjoints of the old ones, and the Jacobian depend on."""
    formula = cell.formula
    results = formula.new_state if forward else [formula.gradient[name] for name in cell.state]
    nodes = topological([*results, *formula.jacobian]) if formula.jacobian else []
    return frozenset(node.args[0] for node in nodes if node.op == "input")


def _inputs(variant: Variant) -> dict[str, int]:
    """Sizes of the elements of gates and inputs, by name."""
    item, state = ITEMSIZE[variant.dtype], ITEMSIZE[state_dtype(variant.dtype)]
    wide = {name: state if variant.wide >> i & 1 else item for i, name in enumerate(variant.cell.inputs)}
    return dict.fromkeys(variant.cell.gates, item) | wide
