"""QRNN, the pooling of Quasi-Recurrent Neural Networks.

    z[t] = tanh(uz[t] + b_z), and f[t], o[t], i[t] are sigmoids of their gates with biases
    f:    h[t] = f[t]*h[t-1] + (1 - f[t])*z[t]
    fo:   c[t] = f[t]*c[t-1] + (1 - f[t])*z[t];  h[t] = o[t]*c[t]
    ifo:  c[t] = f[t]*c[t-1] + i[t]*z[t];        h[t] = o[t]*c[t]

Bradbury, Merity, Xiong, Socher, "Quasi-Recurrent Neural Networks", ICLR 2017, section 2. `uz`, `uf`, `uo`, `ui` are the
gates of U, a convolution over the last `window` tokens. With a highway (SRU's EMNLP paper, table 1), the output is
h[t] = o[t]*c[t] + (1 - o[t])*skip[t].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from .. import inputs, layer
from ..arrays import array_function
from ..cell import Array, Cell
from ..check import Check
from ..errors import ShapeError
from ..gradients import Gradients
from ..graph import sigmoid, tanh
from ..init import Init
from ..inputs import Input
from ..options import Options as Shared

__all__ = ["qrnn_backward", "qrnn_forward", "qrnn_init", "qrnn_recurrence", "qrnn_step"]

POOLINGS = {"f": "zf", "fo": "zfo", "ifo": "zfoi"}  # and their gates, in the order of U


@dataclass(frozen=True)
class Options:
    """What changes the formula of a QRNN cell, and so the text of its kernels."""

    pooling: str = "fo"
    skip: str = "none"  # or "x", "projected"
    bias: bool = True
    zoneout: bool = False


@functools.cache
def qrnn_cell(o: Options) -> Cell:
    """The QRNN cell with the given options."""

    def step(uz, uf, c, uo=None, ui=None, w=None, x=None, zoneout=1, b_z=0, b_f=0, b_o=0, b_i=0):  # type: ignore[no-untyped-def]
        z = tanh(uz + b_z)
        f = sigmoid(uf + b_f)
        if o.zoneout:
            f = 1 - zoneout * (1 - f)
        c = f * c + (sigmoid(ui + b_i) if o.pooling == "ifo" else 1 - f) * z
        if o.pooling == "f":
            return c, c
        out = sigmoid(uo + b_o)
        if o.skip == "none":
            return c, out * c
        skip = w if o.skip == "projected" else x
        h = skip + (c - skip) * out
        return c, h

    gates = POOLINGS[o.pooling]
    declared = [Array("u", "gates", (*(f"u{gate}" for gate in gates), *(["w"] if o.skip == "projected" else [])))]
    declared += [Array("x", "inputs", ("x",), side_by_side=True)] if o.skip == "x" else []
    declared += [Array("zoneout_mask", "inputs", ("zoneout",), differentiable=False)] if o.zoneout else []
    declared += [Array("bias", "params", tuple(f"b_{gate}" for gate in gates))] if o.bias else []
    return Cell(_name(o), step, (*declared, Array("c0", "state", ("c",))), options=o)


def _name(o: Options) -> str:
    parts = [
        "qrnn",
        "" if o.pooling == "fo" else o.pooling,
        {"none": "", "x": "highway", "projected": "projected"}[o.skip],
    ]
    parts += ["" if o.bias else "no_bias", "zoneout" if o.zoneout else ""]
    return "_".join(filter(None, parts))


def named_cells() -> list[Cell]:
    """The variants whose emitted text stands in cuda/cells/."""
    variants = (
        Options(),
        Options(pooling="f"),
        Options(pooling="ifo"),
        Options(skip="x"),
        Options(skip="projected"),
        Options(zoneout=True),
    )
    return [qrnn_cell(o) for o in variants]


@array_function
def qrnn_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    c0: Any = None,
    *,
    pooling: str = "fo",
    window: int = 1,
    highway: bool = False,
    zoneout_mask: Any = None,
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    time_parallel: bool | str = "auto",
    save: bool | int | str = False,
    saved_dtype: Any = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """Runs a Quasi-RNN layer over a batch of sequences.

    Args:
        x: (L, B, d_in), time-major; float16, bfloat16, float32 or float64.
        weight: (D, k, d, window*d_in) in x's dtype, the oldest token's columns first, or a low-rank pair (P, Q) of
            (D, k, d, p) and (p, window*d_in); D = 1 or 2 directions. The k gates are z, f (k = 2), o (3), i (4) as far
            as `pooling` has them, and one more for a projected skip.
        bias: (D, G, d), one row for each of z, f, o, i that exist; zeros if None. x's dtype or float32.
        c0: (D, B, d), initial state; zeros if None. x's dtype or float32.
        pooling: "f", "fo" or "ifo".
        window: how many tokens a step sees: itself and those before it (in the reverse direction, after it). Tokens
            beyond the ends, at padding and across a boundary of `reset` count as zeros.
        highway: True adds a skip, for "fo" and "ifo": x itself if the weight has no gate for it (d_in = D*d;
            direction q sees x[..., q*d:(q+1)*d]), else that gate.
        zoneout_mask: (L, B, D, d) of 0 and 1, x's dtype, float32 or bool: where it is 0, f is 1 (the paper's section
            2.1; f becomes 1 - mask*(1 - f), without rescaling). It has no gradient.
        lengths: (B,), integers from 0 to L; later steps do not exist: h is 0 there and the state is carried.
        mask: (L, B), True is padding: h is 0 there and the state is carried.
        reset: (L, B), True: the state is 0 before this step; the reverse direction resets on the other side of the
            same boundary.
        time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/recurrences.md).
        save: keep what `qrnn_backward` needs: True every state, K >= 1 the state every K steps, "x" like that but also
            without U.
        saved_dtype: dtype of kept states; x's dtype halves their memory for 16-bit x. Default: that of the state.
        out: a pair (h, c_last) of arrays to write to, either may be None. c_last may be c0 itself.

    Returns:
        h (L, B, D*d) in x's dtype, c_last (D, B, d) in float32 (float64 for float64 x), and with `save` an object for
        `qrnn_backward`. With "f" the state is h before it is rounded to x's dtype.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    check = Check("qrnn_forward")
    dtype, projected = inputs.projected(check, x, weight, window)
    options = _options(check, "weight", pooling, highway, bias, zoneout_mask)
    values = {"x": x, "weight": weight, "bias": bias, "c0": c0, "zoneout_mask": zoneout_mask}
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, options, dtype, values, shared, projected)


