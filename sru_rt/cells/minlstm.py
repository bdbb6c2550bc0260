"""minLSTM, an LSTM whose gates see the input alone and add up to one.

    F = s(uf[t] + b_f), I = s(ui[t] + b_i), f[t] = F / (F + I), i[t] = I / (F + I)
    h[t] = f[t]*h[t-1] + i[t]*g(un[t] + b_n)

Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.2.
`uf`, `ui` and `un` are the gates of U = W x. i is computed as s(softplus(-uf) - softplus(-ui)), which is finite where
both F and I are 0 to the last bit, and f as 1 - i: where the memory is long, a small i is then right to its last bit.

The recurrence runs in linear space, which is as fast as in logarithms, and more exact: for both of the paper's
candidates, as it stands (`g` is the identity) and kept positive (`g(n)` = n + 0.5 for n >= 0, else s(n)).
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
from ..graph import sigmoid, softplus
from ..init import Init
from ..inputs import Input
from ..options import Options as Shared
from .mingru import CANDIDATES

__all__ = ["minlstm_backward", "minlstm_forward", "minlstm_init", "minlstm_recurrence", "minlstm_step"]


@dataclass(frozen=True)
class Options:
    """What changes the formula of a minLSTM cell, and so the text of its kernels."""

    candidate: str = "identity"
    bias: bool = True


@functools.cache
def minlstm_cell(o: Options) -> Cell:
    """The minLSTM cell with the given options."""

    def step(uf, ui, un, h, b_f=0, b_i=0, b_n=0):  # type: ignore[no-untyped-def]
        i = sigmoid(softplus(-(uf + b_f)) - softplus(-(ui + b_i)))
        n = CANDIDATES[o.candidate](un + b_n)
        h = (1 - i) * h + i * n
        return h, h

    declared = [Array("u", "gates", ("uf", "ui", "un"))]
    declared += [Array("bias", "params", ("b_f", "b_i", "b_n"))] if o.bias else []
    name = "_".join(["minlstm", *(["positive"] if o.candidate == "positive" else []), *([] if o.bias else ["no_bias"])])
    return Cell(name, step, (*declared, Array("h0", "state", ("h",))), options=o)


def named_cells() -> list[Cell]:
    """The variants whose emitted text stands in cuda/cells/."""
    return [minlstm_cell(Options()), minlstm_cell(Options(candidate="positive"))]


@array_function
def minlstm_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    h0: Any = None,
    *,
    candidate: str = "identity",
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    time_parallel: bool | str = "auto",
    save: bool | int | str = False,
    saved_dtype: Any = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """Runs a minLSTM over a batch of sequences.

    Args:
        x: (L, B, d_in), time-major; float16, bfloat16, float32 or float64.
        weight: (D, 3, d, d_in) in x's dtype, the gates f, i, n, or a low-rank pair (P, Q) of (D, 3, d, p) and
            (p, d_in); D = 1 or 2 directions.
        bias: (D, 3, d), one row for each gate; zeros if None. x's dtype or float32.
        h0: (D, B, d), initial state; zeros if None. x's dtype or float32.
        candidate: g, "identity" or "positive".
        lengths: (B,), integers from 0 to L; later steps do not exist: h is 0 there and the state is carried.
        mask: (L, B), True is padding: h is 0 there and the state is carried.
        reset: (L, B), True: the state is 0 before this step; the reverse direction resets on the other side of the
            same boundary.
        time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/recurrences.md).
        save: keep what `minlstm_backward` needs: True every state, K >= 1 the state every K steps, "x" like that but
            also without U.
        saved_dtype: dtype of kept states; x's dtype halves their memory for 16-bit x. Default: that of the state.
        out: a pair (h, h_last) of arrays to write to, either may be None. h_last may be h0 itself.

    Returns:
        h (L, B, D*d) in x's dtype, h_last (D, B, d) in float32 (float64 for float64 x), the state before it is
        rounded to x's dtype, and with `save` an object for `minlstm_backward`.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    check = Check("minlstm_forward")
    dtype, projected = inputs.projected(check, x, weight)
    values = {"x": x, "weight": weight, "bias": bias, "h0": h0}
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, "weight", candidate, dtype, values, shared, projected)


