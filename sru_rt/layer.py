"""A layer: projection and recurrence together, forward and backward, for any cell. The cells' files call it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import launch, recurrence, repeat, replay
from .cell import Array, Cell
from .check import Check
from .dtypes import state_dtype, to_numpy
from .errors import ArgumentError, LibraryError
from .gradients import Gradients, wanted
from .inputs import Input
from .library import NDArray
from .options import Options, each_state, memory_policy, outputs, saved_dtype
from .projection import Projection
from .recurrence import Operands, Product
from .saved import Saved


def forward(
    check: Check,
    cell: Cell,
    dtype: str,
    values: Mapping[str, Any],
    constants: Sequence[float],
    options: Options,
    projected: Input | None = None,
) -> tuple[Any, ...]:
    """Checks what the cell is given, projects x if there is a projection, and runs the recurrence.

    Args:
        check: has the sizes of L, B, D, d.
        values: what the user gave, by name: the arrays that the cell declares (U only without a projection), and what
            a projection takes.

    Returns:
        (h, c_last), and `Saved` if the options ask for it. c_last is a tuple if there are several states.
    """
    library = check.library
    L, B, D, d = (check[axis] for axis in ("L", "B", "D", "d"))
    check.set("D*d", D * d, check.sizes["D"][1])
    check.choice("time_parallel", options.time_parallel, ("auto", True, False))
    lengths = check.lengths(options.lengths)
    mask, reset = check.flags("mask", options.mask), check.flags("reset", options.reset)
    arrays, c0 = _declared_arrays(check, cell, dtype, values)
    if library.layer:  # a framework that records what is done to its arrays
        flags = (lengths, mask, reset)
        return library.layer(check.function, cell, arrays, c0, constants, flags, options, projected)
    arrays = apart(cell, arrays, D)
    every = min(memory_policy(check, options.save), max(L, 1))
    kept_dtype = saved_dtype(check, options.saved_dtype, dtype)
    factors = projected.factors if projected else ()
    read = [*arrays.values(), *factors, lengths, mask, reset, projected.x if projected else None]
    h, c_last = outputs(check, options.out, dtype, c0, read)

    projection = None
    if projected:
        x, *own = (library.contiguous(a, to_numpy(dtype)) for a in (projected.x, *factors))
        projection = Projection(library, x, tuple(own), projected.window, lengths, mask, reset)
    declared = {a.name: a for a in cell.arrays}
    operands = Operands(
        cell=cell,
        dtype=dtype,
        arrays={name: recurrence.operand(declared[name], array, dtype, library) for name, array in arrays.items()},
        c0=[None if a is None else library.contiguous(a, to_numpy(state_dtype(dtype))) for a in c0],
        constants=constants,
        lengths=lengths,
        mask=mask,
        reset=reset,
        library=library,
        time_parallel=options.time_parallel,
        product=Product(projection.x, projection.factors[0]) if projection else None,
    )
    if projection:
        operands = _settled(operands, projection, every, options)
    made = recurrence.prepared_forward(
        operands, every, kept_dtype, None if h is None else h.reshape(L, B, D, d), c_last
    )
    made.run(library)
    replay.record(lambda: _replayed(check, values, options, operands, projection, projected, made))
    saved, kept = None, operands
    if every:
        if options.save == "x" and projection:
            kept = replace(operands, arrays={k: v for k, v in operands.arrays.items() if k != "u"})
        given = _given(cell, values)
        saved = Saved(check.function, given, kept, (L, B, D, d), made.saved, every, projection)
    saved = repeat.remember(check.names, options, projected, operands, made, saved)
    result = made.h.reshape(L, B, D * d) if h is None else h, _one_or_all(made.last)
    return (*result, saved) if saved else result


def _settled(operands: Operands, projection: Projection, every: int, options: Options) -> Operands:
    """The operands themselves if a kernel is to form U, else with U.

    None does if it is to keep states for a backward, which would form U with sums in another order.
    """
    library, d_in = operands.library, projection.x.shape[2]
    if not every and projection.is_plain:
        sizes, device = operands.sizes, library.device
        if options.in_workspace and launch.decodes(operands.dtype, sizes, d_in, device):
            return operands
        variant, chunk = operands.variant(state_dtype(operands.dtype)), operands.chunk or 0
        if launch.in_one_launch(variant, sizes, d_in, chunk, operands.time_parallel, device):
            return replace(operands, chunk=0)
    shared = options.in_workspace and not replay.is_recording()  # with other calls
    u = projection.u(library.workspace if shared else library.empty)
    return replace(operands, arrays={**operands.arrays, "u": u}, product=None)


def _replayed(
    check: Check,
    values: Mapping[str, Any],
    options: Options,
    operands: Operands,
    projection: Projection | None,
    projected: Input | None,
    made: recurrence.Prepared,
) -> replay.Forward:
    """What is left to do for the same arrays."""
    library, cell = operands.library, operands.cell
    states = [given for _, given in each_state(check, cell.initial, values.get(cell.initial), len(cell.state))]
    pairs = [(array, values.get(name)) for name, array in operands.arrays.items()]
    pairs += [*zip(operands.c0, states), (operands.mask, options.mask), (operands.reset, options.reset)]
    u = None
    if projection and projected:
        pairs += zip((projection.x, *projection.factors), (projected.source, *projected.factors))
    if operands.product:
        projection = None
    elif projection:
        (name,) = (a.name for a in cell.arrays if a.kind == "gates")
        u = operands.arrays[name]
        u = u.reshape(u.shape[0] * u.shape[1], -1)
    copies = replay.conversions(library, pairs)
    return replay.Forward(library, copies, projection, u, made.variant, made.arguments, (operands, made))


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _declared_arrays(
    check: Check, cell: Cell, dtype: str, values: Mapping[str, Any]
) -> tuple[dict[str, NDArray], list[NDArray | None]]:
    """The given arrays that the cell declares, checked against the axes that users give, and the initial states."""
    arrays: dict[str, NDArray] = {}
    states: list[NDArray | None] = []
    for a in cell.arrays:
        value, name, dtypes = values.get(a.name), check.names.get(a.name, a.name), _dtypes(a, dtype)
        if a.kind == "state":
            for one, array in each_state(check, name, value, len(a.members)):
                states.append(None if array is None else check.array(one, array, a.axes, dtypes))
        elif value is not None:
            arrays[a.name] = check.array(name, value, "L B D*d" if a.side_by_side else a.axes, dtypes)
    return arrays, states


def _dtypes(array: Array, dtype: str) -> tuple[str, ...]:
    """What an array beside x of `dtype` may be."""
    if array.kind == "gates":
        return (dtype,)
    flags = ("bool",) if array.kind == "per_sequence" or not array.differentiable else ()
    return *dict.fromkeys((dtype, "float32")), *flags


def apart(cell: Cell, arrays: Mapping[str, NDArray], D: int) -> dict[str, NDArray]:
    """Arrays by name, of which those that are side by side, (L, B, D*d), become (L, B, D, d), as kernels take them."""
    found = dict(arrays)
    for a in cell.arrays:
        if a.side_by_side and a.name in found:
            array = found[a.name]
            found[a.name] = array.reshape(*array.shape[:2], D, array.shape[2] // D)
    return found


def _given(cell: Cell, values: Mapping[str, Any]) -> dict[str, Any]:
    """The dtypes of what has a gradient, by name."""
    found = {name: _dtypes_of(value) for name, value in values.items()}
    for a in cell.arrays:
        if not a.differentiable or (found.get(a.name) is not None and str(found[a.name]) == "bool"):
            found.pop(a.name, None)
    return found


def _dtypes_of(value: Any) -> Any:
    """The dtype of an array, dtypes of a tuple, None of None."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_dtypes_of, value))
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
    if dh is None and dc_last is not None:
        L, B, D, d = saved.sizes
        dh = saved.operands.library.xp.zeros((L, B, D * d), to_numpy(saved.operands.dtype))
    key, given = repeat.key_of_backward(saved, dh, dc_last, need)
    known = repeat.known(key)
    if known is not None:
        found, dc0 = known(_with_u(saved), saved.states, given)
        return _gradients(saved, found, dc0, known.need, need is None)
    names = wanted(function, need, saved.given)
    operands = _with_u(saved)
    dh, dc_last = _seeds(Check(function, operands.library), saved, dh, dc_last)
    arrays = names - {operands.cell.initial}
    if saved.projection and names & {"x", "weight"}:
        arrays.add("u")
    found, dc0 = recurrence.backward(operands, saved.states, saved.every, dh, dc_last, arrays)
    repeat.remember_backward(key, given, saved, operands, [dh, *dc_last], arrays, names)
    return _gradients(saved, found, dc0, names, need is None)


