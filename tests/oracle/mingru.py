"""minGRU of "Were RNNs All We Needed?" (Feng et al., 2024), section 3.1, in linear space:

    z = s(uz + b_z)     n = g(un + b_n)     h[t] = (1 - z)*h[t-1] + z*n

Gates in U in the order z, n; g is the candidate of minrnn.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .frame import Values, layout_of, sigmoid
from .minrnn import Options, candidate, candidate_slope, recurrence, recurrence_backward
from .projection import project, project_backward

GATES = 2


def mingru_forward(
    x: Any, weight: Any, bias: Any = None, h0: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, h_last)."""
    return mingru_recurrence(project(x, weight), bias, h0, **options)


def mingru_recurrence(u: Any, bias: Any = None, h0: Any = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, h_last)."""
    return recurrence(step, GATES, u, bias, h0, options)


def mingru_backward(
    x: Any, weight: Any, bias: Any = None, h0: Any = None, *, dh: Any, dh_last: Any = None, **options: Any
) -> dict[str, Any]:
    """Keys: x, weight, bias, h0."""
    u = project(x, weight)
    grads: dict[str, Any] = mingru_recurrence_backward(u, bias, h0, dh=dh, dh_last=dh_last, **options)
    grads["x"], grads["weight"] = project_backward(x, weight, grads.pop("u"), **layout_of(options))
    return grads


def mingru_recurrence_backward(
    u: Any, bias: Any = None, h0: Any = None, *, dh: Any, dh_last: Any = None, **options: Any
) -> dict[str, Any]:
    """Keys: u, bias, h0."""
    return recurrence_backward(step, step_backward, GATES, (u, bias, h0), dh, dh_last, options)


def step(o: Options, p: Values, h_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of one direction, for all sequences and channels: the state h, and h."""
    a = p["u"] + p["bias"]
    z, n = sigmoid(a[:, 0]), candidate(o, a[:, 1])
    h = (1 - z) * h_in + z * n
    return h, h


def step_backward(
    o: Options, p: Values, h_in: np.ndarray, dh: np.ndarray, dstate: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The chain rule; dstate is what later steps send back to h[t]."""
    a = p["u"] + p["bias"]
    z, n = sigmoid(a[:, 0]), candidate(o, a[:, 1])
    # h is the output and the state.
    dh = dh + dstate
    duz = dh * (n - h_in) * z * (1 - z)
    dun = dh * z * candidate_slope(o, a[:, 1])
    du = np.stack([duz, dun], axis=1)
    return {"u": du, "bias": du}, dh * (1 - z)
