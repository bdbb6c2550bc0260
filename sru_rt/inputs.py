"""What U comes from: x and the weight of a projection, one token of them, or U itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import library as libraries
from .check import Check
from .errors import ShapeError
from .library import NDArray
from .options import Options


@dataclass(frozen=True)
class Input:
    """What a projection is given, checked: x (L, B, d_in), the factors of the weight, and tokens that a step sees.

    `source` is x itself, or what x is a copy of.
    """

    x: NDArray
    factors: tuple[NDArray, ...]
    source: NDArray
    window: int = 1


def projected(check: Check, x: Any, weight: Any, window: Any = 1) -> tuple[str, Input]:
    """Checks x (L, B, d_in) and the weight. Returns the dtype that all others follow, too."""
    window = _window(check, window)
    x = check.plain("x", x)
    dtype = check.io_dtype("x", x)
    check.shape("x", x, "L B d_in")
    return dtype, Input(x, _weight(check, weight, dtype, window), x, window)


def projected_token(check: Check, x: Any, weight: Any, window: Any = 1) -> tuple[str, Input, NDArray]:
    """The same for one token: x (B, d_in), or the last ones (window, B, d_in). Returns it as (1, B, d_in), too."""
    window = _window(check, window)
    check.set("L", 1, "one token")
    x = check.plain("x", x)
    dtype = check.io_dtype("x", x)
    if window == 1:
        check.shape("x", x, "B d_in")
        x = x[None]
    else:
        check.set("window", window, "window")
        check.shape("x", x, "window B d_in")
    factors = _weight(check, weight, dtype, window)
    if window == 1:
        return dtype, Input(x, factors, x), x
    side_by_side = check.library.xp.moveaxis(x, 1, 0)
    seen = side_by_side.reshape(1, check["B"], window * check["d_in"])
    return dtype, Input(seen, factors, side_by_side), x[-1:]


def given_u(check: Check, u: Any) -> str:
    """Checks U (L, B, D, k, d); returns its dtype."""
    u = check.plain("u", u)
    dtype = check.io_dtype("u", u)
    check.shape("u", u, "L B D k d")
    _check_directions(check, "u")
    return dtype


def one_token(check: Check, out: Any, run: Callable[[Options], tuple[Any, ...]]) -> tuple[Any, Any]:
    """Runs a sequence of one token; h and out[0] are (B, D*d)."""
    given = None
    if isinstance(out, (tuple, list)) and len(out) == 2 and libraries.of(out[0]):
        check.set("D*d", check["D"] * check["d"], "weight")
        check.shape("out[0]", out[0], "B D*d")
        given, out = out[0], (out[0][None], out[1])
    h, state = run(Options(out=out, in_workspace=True))
    return h[0] if given is None else given, state


def of_one_token(check: Check, name: str, value: Any, axes: str) -> Any:
    """What a token is given beside x, with an axis L in front; None if it is None."""
    if value is None:
        return None
    array = check.plain(name, value)
    check.shape(name, array, axes)
    return array[None]


def check_skip(check: Check, x: Any, dtype: str, gates: str) -> None:
    """Checks an x that is added to h as it is; `gates` is what could have one more gate instead."""
    x = check.array("x", x, "L B d_in", (dtype,))
    D, d = check["D"], check["d"]
    if x.shape[2] != D * d:
        raise check.error(
            "x",
            f"has d_in = {x.shape[2]}, but the highway adds it to h of size D*d = {D}*{d} = {D * d}: give {gates} one "
            "more gate for a projected skip (the init function does so), or pass highway=False",
            ShapeError,
        )


def check_skip_of_u(check: Check, x: Any, needed: bool) -> None:
    """Checks that x is given beside U where it is the skip, and only there."""
    if needed and x is None:
        raise check.error(
            "x",
            f"is None, but u has {check['k']} gates and highway=True, so the skip is x: pass x (L, B, D*d), a u with "
            "one more gate for the skip, or highway=False",
        )
    if not needed and x is not None:
        raise check.error("x", "is given, but with this u and these flags the skip is not x; leave x out")


def _window(check: Check, window: Any) -> int:
    if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
        raise check.error("window", f"must be a positive integer, a number of tokens (got {window!r})")
    return int(window)


def _weight(check: Check, value: Any, dtype: str, window: int) -> tuple[NDArray, ...]:
    """Checks a weight (D, k, d, d_in), or a pair (P, Q) of (D, k, d, p) and (p, d_in)."""
    columns = "d_in"
    if window > 1:
        columns = "window*d_in"
        check.set(columns, window * check["d_in"], f"window = {window} and d_in = {check['d_in']} of x")
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise check.error("weight", f"is a tuple of {len(value)}; a low-rank weight is a pair (P, Q)", ShapeError)
        arrays: tuple[NDArray, ...] = (
            check.array("weight[0]", value[0], "D k d p", (dtype,)),
            check.array("weight[1]", value[1], f"p {columns}", (dtype,)),
        )
    else:
        arrays = (check.array("weight", value, f"D k d {columns}", (dtype,)),)
    _check_directions(check, "weight")
    return arrays


def _check_directions(check: Check, name: str) -> None:
    if check["D"] not in (1, 2):
        raise check.error(
            name, f"has D = {check['D']} directions; D is 1 (forward) or 2 (forward, reverse)", ShapeError
        )
