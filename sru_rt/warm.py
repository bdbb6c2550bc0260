"""`python -m sru_rt warm`: compiles kernels into the cache on a machine that need not have a GPU.

The kernels are those that calls with the named cells, sizes and options will look for, found by the same planner.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import cache, compile_cpu, compile_gpu
from .calls import Call
from .cell import Cell
from .cells import named_cells
from .check import Check
from .dtypes import state_dtype
from .errors import ArgumentError, SruRtError
from .machine import USUAL_MULTIPROCESSORS, Device
from .options import memory_policy
from .plan import MAX_BATCHES, Plan
from .variant import Variant

_TIME_PARALLEL: dict[str, bool | str] = {"auto": "auto", "yes": True, "no": False}


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile for GPUs of an architecture such as 90, if it is not in the cache."""

    variant: Variant
    plan: Plan
    arch: int

    def __str__(self) -> str:
        p = self.plan
        kept = ("", "state kept", "some states kept")[p.keep]
        flags = {"mask": p.has_mask, "reset": p.has_reset, "scratch in shared memory": p.scratch_in_shared}
        flags |= {"rows staged there": p.staged > 0, "by pairs of warps": p.paired, "ring there": p.laps > 0}
        flags |= {"parallel over time": p.parallel, "after one that is": p.saved_in_chunks}
        flags |= {f"forms U, d_in={p.d_in}": p.d_in > 0}
        if p.input_strides and not (p.forward or p.wants_inputs):
            flags["no dx"] = True
        options = ", ".join(filter(None, (kept, *(name for name, on in flags.items() if on))))
        return (
            f"sm_{self.arch} {_describe(self.variant)} D={p.D} d={p.d} B={p.B or 'any'} "
            f"{'forward' if p.forward else 'backward'}{f' ({options})' if options else ''}: "
            f"width {p.width}, depth {p.depth}, {p.block} threads"
        )


def _describe(variant: Variant) -> str:
    acc = state_dtype(variant.dtype)
    own = f" (saved {variant.saved_dtype})" if variant.saved_dtype != acc else ""
    own += f" (parameters {variant.dtype})" if variant.narrow else ""
    return f"{variant.cell.name} {variant.dtype}{own}"


