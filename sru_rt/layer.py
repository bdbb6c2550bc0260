"""A layer: projection and recurrence together, forward and backward, for any cell. The cells' files call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import recurrence
from .cell import Cell
from .check import Check
from .dtypes import state_dtype, to_numpy
from .errors import ArgumentError, LibraryError, ShapeError
from .gradients import Gradients, nbytes, wanted
from .library import Library, NDArray
from .projection import Weight, gradient_of_weight, gradient_of_x, project
from .recurrence import Operands

# Steps between kept states where the user leaves it to us: long enough that they weigh little beside x and h, short
# enough that a recomputed piece stays in the cache.
_DEFAULT_EVERY = 32


@dataclass(frozen=True, eq=False)
class Saved:
    """What a forward function keeps for its backward.

    It holds the arrays that were given, not copies, where they needed no conversion: do not change them in between.
    """

    function: str
    given: Mapping[str, Any]  # what the user gave, by name: dtypes, pairs of dtypes, or None
    operands: Operands
    sizes: tuple[int, int, int, int]  # L, B, D, d
    states: Sequence[NDArray]
    every: int
    x: NDArray | None = None  # (L*B, d_in)
    weight: Weight | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held, those of the caller included."""
        held = (dict(self.operands.arrays), list(self.operands.c0), list(self.states), self.x)
        return nbytes((*held, self.weight.factors if self.weight else ()), self.operands.library.pointer)

    def __repr__(self) -> str:
        L, B, D, d = self.sizes
        kept = "every state" if self.every == 1 else f"every {self.every}th state"
        return f"<saved by {self.function}: L={L} B={B} D={D} d={d}, {self.operands.dtype}, {kept}>"


