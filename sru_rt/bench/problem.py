"""What is computed: cells, sizes, inputs, the results in float64, and when results agree."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import sru_rt

from ..cell import Cell as Core
from ..cells.mingru import Options as MinGRUOptions
from ..cells.mingru import mingru_cell
from ..cells.minlstm import Options as MinLSTMOptions
from ..cells.minlstm import minlstm_cell
from ..cells.qrnn import Options as QRNNOptions
from ..cells.qrnn import qrnn_cell
from ..cells.sru import Options as SRUOptions
from ..cells.sru import sru_cell
from ..dtypes import state_dtype, to_numpy
from ..spec import cell_of
from ..traffic import ITEMSIZE

NDArray = np.ndarray[Any, Any]
Arrays = dict[str, NDArray]

LEVELS = {
    "scan": "h = a*h + b, nothing else",
    "cell": "a recurrence with its activations, given U",
    "layer": "a recurrence and the product U = W x before it",
    "train": "forward, backward and a step of gradient descent of a layer",
}
FORWARD, SAVE, BACKWARD = "forward", "forward, save=True", "backward"
SAVE_32, BACKWARD_32 = "forward, save=32", "backward, save=32"
BOTH, STEP = "forward + backward", "step"

ALPHA = math.sqrt(3)
RATE = 0.1  # of the gradient descent
CHECKED_ELEMENTS = 1 << 21  # of h: larger problems are compared with float64 on fewer steps, as no kernel depends on L
# Of an array's largest magnitude. A recurrence rounds its results once, and float32 through some hundred steps. In a
# layer U is rounded as well, which shifts the gates.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 5e-5, "float64": 1e-11}
OF_LAYERS = 4


@sru_rt.cell(gates="a b", state="c")
def linear(a: Any, b: Any, c: Any) -> Any:
    """What all scans have in common."""
    c = a * c + b
    return c, c


@sru_rt.cell(gates="uf uc ug", params="b_f", state="c", constants="lowest")
def hgru(uf: Any, uc: Any, ug: Any, b_f: Any, c: Any, lowest: Any) -> Any:
    """The cell of examples/own_cell.py."""
    f = lowest + (1 - lowest) * sru_rt.sigmoid(uf + b_f)
    c = f * c + (1 - f) * uc * sru_rt.sigmoid(uc)
    return c, c * sru_rt.sigmoid(ug)


class Cell(NamedTuple):
    """A recurrence that is timed. Functions take all but the leading array by name."""

    core: Core
    recurrence: Callable[..., Any]
    layer: Callable[..., Any]
    step: Callable[..., Any]
    backward: Callable[..., Any]
    params: dict[str, int]  # by name, how many each holds for a channel
    options: dict[str, Any]
    narrow: bool = False  # whether states are kept in the dtype of x

    @property
    def skip(self) -> bool:
        """Whether it is given x beside U."""
        return bool(self.core.inputs)


def _built_in(family: str, core: Core, params: dict[str, int], **options: Any) -> Cell:
    names = ("recurrence", "forward", "step", "backward")
    recurrence, layer, step, backward = (getattr(sru_rt, f"{family}_{name}") for name in names)
    return Cell(core, recurrence, layer, step, backward, params, options)


def _own(cell: Any, params: dict[str, int], **constants: Any) -> Cell:
    return Cell(cell_of(cell.text), cell.recurrence, cell.forward, cell.step, cell.backward, params, constants)


CELLS = {
    "SRU": _built_in("sru", sru_cell(SRUOptions()), {"bias": 2, "v": 2}, alpha=ALPHA),
    "SRU without v": _built_in(
        "sru", sru_cell(SRUOptions(v="none")), {"bias": 2}, alpha=ALPHA
    )._replace(narrow=True),
    "QRNN fo": _built_in("qrnn", qrnn_cell(QRNNOptions()), {"bias": 3}),
    "QRNN ifo with highway": _built_in(
        "qrnn", qrnn_cell(QRNNOptions(pooling="ifo", skip="x")), {"bias": 4}, pooling="ifo", highway=True
    ),
    "minGRU": _built_in("mingru", mingru_cell(MinGRUOptions()), {"bias": 2}),
    "minGRU positive": _built_in(
        "mingru", mingru_cell(MinGRUOptions(candidate="positive")), {}, candidate="positive"
    ),
    "minLSTM": _built_in("minlstm", minlstm_cell(MinLSTMOptions()), {"bias": 3}),
    "own cell": _own(hgru, {"params": 1}, lowest=0.5),
    "linear": _own(linear, {}),
}  # fmt: skip


class Problem(NamedTuple):
    """What all contestants compute, and are compared on. Half of a ragged one is padding; layers are of one token."""

    level: str
    name: str
    dtype: str
    L: int
    B: int
    d: int
    D: int = 1
    ragged: bool = False
    layers: int = 1

    @property
    def cell(self) -> Cell:
        return CELLS[self.name]

    @property
    def gates(self) -> int:
        return len(self.cell.core.gates)

    @property
    def width(self) -> int:
        """Of x, and of h."""
        return self.D * self.d

    @property
    def channels(self) -> int:
        return self.B * self.width

    @property
    def elements(self) -> int:
        return self.L * self.channels

    @property
    def saved_dtype(self) -> str:
        """Of the states that are kept."""
        return self.dtype if self.cell.narrow else state_dtype(self.dtype)

    @property
    def shape(self) -> str:
        more = (f", D={self.D}" if self.D > 1 else "") + (", ragged" if self.ragged else "")
        return f"({self.L}, {self.B}, {self.d}{more}{f', {self.layers} layers' if self.layers > 1 else ''})"

    @property
    def of_layers(self) -> bool:
        return self.level in ("layer", "train")

    @property
    def flops(self) -> float:
        """Of the product in a forward; a backward has two as large."""
        return 2.0 * self.L * self.B * self.gates * self.width * self.width

    def checked(self) -> Problem:
        """The problem on which results are compared."""
        return self._replace(L=min(self.L, max(1, CHECKED_ELEMENTS // self.channels)))


def streams(problem: Problem, which: str) -> tuple[list[float], list[float]]:
    """Bytes that one pass must read and must write for an element of h, array by array: each value over time counts
    once. Parameters and sums over time, under a hundredth, are left out."""
    core, item, state = problem.cell.core, ITEMSIZE[problem.dtype], ITEMSIZE[problem.saved_dtype]
    given: list[float] = [item] * (len(core.gates) + len(core.inputs))
    every = {SAVE: 1, BACKWARD: 1, SAVE_32: 32, BACKWARD_32: 32}.get(which, 0)
    kept = [state / every] * len(core.state) if every else []
    if which in (FORWARD, SAVE, SAVE_32):
        return given, [item, *kept]
    return [*given, item, *kept], given


def moved(problem: Problem, which: str) -> float:
    """Bytes that one pass must move."""
    reads, writes = streams(problem, which)
    return (sum(reads) + sum(writes)) * problem.elements


def given(problem: Problem, seed: int = 0) -> Arrays:
    """The arguments of a call by name, and beside them `dh`: the gradient of h, or what it is trained towards."""
    L, B, d, D, k = problem.L, problem.B, problem.d, problem.D, problem.gates
    rng, dtype = np.random.default_rng(seed), to_numpy(problem.dtype)
    if problem.of_layers:
        arrays = {"x": _normal(rng, (L, B, problem.width), dtype)}
        arrays["weight"] = (rng.uniform(-1, 1, (D, k, d, problem.width)) * math.sqrt(3 / problem.width)).astype(dtype)
    else:
        arrays = {"u": _normal(rng, (L, B, D, k, d), dtype)}
        if problem.level == "scan":
            arrays["u"][:, :, :, 0] = (1 + np.tanh(arrays["u"][:, :, :, 0].astype(np.float32))) / 2
        if problem.cell.skip:
            arrays["x"] = _normal(rng, (L, B, problem.width), dtype)
    arrays |= {name: rng.uniform(-1, 1, (D, n, d)).astype(dtype) for name, n in problem.cell.params.items()}
    if problem.ragged:
        arrays["lengths"] = rng.permutation(np.linspace(1, L, B)).astype(np.int64)
    return arrays | {"dh": _normal(rng, (L, B, problem.width), dtype)}


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    """Of a large array, repetitions of numbers whose number is prime to that of channels."""
    few = rng.standard_normal(min(math.prod(shape), 999_983), np.float32).astype(dtype)
    return np.resize(few, shape)


@functools.lru_cache(maxsize=2)
def reference(problem: Problem) -> Mapping[str, NDArray]:
    """Results in float64: those of the library's NumPy path, which the tests hold to loops written from the papers."""
    arrays = _wide(given(problem))
    dh, cell = arrays.pop("dh"), problem.cell
    function = cell.layer if problem.of_layers else cell.recurrence
    with setting("SRU_RT_CPU", "numpy"):
        h, last, saved = function(**arrays, **cell.options, save=True)
        for upper in range(1, problem.layers):
            parameters = {n: a for n, a in _wide(given(problem, upper)).items() if n not in ("x", "dh")}
            h, last, saved = function(h, **parameters, **cell.options, save=True)
        if problem.level == "train":
            gradients = cell.backward(saved, (h - dh) / (problem.L * problem.B))
            return {name: arrays[name] - RATE * getattr(gradients, name) for name in ("weight", *cell.params)}
        gradients = cell.backward(saved, dh)
    return {"h": h, "last": last} | {f"d{name}": getattr(gradients, name) for name in arrays if name != "lengths"}


def _wide(arrays: Arrays) -> Arrays:
    return {n: a if n == "lengths" else a.astype(np.float64) for n, a in arrays.items()}


def errors(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> dict[str, float]:
    """By how much arrays differ, of the largest magnitude of each; a NaN is a difference as well.

    Before the name of an array may stand that of a pass and ": ".
    """
    distances = {}
    for name, array in found.items():
        wanted = np.asarray(expected[name.rpartition(": ")[2]], np.float64)
        scale = float(np.abs(wanted).max(initial=0)) or 1.0
        with np.errstate(invalid="ignore"):
            distances[name] = float(np.abs(np.asarray(array, np.float64) - wanted).max(initial=0)) / scale
    return distances


def fault(problem: Problem, differences: Mapping[str, float], slack: float = 1) -> str:
    """Empty where everything agrees, else what differs and by how much."""
    allowed = TOLERANCE[problem.dtype] * slack * (OF_LAYERS if problem.of_layers else 1)
    wrong = [f"{name} differs by {error:.1e}" for name, error in differences.items() if not error <= allowed]
    return "no speed: " + ", ".join(wrong) if wrong else ""


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """A variable of the environment for a while."""
    before = os.environ.get(name, "")
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ[name] = before
