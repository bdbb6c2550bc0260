"""What distinguishes kernels that do the same."""

from __future__ import annotations

from dataclasses import dataclass

from .cell import Cell


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Bit i of `wide` says that input i is stored in the dtype of the state, bit i of `narrow`, on a GPU, that parameter i
    and its gradient are not, but in `dtype`.
    """

    cell: Cell
    dtype: str
    saved_dtype: str
    wide: int = 0
    narrow: int = 0
