"""Problems for all cells: what is given to a cell, what its oracle makes of it, and how both are compared.

A row says which cell, with which options and dtype: {"cell": "mingru", "candidate": "identity", ...}. A cell declares
its factors, which are the options and the values that they take, and how a row becomes arguments. Sizes, directions
and layouts of padding are those of all cells.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

import oracle
import sru_rt
import tolerance

DTYPES = {"float16": np.float16, "bfloat16": bfloat16, "float32": np.float32, "float64": np.float64}
LAYOUTS = {
    "plain": {},
    "lengths": {"lengths": True},
    "mask": {"mask": True},
    "reset": {"reset": True},
    "all": {"lengths": True, "mask": True, "reset": True},
}
SIZES = [(5, 3, 7), (1, 1, 1), (9, 2, 33), (4, 5, 16), (13, 1, 70), (6, 4, 8)]  # L, B, d
POLICIES = [True, 3, 1, "x", 50]

Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# The cells


class Draw(NamedTuple):
    """Random arrays of one problem."""

    rng: np.random.Generator
    L: int
    B: int
    D: int
    d: int
    dtype: Any  # of x
    small: Any  # of parameters, initial states and masks: that of x, or float32

    def normal(self, *shape: int, dtype: Any = None) -> np.ndarray:
        return self.rng.normal(size=shape).astype(dtype or self.small)

    def flags(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, 2, size=shape).astype(bool)


class Arguments(NamedTuple):
    """What a row is to a cell."""

    gates: int  # k
    skips_x: bool
    params: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    name: str
    state: str  # the letter of the state: c0 goes in, c_last comes out
    factors: dict[str, tuple[Any, ...]]  # the first value of each is that of `FULL`
    arguments: Callable[[Row, Draw], Arguments]
    layer_factors: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # what only a layer has

    @property
    def initial(self) -> str:
        return f"{self.state}0"

    def library(self, what: str) -> Callable[..., Any]:
        """The library's function `what`, such as forward."""
        return getattr(sru_rt, f"{self.name}_{what}")

    def oracle(self, what: str) -> Callable[..., Any]:
        return getattr(oracle, f"{self.name}_{what}")


def _sru(row: Row, draw: Draw) -> Arguments:
    L, B, D, d = draw.L, draw.B, draw.D, draw.d
    G = 1 if row["kind"] == "basic" else 2
    v_shape = {"params": (D, G, d), "inputs": (L, B, D, G, d)}.get(row["v"])
    params = {
        "bias": draw.normal(D, G, d) if row["bias"] else None,
        "v": draw.normal(*v_shape) if v_shape else None,
    }
    options: dict[str, Any] = {"alpha": 1.3} if row["kind"] == "x" else {}
    options |= {"activation": row["activation"], "reset_on": row["reset_on"]}
    options |= {"no_skip": {"highway": False}, "basic": {"reset_gate": False}}.get(row["kind"], {})
    if row["dropout"]:
        options["dropout_mask"] = (draw.flags(B, D, d) * 2).astype(draw.small)
    return Arguments(1 + G + (row["kind"] == "projected"), row["kind"] == "x", params, options)


def _qrnn(row: Row, draw: Draw) -> Arguments:
    L, B, D, d = draw.L, draw.B, draw.D, draw.d
    pooling, _, skip = row["form"].partition("-")
    G = {"f": 2, "fo": 3, "ifo": 4}[pooling]
    options: dict[str, Any] = {"pooling": pooling} | ({"highway": True} if skip else {})
    if row["zoneout"] != "none":
        mask = draw.flags(L, B, D, d)
        options["zoneout_mask"] = mask if row["zoneout"] == "bool" else mask.astype(draw.small)
    return Arguments(G + (skip == "projected"), skip == "x", _bias(row, draw, G), options)


def _mingru(row: Row, draw: Draw) -> Arguments:
    return Arguments(2, False, _bias(row, draw, 2), {"candidate": row["candidate"]})


def _minlstm(row: Row, draw: Draw) -> Arguments:
    return Arguments(3, False, _bias(row, draw, 3), {"candidate": row["candidate"]})


def _bias(row: Row, draw: Draw, G: int) -> dict[str, Any]:
    return {"bias": draw.normal(draw.D, G, draw.d) if row["bias"] else None}


_MIN_FACTORS = {"candidate": ("identity", "positive"), "bias": (True, False), "dtype": tuple(DTYPES)}