def _gradients(
    saved: Saved, found: dict[str, NDArray], dc0: list[NDArray], names: Collection[str], with_none: bool
) -> Gradients:
    """The gradients called `names`, of what kernels have found; `with_none` also None of what was None."""
    cell, projection, values = saved.operands.cell, saved.projection, dict[str, Any](found)
    for a in cell.arrays:
        if a.side_by_side and a.name in values:
            values[a.name] = _side_by_side(values[a.name])
    values[cell.initial] = _one_or_all(dc0)
    if projection and "x" in names:
        values["x"] = projection.gradient_of_x(found["u"], values.get("x"))
    if projection and "weight" in names:
        values["weight"] = _one_or_all(projection.gradient_of_weight(found["u"]))
    result = {name: _cast(values[name], saved.given[name]) for name in saved.given if name in names}
    if with_none:
        result |= {name: None for name, given in saved.given.items() if given is None}
    return Gradients(result, list(saved.given))


def _side_by_side(array: NDArray) -> NDArray:
    """(L, B, D, d) as (L, B, D*d)."""
    L, B, D, d = array.shape
    return array.reshape(L, B, D * d)


def _with_u(saved: Saved) -> Operands:
    """The operands, with U formed again if it was dropped."""
    operands = saved.operands
    if "u" in operands.arrays:
        return operands
    if saved.projection is None:
        raise ArgumentError(
            f"{saved.function}: saved holds neither U nor what it is made from; keep saved as it was returned"
        )
    return replace(operands, arrays={**operands.arrays, "u": saved.projection.u()})


