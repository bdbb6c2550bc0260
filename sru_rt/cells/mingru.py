"""minGRU, a GRU whose gates see the input alone.

    z[t] = s(uz[t] + b_z)
    h[t] = (1 - z[t])*h[t-1] + z[t]*g(un[t] + b_n)

Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.1.
`uz` and `un` are the gates of U = W x.

The recurrence runs in linear space, which is as fast as in logarithms, and more exact: for both of the paper's
candidates, as it stands (`g` is the identity) and kept positive (`g(n)` = n + 0.5 for n >= 0, else s(n)).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import inputs, layer
from ..arrays import array_function
from ..cell import Array, Cell
from ..check import Check
from ..errors import ShapeError
from ..gradients import Gradients
from ..graph import sigmoid, where
from ..init import Init
from ..inputs import Input
from ..options import Options as Shared

__all__ = ["mingru_backward", "mingru_forward", "mingru_init", "mingru_recurrence", "mingru_step"]

CANDIDATES: dict[str, Callable[[Any], Any]] = {
    "identity": lambda n: n,
    "positive": lambda n: where(n >= 0, n + 0.5, sigmoid(n)),
}


@dataclass(frozen=True)
class Options:
    """What changes the formula of a minGRU cell, and so the text of its kernels."""

    candidate: str = "identity"
    bias: bool = True


@functools.cache
def mingru_cell(o: Options) -> Cell:
    """The minGRU cell with the given options."""

    def step(uz, un, h, b_z=0, b_n=0):  # type: ignore[no-untyped-def]
        z = sigmoid(uz + b_z)
        n = CANDIDATES[o.candidate](un + b_n)
        h = (1 - z) * h + z * n
        return h, h

    declared = [Array("u", "gates", ("uz", "un"))]
    declared += [Array("bias", "params", ("b_z", "b_n"))] if o.bias else []
    name = "_".join(["mingru", *(["positive"] if o.candidate == "positive" else []), *([] if o.bias else ["no_bias"])])
    return Cell(name, step, (*declared, Array("h0", "state", ("h",))), options=o)


def named_cells() -> list[Cell]:
    """The variants whose emitted text stands in cuda/cells/."""
    return [mingru_cell(Options()), mingru_cell(Options(candidate="positive"))]


@array_function
def mingru_forward(
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
    """Runs a minGRU over a batch of sequences.

    Args:
        x: (L, B, d_in), time-major; float16, bfloat16, float32 or float64.
        weight: (D, 2, d, d_in) in x's dtype, the gates z, n, or a low-rank pair (P, Q) of (D, 2, d, p) and
            (p, d_in); D = 1 or 2 directions.
        bias: (D, 2, d), one row for each gate; zeros if None. x's dtype or float32.
        h0: (D, B, d), initial state; zeros if None. x's dtype or float32.
        candidate: g, "identity" or "positive".
        lengths: (B,), integers from 0 to L; later steps do not exist: h is 0 there and the state is carried.
        mask: (L, B), True is padding: h is 0 there and the state is carried.
        reset: (L, B), True: the state is 0 before this step; the reverse direction resets on the other side of the
            same boundary.
        time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/recurrences.md).
        save: keep what `mingru_backward` needs: True every state, K >= 1 the state every K steps, "x" like that but
            also without U.
        saved_dtype: dtype of kept states; x's dtype halves their memory for 16-bit x. Default: that of the state.
        out: a pair (h, h_last) of arrays to write to, either may be None. h_last may be h0 itself.

    Returns:
        h (L, B, D*d) in x's dtype, h_last (D, B, d) in float32 (float64 for float64 x), the state before it is
        rounded to x's dtype, and with `save` an object for `mingru_backward`.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    check = Check("mingru_forward")
    dtype, projected = inputs.projected(check, x, weight)
    values = {"x": x, "weight": weight, "bias": bias, "h0": h0}
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, "weight", candidate, dtype, values, shared, projected)


