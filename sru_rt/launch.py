"""The waist: one recurrence given by pointers and sizes. Every framework comes through here.

A caller states the cell, the dtypes, the arguments (see `abi`), the device and the stream. On the CPU the work is done
by compiled kernels on the library's own threads, or by NumPy where there is no compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from . import abi, chunks, compile_cpu, decode, launch_gpu, numpy_sweep, one_launch, plan, settings
from .errors import CompileError, LibraryError
from .log import warn_once
from .variant import Variant

# Below this many elements per task, waking a thread costs more than it saves.
_ELEMENTS_PER_TASK = 1 << 17
_ELEMENTS_PER_AWAKE_TASK = 1 << 15  # of a framework, whose products have just used its threads


def run(variant: Variant, arguments: abi.Forward | abi.Backward, device: str = "cpu", stream: int = 0) -> None:
    """Runs one pass of a recurrence, in order on `stream` of `device`, "cpu" (before returning) or such as "cuda:0".

    Raises:
        CompileError: there is no working compiler: NVRTC for a GPU, or one for C++ with SRU_RT_CPU=compiled.
        LibraryError: there are no kernels for `device`, or the arrays or sizes are beyond what a kernel takes.
    """
    if device != "cpu":
        kind, _, number = device.partition(":")
        if kind != "cuda":
            raise LibraryError(f"sru_rt: there are no kernels for device {device!r}, only for cpu and cuda")
        launch_gpu.run(variant, arguments, int(number or 0), stream)
        return
    found = entry(variant, arguments)
    if found is not None:
        found.function(abi.pack(variant.cell, arguments), found.pool, found.tasks)
        return
    sweep = numpy_sweep.forward if isinstance(arguments, abi.Forward) else numpy_sweep.backward
    sweep(variant.cell, variant.dtype, variant.saved_dtype, variant.wide, arguments)  # type: ignore[arg-type]


class Threads(NamedTuple):
    """Threads of a framework: the address of its `parallel_for` (see cuda/pool.cpp), and how many it has."""

    parallel_for: int
    number: int


class Entry(NamedTuple):
    """A kernel of the CPU, and what it is given beside the packed arguments."""

    function: Callable[..., None]
    pool: int | None
    tasks: int


def entry(variant: Variant, arguments: abi.Forward | abi.Backward, threads: Threads | None = None) -> Entry | None:
    """The CPU's kernel for calls with such arguments; None where NumPy is to do the work.

    It runs on the library's own threads unless others are given.
    """
    kernel = _kernel(variant)
    if kernel is None:
        return None
    given = arguments.given
    pool, tasks = share(given.L * given.B * given.D * given.d, threads)
    return Entry(kernel.forward if isinstance(arguments, abi.Forward) else kernel.backward, pool, tasks)


def share(elements: int, threads: Threads | None = None) -> tuple[int | None, int]:
    """The address of a `parallel_for`, None for one task alone, and the number of tasks that so much work is cut into.

    They run on the library's own threads unless others are given.
    """
    if threads:
        tasks = max(1, min(threads.number, elements // _ELEMENTS_PER_AWAKE_TASK))
    else:
        tasks = max(1, min(settings.num_threads(), elements // _ELEMENTS_PER_TASK))
    if tasks == 1:
        return None, 1
    return threads.parallel_for if threads else compile_cpu.pool(), tasks


def bound(variant: Variant, arguments: abi.Forward | abi.Backward, device: str = "cpu") -> Callable[[int], None]:
    """`run` for these arguments, again and again, as a function of the stream; a GPU must be the current device.

    All that can be done before is done now. Errors are those of `run`.
    """
    if device != "cpu":
        launched, packed = loaded(variant, arguments, device), abi.pack(variant.cell, arguments)
        return lambda stream: launched(packed, stream)
    found = entry(variant, arguments)
    if found is None:
        return lambda stream: run(variant, arguments)
    function, pool, tasks = found
    packed = abi.pack(variant.cell, arguments)
    return lambda stream: function(packed, pool, tasks)


def has_kernel(variant: Variant) -> bool:
    """Whether there is a compiled kernel for the CPU, which is compiled now; if not, NumPy is to do the work."""
    return _kernel(variant) is not None


def loaded(variant: Variant, arguments: abi.Forward | abi.Backward, device: str) -> Callable[[bytes, int], None]:
    """A pass on a GPU, which is the current device, as a function of the packed arguments and the stream.

    Its kernels are compiled and loaded now; see `run`. Addresses may be others, if they are aligned as these are.
    """
    planned = launch_gpu.prepare(variant, arguments, int(device.partition(":")[2] or 0))
    return lambda packed, stream: launch_gpu.launch(planned, packed, arguments.given, stream)


def needs_scratch(variant: Variant, every: int, device: str = "cpu") -> bool:
    """Whether a backward wants memory for the `every` states of a piece that it recomputes."""
    return every > 1 if device == "cpu" else plan.needs_scratch(variant, every)


def decodes(dtype: str, sizes: tuple[int, int, int, int], d_in: int, device: str = "cpu") -> bool:
    """Whether a kernel of the device forms U of one token itself: see `decode.fits`."""
    return device != "cpu" and decode.fits(dtype, sizes, d_in)


def chunk(
    variant: Variant, sizes: tuple[int, int, int, int], forward: bool, time_parallel: bool | str, device: str = "cpu"
) -> int:
    """Steps of the chunks of time that one pass of `sizes` L, B, D, d is to be cut into; 0: it is not.

    Chunks want a `carry` and larger arrays of partial sums and recomputed states: see cuda/arguments.h.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return 0
    return chunks.length(variant, sizes, forward, time_parallel, launch_gpu.device_facts(int(number or 0)))


def in_one_launch(
    variant: Variant,
    sizes: tuple[int, int, int, int],
    d_in: int,
    chunk: int,
    time_parallel: bool | str,
    device: str = "cpu",
) -> bool:
    """Whether a forward of `sizes` L, B, D, d that keeps nothing is to form U from x and its weight itself.

    It has no `gates` then, and is not cut into chunks; if not, it is into those of `chunk` steps.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return False
    facts = launch_gpu.device_facts(int(number or 0))
    return one_launch.taken(variant, sizes, d_in, chunk, time_parallel, facts)


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
    warn_once(
        "numpy",
        f"{found}\nUntil then the recurrences run on NumPy: same results to rounding, but several times slower. "
        "SRU_RT_CPU=numpy silences this",
    )
    return None


@functools.cache
def _kernel_or_error(variant: Variant, *_settings: object) -> compile_cpu.Kernel | CompileError:
    """A failure is remembered, so that it is not tried again at every call."""
    try:
        return compile_cpu.kernel(variant.cell, variant.dtype, variant.saved_dtype, variant.wide)
    except CompileError as error:
        return error.with_traceback(None)
