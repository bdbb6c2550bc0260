"""The core's functions with a policy of recomputation, for PyTorch's compilers to take as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sru_rt

from ... import spec
from ...errors import ArgumentError
from ...own import OwnCell
from ..recompute import Recompute, with_recompute


def _settled(option: Any) -> Any:
    """A number, or numbers, of which the compiler left open what they are, as it does with arguments of programs."""
    if isinstance(option, (list, tuple)):
        return type(option)(map(_settled, option))
    return int(option) if isinstance(option, torch.SymInt) else option


def _made(core: Callable[..., Any], name: str) -> Callable[..., Any]:
    result = "the dtype of U, that of autocast if it is on"
    function = with_recompute(core, name, "tensors, differentiable and traceable", result, _settled)
    return torch.compiler.allow_in_graph(function)


sru = _made(sru_rt.sru_forward, "sru")
qrnn = _made(sru_rt.qrnn_forward, "qrnn")
mingru = _made(sru_rt.mingru_forward, "mingru")
minlstm = _made(sru_rt.minlstm_forward, "minlstm")


def own_cell(
    cell: OwnCell,
    x: Tensor,
    weight: Tensor | tuple[Tensor, Tensor],
    params: Tensor | None = None,
    c0: Any = None,
    *,
    recompute: bool | int | str = False,
    **options: Any,
) -> tuple[Tensor, Any]:
    """``cell.forward`` of a cell that `sru_rt.cell` made, on tensors, differentiable and traceable.

    Args:
        recompute: as for `sru`.
        options: all else that ``cell.forward`` takes by name, such as lengths, and what the cell declares.

    Shapes, dtypes and errors as ``cell.forward``, without save, saved_dtype and out. Compiled
    programs find the cell by the place of its step function, and so need it where it was.

    Returns:
        h (L, B, D*d) and the last state (D, B, d), a tuple if there are several.
    """
    if not isinstance(cell, OwnCell):
        raise ArgumentError(f"own_cell: cell must be what sru_rt.cell made (got {type(cell).__name__})")
    return _own_cell(cell.text, x, weight, params, c0, recompute=recompute, **options)


@torch.compiler.allow_in_graph
def _own_cell(text: str, *args: Any, recompute: bool | int | str, **options: Any) -> Any:
    options = {name: _settled(value) for name, value in options.items()}
    return _cell_of(text).forward(*args, save=Recompute(_settled(recompute)), **options)


@functools.cache
def _cell_of(text: str) -> OwnCell:
    return OwnCell(spec.cell_of(text))


# The core's own functions, called with tensors, can be compiled too.
for _name in dir(sru_rt):
    if _name.endswith(("_forward", "_recurrence", "_step")):
        torch.compiler.allow_in_graph(getattr(sru_rt, _name))
