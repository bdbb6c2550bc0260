"""SRU, the Simple Recurrent Unit of two papers.

    f[t] = sigmoid(uf[t] + v_f*c[t-1] + b_f)
    r[t] = sigmoid(ur[t] + v_r*c[t-1] + b_r)
    c[t] = f[t]*c[t-1] + (1 - f[t])*u0[t]
    h[t] = skip[t] + (g(c[t]) - skip[t])*m*r[t]

Lei, Zhang, Wang, Dai, Artzi, "Simple Recurrent Units for Highly Parallelizable Recurrence", EMNLP 2018, equations 1 to
4 (v = None gives "Training RNNs as Fast as CNNs", ICLR 2018 submission). `u0`, `uf`, `ur` are the gates of U = W x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import arrays, layer, library
from ..arrays import array_function
from ..cell import Array, Cell
from ..check import Check
from ..dtypes import IO_DTYPES, to_numpy
from ..errors import ShapeError
from ..gradients import Gradients
from ..graph import relu, sigmoid, tanh
from ..library import NDArray

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"identity": lambda c: c, "tanh": tanh, "relu": relu}


@dataclass(frozen=True)
class Options:
    """What changes the formula of an SRU cell, and so the text of its kernels."""

    skip: str = "x"  # or "projected", "none"
    activation: str = "identity"
    reset_gate: bool = True
    reset_on: str = "previous"
    bias: bool = True
    v: str = "params"  # or "inputs" (one for each step), "none"
    dropout: bool = False


def _name(o: Options) -> str:
    parts = [
        "sru",
        {"x": "", "projected": "projected", "none": "no_skip"}[o.skip] if o.reset_gate else "basic",
    ]
    parts += [
        "" if o.activation == "identity" else o.activation,
        "on_current" if o.reset_on == "current" else "",
    ]
    parts += ["" if o.bias else "no_bias", {"params": "", "inputs": "v_per_step", "none": "no_v"}[o.v]]
    parts += ["dropout" if o.dropout else ""]
    return "_".join(filter(None, parts))


@functools.cache
def sru_cell(o: Options) -> Cell:
    """The SRU cell with the given options."""

    def step(u0, uf, c, ur=None, u3=None, x=None, b_f=0, b_r=0, v_f=0, v_r=0, m=1, alpha=1):  # type: ignore[no-untyped-def]
        f = sigmoid(uf + b_f + v_f * c)
        c_previous = c
        c = f * c + (1 - f) * u0
        g = ACTIVATIONS[o.activation](c)
        if not o.reset_gate:
            return c, g * m
        r = sigmoid(ur + b_r + v_r * (c_previous if o.reset_on == "previous" else c))
        if o.skip == "none":
            return c, g * m * r
        skip = u3 if o.skip == "projected" else alpha * x
        h = skip + (g - skip) * m * r
        return c, h

    gated = ("f", "r") if o.reset_gate else ("f",)
    gates = ("u0", *(f"u{name}" for name in gated), *(["u3"] if o.skip == "projected" else []))
    v = Array("v", o.v, tuple(f"v_{name}" for name in gated), stacked=True)
    declared = [Array("u", "gates", gates)]
    declared += [Array("x", "inputs", ("x",))] if o.skip == "x" else []
    declared += [Array("dropout_mask", "per_sequence", ("m",))] if o.dropout else []
    declared += [Array("bias", "params", tuple(f"b_{name}" for name in gated))] if o.bias else []
    declared += [v] if o.v != "none" else []
    declared += [Array("c0", "state", ("c",))]
    return Cell(_name(o), step, tuple(declared), ("alpha",) if o.skip == "x" else ())


def named_cells() -> list[Cell]:
    """The variants whose emitted text stands in cuda/cells/."""
    variants = (
        Options(),
        Options(v="none"),
        Options(skip="projected"),
        Options(skip="none"),
        Options(activation="tanh"),
        Options(skip="none", reset_gate=False, v="none"),
        Options(reset_on="current"),
        Options(v="inputs", dropout=True),
    )
    return [sru_cell(o) for o in variants]


@array_function
def sru_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    v: Any = None,
    c0: Any = None,
    *,
    alpha: float = 1.0,
    activation: str = "identity",
    highway: bool = True,
    reset_gate: bool = True,
    reset_on: str = "previous",
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    dropout_mask: Any = None,
    time_parallel: bool | str = "auto",
    save: bool | int | str = False,
    saved_dtype: Any = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """Runs a Simple Recurrent Unit over a batch of sequences.

    Args:
        x: (L, B, d_in), time-major; float16, bfloat16, float32 or float64.
        weight: (D, k, d, d_in) in x's dtype, or a low-rank pair (P, Q) of (D, k, d, p) and (p, d_in), D = 1 or 2
            directions. The k gates are u0, uf, ur, and u3 for a projected skip: k = 3 or 4, 3 with
            ``highway=False``, 2 with ``reset_gate=False``.
        bias: (D, 2, d), forget bias, then reset bias; zeros if None. (D, 1, d) with ``reset_gate=False``.
        v: (D, 2, d), weights of c[t-1] in the forget, then in the reset gate; or one for each step,
            (L, B, D, 2, d). None: the gates see x alone (ICLR). (D, 1, d) with ``reset_gate=False``.
        c0: (D, B, d), initial state; zeros if None. bias, v, c0 and dropout_mask have x's dtype or float32.
        alpha: scale of x in the skip (EMNLP section 3.2); not applied to a projected skip.
        activation: g, "identity", "tanh" or "relu".
        highway: False leaves the skip out, h = g(c)*m*r. True adds x itself if k = 3 (d_in = D*d; direction q sees
            x[..., q*d:(q+1)*d]), or u3 if k = 4.
        reset_gate: False is the basic form, h = g(c)*m, without a skip (ICLR section 2.1).
        reset_on: "previous", r sees c[t-1] (EMNLP equation 3); "current", r sees c[t] (Algorithm 1 as printed).
        lengths: (B,), integers from 0 to L (a list, or beside arrays on a GPU an array of NumPy, will do); later steps
            do not exist: h is 0 there and the state is carried.
        mask: (L, B), True is padding: h is 0 there and the state is carried.
        reset: (L, B), True: the state is 0 before this step; the reverse direction resets on the other side of the
            same boundary. Beyond `lengths` it has no effect.
        dropout_mask: (B, D, d), m, already scaled by 1/(1-p), shared over time.
        time_parallel: "auto", True or False; in this version every value gives the sequential kernel.
        save: keep what `sru_backward` needs: True every state, K >= 1 the state every K steps (the rest is computed
            again), "x" like that but also without U.
        saved_dtype: dtype of kept states; x's dtype halves their memory for 16-bit x. Default: that of the state.
        out: a pair (h, c_last) of arrays to write to, either may be None. c_last may be c0 itself.

    Returns:
        h (L, B, D*d) in x's dtype, c_last (D, B, d) in float32 (float64 for float64 x), and with `save` an object
        for `sru_backward`.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    check = Check("sru_forward")
    dtype, projection = _projection(check, "L B d_in", x, weight)
    options = _options(check, "weight", activation, highway, reset_gate, reset_on, bias, v, dropout_mask)
    values = {"x": x, "weight": weight, "bias": bias, "v": v, "c0": c0, "dropout_mask": dropout_mask}
    shared = layer.Options(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, options, dtype, values, alpha, shared, projection)


