"""What minGRU and minLSTM of "Were RNNs All We Needed?" (Feng et al., 2024) have in common: the candidate

    candidate="identity"   g(n) = n
    candidate="positive"   g(n) = n + 0.5 where n >= 0, s(n) where n < 0     (their appendix on log space)

and that the state is h itself. Both have one bias for each gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .frame import Layout, Walk, filled, run, run_backward, sigmoid, summed
from .tools import float64


@dataclass(frozen=True)
class Options(Layout):
    candidate: str = "identity"


def recurrence(
    step: Callable[..., Any], gates: int, u: Any, bias: Any, h0: Any, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, h_last)."""
    o = Options(**options)
    h, h_last, _ = run(_prepare(u, gates, bias, h0, o), functools.partial(step, o))
    return h, h_last


def recurrence_backward(
    step: Callable[..., Any],
    step_backward: Callable[..., Any],
    gates: int,
    given: tuple[Any, Any, Any],
    dh: Any,
    dh_last: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`given` is u, bias, h0. Keys: u, bias, h0."""
    u, bias, h0 = given
    o = Options(**options)
    walk = _prepare(u, gates, bias, h0, o)
    g, dh0 = run_backward(walk, functools.partial(step, o), functools.partial(step_backward, o), dh, dh_last)
    return {"u": g["u"], "bias": summed(g["bias"], bias), "h0": None if h0 is None else dh0}


def _prepare(u: Any, gates: int, bias: Any, h0: Any, o: Options) -> Walk:
    u = float64(u)
    D, k, d = u.shape[2:]
    if k != gates:
        raise ValueError(f"got u of shape {u.shape}, need {gates} gates")
    if o.candidate not in ("identity", "positive"):
        raise ValueError(f"unknown candidate={o.candidate!r}")
    bias = filled(bias, 0.0, (D, k, d))
    return Walk.make({"u": u, "bias": np.broadcast_to(bias, u.shape)}, h0, o)


def candidate(o: Options, n: np.ndarray) -> np.ndarray:
    """g(n)."""
    return n if o.candidate == "identity" else np.where(n >= 0, n + 0.5, sigmoid(n))


def candidate_slope(o: Options, n: np.ndarray) -> np.ndarray:
    # The slope at the kink is that of its right side, as g says >=.
    return np.ones_like(n) if o.candidate == "identity" else np.where(n >= 0, 1.0, sigmoid(n) * (1 - sigmoid(n)))
