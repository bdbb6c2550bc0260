"""Runs recurrences on a GPU through CuPy: plans, loads kernels on the device, and launches them on a stream."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import abi, compile_gpu, plan, settings
from .errors import LibraryError
from .plan import Device, Plan
from .variant import Variant

_Function = Callable[..., None]

# What a driver says of code that it does not take.
_REFUSALS = ("INVALID_IMAGE", "NO_BINARY_FOR_GPU", "UNSUPPORTED", "INVALID_PTX", "INVALID_SOURCE")

_lock = threading.Lock()
_launches: dict[Hashable, _Launch] = {}


class _Launch(NamedTuple):
    """A planned pass on one device, but for its addresses."""

    sweep: _Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes
    sum_partials: _Function | None
    struct: np.dtype[Any]  # of the arguments, as one value


class _Stream(NamedTuple):
    ptr: int


def run(variant: Variant, arguments: abi.Forward | abi.Backward, device: int, stream: int) -> None:
    """Launches one pass on `stream` of GPU number `device`, which must be the current one. Does not wait.

    Raises:
        CompileError: CuPy or NVRTC are missing, or do not know the GPU.
        LibraryError: the GPU's driver refuses the code, or the arrays or sizes are beyond what a kernel takes.
    """
    key = _key(variant, arguments, device)
    launch = _launches.get(key) or _launches.setdefault(key, _prepare(variant, arguments, device))
    values = (np.frombuffer(abi.pack(variant.cell, arguments), launch.struct),)
    on = _Stream(stream)
    if arguments.given.B:
        launch.sweep(launch.grid, launch.block, values, shared_mem=launch.shared, stream=on)
    if launch.sum_partials is not None:
        given = arguments.given
        launch.sum_partials((-(-given.d // 32), len(given.params), given.D), (32, 8, 1), values, stream=on)


def _key(variant: Variant, arguments: abi.Forward | abi.Backward, device: int) -> Hashable:
    """All that the plan depends on; neither L (but whether it is 1) nor addresses, only how they are aligned."""
    g = arguments.given
    together, apart, single = [g.gates], [*g.inputs], [*arguments.saved]
    wanted: tuple[bool, ...] = ()
    if isinstance(arguments, abi.Backward):
        together.append(arguments.dgates)
        apart += arguments.dinputs
        single += [arguments.dh, *arguments.states]
        wanted = tuple([s.pointer != 0 for s in (*arguments.dgates, *arguments.dinputs, *arguments.dparams)])
    else:
        single.append(arguments.h)
    places = [(s.pointer - slots[0].pointer, s.stride) for slots in together for s in slots]
    places += [(slots[0].pointer % 16, 0) for slots in together]
    places += [(s.pointer % 16, s.stride) for s in apart]
    places += [(pointer % 16, 0) for pointer in single]
    sizes = (g.L == 1, g.L >> 31, g.B, g.D, g.d, g.every)
    return device, variant, sizes, g.mask != 0, g.reset != 0, tuple(places), wanted, settings.plan_text()


def _prepare(variant: Variant, arguments: abi.Forward | abi.Backward, device: int) -> _Launch:
    given = arguments.given
    facts = device_facts(device)
    made = _cached_if_any(variant, plan.plan(variant, arguments, facts), facts.arch)
    sums = isinstance(arguments, abi.Backward) and any(slot.pointer for slot in arguments.dparams)
    functions = load(variant, made, device, facts.arch)
    return _Launch(
        sweep=functions[0],
        grid=made.grid(given.B),
        block=(made.threads, 1, 1),
        shared=plan.shared_bytes(variant, made, given.every),
        sum_partials=functions[1] if sums else None,
        struct=np.dtype((np.void, abi.layout(variant.cell, made.forward).size)),
    )


def _cached_if_any(variant: Variant, made: Plan, arch: int) -> Plan:
    """The plan, for any batch size if that kernel has been compiled and the one for this batch size has not."""
    general = replace(made, B=0)
    if made.B and compile_gpu.is_cached(variant, general, arch) and not compile_gpu.is_cached(variant, made, arch):
        return general
    return made


@functools.cache
def device_facts(device: int) -> Device:
    """What the planner asks of GPU number `device`."""
    import cupy

    found = cupy.cuda.Device(device)
    return Device(int(found.compute_capability), int(found.attributes["MultiProcessorCount"]))


@functools.cache
def _load(variant: Variant, made: Plan, device: int, arch: int) -> Sequence[_Function]:
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
    names = ("forward",) if made.forward else ("backward", "sum_partials")
    return [module.get_function(name) for name in names]


def load(variant: Variant, made: Plan, device: int, arch: int) -> Sequence[_Function]:
    """The kernels of a plan, loaded on the current device: the sweep, and of a backward `sum_partials`."""
    with _lock:
        return _load(variant, made, device, arch)
