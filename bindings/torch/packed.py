"""PackedSequence to padded, time-major tensors and back, on the device, without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Packing(NamedTuple):
    """How tokens were packed; `rows` are their places among those of a padded (L*B, ...)."""

    batch_sizes: Tensor
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None
    rows: Tensor


def unpack(packed: PackedSequence) -> tuple[Tensor, Tensor, Packing]:
    """Tokens (L, B, n) with zeros at padding, lengths (B,), and what `repack` needs.

    Sequences are in the order that they had before they were sorted by length, which is that of states.
    """
    data, sizes = packed.data, packed.batch_sizes  # sizes are on the host
    L, B = len(sizes), int(sizes[0])
    t = torch.repeat_interleave(torch.arange(L, device=sizes.device), sizes, output_size=len(data))
    place = torch.arange(len(data), device=sizes.device) - (sizes.cumsum(0) - sizes)[t]  # among the sequences as sorted
    lengths = (torch.arange(B, device=sizes.device)[:, None] < sizes).sum(1)
    t, place, lengths = (made.to(data.device, non_blocking=True) for made in (t, place, lengths))
    if packed.sorted_indices is not None:
        place, lengths = packed.sorted_indices[place], lengths[packed.unsorted_indices]
    rows = t * B + place
    padded = data.new_zeros(L * B, *data.shape[1:]).index_copy(0, rows, data)
    packing = Packing(sizes, packed.sorted_indices, packed.unsorted_indices, rows)
    return padded.view(L, B, *data.shape[1:]), lengths, packing


def repack(padded: Tensor, packing: Packing) -> PackedSequence:
    """Tokens (L, B, n), packed as those that `unpack` was given."""
    data = padded.flatten(0, 1).index_select(0, packing.rows)
    return PackedSequence(data, packing.batch_sizes, packing.sorted_indices, packing.unsorted_indices)