def run(options: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit status."""
    if options.list:
        sys.stdout.write("".join(f"{cell.name}\n" for cell in named_cells()))
        return 0
    try:
        _check(options)
        _fill(cache.folder(), options)
    except ArgumentError as error:
        return _fail(error, 2)
    except (SruRtError, RuntimeWarning) as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, status: int) -> int:
    text = " ".join(str(error).removeprefix("sru_rt: ").split())
    sys.stderr.write(f"sru_rt warm: {text[:1000]}\n")
    return status


def _check(options: argparse.Namespace) -> None:
    if not (options.arch or options.cpu):
        raise ArgumentError("name a GPU architecture, such as --arch sm_90, or pass --cpu")
    for name in ("cell", "dtype", "d") if options.arch else ("cell", "dtype"):
        if not getattr(options, name):
            raise ArgumentError(f"--{name} is missing; see `python -m sru_rt warm --help`")


def _fill(folder: Path, options: argparse.Namespace) -> None:
    """Compiles what is not in the cache yet, and writes a line for each kernel."""
    work: list[tuple[str, Callable[[], Any]]] = []
    if options.arch:
        work += [(str(k), functools.partial(compile_gpu.cubin, k.variant, k.plan, k.arch)) for k in kernels(options)]
    if options.cpu:
        work += _cpu_kernels(options)
    began, compiled = time.perf_counter(), 0
    for name, make in work:
        before, start = _entries(folder), time.perf_counter()
        with warnings.catch_warnings():
            # A kernel that cannot be kept is compiled again in each process, which the library only warns of.
            warnings.simplefilter("error", RuntimeWarning)
            code = make()
        is_new = bool(_entries(folder) - before)
        compiled += is_new
        count = registers(code) if isinstance(code, bytes) else None
        how = f"compiled in {time.perf_counter() - start:.2f} s" if is_new else "cached"
        sys.stdout.write(f"{name}: {how}{f', {count} registers' if count else ''}\n")
        sys.stdout.flush()
    seconds, cached = time.perf_counter() - began, len(work) - compiled
    sys.stdout.write(f"{len(work)} kernels in {folder}: {compiled} compiled, {cached} cached, {seconds:.1f} s\n")


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".cubin", ".so")}


def kernels(options: argparse.Namespace) -> list[Kernel]:
    """What is to be compiled for GPUs, each kernel once.

    Raises:
        CompileError: CuPy or NVRTC are missing, or NVRTC does not know an architecture.
        ArgumentError: an option has a value that a call would not take.
    """
    for arch in options.arch:
        compile_gpu.target(arch)
    made: dict[Kernel, None] = {}
    for device in _devices(options):
        for call in calls(options):
            for which in call.passes:
                for p in _plans(call, which, device, options.batch):
                    made[Kernel(call.variant, p, device.arch)] = None
    return list(made)


def _plans(call: Call, which: str, device: Device, batches: Sequence[int]) -> list[Plan]:
    if not batches:
        return call.general_plans(which, device)
    plans = [p for B in batches for p in call.plans(which, B, device)]
    if len(batches) > MAX_BATCHES:  # in each process, those that come last get a kernel for any batch size
        plans += [replace(p, B=0) for p in plans if not p.decodes]
    return plans


def _devices(options: argparse.Namespace) -> Iterator[Device]:
    for arch in options.arch:
        numbers: Sequence[int] = options.multiprocessors
        if not numbers:
            if arch not in USUAL_MULTIPROCESSORS:
                known = ", ".join(f"sm_{a}" for a in USUAL_MULTIPROCESSORS)
                raise ArgumentError(
                    f"how many multiprocessors a GPU of sm_{arch} has is not known here, only for {known}: "
                    "pass --multiprocessors"
                )
            numbers = (USUAL_MULTIPROCESSORS[arch],)
        for n in numbers:
            yield Device(arch, n)


def calls(options: argparse.Namespace) -> Iterator[Call]:
    """The calls that the options describe."""
    policies = [memory_policy(Check("sru_rt warm"), save) for save in options.save]
    combinations = itertools.product(
        _cells(options.cell), options.dtype, options.directions, options.d, options.length, policies, options.d_in
    )
    for cell, dtype, D, d, L, every, d_in in combinations:
        yield Call(
            cell,
            dtype,
            D,
            d,
            every=min(every, L),
            saved_dtype=_saved_dtype(options, dtype),
            has_mask=options.mask,
            has_reset=options.reset,
            wants_x=not options.no_dx,
            L=L,
            time_parallel=_TIME_PARALLEL[options.time_parallel],
            d_in=d_in,
            wide_params=options.param_dtype == "state",
        )


def _saved_dtype(options: argparse.Namespace, dtype: str) -> str:
    return dtype if options.saved_dtype == "x" else state_dtype(dtype)


def _cells(names: Sequence[str]) -> list[Cell]:
    known = {cell.name: cell for cell in named_cells()}
    for name in names:
        if name not in known:
            raise ArgumentError(f"--cell must be one of {', '.join(known)} (got {name!r})")
    return [known[name] for name in dict.fromkeys(names)]


def _cpu_kernels(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    compile_cpu.compiler()
    yield "CPU thread pool", compile_cpu.pool
    for cell, dtype in itertools.product(_cells(options.cell), options.dtype):
        v = Variant(cell, dtype, _saved_dtype(options, dtype))
        yield f"CPU {_describe(v)}", functools.partial(compile_cpu.kernel, cell, dtype, v.saved_dtype, v.wide)


def registers(code: bytes) -> int | None:
    """Registers of the kernel that takes most, as the machine code itself says; None where that is not understood.

    A section `.nv.info` holds attributes: format (1 byte), kind (1), size or value (2), and for format 4 `size` bytes
    more, which for kind 0x2f are the number of a symbol and its registers (4 each).
    """
    try:
        data, found, at = _section(code, b".nv.info"), [0], 0
        while at + 4 <= len(data):
            form, kind, size = struct.unpack_from("<BBH", data, at)
            if (form, kind) == (4, 0x2F):
                found.append(struct.unpack_from("<II", data, at + 4)[1])
            at += 4 + (size if form == 4 else 0)
        return max(found) or None
    except (struct.error, ValueError, IndexError):
        return None


def _section(elf: bytes, name: bytes) -> bytes:
    """The content of a section of a 64-bit ELF file. Raises ValueError, struct.error or IndexError without it."""
    if elf[:4] != b"\x7fELF":
        raise ValueError("no ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, of_names = struct.unpack_from("<3H", elf, 58)
    elf += b"\0" * 8  # of the last section header, which CuPy's copy lacks the last byte of
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[of_names][4] + header[0]
        if elf[start : elf.index(b"\0", start)] == name:
            return elf[header[4] : header[4] + header[5]]
    raise ValueError(f"no section {name!r}")
