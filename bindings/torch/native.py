"""Recurrences on PyTorch's tensors: allocates with PyTorch, turns tensors into addresses, and goes through the waist.

The operands of a recurrence are a tuple (u, c0, lengths, mask, reset, *arrays), where `arrays` are what the cell
declares beside gates and states, and all but u and arrays may be None. U is (L, B, D, k, d), states are (D, B, d), or
(n, D, B, d) for a cell with n > 1 of them. `operands` brings them into the dtypes and layouts that kernels take.

No gradient is recorded here. What depends on shapes, dtypes and devices is worked out once for each combination.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import abi, chunks, launch, memory, spec
from ...cell import Array, Cell
from ...check import Check
from ...dtypes import IO_DTYPES
from ...errors import ArgumentError, DtypeError, LibraryError, ShapeError
from ...prepared import Prepared, place
from ...variant import Variant

Operands = tuple[Any, ...]

ARRAYS = 5  # where the arrays begin among the operands

_DTYPES = {getattr(torch, name): name for name in IO_DTYPES}
_ROW_PADDING = 80  # so that rows of partial sums do not all begin at the same place of a page
_MOST_PLANS = 4096
_LARGE = 1 << 20  # bytes from which on memory is the core's


class Call(NamedTuple):
    """All of a recurrence that is no tensor.

    `cell` is a text of `spec`. If states are to be kept for the backward, they are those before steps 0, K, 2K, ...
    with `every` = K.
    """

    cell: str
    constants: tuple[float, ...] = ()
    every: int = 1
    time_parallel: str = "auto"  # or "True", "False"
    keep: bool = True

    @property
    def plan(self) -> Hashable:
        """What a plan depends on: of constants, how many there are."""
        return self.cell, len(self.constants), self.every, self.time_parallel, self.keep


class Plan(NamedTuple):
    """A pass for operands of one layout."""

    prepared: Prepared
    results: Sequence[_Result | None]
    gpu: torch.device | None

    def run(self, constants: tuple[float, ...], *tensors: Tensor | None) -> None:
        """Runs the pass on the operands and results, in order on PyTorch's current stream."""
        addresses = [*constants, *[0 if t is None else t.data_ptr() or _nowhere(t) for t in tensors]]
        if self.gpu is None:
            self.prepared.run(addresses)
            return
        with torch.cuda.device(self.gpu):
            self.prepared.run(addresses, int(torch.cuda.current_stream(self.gpu).cuda_stream))


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

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for that of U: to name it would cost as much again
    is_large: bool  # and on the host


_plans: dict[Hashable, Plan] = {}


# ----------------------------------------------------------------------------------------------------------------------
# Operands


@cache
def declared(cell: Cell) -> tuple[Array, ...]:
    """What the arrays among the operands are."""
    return tuple(a for a in cell.arrays if a.kind not in ("gates", "state"))


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
        own = a.kind == "inputs" and tensor.dtype in (dtype, torch.bool)
        made.append(_as(tensor, dtype if own else acc, rows=a.kind == "params"))
    return _as(c0, acc), _as(lengths, torch.int64), _as(mask, torch.bool), _as(reset, torch.bool), *made


def _as(tensor: Tensor | None, dtype: torch.dtype, rows: bool = False) -> Any:
    """A tensor in a dtype, contiguous; of one that is read by `rows` these are enough."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype).resolve_neg()
    tensor = tensor.clone() if tensor._is_zerotensor() else tensor  # which has no memory
    return tensor if rows and tensor.stride(-1) == 1 else tensor.contiguous()


def layout(*tensors: Tensor | None) -> Hashable:
    """All that a plan depends on but the call. Tensors with the layout of operands are operands."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.is_neg()) for t in tensors])


