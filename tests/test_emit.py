"""The emitted C++: committed, the same in every process, readable, free of name clashes, lean, and right."""

from __future__ import annotations

import importlib.util
import itertools
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import sru_rt
import tolerance
from sru_rt import (
    compile_cpu,
    exp,
    graph,
    log,
    maximum,
    minimum,
    recurrence,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)
from sru_rt.cell import Array, Cell
from sru_rt.cells.sru import Options, sru_cell
from sru_rt.dtypes import IO_DTYPES, state_dtype, to_numpy
from sru_rt.emit import activations, emit, formula_lines
from sru_rt.errors import StepError
from sru_rt.graph import LEAVES, Node, evaluate, topological
from test_graph import TREES, Plain, central_difference, compute
from test_own_cells import EXAMPLES

TOOLS = Path(__file__).resolve().parent.parent / "tools"
FLOAT64 = np.dtype(np.float64)


@pytest.fixture(scope="module")
def write_cells():
    """The script that writes cuda/cells/."""
    spec = importlib.util.spec_from_file_location("write_cells", TOOLS / "write_cells.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_cell(step: Callable[..., Any], *, constants: tuple[str, ...] = (), name: str = "own", **kinds: str) -> Cell:
    """A cell with one array of each kind, with the given members; states have one each."""
    arrays = []
    for kind, members in kinds.items():
        names = tuple(members.split())
        arrays += [Array(f"{n}0", kind, (n,)) for n in names] if kind == "state" else [Array(kind, kind, names)]
    return Cell(name, step, tuple(arrays), constants)


def run(cell: Cell, arrays: dict[str, np.ndarray], dtype: str, constants: tuple[float, ...] = ()) -> dict[str, Any]:
    """h, the new states and all gradients by the names of the arrays; adjoints are given as dh and d<state>_next."""
    states = [a.name for a in cell.arrays if a.kind == "state"]
    given_arrays = {
        a.name: recurrence.operand(a, arrays[a.name].astype(to_numpy(dtype)), dtype)
        for a in cell.arrays
        if a.kind != "state"
    }
    accumulator = to_numpy(state_dtype(dtype))
    c0 = [arrays[name].astype(accumulator) for name in states]
    operands = recurrence.Operands(cell, dtype, given_arrays, c0, constants)
    h, c_last, saved = recurrence.forward(operands, every=1)
    adjoints = [arrays[f"d{name}"].astype(accumulator) for name in states]
    dh = arrays["dh"].astype(to_numpy(dtype))
    gradients, dc0 = recurrence.backward(operands, saved, 1, dh, adjoints, given_arrays)
    found = {"h": h, **dict(zip(states, c_last))}
    found |= {f"d{name}": value for name, value in [*gradients.items(), *zip(states, dc0)]}
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def draw(cell: Cell, rng: np.random.Generator, L: int, B: int, D: int, d: int) -> dict[str, np.ndarray]:
    """Random arrays for a cell, and adjoints of h and of its last states; every dtype holds the values."""
    sizes = {"L": L, "B": B, "D": D, "d": d}
    shapes = {a.name: tuple(sizes.get(axis) or int(axis) for axis in a.axes.split()) for a in cell.arrays}
    shapes |= {f"d{a.name}": (D, B, d) for a in cell.arrays if a.kind == "state"} | {"dh": (L, B, D, d)}
    return {name: np.round(rng.uniform(-2, 2, shape) * 32) / 32 for name, shape in shapes.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The committed text


def test_committed_text_is_what_the_emitter_writes(write_cells):
    wanted = write_cells.texts()
    committed = {path.name: path.read_text() for path in write_cells.FOLDER.iterdir()}
    command = "run `python tools/write_cells.py` and commit what it writes"
    assert sorted(committed) == sorted(wanted), f"cuda/cells/ holds other files; {command}"
    for name, text in wanted.items():
        assert committed[name] == text, f"cuda/cells/{name} is not what the emitter writes; {command}"


def test_text_is_the_same_in_every_process(write_cells):
    """Python's hashes, which differ from process to process, have no part in it."""
    script = (
        "import sys, write_cells, test_own_cells\n"
        "from sru_rt.emit import emit\n"
        "texts = [*write_cells.texts().values(), *(emit(e.cell) for e in test_own_cells.EXAMPLES.values())]\n"
        "sys.stdout.buffer.write('\\0'.join(texts).encode())\n"
    )
    wanted = [*write_cells.texts().values(), *(emit(example.cell) for example in EXAMPLES.values())]
    for seed in ("0", "1"):
        path = os.pathsep.join([str(TOOLS), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == "\0".join(wanted)


def test_no_text_does_needless_arithmetic(write_cells):
    for name, text in write_cells.texts().items():
        code = [line for line in text.splitlines() if not line.startswith("//")]
        for line in code:
            assert not re.search(r"[*/] real\(1\.0\)|real\(1\.0\) \*|[+-] real\(-?0\.0\)|\* real\(0\.0\)", line), name
            assert not re.search(r"- -|-\(-|\+ -|--", line), f"{name}: a sign too many in {line}"


# ----------------------------------------------------------------------------------------------------------------------
# Readable


def test_text_reads_like_the_step_function():
    def step(a, n, b, c):
        decay = sigmoid(a + b)
        c = decay * c + (1 - decay) * n
        return c, tanh(c)

    lines = emit(own_cell(step, gates="a n", params="b", state="c")).splitlines()
    for line in (
        "//   decay = sigmoid(a + b)",
        "//   c = decay*c' + (1 - decay)*n",
        "//   h = tanh(c)",
        "    const real a = gate[0], n = gate[1];",
        "    const real b = param[0];",
        "    const real c_prev = state[0];",
        "    const real decay = sigmoid(a + b);",
        "    const real c = fma(decay, c_prev, (real(1.0) - decay) * n);",
        "    new_state[0] = c;",
        "    *new_h = tanh(c);",
        "    if (activation) activation[0] = decay;",
        "    const real decay = n_known > 0 ? activation[0] : sigmoid(a + b);",
        "    const real dc_next = dnew_state[0], dh = *dnew_h;",
    ):
        assert line in lines, f"missing: {line}"
    for start in ("const real dc = ", "const real da = ", "dgate[0] = da;", "dparam[0] = da;", "dstate[0] = "):
        assert any(line.strip().startswith(start) for line in lines), f"no line starts with {start}"


def shares_once(a, b, h):
    """As minLSTM has it, with names of its own."""
    of_a, of_b = softplus(-a), softplus(b)
    i = sigmoid(of_a - of_b)
    return i * h + b, h * i


def shares_and_more(a, b, h):
    """The same, but for a softplus that is used again."""
    of_a = softplus(-a)
    i = sigmoid(of_a - softplus(b))
    return i * h + of_a, h * i


def test_sigmoid_of_a_difference_of_softpluses_is_one_function(backend):
    """Where nothing else needs its parts; and the numbers are those of the formula."""
    rng = np.random.default_rng(0)
    u = rng.normal(scale=4, size=(9, 2, 1, 2, 5))
    for step, is_one in ((shares_once, True), (shares_and_more, False)):
        forward = emit(own_cell(step, gates="a b", state="h")).split("void gradient")[0]
        assert ("softplus_share(-a, b);" in forward) == is_one, forward
        assert ("softplus(b);" in forward or "- softplus(b)" in forward) != is_one, forward
        h, want = np.zeros((2, 1, 5)), []
        for a, b in u.transpose(0, 3, 1, 2, 4):
            h, out = step(a, b, h)
            want.append(out.reshape(2, 5))
        np.testing.assert_allclose(
            sru_rt.cell(gates="a b", state="h")(step).recurrence(u)[0], want, rtol=1e-13, atol=1e-15
        )


def ops_of_activations(step: Callable[..., Any], **kinds: str) -> list[str]:
    return [node.op for node in activations(own_cell(step, state="c", **kinds))]


def test_activations_are_what_state_and_gradient_have_in_common():
    """The outermost functions, those that take most first; not of h, and not what no derivative needs."""

    def step(a, n, e, c):
        rate = exp(-softplus(a) * sigmoid(e))
        c = rate * c + tanh(n) + relu(a)
        return c, tanh(c) * sqrt(n)

    assert ops_of_activations(step, gates="a n e") == ["tanh", "softplus", "sigmoid", "exp"]
    assert ops_of_activations(lambda a, c: (c + exp(sigmoid(a)), c), gates="a") == ["sigmoid", "exp"]
    outermost = ops_of_activations(lambda a, b, c: (sigmoid(tanh(a) * b) * c, c), gates="b", params="a")
    assert outermost == ["tanh", "sigmoid"]
    unused = own_cell(lambda a, c: (c + a, sigmoid(a)), gates="a", state="c")
    assert activations(unused) == () and "n_activations = 0;" in emit(unused)


def named_product(u, f, v, c):
    p = v * c
    f = sigmoid(f + p)
    return f * c + (1 - f) * u, c


def product_of_two_uses(u, f, o, v, c):
    f = sigmoid(f + v * c)
    new = f * c + (1 - f) * u
    return new, new + v * c + o


def test_activations_are_rounded_alike_in_step_and_gradient():
    """Where the one has a product in a sum as fma() and the other has not, the gradient computes its own."""
    assert ops_of_activations(named_product, gates="u f", params="v") == []
    assert ops_of_activations(product_of_two_uses, gates="u f o", params="v") == []

    def differs(u, f, v, c):
        z, f = tanh(u), sigmoid(f + v * c)
        return f * c + (1 - f) * z, c

    assert ops_of_activations(differs, gates="u f", params="v") == ["tanh", "sigmoid"]


@pytest.mark.parametrize("options", [Options(), Options(v="inputs", dropout=True), Options(activation="tanh")])
def test_names_of_the_equation_are_kept(options):
    cell = sru_cell(options)
    text = emit(cell)
    forward, gradient = text.split("SRU_FN void gradient")
    for name in ("f", "c", "skip", "r"):
        assert re.search(rf"\n    const real {name} = ", forward), name
    for name in ("dc", "dskip", "du0", "duf", "dur"):
        assert re.search(rf"\n    const real {name} = ", gradient), name
    for name in cell.names:
        assert re.search(rf"\b{name}(_prev)? = (gate|input|per_sequence|param|state|constant)\[\d+\]", forward), name


def everything(a, b, e, g, x, m, p, c, y, alpha):
    """Every operation that a step function may use."""
    positive = 0.5 + abs(a)
    grown = exp(-abs(b)) + log(positive) + sqrt(positive + x * x)
    gate = sigmoid(a + p * c)
    squashed = tanh(b * y) / positive
    bent = relu(e) - softplus(g) * m
    is_low = a < b
    chosen = where(is_low, c, -y) + where(a <= x, b, e) - where(b > x, 0.25, g) + where(e >= g, x, alpha)
    low, high = minimum(gate, chosen), maximum(squashed, bent)
    c = gate * c + (1 - gate) * grown
    y = low - high / (2 + y**2)
    return c, y, c - alpha * y


EVERYTHING = own_cell(
    everything, gates="a b e g", inputs="x", per_sequence="m", params="p", state="c y", constants=("alpha",)
)


def names_at_odds(a, b, c, y):
    """Local variables with the names of results, which are not those results."""
    c, y = y * a, c + a
    h = tanh(b * c)
    return y, c, h * h


NAMES_AT_ODDS = own_cell(names_at_odds, gates="a b", state="c y", name="names_at_odds")


def test_formula_in_the_comment_is_the_step():
    """The comment, run as Python with c' for the state before the step, computes what the graph computes."""
    from sru_rt.cells import named_cells

    functions = {name: getattr(sru_rt, name) for name in (*graph.FUNCTIONS, "minimum", "maximum", "where")}
    for cell in [*named_cells(), *(example.cell for example in EXAMPLES.values()), EVERYTHING, NAMES_AT_ODDS]:
        rng = np.random.default_rng(0)
        values = {name: rng.uniform(0.2, 1, 20) for name in cell.names}
        lines = formula_lines(cell)
        assert emit(cell).count("".join(f"//   {line}\n" for line in lines)) == 1
        scope = dict(functions) | {f"{n}_prev" if n in cell.state else n: value for n, value in values.items()}
        exec("\n".join(lines).replace("'", "_prev"), scope)
        order = topological([*cell.formula.new_state, cell.formula.h])
        wanted = evaluate(order, values, FLOAT64)
        for name, node in [*zip(cell.state, cell.formula.new_state), ("h", cell.formula.h)]:
            np.testing.assert_allclose(scope[name], wanted[node], rtol=1e-12, err_msg=f"{cell.name}: {name}")


# ----------------------------------------------------------------------------------------------------------------------
# Names that mean something in C++, or in the emitted text


NASTY = (
    "new new_ int double h real gate dh dc_next step c_prev t1 exp f F fma dgate dstate gradient NULL \u03b1 dc input "
    "param template operator this float16 Vec load sigmoid dnew_state new_state state_ bool"
)


def test_clashing_names(backend, monkeypatch):
    """Names of gates, constants and local variables: the text compiles, and computes the right thing."""
    gates = tuple(NASTY.split())
    weights = [1 + i / 64 for i in range(len(gates))]

    def step(**values):
        c, state, constant = values["c"], values["state"], values["constant"]
        namespace = values["new"] * weights[0]
        for name, weight in zip(gates[1:], weights[1:]):
            namespace = namespace + values[name] * weight
        typename = sum(values[name] * values[name] for name in gates)
        c_next = t2 = c * namespace * constant
        new_h = switch = typename + c_next
        dtypename = state - switch * state
        return t2, dtypename, new_h

    cell = own_cell(step, gates=NASTY, state="c state", constants=("constant",))
    for name in ("namespace", "typename", "switch"):
        assert name in step.__code__.co_varnames
    arrays = draw(cell, np.random.default_rng(0), 1, 1, 1, 21)
    found = run(cell, arrays, "float64", constants=(0.5,))

    values = dict(zip(gates, arrays["gates"][0, 0, 0]))
    c, state = arrays["c0"][0, 0], arrays["state0"][0, 0]
    total = sum(values[name] * weight for name, weight in zip(gates, weights))
    new_c = c * total * 0.5
    h = sum(value**2 for value in values.values()) + new_c
    to_h = arrays["dh"][0, 0, 0] - arrays["dstate0"][0, 0] * state  # what reaches h, also by way of the second state
    to_c = arrays["dc0"][0, 0] + to_h
    wanted = {"h": h, "c0": new_c, "state0": state - h * state, "dc0": to_c * total * 0.5}
    wanted["dstate0"] = arrays["dstate0"][0, 0] * (1 - h)
    wanted["dgates"] = np.stack([to_c * c * 0.5 * w + to_h * 2 * values[n] for n, w in zip(gates, weights)])
    for name, value in wanted.items():
        tolerance.check(name, found[name].reshape(value.shape), value, tolerance.SUM["float64"])


def test_declared_names_are_kept_where_they_can_be():
    def step(new, new_, dh, f, F, c):
        dc_next = f * new
        return c * dc_next + F * new_, c + dh

    text = emit(own_cell(step, gates="new new_ dh f F", state="c"))
    assert re.search(r"\bnew_ = gate\[1\], dh = gate\[2\], f = gate\[3\], F = gate\[4\];", text)
    assert not re.search(r"\bnew = ", text)


@pytest.mark.parametrize("name", ["step", "forward"])
def test_a_cell_may_have_the_name_of_something_in_cpp(name, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    cell = own_cell(lambda a, c: (a * c, c), gates="a", state="c", name=name)
    arrays = draw(cell, np.random.default_rng(0), 1, 2, 1, 3)
    found = run(cell, arrays, "float32")
    np.testing.assert_array_equal(
        found["c0"], (arrays["gates"][0, :, :, 0] * arrays["c0"].swapaxes(0, 1)).swapaxes(0, 1)
    )


def test_more_names_of_cells_compile():
    names = (
        "gradient backward run Sweep Slot Vec Cell int new float16 load fma index_t real minimum \u03b1 NULL".split()
    )
    cells = [own_cell(lambda a, c: (a * c, c), gates="a", state="c", name=name) for name in names]
    assert compile_cpu.load('#include "cpu_sweep.h"\n' + "".join(map(emit, cells)))


# ----------------------------------------------------------------------------------------------------------------------
# Right


def test_every_operation_is_in_a_compiled_cell():
    formula = EVERYTHING.formula
    nodes = topological([*formula.new_state, formula.h, *formula.gradient.values()])
    expected = {"+", "-", "*", "/", "neg", "where", "minimum", "maximum", *graph.COMPARISONS, *graph.FUNCTIONS}
    assert {node.op for node in nodes} - set(LEAVES) == expected


@pytest.mark.parametrize("dtype", IO_DTYPES)
def test_every_operation_compiled_and_on_numpy(dtype, monkeypatch):
    """Both against the step function on plain arrays, and compiled gradients against those on NumPy."""
    arrays = draw(EVERYTHING, np.random.default_rng(1), 3, 2, 2, 37)
    results = {}
    for backend in ("compiled", "numpy"):
        monkeypatch.setenv("SRU_RT_CPU", backend)
        results[backend] = run(EVERYTHING, arrays, dtype, constants=(1.5,))
    wanted = {name: np.zeros_like(arrays[name]) for name in ("c0", "y0")} | {"h": np.zeros_like(arrays["dh"])}
    for b, q in np.ndindex(2, 2):
        c, y = arrays["c0"][q, b], arrays["y0"][q, b]
        for t in (0, 1, 2)[:: -1 if q else 1]:
            gates, x = arrays["gates"][t, b, q], arrays["inputs"][t, b, q]
            m, p = arrays["per_sequence"][b, q], arrays["params"][q, 0]
            c, y, wanted["h"][t, b, q] = everything(*gates, x, m, p, c, y, 1.5)
        wanted["c0"][q, b], wanted["y0"][q, b] = c, y
    for name, value in wanted.items():
        for found in results.values():
            tolerance.check(name, found[name], value, tolerance.STEP[dtype if name == "h" else state_dtype(dtype)])
    for name, value in results["numpy"].items():
        # Sums of steps of float32 (float64), and one rounding to the dtype on either side.
        bound = tolerance.SUM[state_dtype(dtype)] + 2 * tolerance.EPS[dtype]
        tolerance.check(name, results["compiled"][name], value, bound)


def test_every_pair_of_operators(backend):
    """Signs, brackets and fused products: each operator on all kinds of operands, one state for each."""
    operators: list[Callable[..., Any]] = [operator.add, operator.sub, operator.mul, operator.truediv]
    kinds: list[Callable[..., Any]] = [lambda a, b: a, lambda a, b: -a, *operators]
    cases = list(itertools.product(operators, kinds, kinds))
    names = [f"s{i}" for i in range(len(cases))]

    def formulas(a: Any, b: Any, e: Any, g: Any) -> list[Any]:
        return [outer(left(a, b), right(e, g)) for outer, left, right in cases]

    def step(a, b, e, g, **state):
        results = formulas(a, b, e, g)
        return *results, -(results[0] * a) - e

    cell = own_cell(step, gates="a b e g", state=" ".join(names))
    rng = np.random.default_rng(0)
    arrays = draw(cell, rng, 1, 1, 1, 11)
    lowest = np.array([3.0, 1.0, 2.5, 0.5])[:, None]  # a - b and e - g are far from 0
    arrays["gates"] = gates = (lowest + rng.uniform(0, 1, (4, 11))).reshape(1, 1, 1, 4, 11)
    found = run(cell, arrays, "float64")
    wanted = formulas(*gates[0, 0, 0])
    for name, value in zip(names, wanted):
        np.testing.assert_allclose(found[f"{name}0"][0, 0], value, rtol=1e-13, atol=1e-13)
    a, _, e, _ = gates[0, 0, 0]
    np.testing.assert_allclose(found["h"][0, 0, 0], -(wanted[0] * a) - e, rtol=1e-13, atol=1e-13)

    def loss(*values: np.ndarray) -> np.ndarray:
        results = formulas(*values)
        total = arrays["dh"][0, 0, 0] * (-(results[0] * values[0]) - values[2])
        return total + sum(arrays[f"d{name}0"][0, 0] * result for name, result in zip(names, results))

    for i in range(4):
        difference = central_difference(loss, list(gates[0, 0, 0]), i)
        np.testing.assert_allclose(found["dgates"][0, 0, 0, i], difference, rtol=1e-9, atol=1e-9)


_FORMATS = {
    "+": "{} + {}",
    "-": "{} - {}",
    "*": "{} * {}",
    "/": "{} / {}",
    "neg": "-{}",
    "square": "{}**2",
    "cube": "{}**3",
    "where": "where({} < {}, {}, {})",
}


def write_step(trees: list[Any]) -> str:
    """The text of a step function with one state for each tree, whose leaves are a gate, a parameter and the state.

    Every other operation, and every other condition, goes to a local variable of its own.
    """
    lines: list[str] = []
    counter = itertools.count()

    def named(text: str) -> str:
        n = next(counter)
        if n % 2:
            return f"({text})"
        lines.append(f"    v{n} = {text}")
        return f"v{n}"

    def visit(tree: Any, i: int) -> str:
        if not isinstance(tree, tuple):
            return ("a", "p", "c")[tree] + str(i) if isinstance(tree, int) else f"({tree!r})"
        op, *below = tree
        parts = [visit(t, i) for t in below]
        if op == "where":
            condition = named(f"{parts[0]} < {parts[1]}")
            return named(f"where({condition}, {parts[2]}, {parts[3]})")
        return named(_FORMATS.get(op, f"{op}({', '.join(['{}'] * len(parts))})").format(*parts))

    results = [visit(tree, i) for i, tree in enumerate(trees)]
    arguments = ", ".join(f"{kind}{i}" for kind in "apc" for i in range(len(trees)))
    return "\n".join([f"def step({arguments}):", *lines, f"    return {', '.join([*results, results[0]])}\n"])


def random_cell(trees: list[Any]) -> Cell:
    scope = dict(vars(sru_rt))
    exec(write_step(trees), scope)
    n = range(len(trees))
    members = {kind: " ".join(f"{letter}{i}" for i in n) for kind, letter in zip(("gates", "params", "state"), "apc")}
    return own_cell(scope["step"], **members)


def can_be_traced(tree: Any) -> bool:
    """Not if it divides by a constant 0, overflows, or branches on a number."""
    try:
        with np.errstate(all="ignore"):
            _ = random_cell([tree]).formula
    except (StepError, ZeroDivisionError):
        return False
    return True


def good_channels(tree: Any, leaves: list[np.ndarray]) -> np.ndarray:
    """Where all values are of a sensible size, and rounding does not decide on a branch."""
    notes = []
    with np.errstate(all="ignore"):
        for factor in (1, 1 + 1e-8, 1 - 1e-8):
            notes.append(Plain(leaves[0].size))
            compute(tree, [leaf * factor for leaf in leaves], notes[-1].apply)
    good = np.logical_and.reduce([note.good for note in notes])
    for kinks in zip(*(note.kinks for note in notes)):
        good &= np.all(kinks == kinks[0], axis=0)
    return good


# A tree is an operation, not a bare leaf.
SEVERAL_TREES = st.lists(TREES.filter(lambda tree: isinstance(tree, tuple)), min_size=12, max_size=12)


# A failure is not shrunk, as each try takes a compilation.
@given(SEVERAL_TREES, st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
def test_random_steps_compiled_and_on_numpy(trees, seed):
    trees = [tree for tree in trees if can_be_traced(tree)]
    assume(len(trees) > 5)
    with np.errstate(all="ignore"):  # functions of numbers are computed as the step runs
        cell = random_cell(trees)
        assert cell.formula
    rng = np.random.default_rng(seed)
    arrays = draw(cell, rng, 1, 1, 1, 50)
    arrays = {name: rng.uniform(-2, 2, array.shape) for name, array in arrays.items()}  # without ties
    results, tested = {}, 0
    for backend in ("compiled", "numpy"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SRU_RT_CPU", backend)
            results[backend] = run(cell, arrays, "float64")
    for i, tree in enumerate(trees):
        leaves = [arrays["gates"][0, 0, 0, i], arrays["params"][0, i], arrays[f"c{i}0"][0, 0]]
        good = good_channels(tree, leaves)
        tested += good.sum()
        plain = Plain(50)
        with np.errstate(all="ignore"):
            value = np.broadcast_to(compute(tree, leaves, plain.apply), 50)[good]
        for backend, found in results.items():
            new = found[f"c{i}0"][0, 0, good]
            np.testing.assert_allclose(new, value, rtol=1e-9, atol=1e-9, err_msg=f"{backend}: {tree}")
        for name, index in (("dgates", (0, 0, 0, i)), ("dparams", (0, i)), (f"dc{i}0", (0, 0))):
            compiled, on_numpy = (results[backend][name][index][good] for backend in ("compiled", "numpy"))
            scale = 1 + np.abs(on_numpy).max(initial=0)
            np.testing.assert_allclose(compiled, on_numpy, rtol=1e-9, atol=1e-9 * scale, err_msg=f"{name} of {tree}")
    assert tested > 5 * len(trees)


# ----------------------------------------------------------------------------------------------------------------------
# Lean


def operations(outputs: Any) -> int:
    """Arithmetic operations, each common subexpression once; a fused product and sum counts as two."""
    return sum(node.op not in LEAVES for node in topological(outputs))


def hand_written_adjoint(u0, uf, ur, x, b_f, b_r, v_f, v_r, c, alpha, dc_next, dh):
    """The derivative of the default SRU as a person would write it: 34 operations, two of them sigmoids."""
    f = sigmoid(uf + v_f * c + b_f)  # 4
    r = sigmoid(ur + v_r * c + b_r)  # 4
    keep = 1 - f  # 1
    new_c = f * c + keep * u0  # 3
    skip = alpha * x  # 1
    through = dh * r  # 1
    dr = dh * (new_c - skip) * (r * (1 - r))  # 5
    dc = dc_next + through  # 1
    df = dc * (c - u0) * (f * keep)  # 4
    return {
        "u0": dc * keep,  # 1
        "uf": df,
        "ur": dr,
        "x": (dh - through) * alpha,  # 2
        "b_f": df,
        "b_r": dr,
        "v_f": df * c,  # 1
        "v_r": dr * c,  # 1
        "c": dc * f + df * v_f + dr * v_r,  # 5
    }


def test_gradient_is_as_lean_as_one_written_by_hand():
    cell = sru_cell(Options())
    formula = cell.formula
    order = topological(formula.gradient.values())
    extra = [node.args[0] for node in order if node.op == "input" and node.args[0] not in cell.names]
    assert len(extra) == 2, "the adjoints of the new state and of h"
    dh = next(name for name in extra if name.endswith("h"))
    (dc_next,) = (name for name in extra if name != dh)

    table = graph.Graph()
    arguments = {name: table.input(name) for name in cell.names} | {
        "dc_next": table.input(dc_next),
        "dh": table.input(dh),
    }
    hand: dict[str, Node] = hand_written_adjoint(**arguments)
    assert operations(hand.values()) == 34
    assert operations(formula.gradient.values()) <= operations(hand.values())

    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=40) for name in [*cell.names, *extra]}
    emitted, written = evaluate(order, values, FLOAT64), evaluate(topological(hand.values()), values, FLOAT64)
    assert set(hand) == set(formula.gradient)
    for name, node in hand.items():
        np.testing.assert_allclose(emitted[formula.gradient[name]], written[node], rtol=1e-10, atol=1e-12, err_msg=name)


def test_text_holds_each_operation_of_the_graph_once():
    """fma() is two operations, and x*(1 - y) is one, in which y is taken from 1 once more.

    Signs, which fma() may need where the graph subtracts, are left out.
    """
    for options in (
        Options(),
        Options(activation="tanh"),
        Options(skip="projected"),
        Options(v="inputs", dropout=True),
    ):
        cell = sru_cell(options)
        formula = cell.formula
        parts = [part.split(") {", 1)[1] for part in emit(cell).split("SRU_FN void ")[1:]]
        wanted = [[*formula.new_state, formula.h], list(formula.gradient.values()), list(formula.jacobian)]
        assert len(parts) == len(wanted)
        for text, outputs in zip(parts, wanted):
            infix = len(re.findall(r" [+*/-] ", text))
            calls = len(re.findall(r"\b(?:sigmoid|sigmoid_fma|tanh)\(", text))
            signs = sum(node.op == "neg" for node in topological(outputs))
            complements = re.findall(r"fma\(-(\w+), (\w+), \1\)", text)
            repeated = len(complements) - len({y for _, y in complements})
            assert infix + calls + 2 * text.count("fma(") == operations(outputs) - signs + repeated, cell.name


# ----------------------------------------------------------------------------------------------------------------------
# The Jacobian


@pytest.mark.parametrize("name", EXAMPLES)
def test_jacobian_by_finite_differences(name):
    cell, n = EXAMPLES[name].cell, len(EXAMPLES[name].cell.state)
    rng = np.random.default_rng(2)
    values = {name: rng.normal(size=20) for name in cell.names}
    order, new = topological(cell.formula.new_state), cell.formula.new_state
    found = evaluate(topological(cell.formula.jacobian), values, FLOAT64)
    assert len(cell.formula.jacobian) == n * n
    for j, state in enumerate(cell.state):
        ends = [evaluate(order, values | {state: values[state] + e}, FLOAT64) for e in (1e-6, -1e-6)]
        for i in range(n):
            wanted = (ends[0][new[i]] - ends[1][new[i]]) / 2e-6
            got = np.broadcast_to(found[cell.formula.jacobian[i * n + j]], wanted.shape)
            np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-9)


def test_jacobian_of_an_affine_cell_does_not_read_the_states():
    for cell in (EXAMPLES["oscillator"].cell, sru_cell(Options(v="none")), sru_cell(Options(v="none", dropout=True))):
        assert cell.affine
        read = {node.args[0] for node in topological(cell.formula.jacobian) if node.op == "input"}
        assert read and not read & set(cell.state)


def test_no_jacobian_of_many_states():
    def rotate(a, p, q, r):
        return a * q, a * r, a * p, p

    cell = own_cell(rotate, gates="a", state="p q r")
    assert cell.affine and cell.formula.jacobian == ()
    assert "jacobian" not in emit(cell) and "jacobian" in emit(EXAMPLES["oscillator"].cell)
