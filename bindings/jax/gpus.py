"""The GPUs that programs of JAX run on, through CuPy: their numbers, and kernels that are loaded beforehand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from ...errors import LibraryError
from ...passes import Layout
from .planner import passes_of, planned
from .statement import Statement


@functools.cache
def here() -> tuple[int, ...]:
    """The numbers of the GPUs of this process, as CUDA has them."""
    try:
        found = jax.local_devices(backend="cuda")
    except RuntimeError:  # there is no such backend
        return ()
    return tuple(d.id if d.local_hardware_id is None else int(d.local_hardware_id) for d in found)


def settled(statement: Statement, operands: Sequence[Layout]) -> Statement:
    """A statement that says into which chunks of time it is cut, as results that are scratch depend on that.

    Without a GPU here, or of sizes that are no numbers yet, it is not cut.
    """
    if not here() or not all(isinstance(size, int) for one in operands for size in one.shape):
        return statement
    on = here()[0]
    with device(on):
        passes, _ = passes_of(statement, operands, f"cuda:{on}", settled=False)
        return statement._replace(chunks=passes.chunks)


def load(statement: Statement, operands: Sequence[Layout], results: Sequence[Layout]) -> None:
    """Has the kernels compiled and loaded on every GPU, as neither may happen while XLA captures what they do.

    Raises:
        CompileError: CuPy or NVRTC are missing, or do not know the GPU.
    """
    if all(isinstance(size, int) for one in operands for size in one.shape):
        for number in here():
            with device(number):
                planned(statement, operands, results, f"cuda:{number}").prepared.load()


def device(number: int) -> AbstractContextManager[Any]:
    """Makes a GPU that of the thread."""
    return _cupy().cuda.Device(number)


def current() -> int:
    """The number of the thread's GPU: XLA has made its own the current one."""
    return int(_cupy().cuda.runtime.getDevice())


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise LibraryError(
            f"sru_rt: recurrences of JAX on a GPU are launched through CuPy, which cannot be imported ({error}); "
            "install it with pip install 'sru_rt[cuda12]', or 'sru_rt[cuda13]' where JAX is built for CUDA 13"
        ) from None
    return cupy
