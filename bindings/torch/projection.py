"""The product U = W x in PyTorch's operations, as `sru_rt.projection` forms it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def project(
    x: Tensor,
    factors: Sequence[Tensor],
    window: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """U (L, B, D, k, d) of x (L, B, d_in).

    `factors` are a weight (D, k, d, window*d_in), or (D, k, d, p) and (p, window*d_in). Padding, which may hold
    anything, counts as zeros; so do tokens beyond an end or a boundary.
    """
    D, k, d, _ = factors[0].shape
    x = without_padding(x, lengths, mask)
    if window == 1:
        return torch.matmul(rows(x, factors), matrix(factors[0])).unflatten(-1, (D, k, d))
    u = [
        torch.matmul(rows(seen(x, window, reset, reverse=bool(q)), factors), matrix(factors[0][q : q + 1]))
        for q in range(D)
    ]
    return torch.stack([one.unflatten(-1, (k, d)) for one in u], 2)


def rows(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """What the last factor of the weight is given."""
    for factor in factors[1:]:
        x = F.linear(x, factor)
    return x


def matrix(first: Tensor) -> Tensor:
    """A factor (D, k, d, n) as a matrix (n, D*k*d); a copy if its channels are not the rows of one."""
    return first.permute(3, 0, 1, 2).flatten(1)


def without_padding(x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """x (L, B, ...) with zeros at padding, whose gradient then is zero, too, whatever it holds."""
    if lengths is None and mask is None:
        return x
    absent = torch.zeros((), dtype=torch.bool, device=x.device) if mask is None else mask.to(torch.bool)
    if lengths is not None:
        absent = absent | (torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)
    return torch.where(absent[..., None], x.new_zeros(()), x)


def seen(x: Tensor, window: int, reset: Tensor | None, reverse: bool = False) -> Tensor:
    """The last tokens of each step side by side, oldest first, (L, B, window*d_in); of the reverse, the next ones."""
    # A token is seen if no boundary lies between it and the step, so if both come after as many.
    piece = None if reset is None else reset.to(torch.int64).cumsum(0)
    taps = [x]
    for back in range(1, window):
        tap = _shifted(x, back, reverse)
        if piece is not None:
            same = _shifted(piece, back, reverse) == piece
            tap = torch.where(same[..., None], tap, tap.new_zeros(()))
        taps.append(tap)
    return torch.cat(taps[::-1], -1)


def _shifted(x: Tensor, back: int, reverse: bool) -> Tensor:
    """x of `back` steps ago, or of `back` steps later; zeros beyond the ends."""
    zeros = x.new_zeros(back, *x.shape[1:])
    return torch.cat([x, zeros])[back:] if reverse else torch.cat([zeros, x])[: x.shape[0]]


def as_autocast(tensor: Tensor) -> Tensor:
    """What a product is given, in the dtype in which it is formed."""
    kind = tensor.device.type
    if not is_autocast(kind):
        return tensor
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if eligible else tensor


def is_autocast(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
