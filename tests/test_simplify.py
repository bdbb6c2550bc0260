"""How derivatives are arranged: cheaper, never dearer, and with the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sru_rt import exp, sigmoid, tanh, where
from sru_rt.errors import StepError
from sru_rt.graph import Graph, Node, differentiate, evaluate, topological
from sru_rt.simplify import simplify
from test_emit import operations
from test_graph import FLOAT64, TREES, as_node, traced

# What is computed of x, y, z, w, and what should be.
ARRANGED: dict[str, tuple[Callable[..., list[Any]], Callable[..., list[Any]]]] = {
    "a common factor comes out of a difference": (
        lambda x, y, z, w: [x * y - x * z],
        lambda x, y, z, w: [x * (y - z)],
    ),
    "on either side": (
        lambda x, y, z, w: [y * x + x * z],
        lambda x, y, z, w: [x * (y + z)],
    ),
    "out of three products": (
        lambda x, y, z, w: [x * y + x * z + w * x],
        lambda x, y, z, w: [x * (y + z + w)],
    ),
    "not of a product that is needed by itself": (
        lambda x, y, z, w: [x * y - x * z, x * y],
        lambda x, y, z, w: [x * y - x * z, x * y],
    ),
    "branches on one condition meet": (
        lambda x, y, z, w: [where(x < y, z, 0.0) + where(x < y, 0.0, w)],
        lambda x, y, z, w: [where(x < y, z, w)],
    ),
    "also behind a product": (
        lambda x, y, z, w: [where(x < y, z, 0.0) + where(x < y, 0.0, w) * exp(x)],
        lambda x, y, z, w: [where(x < y, z, w * exp(x))],
    ),
    "not on two conditions": (
        lambda x, y, z, w: [where(x < y, z, 0.0) + where(x <= y, 0.0, w)],
        lambda x, y, z, w: [where(x < y, z, 0.0) + where(x <= y, 0.0, w)],
    ),
    "a branch used twice is not repeated": (
        lambda x, y, z, w: [where(x < y, z, 0.0) * w, where(x < y, z, 0.0) * x],
        lambda x, y, z, w: [where(x < y, z, 0.0) * w, where(x < y, z, 0.0) * x],
    ),
    "a product is part of another": (
        lambda x, y, z, w: [x * y, (x * z) * (y * w)],
        lambda x, y, z, w: [x * y, x * y * z * w],
    ),
    "a part of two products": (
        lambda x, y, z, w: [x * z * y, w * (y * x)],
        lambda x, y, z, w: [x * y * z, x * y * w],
    ),
    "1 - y comes last": (
        lambda x, y, z, w: [x * (y * (1 - y))],
        lambda x, y, z, w: [x * y * (1 - y)],
    ),
    "a square beside a product": (
        lambda x, y, z, w: [x * (1 - y * y), x * y * z],
        lambda x, y, z, w: [x - x * y * y, x * y * z],
    ),
    "a square alone": (
        lambda x, y, z, w: [x * (1 - y * y), x * z],
        lambda x, y, z, w: [x * (1 - y * y), x * z],
    ),
    "an order that saves nothing stays": (
        lambda x, y, z, w: [x * (y * z) + w],
        lambda x, y, z, w: [x * (y * z) + w],
    ),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_arranged(name):
    table = Graph()
    leaves = [table.input(n) for n in "xyzw"]
    outputs, wanted = ([as_node(table, node) for node in make(*leaves)] for make in ARRANGED[name])
    simpler = simplify(outputs, [])
    for output, node in zip(outputs, wanted):
        assert simpler[output] is node


def test_values_of_the_step_stay():
    table = Graph()
    x, y, z, seed = (table.input(n) for n in ("x", "y", "z", "seed"))
    gate = sigmoid(x)
    result = tanh(gate * y - gate * z)
    derived, _ = differentiate([result], [seed], [x, y, z])
    kept = set(topological([result]))
    left = {node for node in topological(derived) if node in kept}
    assert gate * y - gate * z in left
    simpler = simplify(derived, [result])
    assert all(simpler[node] is node for node in left)
    assert left <= set(topological([simpler[node] for node in derived]))


def test_the_derivative_of_a_gated_sum():
    """f*c + (1 - f)*u takes one difference, of which two products share one."""
    table = Graph()
    a, c, u, seed = (table.input(n) for n in ("a", "c", "u", "seed"))
    f = sigmoid(a)
    new = f * c + (1 - f) * u
    derived, _ = differentiate([new], [seed], [a, c, u])
    da, dc, du = (simplify(derived, [new])[node] for node in derived)
    assert dc is seed * f and du is seed * (1 - f)
    assert da is du * (c - u) * f


@given(TREES, st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_random_derivatives_keep_their_values_and_are_no_dearer(tree, seed):
    table = Graph()
    leaves = [table.input(f"x{i}") for i in range(3)]
    try:
        with np.errstate(all="ignore"):
            output = as_node(table, traced(tree)(*leaves))
        derived, _ = differentiate([output], [table.input("seed")], leaves)
        simpler = [simplify(derived, [output])[node] for node in derived]
    except StepError:
        return  # constants that cannot be folded, see test_graph.py
    assert cost([*simpler, output]) <= cost([*derived, output])
    rng = np.random.default_rng(seed)
    values = {f"x{i}": rng.uniform(-2, 2, 60) for i in range(3)} | {"seed": rng.uniform(-2, 2, 60)}
    with np.errstate(all="ignore"):
        found = evaluate(topological([*derived, *simpler]), values, FLOAT64)
        sizes = magnitudes(derived, found)
    for was, now in zip(derived, simpler):
        sensible = np.broadcast_to(np.isfinite(sizes[was]) & (sizes[was] < 1e9), 60)
        with np.errstate(invalid="ignore"):
            difference = np.broadcast_to(np.abs(found[was] - found[now]), 60)
        assert np.all(difference[sensible] <= 1e-11 * np.broadcast_to(1e-3 + sizes[was], 60)[sensible])


def cost(outputs: list[Node]) -> int:
    """Operations, without signs: those are part of the instruction that takes the value."""
    return operations(outputs) - sum(node.op == "neg" for node in topological(outputs))


def magnitudes(outputs: list[Node], values: dict[Node, Any]) -> dict[Node, Any]:
    """How large the terms are that a value is made of, beside which it may be small."""
    sizes: dict[Node, Any] = {}
    for node in topological(outputs):
        below = [sizes[a] for a in node.args if isinstance(a, Node) and not a.is_condition]
        if node.op in ("+", "-", "where"):
            sizes[node] = sum(below)
        elif node.op == "*":
            sizes[node] = below[0] * below[1]
        elif node.op == "neg":
            sizes[node] = below[0]
        elif not node.is_condition:
            sizes[node] = np.abs(values[node]) * (1 + sum(np.abs(values[a]) for a in node.args if isinstance(a, Node)))
    return sizes
