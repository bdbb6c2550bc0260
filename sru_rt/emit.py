"""Writes a traced step and its derivative as C++ that a person can read.

Every product that feeds one sum is written as fma(), so that all kernels round alike whatever the compiler would do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from math import isfinite

from .cell import ADJOINT_OF_H, KINDS, Cell, adjoint_of
from .errors import StepError
from .graph import COMPARISONS, FUNCTIONS, LEAVES, Node, topological
from .simplify import count_uses, is_complement, softplus_shares

_ARRAYS = dict(zip(KINDS, ("gate", "input", "per_sequence", "param", "state", "constant")))
_CPP_WORDS = (
    set(
        "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t class "
        "compl const "
        "constexpr const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern "
        "false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or "
        "or_eq private protected public register reinterpret_cast return short signed sizeof static static_assert "
        "static_cast struct switch template this thread_local throw true try typedef typeid typename union "
        "unsigned using "
        "virtual void volatile wchar_t while xor xor_eq real step gradient jacobian fma minimum maximum where "
        "sigmoid_fma softplus_share new_state new_h activation n_known NULL".split()
    )
    | set(FUNCTIONS)
    | set(_ARRAYS.values())
    | {f"d{name}" for name in (*_ARRAYS.values(), "new_state", "new_h")}
)

_COSTLY = ("tanh", "softplus", "log", "sigmoid", "sqrt", "exp")  # functions, those that take most first
_SUM, _PRODUCT, _UNARY, _ATOM = 1, 2, 3, 4
_INFIX = {"+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT, **dict.fromkeys(COMPARISONS, 0)}


class _Block:
    """Straight-line code for some nodes: one line for each value that has a name or is used more than once."""

    def __init__(
        self,
        outputs: Iterable[Node],
        names: Mapping[Node, str],
        leaf_names: Mapping[str, str],
        cpp: bool,
        fuse_more: bool = False,
        late: Collection[str] = (),
        known: Sequence[Node] = (),
    ):
        """`fuse_more` is for the gradient: fewer operations count for more there than every name of the step. In a step
        `late` are its states, which one step waits for after another: what follows them should be few operations. The
        first ones of `known` may be known already."""
        self.cpp = cpp
        self.known = {node: i for i, node in enumerate(known)}
        outputs = list(outputs)
        self.order = topological(outputs)
        self.uses = count_uses(self.order, outputs)
        self.complement: dict[Node, tuple[Node, Node]] = {}
        self.shares = softplus_shares(self.order, self.uses) if cpp else {}
        fused = {part for parts in self.shares.values() for part in parts}
        self.wanted = {node: name for node, name in names.items() if node not in fused}
        if fuse_more:
            self._fuse_complements()
            self._drop_names()
        elif late:
            waiting = _descendants(self.order, late)
            self._fuse_complements(lambda x, y: y in waiting and x not in waiting)
        self.taken = set(leaf_names.values()) | (_CPP_WORDS if cpp else set())
        self.text: dict[Node, tuple[str, int]] = {}
        self.fused: set[Node] = set()  # sums that are an fma() on the line of what uses them
        self.leaf_names = leaf_names
        self.lines: list[str] = []
        self.in_full: dict[str, str] = {}  # what stands behind a name
        for node in self.order:
            self._add(node)

    def __getitem__(self, node: Node) -> str:
        return self.text[node][0]

    def _fuse_complements(self, pays: Callable[[Node, Node], bool] = lambda x, y: True) -> None:
        """x*(1 - y) is one fma(-x, y, x), wherever 1 - y then need not be computed, and it `pays` for x and y."""
        found: dict[Node, list[Node]] = {}
        for product in self.order:
            factor = next(filter(is_complement, reversed(product.args)), None) if product.op == "*" else None
            if factor is not None:
                found.setdefault(factor, []).append(product)
        for factor, products in found.items():
            y = factor.args[1]
            if self.uses[factor] > len(products) or (y.op == "*" and self.uses[y] == 1):
                continue
            others = [next(a for a in product.args if a is not factor) for product in products]
            if not all(pays(x, y) for x in others):
                continue
            for product, x in zip(products, others):
                self.complement[product] = x, y
                self.uses[x] += 1
                self.uses[y] += 1
            self.uses[factor] = 0

    def _drop_names(self) -> None:
        """Those of what is fused, and so is on no line of its own."""
        fused = {factor for product in self.complement for factor in product.args if self.uses[factor] == 0}
        for node in self.order:
            if node.op in ("+", "-"):
                fused.update(a for a in node.args if a.op == "*" and self.uses[a] == 1 and a not in self.complement)
        self.wanted = {node: name for node, name in self.wanted.items() if node not in fused}

    def _add(self, node: Node) -> None:
        expression = self._expression(node)
        own_line = node in self.wanted or node in self.known or (self.uses[node] > 1 and not node.is_condition)
        if node.op not in LEAVES and own_line:
            name = self._name(node)
            self.in_full[name] = f"({self._full(expression[0])})"
            kind = "auto" if node.is_condition else "real"
            if node in self.known:
                i = self.known[node]
                expression = f"n_known > {i} ? activation[{i}] : {expression[0]}", _ATOM
            self.lines.append(f"const {kind} {name} = {expression[0]};" if self.cpp else f"{name} = {expression[0]}")
            expression = (name, _ATOM)
        self.text[node] = expression

    def _full(self, expression: str) -> str:
        return re.sub(r"\b[^\W\d]\w*", lambda word: self.in_full.get(word[0], word[0]), expression)

    def rounds(self, node: Node) -> str:
        """What the value of a node is computed by, such that equal texts are equal roundings."""
        return ast.dump(ast.parse(self._full(self[node]), mode="eval"))

    def _name(self, node: Node) -> str:
        base = self.wanted.get(node, "t")
        base = _ascii(base) if self.cpp else base
        name, n = (base, 1) if node in self.wanted else ("t1", 1)
        while name in self.taken:
            n += 1
            name = f"{base}{n}"
        self.taken.add(name)
        return name

    def _expression(self, node: Node) -> tuple[str, int]:
        op, args = node.op, node.args
        if op == "input":
            return self.leaf_names[args[0]], _ATOM
        if op == "constant":
            if not isfinite(args[0]):
                raise StepError(f"a step function uses the constant {args[0]}; constants must be finite")
            return (f"real({args[0]!r})", _ATOM) if self.cpp else (f"{args[0]:g}", _ATOM if args[0] >= 0 else _UNARY)
        if node in self.shares:
            _, x, y = self.shares[node]
            return f"softplus_share({self[x.args[0]]}, {self[y.args[0]]})", _ATOM
        if node in self.complement:
            x, y = self.complement[node]
            return f"fma(-{self._operand(x, _UNARY)}, {self[y]}, {self[x]})", _ATOM
        if op in ("+", "-") and self.cpp:
            fused = self._fused(node)
            if fused:
                if self.uses[node] == 1 and node not in self.wanted:
                    self.fused.add(node)
                return fused, _ATOM
        if op in _INFIX:
            rank = _INFIX[op]
            sign = op if rank == _PRODUCT else f" {op} "
            return self._operand(args[0], rank) + (sign if rank != _PRODUCT else f" {op} " if self.cpp else op) + (
                self._operand(args[1], rank + 1)
            ), rank
        if op == "neg":
            return f"-{self._operand(args[0], _UNARY)}", _UNARY
        if op == "sigmoid" and args[0] in self.fused:
            return self.text[args[0]][0].replace("fma(", "sigmoid_fma(", 1), _ATOM
        return f"{op}({', '.join(self.text[a][0] for a in args)})", _ATOM

    def _operand(self, node: Node, rank: int) -> str:
        text, own = self.text[node]
        return f"({text})" if own < rank else text

    def _fused(self, node: Node) -> str | None:
        """fma() for a sum with a product that nothing else uses; the left product is preferred."""
        left, right = node.args
        if self._only_here(left):
            addend = self[right] if node.op == "+" else f"-{self._operand(right, _UNARY)}"
            return f"fma({self._factors(left)}, {addend})"
        if self._only_here(right):
            return f"fma({self._factors(right, negative=node.op == '-')}, {self[left]})"
        return None

    def _only_here(self, node: Node) -> bool:
        return node.op == "*" and self.uses[node] == 1 and node not in self.wanted and node not in self.complement

    def _factors(self, product: Node, negative: bool = False) -> str:
        a, b = product.args
        return f"-{self._operand(a, _UNARY)}, {self[b]}" if negative else f"{self[a]}, {self[b]}"


def _descendants(order: Iterable[Node], names: Collection[str]) -> set[Node]:
    """The nodes, in their order, that depend on inputs of these names."""
    found: set[Node] = set()
    for node in order:
        if node.args[0] in names if node.op == "input" else any(a in found for a in node.args if isinstance(a, Node)):
            found.add(node)
    return found


def formula_lines(cell: Cell) -> list[str]:
    """The step as the papers would print it, one line for each named value; c' is the state before the step."""
    f = cell.formula
    leaf_names = {name: f"{name}'" if name in cell.state else name for name in cell.names}
    results = [*zip(cell.state, f.new_state), ("h", f.h)]
    # A local variable keeps its name unless it is that of a result, and another one.
    names = {node: name for node, name in f.names.items() if dict(results).get(name, node) is node}
    block = _Block([*f.new_state, f.h], names, leaf_names, cpp=False)
    lines = list(block.lines)
    for name, node in results:
        if block[node] != name:
            lines.append(f"{name} = {block[node]}")
    return lines


