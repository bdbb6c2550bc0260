"""Registers the handlers with XLA, under a name that says what they are compiled from.

JAX keeps what is registered before a backend exists, and hands it over when the user's first operation makes the
backend, which fails if XLA does not take the version of the interface that a handler reports. So `register` waits for
the backend, and is called at the first use of a recurrence; importing the binding registers at once only beside
releases of JAX that are known to take the version, so that programs that were exported find the handlers. The one of
the CPU is compiled then, which takes a third of a second, once on a machine.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax

from ... import settings, source
from ...errors import CompileError, LibraryError
from ...log import debug
from . import handlers
from .frame import NEWEST_MINOR, OLDEST_MINOR
from .statement import FORMAT

# Of JAX, whose XLA takes what the handlers report; tools/jax_releases.sh tries them.
_NEWEST_KNOWN = (0, 10)

_lock = threading.Lock()
_done: set[str] = set()  # platforms whose handlers XLA has taken


@functools.cache
def target() -> str:
    """The name of the custom calls. Other sources have another one: XLA takes one handler for each name."""
    folder = source.cuda_dir()
    found = hashlib.sha256(f"{FORMAT}".encode())
    for name in ("xla.cpp", "xla_ffi.h"):
        found.update((folder / name).read_bytes())
    return f"sru_rt_{found.hexdigest()[:16]}"


def register() -> None:
    """Registers the handlers, for programs that were exported and are loaded; recurrences do so by themselves.

    Raises:
        LibraryError: XLA takes none of the known versions of its interface.
    """
    with _lock:
        if len(_done) < 2:
            jax.local_devices()
            _register()


def register_if_known() -> None:
    """The same when the binding is imported, if that cannot break what the program does next."""
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version > _NEWEST_KNOWN:
        return
    with _lock:
        try:
            _register()
        except LibraryError as error:  # it is said again where a recurrence is used
            debug("%s", error)


def _register() -> None:
    if not hasattr(jax, "ffi"):
        raise LibraryError(
            f"sru_rt: JAX {jax.__version__} has no jax.ffi, by which XLA calls kernels; install jax>=0.5"
        )
    for platform, report, address in (("cpu", *_of_cpu()), ("CUDA", *_of_gpu())):
        if platform not in _done:
            _try_versions(platform, report, address)
            _done.add(platform)


def _of_cpu() -> tuple[Callable[[int], Any], int]:
    """What sets the version that the CPU's handler reports, and its address."""
    if settings.cpu_backend() != "numpy":
        try:
            return handlers.compiled_report, handlers.compiled_address()
        except CompileError as error:
            debug("%s", error)
    made = handlers.handler("cpu")
    return made.report, made.address


def _of_gpu() -> tuple[Callable[[int], Any], int]:
    made = handlers.handler("CUDA")
    return made.report, made.address


def _try_versions(platform: str, report: Callable[[int], Any], address: int) -> None:
    refused: dict[str, None] = {}
    for minor in _versions():
        report(minor)
        try:
            jax.ffi.register_ffi_target(target(), jax.ffi.pycapsule(address), platform=platform)
            return
        except Exception as error:  # what is raised differs between releases
            refused[str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__] = None
    known = ", ".join(f"0.{minor}" for minor in range(OLDEST_MINOR, NEWEST_MINOR + 1))
    raise LibraryError(
        f"sru_rt: XLA of JAX {jax.__version__} does not take the handlers of sru_rt for {platform}, which know "
        f"versions {known} of its foreign function interface ({'; '.join(refused)}); install a newer sru_rt, or jax<="
        f"{'.'.join(map(str, _NEWEST_KNOWN))}"
    )


def _versions() -> Iterable[int]:
    """To be tried in turn: first what suits XLA by its own account, then the others, newest first."""
    return 0, *range(NEWEST_MINOR, OLDEST_MINOR - 1, -1)