CELLS = {
    cell.name: cell
    for cell in (
        Cell(
            "sru",
            "c",
            {
                "kind": ("x", "projected", "no_skip", "basic"),
                "activation": ("identity", "tanh", "relu"),
                "reset_on": ("previous", "current"),
                "bias": (True, False),
                "v": ("params", "inputs", "none"),
                "dropout": (False, True),
                "dtype": tuple(DTYPES),
            },
            _sru,
        ),
        Cell(
            "qrnn",
            "c",
            {
                "form": ("fo-x", "fo", "f", "ifo", "ifo-x", "fo-projected", "ifo-projected"),
                "bias": (True, False),
                "zoneout": ("numbers", "bool", "none"),
                "dtype": tuple(DTYPES),
            },
            _qrnn,
            {"window": (1, 2, 3)},
        ),
        Cell("mingru", "h", _MIN_FACTORS, _mingru),
        Cell("minlstm", "h", _MIN_FACTORS, _minlstm),
    )
}

# A row for each cell, with every array that it can be given but masks that few want; it lacks the dtype.
FULL: dict[str, Row] = {
    cell.name: {"cell": cell.name, **{n: values[0] for n, values in cell.factors.items() if n != "dtype"}}
    for cell in CELLS.values()
}


def all_rows(cell: Cell, more: Mapping[str, Sequence[Any]] = MappingProxyType({})) -> list[Row]:
    """`more` holds factors beside those of the cell."""
    factors = {**cell.factors, **more}
    return [{"cell": cell.name, **dict(zip(factors, values))} for values in itertools.product(*factors.values())]


def covering(rows: Sequence[Row], groups: Iterable[tuple[str, ...]], but: Iterable[Row] = ()) -> list[Row]:
    """Some of the rows, in which the factors of each group take every combination of values; but those of other rows.

    Greedy, deterministic.
    """

    def combinations(row: Row) -> set[Any]:
        return {(group, tuple(row[n] for n in group)) for group in groups}

    groups = list(groups)
    covered = {id(row): combinations(row) for row in rows}
    missing = set().union(*covered.values()).difference(*map(combinations, but))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(covered[id(row)] & missing))
        chosen.append(best)
        missing -= covered[id(best)]
    return chosen


def name_of(row: Row) -> str:
    return "-".join(str(v) if not isinstance(v, bool) else f"{n}{int(v)}" for n, v in row.items())


def _rows_of_one_kernel(cell: Cell) -> list[Row]:
    """All rows of a layer, which also say whether parameters, initial states and masks are wide, that is, in float32
    where x has 16 bits. A row that says nothing of it leaves it to chance, and its problems have kernels for both."""
    rows = all_rows(cell, cell.layer_factors | {"wide": (None, True, False)})
    return [row for row in rows if (row["wide"] is None) == (row["dtype"] in ("float32", "float64"))]


def _every_two(rows: list[Row]) -> list[Row]:
    return covering(rows, itertools.combinations([name for name in rows[0] if name != "cell"], 2))


def _of_recurrence(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in CELLS[row["cell"]].layer_factors}


# Every two options, of a layer and of the recurrence: both have the same kernels.
LAYER_ROWS = [row for cell in CELLS.values() for row in _every_two(_rows_of_one_kernel(cell))]
ROWS = list({name_of(row): row for row in map(_of_recurrence, LAYER_ROWS)}.values())
# Every three options of SRU, which has many; dtypes are met with every two.
SRU_ROWS = covering(
    _rows_of_one_kernel(CELLS["sru"]),
    itertools.combinations([name for name in CELLS["sru"].factors if name != "dtype"], 3),
    but=[row for row in ROWS if row["cell"] == "sru"],
)


def smooth(row: Row) -> Row:
    """The row in float64 and without relu, which has a kink at 0, a value that states come near."""
    return (
        row | {"dtype": "float64", "wide": False} | ({"activation": "tanh"} if row.get("activation") == "relu" else {})
    )


# A third of them, as the oracle's gradients, which others are held to, are held to finite differences as well.
SMOOTH_ROWS = list({name_of(smooth(row)): smooth(row) for row in LAYER_ROWS}.values())[::3]


# ----------------------------------------------------------------------------------------------------------------------
# One call


