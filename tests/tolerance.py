"""How far results may be from the float64 oracle, relative to the largest magnitude of the array.

One table, dtype by quantity, each with its reason; nothing is loosened anywhere else.
"""

from __future__ import annotations

import numpy as np

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

# A value that is computed in the dtype of the state and rounded to `dtype` once: half a unit in its last place, and
# what float32 (float64) loses on the way: a sigmoid is right to 3 units, a state sums up the errors of about
# 1 / (1 - f) steps, here fewer than 16. A GPU needs no more: its sigmoid in float32 is right to 2e-7, or 3.4 units of
# numbers near 1. (Emulated with ex2 and rcp as far off as they may be, results took up less than half of the bound.)
STEP = {
    "float16": EPS["float16"] + 64 * EPS["float32"],
    "bfloat16": EPS["bfloat16"] + 64 * EPS["float32"],
    "float32": 64 * EPS["float32"],
    "float64": 64 * EPS["float64"],
}

# A gradient of a parameter is a sum over steps and sequences in which terms may cancel: four times as much.
SUM = {dtype: 4 * value for dtype, value in STEP.items()}

# A layer rounds U to `dtype` before the recurrence, and its gradient before the product that gives those of x and the
# weight. An error e of a gate changes the results by a few e; products over tens of columns average it.
LAYER = {
    "float16": 16 * EPS["float16"],
    "bfloat16": 16 * EPS["bfloat16"],
    "float32": 128 * EPS["float32"],
    "float64": 128 * EPS["float64"],
}


def check(name: str, got: np.ndarray, wanted: np.ndarray, bound: float) -> None:
    """Fails if `got` is farther from `wanted` than `bound` times the largest magnitude, or not finite."""
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, wanted {wanted.shape}"
    if not wanted.size:
        return
    found = error(got, wanted)
    assert found <= bound, f"{name}: relative error {found:.2e}, allowed {bound:.2e}"  # a NaN fails as well


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude."""
    return float(np.abs(np.asarray(got, np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30))
