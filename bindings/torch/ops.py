"""The operators ``sru_rt::forward`` and ``sru_rt::backward``: one recurrence in a graph of PyTorch's compilers.

They have kernels for the CPU and CUDA devices, results without values for tracing, and a rule for `vmap`. Calls go
through `autograd`, which registers what records a gradient, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import passes, spec
from ...passes import Call
from . import native
from .native import Operands

_OPERANDS = (
    "Tensor u, Tensor? c0, Tensor? lengths, Tensor? mask, Tensor? reset, Tensor[] arrays, "
    "str cell, float[] constants, int every, str time_parallel, bool keep"
)
_N_OPERANDS = 11
LIBRARY = torch.library.Library("sru_rt", "DEF")
LIBRARY.define(f"forward({_OPERANDS}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(
    f"backward({_OPERANDS}, Tensor saved, Tensor? dh, Tensor? dlast, bool[] need) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward(call: Call, o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """As `native.forward`, for tensors that may be traced or batched; h is (L, B, D, d)."""
    return torch.ops.sru_rt.forward.default(*_arguments(call, o))


def backward(
    call: Call, o: Operands, saved: Tensor, dh: Tensor | None, dlast: Tensor | None, need: Sequence[bool]
) -> list[Tensor]:
    """As `native.backward`, for tensors that may be traced or batched: the gradients that are wanted.

    dh is (L, B, D, d).
    """
    return torch.ops.sru_rt.backward.default(*_arguments(call, o), saved, dh, dlast, list(need))


def _arguments(call: Call, o: Operands) -> tuple[Any, ...]:
    arrays = list(o[passes.ARRAYS :])
    return *o[: passes.ARRAYS], arrays, call.cell, list(call.constants), *call[2:]


def split(arguments: Sequence[Any]) -> tuple[Call, Operands]:
    """The arguments of an operator as what they were made from, in order for kernels."""
    *first, arrays, cell, constants, every, time_parallel, keep = arguments[:_N_OPERANDS]
    call = Call(cell, tuple(constants), every, time_parallel, keep)
    return call, native.operands(call, (*first, *arrays))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, o = split(arguments)
    plan = native.forward_plan(call, o) or native.make_forward_plan(call, o)
    h, last, saved = native.forward(plan, call.constants, o)
    L, B, D, _, d = o[0].shape
    return h.view(L, B, D, d), last, last.new_empty(0) if saved is None else saved


def _backward(*arguments: Any) -> list[Tensor]:
    call, o = split(arguments)
    saved, dh, dlast, need = arguments[_N_OPERANDS:]
    dh = None if dh is None else dh.flatten(2)
    return [g for g in native.backward(call, o, saved, dh, dlast, tuple(need)) if g is not None]


def _forward_without_values(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, o = split(arguments)
    u, cell = o[0], spec.cell_of(call.cell)
    native.check(call, cell, o)
    L, B, D, _, d = u.shape
    acc = native.state_dtype(u.dtype)
    last = passes.shape_of_state(cell, D, B, d)
    saved = passes.shape_of_state(cell, passes.kept(call, L), B, D, d) if call.keep else (0,)
    return u.new_empty((L, B, D, d)), u.new_empty(last, dtype=acc), u.new_empty(saved, dtype=acc)


def _backward_without_values(*arguments: Any) -> list[Tensor]:
    call, o = split(arguments)
    need, u, cell = arguments[-1], o[0], spec.cell_of(call.cell)
    native.check(call, cell, o)
    _, B, D, _, d = u.shape
    found = native.gradients_like(o, need)
    if need[1]:
        found[1] = u.new_empty(passes.shape_of_state(cell, D, B, d), dtype=native.state_dtype(u.dtype))
    return [g for g in found if g is not None]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("forward", _forward, _device)
    LIBRARY.impl("backward", _backward, _device)
torch.library.register_fake("sru_rt::forward", _forward_without_values, lib=LIBRARY)
torch.library.register_fake("sru_rt::backward", _backward_without_values, lib=LIBRARY)


# ----------------------------------------------------------------------------------------------------------------------
# vmap. Channels know nothing of each other, and their axis is the last one of all tensors but flags. So a batch of
# recurrences is one with more channels, unless each has flags of its own: then they run one after another.

_FLAGS = (2, 3, 4)  # lengths, mask, reset among the arguments


def _batched(operator: Any, kind: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    dims = [*in_dims, *[None] * (len(arguments) - len(in_dims))]
    n = info.batch_size
    if any(dims[i] is not None for i in _FLAGS):
        each = [operator(*[_one_of(a, dim, i) for a, dim in zip(arguments, dims)]) for i in range(n)]
        result = [torch.stack(parts) for parts in zip(*each)]
        return kind(result), kind([0] * len(result))
    folded = [a if i in _FLAGS else _as_channels(a, dim, n) for i, (a, dim) in enumerate(zip(arguments, dims))]
    result = [r.unflatten(-1, (n, r.shape[-1] // n)) for r in operator(*folded)]
    return kind(result), kind([r.ndim - 2 for r in result])


def _one_of(value: Any, dim: Any, i: int) -> Any:
    """The i-th element of a batched tensor, or of those in a list."""
    if isinstance(dim, (list, tuple)):
        return [_one_of(v, one, i) for v, one in zip(value, dim)]
    return value if dim is None else value.select(dim, i)


def _as_channels(value: Any, dim: Any, n: int) -> Any:
    """The n elements of a batch side by side on the last axis."""
    if isinstance(value, (list, tuple)):
        return [_as_channels(v, one, n) for v, one in zip(value, dim or [None] * len(value))]
    if not isinstance(value, Tensor):
        return value
    value = value.unsqueeze(-2).expand(*value.shape[:-1], n, -1) if dim is None else value.movedim(dim, -2)
    return value.flatten(-2)


for _name, _kind in (("forward", tuple), ("backward", list)):
    _operator = getattr(torch.ops.sru_rt, _name).default
    torch.library.register_vmap(f"sru_rt::{_name}", partial(_batched, _operator, _kind), lib=LIBRARY)
