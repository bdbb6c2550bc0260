"""Recurrences on PyTorch's tensors: allocates with PyTorch, turns tensors into addresses, and goes through the waist.

No gradient is recorded here. What depends on shapes, dtypes and devices is worked out once for each combination.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import abi, chunks, launch, spec
from ...cell import Array, Cell
from ...check import Check
from ...dtypes import IO_DTYPES
from ...errors import ArgumentError, DtypeError, LibraryError, ShapeError
from ...prepared import Prepared, place
from ...variant import Variant

DTYPES = {getattr(torch, name): name for name in IO_DTYPES}

# Between the rows of partial sums, so that they do not all begin at the same place of a page.
_ROW_PADDING = 80
_MOST_PLANS = 4096

_plans: dict[Hashable, Any] = {}


class Call(NamedTuple):
    """All of a recurrence that is no tensor.

    `cell` is a text of `spec`. `every` = K keeps the state before steps 0, K, 2K, ... for the backward, 0 none.
    """

    cell: str
    constants: tuple[float, ...] = ()
    every: int = 0
    time_parallel: str = "auto"  # or "True", "False"


class Operands(NamedTuple):
    """The tensors of a recurrence, in the dtypes and layouts that kernels take (see `operands`).

    `arrays` are those that the cell declares, without gates and states, in their order. States are (D, B, d), or
    (n, D, B, d) if a cell has n > 1.
    """

    u: Tensor
    arrays: tuple[Tensor, ...]
    c0: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None


@cache
def declared(cell: Cell) -> tuple[Array, ...]:
    """What `Operands.arrays` holds."""
    return tuple(a for a in cell.arrays if a.kind not in ("gates", "state"))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums beside U of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(
    cell: Cell,
    u: Tensor,
    arrays: Sequence[Tensor],
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Operands:
    """Converts tensors to what kernels take; a gradient goes through. They are themselves if they are so already."""
    io, acc = u.dtype, state_dtype(u.dtype)
    if len(arrays) != len(declared(cell)):
        names = ", ".join(a.name for a in declared(cell))
        raise ArgumentError(f"recurrence of {cell.name}: arrays has {len(arrays)} tensors; it needs {names}")
    made = []
    for a, tensor in zip(declared(cell), arrays):
        own = a.kind == "inputs" and tensor.dtype in (io, torch.bool)
        tensor = tensor.to(io if own else acc)
        rows = a.kind == "params" and tensor.stride(-1) == 1 and 0 not in tensor.stride()
        made.append(tensor if rows else tensor.contiguous())
    return Operands(
        u.contiguous(),
        tuple(made),
        None if c0 is None else c0.to(acc).contiguous(),
        None if lengths is None else lengths.to(torch.int64).contiguous(),
        None if mask is None else mask.to(torch.bool).contiguous(),
        None if reset is None else reset.to(torch.bool).contiguous(),
    )


def forward(call: Call, o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """h (L, B, D, d), the last states, and the states that are kept for the backward."""
    key = ("forward", call, _layout(o))
    plan: _Plan = _plans.get(key) or _remember(key, _forward_plan(call, o))
    h, c_last, saved, *scratch = (_empty(s, dtype, o.u.device) for s, dtype in plan.results)
    plan.run(o, (h, c_last, saved, *scratch))
    return h, c_last, saved


def backward(
    call: Call, o: Operands, saved: Tensor, dh: Tensor | None, dc_last: Tensor | None, need: Sequence[bool]
) -> list[Tensor]:
    """The gradients of U, the arrays and c0, of which `need` says in this order which are wanted."""
    if dh is None:
        dh = o.u.new_zeros(shape_of_h(o.u))
    dh = dh.to(o.u.dtype).contiguous()
    if dc_last is not None:
        dc_last = dc_last.to(state_dtype(o.u.dtype)).contiguous()
    key = ("backward", call, _layout(o), dc_last is None, tuple(need), saved.shape, dh.shape)
    plan: _Plan = _plans.get(key) or _remember(key, _backward_plan(call, o, saved, dh, dc_last, need))
    made = [_empty(s, dtype, o.u.device) for s, dtype in plan.results]
    wanted = gradients_like(o, need)
    plan.run(o, (saved, dh, dc_last, *wanted, *made))
    return [g for g, is_wanted in zip((*wanted, made[0]), need) if is_wanted and g is not None]


def gradients_like(o: Operands, need: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of U and the arrays, laid out as these are; None where it is not wanted."""
    return [_empty_like(t) if is_wanted else None for t, is_wanted in zip((o.u, *o.arrays), need)]


def shape_of_h(u: Tensor) -> tuple[Any, ...]:
    L, B, D, _, d = u.shape
    return L, B, D, d


def shape_of_state(cell: Cell, *axes: Any) -> tuple[Any, ...]:
    """Of one or all states, which have the given axes each."""
    n = len(cell.state)
    return axes if n == 1 else (n, *axes)


