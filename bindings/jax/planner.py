"""From a statement and the buffers of a custom call to a pass that is ready to run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from ... import spec
from ...dtypes import state_dtype
from ...errors import ArgumentError, DtypeError, ShapeError
from ...passes import Layout, Passes, declared, shape_of_h
from ...prepared import Prepared
from . import sharding
from .statement import Statement, wanted

_LENGTHS = 2  # among the operands


class Planned(NamedTuple):
    """A pass, and which buffer each of its addresses is, after the constants; None: it is not there."""

    prepared: Prepared
    constants: tuple[float, ...]
    buffers: Sequence[int | None]

    def run(self, addresses: Sequence[int], stream: int = 0) -> None:
        """Runs the pass on buffers at these addresses."""
        found = [0 if i is None else addresses[i] for i in self.buffers]
        self.prepared.run([*self.constants, *found], stream)


def folded(shape: Sequence[Any], letters: Sequence[str], D: int) -> tuple[Any, ...]:
    """The shape of a buffer: without the axis of directions where there is one, as XLA copies arrays to add it."""
    return tuple(size for size, letter in itertools.zip_longest(shape, letters) if D != 1 or letter != "q")


def unfolded(shape: Sequence[int], letters: Sequence[str]) -> tuple[int, ...]:
    """The shape of an array, of that of its buffer."""
    if "q" not in letters or len(shape) == len(letters):
        return tuple(shape)
    left = iter(shape)
    return tuple(1 if letter == "q" else next(left) for letter in letters)


def passes_of(
    statement: Statement, operands: Sequence[Layout], device: str, *, settled: bool = True
) -> tuple[Passes, list[Layout | None]]:
    """The passes of a custom call's operands, and the operands of the recurrence among these.

    Chunks of time are those of the statement, unless they are not settled yet.
    """
    left = iter(operands)
    o = [next(left) if there else None for there in statement.given]
    _check_dtypes(statement, [*o, *left])
    lengths = o[_LENGTHS]
    if lengths is not None:
        o[_LENGTHS] = Layout(lengths.shape[:1], "int64")
    return Passes(statement.stated.call, o, device, chunks=statement.chunks if settled else None), o


def _check_dtypes(statement: Statement, arrays: Sequence[Layout | None]) -> None:
    """Raises unless operands, and what a backward is given beside them, have the dtypes that kernels take."""
    cell = spec.cell_of(statement.stated.cell)
    u = arrays[0].dtype if arrays[0] else ""
    acc = state_dtype(u)
    names = ["u", cell.initial, "lengths", "mask", "reset", *(a.name for a in declared(cell)), "saved", "dh", "dlast"]
    taken = [(u,), (acc,), ("int32",), ("bool",), ("bool",)]
    taken += [(u, acc) if a.kind == "inputs" else (acc,) for a in declared(cell)]
    for name, dtypes, array in zip(names, [*taken, (acc,), (u,), (acc,)], arrays):
        if array is not None and array.dtype not in dtypes:
            way = "enable jax_enable_x64 in every thread" if u == "float64" else "export the program again"
            raise DtypeError(
                f"recurrence of {cell.name}: {name} has dtype {array.dtype}; beside u of {u} it needs "
                f"{' or '.join(dtypes)}: {way}"
            )


def planned(statement: Statement, operands: Sequence[Layout], results: Sequence[Layout], device: str) -> Planned:
    """The pass that a custom call is.

    Raises:
        ShapeError, DtypeError, ArgumentError: the buffers do not fit what is stated.
        CompileError: there is no working compiler.
    """
    n = sum(statement.given) + statement.backward * (2 + statement.dlast)
    if n != len(operands):
        raise ArgumentError(f"sru_rt: a custom call has {len(operands)} operands; its statement needs {n}")
    letters, _ = sharding.letters(statement)
    operands = [one._replace(shape=unfolded(one.shape, its)) for one, its in zip(operands, letters)]
    passes, o = passes_of(statement, operands, device)
    number = iter(range(n + len(results)))
    at = [next(number) if there else None for there in statement.given]
    gradients: list[Layout | None] = []
    if statement.backward:
        at += [next(number), next(number), next(number) if statement.dlast else None]
        saved, dh, *dlast = operands[sum(statement.given) :]
        of_h = Layout(shape_of_h(o[0].shape) if o[0] else (), dh.dtype)
        made = passes.backward(saved, of_h, dlast[0] if dlast else None, statement.need)
        chosen = wanted(statement.need)
        gradients = [o[i] for i in chosen]
        at += [next(number) if i in chosen else None for i in range(len(o))]
    else:
        made = passes.forward()
    expected = [*gradients, *(r for r in made.results if r is not None)]
    _check(expected, results)
    at += [None if r is None else next(number) for r in made.results]
    return Planned(made.prepared, statement.stated.call.constants, at)


def _check(expected: Sequence[Layout | None], results: Sequence[Layout]) -> None:
    """Raises unless the results have memory for what a pass writes."""
    needed = [(prod(r.shape), r.dtype) for r in expected if r is not None]
    found = [(prod(r.shape), r.dtype) for r in results]
    if needed != found:
        raise ShapeError(
            f"sru_rt: the results of a custom call have {found} numbers; the pass needs {needed}. The program was "
            "written with other settings or by another version of sru_rt: export it again"
        )
