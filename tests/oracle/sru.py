"""The Simple Recurrent Unit (SRU) of Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence" (EMNLP
2018), section 3:

    f[t] = s(uf[t] + v_f*c[t-1] + b_f)                (1)
    c[t] = f[t]*c[t-1] + (1 - f[t])*u0[t]             (2)
    r[t] = s(ur[t] + v_r*c[t-1] + b_r)                (3)   Algorithm 1 has c[t] instead: reset_on="current"
    h[t] = m*r[t]*g(c[t]) + (1 - m*r[t])*skip[t]      (4)   with the activation g and the dropout mask m

Gates in U in the order u0, uf, ur, u3. G, the number of sigmoid gates, is 2, forget and reset, or 1, forget alone.
v is (D, G, d) or (L, B, D, G, d).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .frame import Layout, Values, Walk, filled, layout_of, run, run_backward, sigmoid, summed
from .projection import project, project_backward
from .tools import float64

FORGET, RESET = 0, 1


@dataclass(frozen=True)
class Options(Layout):
    """The keyword arguments that all functions of this module share, with their defaults.

    alpha scales the skip of k = 3. activation is identity, tanh or relu. reset_on is previous or current.
    highway=False has no skip, reset_gate=False neither skip nor r. dropout_mask (B, D, d) is already scaled.
    """

    alpha: float = 1.0
    activation: str = "identity"
    highway: bool = True
    reset_gate: bool = True
    reset_on: str = "previous"
    dropout_mask: Any = None


def sru_forward(
    x: Any, weight: Any, bias: Any = None, v: Any = None, c0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, c_last)."""
    return sru_recurrence(project(x, weight), x, bias, v, c0, **options)