@array_function
def mingru_recurrence(
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
    """Runs the recurrence of a minGRU on a given U, the door for other projections.

    Args:
        u: (L, B, D, 2, d), the gates z, n of every step, before their activations.

    All else, results and errors as `mingru_forward`; with ``save="x"`` U is kept, since it cannot be formed again. The
    backward gives the gradient of u.
    """
    check = Check("mingru_recurrence")
    dtype = inputs.given_u(check, u)
    shared = Shared(lengths, mask, reset, time_parallel, save, saved_dtype, out)
    return _run(check, "u", candidate, dtype, {"u": u, "bias": bias, "h0": h0}, shared)


def mingru_backward(saved: Any, dh: Any, dh_last: Any = None, *, need: Any = None) -> Gradients:
    """The gradients of a loss with respect to what `mingru_forward` or `mingru_recurrence` was given.

    Args:
        saved: the third result of the forward with `save`.
        dh: (L, B, D*d), gradient of h, in x's dtype (or float32 for 16-bit x); None is zeros.
        dh_last: (D, B, d), gradient of h_last; None is zeros.
        need: names of the inputs whose gradients are wanted, such as ("weight", "bias"); the rest is skipped. Default:
            all of x, weight (or u), bias, h0 that were given.

    Returns:
        An object with the attributes .x .weight .bias .h0 (after `mingru_recurrence` .u .bias .h0), shaped and typed
        like the inputs; .weight is a pair if weight was one, and an input that was None has the gradient None.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
    """
    return layer.backward("mingru_backward", saved, dh, dh_last, need)


@array_function
def mingru_step(
    x: Any,
    weight: Any,
    bias: Any = None,
    h: Any = None,
    *,
    candidate: str = "identity",
    out: Any = None,
) -> tuple[Any, Any]:
    """One token of a minGRU, for decoding: the same bits as that token in a sequence, given the same U.

    Args:
        x: (B, d_in).
        h: (D, B, d), the state before the token; zeros if None.
        out: a pair of arrays (B, D*d) and (D, B, d) to write h and the state to; the latter may be the given one.

    All else and errors as `mingru_forward`.

    Returns:
        h (B, D*d) in x's dtype and the new state (D, B, d).
    """
    check = Check("mingru_step", h0="h")
    dtype, projected, x = inputs.projected_token(check, x, weight)
    values = {"x": x, "weight": weight, "bias": bias, "h0": h}
    return inputs.one_token(
        check, out, lambda shared: _run(check, "weight", candidate, dtype, values, shared, projected)
    )


def mingru_init(
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
    """Initial parameters of a minGRU, as a dict: ``mingru_forward(x, **params)``.

    The weights are uniform with variance 1/d_in (each factor of a low-rank weight with 1 / its number of columns), the
    biases are 0 but that of z, which is -forget_bias.

    Args:
        d_in: size of x.
        d: hidden size per direction.
        directions: 1, or 2 with a reverse direction.
        low_rank: p, to get a pair (P, Q) of (D, 2, d, p) and (p, d_in) as weight.
        candidate: as in `mingru_forward`; part of the result where it is not its default.
        forget_bias: positive keeps the state longer: it is the bias of 1 - z, the weight of the state.
        dtype: dtype of all arrays.
        rng: a numpy.random.Generator, or a seed.
        like: an array whose library the results shall have; NumPy if None.

    Returns:
        weight, bias, and candidate where it is not the default.

    Raises:
        ArgumentError: a size is not a positive integer, or another argument is none of its choices.
    """
    check = Check("mingru_init")
    init = Init(check, d_in, d, directions, low_rank, dtype, rng)
    check.choice("candidate", candidate, tuple(CANDIDATES))
    forget_bias = check.number("forget_bias", forget_bias)
    params: dict[str, Any] = {"weight": init.weight(2), "bias": init.biases(-forget_bias, 0.0)}
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
    if check["k"] != 2:
        raise check.error(name, f"has k = {check['k']} gates; it needs 2: z, n (see mingru_init)", ShapeError)
    cell = mingru_cell(Options(candidate, values["bias"] is not None))
    return layer.forward(check, cell, dtype, values, (), shared, projected)
