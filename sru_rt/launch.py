"""The waist: one recurrence given by pointers and sizes. Every framework comes through here.

A caller states the cell, the dtypes, the packed arguments (see `abi`), the device and the stream. On the CPU the work
is done by compiled kernels on the library's own threads, or by NumPy where there is no compiler.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

from . import abi, compile_cpu, numpy_sweep, settings
from .cell import Cell
from .errors import CompileError, LibraryError

# Below this many elements of h per task, waking a thread costs more than it saves.
_ELEMENTS_PER_TASK = 1 << 17

_noticed = False


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. Bit i of `wide` says that input i is stored in the dtype of the state."""

    cell: Cell
    dtype: str
    saved_dtype: str
    wide: int = 0


def run(variant: Variant, arguments: abi.Forward | abi.Backward, device: str = "cpu", stream: int = 0) -> None:
    """Runs one pass of a recurrence, in order on `stream` of `device` (on the CPU: before returning).

    Raises:
        CompileError: SRU_RT_CPU=compiled, and there is no working compiler.
        LibraryError: there are no kernels for `device`.
    """
    if device != "cpu":
        raise LibraryError(
            f"sru_rt: there are no kernels for device {device!r} in this version; move the arrays to the CPU"
        )
    kernel = _kernel(variant)
    sweep = "forward" if isinstance(arguments, abi.Forward) else "backward"
    if kernel is None:
        getattr(numpy_sweep, sweep)(variant.cell, variant.dtype, variant.saved_dtype, variant.wide, arguments)
        return
    tasks = _tasks(arguments.given)
    pool = compile_cpu.pool() if tasks > 1 else None
    getattr(kernel, sweep)(abi.pack(variant.cell, arguments), pool, tasks)


def _tasks(given: abi.Given) -> int:
    elements = given.L * given.B * given.D * given.d
    return max(1, min(settings.num_threads(), elements // _ELEMENTS_PER_TASK))


def _kernel(variant: Variant) -> compile_cpu.Kernel | None:
    """The compiled kernel, or None where NumPy is to do the work."""
    backend = settings.cpu_backend()
    if backend == "numpy":
        return None
    found = _kernel_or_error(variant, settings.cxx(), settings.cxx_flags())
    if not isinstance(found, CompileError):
        return found
    if backend == "compiled":
        raise found
    _notice(str(found))
    return None


@functools.cache
def _kernel_or_error(variant: Variant, *_settings: object) -> compile_cpu.Kernel | CompileError:
    """A failure is remembered, so that it is not tried again at every call."""
    try:
        return compile_cpu.kernel(variant.cell, variant.dtype, variant.saved_dtype, variant.wide)
    except CompileError as error:
        return error.with_traceback(None)


def _notice(reason: str) -> None:
    """Says once in a process why NumPy does the work, which is right but slow."""
    global _noticed
    if not _noticed:
        _noticed = True
        warnings.warn(
            f"{reason}\nUntil then the recurrences run on NumPy: same results to rounding, but several times slower. "
            "SRU_RT_CPU=numpy silences this",
            RuntimeWarning,
            stacklevel=2,
        )
