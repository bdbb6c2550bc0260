"""Turns matrices on the CPU, for products of frameworks that want them turned."""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import compile_cpu, launch, settings
from .errors import CompileError
from .launch import Threads

ITEMSIZE = 4  # of the numbers that can be turned


def turn(source: int, target: int, n: int, rows: int, columns: int, threads: Threads | None = None) -> bool:
    """Writes n matrices (rows, columns) that lie one after the other as as many (columns, rows) to another place.

    Args:
        source, target: addresses of n*rows*columns numbers of four bytes each, which do not overlap.
        threads: as for `launch.entry`.

    Returns:
        Whether it is done. It is not where there is no compiler, or SRU_RT_CPU=numpy: then nothing is written.
    """
    entry = None if settings.cpu_backend() == "numpy" else _entry(settings.cxx(), settings.cxx_flags())
    if entry is None:
        return False
    entry(source, target, n, rows, columns, *launch.share(n * rows * columns, threads))
    return True


@functools.cache
def _entry(*_settings: object) -> Callable[..., None] | None:
    """A failure is remembered, so that it is not tried again at every call; recurrences say what is wrong."""
    try:
        return compile_cpu.turn()
    except CompileError:
        return None
