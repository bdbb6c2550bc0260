"""minLSTM of "Were RNNs All We Needed?" (Feng et al., 2024), section 3.2, in linear space:

    F = s(uf + b_f)     I = s(ui + b_i)     n = g(un + b_n)
    f = F/(F + I)       h[t] = f*h[t-1] + (1 - f)*n

Gates in U in the order f, i, n; g is the candidate of minrnn.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .frame import Values, layout_of, sigmoid
from .minrnn import Options, candidate, candidate_slope, recurrence, recurrence_backward
from .projection import project, project_backward

GATES = 3


def minlstm_forward(
    x: Any, weight: Any, bias: Any = None, h0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, h_last)."""
    return minlstm_recurrence(project(x, weight), bias, h0, **options)


def minlstm_recurrence(u: Any, bias: Any = None, h0: Any = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, h_last)."""
    return recurrence(step, GATES, u, bias, h0, options)


def minlstm_backward(
    x: Any, weight: Any, bias: Any = None, h0: Any = None, *, dh: Any, dh_last: Any = None, **options: Any
) -> dict[str, Any]:
    """Keys: x, weight, bias, h0."""
    u = project(x, weight)
    grads: dict[str, Any] = minlstm_recurrence_backward(u, bias, h0, dh=dh, dh_last=dh_last, **options)
    grads["x"], grads["weight"] = project_backward(x, weight, grads.pop("u"), **layout_of(options))
    return grads


def minlstm_recurrence_backward(
    u: Any, bias: Any = None, h0: Any = None, *, dh: Any, dh_last: Any = None, **options: Any
) -> dict[str, Any]:
    """Keys: u, bias, h0."""
    return recurrence_backward(step, step_backward, GATES, (u, bias, h0), dh, dh_last, options)


class _Gates(NamedTuple):
    keep: np.ndarray  # f
    take: np.ndarray  # 1 - f, with all its digits
    n: np.ndarray


def _gates(o: Options, a: np.ndarray) -> _Gates:
    # With F = 1/(1 + e^-af) and I = 1/(1 + e^-ai), f is (1 + e^-ai) / (1 + e^-ai + 1 + e^-af). Both F and I are 0 in
    # float64 where a is -1000; so numerator and denominator are multiplied by e^-m, m the largest exponent.
    af, ai, an = a[:, 0], a[:, 1], a[:, 2]
    m = np.maximum(np.maximum(-af, -ai), 0.0)
    by_i, by_f = np.exp(-m) + np.exp(-ai - m), np.exp(-m) + np.exp(-af - m)
    return _Gates(by_i / (by_i + by_f), by_f / (by_i + by_f), candidate(o, an))


def step(o: Options, p: Values, h_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of one direction, for all sequences and channels: the state h, and h."""
    keep, take, n = _gates(o, p["u"] + p["bias"])
    h = keep * h_in + take * n
    return h, h


def step_backward(
    o: Options, p: Values, h_in: np.ndarray, dh: np.ndarray, dstate: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The chain rule; dstate is what later steps send back to h[t]."""
    a = p["u"] + p["bias"]
    keep, take, n = _gates(o, a)
    dh = dh + dstate
    # f = F/(F + I): the slope in F is I/(F + I)^2, and that of F is F*(1 - F), which gives f*(1 - f)*(1 - F);
    # the slope in I is -F/(F + I)^2, and that of I is I*(1 - I), which gives -f*(1 - f)*(1 - I).
    df = dh * (h_in - n) * keep * take
    duf = df * sigmoid(-a[:, 0])
    dui = -df * sigmoid(-a[:, 1])
    dun = dh * take * candidate_slope(o, a[:, 2])
    du = np.stack([duf, dui, dun], axis=1)
    return {"u": du, "bias": du}, dh * keep
