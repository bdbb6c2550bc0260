"""Arranges a derivative so that it takes fewer operations, as a person would who derives it by hand.

Values of the step itself stay as the step function computes them; only what is made of adjoints is rearranged, and a
result changes by no more than a few roundings of its own size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations

from .graph import LEAVES, Node, rebuilt, topological, where


def simplify(outputs: Sequence[Node], step: Iterable[Node]) -> dict[Node, Node]:
    """What to compute in place of each node that `outputs` need; nodes that are not needed any more are left out.

    `step` are the results of the step function.
    """
    kept = set(topological(step))
    gathered = _gather(outputs, kept)
    shared = _Products([gathered[node] for node in outputs], kept).new
    return {node: shared[new] for node, new in gathered.items() if new in shared}


def count_uses(order: Sequence[Node], outputs: Iterable[Node]) -> Counter[Node]:
    """How many arguments and outputs each node of `order` is."""
    uses = Counter(a for node in order for a in node.args if isinstance(a, Node))
    uses.update(outputs)
    return uses


# ----------------------------------------------------------------------------------------------------------------------
# Sums


def _gather(outputs: Sequence[Node], kept: set[Node]) -> dict[Node, Node]:
    """Factors that two products of a sum share come out of it, and branches on one condition become one.

    a*b - a*c is a*(b - c); where(p, a, 0)*b + where(p, 0, c) is where(p, a*b, c). It is done to what nothing else uses,
    so that nothing is computed twice.
    """
    order = topological(outputs)
    uses = count_uses(order, outputs)
    new: dict[Node, Node] = {}
    for node in order:
        if node in kept or node.op in LEAVES:
            new[node] = node
            continue
        parts = [new[a] for a in node.args]
        once = [uses[a] == 1 and a not in kept for a in node.args]
        found = None
        if node.op == "*":
            found = _into_branches(parts, once)
        elif node.op in ("+", "-") and all(once):
            found = _of_products(node.op, *parts) if parts[0].op == "*" else _of_branches(node.op, *parts)
        new[node] = rebuilt(node.op, parts) if found is None else found
    return new


def _into_branches(parts: Sequence[Node], once: Sequence[bool]) -> Node | None:
    """A product with a branch of which one side is 0."""
    for i, part in enumerate(parts):
        if once[i] and part.op == "where" and any(side.is_constant(0) for side in part.args[1:]):
            sides = (rebuilt("*", [side, parts[1]] if i == 0 else [parts[0], side]) for side in part.args[1:])
            return where(part.args[0], *sides)
    return None


def _of_products(op: str, left: Node, right: Node) -> Node | None:
    if left.op == right.op == "*":
        for i, factor in enumerate(left.args):
            for j, other in enumerate(right.args):
                if factor is other:
                    return rebuilt("*", [factor, rebuilt(op, [left.args[1 - i], right.args[1 - j]])])
    return None


def _of_branches(op: str, left: Node, right: Node) -> Node | None:
    if left.op == right.op == "where" and left.args[0] is right.args[0]:
        return where(left.args[0], *(rebuilt(op, pair) for pair in zip(left.args[1:], right.args[1:])))
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Products


class _Products:
    """Products of several factors, in an order in which they share as much as they can.

    Of dc*(1 - f) and (dc*(c - u))*(f*(1 - f)) the first one becomes a factor of the second. `new` has what to compute
    in place of each node.
    """

    def __init__(self, outputs: Sequence[Node], kept: set[Node]) -> None:
        order = topological(outputs)
        self.kept = kept
        self.uses = count_uses(order, outputs)
        self.place = {node: i for i, node in enumerate(order)}
        self.user = {a: node for node in order for a in node.args if isinstance(a, Node)}
        self.factors = {node: self._factors(node) for node in order if self._is_whole(node)}
        self.arranged: set[Node] = set()
        self.remainders: dict[Node, tuple[Node, Node, Node]] = {}
        while self._share_one():
            pass
        self._share_squares()
        self.new: dict[Node, Node] = {}
        for node in order:
            self._build(node)

    def _is_product(self, node: Node) -> bool:
        return node.op == "*" and node not in self.kept

    def _is_whole(self, node: Node) -> bool:
        """Whether `node` is a product, and no mere part of another one."""
        return self._is_product(node) and not (self.uses[node] == 1 and self._feeds(node, "*"))

    def _feeds(self, node: Node, *ops: str) -> bool:
        user = self.user.get(node)
        return user is not None and user.op in ops and user not in self.kept

    def _factors(self, product: Node) -> list[Node]:
        found, stack = [], [*reversed(product.args)]
        while stack:
            node = stack.pop()
            if self._is_product(node) and not self._is_whole(node):
                stack.extend(reversed(node.args))
            else:
                found.append(node)
        return found

    def _share_one(self) -> bool:
        """Puts the two factors that most products have in common into one product."""
        pairs: Counter[tuple[Node, Node]] = Counter()
        for product, factors in self.factors.items():
            if self.uses[product] == 1 and self._feeds(product, "+", "-"):
                continue  # it costs nothing beside the sum
            pairs.update(dict.fromkeys(self._ordered(a, b) for a, b in combinations(factors, 2)).keys())
        pair = max(pairs, key=lambda pair: (pairs[pair], any(map(is_complement, pair))), default=None)
        if pair is None or pairs[pair] < 2:
            return False
        self._share(pair)
        return True

    def _share(self, pair: tuple[Node, Node]) -> Node:
        """Makes `pair` one factor wherever it is part of a product; returns that factor."""
        shared = next((p for p, factors in self.factors.items() if _without(factors, pair) == []), None)
        if shared is None:
            shared = rebuilt("*", pair)
            if shared not in self.kept:
                self.factors[shared] = list(pair)
        for product, factors in self.factors.items():
            rest = _without(factors, pair)
            if product is not shared and rest is not None:
                factors[:] = [shared, *rest]
                self.arranged.add(product)
        return shared

    def _share_squares(self) -> None:
        """x*(1 - y*y), of a tanh, is x - (x*y)*y where x*y is part of another product."""
        for product, factors in list(self.factors.items()):
            of_one = [f for f in factors if is_complement(f) and self._is_product(f.args[1]) and self.uses[f] == 1]
            if len(factors) != 2 or len(of_one) != 1:
                continue
            x, (a, b) = next(f for f in factors if f is not of_one[0]), of_one[0].args[1].args
            if a is b and any(_without(other, (x, a)) is not None for other in self.factors.values()):
                self.remainders[product] = x, self._share((x, a)), a

    def _ordered(self, a: Node, b: Node) -> tuple[Node, Node]:
        """A pair in the order of the graph, where products that were added come last."""
        last = len(self.place)
        return (a, b) if self.place.setdefault(a, last) <= self.place.setdefault(b, last) else (b, a)

    def _build(self, node: Node) -> Node:
        found = self.new.get(node)
        if found is None:
            factors = self.factors.get(node, [])
            if node in self.remainders:
                x, part, y = (self._build(a) for a in self.remainders[node])
                found = rebuilt("-", [x, rebuilt("*", [part, y])])
            elif node in self.arranged or any(is_complement(factor) for factor in factors):
                last = sorted(factors, key=is_complement)  # x*(1 - y) is one operation, see emit.py
                found = self._build(last[0])
                for factor in last[1:]:
                    found = rebuilt("*", [found, self._build(factor)])
            elif node in self.kept or node.op in LEAVES:
                found = node
            else:
                found = rebuilt(node.op, [self._build(a) for a in node.args])
            self.new[node] = found
        return found


def _without(factors: Sequence[Node], pair: Sequence[Node]) -> list[Node] | None:
    """The other factors, if those of `pair` are among them."""
    rest = list(factors)
    for factor in pair:
        i = next((i for i, other in enumerate(rest) if other is factor), None)
        if i is None:
            return None
        del rest[i]
    return rest


def is_complement(node: Node) -> bool:
    """Whether `node` is 1 - y."""
    return node.op == "-" and node.args[0].is_constant(1)


def softplus_shares(order: Sequence[Node], uses: Counter[Node]) -> dict[Node, tuple[Node, Node, Node]]:
    """Nodes sigmoid(softplus(x) - softplus(y)): their difference and its two terms, which nothing else uses."""
    found = {}
    for node in order:
        if node.op == "sigmoid" and node.args[0].op == "-":
            parts = node.args[0], *node.args[0].args
            if parts[1].op == parts[2].op == "softplus" and all(uses[part] == 1 for part in parts):
                found[node] = parts
    return found