@array_function
def minlstm_recurrence(
    u: Any,
    bias: Any = None,
    h0: Any = None,
    *,
    candidate: str = "identity",
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    time_parallel: bool | str = "auto",
    save: bool | int | str = False,
    saved_dtype: Any = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """Runs the recurrence of a minLSTM on a given U, the door for other projections.

    Args:
        u: (L, B, D, 3, d), the gates f, i, n of every step, before their activations.

    All else, results and errors as `minlstm_forward`; with ``save="x"`` U is kept, since it cannot be formed again. The
    backward gives the gradient of u.
    """
    check = Check("minlstm_recurrence")
    dtype = inputs.given_u(check, u)
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, "u", candidate, dtype, {"u": u, "bias": bias, "h0": h0}, shared)


def minlstm_backward(saved: Any, dh: Any, dh_last: Any = None, *, need: Any = None) -> Gradients:
    """The gradients of a loss with respect to what `minlstm_forward` or `minlstm_recurrence` was given.

    Args:
        saved: the third result of the forward with `save`.
        dh: (L, B, D*d), gradient of h, in x's dtype (or float32 for 16-bit x); None is zeros.
        dh_last: (D, B, d), gradient of h_last; None is zeros.
        need: names of the inputs whose gradients are wanted, such as ("weight", "bias"); the rest is skipped. Default:
            all of x, weight (or u), bias, h0 that were given.

    Returns:
        An object with the attributes .x .weight .bias .h0 (after `minlstm_recurrence` .u .bias .h0), shaped and typed
        like the inputs; .weight is a pair if weight was one, and an input that was None has the gradient None.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    return layer.backward("minlstm_backward", saved, dh, dh_last, need)


@array_function
def minlstm_step(
    x: Any,
    weight: Any,
    bias: Any = None,
    h: Any = None,
    *,
    candidate: str = "identity",
    out: Any = None,
) -> tuple[Any, Any]:
    """One token of a minLSTM, for decoding: the same bits as that token in a sequence, given the same U.

    Args:
        x: (B, d_in).
        h: (D, B, d), the state before the token; zeros if None.
        out: a pair of arrays (B, D*d) and (D, B, d) to write h and the state to; the latter may be the given one.

    All else and errors as `minlstm_forward`.

    Returns:
        h (B, D*d) in x's dtype and the new state (D, B, d).
    """
    check = Check("minlstm_step", h0="h")
    dtype, projected, x = inputs.projected_token(check, x, weight)
    values = {"x": x, "weight": weight, "bias": bias, "h0": h}
    return inputs.one_token(
        check, out, lambda shared: _run(check, "weight", candidate, dtype, values, shared, projected)
    )


def minlstm_init(
    d_in: int,
    d: int,
    *,
    directions: int = 1,
    low_rank: int | None = None,
    candidate: str = "identity",
    forget_bias: float = 0.0,
    dtype: Any = "float32",
    rng: Any = None,
    like: Any = None,
) -> dict[str, Any]:
    """Initial parameters of a minLSTM, as a dict: ``minlstm_forward(x, **params)``.

    The weights are uniform with variance 1/d_in (each factor of a low-rank weight with 1 / its number of columns), the
    biases are 0 but that of the forget gate.

    Args:
        d_in: size of x.
        d: hidden size per direction.
        directions: 1, or 2 with a reverse direction.
        low_rank: p, to get a pair (P, Q) of (D, 3, d, p) and (p, d_in) as weight.
        candidate: as in `minlstm_forward`; part of the result where it is not its default.
        forget_bias: positive keeps the state longer.
        dtype: dtype of all arrays.
        rng: a numpy.random.Generator, or a seed.
        like: an array whose library the results shall have; NumPy if None.

    Returns:
        weight, bias, and candidate where it is not the default.

    Raises:
        ArgumentError: a size is not a positive integer, or another argument is none of its choices.
    """
    check = Check("minlstm_init")
    init = Init(check, d_in, d, directions, low_rank, dtype, rng)
    check.choice("candidate", candidate, tuple(CANDIDATES))
    forget_bias = check.number("forget_bias", forget_bias)
    params: dict[str, Any] = {"weight": init.weight(3), "bias": init.biases(forget_bias, 0.0, 0.0)}
    params |= {"candidate": candidate} if candidate != "identity" else {}
    return init.result(params, like)


def _run(
    check: Check,
    name: str,
    candidate: str,
    dtype: str,
    values: dict[str, Any],
    shared: Shared,
    projected: Input | None = None,
) -> tuple[Any, ...]:
    """What the functions share; `name` is what has the gates."""
    check.choice("candidate", candidate, tuple(CANDIDATES))
    if check["k"] != 3:
        raise check.error(name, f"has k = {check['k']} gates; it needs 3: f, i, n (see minlstm_init)", ShapeError)
    cell = minlstm_cell(Options(candidate, values["bias"] is not None))
    return layer.forward(check, cell, dtype, values, (), shared, projected)
