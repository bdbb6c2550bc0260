"""The matrix products of a layer in eager mode, by the faster of the libraries that PyTorch carries.

PyTorch forms products of float32 by MKL, which on processors of other makers than Intel keeps to vectors of 256 bits.
Where there are 512, oneDNN, by which PyTorch computes convolutions and `torch.nn.LSTM`, takes half the time. The
operator that reaches it is the one that `torch.compile` has for linear layers; it has no place for a result to be
written to.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import processor
from . import native

_WORTH_ONEDNN = 1 << 24  # multiplications; preparing for sizes not seen before takes as long as a few million
_REUSED = 31 << 20  # bytes up to which PyTorch's allocations use memory again: see _keep_freed_memory
_PIECE = 4 << 20  # bytes that are formed at once where they are copied to memory in use
_ROWS_SUMMED = 1024  # what is summed along is turned: rows that the caches hold


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b, (M, K) times (K, N), contiguous."""
    if not _suits_onednn(a, b, b.shape[1]):
        return torch.mm(a, b, out=native.empty(a, (a.shape[0], b.shape[1])))
    return _onednn(a, b) if _is_reused(a, b) else _in_pieces(native.empty(a, (a.shape[0], b.shape[1])), a, b)


def add_times(rest: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """rest + a b, (M, N) + (M, K) times (K, N), contiguous; rest, which is contiguous, may be written to."""
    if not _suits_onednn(a, b, b.shape[1]):
        return rest.addmm_(a, b)
    return _onednn(a, b, rest) if _is_reused(a, b) else _in_pieces(rest, a, b, adds=True)


def transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """a' b, of (M, K) and (M, N), contiguous."""
    if not _suits_onednn(a, b, a.shape[1]):
        return torch.mm(a.t(), b)
    (first, beside), *others = zip(a.split(_ROWS_SUMMED), b.split(_ROWS_SUMMED), strict=True)
    found = _onednn(native.turned(first), beside)
    for rows, beside in others:
        found = _onednn(native.turned(rows), beside, found)
    return found


def _suits_onednn(a: Tensor, b: Tensor, n: int) -> bool:
    return (
        a.dtype == torch.float32
        and a.is_cpu
        and a.numel() * n >= _WORTH_ONEDNN
        and b.is_cpu
        and _onednn_is_faster()
        and torch.backends.mkldnn.enabled
    )


@functools.cache
def _onednn_is_faster() -> bool:
    vendor = processor.described().get("vendor_id", "GenuineIntel")
    found = (
        vendor != "GenuineIntel"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if found:
        _keep_freed_memory()
    return found


def _keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next call.

    glibc gives memory back to the system, and takes fresh pages for it again, beyond twice the largest block that was
    freed so far, but for those of 32 MiB and more. A small layer may spend half of its time in that.
    """
    torch.empty(_REUSED, dtype=torch.uint8)


def _onednn(a: Tensor, b: Tensor, rest: Tensor | None = None) -> Tensor:
    if rest is None:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(a, rest, b.t(), None, "add")


def _is_reused(a: Tensor, b: Tensor) -> bool:
    return a.shape[0] * b.shape[1] * a.element_size() <= _REUSED


def _in_pieces(found: Tensor, a: Tensor, b: Tensor, adds: bool = False) -> Tensor:
    """a b in place of what is found, or added to it; as many rows at once as give a piece."""
    count = max(1, _PIECE // (b.shape[1] * a.element_size()))
    for rows, piece in zip(a.split(count), found.split(count), strict=True):
        piece.copy_(_onednn(rows, b, piece if adds else None))
    return found