def weight(check: Check, value: Any, dtype: str, direction_axes: str = "D k d") -> tuple[NDArray, ...]:
    """Checks a weight (D, k, d, d_in), or a pair (P, Q) of (D, k, d, p) and (p, d_in)."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise check.error("weight", f"is a tuple of {len(value)}; a low-rank weight is a pair (P, Q)", ShapeError)
        arrays: tuple[NDArray, ...] = (
            check.array("weight[0]", value[0], f"{direction_axes} p", (dtype,)),
            check.array("weight[1]", value[1], "p d_in", (dtype,)),
        )
    else:
        arrays = (check.array("weight", value, f"{direction_axes} d_in", (dtype,)),)
    check_directions(check, "weight")
    return arrays


def check_directions(check: Check, name: str) -> None:
    if check["D"] not in (1, 2):
        raise check.error(
            name, f"has D = {check['D']} directions; D is 1 (forward) or 2 (forward, reverse)", ShapeError
        )


def memory_policy(check: Check, save: Any) -> int:
    """The number of steps between kept states; 0 for none."""
    if save is False or save is None:
        return 0
    if isinstance(save, str) and save == "x":
        return _DEFAULT_EVERY
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
    check: Check, out: Any, dtype: str, given: Sequence[NDArray | None]
) -> tuple[NDArray | None, NDArray | None]:
    """Checks `out`, a pair (h, c) of which either may be None."""
    if out is None:
        return None, None
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise check.error("out", f"must be a pair (h, c) of arrays or None (got {type(out).__name__})")
    shapes = (("out[0]", "L B D*d", dtype), ("out[1]", "D B d", state_dtype(dtype)))
    library, results = check.library, []
    for array, (name, axes, needed) in zip(out, shapes):
        if array is not None:
            array = check.array(name, array, axes, (needed,))
            if needed := library.not_writable(array):
                raise check.error(name, f"must be {needed}; pass {library.name}.empty(...)")
            if any(_overlap(library, array, a) and not _same(library, array, a, name) for a in given):
                raise check.error(name, "overlaps an input; pass memory of its own")
        results.append(array)
    if results[0] is not None and _overlap(library, results[0], results[1]):
        raise check.error("out", "has overlapping arrays; pass memory of its own for each")
    return results[0], results[1]


def _overlap(library: Library, array: NDArray, other: NDArray | None) -> bool:
    return other is not None and bool(library.xp.may_share_memory(array, other))


def _same(library: Library, array: NDArray, other: NDArray, name: str) -> bool:
    """The state may be updated in place."""
    same = library.pointer(array) == library.pointer(other)
    return same and array.shape == other.shape and array.dtype == other.dtype and name == "out[1]"


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


@dataclass(frozen=True)
class Projection:
    """x (L, B, d_in) and the factors of the weight, checked."""

    x: NDArray
    factors: tuple[NDArray, ...]


def forward(
    check: Check,
    cell: Cell,
    dtype: str,
    values: Mapping[str, Any],
    constants: Sequence[float],
    options: Options,
    projection: Projection | None = None,
) -> tuple[Any, ...]:
    """Checks what the cell is given, projects x if there is a projection, and runs the recurrence.

    Args:
        check: has the sizes of L, B, D, d.
        values: what the user gave, by name: the arrays that the cell declares (U only without a projection), and what
            a projection takes.

    Returns:
        (h, c_last), and `Saved` if the options ask for it.
    """
    library = check.library
    L, B, D, d = (check[axis] for axis in ("L", "B", "D", "d"))
    check.set("D*d", D * d, check.sizes["D"][1])
    check.choice("time_parallel", options.time_parallel, ("auto", True, False))
    every = min(memory_policy(check, options.save), max(L, 1))
    kept_dtype = saved_dtype(check, options.saved_dtype, dtype)
    lengths = check.lengths(options.lengths)
    mask, reset = check.flags("mask", options.mask), check.flags("reset", options.reset)
    arrays = _declared_arrays(check, cell, dtype, values)
    factors = projection.factors if projection else ()
    read = [*arrays.values(), *factors, lengths, mask, reset, projection.x if projection else None]
    h, c_last = outputs(check, options.out, dtype, read)

    declared = {a.name: a for a in cell.arrays}
    given = {n: _dtypes_of(v) for n, v in values.items() if n not in declared or declared[n].kind != "per_sequence"}
    rows, weight = None, None
    if projection:
        weight, rows = Weight.of(factors, library), library.contiguous(projection.x, to_numpy(dtype))
        rows = rows.reshape(L * B, check["d_in"])
        arrays["u"] = project(rows, weight).reshape(L, B, D, check["k"], d)
    c0 = arrays.pop(next(a.name for a in cell.arrays if a.kind == "state"), None)
    operands = Operands(
        cell=cell,
        dtype=dtype,
        arrays={name: recurrence.operand(declared[name], array, dtype, library) for name, array in arrays.items()},
        c0=[None if c0 is None else library.contiguous(c0, to_numpy(state_dtype(dtype)))],
        constants=constants,
        lengths=lengths,
        mask=mask,
        reset=reset,
        library=library,
        time_parallel=options.time_parallel,
    )
    h = None if h is None else h.reshape(L, B, D, d)
    h, states_last, states = recurrence.forward(operands, every, kept_dtype, h, [c_last])
    result = (h.reshape(L, B, D * d), states_last[0])
    if not every:
        return result
    if options.save == "x" and projection:
        operands = replace(operands, arrays={k: v for k, v in operands.arrays.items() if k != "u"})
    return *result, Saved(check.function, given, operands, (L, B, D, d), states, every, rows, weight)


def _declared_arrays(check: Check, cell: Cell, dtype: str, values: Mapping[str, Any]) -> dict[str, NDArray]:
    """The given arrays that the cell declares, checked against their declared axes."""
    small = tuple(dict.fromkeys((dtype, "float32")))
    dtypes = {"gates": (dtype,), "per_sequence": (*small, "bool")}
    return {
        a.name: check.array(check.names.get(a.name, a.name), values[a.name], a.axes, dtypes.get(a.kind, small))
        for a in cell.arrays
        if values.get(a.name) is not None
    }


def _dtypes_of(value: Any) -> Any:
    """The dtype of an array, dtypes of a pair, None of None."""
    if isinstance(value, (tuple, list)):
        return tuple(v.dtype for v in value)
    return None if value is None else value.dtype


def backward(function: str, saved: Any, dh: Any, dc_last: Any, need: Any) -> Gradients:
    """The gradients of what the forward was given, in the dtypes of what was given."""
    if not isinstance(saved, Saved):
        raise LibraryError(
            f"{function}: saved must be the third result of a forward function with save=... (got "
            f"{type(saved).__qualname__})"
        )
    with saved.operands.library.current():
        return _backward(function, saved, dh, dc_last, need)


def _backward(function: str, saved: Saved, dh: Any, dc_last: Any, need: Any) -> Gradients:
    names = wanted(function, need, saved.given)
    operands = _with_u(saved)
    dh, dc_last = _seeds(Check(function, operands.library), saved, dh, dc_last)
    wanted_arrays = {name for name in names if name != "c0"}
    if names & {"x", "weight"} and saved.weight is not None:
        wanted_arrays.add("u")
    if "x" not in names:
        wanted_arrays.discard("x")
    found, dc0 = recurrence.backward(operands, saved.states, saved.every, dh, [dc_last], wanted_arrays)
    values: dict[str, Any] = dict(found)
    values["c0"] = dc0[0]
    if saved.weight is not None:
        values |= _through_projection(saved, operands, found, names)
    elif "x" in found:
        L, B, D, d = operands.sizes
        values["x"] = found["x"].reshape(L, B, D * d)
    result = {name: _cast(values[name], saved.given[name]) for name in saved.given if name in names}
    result |= {name: None for name, given in saved.given.items() if given is None and need is None}
    return Gradients(result, list(saved.given))


def _through_projection(
    saved: Saved, operands: Operands, found: Mapping[str, NDArray], names: set[str]
) -> dict[str, Any]:
    """The gradients of x and weight from that of U, and from that of x as an input of the cell."""
    if saved.weight is None or saved.x is None or "u" not in found:
        return {}
    values: dict[str, Any] = {}
    L, B, D, d = operands.sizes
    k = found["u"].shape[3]
    du = found["u"].reshape(L * B, D * k * d)
    if "x" in names:
        skip = found["x"].reshape(L * B, D * d) if "x" in found else None
        values["x"] = gradient_of_x(du, saved.weight, skip).reshape(L, B, saved.x.shape[1])
    if "weight" in names:
        gradients = gradient_of_weight(du, saved.x, saved.weight, _absent(operands))
        outer = gradients[0].reshape(D, k, d, gradients[0].shape[-1])
        values["weight"] = (outer, *gradients[1:]) if len(gradients) > 1 else outer
    return values


def _with_u(saved: Saved) -> Operands:
    """The operands, with U formed again if it was dropped."""
    operands = saved.operands
    if "u" in operands.arrays:
        return operands
    if saved.x is None or saved.weight is None:
        raise ArgumentError(
            f"{saved.function}: saved holds neither U nor what it is made from; keep saved as it was returned"
        )
    L, B, D, d = saved.sizes
    u = project(saved.x, saved.weight)
    k = saved.weight.factors[0].shape[0] // (D * d)
    return replace(operands, arrays={**operands.arrays, "u": u.reshape(L, B, D, k, d)})


def _absent(operands: Operands) -> NDArray | None:
    """(L*B,) True where a step is padding, None if there is none."""
    if operands.lengths is None and operands.mask is None:
        return None
    L, B, _, _ = operands.sizes
    xp = operands.library.xp
    absent = xp.zeros((L, B), bool) if operands.mask is None else operands.mask.copy()
    if operands.lengths is not None:
        absent |= xp.arange(L)[:, None] >= operands.lengths
    return absent.reshape(-1)


def _seeds(check: Check, saved: Saved, dh: Any, dc_last: Any) -> tuple[NDArray, NDArray | None]:
    """The gradients of h and c_last as kernels take them; None is zeros."""
    L, B, D, d = saved.sizes
    for axis, size in zip(("L", "B", "D", "d", "D*d"), (L, B, D, d, D * d)):
        check.set(axis, size, saved.function)
    dtype, library = saved.operands.dtype, check.library
    state = state_dtype(dtype)
    if dh is None and dc_last is None:
        raise check.error("dh", "and dc_last are both None; give the gradient of at least one result")
    if dh is None:
        dh = library.xp.zeros((L, B, D * d), to_numpy(dtype))
    dh = check.array("dh", dh, "L B D*d", (dtype, state))
    if dc_last is not None:
        dc_last = library.contiguous(check.array("dc_last", dc_last, "D B d", (state, dtype)), to_numpy(state))
    return library.contiguous(dh, to_numpy(dtype)), dc_last


def _cast(value: Any, given: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(v, g) for v, g in zip(value, given))
    return value.astype(given, copy=False)
