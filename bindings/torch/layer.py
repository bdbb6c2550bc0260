"""A layer, projection and recurrence together, under a policy of what is kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import spec
from . import autograd, native, ops
from .autograd import recurrence
from .native import Call, Operands
from .projection import project

# Steps between kept states where the caller leaves it to us: as in the core.
_EVERY = 32


def layer(
    cell: str,
    x: Tensor,
    factors: Sequence[Tensor],
    arrays: Sequence[Tensor] = (),
    c0: Tensor | None = None,
    *,
    window: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    constants: Sequence[float] = (),
    recompute: bool | int | str = False,
    time_parallel: bool | str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs a cell over x (L, B, d_in).

    Args:
        cell: the text of a cell (see `sru_rt.spec`).
        factors: the weight (D, k, d, window*d_in), or a pair (P, Q) of (D, k, d, p) and (p, window*d_in).
        recompute: what the backward computes again: False nothing, K >= 1 all states but every K-th, True these with
            K = 32, "x" these and U.
        arrays, c0, lengths, mask, reset, constants, time_parallel: as `autograd.recurrence`.

    Returns:
        h (L, B, D*d), and the last states, like c0.
    """
    flags = {"lengths": lengths, "mask": mask, "reset": reset}
    if recompute != "x":
        u = project(x, factors, window, lengths, mask, reset)
        every = _EVERY if recompute is True else int(recompute) or 1
        return recurrence(cell, u, arrays, c0, **flags, constants=constants, every=every, time_parallel=time_parallel)
    return recurrence_of_x(
        cell, x, factors, arrays, c0, window=window, **flags, constants=constants, time_parallel=time_parallel
    )


def recurrence_of_x(
    cell: str,
    x: Tensor,
    factors: Sequence[Tensor],
    arrays: Sequence[Tensor] = (),
    c0: Tensor | None = None,
    *,
    window: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    constants: Sequence[float] = (),
    time_parallel: bool | str = "auto",
) -> tuple[Tensor, Tensor]:
    """A layer of which U is formed again in the backward."""
    call = Call(cell, tuple(constants), _EVERY, str(time_parallel))
    u = project(x.detach()[:0], [f.detach() for f in factors], window)  # only its dtype, that of autocast if it is on
    o = native.operands(spec.cell_of(cell), u, arrays, c0, lengths, mask, reset)
    x, *factors = (t.to(u.dtype) for t in (x, *factors))
    with _without_autocast(x.device.type):  # it is off when the backward forms U
        h, last, _ = _Layer.apply(call, window, len(factors), x, *factors, *o[2:], *o.arrays)
    return h.flatten(2), last


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _Layer(Function):
    """A layer that keeps x for its backward and not U."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, window: int, n: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        o = _operands(_u(window, x, rest[:n], rest[n:]), rest[n:])
        return native.forward(call, o) if autograd.is_eager(o.u) else ops.forward(call, o)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.window, ctx.n = inputs[:3]
        ctx.save_for_backward(*inputs[3:], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        x, *rest, saved = ctx.saved_tensors
        n, (factors, others) = ctx.n, (rest[: ctx.n], rest[ctx.n :])
        if dh is None and dlast is None:
            return (None,) * (4 + len(rest))
        u, pullback = torch.func.vjp(lambda x, *factors: _u(ctx.window, x, factors, others), x, *factors)
        c0, *flags_and_arrays = ctx.needs_input_grad[4 + n :]
        need = (True, *flags_and_arrays[3:], c0)
        du, *others_gradients = autograd.gradients(ctx.call, need, (u, *others), saved, dh, dlast)
        return None, None, None, *pullback(du), *others_gradients


def _u(window: int, x: Tensor, factors: Sequence[Tensor], others: Sequence[Any]) -> Tensor:
    _, lengths, mask, reset, *_ = others
    return project(x, factors, window, lengths, mask, reset)


def _operands(u: Tensor, others: Sequence[Any]) -> Operands:
    c0, lengths, mask, reset, *arrays = others
    return Operands(u.contiguous(), tuple(arrays), c0, lengths, mask, reset)


torch.compiler.allow_in_graph(recurrence_of_x)
