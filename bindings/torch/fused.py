"""A layer as one function of autograd, in eager mode: little is recorded, and large memory is used again.

Fresh pages cost as much as a pass over them, so U and its gradient go through the memory of the core. The gradient of
x through a highway is where the product that makes the rest of it adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ...passes import ARRAYS, Call
from . import autograd, native, products
from .native import Operands
from .projection import matrix

_FIRST = ARRAYS - 1  # where the arrays begin among the operands beside U


class _Plan(NamedTuple):
    """What is known of a layer for tensors of one layout."""

    recurrence: native.Plan
    shape: tuple[int, ...]  # of U
    highway: int | None  # the place of x among the operands beside U
    decodes: bool  # whether the kernel forms U: that of one token, without a gradient


def layer(call: Call, x: Tensor, factor: Tensor, others: Operands) -> tuple[Tensor, Tensor]:
    """h (L, B, D*d) and the last states, of tensors for which `autograd.is_eager` holds.

    Args:
        x: (L, B, n).
        factor: W, (D, k, d, n), in the dtype of x.
        others: the operands beside U. An array that is None is x itself as (L, B, D, d).
    """
    key = ("layer", call.plan, native.layout(x, factor, *others))
    plan = native.known(key)
    if plan is None:
        x, factor = x.contiguous().resolve_neg(), factor.resolve_neg()
        highway = next((i for i, t in enumerate(others) if t is None and i >= _FIRST), None)
        others = _converted(call, x, factor, others, highway)
        key = ("layer", call.plan, native.layout(x, factor, *others))
        plan = native.known(key) or native.remember(key, _make(call, x, factor, others, highway))
    if call.keep:
        return _apply(call, plan, x, factor, *others)
    if plan.decodes:
        o = (x, *_with_x(x, factor.shape, others, plan.highway))
        h, last, _ = native.forward(plan.recurrence, call.constants, o, factor)
    else:
        h, last, *_ = _forward(call, plan, x, factor, others)
    return h, last


def _converted(call: Call, x: Tensor, factor: Tensor, others: Operands, highway: int | None) -> Operands:
    """The operands beside U as kernels take them, but for None in the place of x."""
    if highway is None:
        return native.beside_u(call, x.dtype, others)
    found = native.beside_u(call, x.dtype, _with_x(x, factor.shape, others, highway))
    return *found[:highway], None, *found[highway + 1 :]


def _make(call: Call, x: Tensor, factor: Tensor, others: Operands, highway: int | None) -> _Plan:
    shape = (*x.shape[:2], *factor.shape[:3])
    o = (x.new_empty(shape), *_with_x(x, factor.shape, others, highway))
    if not call.keep and native.decodes(factor, o):
        return _Plan(native.token_plan(call, o, factor.shape[3]), shape, highway, decodes=True)
    return _Plan(native.forward_plan(call, o) or native.make_forward_plan(call, o), shape, highway, decodes=False)


def _with_x(x: Tensor, of_factor: Sequence[int], others: Operands, highway: int | None) -> Operands:
    """The operands beside U, x among them."""
    if highway is None:
        return others
    return *others[:highway], x.view(x.shape[0], x.shape[1], of_factor[0], of_factor[2]), *others[highway + 1 :]


def _forward(call: Call, plan: _Plan, x: Tensor, factor: Tensor, others: Operands) -> tuple[Any, ...]:
    """h, the last states, the states that are kept, U, and W as a matrix (n, D*k*d)."""
    w = _matrix(factor)
    u = products.times(x.view(-1, x.shape[2]), w).view(plan.shape)
    o = (u, *_with_x(x, factor.shape, others, plan.highway))
    return *native.forward(plan.recurrence, call.constants, o), u, w


def _matrix(factor: Tensor) -> Tensor:
    """W as a matrix (n, D*k*d), without a gradient."""
    if not _has_gates_inside(factor):
        return matrix(factor)
    return native.turned(factor.permute(3, 0, 2, 1)).view(factor.shape[3], -1)


def _has_gates_inside(factor: Tensor) -> bool:
    """Whether a factor (D, k, d, n) lies as (n, D, d, k), as those of SRUCell do."""
    return factor.shape[1] > 1 and factor.permute(3, 0, 2, 1).is_contiguous()


class _Layer(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, plan: _Plan, x: Tensor, factor: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        h, last, saved, u, w = _forward(call, plan, x, factor, others)
        ctx.call, ctx.highway = call, plan.highway
        ctx.save_for_backward(x, factor, u, w, saved, *others)
        return h, last

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> Any:
        if dh is None and dlast is None:
            return (None,) * len(ctx.needs_input_grad)
        x, factor, u, w, saved, *others = ctx.saved_tensors
        needs_x, needs_factor, *need = ctx.needs_input_grad[2:]
        highway = ctx.highway
        if highway is not None:
            need[highway] = needs_x
        need = (needs_x or needs_factor, *need)
        rows = x.view(-1, x.shape[2])
        given = (x, factor, *others, dh, dlast)
        in_place = autograd.is_eager(*given) and not autograd.records(*given)
        if not in_place:  # the gradient of a gradient goes through U
            w = matrix(factor)
            u = torch.mm(rows, w).view(u.shape)
        o = (u, *_with_x(x, factor.shape, tuple(others), highway))
        du, *found = autograd.gradients(ctx.call, need, o, saved, dh, dlast)
        through_highway = None
        if highway is not None:
            through_highway, found[highway] = found[highway], None
        dx = dfactor = None
        if du is not None:
            du = du.reshape(-1, w.shape[1])
            dx = _gradient_of_x(x, du, w, through_highway, in_place) if needs_x else None
            dfactor = _gradient_of_factor(rows, du, w, factor, in_place) if needs_factor else None
        return None, None, dx, dfactor, *found


# Without what the method of Function does for tensors that outlived a transformation of torch.func, which costs as much
# as the rest of a call.
_apply: Any = super(Function, _Layer).apply


def _gradient_of_x(x: Tensor, du: Tensor, w: Tensor, through_highway: Tensor | None, in_place: bool) -> Tensor:
    """dU times W, added to the gradient through a highway; both may be written to if `in_place`."""
    if through_highway is None:
        return (products.times(du, w.t()) if in_place else torch.mm(du, w.t())).view(x.shape)
    rest = through_highway.reshape(-1, x.shape[2])
    return (products.add_times(rest, du, w.t()) if in_place else torch.addmm(rest, du, w.t())).view(x.shape)


def _gradient_of_factor(rows: Tensor, du: Tensor, w: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    """In the layout of the factor, so that it need not be turned for a parameter that has it."""
    D, k, d, n = factor.shape
    transposed_times = products.transposed_times if in_place else _transposed_times
    if w.stride(0) == 1:
        return transposed_times(du, rows).view(factor.shape)
    found = transposed_times(rows, du).view(n, D, k, d)
    if in_place and _has_gates_inside(factor):
        return native.turned(found).permute(1, 3, 2, 0)
    return found.permute(1, 2, 3, 0)


def _transposed_times(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.t(), b)
