"""The walk over time that all cells share: directions, padding, boundaries, the state from step to step, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .tools import float64

# A step sees the values of one direction by name, (B, ..., d) each, and the state (B, d); it gives the new state and h.
# Backward it also sees the gradients of h and of the new state, and gives those of the values, and of the old state.
Values = Mapping[str, np.ndarray]
Step = Callable[[Values, np.ndarray], tuple[np.ndarray, np.ndarray]]
StepBackward = Callable[[Values, np.ndarray, np.ndarray, np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Layout:
    """The options that all cells share.

    lengths is (B,); mask (L, B) is True at padding; reset (L, B) is True where a new segment begins.
    """

    lengths: Any = None
    mask: Any = None
    reset: Any = None


class Walk(NamedTuple):
    """A recurrence with everything in float64, and with all that a step sees in the shape of all steps."""

    values: dict[str, np.ndarray]  # (L, B, D, ..., d), u among them
    start: np.ndarray  # (D, B, d), the state before the first step
    live: np.ndarray  # (L, B), False at padding
    fresh: np.ndarray  # (D, L, B), True where the direction starts the step from state 0

    @classmethod
    def make(cls, values: dict[str, np.ndarray], start: Any, layout: Layout) -> Walk:
        L, B, D, _, d = values["u"].shape
        if D not in (1, 2):
            raise ValueError(f"got {D} directions, need 1 or 2")
        # reset at t is a boundary between t-1 and t: the forward direction crosses it to enter step t, the reverse
        # direction to enter step t-1.
        boundary = np.zeros((L + 1, B), bool)
        boundary[:L] = boundaries(L, B, layout)
        return cls(
            values,
            filled(start, 0.0, (D, B, d)),
            live_steps(L, B, layout.lengths, layout.mask),
            np.stack([boundary[:-1], boundary[1:]][:D]),
        )

    def at(self, t: int, q: int) -> Values:
        return {name: array[t, :, q] for name, array in self.values.items()}


def run(walk: Walk, step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h (L, B, D*d), the state after the last step (D, B, d), and the state from which each step starts."""
    L, B, D, _, d = walk.values["u"].shape
    h, seen, last = np.zeros((L, B, D, d)), np.zeros((L, B, D, d)), np.zeros((D, B, d))
    for q in range(D):
        state = walk.start[q]
        for t in order(q, L):
            live, fresh = walk.live[t][:, None], walk.fresh[q, t][:, None]
            state = np.where(fresh, 0.0, state)
            seen[t, :, q] = state
            new, output = step(walk.at(t, q), state)
            h[t, :, q] = np.where(live, output, 0.0)
            state = np.where(live, new, state)
        last[q] = state
    return h.reshape(L, B, D * d), last, seen


def run_backward(
    walk: Walk, step: Step, step_backward: StepBackward, dh: Any, dlast: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradients of the values, by name and in their shapes, and of the state before the first step."""
    L, B, D, _, d = walk.values["u"].shape
    seen = run(walk, step)[2]
    dh = float64(dh, (L, B, D * d)).reshape(L, B, D, d)
    dlast = filled(dlast, 0.0, (D, B, d))
    gradients = {name: np.zeros(array.shape) for name, array in walk.values.items()}
    dstart = np.zeros((D, B, d))
    for q in range(D):
        dstate = dlast[q]
        for t in reversed(order(q, L)):
            live, fresh = walk.live[t][:, None], walk.fresh[q, t][:, None]
            found, before = step_backward(walk.at(t, q), seen[t, :, q], dh[t, :, q], dstate)
            # At padding the step hands the state on untouched: its gradient passes, and nothing else has one.
            for name, gradient in found.items():
                gradients[name][t, :, q] = np.where(live if gradient.ndim == 2 else live[:, None], gradient, 0.0)
            dstate = np.where(live, before, dstate)
            # A step that starts from state 0 does not see the state before it.
            dstate = np.where(fresh, 0.0, dstate)
        dstart[q] = dstate
    return gradients, dstart


def layout_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a cell's options that Layout holds."""
    return {name: options.get(name) for name in ("lengths", "mask", "reset")}


def order(q: int, L: int) -> range:
    return range(L) if q == 0 else range(L - 1, -1, -1)


def live_steps(L: int, B: int, lengths: Any = None, mask: Any = None) -> np.ndarray:
    """(L, B) bool: True at the steps that are computed, False at padding by either lengths or mask."""
    live = _existing_steps(L, B, lengths)
    return live if mask is None else live & ~_flags(mask, (L, B))


def boundaries(L: int, B: int, layout: Layout) -> np.ndarray:
    """(L, B) bool: True where a new segment begins; there is no boundary beyond a sequence's length."""
    if layout.reset is None:
        return np.zeros((L, B), bool)
    return _flags(layout.reset, (L, B)) & _existing_steps(L, B, layout.lengths)


def filled(array: Any, default: float, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, default) if array is None else float64(array, shape)


def summed(gradient: np.ndarray, array: Any) -> np.ndarray | None:
    """Of an array that all steps share, or all steps and sequences: the sum over the axes that it lacks."""
    return None if array is None else gradient.sum(axis=tuple(range(gradient.ndim - np.ndim(array))))


def sigmoid(z: np.ndarray) -> np.ndarray:
    # exp of a negative number only: it cannot overflow.
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


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
