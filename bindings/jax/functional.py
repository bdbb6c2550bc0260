"""The core's functions with a policy of recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array

import sru_rt

from ...errors import ArgumentError
from ...own import OwnCell
from ..recompute import Recompute, refuse_left_out, with_recompute


def _made(core: Callable[..., Any], name: str) -> Callable[..., Any]:
    on = (
        "arrays of JAX, a pure function under its transformations, in reverse mode; numbers such as alpha are constants"
    )
    return with_recompute(core, name, on, "the dtype of x")


sru = _made(sru_rt.sru_forward, "sru")
qrnn = _made(sru_rt.qrnn_forward, "qrnn")
mingru = _made(sru_rt.mingru_forward, "mingru")
minlstm = _made(sru_rt.minlstm_forward, "minlstm")


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
    refuse_left_out("own_cell", options)
    return cell.forward(x, weight, params, c0, save=Recompute(recompute), **options)
