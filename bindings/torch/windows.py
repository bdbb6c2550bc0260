"""What a window of several tokens sees where sequences come piece by piece, or token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .projection import without_padding
from .sequences import Layout


def unfold(x: Tensor, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """What each step sees, and the tokens that the next piece needs.

    Args:
        x: (L, B, n), a piece of sequences.
        tokens: (window-1, B, n), what came before it, zeros where there was nothing.
        layout: of the piece. Padding counts as zeros, and so does what is beyond a boundary of `reset`.

    Returns:
        (L, B, window*n), oldest tokens first, and (window-1, B, n).
    """
    (L, B, _), before = x.shape, tokens.shape[0]
    x = without_padding(x, layout.lengths, layout.mask)
    line = torch.cat([tokens.to(x.dtype), x])
    if layout.reset is None:
        seen = [line[j : j + L] for j in range(before + 1)]
        return torch.cat(seen, -1), _last(line, L, before, layout.lengths)
    # Two tokens are of one segment where as many boundaries lie before the one as before the other.
    segment = torch.cat([layout.reset.new_zeros(before, B, dtype=torch.int64), layout.reset.long().cumsum(0)])
    now = segment[before:]
    seen = [_where(segment[j : j + L] == now, line[j : j + L]) for j in range(before + 1)]
    segment = _last(segment, L, before, layout.lengths)
    return torch.cat(seen, -1), _where(segment == segment[-1], _last(line, L, before, layout.lengths))


def _last(line: Tensor, L: int, before: int, lengths: Tensor | None) -> Tensor:
    """The last tokens of each sequence, of a line (window-1 + L, B, ...) whose sequences begin at window-1."""
    if lengths is None:
        return line[L:].clone()  # and so does not keep the whole line
    index = lengths.clamp(0, L) + torch.arange(before, device=line.device)[:, None]
    index = index.view(index.shape + (1,) * (line.dim() - 2)).expand(before, *line.shape[1:])
    return line.gather(0, index)


def _where(kept: Tensor, x: Tensor) -> Tensor:
    """x (L, B, n), and zeros where `kept` (L, B) is false."""
    return torch.where(kept.unsqueeze(-1), x, 0)