@array_function
def sru_recurrence(
    u: Any,
    x: Any = None,
    bias: Any = None,
    v: Any = None,
    c0: Any = None,
    *,
    alpha: float = 1.0,
    activation: str = "identity",
    highway: bool = True,
    reset_gate: bool = True,
    reset_on: str = "previous",
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    dropout_mask: Any = None,
    time_parallel: bool | str = "auto",
    save: bool | int | str = False,
    saved_dtype: Any = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """Runs the recurrence of a Simple Recurrent Unit on a given U, the door for other projections.

    Args:
        u: (L, B, D, k, d), the gates u0, uf, ur (, u3) of every step; float16, bfloat16, float32 or float64.
        x: (L, B, D*d) in u's dtype, for the skip where k = 3 and ``highway=True``; None otherwise.

    All else, results and errors as `sru_forward`; with ``save="x"`` U is kept, since it cannot be formed again. The
    backward gives the gradient of u.
    """
    check = Check("sru_recurrence")
    u = check.plain("u", u)
    dtype = check.io_dtype("u", u)
    check.shape("u", u, "L B D k d")
    layer.check_directions(check, "u")
    options = _options(check, "u", activation, highway, reset_gate, reset_on, bias, v, dropout_mask)
    if options.skip == "x" and x is None:
        raise check.error(
            "x",
            "is None, but u has 3 gates and highway=True, so the skip is x: pass x (L, B, D*d), a u with a fourth gate "
            "for the skip, or highway=False",
        )
    if options.skip != "x" and x is not None:
        raise check.error("x", "is given, but with this u and these flags the skip is not x; leave x out")
    values = {"u": u, "x": x, "bias": bias, "v": v, "c0": c0, "dropout_mask": dropout_mask}
    shared = layer.Options(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, options, dtype, values, alpha, shared)


def sru_backward(saved: Any, dh: Any, dc_last: Any = None, *, need: Any = None) -> Gradients:
    """The gradients of a loss with respect to what `sru_forward` or `sru_recurrence` was given.

    Args:
        saved: the third result of the forward with `save`.
        dh: (L, B, D*d), gradient of h, in x's dtype (or float32 for 16-bit x); None is zeros.
        dc_last: (D, B, d), gradient of c_last; None is zeros.
        need: names of the inputs whose gradients are wanted, such as ("weight", "bias"); the rest is skipped. Default:
            all of x, weight (or u), bias, v, c0 that were given.

    Returns:
        An object with the attributes .x .weight .bias .v .c0 (after `sru_recurrence` .u .x .bias .v .c0), shaped and
        typed like the inputs; .weight is a pair if weight was one, and an input that was None has the gradient None.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    return layer.backward("sru_backward", saved, dh, dc_last, need)


@array_function
def sru_step(
    x: Any,
    weight: Any,
    bias: Any = None,
    v: Any = None,
    c: Any = None,
    *,
    alpha: float = 1.0,
    activation: str = "identity",
    highway: bool = True,
    reset_gate: bool = True,
    reset_on: str = "previous",
    dropout_mask: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """One token of a Simple Recurrent Unit, for decoding: the same bits as that token in a sequence, given the same U.

    Args:
        x: (B, d_in).
        c: (D, B, d), the state before the token; zeros if None.
        out: a pair (h, c) of arrays (B, D*d) and (D, B, d) to write to; c may be the given one.

    All else and errors as `sru_forward`.

    Returns:
        h (B, D*d) and the new state (D, B, d).
    """
    check = Check("sru_step", c0="c")
    check.set("L", 1, "one token")
    dtype, projection = _projection(check, "B d_in", x, weight)
    options = _options(check, "weight", activation, highway, reset_gate, reset_on, bias, v, dropout_mask)
    values = {"x": projection.x, "weight": weight, "bias": bias, "v": v, "c0": c, "dropout_mask": dropout_mask}
    if isinstance(out, (tuple, list)) and len(out) == 2 and library.of(out[0]):
        check.set("D*d", check["D"] * check["d"], "weight")
        check.shape("out[0]", out[0], "B D*d")
        out = (out[0][None], out[1])
    h, c_last = _run(check, options, dtype, values, alpha, layer.Options(out=out), projection)
    return h[0], c_last


def sru_init(
    d_in: int,
    d: int,
    *,
    directions: int = 1,
    low_rank: int | None = None,
    project_skip: bool | str = "auto",
    recurrent: bool = True,
    highway: bool = True,
    reset_gate: bool = True,
    highway_bias: float = 0.0,
    dtype: Any = "float32",
    rng: Any = None,
    like: Any = None,
) -> dict[str, Any]:
    """Initial parameters of a Simple Recurrent Unit (EMNLP section 3.2), as a dict: ``sru_forward(x, **params)``.

    The weights are uniform with variance 1/d_in (each factor of a low-rank weight with 1 / its number of columns), v is
    uniform with variance 1/2, the biases are 0 but the reset bias, and alpha = sqrt(1 + 2 exp(highway_bias)), which
    keeps the variance of h near that of x. The papers give no variance for v; with 1/2 the state, of variance
    about 1/3, adds little to gates of variance 1.

    Args:
        d_in: size of x.
        d: hidden size per direction.
        directions: 1, or 2 with a reverse direction.
        low_rank: p, to get a pair (P, Q) of (D, k, d, p) and (p, d_in) as weight.
        project_skip: whether the skip has a matrix of its own, scaled by alpha (ICLR appendix C); "auto": where
            d_in differs from directions*d.
        recurrent: False leaves v out.
        highway, reset_gate: as in `sru_forward`; part of the result where they are False.
        highway_bias: initial reset bias; negative favours the skip.
        dtype: dtype of all arrays.
        rng: a numpy.random.Generator, or a seed.
        like: an array whose library the results shall have; NumPy if None.

    Returns:
        weight, bias, v (if recurrent), alpha (if the skip is x), and highway or reset_gate where False.

    Raises:
        ArgumentError: a size is not a positive integer, or options contradict each other.
    """
    check = Check("sru_init")
    for name, size in (
        ("d_in", d_in),
        ("d", d),
        ("directions", directions),
        ("low_rank", 1 if low_rank is None else low_rank),
    ):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise check.error(name, f"must be a positive integer (got {size!r})")
    check.choice("directions", int(directions) if directions in (1, 2) else directions, (1, 2))
    check.choice("project_skip", project_skip, ("auto", True, False))
    for name, flag in (("recurrent", recurrent), ("highway", highway), ("reset_gate", reset_gate)):
        check.choice(name, flag, (True, False))
    kind = _init_dtype(check, dtype)
    highway_bias = check.number("highway_bias", highway_bias)
    if abs(highway_bias) > 100:  # exp of more than 700 is infinite
        raise check.error("highway_bias", f"must be from -100 to 100 (got {highway_bias!r})")
    has_skip = highway and reset_gate
    projected = has_skip and (project_skip is True or (project_skip == "auto" and d_in != directions * d))
    if project_skip is True and not has_skip:
        raise check.error("project_skip", "is True, but without highway or reset gate there is no skip; leave it out")
    if has_skip and not projected and d_in != directions * d:
        raise check.error(
            "project_skip",
            f"is False, but the skip adds x of size {d_in} to h of size {directions * d}; use 'auto', or highway=False",
        )
    try:
        generator = np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise check.error("rng", f"must be a numpy.random.Generator or a seed, an integer >= 0 (got {rng!r})") from None

    def uniform(shape: tuple[int, ...], variance: float) -> np.ndarray[Any, Any]:
        bound = np.sqrt(3 * variance)
        try:
            return generator.uniform(-bound, bound, shape)
        except ValueError:
            raise check.error("d_in, d", f"ask for an array {shape}, which is larger than any memory") from None

    gated = 2 if reset_gate else 1
    k = 1 + gated + projected
    alpha = float(np.sqrt(1 + 2 * np.exp(highway_bias)))
    outer = uniform((directions, k, d, low_rank or d_in), 1 / (low_rank or d_in))
    if projected:
        outer[:, -1] *= alpha
    bias = np.zeros((directions, gated, d))
    bias[:, 1:] = highway_bias
    weight: Any = outer.astype(kind)
    if low_rank:
        weight = (weight, uniform((low_rank, d_in), 1 / d_in).astype(kind))
    params: dict[str, Any] = {"weight": weight, "bias": bias.astype(kind)}
    if recurrent:
        params["v"] = uniform((directions, gated, d), 0.5).astype(kind)
    if has_skip and not projected:
        params["alpha"] = alpha
    params |= {name: False for name, on in (("highway", highway), ("reset_gate", reset_gate)) if not on}
    return arrays.like("sru_init", params, like)


def _init_dtype(check: Check, dtype: Any) -> np.dtype[Any]:
    try:
        name = str(dtype) if dtype is None else np.dtype(dtype).name
    except TypeError:  # bfloat16 is unknown to NumPy by name
        name = str(dtype)
    check.choice("dtype", name, IO_DTYPES)
    return to_numpy(name)


def _projection(check: Check, axes: str, x: Any, weight: Any) -> tuple[str, layer.Projection]:
    """The dtype that all others follow, and x as (L, B, d_in) with its weight."""
    x = check.plain("x", x)
    dtype = check.io_dtype("x", x)
    check.shape("x", x, axes)
    return dtype, layer.Projection(x if x.ndim == 3 else x[None], layer.weight(check, weight, dtype))


def _options(
    check: Check,
    name: str,
    activation: str,
    highway: Any,
    reset_gate: Any,
    reset_on: str,
    bias: Any,
    v: Any,
    dropout_mask: Any,
) -> Options:
    """What the arguments, and the number of gates in `name`, make of the cell."""
    check.choice("activation", activation, tuple(ACTIVATIONS))
    check.choice("reset_on", reset_on, ("previous", "current"))
    check.choice("highway", highway, (True, False))
    check.choice("reset_gate", reset_gate, (True, False))
    k = check["k"]
    needed = (2,) if not reset_gate else (3, 4) if highway else (3,)
    if k not in needed:
        flags = f"highway={highway}, reset_gate={reset_gate}"
        raise check.error(
            name, f"has k = {k} gates; with {flags} it needs {' or '.join(map(str, needed))} (see sru_init)", ShapeError
        )
    return Options(
        skip="none" if not (highway and reset_gate) else "projected" if k == 4 else "x",
        activation=activation,
        reset_gate=bool(reset_gate),
        reset_on=reset_on if reset_gate else "previous",
        bias=bias is not None,
        v="none" if v is None else "inputs" if getattr(v, "ndim", 0) == 5 else "params",
        dropout=dropout_mask is not None,
    )


def _run(
    check: Check,
    options: Options,
    dtype: str,
    values: dict[str, Any],
    alpha: Any,
    shared: layer.Options,
    projection: layer.Projection | None = None,
) -> tuple[Any, ...]:
    """What the functions share once their own arguments are checked."""
    alpha = check.number("alpha", alpha)
    if not options.dropout:
        del values["dropout_mask"]
    if options.skip == "x":
        values["x"] = _skip(check, values["x"], dtype, "weight" if projection else "u")
    cell = sru_cell(options)
    return layer.forward(check, cell, dtype, values, (alpha,) if cell.constants else (), shared, projection)


def _skip(check: Check, x: Any, dtype: str, gates: str) -> NDArray:
    """x as the skip, (L, B, D, d): each direction has its own part."""
    x = check.array("x", x, "L B d_in", (dtype,))
    D, d = check["D"], check["d"]
    if x.shape[2] != D * d:
        raise check.error(
            "x",
            f"has d_in = {x.shape[2]}, but the highway adds it to h of size D*d = {D}*{d} = {D * d}: give {gates} a "
            "fourth gate for a projected skip (sru_init does so), or pass highway=False",
            ShapeError,
        )
    return check.library.xp.ascontiguousarray(x).reshape(*x.shape[:2], D, d)
