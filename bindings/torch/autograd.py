"""The gradient of a recurrence: the fused backward, and through it the gradient of that.

Three ways lead to the same kernels. Without a gradient, the kernel is called at once. In eager mode a plain
`autograd.Function` records it, as that costs least. Where tensors are traced, batched or transformed (compile, export,
`torch.func`), one with `setup_context` calls the operators of `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ...errors import LibraryError
from ...passes import Call
from . import native, ops, reference
from .native import Operands, Plan

_Gradients = tuple[Tensor | None, ...]


def recurrence(
    cell: str,
    u: Tensor,
    arrays: Sequence[Tensor] = (),
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    constants: Sequence[float] = (),
    every: int = 1,
    time_parallel: bool | str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a recurrence on a given U.

    Args:
        cell: the text of a cell (see `sru_rt.spec`).
        u: (L, B, D, k, d).
        arrays: what the cell declares beside gates and states, in that order.
        c0: (D, B, d), or (n, D, B, d) for n > 1 states; zeros if None.
        every: for the backward, the state is kept every so many steps.

    Returns:
        h (L, B, D*d) in u's dtype, and the last states, like c0.

    Raises:
        ShapeError, DtypeError, LibraryError, ArgumentError: naming what does not fit.
    """
    given = (u, c0, lengths, mask, reset, *arrays)
    if not is_eager(*given):
        call = Call(cell, tuple(constants), every, str(time_parallel), keeps(u, c0, *arrays))
        h, last, _ = _Traced.apply(call, *native.operands(call, given))
        return h.flatten(2), last
    keep, policy = records(*given), str(time_parallel)
    plan = native.known(((cell, len(constants), every, policy, keep), native.layout(*given)))
    if plan is None:
        call = Call(cell, tuple(constants), every, policy, keep)
        given = native.operands(call, given)
        plan = native.forward_plan(call, given) or native.make_forward_plan(call, given)
    if keep:
        return _apply(Call(cell, tuple(constants), every, policy), plan, *given)
    h, last, _ = native.forward(plan, constants, given)
    return h, last


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether tensors have values, and no transformation is at work that wants to see what is done to them."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None and not ((type(t) is Tensor or type(t) is torch.nn.Parameter) and (t.is_cpu or t.is_cuda)):
            return False
    return not _is_transformed()


def _is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation, a trace or a mode of dispatch is at work."""
    try:
        return (
            torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None
            or forward_ad._current_level >= 0
        )
    except AttributeError:  # of another release of PyTorch: the way that is right for all
        return True


def _is_exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def records(*tensors: Tensor | None) -> bool:
    """Whether a gradient is to be recorded."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator would cost more
            if t is not None and t.requires_grad:
                return True
    return False


def keeps(*tensors: Tensor | None) -> bool:
    """Whether a forward is to keep what its backward takes; if it does not, a backward may still be run.

    A tensor of one level of `torch.func` does not tell what others want. An exported program is seldom trained.
    """
    return (records(*tensors) or _is_transformed()) and not _is_exporting()


class ReverseMode(Function):
    """A function that is differentiated in reverse only."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise LibraryError(
            "sru_rt: recurrences have no derivative in forward mode (jvp, jacfwd, hessian); use reverse mode (grad, "
            "vjp, jacrev): a Hessian is jacrev(jacrev(f))"
        )


class _Eager(Function):
    """Of tensors with values."""

    @staticmethod
    def forward(ctx: Any, call: Call, plan: Plan, *o: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        h, last, saved = native.forward(plan, call.constants, o)
        ctx.call = call
        ctx.save_for_backward(*o, saved)
        return h, last

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> Any:
        *o, saved = ctx.saved_tensors
        return None, None, *gradients(ctx.call, ctx.needs_input_grad[2:], tuple(o), saved, dh, dlast)


# Without what the method of Function does for tensors that outlived a transformation of torch.func, which costs as much
# as the rest of a call.
_apply: Any = super(Function, _Eager).apply


class _Traced(ReverseMode):
    """Of any tensors; the states that are kept are a result, as that is how `torch.func` sees them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *o: Tensor | None) -> tuple[Tensor, ...]:
        return ops.forward(call, o)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, *o = inputs
        ctx.save_for_backward(*o, output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None, _: Any) -> Any:
        *o, saved = ctx.saved_tensors
        dh = None if dh is None else dh.flatten(2)
        return None, *gradients(ctx.call, ctx.needs_input_grad[1:], tuple(o), saved, dh, dlast)


