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

from .. import inputs, layer
from ..arrays import array_function
from ..cell import Array, Cell
from ..check import Check
from ..errors import ShapeError
from ..gradients import Gradients
from ..graph import relu, sigmoid, tanh
from ..init import Init
from ..inputs import Input
from ..options import Options as Shared

__all__ = ["sru_backward", "sru_forward", "sru_init", "sru_recurrence", "sru_step"]

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
    declared += [Array("x", "inputs", ("x",), side_by_side=True)] if o.skip == "x" else []
    declared += [Array("dropout_mask", "per_sequence", ("m",), differentiable=False)] if o.dropout else []
    declared += [Array("bias", "params", tuple(f"b_{name}" for name in gated))] if o.bias else []
    declared += [v] if o.v != "none" else []
    declared += [Array("c0", "state", ("c",))]
    return Cell(_name(o), step, tuple(declared), ("alpha",) if o.skip == "x" else (), o)


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
        time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/gpu.md).
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
    dtype, projected = inputs.projected(check, x, weight)
    options = _options(check, "weight", activation, highway, reset_gate, reset_on, bias, v, dropout_mask)
    values = {"x": x, "weight": weight, "bias": bias, "v": v, "c0": c0, "dropout_mask": dropout_mask}
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, options, dtype, values, alpha, shared, projected)


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
    dtype = inputs.given_u(check, u)
    options = _options(check, "u", activation, highway, reset_gate, reset_on, bias, v, dropout_mask)
    inputs.check_skip_of_u(check, x, options.skip == "x")
    values = {"u": u, "x": x, "bias": bias, "v": v, "c0": c0, "dropout_mask": dropout_mask}
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
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
    dtype, projected, x = inputs.projected_token(check, x, weight)
    options = _options(check, "weight", activation, highway, reset_gate, reset_on, bias, v, dropout_mask)
    values = {"x": x, "weight": weight, "bias": bias, "v": v, "c0": c, "dropout_mask": dropout_mask}
    return inputs.one_token(check, out, lambda shared: _run(check, options, dtype, values, alpha, shared, projected))


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
    init = Init(check, d_in, d, directions, low_rank, dtype, rng)
    for name, flag in (("recurrent", recurrent), ("highway", highway), ("reset_gate", reset_gate)):
        check.choice(name, flag, (True, False))
    highway_bias = check.number("highway_bias", highway_bias)
    if abs(highway_bias) > 100:  # exp of more than 700 is infinite
        raise check.error("highway_bias", f"must be from -100 to 100 (got {highway_bias!r})")
    has_skip = bool(highway and reset_gate)
    projected = init.skip_is_projected(project_skip, has_skip)
    alpha = float(np.sqrt(1 + 2 * np.exp(highway_bias)))
    gated = 2 if reset_gate else 1
    params: dict[str, Any] = {
        "weight": init.weight(1 + gated + projected, scale_of_last=alpha if projected else 1.0),
        "bias": init.biases(0.0, highway_bias)[:, :gated],
    }
    if recurrent:
        params["v"] = init.uniform((init.D, gated, init.d), 0.5)
    if has_skip and not projected:
        params["alpha"] = alpha
    params |= {name: False for name, on in (("highway", highway), ("reset_gate", reset_gate)) if not on}
    return init.result(params, like)


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
    shared: Shared,
    projected: Input | None = None,
) -> tuple[Any, ...]:
    """What the functions share once their own arguments are checked."""
    alpha = check.number("alpha", alpha)
    if not options.dropout:
        del values["dropout_mask"]
    if options.skip == "x":
        inputs.check_skip(check, values["x"], dtype, "weight" if projected else "u")
    cell = sru_cell(options)
    return layer.forward(check, cell, dtype, values, (alpha,) if cell.constants else (), shared, projected)
