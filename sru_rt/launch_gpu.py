"""Runs recurrences on a GPU through CuPy: plans, loads kernels on the device, and launches them on a stream."""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from . import abi, chunks, compile_gpu, dependent, plan, settings, shared_memory
from .errors import LibraryError
from .machine import Device
from .plan import Plan
from .variant import Variant

_Function = Any  # of CuPy

_MOST_BYTES = 1 << 15  # of the parameters of a kernel: compilers take no more than 32,764, and many 4096

# What a driver says of code that it does not take.
_REFUSALS = ("INVALID_IMAGE", "NO_BINARY_FOR_GPU", "UNSUPPORTED", "INVALID_PTX", "INVALID_SOURCE")

_lock = threading.Lock()
_launches: dict[Hashable, _Launch] = {}


class _Kernel(NamedTuple):
    """One of the kernels of a pass. With `chunks` its grid is as deep as there are chunks of time, but for so many."""

    function: _Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0  # bytes
    chunks: int | None = None


class _Launch(NamedTuple):
    """A planned pass on one device, but for its addresses and the number of steps."""

    kernels: Sequence[_Kernel]
    launch_kernel: Callable[..., None]  # the driver's, by CuPy: its `Function` takes longer


class _Parameters(threading.local):
    """Memory of a thread for the parameter of its next kernel, and where the driver finds that; it makes a copy."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(_MOST_BYTES)
        self.at = ctypes.addressof(self.memory)
        self._pointers = (ctypes.c_void_p * 1)(self.at)
        self.pointers = ctypes.addressof(self._pointers)


@functools.cache
def _parameters() -> _Parameters:
    return _Parameters()


def run(variant: Variant, arguments: abi.Forward | abi.Backward, device: int, stream: int) -> None:
    """Launches one pass on `stream` of GPU number `device`, which must be the current one. Does not wait.

    Raises:
        CompileError: CuPy or NVRTC are missing, or do not know the GPU.
        LibraryError: the GPU's driver refuses the code, or the arrays or sizes are beyond what a kernel takes.
    """
    launch(prepare(variant, arguments, device), abi.pack(variant.cell, arguments), arguments.given, stream)


def launch(planned: _Launch, packed: bytes, given: abi.Given, stream: int) -> None:
    """Launches a planned pass with packed arguments, of which `given` has the sizes."""
    parameters = _parameters()
    ctypes.memmove(parameters.at, packed, len(packed))
    for function, (x, y, z), block, shared, but in planned.kernels:
        depth = z if but is None else chunks.count(given.L, given.chunk) - but
        if x and y and depth:  # a grid of no blocks is none to the driver
            planned.launch_kernel(function.ptr, x, y, depth, *block, shared, stream, parameters.pointers, 0)


def prepare(variant: Variant, arguments: abi.Forward | abi.Backward, device: int) -> _Launch:
    """The planned pass, of which the kernels are loaded; made once. Errors are those of `run`."""
    key = _key(variant, arguments, device)
    return _launches.get(key) or _launches.setdefault(key, _prepare(variant, arguments, device))


def _key(variant: Variant, arguments: abi.Forward | abi.Backward, device: int) -> Hashable:
    """All that the plan depends on; neither L (but whether it is 1) nor addresses, only how they are aligned."""
    g = arguments.given
    together, apart, single = [g.gates], [*g.inputs], [*arguments.saved]
    wanted: tuple[bool, ...] = ()
    parts: tuple[int, ...] = (g.chunk > 0, shared_memory.tile_steps(g.chunk))
    if isinstance(arguments, abi.Backward):
        together.append(arguments.dgates)
        apart += arguments.dinputs
        single += [arguments.dh, *arguments.states]
        parts = (*parts, arguments.saved_chunk > 0)
        slots = (*arguments.dgates, *arguments.dinputs, *arguments.dparams, *arguments.dper_sequence)
        wanted = tuple([s.pointer != 0 for s in slots])
    else:
        single += [arguments.h, arguments.x, arguments.weight]
        parts = (*parts, arguments.d_in)
    single.append(g.carry)
    places = [(s.pointer - slots[0].pointer, s.stride) for slots in together for s in slots]
    places += [(slots[0].pointer % 16, 0) for slots in together]
    places += [(s.pointer % 16, s.stride) for s in apart]
    places += [(pointer % 16, 0) for pointer in single]
    sizes = (g.L == 1, g.L >> 31, g.B, g.D, g.d, g.every)
    return device, variant, sizes, parts, g.mask != 0, g.reset != 0, tuple(places), wanted, settings.plan_text()


def _prepare(variant: Variant, arguments: abi.Forward | abi.Backward, device: int) -> _Launch:
    given = arguments.given
    facts = device_facts(device)
    made = _cached_if_any(variant, plan.plan(variant, arguments, facts), facts.arch)
    functions = load(variant, made, device, facts.arch)
    kernels = _sweeps(variant, made, given, functions) if given.B else []
    if isinstance(arguments, abi.Backward):
        kernels += _sums(made, arguments, functions)
    return _Launch(kernels, _launcher(made.decodes and facts.arch >= dependent.SINCE_ARCH))


def _launcher(begins_early: bool) -> Callable[..., None]:
    """What launches kernels, which may let them begin while the one before them still runs."""
    cuda = importlib.import_module("cupy").cuda
    early = dependent.launcher(int(cuda.runtime.driverGetVersion())) if begins_early else None
    return early or cuda.driver.launchKernel


def _sweeps(variant: Variant, made: Plan, given: abi.Given, functions: Mapping[str, _Function]) -> list[_Kernel]:
    grid, block = made.grid(given.B), (made.block, 1, 1)
    shared = plan.shared_bytes(variant, made, given.every, given.chunk)
    sweep = functions["forward" if made.forward else "backward"]
    if not made.parallel:
        return [_Kernel(sweep, grid, block, shared)]
    if made.shoots:
        return [
            _Kernel(sweep, grid, block, chunks=0),
            _Kernel(functions["mend"], grid, block, chunks=1),
            _Kernel(functions["settle"], grid, block),
        ]
    if made.lookahead:
        return [_Kernel(functions["clear"], (16, 1, 1), (256, 1, 1)), _Kernel(sweep, grid, block, shared, chunks=0)]
    states = shared if made.reduce_reads_state else 0
    return [
        _Kernel(functions["reduce"], grid, block, states, chunks=1),
        _Kernel(functions["fold"], grid, block, states),
        _Kernel(sweep, grid, block, shared, chunks=0),
    ]


def _sums(made: Plan, arguments: abi.Backward, functions: Mapping[str, _Function]) -> list[_Kernel]:
    """The kernels that add up partial sums, where these are wanted."""
    given, kernels, tiles = arguments.given, [], -(-arguments.given.d // 32)
    if any(slot.pointer for slot in arguments.dparams):
        kernels.append(_Kernel(functions["sum_partials"], (tiles, len(given.params), given.D), (32, 8, 1)))
    if made.parallel and any(slot.pointer for slot in arguments.dper_sequence):
        grid = (tiles * given.B, len(given.per_sequence), given.D)
        kernels.append(_Kernel(functions["sum_chunks"], grid, (32, 8, 1)))
    return kernels


def _cached_if_any(variant: Variant, made: Plan, arch: int) -> Plan:
    """The plan, for any batch size if that kernel has been compiled and the one for this batch size has not."""
    general = replace(made, B=0)
    if made.B and compile_gpu.is_cached(variant, general, arch) and not compile_gpu.is_cached(variant, made, arch):
        return general
    return made


@functools.cache
def device_facts(device: int) -> Device:
    """What the planner and its model ask of GPU number `device`."""
    import cupy

    found = cupy.cuda.Device(device)
    of = found.attributes  # clocks in kHz, the width of the bus in bits; releases of CUDA may leave some out
    return Device(
        int(found.compute_capability),
        int(of["MultiProcessorCount"]),
        bandwidth=2 * 1e3 * of.get("MemoryClockRate", 0) * of.get("GlobalMemoryBusWidth", 0) / 8,
        clock=1e3 * of.get("ClockRate", 0),
        l2_bytes=int(of.get("L2CacheSize", 0)),
    )


@functools.cache
def _load(variant: Variant, made: Plan, device: int, arch: int) -> Mapping[str, _Function]:
    import cupy

    code = compile_gpu.cubin(variant, made, arch)
    module = cupy.cuda.Module()
    try:
        module.load(code)
    except cupy.cuda.driver.CUDADriverError as error:
        if not any(word in str(error) for word in _REFUSALS):
            raise
        raise LibraryError(
            f"sru_rt: the driver of GPU {device} refuses code for sm_{arch} made by NVRTC {compile_gpu.version()} "
            f"({error}); `python -m sru_rt doctor` compares their releases: {compile_gpu.INSTALL}"
        ) from None
    return {name: module.get_function(name) for name in made.kernels}


def load(variant: Variant, made: Plan, device: int, arch: int) -> Mapping[str, _Function]:
    """The kernels of a plan by name, loaded on the current device."""
    with _lock:
        return _load(variant, made, device, arch)
