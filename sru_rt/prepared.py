"""A pass of which all but the addresses is settled, for callers that run it again and again: bindings of frameworks.

What depends on shapes, dtypes and settings is done once, so that a call is to fill in addresses and to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import abi, launch
from .variant import Variant

_PLACE = 1 << 48  # beyond any size, stride or offset


def place(number: int) -> int:
    """What stands in the arguments of a `Prepared` for the address (or constant) number `number`.

    Offsets may be added to addresses.
    """
    return (number + 1) * _PLACE


class Prepared:
    """One pass of a recurrence.

    Args:
        arguments: with `place(i)` in place of the i-th address or constant. Addresses that are 0 are not there.
        device: as for `launch.run`.
        threads: as for `launch.bound`.
    """

    def __init__(
        self,
        variant: Variant,
        arguments: abi.Forward | abi.Backward,
        device: str = "cpu",
        threads: launch.Threads | None = None,
    ) -> None:
        self._variant, self._arguments, self._device = variant, arguments, device
        values = abi.values(arguments)
        parts = [divmod(v, _PLACE) if isinstance(v, int) else (0, v) for v in values]
        self._values = [rest for _, rest in parts]
        self._places = [(field, number - 1, rest) for field, (number, rest) in enumerate(parts) if number]
        self._pack = abi.layout(variant.cell, isinstance(arguments, abi.Forward)).pack
        self._kernel = launch.bound(variant, arguments, threads) if device == "cpu" else None

    def run(self, addresses: Sequence[float], stream: int = 0) -> None:
        """Runs the pass in order on `stream`."""
        if self._kernel is None:
            launch.run(self._variant, _filled(self._arguments, addresses), self._device, stream)
            return
        values = self._values.copy()
        for field, number, rest in self._places:
            values[field] = addresses[number] + rest if rest else addresses[number]
        self._kernel(self._pack(*values))


def _filled(value: Any, addresses: Sequence[float]) -> Any:
    """Arguments with addresses in their places."""
    if isinstance(value, int):
        number, rest = divmod(value, _PLACE)
        if not number:
            return value
        return addresses[number - 1] + rest if rest else addresses[number - 1]
    if isinstance(value, tuple):
        filled = [_filled(v, addresses) for v in value]
        make: Callable[..., Any] = getattr(type(value), "_make", type(value))
        return make(filled)
    return [_filled(v, addresses) for v in value] if isinstance(value, list) else value
