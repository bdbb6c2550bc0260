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
from torch.autograd import Function

from ... import spec
from . import native, ops, reference
from .native import Call, Operands

_Gradients = tuple[Tensor | None, ...]
_OTHERS = 4  # c0, lengths, mask and reset follow upon U among the arguments of the functions below


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
    o = native.operands(spec.cell_of(cell), u, arrays, c0, lengths, mask, reset)
    h, last = run(Call(cell, tuple(constants), every, str(time_parallel)), o)
    return h.flatten(2), last


def run(call: Call, o: Operands) -> tuple[Tensor, Tensor]:
    """h (L, B, D, d) and the last states."""
    if not is_eager(o.u):
        h, last, _ = _Traced.apply(call, len(o.arrays), o.u, *o[2:], *o.arrays)
    elif records(o.u, o.c0, *o.arrays):
        h, last = _Eager.apply(call, o.u, *o[2:], *o.arrays)
    else:
        h, last, _ = native.forward(call._replace(every=0), o)
    return h, last


def is_eager(tensor: Tensor) -> bool:
    """Whether a tensor has values, and no transformation is at work that wants to see what is done to it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and (tensor.is_cpu or tensor.is_cuda)
        and _no_transformation()
        and not torch.compiler.is_compiling()
    )


def _no_transformation() -> bool:
    try:
        return torch._C._functorch.peek_interpreter_stack() is None and torch._C._len_torch_dispatch_stack() == 0
    except AttributeError:  # of another release of PyTorch: the way that is right for all
        return False


def records(*tensors: Tensor | None) -> bool:
    """Whether a gradient is to be recorded."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _operands(tensors: Sequence[Tensor | None]) -> Operands:
    u, c0, lengths, mask, reset, *arrays = tensors
    return Operands(u, tuple(arrays), c0, lengths, mask, reset)  # type: ignore[arg-type]


def _in_order(gradients: Sequence[Tensor], need: Sequence[bool]) -> _Gradients:
    """Gradients of (U, arrays, c0), of those that `need` names, as (U, c0, no flags, arrays)."""
    found = iter(gradients)
    u, *arrays, c0 = (next(found) if is_wanted else None for is_wanted in need)
    return u, c0, None, None, None, *arrays


def _needed(inputs: Sequence[bool]) -> tuple[bool, ...]:
    """Which of (U, arrays, c0) want a gradient, from the same of (U, c0, flags, arrays)."""
    return inputs[0], *inputs[1 + _OTHERS :], inputs[1]


class _Eager(Function):
    """Of tensors with values."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        h, last, saved = native.forward(call, _operands(tensors))
        ctx.call = call
        ctx.save_for_backward(*tensors, saved)
        return h, last

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> Any:  # type: ignore[override]
        *tensors, saved = ctx.saved_tensors
        need = _needed(ctx.needs_input_grad[1:])
        return None, *gradients(ctx.call, need, tensors, saved, dh, dlast)


class _Traced(Function):
    """Of any tensors; the states that are kept are a result, as that is how `torch.func` sees them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, n_arrays: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return ops.forward(call, _operands(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[2:], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        *tensors, saved = ctx.saved_tensors
        need = _needed(ctx.needs_input_grad[2:])
        return None, None, *gradients(ctx.call, need, tensors, saved, dh, dlast)


def gradients(
    call: Call,
    need: tuple[bool, ...],
    tensors: Sequence[Tensor | None],
    saved: Tensor,
    dh: Tensor | None,
    dlast: Tensor | None,
) -> _Gradients:
    """The gradients of U, c0, flags (None) and arrays; differentiable where gradients are recorded."""
    if dh is None and dlast is None:
        return (None,) * len(tensors)
    o = _operands(tensors)
    if is_eager(o.u) and is_eager(saved) and not records(*tensors, dh, dlast):
        return _in_order(native.backward(call, o, saved, dh, dlast, need), need)
    found = _Backward.apply(call, need, saved, dh, dlast, *tensors)
    return _in_order(found, need)


class _Backward(Function):
    """The fused backward as a function of its own, whose gradient the reference gives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        call: Call, need: tuple[bool, ...], saved: Tensor, dh: Tensor | None, dlast: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        return tuple(ops.backward(call, _operands(tensors), saved, dh, dlast, need))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.need, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor) -> Any:  # type: ignore[override]
        given = ctx.saved_tensors
        wanted = [i for i, t in enumerate(given) if t is not None and ctx.needs_input_grad[3 + i]]

        def backward_of(*chosen: Tensor) -> tuple[Tensor, ...]:
            dh, dlast, *tensors = _put(given, wanted, chosen)
            return _reference_backward(ctx.call, ctx.need, tensors, dh, dlast)

        _, pullback = torch.func.vjp(backward_of, *(given[i] for i in wanted))
        return None, None, None, *_put([None] * len(given), wanted, pullback(seeds))


def _reference_backward(
    call: Call, need: tuple[bool, ...], tensors: Sequence[Tensor | None], dh: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor, ...]:
    """What `_Backward.forward` returns, of operations that PyTorch can differentiate."""
    u, c0, *others = tensors
    flags, arrays = others[: _OTHERS - 1], others[_OTHERS - 1 :]
    sources = [u, *arrays, c0]
    wanted = [i for i, is_wanted in enumerate(need) if is_wanted]

    def of(*chosen: Tensor) -> tuple[Tensor, Tensor]:
        u, *arrays, c0 = _put(sources, wanted, chosen)
        return reference.recurrence(call, _operands([u, c0, *flags, *arrays]))

    (h, last), pullback = torch.func.vjp(of, *(sources[i] for i in wanted))
    seeds = torch.zeros_like(h) if dh is None else dh, torch.zeros_like(last) if dlast is None else dlast
    return pullback(seeds)  # type: ignore[no-any-return]


def _put(values: Sequence[Any], at: Sequence[int], chosen: Sequence[Any]) -> list[Any]:
    """`values` with others at some places."""
    found = list(values)
    for i, value in zip(at, chosen):
        found[i] = value
    return found


# The compiler takes calls as they are, and traces what they do with tensors that have no values, checks included.
torch.compiler.allow_in_graph(recurrence)