def describe(cell: Cell) -> str:
    """The formula of a cell and its derivatives, as text to read."""
    f = cell.formula
    declared = "; ".join(f"{kind} {' '.join(cell.of_kind(kind))}" for kind in KINDS if cell.of_kind(kind))
    names = {name: f"{name}'" if name in cell.state else name for name in cell.names}
    names |= {adjoint_of(name): f"d{name}_next" for name in cell.state} | {ADJOINT_OF_H: "dh"}
    results = {name: f"d{names[name]}" for name in f.gradient}
    taken = names | {f"result {name}": result for name, result in results.items()}
    block = _Block(list(f.gradient.values()), f.gradient_names, taken, cpp=False)
    states, new = ", ".join(names[name] for name in cell.state), ", ".join(f"d{name}_next" for name in cell.state)
    return "\n".join(
        [
            f"{cell.name}: {declared}",
            f"{'affine' if cell.affine else 'not affine'} in the state",
            "",
            *(f"  {line}" for line in formula_lines(cell)),
            "",
            f"Derivatives, where {states} is the state before the step, and {new}, dh are the gradients of the new",
            "state and of h:",
            "",
            *(f"  {line}" for line in block.lines),
            *(f"  {results[name]} = {block[node]}" for name, node in f.gradient.items()),
        ]
    )


