"""Every environment variable that the library reads, with its default and its meaning. Read at each use.

But what is prepared for calls of one kind (see `prepared`) goes by what was set when it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ArgumentError

BACKENDS = ("auto", "compiled", "numpy")


def cache_dir() -> Path:
    """SRU_RT_CACHE_DIR: where compiled code is kept. Default: `sru_rt` in the user's cache folder."""
    given = os.environ.get("SRU_RT_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "sru_rt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sru_rt"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "sru_rt"


def cpu_backend() -> str:
    """SRU_RT_CPU: `compiled` insists on compiled kernels, `numpy` never compiles, `auto` (default) tries the former."""
    value = os.environ.get("SRU_RT_CPU", "auto") or "auto"
    if value not in BACKENDS:
        raise ArgumentError(
            f"SRU_RT_CPU must be one of {', '.join(BACKENDS)} (got {value!r}); unset it for the default"
        )
    return value


def cxx() -> str | None:
    """SRU_RT_CXX, else CXX: the C++ compiler's command. Default: the first of c++, g++, clang++ on the PATH."""
    return os.environ.get("SRU_RT_CXX", "").strip() or os.environ.get("CXX", "").strip() or None


def cxx_flags() -> tuple[str, ...]:
    """SRU_RT_CXXFLAGS: flags added at the end of the compiler's command, separated by blanks."""
    return tuple(os.environ.get("SRU_RT_CXXFLAGS", "").split())


def num_threads() -> int:
    """SRU_RT_NUM_THREADS, else OMP_NUM_THREADS: threads of a CPU kernel. Default: the cores the process may use."""
    for name in ("SRU_RT_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()
        if value:
            if not value.isdecimal() or int(value) < 1:
                raise ArgumentError(f"{name} must be a positive number (got {value!r}); unset it for the default")
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def asks_for_threads() -> bool:
    """Whether SRU_RT_NUM_THREADS is set."""
    return bool(os.environ.get("SRU_RT_NUM_THREADS", "").strip())


def pool_bytes() -> int:
    """SRU_RT_POOL_MB: how much freed memory is kept for the next arrays, in MiB (default 512); 0 keeps none."""
    value = os.environ.get("SRU_RT_POOL_MB")
    if not value:
        return 512 << 20
    if not value.isdecimal():
        raise ArgumentError(f"SRU_RT_POOL_MB must be a number of MiB (got {value!r}); unset it for the default")
    return int(value) << 20


def plan_text() -> str:
    """SRU_RT_PLAN, as it is."""
    return os.environ.get("SRU_RT_PLAN", "")


def plan() -> dict[str, int]:
    """SRU_RT_PLAN: overrides what the planner decides for a GPU, such as `depth=16,threads=64,width=1`."""
    value = plan_text().strip()
    try:
        return {name.strip(): int(number) for name, _, number in (p.partition("=") for p in value.split(",") if value)}
    except ValueError:
        raise ArgumentError(
            f"SRU_RT_PLAN must be a list such as depth=16,threads=64 (got {value!r}); unset it for the default"
        ) from None


def path() -> str:
    """PATH: where the compiler is looked for."""
    return os.environ.get("PATH", "")


_OF_CALLS = (
    "SRU_RT_CPU",
    "SRU_RT_CXX",
    "CXX",
    "SRU_RT_CXXFLAGS",
    "SRU_RT_NUM_THREADS",
    "OMP_NUM_THREADS",
    "SRU_RT_PLAN",
)


def _reader() -> tuple[Callable[[Any], Any], tuple[Any, ...]]:
    """What reads the environment, and the names to read: without what `os.environ` does for a name that is not set."""
    data = getattr(os.environ, "_data", None)
    if isinstance(data, dict):
        return data.get, tuple(map(os.environ.encodekey, _OF_CALLS))
    return os.environ.get, _OF_CALLS


_get, _names = _reader()


def of_calls() -> tuple[Any, ...]:
    """The values of all variables that the plan of a call depends on."""
    return tuple([_get(name) for name in _names])


def environment_of_compiler() -> dict[str, str]:
    """The environment without what a sanitizer or profiler has preloaded, which is for this process alone."""
    return {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")}


def tf32() -> bool:
    """SRU_RT_TF32: 1 lets products of float32 arrays on a GPU round their operands to 10 bits, for speed."""
    return os.environ.get("SRU_RT_TF32", "") not in ("", "0")


def debug() -> bool:
    """SRU_RT_DEBUG: 1 logs compilation and cache use to the logger `sru_rt` on standard error.

    It also has lengths checked that are on a GPU, which waits for it.
    """
    return os.environ.get("SRU_RT_DEBUG", "") not in ("", "0")
