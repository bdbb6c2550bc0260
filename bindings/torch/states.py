"""The state of a module, as users have it, and the states of its layers.

That of a module is (num_layers*D, B, d), a tuple of them for a cell of several states; row k*D + q is direction q of
layer k. That of a layer is (D, B, d), or (n, D, B, d) for n > 1 states of the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...check import Check
from ...errors import LibraryError
from . import given
from .native import state_dtype


def of_layers(
    check: Check, name: str, state: Any, n: int, sizes: tuple[int, int, Any, int], x: Tensor
) -> list[Tensor | None]:
    """The initial states of all layers, None for zeros. `sizes` are num_layers, D, B, d."""
    layers, D, B, d = sizes
    if state is None:
        return [None] * layers
    if n > 1 and (not isinstance(state, (tuple, list)) or len(state) != n):
        got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
        raise LibraryError(f"{check.function}: {name} must be a tuple of {n} tensors, one for each state (got {got})")
    named = [(name, state)] if n == 1 else [(f"{name}[{i}]", one) for i, one in enumerate(state)]
    wide = state_dtype(x.dtype)
    for one, tensor in named:
        given.tensor(check, one, tensor, x.device, "input")
        why = "num_layers, directions and hidden_size of the module, and B of input"
        given.shape(check, one, tensor, "num_layers*D B hidden_size", (layers * D, B, d), why)
        given.dtype(check, one, tensor, (wide, x.dtype))
    tensors = [tensor for _, tensor in named]
    if n == layers == 1:
        return tensors
    rows = [[tensor[k * D : (k + 1) * D] for tensor in tensors] for k in range(layers)]
    return [row[0] if n == 1 else torch.stack(row) for row in rows]


def together(states: Sequence[Tensor], n: int) -> Any:
    """The state of a module from those of its layers."""
    if n == 1:
        return states[0] if len(states) == 1 else torch.cat(list(states))
    return tuple(torch.cat([state[i] for state in states]) for i in range(n))


def each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of the tensors of a state, which may be a tuple of states; None stays None."""
    if isinstance(value, (tuple, list)):
        parts = [each(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return function(value) if isinstance(value, Tensor) else value
