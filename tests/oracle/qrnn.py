"""Pooling of the Quasi-Recurrent Neural Network (QRNN) of Bradbury et al., "Quasi-Recurrent Neural Networks" (2017):

    z = tanh(uz + b_z)     f = s(uf + b_f)     o = s(uo + b_o)     i = s(ui + b_i)
    c[t] = f*c[t-1] + (1 - f)*z     h[t] = c[t]                pooling="f"      (their h[t] is our state)
    c[t] = f*c[t-1] + (1 - f)*z     h[t] = o*c[t]              pooling="fo"
    c[t] = f*c[t-1] + i*z           h[t] = o*c[t]              pooling="ifo"
    h[t] = o*c[t] + (1 - o)*skip[t]                            highway=True; skip is x, or the last gate w of U

Gates in U in the order z, f (, o (, i)) (, w); bias (D, G, d) has one row for each of them but w. Zoneout puts
1 - m*(1 - f) in the place of f, with a mask m (L, B, D, d) of 0 and 1: at 0 the channel keeps its state. With pooling
"ifo" i*z is still added then. U is a convolution of x over the last `window` tokens: see projection.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .frame import Layout, Values, Walk, filled, layout_of, run, run_backward, sigmoid, summed
from .projection import project, project_backward
from .tools import float64

Z, F, O, I = range(4)  # noqa: E741
BIASES = {"f": 2, "fo": 3, "ifo": 4}  # G


@dataclass(frozen=True)
class Options(Layout):
    """The keyword arguments that all functions of this module share, with their defaults."""

    pooling: str = "fo"
    highway: bool = False
    zoneout_mask: Any = None


def qrnn_forward(
    x: Any, weight: Any, bias: Any = None, c0: Any = None, *, window: int = 1, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, c_last)."""
    u = project(x, weight, window, **layout_of(options))
    return qrnn_recurrence(u, x if _skips_x(u, Options(**options)) else None, bias, c0, **options)


def qrnn_recurrence(
    u: Any, x: Any = None, bias: Any = None, c0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """x (L, B, D*d) serves only the skip of highway=True where U has no gate for it. Returns (h, c_last)."""
    o = Options(**options)
    h, c_last, _ = run(_prepare(u, x, bias, c0, o), functools.partial(step, o))
    return h, c_last


def qrnn_backward(
    x: Any,
    weight: Any,
    bias: Any = None,
    c0: Any = None,
    *,
    dh: Any,
    dc_last: Any = None,
    window: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Keys: x, weight, bias, c0."""
    u = project(x, weight, window, **layout_of(options))
    skip = x if _skips_x(u, Options(**options)) else None
    grads: dict[str, Any] = qrnn_recurrence_backward(u, skip, bias, c0, dh=dh, dc_last=dc_last, **options)
    dx, grads["weight"] = project_backward(x, weight, grads.pop("u"), window, **layout_of(options))
    grads["x"] = dx if skip is None else grads["x"] + dx
    return grads


def qrnn_recurrence_backward(
    u: Any, x: Any = None, bias: Any = None, c0: Any = None, *, dh: Any, dc_last: Any = None, **options: Any
) -> dict[str, Any]:
    """Keys: u, x, bias, c0."""
    o = Options(**options)
    walk = _prepare(u, x, bias, c0, o)
    g, dc0 = run_backward(walk, functools.partial(step, o), functools.partial(step_backward, o), dh, dc_last)
    return {
        "u": g["u"],
        "x": None if x is None else g["skip"].reshape(np.shape(x)),
        "bias": summed(g["bias"], bias),
        "c0": None if c0 is None else dc0,
    }


def _skips_x(u: np.ndarray, o: Options) -> bool:
    return o.highway and u.shape[3] == BIASES[o.pooling]


def _prepare(u: Any, x: Any, bias: Any, c0: Any, o: Options) -> Walk:
    u = float64(u)
    L, B, D, k, d = u.shape
    if o.pooling not in BIASES or (o.pooling == "f" and o.highway):
        raise ValueError(f"no pooling={o.pooling!r} with highway={o.highway}")
    G = BIASES[o.pooling]
    if k not in ((G, G + 1) if o.highway else (G,)):
        raise ValueError(f"u of shape {u.shape} does not fit pooling={o.pooling!r}, highway={o.highway}")
    if (x is not None) != _skips_x(u, o):
        raise ValueError("x is needed where it is the skip, and nowhere else")
    values = {
        "u": u,
        "bias": np.broadcast_to(filled(bias, 0.0, (D, G, d)), (L, B, D, G, d)),
        "zoneout": filled(o.zoneout_mask, 1.0, (L, B, D, d)),
    }
    if x is not None:
        # With two directions, direction q takes x[..., q*d:(q+1)*d].
        values["skip"] = float64(x, (L, B, D * d)).reshape(L, B, D, d)
    return Walk.make(values, c0, o)


class _Gates(NamedTuple):
    """What the equations compute on their way, each (B, d)."""

    z: np.ndarray
    gate: np.ndarray  # f of the formula, before zoneout
    f: np.ndarray  # what the state is multiplied by
    i: np.ndarray  # what z is multiplied by
    o: np.ndarray
    c: np.ndarray
    skip: np.ndarray | float


def _gates(options: Options, p: Values, c_in: np.ndarray) -> _Gates:
    G = p["bias"].shape[1]
    a = p["u"][:, :G] + p["bias"]
    z, gate = np.tanh(a[:, Z]), sigmoid(a[:, F])
    f = 1 - p["zoneout"] * (1 - gate)
    i = sigmoid(a[:, I]) if options.pooling == "ifo" else 1 - f
    o = np.ones_like(z) if options.pooling == "f" else sigmoid(a[:, O])
    skip = p["u"][:, G] if p["u"].shape[1] > G else p.get("skip", 0.0)
    return _Gates(z, gate, f, i, o, f * c_in + i * z, skip)


def step(options: Options, p: Values, c_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of one direction, for all sequences and channels: c and h."""
    _, _, _, _, o, c, skip = _gates(options, p, c_in)
    return c, o * c + (1 - o) * skip


def step_backward(
    options: Options, p: Values, c_in: np.ndarray, dh: np.ndarray, dc: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The chain rule; dc is what later steps send back to c[t]."""
    z, gate, f, i, o, c, skip = _gates(options, p, c_in)
    du = np.zeros(p["u"].shape)
    # h = o*c + (1 - o)*skip
    do, dskip = dh * (c - skip), dh * (1 - o)
    dc = dc + dh * o
    # c = f*c_in + i*z
    df, dz = dc * c_in, dc * i
    if options.pooling == "ifo":
        du[:, I] = dc * z * i * (1 - i)
    else:
        # i = 1 - f
        df = df - dc * z
    if options.pooling != "f":
        du[:, O] = do * o * (1 - o)
    # f = 1 - m*(1 - gate), and the slopes of s and tanh are s*(1 - s) and 1 - tanh^2
    du[:, F] = df * p["zoneout"] * gate * (1 - gate)
    du[:, Z] = dz * (1 - z * z)
    G = p["bias"].shape[1]
    if du.shape[1] > G:
        du[:, G] = dskip
    found = {"u": du, "bias": du[:, :G]} | ({"skip": dskip} if "skip" in p else {})
    return found, dc * f
