"""The forms in which a module takes its sequences, and time-major arrays, which is all that its layers know.

`axes` are the letters of the leading axes in which something is given for each token: "L B", "B L", "L" for one
sequence, "B" for one token of each, "" for one token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ...check import Check
from ...errors import LibraryError, ShapeError


class Layout(NamedTuple):
    """Where tokens are padding, and where segments begin: lengths (B,), mask and reset (L, B); each may be None."""

    lengths: Array | None = None
    mask: Array | None = None
    reset: Array | None = None


def checked(check: Check, x: Any, axes: str, input_size: int) -> Array:
    """x, given with these axes, as (L, B, input_size)."""
    check.set("input_size", input_size, "the module")
    x = check.plain("x", x) if isinstance(x, Array) else _refuse(check, "x", x)
    if x.ndim != len(axes.split()) + 1:
        of_one = "(L, input_size)" if "L" in axes else "(input_size,)"
        needed = f"({', '.join(axes.split())}, input_size), or {of_one} for one sequence"
        raise check.error("x", f"has shape {tuple(x.shape)}; it needs {needed}", ShapeError)
    check.shape("x", x, f"{axes} input_size")
    check.io_dtype("x", x)
    x = time_major(x, axes)
    check.set("L", x.shape[0], "x")
    check.set("B", x.shape[1], "x")
    return x


def layout_of(check: Check, layout: tuple[Any, Any, Any], axes: str) -> Layout:
    """lengths, mask and reset, checked, with L and B as the first axes."""
    lengths, *flags = layout
    if axes == "L" and lengths is not None:
        lengths = as_array(lengths)
        if getattr(lengths, "ndim", 1) != 0:
            shape = tuple(getattr(lengths, "shape", (len(lengths),)))
            raise check.error("lengths", f"has shape {shape}; it needs (), a number for one sequence", ShapeError)
        lengths = lengths[None]
    found = []
    for name, value in zip(("mask", "reset"), flags):
        value = as_array(value)
        if value is not None:
            value = value if isinstance(value, Array) else _refuse(check, name, value)
            check.shape(name, value, axes)
            value = check.flags(name, time_major(value, axes))
        found.append(value)
    return Layout(check.lengths(lengths), *found)


def _refuse(check: Check, name: str, value: Any) -> Any:
    got = "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
    raise LibraryError(
        f"{check.function}: {name} must be an array of JAX or NumPy (got {got}); pass jax.numpy.asarray({name})"
    )


def as_array(value: Any) -> Any:
    """Arrays and numbers of NumPy, and integers, as arrays of JAX; all else as it is."""
    return jnp.asarray(value) if isinstance(value, (np.ndarray, np.generic, int)) else value


def time_major(array: Array, axes: str) -> Array:
    """(L, B, ...) of an array whose first axes are these."""
    if axes == "L B":
        return array
    if axes == "B L":
        return array.swapaxes(0, 1)
    return jnp.expand_dims(array, {"L": (1,), "B": (0,), "": (0, 1)}[axes])


def like_input(h: Array, axes: str) -> Array:
    """What `time_major` made into (L, B, ...) as it was."""
    if axes in ("L B", "B L"):
        return time_major(h, axes)
    return {"L": lambda: h[:, 0], "B": lambda: h[0], "": lambda: h[0, 0]}[axes]()