def check(call: Call, cell: Cell, o: Operands) -> Check:
    """Raises unless the operands fit the cell and each other; returns their sizes."""
    found, u = Check(f"recurrence of {cell.name}"), o[0]
    found.shape("u", u, "L B D k d")
    if found["k"] != len(cell.gates):
        raise ShapeError(
            f"{found.function}: u has k = {found['k']} gates, shape {tuple(u.shape)}; it needs {len(cell.gates)}: "
            f"{', '.join(cell.gates)}"
        )
    if found["D"] not in (1, 2):
        raise ShapeError(f"{found.function}: u has D = {found['D']} directions; D is 1 (forward) or 2")
    if u.dtype not in _DTYPES:
        raise DtypeError(f"{found.function}: u has dtype {u.dtype}; it needs one of {', '.join(IO_DTYPES)}")
    axes = [" ".join(map(str, shape_of_state(cell, "D", "B", "d"))), "B", "L B", "L B"]
    names = [cell.initial, "lengths", "mask", "reset"]
    named = [*zip(names, axes), *((a.name, a.axes) for a in declared(cell))]
    for (name, its_axes), tensor in zip(named, o[1:]):
        if tensor is not None:
            found.shape(name, tensor, its_axes)
            if tensor.device != u.device:
                raise LibraryError(
                    f"{found.function}: {name} is on device {tensor.device}, and u on {u.device}; move it there"
                )
    if len(call.constants) != len(cell.constants):
        raise ArgumentError(
            f"{found.function}: constants has {len(call.constants)} numbers; it needs {len(cell.constants)}"
            f"{': ' if cell.constants else ''}{', '.join(cell.constants)}"
        )
    return found


def shape_of_state(cell: Cell, *axes: Any) -> tuple[Any, ...]:
    """Of all states, which have the given axes each."""
    n = len(cell.state)
    return axes if n == 1 else (n, *axes)


