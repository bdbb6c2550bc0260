"""Where an example runs: NumPy on the CPU, or CuPy on a GPU."""

from __future__ import annotations

from types import ModuleType

import numpy as np

CHOICES = ("auto", "cpu", "gpu")
HELP = "where to run; auto is a GPU if CuPy is installed and finds one (default %(default)s)"


def choose(wanted: str, fail) -> tuple[ModuleType, str]:
    """The array module for one of CHOICES, and words that say where that is. `fail` takes a message and does not
    return."""
    if wanted == "cpu":
        return np, "CPU"
    obstacle = _obstacle()
    if obstacle is None:
        import cupy

        number = cupy.cuda.get_device_id()
        name = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
        return cupy, f"GPU {number}, {name}, with CuPy {cupy.__version__}"
    if wanted == "gpu":
        fail(
            f"argument --device: there is no GPU to use ({obstacle}); --device cpu goes on without, and "
            "`python -m sru_rt doctor` says what is missing"
        )
    return np, f"CPU ({obstacle})"


def _obstacle() -> str | None:
    """Why the GPU cannot be used, None if it can."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "CuPy finds no GPU"
        cupy.zeros(1) + 1  # which NVRTC compiles
        cupy.cuda.get_cublas_handle()
    except ModuleNotFoundError as error:
        return "CuPy is not installed" if error.name == "cupy" else f"CuPy does not work here: {error}"
    except Exception as error:  # what CuPy raises for a missing library has many types
        return f"CuPy does not work here: {' '.join(str(error).split())[:200]}"
    return None