@array_function
def qrnn_recurrence(
    u: Any,
    x: Any = None,
    bias: Any = None,
    c0: Any = None,
    *,
    pooling: str = "fo",
    highway: bool = False,
    zoneout_mask: Any = None,
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    time_parallel: bool | str = "auto",
    save: bool | int | str = False,
    saved_dtype: Any = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """Runs the pooling of a Quasi-RNN on a given U, the door for other projections.

    Args:
        u: (L, B, D, k, d), the gates z, f (, o (, i)) (, skip) of every step, before their activations.
        x: (L, B, D*d) in u's dtype, for a skip that is not among the gates; None otherwise.

    All else, results and errors as `qrnn_forward`; with ``save="x"`` U is kept, since it cannot be formed again. The
    backward gives the gradient of u.
    """
    check = Check("qrnn_recurrence")
    dtype = inputs.given_u(check, u)
    options = _options(check, "u", pooling, highway, bias, zoneout_mask)
    inputs.check_skip_of_u(check, x, options.skip == "x")
    values = {"u": u, "x": x, "bias": bias, "c0": c0, "zoneout_mask": zoneout_mask}
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, options, dtype, values, shared)


def qrnn_backward(saved: Any, dh: Any, dc_last: Any = None, *, need: Any = None) -> Gradients:
    """The gradients of a loss with respect to what `qrnn_forward` or `qrnn_recurrence` was given.

    Args:
        saved: the third result of the forward with `save`.
        dh: (L, B, D*d), gradient of h, in x's dtype (or float32 for 16-bit x); None is zeros.
        dc_last: (D, B, d), gradient of c_last; None is zeros.
        need: names of the inputs whose gradients are wanted, such as ("weight", "bias"); the rest is skipped. Default:
            all of x, weight (or u), bias, c0 that were given.

    Returns:
        An object with the attributes .x .weight .bias .c0 (after `qrnn_recurrence` .u .x .bias .c0), shaped and typed
        like the inputs; .weight is a pair if weight was one, and an input that was None has the gradient None.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    return layer.backward("qrnn_backward", saved, dh, dc_last, need)


@array_function
def qrnn_step(
    x: Any,
    weight: Any,
    bias: Any = None,
    c: Any = None,
    *,
    pooling: str = "fo",
    window: int = 1,
    highway: bool = False,
    zoneout_mask: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """One token of a Quasi-RNN, for decoding: the same bits as that token in a sequence, given the same U.

    Args:
        x: (B, d_in); with a window of more than one, (window, B, d_in), the last tokens, the new one last.
        c: (D, B, d), the state before the token; zeros if None.
        zoneout_mask: (B, D, d).
        out: a pair (h, c) of arrays (B, D*d) and (D, B, d) to write to; c may be the given one.

    All else and errors as `qrnn_forward`.

    Returns:
        h (B, D*d) and the new state (D, B, d).
    """
    check = Check("qrnn_step", c0="c")
    dtype, projected, x = inputs.projected_token(check, x, weight, window)
    options = _options(check, "weight", pooling, highway, bias, zoneout_mask)
    zoneout_mask = inputs.of_one_token(check, "zoneout_mask", zoneout_mask, "B D d")
    values = {"x": x, "weight": weight, "bias": bias, "c0": c, "zoneout_mask": zoneout_mask}
    return inputs.one_token(check, out, lambda shared: _run(check, options, dtype, values, shared, projected))


def qrnn_init(
    d_in: int,
    d: int,
    *,
    directions: int = 1,
    low_rank: int | None = None,
    pooling: str = "fo",
    window: int = 1,
    highway: bool = False,
    project_skip: bool | str = "auto",
    forget_bias: float = 0.0,
    dtype: Any = "float32",
    rng: Any = None,
    like: Any = None,
) -> dict[str, Any]:
    """Initial parameters of a Quasi-RNN layer, as a dict: ``qrnn_forward(x, **params)``.

    The weights are uniform with variance 1 / (window*d_in) (each factor of a low-rank weight with 1 / its number of
    columns), the biases are 0 but that of the forget gate.

    Args:
        d_in: size of x.
        d: hidden size per direction.
        directions: 1, or 2 with a reverse direction.
        low_rank: p, to get a pair (P, Q) of (D, k, d, p) and (p, window*d_in) as weight.
        pooling, window, highway: as in `qrnn_forward`; part of the result where they are not its defaults.
        project_skip: whether the skip has a matrix of its own; "auto": where d_in differs from directions*d.
        forget_bias: initial bias of the forget gate; positive keeps the state longer.
        dtype: dtype of all arrays.
        rng: a numpy.random.Generator, or a seed.
        like: an array whose library the results shall have; NumPy if None.

    Returns:
        weight, bias, and pooling, window, highway where they are not the defaults.

    Raises:
        ArgumentError: a size is not a positive integer, or options contradict each other.
    """
    check = Check("qrnn_init")
    init = Init(check, d_in, d, directions, low_rank, dtype, rng, window)
    _check_flags(check, pooling, highway)
    projected = init.skip_is_projected(project_skip, bool(highway))
    biases = {"z": 0.0, "f": check.number("forget_bias", forget_bias), "o": 0.0, "i": 0.0}
    gates = POOLINGS[pooling]
    params: dict[str, Any] = {
        "weight": init.weight(len(gates) + projected),
        "bias": init.biases(*(biases[gate] for gate in gates)),
    }
    chosen = {"pooling": (pooling, "fo"), "window": (window, 1), "highway": (highway, False)}
    params |= {name: value for name, (value, default) in chosen.items() if value != default}
    return init.result(params, like)


def _check_flags(check: Check, pooling: str, highway: Any) -> None:
    check.choice("pooling", pooling, tuple(POOLINGS))
    check.choice("highway", highway, (True, False))
    if highway and pooling == "f":
        raise check.error("highway", "is True, but pooling='f' has no output gate to mix a skip in; use 'fo' or 'ifo'")


def _options(check: Check, name: str, pooling: str, highway: Any, bias: Any, zoneout_mask: Any) -> Options:
    """What the arguments, and the number of gates in `name`, make of the cell."""
    _check_flags(check, pooling, highway)
    k, gates = check["k"], len(POOLINGS[pooling])
    needed = (gates, gates + 1) if highway else (gates,)
    if k not in needed:
        flags = f"pooling={pooling!r}, highway={bool(highway)}"
        text = f"has k = {k} gates; with {flags} it needs {' or '.join(map(str, needed))} (see qrnn_init)"
        raise check.error(name, text, ShapeError)
    return Options(
        pooling=pooling,
        skip="none" if not highway else "projected" if k > gates else "x",
        bias=bias is not None,
        zoneout=zoneout_mask is not None,
    )


def _run(
    check: Check,
    options: Options,
    dtype: str,
    values: dict[str, Any],
    shared: Shared,
    projected: Input | None = None,
) -> tuple[Any, ...]:
    """What the functions share once their own arguments are checked."""
    if not options.zoneout:
        del values["zoneout_mask"]
    if options.skip == "x":
        inputs.check_skip(check, values["x"], dtype, "weight" if projected else "u")
    return layer.forward(check, qrnn_cell(options), dtype, values, (), shared, projected)
