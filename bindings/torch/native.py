"""Recurrences on PyTorch's tensors: allocates with PyTorch, turns tensors into addresses, and goes through the waist.

Operands are as in `sru_rt.passes`; `operands` brings tensors into the dtypes and layouts that kernels take. No gradient
is recorded here. What depends on shapes, dtypes and devices is worked out once for each combination.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import compile_cpu, launch, memory, passes, settings, spec, turn
from ...cell import Cell
from ...dtypes import IO_DTYPES, name_of
from ...errors import ArgumentError, CompileError, LibraryError
from ...launch import Threads
from ...passes import ARRAYS, Call, Layout, Pass, Passes, declared, shape_of_h
from ...prepared import Prepared
from ...recurrence import is_own

Operands = tuple[Any, ...]

_DTYPES = {name: getattr(torch, name) for name in IO_DTYPES}
_NUMPY = {dtype: np.dtype(name.replace("bfloat16", "int16")) for name, dtype in _DTYPES.items()}
_MOST_PLANS = 4096
_NOTHING = nullcontext()
_LARGE = 1 << 20  # bytes from which on memory is the core's
_WORTH_TURNING = 1 << 12  # numbers; below, PyTorch's own copy takes as long as a call


class Plan(NamedTuple):
    """A pass for operands of one layout."""

    prepared: Prepared
    results: Sequence[_Result | None]
    gpu: torch.device | None

    def run(self, constants: Sequence[float], tensors: Sequence[Tensor | None]) -> None:
        """Runs the pass on the operands and results, in order on PyTorch's current stream."""
        addresses = [*constants, *[0 if t is None else t.data_ptr() or _nowhere(t) for t in tensors]]
        if self.gpu is None:
            self.prepared.run(addresses)
            return
        is_current = torch.cuda.current_device() == self.gpu.index
        with _NOTHING if is_current else torch.cuda.device(self.gpu):
            self.prepared.run(addresses, _stream(self.gpu))


def _stream(gpu: torch.device) -> int:
    """PyTorch's current stream: by the function that its own compiler uses, which makes no object of it."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(gpu.index) if raw else torch.cuda.current_stream(gpu).cuda_stream)


def _gpu(tensor: Tensor) -> torch.device | None:
    """The GPU where a tensor is, None for the host."""
    return None if tensor.is_cpu else tensor.device


def _nowhere(tensor: Tensor) -> int:
    """The address of a tensor without memory, if that is as it should be."""
    if tensor.numel():
        kind = "ZeroTensor" if tensor._is_zerotensor() else type(tensor).__name__
        raise LibraryError(
            f"sru_rt: a {kind} of shape {tuple(tensor.shape)} has no memory of its own for kernels to read; pass "
            "tensors that have values, all of one kind"
        )
    return 0


class _Result(NamedTuple):
    """A tensor to allocate for a call."""

    like: Tensor  # of this shape, dtype and device; without memory for all of it
    is_large: bool  # and on the host


_plans: dict[Hashable, Any] = {}


# ----------------------------------------------------------------------------------------------------------------------
# Operands


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums beside U of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(call: Call, given: Operands) -> Operands:
    """Converts tensors to what kernels take; a gradient goes through. They are themselves if they are so already."""
    u = given[0]
    return _as(u, u.dtype), *beside_u(call, u.dtype, given[1:])


def beside_u(call: Call, dtype: torch.dtype, given: Operands) -> Operands:
    """The operands beside U of `dtype`."""
    cell = spec.cell_of(call.cell)
    c0, lengths, mask, reset, *arrays = given
    if len(arrays) != len(declared(cell)):
        names = ", ".join(a.name for a in declared(cell))
        raise ArgumentError(f"recurrence of {cell.name}: arrays has {len(arrays)} tensors; it needs {names}")
    acc = state_dtype(dtype)
    made = []
    for a, tensor in zip(declared(cell), arrays):
        own = is_own(a, name_of(tensor.dtype), name_of(dtype), str(_gpu(tensor) or "cpu"))
        made.append(_as(tensor, dtype if own else acc, rows=a.kind == "params"))
    return _as(c0, acc), _as(lengths, torch.int64), _as(mask, torch.bool), _as(reset, torch.bool), *made


def _as(tensor: Tensor | None, dtype: torch.dtype, rows: bool = False) -> Any:
    """A tensor in a dtype, contiguous; of one that is read by `rows` these are enough."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype).resolve_neg()
    tensor = tensor.clone() if tensor._is_zerotensor() else tensor  # which has no memory
    return tensor if rows and tensor.stride(-1) == 1 else tensor.contiguous()


