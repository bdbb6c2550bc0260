"""Expression graphs: what a step function computes, its derivative, and its value on NumPy arrays.

A `Node` is an operation on other nodes, an input, or a constant. Equal expressions are the same object within one
`Graph`, and what is structurally zero or one is folded away as the graph is built (0*x is 0 here even for a NaN),
so an option that is switched off leaves no trace.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from .errors import StepError

Value = Union["Node", float]


class Graph:
    """The table in which the nodes of one traced step function live."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}

    def node(self, op: str, *args: Node | float | str) -> Node:
        if any(isinstance(a, Node) and a.is_condition for a in (args[1:] if op == "where" else args)):
            raise StepError(
                f"{_caller()}: the outcome of a comparison is used as a number; use sru_rt.where(condition, 1.0, 0.0)"
            )
        key = (op, *(id(a) if isinstance(a, Node) else a for a in args))
        if op == "constant" and args[0] == 0:
            key = (op, math.copysign(1.0, float(args[0])), 0.0)  # 0.0 == -0.0, yet they are two constants
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(self, op, args)
        return found

    def input(self, name: str) -> Node:
        return self.node("input", name)

    def constant(self, value: float) -> Node:
        if not math.isfinite(value):
            raise StepError(
                f"{_caller()}: the constant {value} in a step function; constants must be finite: use a large "
                "number, or "
                "sru_rt.where, sru_rt.minimum or sru_rt.maximum"
            )
        return self.node("constant", float(value))


class Node:
    """One value in a step function. Supports ``+ - * /``, ``**`` with a small integer, and comparisons."""

    __slots__ = ("args", "graph", "op")

    def __init__(self, graph: Graph, op: str, args: tuple[Any, ...]) -> None:
        self.graph, self.op, self.args = graph, op, args

    def __add__(self, other: Value) -> Node:
        return _add(self, self._with(other))

    def __radd__(self, other: Value) -> Node:
        return _add(self._with(other), self)

    def __sub__(self, other: Value) -> Node:
        return _sub(self, self._with(other))

    def __rsub__(self, other: Value) -> Node:
        return _sub(self._with(other), self)

    def __mul__(self, other: Value) -> Node:
        return _mul(self, self._with(other))

    def __rmul__(self, other: Value) -> Node:
        return _mul(self._with(other), self)

    def __truediv__(self, other: Value) -> Node:
        return _div(self, self._with(other))

    def __rtruediv__(self, other: Value) -> Node:
        return _div(self._with(other), self)

    def __neg__(self) -> Node:
        return _neg(self)

    def __pos__(self) -> Node:
        return self

    def __abs__(self) -> Node:
        return _where(self.graph.node("<", self, self.graph.constant(0)), _neg(self), self)

    def __pow__(self, exponent: int) -> Node:
        if not isinstance(exponent, int) or not 0 <= exponent <= 16:
            raise StepError(f"{_caller()}: x**n takes an integer n from 0 to 16 (got {exponent!r}); use exp and log")
        power = self.graph.constant(1)
        for _ in range(exponent):
            power = _mul(power, self)
        return power

    def __lt__(self, other: Value) -> Node:
        return self.graph.node("<", self, self._with(other))

    def __le__(self, other: Value) -> Node:
        return self.graph.node("<=", self, self._with(other))

    def __gt__(self, other: Value) -> Node:
        return self.graph.node(">", self, self._with(other))

    def __ge__(self, other: Value) -> Node:
        return self.graph.node(">=", self, self._with(other))

    def __eq__(self, other: object) -> bool:
        raise StepError(
            f"{_caller()}: a step function compares by < <= > >= alone, inside sru_rt.where(condition, a, b)"
        )

    __hash__ = object.__hash__  # a node is found by identity

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Node:
        """An operator with a NumPy scalar on its left, or a function of NumPy, which cannot be traced."""
        if method != "__call__" or ufunc.__name__ not in _UFUNCS:
            raise StepError(
                f"{_caller()}: numpy.{ufunc.__name__} cannot be traced; use the functions of sru_rt (sigmoid, "
                "tanh, exp, ...)"
            )
        return _UFUNCS[ufunc.__name__](*(as_node(self.graph, value) for value in inputs))

    def __bool__(self) -> bool:
        raise StepError(
            f"{_caller()}: a step function cannot branch on a value (`if`, `and`, `or`, `not`, min, max), since it "
            "runs "
            "once for all values; use sru_rt.where(condition, a, b), sru_rt.minimum or sru_rt.maximum"
        )

    def __float__(self) -> float:
        raise StepError(
            f"{_caller()}: a value of a step function cannot become a Python number; use the functions of sru_rt "
            "(sigmoid, tanh, exp, ...) in place of those of math or numpy"
        )

    def _with(self, other: Value) -> Node:
        return as_node(self.graph, other)

    @property
    def is_condition(self) -> bool:
        return self.op in COMPARISONS

    def is_constant(self, value: float) -> bool:
        return self.op == "constant" and self.args[0] == value

    def __repr__(self) -> str:
        return f"<{self.op} {' '.join(str(a) for a in self.args)}>" if self.op in LEAVES else f"<{self.op} ...>"


