"""Checks of what `SRU` and `SRUCell` are given."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...cells.sru import ACTIVATIONS
from ...check import Check
from ...errors import DtypeError, ShapeError
from . import given


def projects_skip(check: Check, project_skip: Any, has_skip_term: bool, input_size: int, output_size: int) -> bool:
    """Whether the skip has a matrix of its own."""
    project_skip = check.choice("project_skip", project_skip, ("auto", True, False))
    differ = input_size != output_size
    if project_skip is True and not has_skip_term:
        raise check.error("project_skip", "is True, but has_skip_term=False; leave one of them out")
    if project_skip is False and has_skip_term and differ:
        sizes = f"x of size {input_size} to h of size {output_size}"
        raise check.error("project_skip", f"is False, but the skip adds {sizes}; use 'auto', or has_skip_term=False")
    return has_skip_term and (project_skip is True or differ)


def effective_projection(check: Check, size: Any, input_size: int, output_size: int) -> int:
    """The size of a projection, 0 if there is none or it has no effect."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise check.error("n_proj", f"must be an integer >= 0 (got {size!r})")
    if size == 0 or size < min(input_size, output_size):
        return size
    warnings.warn(
        f"{check.function}: a projection of size {size} has no effect, as it must be below input_size {input_size} and "
        f"below the output size {output_size}; the weight is whole",
        stacklevel=3,
    )
    return 0


def activation(check: Check, value: Any, use_tanh: Any) -> str:
    check.choice("activation", value, tuple(ACTIVATIONS))
    if use_tanh and value == "relu":
        raise check.error("activation", "is 'relu', but use_tanh=True; leave one of them out")
    return "tanh" if use_tanh else value


def tokens(check: Check, x: Any, letters: str, size: int, device: torch.device, weight: Tensor | None) -> Tensor:
    """`x` if it has the axes, `size` as the last one, and the dtype of the weight that sees it; None: of any dtype."""
    x = given.tensor(check, "input", x, device)
    needed = letters.split()
    if x.dim() != len(needed) or x.shape[-1] != size:
        problem = f"has shape {tuple(x.shape)}; it needs ({', '.join(needed)}), with input_size = {size}"
        raise check.error("input", problem, ShapeError)
    if weight is None or x.dtype == weight.dtype:
        return x
    converts = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    if not (converts and torch.is_autocast_enabled(device.type)):
        raise DtypeError(
            f"{check.function}: input has dtype {x.dtype}; it needs {weight.dtype}, that of the parameters: convert it "
            f"with input.to({weight.dtype}), or the module with module.to({x.dtype})"
        )
    return x


def state(check: Check, c0: Any, letters: str, sizes: tuple[Any, ...], x: Tensor) -> Tensor:
    """`c0` if it is a state of these sizes beside x (L, B, input_size)."""
    c0 = given.tensor(check, "c0", c0, x.device, "input")
    given.shape(check, "c0", c0, letters, sizes, "B comes from input, all else from the module")
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    given.dtype(check, "c0", c0, (torch.float64, *narrow) if x.dtype == torch.float64 else narrow)
    return c0


def flags(
    check: Check, name: str, value: Any, letters: str, sizes: tuple[Any, ...], device: torch.device
) -> Tensor | None:
    """`value` as bool, of any dtype, if it has the axes."""
    if value is None:
        return None
    value = given.tensor(check, name, value, device, "input")
    given.shape(check, name, value, letters, sizes, "L and B come from input")
    return value.to(torch.bool)
