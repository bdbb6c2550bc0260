"""One pass of a recurrence, stated by value: what stands in a program for it, and outlives the process.

All that is no array is in a text, an attribute of the custom call, from which the handler finds kernel and arguments,
also in another process, to which the program was exported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...errors import ArgumentError
from ...passes import Call

FORMAT = 1  # of the text, and of what the buffers of a custom call are


class Stated(NamedTuple):
    """A `Call` of which equal ones are the same: its constants are texts, as 0.0 equals -0.0."""

    cell: str
    constants: tuple[str, ...]
    every: int
    time_parallel: str
    keep: bool

    @classmethod
    def of(cls, call: Call) -> Stated:
        return cls(call.cell, tuple(float(c).hex() for c in call.constants), *call[2:])

    @property
    def call(self) -> Call:
        return Call(self.cell, tuple(map(float.fromhex, self.constants)), *self[2:])


class Statement(NamedTuple):
    """A pass.

    The buffers of its custom call are the operands that are given, of a backward also the kept states, dh, and dlast if
    given; then the results: of a backward first the wanted gradients of all but the initial states, in the order of the
    operands; and what `passes.Pass` has as results. Lengths are (B, 2) int32, of which a pair has the bytes of an
    int64: JAX has none by default.
    """

    stated: Stated
    given: tuple[bool, ...]
    backward: bool = False
    need: tuple[bool, ...] = ()
    dlast: bool = False
    chunks: tuple[int, int] = (0, 0)  # of time: steps in those of forward and backward, 0 for none

    def text(self) -> str:
        return json.dumps([FORMAT, *self], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Statement:
        try:
            version, stated, *rest = json.loads(text)
            if version != FORMAT:
                raise ValueError(f"its format is {version}, not {FORMAT}")
            return cls(Stated(*_tuples(stated)), *_tuples(rest))
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"sru_rt: the program has a custom call that states no recurrence ({error}); it was written by another "
                "version of sru_rt: export it again"
            ) from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def wanted(need: Sequence[bool]) -> list[int]:
    """The operands whose gradients are among the results of a backward, before that of the initial states."""
    return [i for i, is_wanted in enumerate(need) if is_wanted and i != 1]
