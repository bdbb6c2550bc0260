"""Recurrences of JAX on several devices, which here are parts of one CPU: jit, shard_map, and what they exchange.

A number of devices is that of a process; jax_on_devices.py is its program.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs JAX")

from jax_tools import script

PROGRAM = Path(__file__).resolve().parent / "jax_on_devices.py"


@pytest.mark.parametrize(
    ("what", "devices", "directions"),
    [("jit", 1, 1), ("jit", 2, 2), ("jit", 4, 1), ("shard_map", 2, 1), ("shard_map", 4, 2)],
)
def test_on_devices(what, devices, directions, tmp_path):
    assert script(PROGRAM, what, directions, folder=tmp_path, devices=devices).endswith("done\n")
