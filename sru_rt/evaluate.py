"""The graph of a step on arrays of any library: what a binding's differentiable reference is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .graph import Node, topological


def evaluate(
    outputs: Sequence[Node],
    values: Mapping[str, Any],
    operations: Mapping[str, Callable[..., Any]],
    array: Callable[[Any], Any],
) -> list[Any]:
    """The values of nodes.

    Args:
        values: those of the inputs, by name, arrays or numbers.
        operations: by the names that nodes have.
        array: makes an array of a number, and leaves arrays as they are.
    """
    found: dict[Node, Any] = {}
    for node in topological(list(outputs)):
        if node.op in ("input", "constant"):
            found[node] = array(values[node.args[0]] if node.op == "input" else node.args[0])
        else:
            found[node] = operations[node.op](*(found[a] for a in node.args))
    return [found[node] for node in outputs]
