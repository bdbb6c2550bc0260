"""The dtypes that recurrences take, by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

IO_DTYPES = ("float16", "bfloat16", "float32", "float64")


@cache
def name_of(dtype: Any) -> str:
    """The name of a dtype of any library. NumPy forms it anew at each use."""
    return str(getattr(dtype, "name", None) or str(dtype).rpartition(".")[2])


def is_integer(name: str) -> bool:
    return name.startswith(("int", "uint"))


def state_dtype(dtype: str) -> str:
    """The dtype in which the state is carried and sums are formed, for x of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


@cache
def to_numpy(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of a name; bfloat16 is one when the package ml_dtypes is installed."""
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    return np.dtype(dtype)