def sru_recurrence(
    u: Any, x: Any = None, bias: Any = None, v: Any = None, c0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """x (L, B, D*d) serves only the skip of k = 3 with highway. Returns (h, c_last)."""
    o = Options(**options)
    h, c_last, _ = run(_prepare(u, x, bias, v, c0, o), functools.partial(step, o))
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
    """Keys: x, weight, bias, v, c0, dropout_mask."""
    u = project(x, weight)
    grads: dict[str, Any] = sru_recurrence_backward(u, x, bias, v, c0, dh=dh, dc_last=dc_last, **options)
    dx, grads["weight"] = project_backward(x, weight, grads.pop("u"), **layout_of(options))
    grads["x"] = grads["x"] + dx
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
    """Keys: u, x (its part through the skip; 0 if there is none), bias, v, c0, dropout_mask."""
    o = Options(**options)
    walk = _prepare(u, x, bias, v, c0, o)
    g, dc0 = run_backward(walk, functools.partial(step, o), functools.partial(step_backward, o), dh, dc_last)
    dx = None if x is None else np.zeros(np.shape(x))
    if "skip" in g:
        dx = o.alpha * g["skip"].reshape(np.shape(x))
    return {
        "u": g["u"],
        "x": dx,
        "bias": summed(g["bias"], bias),
        "v": None if v is None else summed(g["v"], v),
        "c0": None if c0 is None else dc0,
        "dropout_mask": summed(g["m"], o.dropout_mask),
    }


def _prepare(u: Any, x: Any, bias: Any, v: Any, c0: Any, o: Options) -> Walk:
    u = float64(u)
    L, B, D, k, d = u.shape
    G = 2 if o.reset_gate else 1
    if k not in ((2,) if not o.reset_gate else (3, 4) if o.highway else (3,)):
        raise ValueError(f"u of shape {u.shape} does not fit highway={o.highway}, reset_gate={o.reset_gate}")
    if o.activation not in ("identity", "tanh", "relu") or o.reset_on not in ("previous", "current"):
        raise ValueError(f"unknown activation={o.activation!r} or reset_on={o.reset_on!r}")
    values = {
        "u": u,
        "bias": np.broadcast_to(filled(bias, 0.0, (D, G, d)), (L, B, D, G, d)),
        "m": np.broadcast_to(filled(o.dropout_mask, 1.0, (B, D, d)), (L, B, D, d)),
    }
    if v is not None:
        v = float64(v, (L, B, D, G, d) if np.ndim(v) == 5 else (D, G, d))
        values["v"] = np.broadcast_to(v, (L, B, D, G, d))
    if o.highway and o.reset_gate and k == 3:
        # With two directions, direction q takes x[..., q*d:(q+1)*d].
        values["skip"] = o.alpha * float64(x, (L, B, D * d)).reshape(L, B, D, d)
    return Walk.make(values, c0, o)


class _Gates(NamedTuple):
    """What equations (1) to (4) compute on their way, each (B, d)."""

    f: np.ndarray
    c: np.ndarray
    r: np.ndarray
    a: np.ndarray  # g(c)
    skip: np.ndarray | float


def _gates(o: Options, p: Values, c_in: np.ndarray) -> _Gates:
    f = _gate(p, FORGET, c_in)
    c = f * c_in + (1 - f) * p["u"][:, 0]
    r = _gate(p, RESET, c_in if o.reset_on == "previous" else c) if o.reset_gate else np.ones_like(c)
    return _Gates(f, c, r, _activate(o.activation, c), p["u"][:, 3] if p["u"].shape[1] == 4 else p.get("skip", 0.0))


def step(o: Options, p: Values, c_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equations (1) to (4) for all sequences and channels of one direction: c and h."""
    _, c, r, a, skip = _gates(o, p, c_in)
    mr = p["m"] * r
    # Without a skip, h = m*r*g(c).
    return c, mr * a + (1 - mr) * skip


def step_backward(
    o: Options, p: Values, c_in: np.ndarray, dh: np.ndarray, dc: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The chain rule through (4), (3), (2), (1), in this order; dc is what later steps send back to c[t]."""
    f, c, r, a, skip = _gates(o, p, c_in)
    m, u0 = p["m"], p["u"][:, 0]
    du, dv = np.zeros(p["u"].shape), np.zeros(p["bias"].shape)
    v_f = p["v"][:, FORGET] if "v" in p else 0.0
    # (4)  h = m*r*a + (1 - m*r)*skip with a = g(c), so the slopes of h are
    #      m*r in a, 1 - m*r in skip, r*(a - skip) in m, m*(a - skip) in r
    dskip, dm, dr = dh * (1 - m * r), dh * r * (a - skip), dh * m * (a - skip)
    dc = dc + dh * m * r * _activate_slope(o.activation, c)
    dc_in = np.zeros_like(c)
    if o.reset_gate:
        # (3)  r = s(ur + v_r*c_seen + b_r), and the slope of s is r*(1 - r)
        v_r = p["v"][:, RESET] if "v" in p else 0.0
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
    if du.shape[1] == 4:
        du[:, 3] = dskip
    # A gate's bias is added to the same sum as its u.
    found = {"u": du, "bias": du[:, 1 : 1 + dv.shape[1]], "m": dm, "v": dv, "skip": dskip}
    return {name: found[name] for name in p}, dc_in + dc * f + duf * v_f


def _gate(p: Values, gate: int, state: np.ndarray) -> np.ndarray:
    z = p["u"][:, 1 + gate] + p["bias"][:, gate]
    if "v" in p:
        z = z + p["v"][:, gate] * state
    return sigmoid(z)


def _activate(activation: str, c: np.ndarray) -> np.ndarray:
    if activation == "tanh":
        return np.tanh(c)
    return c if activation == "identity" else np.maximum(c, 0.0)


def _activate_slope(activation: str, c: np.ndarray) -> np.ndarray:
    if activation == "tanh":
        return 1 - np.tanh(c) ** 2
    # The slope of relu at 0 is taken as 0.
    return np.ones_like(c) if activation == "identity" else (c > 0).astype(np.float64)
