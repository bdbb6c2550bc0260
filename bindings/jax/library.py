"""The core's functions on arrays of JAX: the core checks, and chooses the cell; the layer of this binding runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import spec
from ...cell import Cell
from ...errors import ArgumentError, LibraryError
from ...inputs import Input
from ...options import Options
from ..recompute import Recompute, every, policy
from . import autodiff, over_time
from .layer import layer
from .reference import state_dtype


class Jax:
    """JAX, as `sru_rt.library.Library`; of that, what the checks of a layer need."""

    xp = jnp
    name = "jax.numpy"
    row_padding = 0

    def __init__(self, device: Any, reads_values: bool) -> None:
        self._device, self.reads_values = device, reads_values
        self.device = "a device of JAX" if device is None else str(device)

    @property
    def layer(self) -> Callable[..., tuple[Any, ...]]:
        return run

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def plain(self, function: str, name: str, value: Any, origin: str) -> Array:
        if not isinstance(value, Array):
            got = "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
            way = "pass one" if value is None else f"pass jax.numpy.asarray({name})"
            raise LibraryError(f"{function}: {name} must be an array of JAX, as {origin} is (got {got}); {way}")
        return value

    def to_host(self, array: Any) -> np.ndarray[Any, Any] | None:
        return None if isinstance(array, jax.core.Tracer) else np.asarray(array)

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return jax.device_put(array, self._device)

    def integers(self, array: Any) -> Array:
        return jnp.asarray(array)

    def conversion(self, name: str, dtype: str) -> str:
        return f"{name}.astype({dtype!r})"

    def contiguous(self, array: Array, dtype: np.dtype[Any]) -> Array:
        return array.astype(dtype)


_TRACED = Jax(None, False)


def library(array: Array) -> Jax:
    """The library of an array, which may have no values."""
    return _TRACED if isinstance(array, jax.core.Tracer) else _library(array.sharding)


@cache
def _library(sharding: jax.sharding.Sharding) -> Jax:
    (device, *others) = sharding.device_set
    if others:
        return _TRACED
    return Jax(device, device.platform == "cpu" and sharding.is_fully_addressable)


def run(
    function: str,
    cell: Cell,
    arrays: Mapping[str, Array],
    c0: Sequence[Array | None],
    constants: Sequence[float],
    flags: tuple[Array | None, Array | None, Array | None],
    options: Options,
    projected: Input | None,
) -> tuple[Any, ...]:
    """Runs a layer, or a recurrence if nothing is projected; see `sru_rt.library.Library.layer`."""
    save = _policy(function, options)
    lengths, mask, reset = flags
    text, n = spec.text_of(cell), len(cell.state)
    own = [arrays[a.name] for a in cell.arrays if a.kind not in ("gates", "state")]
    shared: dict[str, Any] = {
        "lengths": lengths,
        "mask": mask,
        "reset": reset,
        "constants": tuple(constants),
        "time_parallel": options.time_parallel,
    }
    state = c0[0] if n == 1 else _stacked(c0)
    u = next((arrays[a.name] for a in cell.arrays if a.kind == "gates" and a.name in arrays), None)
    if save.axis is not None:  # time is divided
        u = over_time.project(function, save.axis, projected, lengths, mask, reset) if projected else u
        h, last = over_time.recurrence(function, save.axis, text, u, own, state, every=every(save.value), **shared)
    elif projected:
        window, x, factors = projected.window, projected.x, projected.factors
        h, last = layer(text, x, factors, own, state, window=window, recompute=save.value, **shared)
    else:
        h, last = autodiff.recurrence(text, u, own, state, every=every(save.value), **shared)
    return h, last if n == 1 else tuple(last)


def _stacked(states: Sequence[Array | None]) -> Array | None:
    """Initial states side by side, zeros for those that are None."""
    given = next((s for s in states if s is not None), None)
    if given is None:
        return None
    dtype = state_dtype(given.dtype)
    return jnp.stack([jnp.zeros_like(given, dtype) if s is None else s.astype(dtype) for s in states])


def _policy(function: str, options: Options) -> Recompute:
    instead = (
        "which differentiates functions itself: leave it out and use jax.grad or jax.vjp; the functions of "
        "sru_rt.bindings.jax have recompute="
    )
    found = policy(function, options, "arrays of JAX", instead)
    if found.axis is not None and found.value == "x":
        raise ArgumentError(
            f"{function}: recompute='x' is not available where time is divided; wrap the call in jax.checkpoint, or "
            "give a number of steps"
        )
    return found
