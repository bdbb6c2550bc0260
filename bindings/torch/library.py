"""The core's functions on tensors: the core checks and chooses the cell, and the layer of this binding runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import spec
from ...cell import Cell
from ...errors import LibraryError
from ...inputs import Input
from ...layer import apart
from ...options import Options
from ..recompute import policy
from . import autograd, given, repeat
from .projection import as_autocast

_DEVICES = ("cpu", "cuda", "meta")


class PyTorch:
    """PyTorch on one device, as `sru_rt.library.Library`; of that, what the checks of a layer need."""

    xp = torch
    name = "torch"
    row_padding = 0

    def __init__(self, device: torch.device, reads_values: bool) -> None:
        self._device, self.device, self.reads_values = device, str(device), reads_values

    @property
    def layer(self) -> Callable[..., tuple[Any, ...]]:
        return run

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def plain(self, function: str, name: str, value: Any, origin: str) -> Tensor:
        if not isinstance(value, Tensor):
            got = "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
            way = "pass one" if value is None else f"pass torch.as_tensor({name}, device={str(self._device)!r})"
            raise LibraryError(f"{function}: {name} must be a tensor, as {origin} is (got {got}); {way}")
        given.dense(function, name, value)
        if value.device != self._device:
            way = f"pass {name}.to({str(self._device)!r})"
            raise LibraryError(
                f"{function}: {name} is on device {value.device}, but {origin} is on {self._device}; {way}"
            )
        return as_autocast(value) if name in ("x", "u") or name.startswith("weight") else value

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()

    def from_host(self, array: np.ndarray[Any, Any]) -> Tensor:
        if array.dtype.name == "bfloat16":  # which PyTorch does not take from NumPy
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(array).to(self._device)

    def integers(self, array: Any) -> Tensor:
        found = torch.from_numpy(array.astype(np.int64)) if isinstance(array, np.ndarray) else array
        return found.to(self._device, torch.int64)

    def conversion(self, name: str, dtype: str) -> str:
        return f"{name}.to(torch.{dtype})"

    def contiguous(self, array: Tensor, dtype: np.dtype[Any]) -> Tensor:
        return array.to(getattr(torch, dtype.name)).contiguous()


@cache
def _library(device: torch.device, reads_values: bool) -> PyTorch:
    return PyTorch(device, reads_values)


def library(tensor: Tensor) -> PyTorch:
    """The library of a tensor.

    Raises:
        LibraryError: no kernel runs where it is.
    """
    if tensor.device.type not in _DEVICES:
        raise LibraryError(
            f"sru_rt: there are no kernels for tensors on device {tensor.device}, only on cpu and cuda; move them there"
        )
    return _library(tensor.device, tensor.is_cpu and autograd.is_eager(tensor))


def run(
    function: str,
    cell: Cell,
    arrays: Mapping[str, Tensor],
    c0: Sequence[Tensor | None],
    constants: Sequence[float],
    flags: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: Options,
    projected: Input | None,
) -> tuple[Any, ...]:
    """Runs a layer, or a recurrence if nothing is projected; see `sru_rt.library.Library.layer`."""
    instead = (
        "which records their gradient itself: leave it out and call backward() on the loss; the functions of "
        "sru_rt.bindings.torch have recompute="
    )
    recompute = policy(function, options, "tensors of PyTorch", instead).value
    (gates,) = (a.name for a in cell.arrays if a.kind == "gates")
    window, factors = (projected.window, projected.factors) if projected else (0, ())
    arrays = apart(cell, arrays, factors[0].shape[0] if projected else arrays[gates].shape[2])
    own = [arrays[a.name] for a in cell.arrays if a.kind not in ("gates", "state")]
    settled = repeat.Run(spec.text_of(cell), window, tuple(constants), recompute, options.time_parallel)
    operands = repeat.Operands(projected.x if projected else arrays[gates], factors, own, c0, flags)
    results = settled(operands)
    repeat.remember(settled, operands, options.in_workspace)
    return results
