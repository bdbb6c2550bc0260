"""PyTorch's own associative scan."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..problem import Problem
from . import tensors
from .scans import OnScan


class TorchScan(OnScan):
    """`associative_scan`, compiled and over pairs of numbers on a GPU; on the CPU as it is, which is all it has."""

    name = "associative_scan of PyTorch"
    needs = ("torch",)

    def function(self, torch: Any, problem: Problem) -> Any:
        scan = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan

        def combined(first: Any, second: Any) -> Any:
            return first[0] * second[0], second[0] * first[1] + second[1]

        if tensors.device() == "cpu":
            return lambda a, b: scan(combined, (a, b), dim=0, combine_mode="generic")[1]
        compiled = functools.partial(scan, combined, dim=0, combine_mode="pointwise")
        return torch.compile(lambda a, b: compiled((a, b))[1])
