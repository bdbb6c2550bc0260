"""A layer, projection and recurrence together, under a policy of what is kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...passes import Call
from ..recompute import every
from . import autograd, fused, native, ops
from .autograd import recurrence
from .projection import as_autocast, project, rows, seen, without_autocast, without_padding


def layer(
    cell: str,
    x: Tensor,
    factors: Sequence[Tensor],
    arrays: Sequence[Tensor | None] = (),
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
        arrays: as `autograd.recurrence` has them; None in the place of one is x itself as (L, B, D, d).
        c0, lengths, mask, reset, constants, time_parallel: as `autograd.recurrence`.

    Returns:
        h (L, B, D*d), and the last states, like c0.
    """
    D, _, d, _ = factors[0].shape
    flags = (lengths, mask, reset)
    if recompute != "x" and (window == 1 or D == 1) and autograd.is_eager(x, *factors, c0, *flags, *arrays):
        x = without_padding(x, lengths, mask)
        tokens = as_autocast(x)
        tokens = rows(tokens if window == 1 else seen(tokens, window, reset), factors)
        if tokens is not x:
            arrays = _filled(arrays, x, D, d)
        factor = as_autocast(factors[0])
        keep = autograd.records(tokens, factor, c0, *arrays)
        call = Call(cell, tuple(constants), every(recompute), str(time_parallel), keep)
        return fused.layer(call, tokens, factor, (c0, *flags, *arrays))
    arrays = _filled(arrays, x, D, d)
    if recompute == "x":
        return _forming_u_again(
            cell, x, tuple(factors), tuple(arrays), c0, window, flags, tuple(constants), str(time_parallel)
        )
    u = project(x, factors, window, lengths, mask, reset)
    return recurrence(
        cell,
        u,
        arrays,
        c0,
        lengths=lengths,
        mask=mask,
        reset=reset,
        constants=constants,
        every=every(recompute),
        time_parallel=time_parallel,
    )


def _filled(arrays: Sequence[Tensor | None], x: Tensor, D: int, d: int) -> list[Tensor]:
    """The arrays with x in the places of None."""
    return [x.reshape(*x.shape[:2], D, d) if a is None else a for a in arrays]


def _forming_u_again(
    cell: str,
    x: Tensor,
    factors: tuple[Tensor, ...],
    arrays: tuple[Tensor, ...],
    c0: Tensor | None,
    window: int,
    flags: tuple[Tensor | None, ...],
    constants: tuple[float, ...],
    time_parallel: str,
) -> tuple[Tensor, Tensor]:
    """A layer of which U is formed again in the backward."""
    call = Call(cell, constants, every("x"), time_parallel, autograd.keeps(x, *factors, c0, *arrays))
    x, *factors = (as_autocast(t) for t in (x, *factors))
    others = native.beside_u(call, x.dtype, (c0, *flags, *arrays))
    with without_autocast(x.device.type):  # it is off when the backward forms U
        h, last, _ = _Layer.apply(call, window, len(factors), x, *factors, *others)
    return h, last


class _Layer(autograd.ReverseMode):
    """A layer that keeps x for its backward and not U."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, window: int, n: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        o = (_u(window, x, rest[:n], rest[n:]).contiguous(), *rest[n:])
        if autograd.is_eager(*o):
            plan = native.forward_plan(call, o) or native.make_forward_plan(call, o)
            h, last, saved = native.forward(plan, call.constants, o)
            return h, last, last.new_empty(0) if saved is None else saved
        h, last, saved = ops.forward(call, o)
        return h.flatten(2), last, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.window, ctx.n = inputs[:3]
        ctx.save_for_backward(*inputs[3:], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None, _: Any) -> Any:
        x, *rest, saved = ctx.saved_tensors
        factors, others = rest[: ctx.n], rest[ctx.n :]
        if dh is None and dlast is None:
            return (None,) * (4 + len(rest))
        given, needs = (x, *factors), ctx.needs_input_grad[3:]
        wanted = [i for i, _ in enumerate(given) if needs[i]]

        def u_of(*chosen: Tensor) -> Tensor:
            x, *factors = autograd.put(given, wanted, chosen)
            return _u(ctx.window, x, factors, others)

        with without_autocast(x.device.type):
            u, pullback = torch.func.vjp(u_of, *(given[i] for i in wanted)) if wanted else (u_of(), None)
            need = (bool(wanted), *needs[1 + ctx.n :])
            du, *gradients = autograd.gradients(ctx.call, need, (u.contiguous(), *others), saved, dh, dlast)
            of_given = autograd.put([None] * len(given), wanted, pullback(du) if wanted else ())
        return None, None, None, *of_given, *gradients


def _u(window: int, x: Tensor, factors: Sequence[Tensor], others: Sequence[Any]) -> Tensor:
    _, lengths, mask, reset, *_ = others
    return project(x, factors, window, lengths, mask, reset)


torch.compiler.allow_in_graph(_forming_u_again)
