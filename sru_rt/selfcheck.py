"""One small recurrence, forward and backward, on a backend of choice, in a process of its own.

`python -m sru_rt.selfcheck cuda:0` computes and writes the results as JSON; `on` starts such a process. So a backend
that kills its process is seen as a failure like any other, and memory of a GPU is held no longer than needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

from . import settings
from .cells.sru import sru_backward, sru_forward

_SECONDS = 300

# What the magnitudes of each result add up to, computed from the papers' equations by tests/oracle.
EXPECTED = {
    "h": 77.27514,
    "c_last": 18.95735,
    "dx": 84.54789,
    "dweight": 253.78853,
    "dbias": 10.07803,
    "dv": 5.08618,
    "dc0": 14.68870,
}
_TOLERANCE = 1e-4
_TOLERANCE_OF_TF32 = 2e-2


def inputs() -> dict[str, Any]:
    """Arguments of `sru_forward`: two directions, ragged lengths; multiples of 1/4, so that U is exact everywhere."""
    L, B, D, d = 9, 3, 2, 8

    def quarters(*shape: int) -> np.ndarray[Any, Any]:
        numbers = np.arange(np.prod(shape), dtype=np.int64)
        return ((numbers * 7919 % 101 % 9 - 4) / 4).astype(np.float32).reshape(shape)

    return {
        "x": quarters(L, B, D * d),
        "weight": quarters(D, 3, d, D * d) / 4,
        "bias": quarters(D, 2, d),
        "v": quarters(D, 2, d),
        "c0": quarters(D, B, d),
        "lengths": [L, 4, 0],
    }


def compute(device: str) -> dict[str, list[float]]:
    """The results on "cpu" (see SRU_RT_CPU) or such as "cuda:0", by name."""
    arguments = inputs()
    if device != "cpu":
        import cupy

        cupy.cuda.Device(int(device.partition(":")[2])).use()
        arguments = {n: cupy.asarray(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    h, c_last, saved = sru_forward(**arguments, save=4)
    gradients = sru_backward(saved, h, c_last)
    results = {"h": h, "c_last": c_last}
    results |= {f"d{name}": getattr(gradients, name) for name in ("x", "weight", "bias", "v", "c0")}
    return {name: (a if device == "cpu" else a.get()).ravel().tolist() for name, a in results.items()}


def on(device: str, cpu_backend: str) -> dict[str, Any]:
    """What a process of its own computed: {"values", "seconds"}, or {"error"}."""
    environment = {**settings.environment_of_compiler(), "SRU_RT_CPU": cpu_backend}
    command = [sys.executable, "-m", "sru_rt.selfcheck", device]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {_SECONDS} s"}
    except OSError as error:
        return {"error": f"cannot start {sys.executable}: {error}"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        return {"error": f"the process ended with status {done.returncode}: {last}"}


def verdict(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Whether results are as expected, and agree with the reference if that is as expected itself."""
    if "error" in found:
        return {"computes": False, "error": found["error"]}
    values, right = found["values"], reference.get("values")
    wrong = _unexpected(values) or (_unlike(values, right) if right and not _unexpected(right) else "")
    if wrong:
        return {"computes": False, "error": f"wrong results: {wrong}"}
    return {"computes": True, "seconds": found["seconds"]}


def _unexpected(values: dict[str, list[float]]) -> str:
    for name, right in EXPECTED.items():
        total = float(np.abs(values[name]).sum())
        if not abs(total - right) <= _tolerance() * right:  # NaN is wrong, too
            return f"the magnitudes of {name} add up to {total:.6g} instead of {right:.6g}"
    return ""


def _unlike(values: dict[str, list[float]], reference: dict[str, list[float]]) -> str:
    for name, right in reference.items():
        apart, scale = np.abs(np.subtract(values[name], right)).max(), np.abs(right).max()
        if not apart <= _tolerance() * scale:
            return f"{name} differs from the NumPy backend's by {apart / scale:.2g} of its largest value"
    return ""


def _tolerance() -> float:
    return _TOLERANCE_OF_TF32 if settings.tf32() else _TOLERANCE


def main(device: str) -> int:
    """Computes, and writes one line."""
    began = time.perf_counter()
    try:
        found: dict[str, Any] = {"values": compute(device), "seconds": round(time.perf_counter() - began, 2)}
    except Exception as error:
        found = {"error": " ".join(str(error).removeprefix("sru_rt: ").split()) or type(error).__name__}
    sys.stdout.write(json.dumps(found) + "\n")
    return int("error" in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
