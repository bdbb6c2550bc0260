"""Float64 oracle of the Simple Recurrent Unit (SRU): a plain NumPy loop over time, forward and backward.

It is the judge of every other implementation, so it shares no code with the library. The equations are those
of Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence" (EMNLP 2018), section 3:

    f[t] = s(uf[t] + v_f*c[t-1] + b_f)                (1)
    c[t] = f[t]*c[t-1] + (1 - f[t])*u0[t]             (2)
    r[t] = s(ur[t] + v_r*c[t-1] + b_r)                (3)   Algorithm 1 has c[t] instead: reset_on="current"
    h[t] = m*r[t]*g(c[t]) + (1 - m*r[t])*skip[t]      (4)   with the activation g and the dropout mask m

Letters: L time steps, B sequences, D directions (direction 1 runs from the last step to the first), d hidden
size per direction, k gates in U in the order u0, uf, ur, u3. G is the number of sigmoid gates: 2, forget and
reset, or 1, forget alone. Shapes: x (L, B, d_in), weight (D, k, d, d_in), u (L, B, D, k, d), bias (D, G, d),
v (D, G, d) or (L, B, D, G, d), c0 and c_last (D, B, d), h (L, B, D*d). Any dtype goes in, 16-bit ones too;
float64 comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

FORGET, RESET = 0, 1


@dataclass(frozen=True)
class Options:
    """The keyword arguments that all functions of this module share, with their defaults.

    alpha scales the skip of k = 3. activation is identity, tanh or relu. reset_on is previous or current.
    highway=False has no skip, reset_gate=False neither skip nor r. lengths is (B,), mask (L, B) is True at
    padding, reset (L, B) is True where a new segment begins, dropout_mask (B, D, d) is already scaled.
    """

    alpha: float = 1.0
    activation: str = "identity"
    highway: bool = True
    reset_gate: bool = True
    reset_on: str = "previous"
    lengths: Any = None
    mask: Any = None
    reset: Any = None
    dropout_mask: Any = None


class _Problem(NamedTuple):
    """One recurrence with every input in float64 and in its full shape."""

    options: Options
    u: np.ndarray  # (L, B, D, k, d)
    skip: np.ndarray | None  # (L, B, D, d), alpha included
    bias: np.ndarray  # (D, G, d)
    v: np.ndarray | None  # (L, B, D, G, d)
    c0: np.ndarray  # (D, B, d)
    m: np.ndarray  # (B, D, d)
    live: np.ndarray  # (L, B), False at padding
    fresh: np.ndarray  # (D, L, B), True where the direction starts the step from state 0


class _Step(NamedTuple):
    """The values of one time step of one direction, each (B, d)."""

    f: np.ndarray
    c: np.ndarray
    r: np.ndarray
    h: np.ndarray


def sru_forward(
    x: Any, weight: Any, bias: Any = None, v: Any = None, c0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """SRU layer; weight is (D, k, d, d_in) or a pair P (D, k, d, p), Q (p, d_in). Returns (h, c_last)."""
    return sru_recurrence(project(x, weight), x, bias, v, c0, **options)


def sru_recurrence(
    u: Any, x: Any = None, bias: Any = None, v: Any = None, c0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """SRU from U; x (L, B, D*d) serves only the skip of k = 3 with highway. Returns (h, c_last)."""
    p = _prepare(u, x, bias, v, c0, Options(**options))
    h, c_last, _ = _run(p)
    return h, c_last


def sru_backward(
    x: Any,
    weight: Any,
    bias: Any = None,
    v: Any = None,
    c0: Any = None,
    *,
    dh: Any,
    dc_last: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Gradients of sum(h*dh) + sum(c_last*dc_last), in float64, by name; the one of a weight pair is a pair.

    Keys: x, weight, bias, v, c0, dropout_mask; None where the input is None.
    """
    u = project(x, weight)
    grads: dict[str, Any] = sru_recurrence_backward(u, x, bias, v, c0, dh=dh, dc_last=dc_last, **options)
    du = grads.pop("u")
    L, B = du.shape[:2]
    # du is 0 at padding, but 0 * NaN is not, and x may hold NaN there.
    x = np.where(live_steps(L, B, options.get("lengths"), options.get("mask"))[:, :, None], float64(x), 0.0)
    # u[l,b,q,k,j] = sum_i weight[q,k,j,i] * x[l,b,i], so each gradient is du against the other factor.
    w = full_weight(weight)
    grads["x"] = np.tensordot(du, w, axes=([2, 3, 4], [0, 1, 2])) + grads["x"]
    dw = np.tensordot(du, x, axes=([0, 1], [0, 1]))
    if isinstance(weight, tuple | list):
        P, Q = (float64(factor) for factor in weight)
        # weight[q,k,j,i] = sum_p P[q,k,j,p] * Q[p,i]
        grads["weight"] = (dw @ Q.T, np.tensordot(P, dw, axes=([0, 1, 2], [0, 1, 2])))
    else:
        grads["weight"] = dw
    return grads


