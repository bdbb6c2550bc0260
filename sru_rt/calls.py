"""Calls as the planner sees them, without arrays: for kernels that are compiled before there is anything to run.

Kernels depend on a call's cell, dtypes and sizes, on which arrays there are and how they lie. Those of the public
functions lie as `recurrence` makes them: C-contiguous, at addresses that are multiples of 16 bytes or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import abi, choose, chunks, decode, one_launch
from .cell import Array, Cell
from .dtypes import state_dtype
from .machine import Device
from .plan import Plan, plan
from .traffic import ITEMSIZE
from .variant import Variant

_ADDRESS = 512  # any, aligned as memory of CuPy is
MANY = 1 << 20  # steps; kernels depend on their number only where it is 1, less than `every` is to be, or too small for
# chunks of time


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
    time_parallel: bool | str = "auto"
    d_in: int = 0  # of the weight of a step or of a small layer, 0 where U is given
    wide_params: bool = False  # in the dtype of the state, not of x

    @property
    def variant(self) -> Variant:
        acc = state_dtype(self.dtype)
        narrow = self.cell.bits("params", lambda a: self.dtype != acc and not self.wide_params)
        return Variant(self.cell, self.dtype, self.saved_dtype or acc, narrow=narrow)

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.every else ("forward",)

    def plan(self, which: str, B: int, device: Device, cut: tuple[int, int] = (0, 0)) -> Plan:
        """The plan of the pass `which` for one batch size, that is compiled in.

        `cut` are the steps of a chunk of time in forward and backward, 0 for none.
        """
        arguments = self._forward(B, cut) if which == "forward" else self._backward(B, cut)
        return replace(plan(self.variant, arguments, device), B=B)

    def plans(self, which: str, B: int, device: Device) -> list[Plan]:
        """The plans of one batch size: where there are `MANY` steps, also those of calls with few."""
        plans = [self.plan(which, B, device, cut) for cut in self._cuts(B, device)]
        return list(dict.fromkeys([*plans, *self._of_small_layer(device)]))

    def general_plans(self, which: str, device: Device) -> list[Plan]:
        """The plans, for any batch size each, of which one fits every call: the load is all that they depend on.

        Kernels that form U of one token have a batch size each.
        """
        if self.d_in:
            own = [self.plan(which, B, device) for B in range(1, decode.MOST + 1)]
            given = replace(self, d_in=0).general_plans(which, device)
            return [*(p for p in own if p.decodes), *self._of_small_layer(device), *given]
        sizes = [*choose.batches(self.D * self.d, device)]
        cuts = dict.fromkeys(cut for B in sizes for cut in self._cuts(B, device))
        return list(dict.fromkeys(replace(self.plan(which, B, device, cut), B=0) for cut in cuts for B in sizes))

    def _of_small_layer(self, device: Device) -> list[Plan]:
        """The plan that forms U of sequences, which is one for all batch sizes, if there is one: some calls take it."""
        if self.every or not one_launch.possible(self.variant, self.d, self.d_in, self.time_parallel, device):
            return []
        f = replace(self, d_in=0)._forward(decode.MOST + 1)  # too many for a kernel of one token
        given = f.given._replace(gates=[abi.NOT_WANTED] * len(self.cell.gates))
        f = f._replace(given=given, x=_ADDRESS, weight=_ADDRESS, d_in=self.d_in)
        return [plan(self.variant, f, device)]

    def _cut(self, B: int, device: Device) -> tuple[int, int]:
        sizes = self.L, B, self.D, self.d
        forward, backward = (
            chunks.length(self.variant, sizes, forward, self.time_parallel, device) for forward in (True, False)
        )
        return forward, backward

    def _cuts(self, B: int, device: Device) -> list[tuple[int, int]]:
        return [self._cut(B, device), *([(0, 0)] if self.L == MANY else [])]

    def _forward(self, B: int, cut: tuple[int, int] = (0, 0)) -> abi.Forward:
        states = [_ADDRESS] * len(self.cell.state)
        made = abi.Forward(self._given(B, cut[0]), h=_ADDRESS, c_last=states, saved=states)
        sizes = self.L, B, self.D, self.d
        if self.every or not (self.d_in and decode.fits(self.dtype, sizes, self.d_in)):
            return made
        given = made.given._replace(gates=[abi.NOT_WANTED] * len(self.cell.gates))
        return made._replace(given=given, x=_ADDRESS, weight=_ADDRESS, d_in=self.d_in)

    def _backward(self, B: int, cut: tuple[int, int] = (0, 0)) -> abi.Backward:
        states = [_ADDRESS] * len(self.cell.state)
        return abi.Backward(
            self._given(B, cut[1]),
            dh=_ADDRESS,
            dc_last=states,
            saved=states,
            states=states,
            partial=abi.Slot(_ADDRESS, self.d),
            dgates=self._slots("gates"),
            dinputs=self._slots("inputs", self._wants),
            dper_sequence=(),
            dparams=(),
            dc0=(),
            saved_chunk=chunks.counted_in(self.cell, cut[0]),
        )

    def _given(self, B: int, cut: int) -> abi.Given:
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
            chunk=cut,
            carry=_ADDRESS if cut else 0,
        )

    def _wants(self, array: Array) -> bool:
        """Whether the gradient of an array is wanted."""
        return array.differentiable and (self.wants_x or array.name != "x")

    def _slots(self, kind: str, has: Callable[[Array], bool] = lambda array: True) -> list[abi.Slot]:
        slots = []
        row = self.d * ITEMSIZE[self.dtype]
        for array in self.cell.arrays:
            if array.kind == kind:
                n = len(array.members)
                there = [abi.Slot(_ADDRESS + i * row, n * self.d) for i in range(n)]
                slots += there if has(array) else [abi.NOT_WANTED] * n
        return slots