def layout(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All that a plan depends on but the call. Tensors with the layout of operands are operands."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.is_neg()) for t in tensors])


def check(call: Call, cell: Cell, o: Operands) -> None:
    """Raises unless the operands fit the cell and each other, and are on one device."""
    function, u = passes.check(call, cell, o).function, o[0]
    names = [cell.initial, "lengths", "mask", "reset", *(a.name for a in declared(cell))]
    for name, tensor in zip(names, o[1:]):
        if tensor is not None and tensor.device != u.device:
            raise LibraryError(f"{function}: {name} is on device {tensor.device}, and u on {u.device}; move it there")


# ----------------------------------------------------------------------------------------------------------------------
# The two passes


def forward_plan(call: Call, given: Operands) -> Plan | None:
    """The plan for tensors that are operands, if such have been met before."""
    return _plans.get((call.plan, layout(*given)))


def make_forward_plan(call: Call, o: Operands) -> Plan:
    """The plan for operands."""
    return remember((call.plan, layout(*o)), _plan(_passes(call, o).forward(), o[0]))


def decodes(factor: Tensor, o: Operands) -> bool:
    """Whether a kernel forms U of operands from one token x and a weight (D, k, d, n): see `sru_rt.decode`."""
    (L, B, D, _, d), flags = o[0].shape, o[2:ARRAYS]
    plain = factor.is_contiguous() and all(flag is None for flag in flags)
    return plain and launch.decodes(name_of(o[0].dtype), (L, B, D, d), factor.shape[3], str(_gpu(o[0]) or "cpu"))


def token_plan(call: Call, o: Operands, n: int) -> Plan:
    """The plan for operands of which the kernel forms U, from x (1, B, n) and a weight."""
    return _plan(_passes(call, o).forward(n), o[0])


def forward(
    plan: Plan, constants: Sequence[float], o: Operands, *weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h (L, B, D*d), the last states, and the states that are kept for the backward, if any are.

    Beside a weight, x is in the place of U: see `token_plan`.
    """
    h, last, saved, *_ = made = _allocate(plan.results)
    plan.run(constants, [*o, *made, *weight])
    return h, last, saved


def backward(
    call: Call, o: Operands, saved: Tensor, dh: Tensor | None, dlast: Tensor | None, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the operands, None of those that `need` leaves out. dh is (L, B, D*d)."""
    key = (call.plan, layout(*o, saved, dh, dlast), need)
    plan = _plans.get(key)
    if plan is None:
        u = o[0]
        dh = u.new_zeros(shape_of_h(u.shape)) if dh is None else _as(dh, u.dtype)
        dlast, saved = _as(dlast, state_dtype(u.dtype)), saved.contiguous()
        key = (call.plan, layout(*o, saved, dh, dlast), need)
        plan = _plans.get(key)
    if plan is None:
        layouts = [_layout_of(t) for t in (saved, dh, dlast)]
        plan = remember(key, _plan(_passes(call, o).backward(*layouts, need), o[0]))
    made = _allocate(plan.results)
    found = gradients_like(o, need)
    plan.run(call.constants, [*o, saved, dh, dlast, *found, *made])
    found[1] = made[0] if need[1] else None
    return found


def gradients_like(o: Operands, need: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of U and the arrays; None for the others."""
    return [_empty_like(t) if need[i] and (not i or i >= ARRAYS) else None for i, t in enumerate(o)]


def known(key: Hashable) -> Any:
    """What has been remembered under a key, else None."""
    return _plans.get(key)


def remember(key: Hashable, plan: Any) -> Any:
    """The plan, or one that another thread was faster with."""
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    return _plans.setdefault(key, plan)


def _passes(call: Call, o: Operands) -> Passes:
    check(call, spec.cell_of(call.cell), o)
    return Passes(call, [_layout_of(t) for t in o], str(_gpu(o[0]) or "cpu"), threads=_threads())


def turned(a: Tensor) -> Tensor:
    """(..., r, c) as (..., c, r), contiguous, by the core: PyTorch's own copy takes two to four times as long."""
    *n, rows, columns = a.shape
    suits = a.is_cpu and a.element_size() == turn.ITEMSIZE and a.numel() >= _WORTH_TURNING and a.is_contiguous()
    if suits and not a.is_neg() and not a._is_zerotensor():
        found = empty(a, (*n, columns, rows))
        if turn.turn(a.data_ptr(), found.data_ptr(), prod(n), rows, columns, _threads()):
            return found
    return a.transpose(-1, -2).contiguous()


def _threads() -> Threads | None:
    """PyTorch's own threads, unless others are asked for or it has none that can be used."""
    if settings.asks_for_threads():
        return None
    openmp = _openmp()
    return Threads(openmp, torch.get_num_threads()) if openmp else None


@cache
def _openmp() -> int:
    """The address of a `parallel_for` on PyTorch's threads; 0 if it has no OpenMP, or nothing can be compiled."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return compile_cpu.openmp_pool(ctypes.CDLL(str(library)))
        except (AttributeError, CompileError, OSError):
            continue
    return 0


def _layout_of(tensor: Tensor | None) -> Layout | None:
    return None if tensor is None else Layout(tuple(tensor.shape), name_of(tensor.dtype), tensor.stride())


def _plan(prepared: Pass, u: Tensor) -> Plan:
    """A pass beside U."""
    results = [None if r is None else _result(r, u.device) for r in prepared.results]
    return Plan(prepared.prepared, results, _gpu(u))


def _result(layout: Layout, device: torch.device) -> _Result:
    dtype = _DTYPES[layout.dtype]
    is_large = device.type == "cpu" and prod(layout.shape) * dtype.itemsize >= _LARGE
    return _Result(torch.empty((), dtype=dtype, device=device).expand(layout.shape), is_large)


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised memory of a dtype and on a device, large memory on the host from the core."""
    if like.is_cpu and prod(shape) * like.element_size() >= _LARGE:
        return _large(shape, like.dtype)
    return like.new_empty(shape)


def _allocate(results: Sequence[_Result | None]) -> list[Any]:
    """Uninitialised memory for results. `empty_like` takes two thirds of the time of `new_empty`."""
    return [
        r if r is None else _large(r.like.shape, r.like.dtype) if r.is_large else torch.empty_like(r.like)
        for r in results
    ]


def _large(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that the core keeps for the next call, as fresh pages cost as much as a pass over them."""
    found = torch.from_numpy(memory.empty(shape, _NUMPY[dtype]))
    return found.view(dtype) if dtype == torch.bfloat16 else found


def _empty_like(tensor: Tensor) -> Tensor:
    """Contiguous memory, whatever the strides of a tensor, which may be a part of a larger one."""
    if tensor.is_cpu and type(tensor) is Tensor and tensor.numel() * tensor.element_size() >= _LARGE:
        return _large(tensor.shape, tensor.dtype)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
