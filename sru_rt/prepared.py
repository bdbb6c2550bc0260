"""A pass of which all but the addresses is settled, for callers that run it again and again: bindings of frameworks.

What depends on shapes, dtypes and settings is done once, so that a call is to fill in addresses and to run.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import abi, compile_cpu, launch
from .variant import Variant

_PLACE = 1 << 48  # beyond any size, stride or offset
_ALIGNED = 256  # an address such as allocators of frameworks give, for kernels a multiple of 16


def place(number: int) -> int:
    """What stands in the arguments of a `Prepared` for the address (or constant) number `number`.

    Offsets may be added to addresses.
    """
    return (number + 1) * _PLACE


class Field(NamedTuple):
    """Eight bytes of the packed arguments: the address number `number`, to which `rest` is added.

    Of those that hold no address, `number` is None and `rest` all there is, as an integer.
    """

    number: int | None
    rest: int


class Prepared:
    """One pass of a recurrence.

    Args:
        arguments: with `place(i)` in place of the i-th address or constant. Addresses that are 0 are not there.
        n: the number of constants and addresses; the constants are the first of them.
        device: as for `launch.run`.
        threads: as for `launch.entry`.
    """

    def __init__(
        self,
        variant: Variant,
        arguments: abi.Forward | abi.Backward,
        n: int,
        device: str = "cpu",
        threads: launch.Threads | None = None,
    ) -> None:
        self._variant, self._arguments, self._device = variant, arguments, device
        values = abi.values(arguments)
        self._parts = [divmod(v, _PLACE) if isinstance(v, int) else (0, v) for v in values]
        self._places = [(field, number - 1, rest) for field, (number, rest) in enumerate(self._parts) if number]
        self._pack_all = abi.layout(variant.cell, isinstance(arguments, abi.Forward)).pack
        entry = launch.entry(variant, arguments, threads) if device == "cpu" else None
        self._filled_in = entry and compile_cpu.prepared(*entry, [self._field(*part) for part in self._parts])
        self._n_constants = len(arguments.given.constants)
        self._pack = struct.Struct(f"={self._n_constants}d{n - self._n_constants}q").pack
        self._loaded: Callable[[bytes, int], None] | None = None

    def entry(self) -> launch.Entry | None:
        """The CPU's kernel, for callers in other languages; None where NumPy is to do the work."""
        return launch.entry(self._variant, self._arguments)

    def fields(self, constants: Sequence[float]) -> list[Field]:
        """The packed arguments, for callers in other languages; `constants` are the first of the addresses."""
        return [self._field(number, rest, constants) for number, rest in self._parts]

    def _field(self, number: Any, rest: Any, constants: Sequence[float] = ()) -> Field:
        if 0 < number <= len(constants):
            number, rest = 0, float(constants[number - 1])
        if isinstance(rest, float):
            (rest,) = struct.unpack("=q", struct.pack("=d", rest))
        return Field(number - 1 if number else None, rest)

    def load(self) -> Callable[[bytes, int], None]:
        """Has the kernels of a GPU compiled and loaded, so that `run` does neither. The device must be current."""
        if self._loaded is None:
            aligned = [_ALIGNED] * max(number for number, _ in self._parts)
            self._loaded = launch.loaded(self._variant, _filled(self._arguments, aligned), self._device)
        return self._loaded

    def run(self, addresses: Sequence[float], stream: int = 0) -> None:
        """Runs the pass in order on `stream`."""
        if self._filled_in:
            self._filled_in(self._pack(*addresses))
        elif self._device == "cpu" or self._is_odd(addresses):
            launch.run(self._variant, _filled(self._arguments, addresses), self._device, stream)
        else:
            self.load()(self._packed(addresses), stream)

    def _is_odd(self, addresses: Sequence[float]) -> bool:
        """Whether an address is no multiple of 16, as allocators give them."""
        at: Any = addresses[self._n_constants :]
        return bool(functools.reduce(operator.or_, at) & 15)

    def _packed(self, addresses: Sequence[float]) -> bytes:
        """The arguments of a kernel of a GPU."""
        values = [rest for _, rest in self._parts]
        for field, number, rest in self._places:
            values[field] = addresses[number] + rest if rest else addresses[number]
        return self._pack_all(*values)


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
