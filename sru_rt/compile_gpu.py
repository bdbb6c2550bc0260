"""Compiles kernels for NVIDIA GPUs, with the NVRTC that CuPy finds, to machine code in the library's own cache.

Nothing here needs a GPU or a driver.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

from . import abi, cache, source
from .emit import emit, struct_name
from .errors import CacheError, CompileError
from .log import debug, warn_once
from .plan import Plan
from .variant import Variant

# --fmad=false: where a product and a sum are fused, the text says fma(). The last option writes registers into the log.
FLAGS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v")
INSTALL = "`pip install 'sru_rt[cuda12]'` (or cuda13, to match the CUDA release of the driver and of other packages)"

# Architectures of systems on a chip, whose code other members of the generation do not run.
_TEGRA = (53, 62, 72, 87, 88, 101, 110)

_lock = threading.Lock()


def cubin(variant: Variant, plan: Plan, arch: int) -> bytes:
    """The machine code of one pass for an architecture such as 90, from the cache if it is there.

    Raises:
        CompileError: CuPy or NVRTC are missing, NVRTC does not know the architecture, or it fails.
    """
    text = unit(variant, plan)
    with _lock:
        return _from_cache(text, arch)


def is_cached(variant: Variant, plan: Plan, arch: int) -> bool:
    """Whether `cubin` will find the machine code."""
    try:
        return cache.find(_entry(unit(variant, plan), _options(arch)))
    except CacheError:
        return False


def unit(variant: Variant, plan: Plan) -> str:
    """The source text of one pass."""
    cell = variant.cell
    size = abi.layout(cell, plan.forward).size
    return source.gpu_kernel(emit(cell), struct_name(cell), variant, plan, size)


def nvrtc() -> Any:
    """CuPy's binding of NVRTC, with a library behind it."""
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise CompileError(
            f"sru_rt: kernels for a GPU are compiled through CuPy, which cannot be imported ({error}); {INSTALL}"
        ) from None
    try:
        nvrtc.getVersion()
    except Exception as error:
        raise CompileError(
            f"sru_rt: NVRTC, which compiles kernels for the GPU, was not found ({error}); {INSTALL}"
        ) from None
    return nvrtc


def target(arch: int) -> int:
    """The architecture to compile for: `arch`, or the nearest older one of its generation that NVRTC knows.

    Raises:
        CompileError: NVRTC knows none.
    """
    known = tuple(nvrtc().getSupportedArchs())
    fitting = [a for a in known if a == arch or (a // 10 == arch // 10 and a < arch and a not in _TEGRA)]
    if not fitting:
        raise CompileError(
            f"sru_rt: NVRTC {version()} does not know sm_{arch}, only {', '.join(f'sm_{a}' for a in known)}; install "
            f"another release of it: {INSTALL}"
        )
    return max(fitting)


def version() -> str:
    """Of NVRTC, such as 12.9."""
    return ".".join(map(str, nvrtc().getVersion()))


def _from_cache(text: str, arch: int) -> bytes:
    options = _options(arch)
    made = None
    try:
        path = _entry(text, options)
        found = cache.read(path)
        if found is not None:
            debug("cache hit %s", path)
            return found
        made = compile(text, options)[0]
        cache.write(made, path)
    except CacheError as error:
        warn_once("cache", f"{error}. Meanwhile kernels are compiled anew in each process")
    return made or compile(text, options)[0]


def _options(arch: int) -> tuple[str, ...]:
    return f"-arch=sm_{target(arch)}", *FLAGS


def _entry(text: str, options: tuple[str, ...]) -> Path:
    key = hashlib.sha256("\0".join([text, source.digest(), version(), *options]).encode()).hexdigest()
    return cache.folder() / f"{key[:40]}.cubin"


def compile(text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Machine code and NVRTC's log, which holds the registers of each kernel."""
    binding = nvrtc()
    began = time.perf_counter()
    program = binding.createProgram(text, "sru_rt.cu", *_headers())
    try:
        binding.compileProgram(program, options)
        made, log = bytes(binding.getCUBIN(program)), str(binding.getProgramLog(program))
    except binding.NVRTCError as error:
        raise CompileError(
            f"sru_rt: NVRTC {version()} failed ({error}).\noptions: {' '.join(options)}\n"
            f"output:\n{binding.getProgramLog(program)[:4000]}"
        ) from None
    finally:
        binding.destroyProgram(program)
    debug("compiled %d bytes in %.2f s with %s", len(made), time.perf_counter() - began, " ".join(options))
    return made, log


@functools.cache
def _headers() -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Texts and names of the headers, given to NVRTC as they are, as it need not be able to read files."""
    paths = sorted(source.cuda_dir().glob("*.h"))
    return tuple(path.read_bytes() for path in paths), tuple(path.name.encode() for path in paths)
