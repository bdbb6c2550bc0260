"""Checks of what a module is given: options when it is made, tensors when it is called.

A message begins with the name of the class, as `Check` of the core has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...check import Check
from ...errors import DtypeError, LibraryError, ShapeError
from .autograd import is_eager

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def size(check: Check, name: str, value: Any) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise check.error(name, f"must be a positive integer (got {value!r})")
    return value


def flag(check: Check, name: str, value: Any) -> bool:
    """A bool, of Python or NumPy, or 0 or 1."""
    if isinstance(value, (bool, int, np.bool_)) and value in (0, 1):
        return bool(value)
    raise check.error(name, f"must be True or False (got {value!r})")


def probability(check: Check, name: str, value: Any, less_than_one: bool = False) -> float:
    number = check.number(name, value)
    if not 0 <= number <= 1 or (less_than_one and number == 1):
        raise check.error(
            name, f"must be a probability, 0 <= {name} {'<' if less_than_one else '<='} 1 (got {value!r})"
        )
    return number


def floating(check: Check, dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    check.choice("dtype", dtype, DTYPES)
    return dtype


def tensor(check: Check, name: str, value: Any, device: torch.device, origin: str = "the module") -> Tensor:
    """`value`, if it is a tensor on `device`, where `origin` is."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
        raise LibraryError(f"{check.function}: {name} must be a torch.Tensor (got {got}); pass torch.as_tensor({name})")
    dense(check.function, name, value)
    if value.device != device:
        raise LibraryError(
            f"{check.function}: {name} is on {value.device}, but {origin} is on {device}; move it with "
            f"{name}.to({str(device)!r})"
        )
    return value


def dense(function: str, name: str, value: Tensor) -> None:
    """Raises unless a tensor is one block of memory with strides."""
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        way = "torch.nested.to_padded_tensor, and lengths" if value.is_nested else f"{name}.to_dense()"
        raise LibraryError(f"{function}: {name} is {kind}; it must be a dense tensor: pass {way}")


def shape(check: Check, name: str, value: Tensor, letters: str, sizes: Sequence[Any], why: str) -> None:
    """Raises unless `value` has the sizes, whose letters are such as "L B"; `why` says where they come from."""
    if tuple(value.shape) != tuple(sizes):
        needed = f"({letters.replace(' ', ', ')}) = ({', '.join(map(str, sizes))})"
        raise ShapeError(f"{check.function}: {name} has shape {tuple(value.shape)}; it needs {needed}: {why}")


def dtype(check: Check, name: str, value: Tensor, dtypes: Sequence[torch.dtype], way: str = "") -> None:
    if value.dtype not in dtypes:
        needed = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise DtypeError(
            f"{check.function}: {name} has dtype {value.dtype}; it needs {needed}: convert it with "
            f"{name}.to({dtypes[0]}){way}"
        )


def lengths(check: Check, value: Any, L: Any, B: Any, device: torch.device) -> Tensor | None:
    """`lengths` (B,) on `device`; a list of integers, or a tensor of the host, will do.

    Values on a device are left to the kernel, which clamps them, as looking at them would wait for it.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        value = _of_list(check, value)
    if not isinstance(value, Tensor):
        got = type(value).__name__
        raise LibraryError(
            f"{check.function}: lengths must be a tensor or a list of integers (got {got}); pass "
            "torch.as_tensor(lengths)"
        )
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        problem = f"lengths has dtype {value.dtype}; it needs an integer dtype: convert it with lengths.long()"
        raise DtypeError(f"{check.function}: {problem}")
    shape(check, "lengths", value, "B", (B,), "one for each sequence of input")
    if value.is_cpu and is_eager(value) and value.numel():
        least, most = (int(v) for v in torch.aminmax(value.long()))
        if least < 0 or most > L:
            raise check.error("lengths", f"must be from 0 to L = {L} (got values from {least} to {most})")
    # Without waiting; what comes from a device must be there before the host may read it.
    return value.to(device=device, dtype=torch.int64, non_blocking=value.device.type == "cpu")


def _of_list(check: Check, value: Sequence[Any]) -> Tensor:
    try:
        return torch.tensor(value, device="cpu") if len(value) else torch.zeros(0, dtype=torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise check.error("lengths", f"must be a tensor or a list of integers (got {value!r})") from None
