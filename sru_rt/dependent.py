"""Launches kernels that may begin while the one before them on a stream still runs.

Such a kernel waits for that one itself, before it reads what others write: see `wait_for_the_kernel_before` in
cuda/ptx.h. NVIDIA calls this programmatic dependent launch; it takes compute capability 9.0, and CUDA 12.3, from which
on it can be captured into graphs. CuPy does not ask the driver for it, so this does.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

SINCE_ARCH = 90
_SINCE_DRIVER = 12030
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier, and a value of 64 bytes at an offset of 8."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


_ATTRIBUTE = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=(ctypes.c_int * 16)(1))


@functools.cache
def launcher(driver_version: int) -> Callable[..., None] | None:
    """A function like CuPy's `driver.launchKernel` that lets kernels begin early, None where the driver cannot."""
    if driver_version < _SINCE_DRIVER:
        return None
    try:
        entry: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):  # the name of another system's driver
        return None
    entry.argtypes = (ctypes.POINTER(_Config), *(ctypes.c_void_p,) * 3)

    def launch(function: int, *sizes: int) -> None:
        grid, block, (shared, stream, parameters, extra) = sizes[:3], sizes[3:6], sizes[6:]
        config = _Config(grid, block, shared, stream, ctypes.pointer(_ATTRIBUTE), 1)
        _raise(entry(config, function, parameters, extra or None), sizes)

    return launch


def _raise(status: int, sizes: Sequence[int]) -> None:
    if status:
        raise RuntimeError(
            f"sru_rt: the driver refuses a launch of {sizes[:7]} with CUresult {status}; SRU_RT_PLAN=decode=0 has one "
            "token go by a product, without this kernel"
        )
