"""What SRU_RT_PLAN says in place of what the planner decides for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import settings
from .errors import ArgumentError


def read() -> dict[str, int]:
    """What it says. Raises ArgumentError where it is not understood."""
    chosen = settings.plan()
    limits: Mapping[str, Sequence[int]] = {
        "width": (1, 2),
        "depth": range(1, 65),
        "threads": range(32, 1025, 32),
        "chunk": range(1, 1 << 31),
        "lookahead": (0, 1),
        "staged": range(4),
        "laps": (0, *range(2, 17)),
        "warm_up": range(1, 1 << 31),
        "decode": (0, 1),
        "small": (0, 1),
    }
    for name, value in chosen.items():
        if name not in limits or value not in limits[name]:
            raise ArgumentError(
                f"SRU_RT_PLAN has {name}={value}; it takes width=1 or 2, depth=1..64, threads=32..1024 in steps of 32, "
                "chunk=1 or more, lookahead=0 or 1, staged=0..3, laps=0 or 2..16, warm_up=1 or more, decode=0 or "
                "1, small=0 or 1, separated by commas"
            )
    return chosen


def in_one_kernel(chosen: Mapping[str, int]) -> bool:
    """Whether chunks go through one kernel where steps compose, not three; `chosen` is what read() gave."""
    return bool(chosen.get("lookahead", 1))