def kept(call: Call, L: Any) -> Any:
    """The number of states that are kept for the backward."""
    return -(-L // call.every) if call.keep else 0


# ----------------------------------------------------------------------------------------------------------------------
# The two passes


def forward_plan(call: Call, given: Operands) -> Plan | None:
    """The plan for tensors that are operands, if such have been met before."""
    return _plans.get((call.plan, layout(*given)))


def make_forward_plan(call: Call, o: Operands) -> Plan:
    """The plan for operands."""
    return _remember((call.plan, layout(*o)), _Sizes(call, o).forward())


def forward(plan: Plan, call: Call, o: Operands) -> tuple[Tensor, Tensor, Tensor | None]:
    """h (L, B, D*d), the last states, and the states that are kept for the backward, if any are."""
    h, last, saved, *_ = made = _allocate(o[0], plan.results)
    plan.run(call.constants, *o, *made)
    return h, last, saved


def backward(
    call: Call, o: Operands, saved: Tensor, dh: Tensor | None, dlast: Tensor | None, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of the operands, None of those that `need` leaves out. dh is (L, B, D*d)."""
    key = (call.plan, layout(*o, saved, dh, dlast), need)
    plan = _plans.get(key)
    if plan is None:
        u = o[0]
        dh = u.new_zeros(shape_of_h(u)) if dh is None else _as(dh, u.dtype)
        dlast, saved = _as(dlast, state_dtype(u.dtype)), saved.contiguous()
        key = (call.plan, layout(*o, saved, dh, dlast), need)
        plan = _plans.get(key) or _remember(key, _Sizes(call, o).backward(saved, dh, dlast, need))
    made = _allocate(o[0], plan.results)
    found = gradients_like(o, need)
    plan.run(call.constants, *o, saved, dh, dlast, *found, *made)
    found[1] = made[0] if need[1] else None
    return found


def shape_of_h(u: Tensor) -> tuple[Any, ...]:
    L, B, D, _, d = u.shape
    return L, B, D * d


def gradients_like(o: Operands, need: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of U and the arrays; None for the others."""
    return [_empty_like(t) if need[i] and (not i or i >= ARRAYS) else None for i, t in enumerate(o)]


def _remember(key: Hashable, plan: Plan) -> Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    return _plans.setdefault(key, plan)


class _Sizes:
    """What both plans of a call need to know."""

    def __init__(self, call: Call, o: Operands) -> None:
        cell = spec.cell_of(call.cell)
        sizes = check(call, cell, o)
        self.call, self.o, self.cell = call, o, cell
        self.L, self.B, self.D, self.d = self.shape = tuple(sizes[axis] for axis in "LBDd")
        u = o[0]
        self.acc, self.gpu = state_dtype(u.dtype), _gpu(u)
        self.device = str(self.gpu or "cpu")
        self.variant = Variant(cell, _DTYPES[u.dtype], _DTYPES[self.acc], self._wide())
        self.forward_chunk = self._chunk(forward=True)
        self.n, self.kept = len(cell.state), kept(call, self.L)
        self.check = sizes

    def forward(self) -> Plan:
        cell, (L, B, D, d) = self.cell, self.shape
        results: list[_Result | None] = [
            self._result((L, B, D * d), self.o[0].dtype),
            self._result(shape_of_state(cell, D, B, d), self.acc),
            self._result(shape_of_state(cell, self.kept, B, D, d), self.acc) if self.call.keep else None,
            *self._carry(self.forward_chunk),
        ]
        at = self._places(len(self.o) + len(results))
        h, c_last, saved = at[len(self.o) :][:3]
        arguments = abi.Forward(
            given=self._given(at, self.forward_chunk),
            h=h,
            c_last=self._each(c_last, D * B * d),
            saved=self._each(saved if self.call.keep else 0, self.kept * B * D * d),
        )
        return Plan(Prepared(self.variant, arguments, self.device), results, self.gpu)

    def backward(self, saved: Tensor, dh: Tensor, dlast: Tensor | None, need: tuple[bool, ...]) -> Plan:
        cell, (L, B, D, d), every = self.cell, self.shape, self.call.every
        self.check.shape("saved", saved, " ".join(map(str, shape_of_state(cell, self.kept, B, D, d))))
        self.check.shape("dh", dh, f"L B {D * d}")
        chunk = self._chunk(forward=False)
        count = chunks.count(L, chunk) if chunk else 1
        scratch = launch.needs_scratch(self.variant, every, self.device)
        rows = (count * min(every, chunk) if chunk else every) if scratch else 0
        sums, row = len(cell.params), d + (_ROW_PADDING if self.device == "cpu" else 0)
        results: list[_Result | None] = [
            self._result(shape_of_state(cell, D, B, d), self.acc),
            self._result((count, B, D, sums + (len(cell.per_sequence) if chunk else 0), row), self.acc),
            self._result((self.n, rows, B, D, d), self.acc) if scratch else None,
            *self._carry(chunk),
        ]
        n = len(self.o)
        at = self._places(2 * n + 3 + len(results))
        p_saved, p_dh, p_dlast = at[n : n + 3]
        wanted = [p if needed else 0 for p, needed in zip(at[n + 3 :], need)]
        dc0, partial, states = at[2 * n + 3 :][:3]
        slots = self._slots(wanted, gradients=True)
        arguments = abi.Backward(
            given=self._given(at, chunk),
            dh=p_dh,
            dc_last=self._each(0 if dlast is None else p_dlast, D * B * d),
            saved=self._each(p_saved, self.kept * B * D * d),
            states=self._each(states if scratch else 0, rows * B * D * d),
            partial=abi.Slot(partial, row),
            dgates=slots["gates"],
            dinputs=slots["inputs"],
            dper_sequence=slots["per_sequence"],
            dparams=slots["params"],
            dc0=self._each(dc0, D * B * d),
            saved_chunk=self.forward_chunk,
        )
        return Plan(Prepared(self.variant, arguments, self.device), results, self.gpu)

    def _places(self, n: int) -> list[int]:
        """Of operands and results; constants come before them."""
        first = len(self.call.constants)
        return [place(first + i) for i in range(n)]

    def _wide(self) -> int:
        """Bit i says that input i of every step is in the dtype of the state."""
        found, i = 0, 0
        for a, tensor in zip(declared(self.cell), self.o[ARRAYS:]):
            if a.kind == "inputs":
                for _ in a.members:
                    found |= (tensor.dtype != self.o[0].dtype) << i
                    i += 1
        return found

    def _chunk(self, forward: bool) -> int:
        """Steps of the chunks of time of one pass.

        The number of kept states is to depend on L alone, as a traced program must know it: a forward whose chunks hold
        no whole number of `every` steps takes all steps in order.
        """
        call = self.call
        time_parallel = {"True": True, "False": False}.get(call.time_parallel, call.time_parallel)
        found = launch.chunk(self.variant, self.shape, forward, time_parallel, self.device)
        return 0 if forward and found % call.every else found

    def _result(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Result:
        is_large = self.gpu is None and prod(shape) * dtype.itemsize >= _LARGE
        return _Result(shape, None if dtype == self.o[0].dtype else dtype, is_large)

    def _carry(self, chunk: int) -> list[_Result]:
        """Scratch for what chunks of time leave to each other; the last of the results."""
        if not chunk:
            return []
        return [self._result((chunks.count(self.L, chunk), self.n * (self.n + 1), *self.shape[1:]), self.acc)]

    def _each(self, address: int, elements: int) -> list[int]:
        """The addresses of the states that follow upon each other."""
        return [address + i * elements * self.acc.itemsize if address else 0 for i in range(self.n)]

    def _given(self, at: list[int], chunk: int) -> abi.Given:
        slots = self._slots(at)
        c0, lengths, mask, reset = (0 if t is None else p for t, p in zip(self.o[1:ARRAYS], at[1:]))
        return abi.Given(
            L=self.L,
            B=self.B,
            D=self.D,
            d=self.d,
            every=self.call.every if self.call.keep else 0,
            lengths=lengths,
            mask=mask,
            reset=reset,
            gates=slots["gates"],
            inputs=slots["inputs"],
            per_sequence=slots["per_sequence"],
            params=slots["params"],
            c0=self._each(c0, self.D * self.B * self.d),
            constants=[place(i) for i in range(len(self.call.constants))],  # they are given at each run
            chunk=chunk,
            carry=at[-1] if chunk else 0,
        )

    def _slots(self, at: Sequence[int], gradients: bool = False) -> dict[str, list[abi.Slot]]:
        """A slot for each value of the step function, of U and the arrays at the addresses `at`, or their gradients."""
        found: dict[str, list[abi.Slot]] = {kind: [] for kind in ("gates", "inputs", "per_sequence", "params")}
        gates = next(a for a in self.cell.arrays if a.kind == "gates")
        named = [(gates, self.o[0], at[0]), *zip(declared(self.cell), self.o[ARRAYS:], at[ARRAYS:])]
        for a, tensor, address in named:
            n, d = len(a.members), self.d
            own_rows = a.kind == "params" and not gradients
            between, row = (tensor.stride(1), tensor.stride(0)) if own_rows else (d, n * d)
            for i in range(n):
                slot = abi.Slot(address + i * between * tensor.element_size(), row) if address else abi.NOT_WANTED
                found[a.kind].append(slot)
        return found


def _allocate(u: Tensor, results: Sequence[_Result | None]) -> list[Any]:
    return [r if r is None else _empty(u, r.shape, r.dtype, r.is_large) for r in results]


def _empty(u: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, is_large: bool) -> Tensor:
    if is_large:  # in memory that the core keeps for the next call, as fresh pages cost as much as a pass over them
        dtype = dtype or u.dtype
        block = memory.empty((prod(shape) * dtype.itemsize,), np.dtype(np.uint8))
        return torch.from_numpy(block).view(dtype).view(shape)
    return u.new_empty(shape) if dtype is None else u.new_empty(shape, dtype=dtype)


def _empty_like(tensor: Tensor) -> Tensor:
    """Contiguous memory, whatever the strides of a tensor, which may be a part of a larger one."""
    if tensor.is_cpu and type(tensor) is Tensor and tensor.numel() * tensor.element_size() >= _LARGE:
        return _empty(tensor, tuple(tensor.shape), None, True)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