def gradients(
    call: Call, need: tuple[bool, ...], o: Operands, saved: Tensor, dh: Tensor | None, dlast: Tensor | None
) -> _Gradients:
    """The gradients of the operands, of those that `need` names; differentiable where gradients are recorded.

    dh is (L, B, D*d).
    """
    if dh is None and dlast is None:
        return (None,) * len(o)
    if not call.keep:  # a program that was traced without a gradient is differentiated after all
        call = call._replace(keep=True)
        _, _, saved = ops.forward(call, tuple([t if t is None else t.detach() for t in o]))
    if is_eager(*o, saved, dh, dlast) and not records(*o, dh, dlast):
        return tuple(native.backward(call, o, saved, dh, dlast, need))
    dh = None if dh is None else dh.unflatten(2, (o[0].shape[2], -1))
    found = iter(_Backward.apply(call, need, saved, dh, dlast, *o))
    return tuple([next(found) if is_wanted else None for is_wanted in need])


class _Backward(ReverseMode):
    """The fused backward as a function of its own, whose gradient the reference gives. dh is (L, B, D, d)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        call: Call, need: tuple[bool, ...], saved: Tensor, dh: Tensor | None, dlast: Tensor | None, *o: Any
    ) -> tuple[Tensor, ...]:
        return tuple(ops.backward(call, o, saved, dh, dlast, need))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.need, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor) -> Any:
        given = ctx.saved_tensors
        wanted = [i for i, t in enumerate(given) if t is not None and ctx.needs_input_grad[3 + i]]

        def backward_of(*chosen: Tensor) -> tuple[Tensor, ...]:
            dh, dlast, *o = put(given, wanted, chosen)
            return _reference_backward(ctx.call, ctx.need, o, dh, dlast)

        _, pullback = torch.func.vjp(backward_of, *(given[i] for i in wanted))
        return None, None, None, *put([None] * len(given), wanted, pullback(seeds))


def _reference_backward(
    call: Call, need: tuple[bool, ...], o: Sequence[Any], dh: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor, ...]:
    """What `_Backward.forward` returns, of operations that PyTorch can differentiate."""
    wanted = [i for i, is_wanted in enumerate(need) if is_wanted]

    def of(*chosen: Tensor) -> tuple[Tensor, Tensor]:
        return reference.recurrence(call, tuple(put(o, wanted, chosen)))

    (h, last), pullback = torch.func.vjp(of, *(o[i] for i in wanted))
    seeds = torch.zeros_like(h) if dh is None else dh, torch.zeros_like(last) if dlast is None else dlast
    return pullback(seeds)


def put(values: Sequence[Any], at: Sequence[int], chosen: Sequence[Any]) -> list[Any]:
    """`values` with others at some places."""
    found = list(values)
    for i, value in zip(at, chosen):
        found[i] = value
    return found


def _recorded_forward(*arguments: Any) -> Any:
    """The operator in a program that was exported, and is trained."""
    call, o = ops.split(arguments)
    if records(*o):
        return _Traced.apply(call, *o)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.forward(call, o)


def _recorded_backward(*arguments: Any) -> Any:
    call, o = ops.split(arguments)
    saved, dh, dlast, need = arguments[-4:]
    if records(*o, dh, dlast):
        return list(_Backward.apply(call, tuple(need), saved, dh, dlast, *o))
    with torch._C._AutoDispatchBelowAutograd():
        return ops.backward(call, o, saved, dh, dlast, need)


ops.LIBRARY.impl("forward", _recorded_forward, "Autograd")
ops.LIBRARY.impl("backward", _recorded_backward, "Autograd")

# The compiler takes calls as they are, and traces what they do with tensors that have no values, checks included.
torch.compiler.allow_in_graph(recurrence)
