"""The core's functions with a policy of recomputation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jax import Array

import sru_rt

from ...errors import ArgumentError
from ...own import OwnCell
from .library import Recompute

_LEFT_OUT = ("save", "saved_dtype", "out")  # of the core's arguments: JAX differentiates functions and owns memory


def _with_recompute(core: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of the core with `recompute=` in place of what is said otherwise in JAX."""
    parameters = [p for p in inspect.signature(core).parameters.values() if p.name not in _LEFT_OUT]
    added = inspect.Parameter("recompute", inspect.Parameter.KEYWORD_ONLY, default=False)

    def function(*args: Any, recompute: bool | int | str = False, **kwargs: Any) -> Any:
        refused = [name for name in _LEFT_OUT if name in kwargs]
        if refused:
            raise TypeError(f"{name}() got an unexpected keyword argument {refused[0]!r}")
        return core(*args, save=Recompute(recompute), **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__wrapped__ = core  # type: ignore[attr-defined]
    function.__signature__ = inspect.Signature([*parameters, added])  # type: ignore[attr-defined]
    function.__doc__ = f"""`sru_rt.{core.__name__}` on arrays of JAX, a pure function under all of its transformations.

    Args:
        recompute: what the backward computes again to save memory: False nothing, K >= 1 all states but every K-th,
            True these with K = 32, "x" these and U.

    All else, shapes, dtypes and errors as `sru_rt.{core.__name__}`, without {", ".join(_LEFT_OUT)}. Options and
    numbers such as alpha are constants of a program. Gradients are those of reverse mode, of any order.

    Returns:
        h (L, B, D*d) in the dtype of x, and the last state (D, B, d) in float32 (float64 for float64).
    """
    return function


sru = _with_recompute(sru_rt.sru_forward, "sru")
qrnn = _with_recompute(sru_rt.qrnn_forward, "qrnn")
mingru = _with_recompute(sru_rt.mingru_forward, "mingru")
minlstm = _with_recompute(sru_rt.minlstm_forward, "minlstm")


def own_cell(
    cell: OwnCell,
    x: Array,
    weight: Array | tuple[Array, Array],
    params: Array | None = None,
    c0: Any = None,
    *,
    recompute: bool | int | str = False,
    **options: Any,
) -> tuple[Array, Any]:
    """``cell.forward`` of a cell that `sru_rt.cell` made, on arrays of JAX.

    Args:
        recompute: as for `sru`.
        options: all else that ``cell.forward`` takes by name, such as lengths, and what the cell declares.

    Shapes, dtypes and errors as ``cell.forward``, without save, saved_dtype and out. Exported programs find the cell
    by the place of its step function, and so need it where it was.

    Returns:
        h (L, B, D*d) and the last state (D, B, d), a tuple if there are several.
    """
    if not isinstance(cell, OwnCell):
        raise ArgumentError(f"own_cell: cell must be what sru_rt.cell made (got {type(cell).__name__})")
    refused = [name for name in _LEFT_OUT if name in options]
    if refused:
        raise TypeError(f"own_cell() got an unexpected keyword argument {refused[0]!r}")
    return cell.forward(x, weight, params, c0, save=Recompute(recompute), **options)