def kept(call: Call, L: Any) -> Any:
    """The number of states that are kept for the backward."""
    return -(-L // call.every) if call.every else 0


def check(call: Call, cell: Cell, o: Operands) -> Check:
    """Raises unless the operands fit the cell and each other; returns their sizes."""
    found = Check(f"recurrence of {cell.name}")
    found.shape("u", o.u, "L B D k d")
    gates = cell.gates
    if found["k"] != len(gates):
        raise ShapeError(
            f"{found.function}: u has k = {found['k']} gates, shape {tuple(o.u.shape)}; it needs {len(gates)}: "
            f"{', '.join(gates)}"
        )
    if found["D"] not in (1, 2):
        raise ShapeError(f"{found.function}: u has D = {found['D']} directions; D is 1 (forward) or 2")
    if o.u.dtype not in DTYPES:
        raise DtypeError(f"{found.function}: u has dtype {o.u.dtype}; it needs one of {', '.join(IO_DTYPES)}")
    named: list[tuple[str, Tensor | None, str]] = [(a.name, t, a.axes) for a, t in zip(declared(cell), o.arrays)]
    n = len(cell.state)
    named += [(cell.initial, o.c0, "D B d" if n == 1 else f"{n} D B d"), ("lengths", o.lengths, "B")]
    named += [("mask", o.mask, "L B"), ("reset", o.reset, "L B")]
    for name, tensor, axes in named:
        if tensor is not None:
            found.shape(name, tensor, axes)
            if tensor.device != o.u.device:
                raise LibraryError(
                    f"{found.function}: {name} is on device {tensor.device}, and u on {o.u.device}; move it there"
                )
    if len(call.constants) != len(cell.constants):
        raise ArgumentError(
            f"{found.function}: constants has {len(call.constants)} numbers; it needs {', '.join(cell.constants)}"
        )
    return found


class _Plan(NamedTuple):
    prepared: Prepared
    results: Sequence[tuple[tuple[int, ...], torch.dtype]]  # what is allocated for a call
    run_on: Callable[[Tensor], AbstractContextManager[Any]]

    def run(self, o: Operands, others: Sequence[Tensor | None]) -> None:
        tensors = (o.u, *o.arrays, o.c0, o.lengths, o.mask, o.reset, *others)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        with self.run_on(o.u):
            self.prepared.run(addresses, stream_of(o.u))


def _remember(key: Hashable, plan: _Plan) -> _Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    return _plans.setdefault(key, plan)


def _layout(o: Operands) -> Hashable:
    """All that a plan depends on but the call."""
    shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in (o.u, *o.arrays)]
    return (*shapes, *((None if t is None else (t.shape, t.device)) for t in o[2:]))


def _variant(cell: Cell, o: Operands) -> Variant:
    wide, i = 0, 0
    for a, tensor in zip(declared(cell), o.arrays):
        if a.kind == "inputs":
            for _ in a.members:
                wide |= (tensor.dtype != o.u.dtype) << i
                i += 1
    return Variant(cell, DTYPES[o.u.dtype], DTYPES[state_dtype(o.u.dtype)], wide)


def _forward_plan(call: Call, o: Operands) -> _Plan:
    cell = spec.cell_of(call.cell)
    sizes = check(call, cell, o)
    L, B, D, d = (sizes[axis] for axis in "LBDd")
    acc, device, variant = state_dtype(o.u.dtype), device_of(o.u), _variant(cell, o)
    chunk = _chunk(call, variant, (L, B, D, d), True, device)
    n = len(cell.state)
    results = [
        ((L, B, D, d), o.u.dtype),
        (shape_of_state(cell, D, B, d), acc),
        (shape_of_state(cell, kept(call, L), B, D, d), acc),
        *_carry(n, chunk, (L, B, D, d), acc),
    ]
    at = _places(o, len(results))
    h, c_last, saved = at[-len(results) :][:3]
    size = acc.itemsize
    arguments = abi.Forward(
        given=_given(call, cell, o, at, (L, B, D, d), chunk),
        h=h,
        c_last=[c_last + i * D * B * d * size for i in range(n)],
        saved=[(saved + i * kept(call, L) * B * D * d * size) if call.every else 0 for i in range(n)],
    )
    return _Plan(Prepared(variant, arguments, device), results, _on_device(o.u))


