"""The tracer: folding, one node for equal expressions, derivatives, affine states, and what it refuses."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sru_rt
from sru_rt import exp, graph, log, maximum, minimum, relu, sigmoid, softplus, sqrt, tanh, where
from sru_rt.cell import Array, Cell
from sru_rt.errors import SruRtError, StepError
from sru_rt.graph import Graph, Node, degree, differentiate, evaluate, topological

FLOAT64 = np.dtype(np.float64)

# ----------------------------------------------------------------------------------------------------------------------
# Folding, and one node for equal expressions


def negative(x: Node) -> Node:
    return -x


FOLDED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "0*x": (lambda x, y: 0 * x, lambda x, y: 0),
    "x*0": (lambda x, y: x * 0, lambda x, y: 0),
    "1*x": (lambda x, y: 1 * x, lambda x, y: x),
    "x*1": (lambda x, y: x * 1, lambda x, y: x),
    "-1*x": (lambda x, y: -1 * x, lambda x, y: -x),
    "x*-1": (lambda x, y: x * -1, lambda x, y: -x),
    "0+x": (lambda x, y: 0 + x, lambda x, y: x),
    "x+0": (lambda x, y: x + 0, lambda x, y: x),
    "x+-0.0": (lambda x, y: x + -0.0, lambda x, y: x),
    "x-0": (lambda x, y: x - 0, lambda x, y: x),
    "0-x": (lambda x, y: 0 - x, lambda x, y: -x),
    "x/1": (lambda x, y: x / 1, lambda x, y: x),
    "0/x": (lambda x, y: 0 / x, lambda x, y: 0),
    "+x": (lambda x, y: +x, lambda x, y: x),
    "--x": (lambda x, y: -negative(x), lambda x, y: x),
    "x+(-y)": (lambda x, y: x + (-y), lambda x, y: x - y),
    "-x+y": (lambda x, y: -x + y, lambda x, y: y - x),
    "x-(-y)": (lambda x, y: x - (-y), lambda x, y: x + y),
    "-(x-y)": (lambda x, y: -(x - y), lambda x, y: y - x),
    "-(-x-y)": (lambda x, y: -(-x - y), lambda x, y: y + x),
    "-x*y": (lambda x, y: (-x) * y, lambda x, y: -(x * y)),
    "x*-y": (lambda x, y: x * (-y), lambda x, y: -(x * y)),
    "-x*-y": (lambda x, y: (-x) * (-y), lambda x, y: x * y),
    "x+y*0": (lambda x, y: x + y * 0, lambda x, y: x),
    "x**0": (lambda x, y: x**0, lambda x, y: 1),
    "x**1": (lambda x, y: x**1, lambda x, y: x),
    "x**3": (lambda x, y: x**3, lambda x, y: x * x * x),
    "where of equals": (lambda x, y: where(x < y, x * y, x * y), lambda x, y: x * y),
    "a numpy scalar": (lambda x, y: np.float32(2) * x, lambda x, y: 2 * x),
    "a numpy scalar on the right": (lambda x, y: x - np.int64(3), lambda x, y: x - 3),
    "an array of no axes": (lambda x, y: x * np.array(2.0), lambda x, y: x * 2),
    "a function of a number": (lambda x, y: x + relu(2.0), lambda x, y: x + 2),
    "a branch on a number": (lambda x, y: x * where(2 > 1, 3.0, 4.0), lambda x, y: x * 3),
}


def as_node(table: Graph, value: Any) -> Node:
    return value if isinstance(value, Node) else table.constant(value)


@pytest.mark.parametrize("name", FOLDED)
def test_folding(name):
    table = Graph()
    x, y = table.input("x"), table.input("y")
    got, wanted = (as_node(table, make(x, y)) for make in FOLDED[name])
    assert got is wanted


NOT_FOLDED: dict[str, Callable[..., Any]] = {
    "x-x is NaN for infinities": lambda x: x - x,
    "x/x is NaN for 0": lambda x: x / x,
    "x*2/2 may round": lambda x: x * 2 / 2,
    "(x+1)-1 rounds": lambda x: (x + 1) - 1,
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_no_folding_that_changes_values(name):
    x = Graph().input("x")
    assert NOT_FOLDED[name](x).op in "+-*/"


def test_constants_fold():
    table = Graph()
    two = table.constant(2)
    for got, wanted in (
        (two + 3, 5),
        (3 - two, 1),
        (two * 3, 6),
        (3 / two, 1.5),
        (-two, -2),
        (two**5, 32),
        (sigmoid(table.constant(0)), 0.5),
        (exp(table.constant(1)), math.e),
        (softplus(two), math.log1p(math.e**2)),
        (relu(-two), 0),
    ):
        assert got.op == "constant" and got.args[0] == pytest.approx(wanted, rel=1e-15)


def test_zeros_of_both_signs_are_two_constants():
    table = Graph()
    plus, minus = table.constant(0.0), table.constant(-0.0)
    assert plus is not minus
    assert (math.copysign(1, plus.args[0]), math.copysign(1, minus.args[0])) == (1, -1)
    assert table.constant(-0.0) is minus and -plus is minus and -minus is plus
    x = table.input("x")
    assert x * minus is plus, "what is structurally zero is the plain zero"


def test_equal_expressions_are_one_node():
    table = Graph()

    def formula() -> Node:
        x, y = table.input("x"), table.input("y")
        return where(x < 2 * y, sigmoid(x + 1.5) / y, minimum(x, -y)) - tanh(x * y) ** 2

    first, second = formula(), formula()
    assert first is second
    order = topological([first, second])
    assert len(order) == len({id(node) for node in order}) == len(topological([first]))
    assert table.input("x") is table.input("x") and table.constant(2) is table.constant(2.0)
    x, y = table.input("x"), table.input("y")
    assert x + y is not y + x, "the order of a sum is kept, as it decides how sums are rounded"


def test_topological_order():
    table = Graph()
    x, y = table.input("x"), table.input("y")
    product = x * y
    order = topological([product + x, sigmoid(product)])
    place = {node: i for i, node in enumerate(order)}
    assert all(place[a] < place[node] for node in order for a in node.args if isinstance(a, Node))
    assert sum(node is product for node in order) == 1
    assert [node.op for node in order] == ["input", "input", "*", "+", "sigmoid"]


def test_a_deep_expression_needs_no_deep_stack():
    table = Graph()
    x = y = table.input("x")
    for _ in range(20_000):
        y = y + x
    (gradient,), _ = differentiate([y], [table.input("dy")], [x])
    order = topological([y, gradient])
    assert evaluate(order, {"x": np.float64(2), "dy": np.float64(1)}, FLOAT64)[gradient] == 20_001


# ----------------------------------------------------------------------------------------------------------------------
# Values


def test_a_structural_zero_ignores_a_nan():
    table = Graph()
    node = table.input("x") * 0 + 1.5
    assert evaluate(topological([node]), {"x": np.full(3, np.nan)}, FLOAT64)[node] == 1.5


def test_numpy_scalars_compare_from_both_sides():
    table = Graph()
    x = table.input("x")
    two = np.float64(2)
    nodes = [where(condition, 1.0, 0.0) for condition in (two < x, two <= x, two > x, two >= x, x < two, x >= two)]
    result = evaluate(topological(nodes), {"x": np.array([1.0, 2.0, 3.0])}, FLOAT64)
    wanted = [[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1]]
    np.testing.assert_array_equal([result[node] for node in nodes], wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_evaluation_stays_in_its_dtype(dtype):
    table = Graph()
    x = table.input("x")
    functions = [exp, log, sqrt, sigmoid, tanh, relu, softplus, abs]
    nodes = [f(x) * 0.1 + 2 for f in functions] + [where(x > 0.3, x, 1), minimum(x, 0.5), maximum(0.5, x), x**3 / 7]
    values = evaluate(topological(nodes), {"x": np.linspace(0.1, 1, 5).astype(dtype)}, np.dtype(dtype))
    assert {values[node].dtype for node in nodes} == {np.dtype(dtype)}


def test_functions_of_arrays():
    """Outside a step function the same functions are those of NumPy."""
    x = np.array([-800.0, -1.0, 0.0, 1.0, 800.0])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(relu(x), [0, 0, 0, 1, 800])
        np.testing.assert_allclose(softplus(x), [0, np.log1p(np.exp(-1)), np.log(2), np.log1p(np.e), 800], rtol=1e-15)
        np.testing.assert_allclose(sigmoid(x), [0, 1 / (1 + np.e), 0.5, 1 / (1 + 1 / np.e), 1], rtol=1e-15)
    assert sigmoid(x.astype(np.float32)).dtype == softplus(x.astype(np.float32)).dtype == np.float32
    assert sigmoid(0) == 0.5 and tanh(0.0) == 0 and exp(0) == 1 and log(1) == 0 and sqrt(4) == 2
    np.testing.assert_array_equal(where(x > 0, x, 7.0), [7, 7, 7, 1, 800])
    assert minimum(1, 2) == 1 and maximum(1, 2) == 2
    assert np.isnan(minimum(np.nan, 1)) and np.isnan(maximum(1, np.nan)) and np.isnan(relu(np.nan))


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


def derivative(f: Callable[..., Any], *values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """f and its derivatives by its arguments, from the graph."""
    table = Graph()
    leaves = [table.input(f"x{i}") for i in range(len(values))]
    node, seed = as_node(table, f(*leaves)), table.input("seed")
    gradients, _ = differentiate([node], [seed], leaves)
    given_values = {f"x{i}": value for i, value in enumerate(values)} | {"seed": np.float64(1)}
    with np.errstate(all="ignore"):
        result = evaluate(topological([node, *gradients]), given_values, FLOAT64)
    shape = values[0].shape
    return np.broadcast_to(result[node], shape), [np.broadcast_to(result[g], shape) for g in gradients]


def central_difference(f: Callable[..., Any], values: list[np.ndarray], i: int, step: float = 1e-3) -> np.ndarray:
    """The derivative by argument i, with an error of order step**4."""

    def at(offset: float) -> Any:
        return f(*(value + offset if j == i else value for j, value in enumerate(values)))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


ANY = np.array([-3.1, -1.2, -0.4, 0.3, 1.1, 2.7])
OTHER = np.array([0.7, -2.2, 1.9, -0.8, 3.3, -1.4])
POSITIVE = np.abs(ANY)

DERIVED: dict[str, tuple[Callable[..., Any], list[np.ndarray]]] = {
    "exp": (exp, [ANY]),
    "log": (log, [POSITIVE]),
    "sqrt": (sqrt, [POSITIVE]),
    "sigmoid": (sigmoid, [ANY]),
    "tanh": (tanh, [ANY]),
    "relu": (relu, [ANY]),
    "softplus": (softplus, [ANY]),
    "abs": (abs, [ANY]),
    "neg": (lambda a: -a, [ANY]),
    "+": (lambda a, b: a + b, [ANY, OTHER]),
    "-": (lambda a, b: a - b, [ANY, OTHER]),
    "*": (lambda a, b: a * b, [ANY, OTHER]),
    "/": (lambda a, b: a / b, [ANY, OTHER]),
    "number/": (lambda a: 3 / a, [ANY]),
    "number-": (lambda a: 3 - a, [ANY]),
    "minimum": (minimum, [ANY, OTHER]),
    "maximum": (maximum, [ANY, OTHER]),
    "minimum of a number": (lambda a: minimum(0.5, a), [ANY]),
    "maximum of a number": (lambda a: maximum(a, 0.5), [ANY]),
    "where": (lambda a, b: where(a > b, a * b, a - b), [ANY, OTHER]),
    "where with a number": (lambda a, b: where(a <= 0.5, 2.0, a * b), [ANY, OTHER]),
    **{f"power {n}": (lambda a, n=n: a**n, [ANY]) for n in range(6)},
    "shared": (lambda a, b: (a * b) * tanh(a * b) + a, [ANY, OTHER]),
    "an unused argument": (lambda a, b: a * 2, [ANY, OTHER]),
    "neither used": (lambda a, b: 1.5, [ANY, OTHER]),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derivative(name):
    f, values = DERIVED[name]
    result, gradients = derivative(f, *values)
    np.testing.assert_allclose(result, f(*values) + 0 * values[0], rtol=1e-14)
    for i, gradient in enumerate(gradients):
        np.testing.assert_allclose(gradient, central_difference(f, values, i), rtol=1e-8, atol=1e-9)


def test_every_operation_has_a_derivative_under_test():
    table = Graph()
    leaves = [table.input("a"), table.input("b")]
    nodes = [as_node(table, f(*leaves[: len(values)])) for f, values in DERIVED.values()]
    tested = {node.op for node in topological(nodes)} - {"input", "constant"}
    comparisons = set(graph.COMPARISONS)
    assert tested - comparisons == {"+", "-", "*", "/", "neg", "where", "minimum", "maximum", *graph.FUNCTIONS}
    assert set(graph.FUNCTIONS) | {"where", "minimum", "maximum"} <= set(dir(sru_rt))


def test_derivatives_at_kinks():
    zero = np.zeros(1)
    assert derivative(relu, zero)[1][0] == 0
    assert derivative(abs, zero)[1][0] == 1
    for extremum in (minimum, maximum):
        first, second = derivative(extremum, zero, zero)[1]
        assert (first, second) == (1, 0), "at a tie the first argument has it all"


def test_derivatives_far_out_are_finite():
    far = np.array([-1e4, -800.0, 800.0, 1e4])
    for f, wanted in (
        (sigmoid, [0, 0, 0, 0]),
        (tanh, [0, 0, 0, 0]),
        (softplus, [0, 0, 1, 1]),
        (relu, [0, 0, 1, 1]),
    ):
        np.testing.assert_array_equal(derivative(f, far)[1][0], wanted)
    infinite = np.array([-np.inf, np.inf])
    np.testing.assert_array_equal(derivative(relu, infinite)[1][0], [0, 1])


def test_the_branch_not_taken_adds_nothing():
    """Also where its own derivative is infinite or NaN."""
    a, b = np.array([-2.0, 0.0, 4.0]), np.array([1.0, 1.0, 1.0])
    _, (da, db) = derivative(lambda a, b: where(a > 0, a, 2 * b), a, b)
    np.testing.assert_array_equal(da, [0, 0, 1])
    np.testing.assert_array_equal(db, [2, 2, 0])
    table = Graph()
    x, seed = table.input("x"), table.input("seed")
    values = {"x": np.array([-1.0, 1.0]), "seed": np.array([np.inf, 3.0])}
    for branch_of_x in (where(x > 0, x, 0.0), relu(x), maximum(x, 0.0)):
        (gradient,), _ = differentiate([branch_of_x], [seed], [x])
        np.testing.assert_array_equal(evaluate(topological([gradient]), values, FLOAT64)[gradient], [0, 3])


def test_several_outputs_and_seeds():
    table = Graph()
    x, y, s, t = (table.input(name) for name in "xyst")
    gradients, adjoint = differentiate([x * y, x + y, x], [s, t, s], [x, y])
    values = {"x": 2.0, "y": 3.0, "s": 5.0, "t": 7.0}
    result = evaluate(topological(gradients), values, FLOAT64)
    assert [result[g] for g in gradients] == [5 * 3 + 7 + 5, 5 * 2 + 7]
    assert adjoint[x] is gradients[0] and adjoint[y] is gradients[1]


# ----------------------------------------------------------------------------------------------------------------------
# Random expressions


class Plain:
    """NumPy's own functions, which note what a comparison with finite differences must know.

    `kinks` holds the outcome of every comparison, `good` says where all values are of a sensible size.
    """

    def __init__(self, n: int) -> None:
        self.kinks: list[np.ndarray] = []
        self.good = np.ones(n, bool)
        self.n = n

    def note(self, value: Any, positive: Any = 1.0) -> Any:
        self.good = self.good & np.isfinite(value) & (np.abs(value) < 1e3) & (np.abs(positive) > 0.2)
        return value

    def kink(self, condition: Any) -> Any:
        self.kinks.append(np.broadcast_to(condition, (self.n,)))
        return condition

    def apply(self, op: str, *a: Any) -> Any:
        if op in ("log", "sqrt"):
            self.good = self.good & (a[0] > 0.2)
        if op in ("minimum", "maximum"):
            self.kink(a[0] < a[1])
        if op in ("relu", "abs"):
            self.kink(a[0] < 0)
        if op == "where":
            self.kink(a[0] < a[1])
        return self.note(_PLAIN[op](*a), a[1] if op == "/" else 1.0)


_PLAIN: dict[str, Callable[..., Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "minimum": lambda a, b: np.minimum(a, b),
    "maximum": lambda a, b: np.maximum(a, b),
    "where": lambda a, b, c, d: np.where(a < b, c, d),
    "neg": lambda a: -a,
    "abs": lambda a: abs(a),
    "square": lambda a: a * a,
    "cube": lambda a: a * a * a,
    "exp": lambda a: np.exp(a),
    "log": lambda a: np.log(a),
    "sqrt": lambda a: np.sqrt(a),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "tanh": lambda a: np.tanh(a),
    "relu": lambda a: np.maximum(a, 0),
    "softplus": lambda a: np.logaddexp(0, a),
}
_TRACED: dict[str, Callable[..., Any]] = _PLAIN | {
    "minimum": minimum,
    "maximum": maximum,
    "where": lambda a, b, c, d: where(a < b, c, d) if isinstance(a < b, Node) else (c if a < b else d),
    "square": lambda a: a**2,
    "cube": lambda a: a**3,
    **{name: getattr(sru_rt, name) for name in graph.FUNCTIONS},
}
_ARITY = {"+": 2, "-": 2, "*": 2, "/": 2, "minimum": 2, "maximum": 2, "where": 4}

# A tree is the index of an argument, a number, or (operation, trees).
LEAF = st.one_of(st.integers(0, 2), st.sampled_from([0.5, -1.5, 0.0, 1.0, -1.0, 2.0]))
TREES = st.recursive(
    LEAF,
    lambda below: st.sampled_from(list(_PLAIN)).flatmap(
        lambda op: st.tuples(st.just(op), *[below] * _ARITY.get(op, 1)),
    ),
    max_leaves=10,
)


def compute(tree: Any, arguments: Any, apply: Callable[..., Any]) -> Any:
    """The value of a tree. The same code runs on nodes and on arrays."""
    if isinstance(tree, tuple):
        return apply(tree[0], *(compute(t, arguments, apply) for t in tree[1:]))
    return arguments[tree] if isinstance(tree, int) else np.float64(tree)


def traced(tree: Any) -> Callable[..., Any]:
    """The tree as a step function would write it: constants are folded by Python before they meet a node."""
    return lambda *leaves: compute(tree, leaves, lambda op, *a: _TRACED[op](*a))


@given(TREES, st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_random_expression(tree, seed):
    """Values against NumPy, derivatives against finite differences, wherever no kink is near."""
    rng = np.random.default_rng(seed)
    n, step = 60, 1e-3
    values = [rng.uniform(-2, 2, n) for _ in range(3)]
    notes = []

    def plain(*arguments: np.ndarray) -> Any:
        notes.append(Plain(n))
        return np.broadcast_to(compute(tree, arguments, notes[-1].apply), (n,))

    with np.errstate(all="ignore"):
        wanted = plain(*values)
        differences = [central_difference(plain, values, i, step) for i in range(3)]
        try:
            got, gradients = derivative(traced(tree), *values)
        except StepError as error:
            assert re.search("division by the constant 0|must be finite", str(error))
            assume(False)
    good = np.logical_and.reduce([note.good for note in notes])
    for kinks in zip(*(note.kinks for note in notes)):
        good &= np.all(kinks == kinks[0], axis=0)
    assume(good.sum() > 3)
    np.testing.assert_allclose(got[good], wanted[good], rtol=1e-9, atol=1e-9)
    for gradient, difference in zip(gradients, differences):
        scale = 1 + np.abs(difference[good]).max()
        assert np.abs(gradient - difference)[good].max() <= 1e-5 * scale


# ----------------------------------------------------------------------------------------------------------------------
# Which states are affine


def own_cell(
    step: Callable[..., Any], gates: str = "a b", inputs: str = "", params: str = "p", state: str = "c", **options: Any
) -> Cell:
    arrays = [Array("u", "gates", tuple(gates.split()))]
    arrays += [Array("x", "inputs", tuple(inputs.split()), stacked=True)] if inputs else []
    arrays += [Array("params", "params", tuple(params.split()))] if params else []
    arrays += [Array(f"{name}0", "state", (name,)) for name in state.split()]
    return Cell(options.pop("name", "own"), step, tuple(arrays), **options)


AFFINE: dict[str, Callable[..., Any]] = {
    "gated": lambda a, b, p, c: (sigmoid(a) * c + (1 - sigmoid(a)) * b, c),
    "gate computed from all but the state": lambda a, b, p, c: (tanh(a * b + p) * c + exp(b) / (1 + a * a), c),
    "state over a gate": lambda a, b, p, c: (c / (1 + exp(a)) + b, c),
    "negative": lambda a, b, p, c: (-(b - c) * a, c),
    "branch on a gate": lambda a, b, p, c: (where(a > b, c * a, b), c),
    "not its own state": lambda a, b, p, c: (a * b, c),
    "constant": lambda a, b, p, c: (0.0, c),
    "itself": lambda a, b, p, c: (c, tanh(c) * c),
    "h need not be": lambda a, b, p, c: (a * c, tanh(c * c) / c),
    "folded away": lambda a, b, p, c: (a * c + 0 * tanh(c), c),
}
NOT_AFFINE: dict[str, Callable[..., Any]] = {
    "state in its gate": lambda a, b, p, c: (sigmoid(a + p * c) * c + b, c),
    "tanh of the state": lambda a, b, p, c: (a * tanh(c), c),
    "exp of the state": lambda a, b, p, c: (exp(c), c),
    "squared": lambda a, b, p, c: (c * c, c),
    "cubed": lambda a, b, p, c: (c**3, c),
    "division by the state": lambda a, b, p, c: (a / c, c),
    "state over itself": lambda a, b, p, c: (c / (1 + c), c),
    "branch on the state": lambda a, b, p, c: (where(c > 0, a, b), c),
    "relu of the state": lambda a, b, p, c: (relu(c) + a, c),
    "minimum": lambda a, b, p, c: (minimum(c, a), c),
    "maximum": lambda a, b, p, c: (maximum(b, c * a), c),
    "absolute value": lambda a, b, p, c: (abs(c), c),
}


@pytest.mark.parametrize("name", [*AFFINE, *NOT_AFFINE])
def test_affine_states_are_found(name):
    cell = own_cell((AFFINE | NOT_AFFINE)[name])
    assert cell.affine == (name in AFFINE)
    if name in AFFINE:
        assert_affine_in_numbers(cell)


def assert_affine_in_numbers(cell: Cell) -> None:
    """The new state at the middle of two states is the middle of the two new states."""
    rng = np.random.default_rng(0)
    order = topological(cell.formula.new_state)
    values = {name: rng.normal(size=50) for name in cell.names}

    def new_state(c: np.ndarray) -> Any:
        return evaluate(order, values | {"c": c}, FLOAT64)[cell.formula.new_state[0]]

    p, q = rng.normal(size=(2, 50))
    np.testing.assert_allclose(new_state((p + q) / 2), (new_state(p) + new_state(q)) / 2, atol=1e-12)


def test_degree():
    table = Graph()
    a, b, c, d = (table.input(name) for name in "abcd")
    cases = [
        (a * b, 0),
        (table.constant(3), 0),
        (c, 1),
        (a * c + b * d + 1, 1),
        (c * d, 2),
        (c * (d * 0 + a), 1),
        (where(a < b, c, d), 1),
        (where(c < b, a, b), 2),
        (a / (c + 1), 2),
        (tanh(a), 0),
        (tanh(d), 2),
        (minimum(a, b), 0),
        (minimum(a, c), 2),
        (c * c * c, 2),
    ]
    for node, wanted in cases:
        assert degree(node, [c, d]) == wanted, node
    assert degree(c * d, [c]) == 1, "only the variables asked for count"


def test_two_states_are_affine_together():
    def rotate(a, b, p, c, e):
        return a * c - b * e, b * c + a * e, c

    def mixed(a, b, p, c, e):
        return a * c * e, e, c

    assert own_cell(rotate, state="c e").affine
    assert not own_cell(mixed, state="c e").affine


def test_affine_built_in_cells():
    from sru_rt.cells.sru import Options, sru_cell

    assert not sru_cell(Options()).affine
    assert not sru_cell(Options(v="inputs")).affine
    for options in (Options(v="none"), Options(v="none", activation="tanh"), Options(v="none", reset_on="current")):
        assert sru_cell(options).affine


# ----------------------------------------------------------------------------------------------------------------------
# What is refused. The lines marked "refused" are those that a message must name.


def branch(a, b, p, c):
    if a > 0:  # refused
        return c, a
    return c, b


def branch_on_value(a, b, p, c):
    return (c if a else b), c  # refused


def use_and(a, b, p, c):
    return where(a > 0 and b > 0, a, c), c  # refused


def use_or(a, b, p, c):
    return where(a > 0 or b > 0, a, c), c  # refused


def use_not(a, b, p, c):
    return where(not a > 0, a, c), c  # refused


def chained(a, b, p, c):
    return where(0 < a < 1, a, c), c  # refused


def built_in_min(a, b, p, c):
    return min(a, c), c  # refused


def built_in_max(a, b, p, c):
    return max(a, c), c  # refused


def equal(a, b, p, c):
    return (b if a == 0 else c), c  # refused


def unequal(a, b, p, c):
    return where(a != b, b, c), c  # refused


def math_exp(a, b, p, c):
    return math.exp(a), c  # refused


def to_float(a, b, p, c):
    return float(a), c  # refused


def numpy_exp(a, b, p, c):
    return np.exp(a), c  # refused


def numpy_maximum(a, b, p, c):
    return np.maximum(a, 0), c  # refused


def numpy_where(a, b, p, c):
    return np.where(a > 0, a, c), c  # refused


def numpy_clip(a, b, p, c):
    return np.clip(a, 0, 1), c  # refused


def numpy_array(a, b, p, c):
    return a * np.ones(3), c  # refused


def array_on_the_left(a, b, p, c):
    return np.ones(3) * a, c  # refused


def text(a, b, p, c):
    return a + "1", c  # refused


def boolean(a, b, p, c):
    return a * True, c  # refused


def comparison_added(a, b, p, c):
    return a + (b > 0), c  # refused


def comparison_multiplied(a, b, p, c):
    return (b > 0) * a, c  # refused


def comparison_negated(a, b, p, c):
    return -(b > 0), c  # refused


def comparison_compared(a, b, p, c):
    return where((a > 0) > (b > 0), a, c), c  # refused


def comparison_in_function(a, b, p, c):
    return sigmoid(b > 0), c  # refused


def comparison_in_minimum(a, b, p, c):
    return minimum(b > 0, a), c  # refused


def comparison_as_branch(a, b, p, c):
    return where(a > 0, b > 0, c), c  # refused


def where_without_comparison(a, b, p, c):
    return where(a, b, c), c  # refused


def where_with_boolean(a, b, p, c):
    return where(True, b, c), c  # refused


def infinite(a, b, p, c):
    return minimum(a, math.inf), c  # refused


def not_a_number(a, b, p, c):
    return a + math.nan, c  # refused


def overflow(a, b, p, c):
    return c * exp(a * 0 + 1000), c  # refused


def log_of_zero(a, b, p, c):
    return c + log(a * 0), c  # refused


def over_zero(a, b, p, c):
    return a / 0, c  # refused


def over_folded_zero(a, b, p, c):
    return a / (b * 0), c  # refused


def root(a, b, p, c):
    return a**0.5, c  # refused


def reciprocal(a, b, p, c):
    return a**-1, c  # refused


def large_power(a, b, p, c):
    return a**17, c  # refused


def helper(a):
    return a * math.tanh(a)  # refused


def inside_a_helper(a, b, p, c):
    return helper(a), c


BRANCH = r"cannot branch on a value .* use sru_rt\.where"
NUMBER = r"cannot become a Python number; use the functions of sru_rt"
COMPARISON = r"comparison.*(where\(|as a number)"
REFUSED: list[tuple[Callable[..., Any], str]] = [
    (branch, BRANCH),
    (branch_on_value, BRANCH),
    (use_and, BRANCH),
    (use_or, BRANCH),
    (use_not, BRANCH),
    (chained, BRANCH),
    (built_in_min, BRANCH + r".*sru_rt\.minimum"),
    (built_in_max, BRANCH + r".*sru_rt\.maximum"),
    (equal, r"< <= > >=.*where"),
    (unequal, r"< <= > >=.*where"),
    (math_exp, NUMBER),
    (to_float, NUMBER),
    (numpy_exp, r"numpy.*functions of sru_rt"),
    (numpy_maximum, r"numpy.*functions of sru_rt"),
    (numpy_where, BRANCH),
    (numpy_clip, BRANCH),
    (numpy_array, r"numbers, not on array"),
    (array_on_the_left, r"numbers, not on array"),
    (text, r"numbers, not on '1'"),
    (boolean, r"numbers, not on True"),
    (comparison_added, COMPARISON),
    (comparison_multiplied, COMPARISON),
    (comparison_negated, COMPARISON),
    (comparison_compared, COMPARISON),
    (comparison_in_function, COMPARISON),
    (comparison_in_minimum, COMPARISON),
    (comparison_as_branch, COMPARISON),
    (where_without_comparison, r"takes a comparison first, such as"),
    (where_with_boolean, r"takes a comparison first, such as"),
    (infinite, r"constant inf.*finite"),
    (not_a_number, r"constant nan.*finite"),
    (overflow, r"constant inf.*finite"),
    (log_of_zero, r"constant -inf.*finite"),
    (over_zero, r"division by the constant 0"),
    (over_folded_zero, r"division by the constant 0"),
    (root, r"integer n from 0 to 16 \(got 0\.5\); use exp and log"),
    (reciprocal, r"integer n from 0 to 16 \(got -1\)"),
    (large_power, r"integer n from 0 to 16 \(got 17\)"),
    (inside_a_helper, NUMBER),
]


def refused_line(step: Callable[..., Any]) -> int:
    lines, first = inspect.getsourcelines(helper if step is inside_a_helper else step)
    (marked,) = (first + i for i, line in enumerate(lines) if line.endswith("# refused\n"))
    return marked


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("step", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_with_line_and_way_on(step, message):
    with pytest.raises(StepError, match=message) as caught:
        _ = own_cell(step).formula
    assert str(caught.value).startswith(f"{__file__}:{refused_line(step)}: ")
    assert isinstance(caught.value, (SruRtError, TypeError))


def one_value(a, b, p, c):
    return a * c


def three_values(a, b, p, c):
    return c, c, a


def a_list(a, b, p, c):
    return [c, a]


def nothing(a, b, p, c):
    c = a * c


def a_comparison(a, b, p, c):
    return c, a > 0


def no_number(a, b, p, c):
    return c, None


def an_array(a, b, p, c):
    return np.zeros(3), c


def missing_argument(a, b, c):
    return a * c, b


def undeclared_name(a, b, p, c, q):
    return a * c, q


def other_name(a, b, p, s):
    return a * s, b


RESULTS: list[tuple[Callable[..., Any], str]] = [
    (one_value, r"returns one value; it must return \(c, h\)"),
    (three_values, r"returns 3 values; it must return \(c, h\)"),
    (a_list, r"returns one list; it must return \(c, h\)"),
    (nothing, r"returns one NoneType; it must return \(c, h\)"),
    (a_comparison, r"comparison.*sru_rt\.where"),
    (no_number, r"numbers, not on None"),
    (an_array, r"numbers, not on array"),
    (missing_argument, r"p is declared, but .* does not take it by name; it takes a, b, c$"),
    (undeclared_name, r"takes q, which is not declared; declared are a, b, p, c: "),
    (other_name, r"takes s, which is not declared"),
]


@pytest.mark.parametrize(("step", "message"), RESULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_step_takes_and_returns(step, message):
    with pytest.raises(StepError, match=message) as caught:
        _ = own_cell(step).formula
    assert str(caught.value).startswith(f"{__file__}:{step.__code__.co_firstlineno}: cell own: ")


def fine(**values):
    return values["c"], values["c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "a a"}, "'a' is declared twice"),
        ({"gates": "a p"}, "'p' is declared twice"),
        ({"gates": "a c"}, "'c' is declared twice"),
        ({"constants": ("alpha", "a")}, "'a' is declared twice"),
        ({"gates": "a 1b"}, "'1b' cannot be the name"),
        ({"gates": "a b-c"}, "'b-c' cannot be the name"),
        ({"gates": "a lambda"}, "'lambda' cannot be the name"),
        ({"gates": "a None"}, "'None' cannot be the name"),
        ({"constants": ("",)}, "'' cannot be the name"),
        ({"constants": ("two words",)}, "'two words' cannot be the name"),
        ({"gates": ""}, "at least one gate and one state"),
        ({"state": ""}, "at least one gate and one state"),
        ({"name": "my cell"}, "'my cell' cannot be the name"),
        ({"name": "<lambda>"}, "'<lambda>' cannot be the name"),
        ({"name": ""}, "'' cannot be the name"),
    ],
)
def test_declarations(options, message):
    with pytest.raises(StepError, match=message) as caught:
        own_cell(fine, **options)
    assert str(caught.value).startswith(f"{__file__}:{fine.__code__.co_firstlineno}: cell ")


def test_an_array_of_no_kind():
    arrays = (Array("u", "gates", ("a",)), Array("w", "weights", ("w",)), Array("c0", "state", ("c",)))
    with pytest.raises(StepError, match=r"'weights'.*gates, inputs, per_sequence, params, state"):
        Cell("own", fine, arrays)


def test_values_of_two_graphs_do_not_mix():
    kept = []

    def leaks(a, b, p, c):
        kept.append(a * b)
        return c, a

    def takes(a, b, p, c):
        return c * kept[0], a  # refused

    _ = own_cell(leaks).formula
    for mix in (lambda x: x + kept[0], lambda x: kept[0] * x, lambda x: where(kept[0] < 0, x, 1)):
        with pytest.raises(StepError, match="one step function is used in another"):
            mix(Graph().input("x"))
    with pytest.raises(StepError, match="one step function is used in another") as caught:
        _ = own_cell(takes).formula
    assert str(caught.value).startswith(f"{__file__}:{refused_line(takes)}: ")


def test_a_failing_step_leaves_no_trace():
    """The profiler that reads local names is taken away, and another one that was there comes back."""
    import sys

    def fails(a, b, p, c):
        raise ZeroDivisionError("mine")

    events = []

    def profiler(*event: Any) -> None:
        events.append(event)

    sys.setprofile(profiler)
    try:
        with pytest.raises(StepError, match="ZeroDivisionError: mine"):
            _ = own_cell(fails).formula
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert events
