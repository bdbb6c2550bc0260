"""What a forward function keeps for its backward."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .gradients import nbytes
from .library import NDArray
from .projection import Projection
from .recurrence import Operands


@dataclass(frozen=True, eq=False)
class Saved:
    """What a forward function keeps for its backward.

    It holds the arrays that were given, not copies, where they needed no conversion: do not change them in between.
    """

    function: str
    given: Mapping[str, Any]  # what the user gave, by name: dtypes, tuples of dtypes, or None
    operands: Operands
    sizes: tuple[int, int, int, int]  # L, B, D, d
    states: Sequence[NDArray]
    every: int
    projection: Projection | None = None
    kind: Hashable = None  # the same of forwards that are alike (see `repeat`); None if it is like no other

    def on(self, operands: Operands, states: Sequence[NDArray], projection: Projection | None) -> Saved:
        """What an alike call keeps. See `Operands.on`."""
        made = object.__new__(Saved)
        made.__dict__.update(self.__dict__, operands=operands, states=states, projection=projection)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held, those of the caller included."""
        p = self.projection
        held = (dict(self.operands.arrays), list(self.operands.c0), list(self.states), (p.x, p.factors) if p else ())
        return nbytes(held, self.operands.library.pointer)

    def __repr__(self) -> str:
        L, B, D, d = self.sizes
        kept = "every state" if self.every == 1 else f"every {self.every}th state"
        return f"<saved by {self.function}: L={L} B={B} D={D} d={d}, {self.operands.dtype}, {kept}>"