def emit(cell: Cell) -> str:
    """The cell as a C++ struct with the members `step` and `gradient`, both over any number type `real`.

    A cell of few states has a third one, `jacobian`.
    """
    counts = ", ".join(f"n_{kind} = {len(cell.of_kind(kind))}" for kind in KINDS)
    lines = [
        "// clang-format off",
        f"// Written by sru_rt from the step function of {cell.name}; change that one.",
        "//",
        *(f"//   {line}" for line in formula_lines(cell)),
        "#pragma once",
        "",
        f"struct {struct_name(cell)} {{",
        f"  static constexpr int {counts};",
        f"  static constexpr int n_activations = {len(activations(cell))};",
        f"  static constexpr bool affine = {'true' if cell.affine else 'false'};",
        "",
        *_step_function(cell),
        "",
        *_gradient_function(cell),
        *_jacobian_function(cell),
        "};",
    ]
    return "\n".join(lines) + "\n"


def struct_name(cell: Cell) -> str:
    """A name that no keyword of C++ and nothing in the headers has."""
    return f"{_ascii(cell.name)}_cell"


def _ascii(name: str) -> str:
    """`name` with letters beyond ASCII spelled out, as not every compiler takes them."""
    return "".join(c if c.isascii() else f"u{ord(c):04x}" for c in name)


def _cpp_leaf_names(cell: Cell) -> dict[str, str]:
    """The names of all inputs in C++. Those that can stay as they are come first."""
    wanted = {name: _ascii(name) for name in cell.names if name not in cell.state}
    wanted |= {name: f"{_ascii(name)}_prev" for name in cell.state}
    wanted |= {adjoint_of(name): f"d{_ascii(name)}_next" for name in cell.state} | {ADJOINT_OF_H: "dh"}
    names: dict[str, str] = {}
    for name, text in sorted(wanted.items(), key=lambda item: item[1] in _CPP_WORDS):
        while text in _CPP_WORDS or text in names.values():
            text += "_"
        names[name] = text
    return names


def _unpack(cell: Cell, names: Mapping[str, str], order: Iterable[Node]) -> list[str]:
    """Gives the values that the following lines use their names."""
    used = {node.args[0] for node in order if node.op == "input"}
    lines = []
    for kind, array in _ARRAYS.items():
        parts = [f"{names[n]} = {array}[{i}]" for i, n in enumerate(cell.of_kind(kind)) if n in used]
        if parts:
            lines.append(f"    const real {', '.join(parts)};")
    return lines