@dataclass
class Problem:
    """One call and its options, in the dtype under test, with values that dtype holds exactly."""

    cell: Cell
    arrays: dict[str, Any]
    options: dict[str, Any]
    dh: np.ndarray
    dlast: np.ndarray  # the gradient of the last state
    dtype: str
    padded: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @classmethod
    def make(
        cls,
        row: Row,
        size: tuple[int, int, int],
        D: int,
        layout: str,
        *,
        layer: bool = False,
        state: bool | None = None,
        seed: int = 0,
    ) -> Problem:
        """`state` says whether an initial state is given; None leaves it to chance."""
        L, B, d = size
        key = f"{sorted(row.items())} {size} {D} {layout} {layer} {seed}"
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        cell, dtype = CELLS[row["cell"]], DTYPES[row["dtype"]]
        accumulator = np.float64 if row["dtype"] == "float64" else np.float32
        wide = row["wide"] if "wide" in row else not rng.integers(2)
        small = np.float32 if wide and accumulator == np.float32 else dtype
        draw = Draw(rng, L, B, D, d, dtype, small)
        k, skips_x, params, options = cell.arguments(row, draw)
        arrays: dict[str, Any] = {}
        if layer:
            d_in, window = D * d if skips_x else D * d + 3, row.get("window", 1)
            arrays["x"] = draw.normal(L, B, d_in, dtype=dtype)
            weight = draw.normal(D, k, d, window * d_in, dtype=np.float64)
            arrays["weight"] = (weight / np.sqrt(window * d_in)).astype(dtype)
            options |= {"window": window} if "window" in cell.layer_factors else {}
        else:
            arrays["u"] = draw.normal(L, B, D, k, d, dtype=dtype)
            arrays |= {"x": draw.normal(L, B, D * d, dtype=dtype)} if skips_x else {}
        arrays |= params
        if state is None:
            state = bool(rng.integers(2))
        arrays[cell.initial] = draw.normal(D, B, d) if state else None
        options |= oracle.random_layout(rng, L, B, **LAYOUTS[layout])
        padded = ~oracle.live_steps(L, B, options.get("lengths"), options.get("mask"))
        dh, dlast = draw.normal(L, B, D * d, dtype=dtype), draw.normal(D, B, d, dtype=accumulator)
        for name in ("u", "x"):
            if name in arrays:
                arrays[name][padded] = np.nan  # what stands in padding must not matter
        return cls(cell, arrays, options, dh, dlast, row["dtype"], padded)

    @property
    def given(self) -> dict[str, Any]:
        return {**self.arrays, **self.options}

    @property
    def seeds(self) -> dict[str, np.ndarray]:
        """What the backward takes."""
        return {"dh": self.dh, f"d{self.cell.state}_last": self.dlast}

    def forward(self, layer: bool = False) -> Callable[..., Any]:
        """The library's function that the problem is for."""
        return self.cell.library("forward" if layer else "recurrence")

    def run(self, layer: bool = False, **more: Any) -> tuple[tuple[np.ndarray, np.ndarray], Any]:
        """The library's results and gradients."""
        h, last, saved = self.forward(layer)(**self.given, **more)
        return (h, last), self.cell.library("backward")(saved, **self.seeds)

    def wanted(self, layer: bool = False) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Those of the oracle."""
        forward, backward = ("forward", "backward") if layer else ("recurrence", "recurrence_backward")
        h, last = self.cell.oracle(forward)(**self.given)
        return h, last, self.cell.oracle(backward)(**self.given, **self.seeds)


def away_from_kinks(row: Row, size: tuple[int, int, int], D: int, layout: str, **more: Any) -> Problem:
    """A problem of which no candidate lies near 0, where g of candidate="positive" has a kink; no NaN in padding."""
    for seed in range(100):
        problem = Problem.make(row, size, D, layout, seed=seed, **more)
        arrays = problem.arrays
        arrays |= {name: np.nan_to_num(arrays[name]) for name in ("u", "x") if name in arrays}
        if row.get("candidate") != "positive":
            return problem
        u = arrays["u"] if "u" in arrays else oracle.project(arrays["x"], arrays["weight"])
        n = u[:, :, :, -1] if arrays["bias"] is None else u[:, :, :, -1] + arrays["bias"][:, -1]
        if np.abs(n[~problem.padded]).min(initial=1) > 1e-3:
            return problem
    raise RuntimeError("no problem is away from the kink")


def compare(problem: Problem, result: tuple[Any, ...], gradients: Any, layer: bool = False) -> None:
    """Holds results and gradients against the oracle, dtype and tolerance included."""
    h, last, wanted = problem.wanted(layer)
    state = "float64" if problem.dtype == "float64" else "float32"
    step, summed = (tolerance.LAYER, tolerance.LAYER) if layer else (tolerance.STEP, tolerance.SUM)
    assert result[0].dtype == DTYPES[problem.dtype] and result[1].dtype.name == state
    tolerance.check("h", result[0], h, step[problem.dtype])
    assert not np.asarray(result[0], np.float64)[problem.padded].any(), "h is not 0 at padding"
    tolerance.check(f"{problem.cell.state}_last", result[1], last, step[problem.dtype if layer else state])
    for name, array in problem.arrays.items():
        gradient = getattr(gradients, name)
        if array is None:
            assert gradient is None
            continue
        pair = isinstance(array, tuple)
        for i, (got, like, want) in enumerate(
            zip(gradient, array, wanted[name]) if pair else [(gradient, array, wanted[name])]
        ):
            assert got.dtype == like.dtype, name
            kind = like.dtype.name if not layer else max(like.dtype.name, problem.dtype, key=tolerance.LAYER.get)
            bound = (step if name in ("u", "x") else summed)[kind]
            tolerance.check(f"d{name}[{i}]" if pair else f"d{name}", got, want, bound)