def sru_recurrence_backward(
    u: Any,
    x: Any = None,
    bias: Any = None,
    v: Any = None,
    c0: Any = None,
    *,
    dh: Any,
    dc_last: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Gradients of sum(h*dh) + sum(c_last*dc_last), in float64, by name.

    Keys: u, x (its part through the skip; 0 if there is none), bias, v, c0, dropout_mask; None where the
    input is None.
    """
    p = _prepare(u, x, bias, v, c0, Options(**options))
    L, B, D, k, d = p.u.shape
    G = p.bias.shape[1]
    c_in = _run(p)[2]
    dh = float64(dh, (L, B, D * d)).reshape(L, B, D, d)
    dc_last = _filled(dc_last, 0.0, (D, B, d))
    du, dv, dskip = np.zeros((L, B, D, k, d)), np.zeros((L, B, D, G, d)), np.zeros((L, B, D, d))
    dc0, dm = np.zeros((D, B, d)), np.zeros((B, D, d))
    for q in range(D):
        dc = dc_last[q]
        for t in reversed(_order(q, L)):
            live, fresh = p.live[t][:, None], p.fresh[q, t][:, None]
            g = _step_backward(p, q, t, c_in[t, :, q], dh[t, :, q], dc)
            # At padding the step hands the state on untouched: dc passes, and nothing else has a gradient.
            du[t, :, q] = np.where(live[:, None], g.u, 0.0)
            dv[t, :, q] = np.where(live[:, None], g.v, 0.0)
            dskip[t, :, q] = np.where(live, g.skip, 0.0)
            dm[:, q] += np.where(live, g.m, 0.0)
            dc = np.where(live, g.c_in, dc)
            # A step that starts from state 0 does not see the state before it.
            dc = np.where(fresh, 0.0, dc)
        dc0[q] = dc
    if p.skip is not None and k == 4:
        du[:, :, :, 3] = dskip
    dx = None if x is None else np.zeros(np.shape(x))
    if p.skip is not None and k == 3:
        dx = (p.options.alpha * dskip).reshape(L, B, D * d)
    return {
        "u": du,
        "x": dx,
        # A gate's bias is added to the same sum as its u, at every step of every sequence.
        "bias": None if bias is None else du[:, :, :, 1 : 1 + G].sum(axis=(0, 1)),
        "v": None if v is None else dv if np.ndim(v) == 5 else dv.sum(axis=(0, 1)),
        "c0": None if c0 is None else dc0,
        "dropout_mask": None if p.options.dropout_mask is None else dm,
    }


def full_weight(weight: Any) -> np.ndarray:
    """weight in float64 as (D, k, d, d_in); a pair (P, Q) is multiplied out."""
    if isinstance(weight, tuple | list):
        P, Q = weight
        return float64(P) @ float64(Q)
    return float64(weight)


def project(x: Any, weight: Any) -> np.ndarray:
    """U = W x for all time steps and directions: (L, B, D, k, d)."""
    return np.tensordot(float64(x), full_weight(weight), axes=([2], [3]))


def live_steps(L: int, B: int, lengths: Any = None, mask: Any = None) -> np.ndarray:
    """(L, B) bool: True at the steps that are computed, False at padding by either lengths or mask."""
    live = _existing_steps(L, B, lengths)
    return live if mask is None else live & ~_flags(mask, (L, B))


def finite_differences(f: Callable[..., float], arrays: dict[str, Any], eps: float = 1e-5) -> dict[str, np.ndarray]:
    """Central differences of the scalar f(**arrays) in every element of every array, in float64, by name."""
    point = {name: float64(array).copy() for name, array in arrays.items()}
    grads = {name: np.zeros(array.shape) for name, array in point.items()}
    for name, array in point.items():
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + eps
            above = f(**point)
            array[index] = value - eps
            below = f(**point)
            array[index] = value
            grads[name][index] = (above - below) / (2 * eps)
    return grads


def relative_error(got: Any, want: Any) -> float:
    """max|got - want| / max|want|, or max|got - want| where want is 0 throughout.

    NaN in either gives NaN, which passes no bound.
    """
    want = float64(want)
    difference = np.abs(float64(got, want.shape) - want)
    if want.size == 0:
        return 0.0
    return float(difference.max() / (np.abs(want).max() or 1.0))


def random_inputs(
    rng: np.random.Generator,
    L: int,
    B: int,
    d: int,
    *,
    D: int = 1,
    k: int = 3,
    d_in: int | None = None,
    low_rank: int | None = None,
    v: str = "constant",
) -> dict[str, Any]:
    """Float64 inputs x, weight, bias, v, c0 for sru_forward(**inputs), such that U has about unit variance.

    v is none, constant or per_step; d_in defaults to D*d; low_rank=p gives a weight pair; k = 2 is what
    reset_gate=False takes.
    """
    d_in = D * d if d_in is None else d_in
    G = 1 if k == 2 else 2
    shape = {"none": None, "constant": (D, G, d), "per_step": (L, B, D, G, d)}[v]

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape) * np.sqrt(3 / shape[-1])

    p = low_rank
    return {
        "x": rng.standard_normal((L, B, d_in)),
        "weight": uniform(D, k, d, d_in) if p is None else (uniform(D, k, d, p), uniform(p, d_in)),
        "bias": 0.5 * rng.standard_normal((D, G, d)),
        "v": None if shape is None else rng.standard_normal(shape),
        "c0": rng.standard_normal((D, B, d)),
    }


def random_layout(
    rng: np.random.Generator,
    L: int,
    B: int,
    *,
    lengths: bool = False,
    mask: bool = False,
    reset: bool = False,
) -> dict[str, np.ndarray]:
    """Those of the options lengths, mask and reset that are asked for: random, with corner cases put in.

    Sequence 0 has full length and boundaries at t = 0 and at a masked step; of several sequences the last has
    length 0.
    """
    layout: dict[str, np.ndarray] = {}
    if lengths:
        layout["lengths"] = rng.integers(0, L + 1, B)
        layout["lengths"][-1:] = 0
        layout["lengths"][:1] = L
    if mask:
        layout["mask"] = rng.random((L, B)) < 0.3
        layout["mask"][L // 2 : L // 2 + 1, :1] = True
    if reset:
        layout["reset"] = rng.random((L, B)) < 0.3
        layout["reset"][[t for t in (0, L // 2) if t < L], :1] = True
    return layout


def float64(array: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """array in float64; a shape other than the given one is refused, so that nothing broadcasts unseen."""
    array = np.asarray(array).astype(np.float64)
    if shape is not None and array.shape != shape:
        raise ValueError(f"got shape {array.shape}, need {shape}")
    return array


def _prepare(u: Any, x: Any, bias: Any, v: Any, c0: Any, options: Options) -> _Problem:
    o, u = options, float64(u)
    L, B, D, k, d = u.shape
    G = 2 if o.reset_gate else 1
    if k not in ((2,) if not o.reset_gate else (3, 4) if o.highway else (3,)) or D not in (1, 2):
        raise ValueError(f"u of shape {u.shape} does not fit highway={o.highway}, reset_gate={o.reset_gate}")
    if o.activation not in ("identity", "tanh", "relu") or o.reset_on not in ("previous", "current"):
        raise ValueError(f"unknown activation={o.activation!r} or reset_on={o.reset_on!r}")
    skip = None
    if o.highway and o.reset_gate:
        # With two directions, direction q takes x[..., q*d:(q+1)*d].
        skip = u[:, :, :, 3] if k == 4 else o.alpha * float64(x, (L, B, D * d)).reshape(L, B, D, d)
    if v is not None:
        v = float64(v, (L, B, D, G, d) if np.ndim(v) == 5 else (D, G, d))
        v = np.broadcast_to(v, (L, B, D, G, d))
    # reset at t is a boundary between t-1 and t: the forward direction crosses it to enter step t, the
    # reverse direction to enter step t-1. There is no boundary beyond a sequence's length.
    boundary = np.zeros((L + 1, B), bool)
    if o.reset is not None:
        boundary[:L] = _flags(o.reset, (L, B)) & _existing_steps(L, B, o.lengths)
    return _Problem(
        options=o,
        u=u,
        skip=skip,
        bias=_filled(bias, 0.0, (D, G, d)),
        v=v,
        c0=_filled(c0, 0.0, (D, B, d)),
        m=_filled(o.dropout_mask, 1.0, (B, D, d)),
        live=live_steps(L, B, o.lengths, o.mask),
        fresh=np.stack([boundary[:-1], boundary[1:]][:D]),
    )


def _run(p: _Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The recurrence. Returns h, c_last, and the state (L, B, D, d) from which each step starts."""
    L, B, D, _, d = p.u.shape
    h, c_in, c_last = np.zeros((L, B, D, d)), np.zeros((L, B, D, d)), np.zeros((D, B, d))
    for q in range(D):
        c = p.c0[q]
        for t in _order(q, L):
            live, fresh = p.live[t][:, None], p.fresh[q, t][:, None]
            c = np.where(fresh, 0.0, c)
            c_in[t, :, q] = c
            step = _step(p, q, t, c)
            h[t, :, q] = np.where(live, step.h, 0.0)
            c = np.where(live, step.c, c)
        c_last[q] = c
    return h.reshape(L, B, D * d), c_last, c_in


def _step(p: _Problem, q: int, t: int, c_in: np.ndarray) -> _Step:
    """Equations (1) to (4) for all sequences and channels of direction q at step t."""
    o, u0, m = p.options, p.u[t, :, q, 0], p.m[:, q]
    f = _gate(p, q, t, FORGET, c_in)
    c = f * c_in + (1 - f) * u0
    r = _gate(p, q, t, RESET, c_in if o.reset_on == "previous" else c) if o.reset_gate else np.ones_like(c)
    h = m * r * _activate(o.activation, c)
    if p.skip is not None:
        h = h + (1 - m * r) * p.skip[t, :, q]
    return _Step(f, c, r, h)


class _StepGradient(NamedTuple):
    u: np.ndarray  # (B, k, d), without the projected skip
    v: np.ndarray  # (B, G, d)
    skip: np.ndarray  # (B, d)
    m: np.ndarray  # (B, d)
    c_in: np.ndarray  # (B, d)


def _step_backward(p: _Problem, q: int, t: int, c_in: np.ndarray, dh: np.ndarray, dc: np.ndarray) -> _StepGradient:
    """The chain rule through (4), (3), (2), (1), in this order; dc is what later steps send back to c[t]."""
    o, u0, m = p.options, p.u[t, :, q, 0], p.m[:, q]
    f, c, r, _ = _step(p, q, t, c_in)
    a = _activate(o.activation, c)
    skip = 0.0 if p.skip is None else p.skip[t, :, q]
    du, dv = np.zeros(p.u.shape[1:2] + p.u.shape[3:]), np.zeros((c.shape[0], p.bias.shape[1], c.shape[1]))
    v_f = 0.0 if p.v is None else p.v[t, :, q, FORGET]
    # (4)  h = m*r*a + (1 - m*r)*skip with a = g(c), so the slopes of h are
    #      m*r in a, 1 - m*r in skip, r*(a - skip) in m, m*(a - skip) in r
    dskip, dm, dr = dh * (1 - m * r), dh * r * (a - skip), dh * m * (a - skip)
    dc = dc + dh * m * r * _activate_slope(o.activation, c)
    dc_in = np.zeros_like(c)
    if o.reset_gate:
        # (3)  r = s(ur + v_r*c_seen + b_r), and the slope of s is r*(1 - r)
        v_r = 0.0 if p.v is None else p.v[t, :, q, RESET]
        c_seen = c_in if o.reset_on == "previous" else c
        dur = dr * r * (1 - r)
        du[:, 1 + RESET], dv[:, RESET] = dur, dur * c_seen
        if o.reset_on == "previous":
            dc_in = dur * v_r
        else:
            dc = dc + dur * v_r
    # (2)  c = f*c_in + (1 - f)*u0: dc is complete by now, as nothing else reads c[t]
    du[:, 0] = dc * (1 - f)
    df = dc * (c_in - u0)
    # (1)  f = s(uf + v_f*c_in + b_f)
    duf = df * f * (1 - f)
    du[:, 1 + FORGET], dv[:, FORGET] = duf, duf * c_in
    return _StepGradient(du, dv, dskip, dm, dc_in + dc * f + duf * v_f)


def _gate(p: _Problem, q: int, t: int, gate: int, state: np.ndarray) -> np.ndarray:
    z = p.u[t, :, q, 1 + gate] + p.bias[q, gate]
    if p.v is not None:
        z = z + p.v[t, :, q, gate] * state
    return _sigmoid(z)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    # exp of a negative number only: it cannot overflow.
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


def _activate(activation: str, c: np.ndarray) -> np.ndarray:
    if activation == "tanh":
        return np.tanh(c)
    return c if activation == "identity" else np.maximum(c, 0.0)


def _activate_slope(activation: str, c: np.ndarray) -> np.ndarray:
    if activation == "tanh":
        return 1 - np.tanh(c) ** 2
    # The slope of relu at 0 is taken as 0.
    return np.ones_like(c) if activation == "identity" else (c > 0).astype(np.float64)


def _order(q: int, L: int) -> range:
    return range(L) if q == 0 else range(L - 1, -1, -1)


def _existing_steps(L: int, B: int, lengths: Any) -> np.ndarray:
    """(L, B) bool: t < lengths[b]."""
    if lengths is None:
        return np.ones((L, B), bool)
    lengths = np.asarray(lengths).astype(np.int64)
    if lengths.shape != (B,) or (lengths < 0).any() or (lengths > L).any():
        raise ValueError(f"got lengths {lengths.tolist()}, need {B} values from 0 to {L}")
    return np.arange(L)[:, None] < lengths[None, :]


def _flags(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array).astype(bool)
    if array.shape != shape:
        raise ValueError(f"got shape {array.shape}, need {shape}")
    return array


def _filled(array: Any, default: float, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, default) if array is None else float64(array, shape)