def _seeds(check: Check, saved: Saved, dh: Any, dc_last: Any) -> tuple[NDArray, list[NDArray | None]]:
    """The gradients of h and of the last states as kernels take them; None is zeros."""
    L, B, D, d = saved.sizes
    for axis, size in zip(("L", "B", "D", "d", "D*d"), (L, B, D, d, D * d)):
        check.set(axis, size, saved.function)
    dtype, library, name = saved.operands.dtype, check.library, f"d{saved.operands.cell.last}"
    state = state_dtype(dtype)
    if dh is None:
        raise check.error("dh", f"and {name} are both None; give the gradient of at least one result")
    dh = check.array("dh", dh, "L B D*d", (dtype, state))
    last: list[NDArray | None] = []
    for one, array in each_state(check, name, dc_last, len(saved.operands.cell.state)):
        if array is not None:
            array = library.contiguous(check.array(one, array, "D B d", (state, dtype)), to_numpy(state))
        last.append(array)
    return library.contiguous(dh, to_numpy(dtype)), last


def _cast(value: Any, given: Any) -> Any:
    """Gradients in the dtypes of what they are the gradients of; None of None."""
    if isinstance(value, tuple):
        return tuple(_cast(v, g) for v, g in zip(value, given))
    return None if given is None else value.astype(given, copy=False)
