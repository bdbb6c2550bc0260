"""The scans of HGRN in flash-linear-attention: h = exp(g)*h + x, on arrays (B, L, d)."""

from __future__ import annotations

import importlib
from typing import Any

from ..problem import Problem
from .scans import OnScan


class Recurrent(OnScan):
    """One program for some channels of a sequence, over all steps."""

    name = "fla, fused_recurrent_hgrn"
    needs = ("torch", "fla")
    command = "fla-core"
    only = "gpu"
    axes = (1, 0, 2)
    takes_log = True
    kind = "fused_recurrent_hgrn"

    def function(self, torch: Any, problem: Problem) -> Any:
        scan = getattr(importlib.import_module("fla.ops.hgrn"), self.kind)
        return lambda g, b: scan(b, g)[0]


class Chunked(Recurrent):
    """Chunks of 128 steps at once, then what they leave to each other, one after another."""

    name = "fla, chunk_hgrn"
    kind = "chunk_hgrn"
