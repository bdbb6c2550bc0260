"""The processor of this machine, as the system describes it."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def described() -> dict[str, str]:
    """What Linux says of the first core, such as its "vendor_id", "model name" and "flags"; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