LEAVES = ("input", "constant")
COMPARISONS: dict[str, Callable[..., Any]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_UFUNCS: dict[str, Callable[..., Node]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
}


def _caller() -> str:
    """File and line of the code being traced: neither in this module nor in NumPy."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in (__file__, "<__array_function__ internals>")
        or frame.f_globals.get("__name__", "").startswith("numpy.")
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def as_node(graph: Graph, value: Any, at: str | None = None) -> Node:
    """`value` as a node; `at` is the file and line to name in errors where it is not the line being run."""
    if isinstance(value, Node):
        if value.graph is not graph:
            raise StepError(
                f"{at or _caller()}: a value of one step function is used in another; pass it as an argument instead"
            )
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:  # what functions of NumPy make of a number
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise StepError(
            f"{at or _caller()}: a step function works on its arguments and on numbers, not on {value!r}; declare "
            "arrays "
            "as inputs, per_sequence or params of the cell"
        )
    return graph.constant(float(value))


# ----------------------------------------------------------------------------------------------------------------------
# Building, with folding


def _both_constant(a: Node, b: Node) -> bool:
    return a.op == b.op == "constant"


def _add(a: Node, b: Node) -> Node:
    if _both_constant(a, b):
        return a.graph.constant(a.args[0] + b.args[0])
    if a.is_constant(0):
        return b
    if b.is_constant(0):
        return a
    if b.op == "neg":
        return _sub(a, b.args[0])
    if a.op == "neg":
        return _sub(b, a.args[0])
    return a.graph.node("+", a, b)


def _sub(a: Node, b: Node) -> Node:
    if _both_constant(a, b):
        return a.graph.constant(a.args[0] - b.args[0])
    if b.is_constant(0):
        return a
    if a.is_constant(0):
        return _neg(b)
    if b.op == "neg":
        return _add(a, b.args[0])
    return a.graph.node("-", a, b)


def _mul(a: Node, b: Node) -> Node:
    if _both_constant(a, b):
        return a.graph.constant(a.args[0] * b.args[0])
    for one, other in ((a, b), (b, a)):
        if one.is_constant(1):
            return other
        if one.is_constant(0):
            return a.graph.constant(0)
        if one.is_constant(-1):
            return _neg(other)
    if a.op == "neg":
        return _neg(_mul(a.args[0], b))
    if b.op == "neg":
        return _neg(_mul(a, b.args[0]))
    return a.graph.node("*", a, b)


def _div(a: Node, b: Node) -> Node:
    if b.is_constant(0):
        raise StepError(f"{_caller()}: division by the constant 0")
    if _both_constant(a, b):
        return a.graph.constant(a.args[0] / b.args[0])
    if b.is_constant(1) or a.is_constant(0):
        return a
    return a.graph.node("/", a, b)


def _neg(a: Node) -> Node:
    if a.op == "constant":
        return a.graph.constant(-a.args[0])
    if a.op == "neg":
        return a.args[0]
    if a.op == "-":
        return _sub(a.args[1], a.args[0])
    return a.graph.node("neg", a)


def _where(condition: Node, a: Node, b: Node) -> Node:
    return a if a is b else a.graph.node("where", condition, a, b)


_FOLDING: dict[str, Callable[..., Node]] = {
    "+": _add,
    "-": _sub,
    "*": _mul,
    "/": _div,
    "neg": _neg,
    "where": _where,
}


def rebuilt(op: str, args: Sequence[Node]) -> Node:
    """A node made anew of other arguments, folded like every other."""
    return _FOLDING[op](*args) if op in _FOLDING else args[0].graph.node(op, *args)


# ----------------------------------------------------------------------------------------------------------------------
# The functions that a step function may call


@dataclass(frozen=True)
class Function:
    """A function of one value: how NumPy computes it, and its derivative given argument `a` and result `y`."""

    numpy: Callable[[Any], Any]
    derivative: Callable[[Node, Node], Value]


def _sigmoid_numpy(a: Any) -> Any:
    with np.errstate(over="ignore"):  # exp(-a) = inf gives the right limit, 0
        return 1 / (1 + np.exp(-a))


FUNCTIONS: dict[str, Function] = {
    "exp": Function(np.exp, lambda a, y: y),
    "log": Function(np.log, lambda a, y: 1 / a),
    "sqrt": Function(np.sqrt, lambda a, y: 0.5 / y),
    "sigmoid": Function(_sigmoid_numpy, lambda a, y: y * (1 - y)),
    "tanh": Function(np.tanh, lambda a, y: 1 - y * y),
    "relu": Function(lambda a: np.where(a < 0, np.zeros_like(a), a), lambda a, y: where(a > 0, 1.0, 0.0)),
    "softplus": Function(lambda a: np.logaddexp(a, np.zeros_like(a)), lambda a, y: sigmoid(a)),
}


def _call(name: str, a: Any) -> Any:
    if isinstance(a, Node):
        if a.op == "constant":
            with np.errstate(all="ignore"):  # what is not finite is refused as a constant
                return a.graph.constant(float(FUNCTIONS[name].numpy(np.float64(a.args[0]))))
        return a.graph.node(name, a)
    return FUNCTIONS[name].numpy(np.asarray(a) if not isinstance(a, (float, int)) else np.float64(a))


def exp(a: Any) -> Any:
    """Exponential function, of a value in a step function or of a NumPy array."""
    return _call("exp", a)


def log(a: Any) -> Any:
    """Natural logarithm, of a value in a step function or of a NumPy array."""
    return _call("log", a)


def sqrt(a: Any) -> Any:
    """Square root, of a value in a step function or of a NumPy array."""
    return _call("sqrt", a)


def sigmoid(a: Any) -> Any:
    """Logistic sigmoid 1 / (1 + exp(-a)), of a value in a step function or of a NumPy array."""
    return _call("sigmoid", a)


def tanh(a: Any) -> Any:
    """Hyperbolic tangent, of a value in a step function or of a NumPy array."""
    return _call("tanh", a)


def relu(a: Any) -> Any:
    """max(a, 0), of a value in a step function or of a NumPy array; the derivative at 0 is 0."""
    return _call("relu", a)


def softplus(a: Any) -> Any:
    """log(1 + exp(a)) without overflow, of a value in a step function or of a NumPy array."""
    return _call("softplus", a)


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where `condition` holds, else `b`: the branch of a step function. The condition is a comparison."""
    nodes = [v for v in (condition, a, b) if isinstance(v, Node)]
    if not nodes:
        return np.where(condition, a, b)
    graph = nodes[0].graph
    if not isinstance(condition, Node) or not condition.is_condition:
        raise StepError(f"{_caller()}: where() takes a comparison first, such as where(a > 0, a, b)")
    return _where(condition, as_node(graph, a), as_node(graph, b))


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two values, in a step function or of NumPy arrays; NaN if either is."""
    return _extremum("minimum", np.minimum, a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two values, in a step function or of NumPy arrays; NaN if either is."""
    return _extremum("maximum", np.maximum, a, b)


def _extremum(name: str, numpy: Callable[..., Any], a: Any, b: Any) -> Any:
    if not isinstance(a, Node) and not isinstance(b, Node):
        return numpy(a, b)
    graph = a.graph if isinstance(a, Node) else b.graph
    return graph.node(name, as_node(graph, a), as_node(graph, b))


# ----------------------------------------------------------------------------------------------------------------------
# Reading a graph


def topological(outputs: Iterable[Node], known: Set[Node] = frozenset()) -> list[Node]:
    """All nodes that `outputs` need, each after its arguments, in an order that depends on the graph alone.

    What those in `known` are computed of is not needed.
    """
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(node, False) for node in reversed(list(outputs))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            args = () if node in known else reversed(node.args)
            stack.extend((a, False) for a in args if isinstance(a, Node) and id(a) not in seen)
    return order


def differentiate(
    outputs: Sequence[Node], seeds: Sequence[Node], inputs: Sequence[Node]
) -> tuple[list[Node], dict[Node, Node]]:
    """Reverse-mode derivative of ``sum(seed * output)``.

    Returns the derivative with respect to each of `inputs`, and the adjoints of all nodes that have one.
    """
    graph = outputs[0].graph
    adjoint: dict[Node, Node] = {}

    def add(node: Node, value: Value) -> None:
        value = as_node(graph, value)
        adjoint[node] = _add(adjoint[node], value) if node in adjoint else value

    for output, seed in zip(outputs, seeds):
        add(output, seed)
    for node in reversed(topological(outputs)):
        if node in adjoint and node.op not in LEAVES:
            for argument, value in _pullback(node, adjoint[node]):
                add(argument, value)
    return [adjoint.get(i, graph.constant(0)) for i in inputs], adjoint


def _pullback(node: Node, g: Node) -> list[tuple[Node, Value]]:
    """What each argument of `node` receives when `node` has the adjoint `g`."""
    op, args = node.op, node.args
    if op in FUNCTIONS:
        derivative = FUNCTIONS[op].derivative(args[0], node)
        if isinstance(derivative, Node) and derivative.op == "where":  # relu: select, so that inf*0 cannot arise
            return [(args[0], where(derivative.args[0], g, 0.0))]
        return [(args[0], g * derivative)]
    if op == "neg":
        return [(args[0], -g)]
    if op == "where":
        return [(args[1], where(args[0], g, 0.0)), (args[2], where(args[0], 0.0, g))]
    a, b = args
    if op == "+":
        return [(a, g), (b, g)]
    if op == "-":
        return [(a, g), (b, -g)]
    if op == "*":
        return [(a, g * b), (b, g * a)]
    if op == "/":
        quotient = g / b
        return [(a, quotient), (b, -(quotient * node))]
    first = a <= b if op == "minimum" else a >= b
    return [(a, where(first, g, 0.0)), (b, where(first, 0.0, g))]


def degree(node: Node, variables: Iterable[Node]) -> int:
    """0 if `node` does not depend on `variables`, 1 if it is affine in them, 2 if it is (or may be) neither."""
    wanted = set(variables)
    degrees: dict[Node, int] = {}
    for n in topological([node]):
        below = [degrees[a] for a in n.args if isinstance(a, Node)]
        if n.op in LEAVES:
            d = int(n in wanted)
        elif n.op in ("+", "-", "neg"):
            d = max(below)
        elif n.op == "*":
            d = sum(below)
        elif n.op == "/":
            d = below[0] if below[1] == 0 else 2
        elif n.op == "where":
            d = max(below[1:]) if below[0] == 0 else 2
        else:
            d = 2 * max(below)
        degrees[n] = min(d, 2)
    return degrees[node]


_NUMPY: dict[str, Callable[..., Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "neg": np.negative,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "where": np.where,
    **COMPARISONS,
    **{name: function.numpy for name, function in FUNCTIONS.items()},
}


def evaluate(order: Sequence[Node], values: Mapping[str, Any], dtype: Any) -> dict[Node, Any]:
    """Computes the nodes of `order` (see `topological`) on NumPy arrays given by the names of the inputs."""
    result: dict[Node, Any] = {}
    for node in order:
        if node.op == "input":
            result[node] = values[node.args[0]]
        elif node.op == "constant":
            result[node] = dtype.type(node.args[0])
        else:
            result[node] = _NUMPY[node.op](*(result[a] for a in node.args))
    return result
