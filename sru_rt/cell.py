"""What a cell is: a step function, the names of what goes in and out of it, and the formula traced from it."""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from . import graph
from .errors import StepError
from .graph import Graph, Node
from .simplify import simplify

KINDS = ("gates", "inputs", "per_sequence", "params", "state", "constants")

# States up to which steps are composed into one, with a matrix for each.
MOST_COMPOSED = 2

# Inputs of gradient graphs that hold adjoints. No identifiers, so that no declared value can have such a name.
ADJOINT_OF_H = "d:h"


def adjoint_of(state: str) -> str:
    """The name of the adjoint of the new value of `state`."""
    return f"d:{state}_next"


@dataclass(frozen=True)
class Array:
    """An array that a recurrence takes, and the values of the step function that it holds.

    Its axes follow from `kind`: gates (L, B, D, members, d), inputs (L, B, D, d), per_sequence (B, D, d),
    params (D, members, d), state (D, B, d), of which there is one for each member. Inputs that are `stacked` are
    (L, B, D, members, d). Users give inputs that are `side_by_side` as (L, B, D*d), as h is.
    """

    name: str
    kind: str
    members: tuple[str, ...]
    stacked: bool = False
    side_by_side: bool = False
    differentiable: bool = True

    @property
    def axes(self) -> str:
        """Of the array as kernels take it."""
        members = f"{len(self.members)} " if self.stacked or self.kind in ("gates", "params") else ""
        return {
            "gates": f"L B D {members}d",
            "inputs": f"L B D {members}d",
            "per_sequence": "B D d",
            "params": f"D {members}d",
            "state": "D B d",
        }[self.kind]


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrence, element-wise over channels: ``new state, h = step(gates, inputs, ..., state, constants)``.

    The step function is called with the values named by `arrays` and `constants` as keyword arguments. `options` are
    those that a built-in cell is made from; the module of their class says which.
    """

    name: str
    step: Callable[..., Any]
    arrays: tuple[Array, ...]
    constants: tuple[str, ...] = ()
    options: Any = None

    def __post_init__(self) -> None:
        names = self.names
        for array in self.arrays:
            if array.kind not in KINDS[:-1]:
                raise StepError(
                    f"{self.where}: {array.name!r} is of kind {array.kind!r}; kinds are {', '.join(KINDS[:-1])}"
                )
        if not self.name.isidentifier():
            raise StepError(f"{self.where}: {self.name!r} cannot be the name of a cell; it must be an identifier")
        for name in names:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise StepError(
                    f"{self.where}: {name!r} cannot be the name of a value in a step function; it must be an identifier"
                )
        for name in names:
            if names.count(name) > 1:
                raise StepError(f"{self.where}: {name!r} is declared twice; give each value a name of its own")
        if len(self.inputs) > 32:
            raise StepError(f"{self.where}: a cell takes at most 32 inputs (got {len(self.inputs)})")
        if not self.gates or not self.state:
            raise StepError(f"{self.where}: a cell needs at least one gate and one state")

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The values of one kind, in the order in which kernels take them."""
        return _values_of_kind(self, kind)

    def bits(self, kind: str, holds: Callable[[Array], bool]) -> int:
        """Bit i says of the i-th value of one kind whether something holds of its array."""
        members = (a for a in self.arrays if a.kind == kind for _ in a.members)
        return sum(holds(a) << i for i, a in enumerate(members))

    @property
    def gates(self) -> tuple[str, ...]:
        return self.of_kind("gates")

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.of_kind("inputs")

    @property
    def per_sequence(self) -> tuple[str, ...]:
        return self.of_kind("per_sequence")

    @property
    def params(self) -> tuple[str, ...]:
        return self.of_kind("params")

    @property
    def state(self) -> tuple[str, ...]:
        return self.of_kind("state")

    @property
    def initial(self) -> str:
        """What the initial states are called together, such as c0. Cells of a layer declare them so, as one array."""
        return next(a.name for a in self.arrays if a.kind == "state")

    @property
    def last(self) -> str:
        """What the last states are called together, such as c_last."""
        return f"{self.initial.removesuffix('0')}_last"

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the step function takes, in their order."""
        return tuple(name for kind in KINDS for name in self.of_kind(kind))

    @property
    def formula(self) -> Formula:
        """The traced step and its derivative; of several threads that trace at once, the first one's for all."""
        found: Formula | None = self.__dict__.get("_formula")
        return found or self.__dict__.setdefault("_formula", _trace(self))

    @property
    def affine(self) -> bool:
        """Whether every new state is affine in the states, so that steps can be composed and run in parallel."""
        return _is_affine(self)

    @property
    def where(self) -> str:
        """File and line of the step function, and the cell's name, to begin a message with."""
        code = getattr(self.step, "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}: cell {self.name}" if code else f"cell {self.name}"


@dataclass(frozen=True, eq=False)
class Formula:
    """A traced step: nodes by role, and the names that the step function gave to intermediate values.

    `gradient` maps the name of each value that has one (all but constants) to its derivative, in terms of the
    step's own values, and of inputs named by `adjoint_of` for each new state and by `ADJOINT_OF_H` for the output.
    `jacobian` holds the derivatives of the new states by the states, row by row; nothing for more than
    `MOST_COMPOSED` states.
    """

    leaves: dict[str, Node]
    new_state: tuple[Node, ...]
    h: Node
    names: dict[Node, str]
    gradient: dict[str, Node]
    gradient_names: dict[Node, str] = field(default_factory=dict)
    jacobian: tuple[Node, ...] = ()


# functools.cache holds no lock while it computes, unlike cached_property before Python 3.12: a process may fork at any
# time.


@cache
def _values_of_kind(cell: Cell, kind: str) -> tuple[str, ...]:
    if kind == "constants":
        return cell.constants
    return tuple(member for array in cell.arrays if array.kind == kind for member in array.members)


@cache
def _is_affine(cell: Cell) -> bool:
    states = [cell.formula.leaves[name] for name in cell.state]
    return all(graph.degree(new, states) <= 1 for new in cell.formula.new_state)


def _trace(cell: Cell) -> Formula:
    table = Graph()
    leaves = {name: table.input(name) for name in cell.names}
    result, variables = _call_watched(cell, leaves)
    if not isinstance(result, tuple) or len(result) != len(cell.state) + 1:
        got = (
            f"{len(result)} values"
            if isinstance(result, tuple)
            else "one value"
            if isinstance(result, Node)
            else f"one {type(result).__name__}"
        )
        needed = ", ".join(cell.state)
        raise StepError(f"{cell.where}: the step function returns {got}; it must return ({needed}, h)")
    outputs = [graph.as_node(table, value, cell.where) for value in result]
    if any(node.is_condition for node in outputs):
        raise StepError(f"{cell.where}: the step function returns a comparison; use sru_rt.where to make it a number")
    names: dict[Node, str] = {}
    for name, value in variables.items():
        if isinstance(value, Node) and value.op not in graph.LEAVES:
            names.setdefault(value, name)

    seeds = [table.input(adjoint_of(name)) for name in cell.state] + [table.input(ADJOINT_OF_H)]
    wanted = [name for kind in KINDS[:-1] for name in cell.of_kind(kind)]
    derived, adjoint = graph.differentiate(outputs, seeds, [leaves[name] for name in wanted])
    simpler = simplify(derived, outputs)
    gradient_names = dict(names)
    for node, name in names.items():
        found = simpler.get(adjoint[node]) if node in adjoint else None
        if found is not None and found.op not in graph.LEAVES:
            gradient_names.setdefault(found, f"d{name}")
    jacobian: list[Node] = []
    if len(cell.state) <= MOST_COMPOSED:
        for new in outputs[:-1]:
            jacobian += graph.differentiate([new], [table.constant(1)], [leaves[name] for name in cell.state])[0]
    return Formula(
        leaves,
        tuple(outputs[:-1]),
        outputs[-1],
        names,
        {name: simpler[node] for name, node in zip(wanted, derived)},
        gradient_names,
        tuple(jacobian),
    )


def _call_watched(cell: Cell, leaves: dict[str, Node]) -> tuple[Any, dict[str, Any]]:
    """Calls the step function; returns its result and its local variables, whose names the emitted text keeps."""
    _check_signature(cell)
    variables: dict[str, Any] = {}

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is getattr(cell.step, "__code__", None):
            variables.update(frame.f_locals)

    profiler = sys.getprofile()
    sys.setprofile(watch)
    try:
        return cell.step(**leaves), variables
    except StepError:
        raise
    except Exception as error:
        raise StepError(f"{_place_of(error, cell)}: {_explained(error)}") from error
    finally:
        sys.setprofile(profiler)


def _check_signature(cell: Cell) -> None:
    """Raises StepError unless the step function can be called with the declared values by name."""
    taken = inspect.signature(cell.step).parameters.values()
    by_name = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in taken)
    needed = [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    undeclared = [name for name in needed if name not in cell.names]
    if undeclared:
        raise StepError(
            f"{cell.where}: the step function takes {', '.join(undeclared)}, which is not declared; declared are "
            f"{', '.join(cell.names)}: name it among {', '.join(KINDS)}"
        )
    unknown = [name for name in cell.names if name not in by_name and not takes_any]
    if unknown:
        raise StepError(
            f"{cell.where}: {', '.join(unknown)} is declared, but the step function does not take it by name; it "
            f"takes {', '.join(p.name for p in taken)}"
        )


def _place_of(error: Exception, cell: Cell) -> str:
    """File and line of the step function, or of what it called, where an error arose outside of this package."""
    where, trace = cell.where, error.__traceback__
    package = f"{__name__.rpartition('.')[0]}."
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_filename == getattr(cell.step, "__code__", frame.f_code).co_filename:
            own = not frame.f_globals.get("__name__", "").startswith(package)
            where = f"{frame.f_code.co_filename}:{trace.tb_lineno}" if own else where
        trace = trace.tb_next
    return where


def _explained(error: Exception) -> str:
    functions = ", ".join([*graph.FUNCTIONS, "where", "minimum", "maximum"])
    if isinstance(error, NameError):
        return (
            f"{error}; a step function sees its arguments, which are declared, and what is around it, such as the "
            f"functions of sru_rt: {functions}"
        )
    return (
        f"{type(error).__name__}: {error}; a step function works on its arguments and on numbers with + - * /, "
        f"comparisons in sru_rt.where, and the functions of sru_rt: {functions}"
    )
