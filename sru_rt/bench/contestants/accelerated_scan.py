"""accelerated-scan, on arrays (B, d, L), as it wants them."""

from __future__ import annotations

import importlib
from typing import Any

from ..contest import LeftOut
from ..problem import Problem
from .scans import OnScan


class Scalar(OnScan):
    """Its scan in Triton."""

    name = "accelerated-scan, scalar"
    needs: tuple[str, ...] = ("torch", "triton", "accelerated_scan")
    command = "accelerated-scan"
    only = "gpu"
    axes = (1, 2, 0)
    module = "accelerated_scan.scalar"

    def function(self, torch: Any, problem: Problem) -> Any:
        return importlib.import_module(self.module).scan


class Warp(Scalar):
    """Its scan in CUDA, for lengths that are powers of two, from 32 to 65536; it is built when it is imported."""

    name = "accelerated-scan, warp"
    needs = ("torch", "accelerated_scan")
    module = "accelerated_scan.warp"

    def function(self, torch: Any, problem: Problem) -> Any:
        L = problem.L
        if L & (L - 1) or not 32 <= L <= 65536:
            raise LeftOut("it takes lengths that are powers of two, from 32 to 65536")
        return super().function(torch, problem)
