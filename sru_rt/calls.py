"""Calls as the planner sees them, without arrays: for kernels that are compiled before there is anything to run.

Kernels depend on a call's cell, dtypes and sizes, on which arrays there are and how they lie. Those of the public
functions lie as `recurrence` makes them: C-contiguous, at addresses that are multiples of 16 bytes or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import abi
from .cell import Cell
from .dtypes import state_dtype
from .plan import Device, Plan, plan
from .traffic import ITEMSIZE
from .variant import Variant

_ADDRESS = 512  # any, aligned as memory of CuPy is
MANY = 1 << 20  # steps; kernels depend on their number only where it is 1, or less than `every` is to be
_LARGEST = 1 << 30  # channels of all sequences and directions; the plan changes no more long before


@dataclass(frozen=True)
class Call:
    """One call of a public function, and the backward that follows if it saves.

    `every` = K keeps the state every K <= L steps, 0 none. Inputs of every step have x's dtype.
    """

    cell: Cell
    dtype: str
    D: int
    d: int
    every: int = 0
    saved_dtype: str = ""  # that of the state if empty
    has_mask: bool = False
    has_reset: bool = False
    wants_x: bool = True  # the gradient of x
    L: int = MANY

    @property
    def variant(self) -> Variant:
        return Variant(self.cell, self.dtype, self.saved_dtype or state_dtype(self.dtype))

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.every else ("forward",)

    def plan(self, which: str, B: int, device: Device) -> Plan:
        """The plan of the pass `which` for one batch size, that is compiled in."""
        arguments = self._forward(B) if which == "forward" else self._backward(B)
        return replace(plan(self.variant, arguments, device), B=B)

    def general_plans(self, which: str, device: Device) -> list[Plan]:
        """The plans, for any batch size each, of which one fits every call."""
        largest = max(1, _LARGEST // (self.D * self.d))
        return list(dict.fromkeys(self._between(which, device, 1, largest)))

    def _between(self, which: str, device: Device, low: int, high: int) -> Iterator[Plan]:
        """The plans of all batch sizes from `low` to `high`.

        Threads grow by turns with the batch, and depths shrink, while the width is the same; it grows once. So where
        both ends have the same plan, all between them have it too.
        """
        first, last = (replace(self.plan(which, B, device), B=0) for B in (low, high))
        yield first
        if first != last:
            middle = (low + high) // 2
            yield from self._between(which, device, low, middle)
            yield from self._between(which, device, middle + 1, high)

    def _forward(self, B: int) -> abi.Forward:
        states = [_ADDRESS] * len(self.cell.state)
        return abi.Forward(self._given(B), h=_ADDRESS, c_last=states, saved=states)

    def _backward(self, B: int) -> abi.Backward:
        states = [_ADDRESS] * len(self.cell.state)
        return abi.Backward(
            self._given(B),
            dh=_ADDRESS,
            dc_last=states,
            saved=states,
            states=states,
            partial=abi.Slot(_ADDRESS, self.d),
            dgates=self._slots("gates"),
            dinputs=self._slots("inputs", without="" if self.wants_x else "x"),
            dper_sequence=(),
            dparams=(),
            dc0=(),
        )

    def _given(self, B: int) -> abi.Given:
        """All that the planner reads; the rest is the same to a kernel, or comes with the launch."""
        return abi.Given(
            L=self.L,
            B=B,
            D=self.D,
            d=self.d,
            every=self.every,
            lengths=0,
            mask=_ADDRESS if self.has_mask else 0,
            reset=_ADDRESS if self.has_reset else 0,
            gates=self._slots("gates"),
            inputs=self._slots("inputs"),
            per_sequence=(),
            params=(),
            c0=(),
            constants=(),
        )

    def _slots(self, kind: str, without: str = "") -> list[abi.Slot]:
        slots = []
        row = self.d * ITEMSIZE[self.dtype]
        for array in self.cell.arrays:
            if array.kind == kind:
                n = len(array.members)
                there = [abi.Slot(_ADDRESS + i * row, n * self.d) for i in range(n)]
                slots += [abi.NOT_WANTED] * n if array.name == without else there
        return slots
