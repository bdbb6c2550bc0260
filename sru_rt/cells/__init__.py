"""The built-in cells: one file each, with its step function and its public functions."""

from ..cell import Cell
from . import sru
from .sru import sru_backward, sru_forward, sru_init, sru_recurrence, sru_step

__all__ = ["named_cells", "sru_backward", "sru_forward", "sru_init", "sru_recurrence", "sru_step"]


def named_cells() -> list[Cell]:
    """The cells whose emitted text stands in cuda/cells/, one file each."""
    return [cell for module in (sru,) for cell in module.named_cells()]