@cache
def activations(cell: Cell) -> tuple[Node, ...]:
    """Functions of which the new states are made, and that the gradient need not compute if it is told their values.

    Those that take most come first. Of functions that are computed of each other they are the last ones, unless the
    gradient needs others as well; and step() and gradient() round them alike.
    """
    f, names = cell.formula, _cpp_leaf_names(cell)
    step, gradient = _of_step(cell, names), _of_gradient(cell, names)
    both = [node for node in topological(f.new_state) if node.op in _COSTLY and node in gradient.text]
    alike = {node for node in both if step.rounds(node) == gradient.rounds(node)}
    needed = [node for node in topological(f.gradient.values(), alike) if node in alike]
    return tuple(sorted(needed, key=lambda node: _COSTLY.index(node.op)))


def _of_step(cell: Cell, names: Mapping[str, str]) -> _Block:
    f = cell.formula
    return _Block([*f.new_state, f.h], f.names, names, cpp=True, late=cell.state)


def _of_gradient(cell: Cell, names: Mapping[str, str], known: Sequence[Node] = ()) -> _Block:
    f = cell.formula
    wanted = dict(f.gradient_names)
    for name in (*cell.gates, *cell.inputs):
        wanted.setdefault(f.gradient[name], f"d{name}")
    return _Block(list(f.gradient.values()), wanted, names, cpp=True, fuse_more=True, known=known)


def _step_function(cell: Cell) -> list[str]:
    f, names = cell.formula, _cpp_leaf_names(cell)
    block = _of_step(cell, names)
    return [
        "  // `activation` gets what gradient() may be told, if it is not null.",
        "  template <class real>",
        "  SRU_FN void step(const real *gate, const real *input, const real *per_sequence, const real *param,",
        "                   const real *state, const real *constant, real *new_state, real *new_h,",
        "                   real *activation = nullptr) {",
        *_unpack(cell, names, block.order),
        *(f"    {line}" for line in block.lines),
        *(f"    new_state[{i}] = {block[node]};" for i, node in enumerate(f.new_state)),
        f"    *new_h = {block[f.h]};",
        *(f"    if (activation) activation[{i}] = {block[node]};" for i, node in enumerate(activations(cell))),
        "  }",
    ]


def _gradient_function(cell: Cell) -> list[str]:
    f, names = cell.formula, _cpp_leaf_names(cell)
    block = _of_gradient(cell, names, activations(cell))
    used = {node.args[0] for node in block.order if node.op == "input"}
    states = [(adjoint_of(n), f"dnew_state[{i}]") for i, n in enumerate(cell.state)]
    adjoints = [f"{names[n]} = {text}" for n, text in [*states, (ADJOINT_OF_H, "*dnew_h")] if n in used]
    results = [
        f"    d{array}[{i}] = {block[f.gradient[name]]};"
        for kind, array in _ARRAYS.items()
        if kind != "constants"
        for i, name in enumerate(cell.of_kind(kind))
    ]
    return [
        "  // `dnew_state`, `dnew_h` are the adjoints of what step() returns; the results are those of what it takes.",
        "  // The first `n_known` of `activation` need not be computed.",
        "  template <class real, int n_known = 0>",
        "  SRU_FN void gradient(const real *gate, const real *input, const real *per_sequence, const real *param,",
        "                       const real *state, const real *constant, const real *dnew_state, const real *dnew_h,",
        "                       real *dgate, real *dinput, real *dper_sequence, real *dparam, real *dstate,",
        "                       const real *activation = nullptr) {",
        *_unpack(cell, names, block.order),
        *([f"    const real {', '.join(adjoints)};"] if adjoints else []),
        *(f"    {line}" for line in block.lines),
        *results,
        "  }",
    ]


def _jacobian_function(cell: Cell) -> list[str]:
    f, names = cell.formula, _cpp_leaf_names(cell)
    if not f.jacobian:
        return []
    block = _Block(f.jacobian, f.names, names, cpp=True)
    return [
        "",
        "  // The derivatives of the new states by the states, row by row.",
        "  template <class real>",
        "  SRU_FN void jacobian(const real *gate, const real *input, const real *per_sequence, const real *param,",
        "                       const real *state, const real *constant, real *jacobian) {",
        *_unpack(cell, names, block.order),
        *(f"    {line}" for line in block.lines),
        *(f"    jacobian[{i}] = {block[node]};" for i, node in enumerate(f.jacobian)),
        "  }",
    ]
