"""What every forward function takes beside the arrays of its cell: memory policy, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .check import Check
from .dtypes import state_dtype
from .library import Library, NDArray
from .traffic import USUAL_EVERY


@dataclass(frozen=True)
class Options:
    """What every forward function of every cell takes beside the cell's own arguments."""

    lengths: Any = None
    mask: Any = None
    reset: Any = None
    time_parallel: bool | str = "auto"
    save: bool | int | str = False
    saved_dtype: Any = None
    out: Any = None
    in_workspace: bool = False  # U is needed no longer than the call


def memory_policy(check: Check, save: Any) -> int:
    """The number of steps between kept states; 0 for none."""
    if save is False or save is None:
        return 0
    if isinstance(save, str) and save == "x":
        return USUAL_EVERY
    if isinstance(save, (bool, int, np.integer)) and save >= 1:
        return int(save)
    raise check.error("save", f"must be False, True, a number K >= 1 of steps, or 'x' (got {save!r})")


def saved_dtype(check: Check, value: Any, dtype: str) -> str:
    """The dtype of kept states: that of the state, or x's own where it has 16 bits."""
    choices = tuple(dict.fromkeys((state_dtype(dtype), dtype)))
    if value is None:
        return choices[0]
    try:
        name = np.dtype(value).name
    except TypeError:
        name = str(value)
    if name not in choices:
        raise check.error("saved_dtype", f"must be {' or '.join(choices)} for x of {dtype} (got {name!r})")
    return name


def outputs(
    check: Check, out: Any, dtype: str, c0: Sequence[NDArray | None], given: Sequence[NDArray | None]
) -> tuple[NDArray | None, Sequence[NDArray | None]]:
    """Checks `out`, a pair (h, c) of which either may be None; c is a tuple if there are several states.

    The states may be updated in place; beside that, nothing may overlap.
    """
    if out is None:
        return None, [None] * len(c0)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise check.error("out", f"must be a pair (h, c) of arrays or None (got {type(out).__name__})")
    h = _output(check, "out[0]", out[0], "L B D*d", dtype, [*given, *c0])
    last = []
    for i, (name, array) in enumerate(each_state(check, "out[1]", out[1], len(c0))):
        others = [a for j, a in enumerate(c0) if j != i or not _same(check.library, array, a)]
        last.append(_output(check, name, array, "D B d", state_dtype(dtype), [*given, *others]))
    written = [array for array in (h, *last) if array is not None]
    if any(_overlap(check.library, a, b) for i, a in enumerate(written) for b in written[:i]):
        raise check.error("out", "has overlapping arrays; pass memory of its own for each")
    return h, last


def _output(
    check: Check, name: str, array: Any, axes: str, dtype: str, others: Sequence[NDArray | None]
) -> NDArray | None:
    if array is None:
        return None
    library, array = check.library, check.array(name, array, axes, (dtype,))
    if needed := library.not_writable(array):
        raise check.error(name, f"must be {needed}; pass {library.name}.empty(...)")
    if any(_overlap(library, array, a) for a in others):
        raise check.error(name, "overlaps an input; pass memory of its own")
    return array


def _overlap(library: Library, array: NDArray, other: NDArray | None) -> bool:
    return other is not None and bool(library.xp.may_share_memory(array, other))


def _same(library: Library, array: Any, other: NDArray | None) -> bool:
    if other is None or type(array) is not type(other):
        return False
    same = library.pointer(array) == library.pointer(other)
    return same and array.shape == other.shape and array.dtype == other.dtype


def each_state(check: Check, name: str, value: Any, n: int) -> list[tuple[str, Any]]:
    """Names and values of what is given for each state: a tuple where there are several, None for none."""
    if value is None:
        return [(name, None)] * n
    if n == 1:
        return [(name, value)]
    if not isinstance(value, (tuple, list)) or len(value) != n:
        got = f"{len(value)} of them" if isinstance(value, (tuple, list)) else type(value).__name__
        raise check.error(name, f"must be a tuple of {n}, one for each state (got {got})")
    return [(f"{name}[{i}]", one) for i, one in enumerate(value)]
