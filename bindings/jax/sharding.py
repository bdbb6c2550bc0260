"""How a recurrence is divided among devices: over sequences and channels, which know nothing of each other.

Time and directions stay whole: a direction goes the way that its number says. Gradients of parameters are sums over
sequences, and so are summed over the devices that share these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ... import spec
from ...cell import Array
from ...passes import declared
from .statement import Stated, Statement, wanted

_DIVIDED = ("b", "d")  # the axes that may be
_Letters = tuple[str, ...]


def partitioned(statement: Statement, run: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A pass on arrays that may be divided among devices, from one on arrays that are whole."""
    operands, results = letters(statement)

    def partition(mesh: Any, given: Sequence[Any], made: Sequence[Any]) -> Any:
        axes = _axes(mesh, (*operands, *results), (*given, *made))
        shardings = [[_sharding(mesh, one, axes) for one in each] for each in (operands, results)]

        def run_part(*arrays: Any) -> tuple[Any, ...]:
            return tuple(
                one if "b" in its or not axes["b"] else _summed(one, axes["b"])
                for its, one in zip(results, run(*arrays))
            )

        return mesh, run_part, tuple(shardings[1]), tuple(shardings[0])

    def infer(mesh: Any, given: Sequence[Any], made: Sequence[Any]) -> Any:
        axes = _axes(mesh, operands, given)
        return tuple(_sharding(mesh, one, axes) for one in results)

    divided = custom_partitioning(run)
    rule = " -> ".join(", ".join(" ".join(one) for one in each) for each in (operands, results))
    whole = tuple(dict.fromkeys(one for each in (*operands, *results) for one in each if one not in _DIVIDED))
    options = {"partition": partition, "infer_sharding_from_operands": infer, "sharding_rule": rule}
    try:
        divided.def_partition(**options, need_replication_factors=whole)
    except (TypeError, ValueError):  # earlier releases of JAX do not ask for it
        divided.def_partition(**options)
    return divided


def _summed(array: Any, axes: tuple[str, ...]) -> Any:
    """The sum over devices. With psum JAX 0.7 makes a program here that XLA's CPU refuses."""
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 8):
        return jax.lax.all_gather(array, axes).sum(0)
    return jax.lax.psum(array, axes)


def letters(statement: Statement) -> tuple[list[_Letters], list[_Letters]]:
    """The axes of the operands and of the results of a pass; those of one letter are divided alike."""
    cell = spec.cell_of(statement.stated.cell)
    n = ("n",) if len(cell.state) > 1 else ()
    state, saved, h = (*n, "q", "b", "d"), (*n, "s", "b", "q", "d"), ("l", "b", "q", "d")
    flags = [("b",), ("l", "b"), ("l", "b")]
    every = [("l", "b", "q", "k", "d"), state, *flags, *(_of(a, i) for i, a in enumerate(declared(cell)))]
    given = [one for one, there in zip(every, statement.given) if there]
    if not statement.backward:
        return given, [h, state, *([saved] if statement.stated.keep else [])]
    given += [saved, h, *([state] if statement.dlast else [])]
    return given, [*(every[i] for i in wanted(statement.need)), state]


def _of(array: Array, number: int) -> _Letters:
    known = {"L": "l", "B": "b", "D": "q", "d": "d"}
    return tuple(known.get(axis, f"m{number}") for axis in array.axes.split())


def _axes(mesh: Any, names: Sequence[_Letters], shapes: Sequence[Any]) -> dict[str, Any]:
    """The axes of the mesh over which sequences and channels are divided: as the first array has them."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(_DIVIDED, ())
    for its, shape in zip(names, shapes):
        sharding = shape.sharding
        if not isinstance(sharding, NamedSharding):
            continue
        for letter, size, axes in zip(its, shape.shape, sharding.spec):
            if letter not in _DIVIDED or found[letter] or not axes:
                continue
            axes = axes if isinstance(axes, tuple) else (axes,)
            taken = {axis for others in found.values() for axis in others}
            if not taken & set(axes) and size % prod(mesh.shape[axis] for axis in axes) == 0:
                found[letter] = axes
    return found


def _sharding(mesh: Any, its: _Letters, axes: dict[str, Any]) -> Any:
    return NamedSharding(mesh, PartitionSpec(*(axes.get(letter) or None for letter in its)))


# ----------------------------------------------------------------------------------------------------------------------
# Meshes whose axes are explicit: there types say how arrays are divided


def automatic(function: Callable[..., Any], stated: Stated, rows: Any, weight: Any, axis: int, *given: Any) -> Any:
    """Calls a function that gives h and the last states; inside of it, axes of a mesh are left to the compiler.

    Args:
        rows: an array (L, B, ...): the results are divided over sequences as it is.
        weight: one with an axis of d at `axis`, for channels; with two directions h has them side by side, and whole.
    """
    mesh = jax.sharding.get_abstract_mesh() if hasattr(jax.sharding, "get_abstract_mesh") else None
    explicit = getattr(mesh, "explicit_axes", ())
    if not explicit:
        return function(*given)
    b, d = jax.typeof(rows).sharding.spec[1], jax.typeof(weight).sharding.spec[axis]
    D = weight.shape[axis - 2]
    last = (*(None,) * (len(spec.cell_of(stated.cell).state) > 1), None, b, d)
    out = PartitionSpec(None, b, d if D == 1 else None), PartitionSpec(*last)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out)(*given)


# ----------------------------------------------------------------------------------------------------------------------
# shard_map, which keeps count of the axes of a mesh over which each array varies


def varying(array: Any) -> frozenset[str]:
    """The axes of a mesh over which an array varies inside a `shard_map` that checks it; none elsewhere."""
    found = jax.typeof(array) if hasattr(jax, "typeof") else None
    found = getattr(found, "manual_axis_type", found)
    return frozenset(getattr(found, "varying", getattr(found, "vma", ())))


def alike(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays, or None, that all vary over the axes over which any of them does."""
    union = frozenset().union(*(varying(a) for a in arrays if a is not None))
    return tuple(a if a is None else _cast(a, tuple(sorted(union - varying(a)))) for a in arrays)


def _cast(array: Any, axes: tuple[str, ...]) -> Any:
    if not axes:
        return array
    return jax.lax.pcast(array, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, axes)


def like(array: Any, shape: Sequence[Any], dtype: Any) -> Any:
    """The type of a result that varies as an array does."""
    axes = varying(array)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    found = jax.typeof(array)
    if not hasattr(found, "manual_axis_type"):
        return jax.ShapeDtypeStruct(shape, dtype, vma=axes)
    whole = found.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return found.update(shape=tuple(shape), dtype=dtype, sharding=whole, weak_type=False)