def _backward_plan(
    call: Call, o: Operands, saved: Tensor, dh: Tensor, dc_last: Tensor | None, need: Sequence[bool]
) -> _Plan:
    cell = spec.cell_of(call.cell)
    sizes = check(call, cell, o)
    L, B, D, d = shape = tuple(sizes[axis] for axis in "LBDd")
    acc, device, variant = state_dtype(o.u.dtype), device_of(o.u), _variant(cell, o)
    n, every = len(cell.state), call.every
    sizes.shape("saved", saved, " ".join(map(str, shape_of_state(cell, kept(call, L), B, D, d))))
    sizes.shape("dh", dh, "L B D d")
    chunk = _chunk(call, variant, shape, False, device)
    count = chunks.count(L, chunk) if chunk else 1
    rows = count * min(every, chunk) if chunk else every
    scratch = launch.needs_scratch(variant, every, device)
    sums = len(cell.params) + (len(cell.per_sequence) if chunk else 0)
    row = d + (_ROW_PADDING if device == "cpu" else 0)
    results = [
        (shape_of_state(cell, D, B, d), acc),
        ((count, B, D, sums, row), acc),
        ((n, rows if scratch else 0, B, D, d), acc),
        *_carry(n, chunk, shape, acc),
    ]
    n_wanted = 1 + len(o.arrays)
    at = _places(o, 3 + n_wanted + len(results))
    first = len(at) - len(results) - n_wanted - 3
    p_saved, p_dh, p_dc_last = at[first : first + 3]
    wanted = [p if is_wanted else 0 for p, is_wanted in zip(at[first + 3 :], need[:n_wanted])]
    dc0, partial, states = at[first + 3 + n_wanted :][:3]
    one, size = D * B * d * acc.itemsize, acc.itemsize
    slots = _slots_by_kind(cell, o, wanted)
    arguments = abi.Backward(
        given=_given(call, cell, o, at, shape, chunk),
        dh=p_dh,
        dc_last=[0 if dc_last is None else p_dc_last + i * one for i in range(n)],
        saved=[p_saved + i * kept(call, L) * B * D * d * size for i in range(n)],
        states=[states + i * rows * B * D * d * size if scratch else 0 for i in range(n)],
        partial=abi.Slot(partial, row),
        dgates=slots["gates"],
        dinputs=slots["inputs"],
        dper_sequence=slots["per_sequence"],
        dparams=slots["params"],
        dc0=[dc0 + i * one for i in range(n)],
        saved_chunk=_chunk(call, variant, shape, True, device),
    )
    return _Plan(Prepared(variant, arguments, device), results, _on_device(o.u))


def _chunk(call: Call, variant: Variant, sizes: tuple[int, ...], forward: bool, device: str) -> int:
    """Steps of the chunks of time of one pass.

    The number of kept states is to depend on L alone, as a traced program must know it: a forward whose chunks hold no
    whole number of `every` steps takes all steps in order.
    """
    time_parallel = {"True": True, "False": False}.get(call.time_parallel, call.time_parallel)
    found = launch.chunk(variant, sizes, forward, time_parallel, device)  # type: ignore[arg-type]
    return 0 if forward and call.every and found % call.every else found


def _carry(n: int, chunk: int, sizes: tuple[int, ...], acc: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Scratch for what chunks of time leave to each other."""
    L, B, D, d = sizes
    return [((chunks.count(L, chunk), n * (n + 1), B, D, d), acc)] if chunk else []


def _places(o: Operands, others: int) -> list[int]:
    return [place(i) for i in range(5 + len(o.arrays) + others)]


def _given(call: Call, cell: Cell, o: Operands, at: list[int], sizes: tuple[int, ...], chunk: int) -> abi.Given:
    L, B, D, d = sizes
    n = 1 + len(o.arrays)
    slots = _slots_by_kind(cell, o, at[:n])
    c0, lengths, mask, reset = (0 if t is None else p for t, p in zip(o[2:], at[n:]))
    one = D * B * d * state_dtype(o.u.dtype).itemsize
    return abi.Given(
        L=L,
        B=B,
        D=D,
        d=d,
        every=call.every,
        lengths=lengths,
        mask=mask,
        reset=reset,
        gates=slots["gates"],
        inputs=slots["inputs"],
        per_sequence=slots["per_sequence"],
        params=slots["params"],
        c0=[c0 + i * one if c0 else 0 for i in range(len(cell.state))],
        constants=call.constants,
        chunk=chunk,
        carry=at[-1] if chunk else 0,
    )


def _slots_by_kind(cell: Cell, o: Operands, at: Sequence[int]) -> dict[str, list[abi.Slot]]:
    """A slot for each value of the step function that is in U or an array, which are at the addresses `at`."""
    found: dict[str, list[abi.Slot]] = {kind: [] for kind in ("gates", "inputs", "per_sequence", "params")}
    gates = next(a for a in cell.arrays if a.kind == "gates")
    for a, tensor, address in zip((gates, *declared(cell)), (o.u, *o.arrays), at):
        n, d = len(a.members), tensor.shape[-1]
        between, row = (tensor.stride(1), tensor.stride(0)) if a.kind == "params" else (d, n * d)
        for i in range(n):
            slot = abi.Slot(address + i * between * tensor.element_size(), row) if address else abi.NOT_WANTED
            found[a.kind].append(slot)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a device is asked


def device_of(tensor: Tensor) -> str:
    """As `launch.run` takes it."""
    return "cpu" if tensor.is_cpu else f"cuda:{tensor.device.index}"


def stream_of(tensor: Tensor) -> int:
    """The stream that PyTorch is on, on the device of a tensor."""
    return 0 if tensor.is_cpu else int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _on_device(tensor: Tensor) -> Callable[[Tensor], AbstractContextManager[Any]]:
    return (lambda _: nullcontext()) if tensor.is_cpu else (lambda t: torch.cuda.device(t.device))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)
