"""Compiles C++ with the system's compiler and loads it with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import abi, cache, processor, settings, source
from .cell import Cell
from .emit import emit, struct_name
from .errors import ArgumentError, CacheError, CompileError
from .log import debug, warn_once

# No -ffast-math: linked into a shared object it turns denormals off for the whole process. No OpenMP: it hangs after a
# fork. -ffp-contract as port.h explains.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-w",
)

_lock = threading.RLock()


def _new_lock() -> None:
    """In a forked child: another thread of the parent may have held the lock, and that thread is not here."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, what it says of itself, and the flags that it takes."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """The entry points of one compiled cell: called with the packed struct, the pool and the number of tasks."""

    forward: Callable[..., None]
    backward: Callable[..., None]


def compiler() -> Compiler:
    """The C++ compiler in use. Raises CompileError if there is none."""
    return _compiler(settings.cxx(), settings.cxx_flags(), settings.path())


@functools.lru_cache(maxsize=8)
def _compiler(given: str | None, extra: tuple[str, ...], path: str) -> Compiler:
    try:
        command = tuple(shlex.split(given)) if given else _first_on_path()
    except ValueError as error:
        raise ArgumentError(f"SRU_RT_CXX (or CXX) is no command: {error} (got {given!r})") from None
    if shutil.which(command[0]) is None:
        raise CompileError(
            f"sru_rt: the C++ compiler {command[0]!r} (from SRU_RT_CXX or CXX) was not found; unset the variable, "
            "or name "
            "an installed compiler in it"
        )
    code, output = _run([*command, "--version"])
    if code != 0:
        raise CompileError(f"sru_rt: `{shlex.join(command)} --version` failed with status {code}:\n{output}")
    clang = "clang" in output
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    contract = "-ffp-contract=on" if clang else "-ffp-contract=off"
    return Compiler(command, output, (*_FLAGS, contract, *(() if clang else ("-Wno-psabi",)), native, *extra))


def _first_on_path() -> tuple[str, ...]:
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    raise CompileError(
        "sru_rt: no C++ compiler (c++, g++, clang++) was found on the PATH; install one (`apt-get install g++`, "
        "`conda install gxx`, `xcode-select --install`), or name one in SRU_RT_CXX"
    )


def _run(command: list[str]) -> tuple[int, str]:
    import subprocess

    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=settings.environment_of_compiler(),
            timeout=600,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()


@functools.cache
def _machine() -> str:
    """What -march=native depends on."""
    known = processor.described()
    named = (
        f"{name}: {known[name]}"
        for name in ("vendor_id", "model name", "flags", "Features", "CPU part")
        if name in known
    )
    return "\n".join([sys.platform, platform.machine(), *named])


def load(unit: str, *entries: str) -> ctypes.CDLL:
    """The shared object compiled from `unit`, from the cache if it is there. It has the functions `entries`.

    Raises CompileError with the compiler's output if it fails.
    """
    with _lock:
        found = compiler()
        key = hashlib.sha256(
            "\0".join([unit, source.digest(), *found.command, found.version, *found.flags, _machine()]).encode()
        )
        try:
            path = cache.folder() / f"{key.hexdigest()[:40]}.so"
            if cache.find(path):
                debug("cache hit %s", path)
                return _open(path, entries)
            return _compile_into_cache(found, unit, path, entries)
        except CacheError as error:
            warn_once("cache", f"{error}. Meanwhile kernels are compiled anew in each process")
        return _compile_for_this_process(found, unit, entries)


def _compile_into_cache(compiler: Compiler, unit: str, path: Path, entries: tuple[str, ...]) -> ctypes.CDLL:
    try:
        with _build_folder(path.parent) as build:
            cache.publish(_compile(compiler, unit, build), path)
    except OSError as error:
        raise CacheError(
            f"sru_rt: the cache folder {path.parent} cannot be written ({error}); set SRU_RT_CACHE_DIR to another one"
        ) from None
    return _open(path, entries)


def _compile_for_this_process(compiler: Compiler, unit: str, entries: tuple[str, ...]) -> ctypes.CDLL:
    try:
        with _build_folder(None) as build:
            return _open(_compile(compiler, unit, build), entries)
    except OSError as error:
        raise CompileError(
            f"sru_rt: nothing can be compiled, as there is no folder to write to ({error}); set TMPDIR to one, or "
            "SRU_RT_CPU=numpy to do without"
        ) from None


@contextlib.contextmanager
def _build_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that is gone in the end. Not a TemporaryDirectory, which a process forked meanwhile would remove."""
    folder = tempfile.mkdtemp(prefix=".build-" if parent else "sru_rt-", dir=parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(compiler: Compiler, unit: str, folder: Path) -> Path:
    """Compiles `unit` in `folder`; returns the shared object."""
    began = time.perf_counter()
    text, made = folder / "unit.cpp", folder / "unit.so"
    text.write_text(unit, encoding="utf-8")
    command = [*compiler.command, *compiler.flags, f"-I{source.cuda_dir()}", str(text), "-o", str(made)]
    code, output = _run(command)
    if code != 0 or not made.is_file():
        raise CompileError(
            f"sru_rt: the C++ compiler failed with status {code}.\ncommand: {shlex.join(command)}\n"
            f"output:\n{output[:4000] or '(none)'}\n"
            "Name another compiler in SRU_RT_CXX, or set SRU_RT_CPU=numpy to do without"
        )
    debug("compiled %s in %.2f s: %s", made, time.perf_counter() - began, shlex.join(command))
    return made


def _open(path: Path, entries: tuple[str, ...]) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for entry in entries:
            getattr(library, entry)
        return library
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)  # what a broken compiler made is not to be found again
        raise CompileError(
            f"sru_rt: {path} was compiled but cannot be loaded: {error}. If its folder is mounted noexec, set "
            "SRU_RT_CACHE_DIR (TMPDIR if that cannot be used) to another one; if not, name another compiler in "
            "SRU_RT_CXX, or set SRU_RT_CPU=numpy to do without"
        ) from None


@functools.cache
def kernel(cell: Cell, dtype: str, saved_dtype: str, wide: int) -> Kernel:
    """The kernels of `cell` for arrays of `dtype`; bit i of `wide` says that input i has the state's dtype."""
    unit = source.cpu_kernel(emit(cell), struct_name(cell), dtype, saved_dtype, wide)
    library = load(unit, "forward", "backward", "forward_size", "backward_size")
    for name in ("forward", "backward"):
        size = getattr(library, f"{name}_size")
        size.restype = ctypes.c_longlong
        declared = abi.layout(cell, name == "forward").size
        if size() != declared:
            raise CompileError(
                f"sru_rt: cuda/arguments.h and sru_rt/abi.py disagree on the {name} struct of {cell.name} "
                f"({size()} and {declared} bytes); the installation is damaged: reinstall it"
            )
    for entry in (library.forward, library.backward):
        entry.argtypes, entry.restype = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int), None
    return Kernel(library.forward, library.backward)


@functools.cache
def pool() -> int:
    """Address of the thread pool's `parallel_for`."""
    return _address(_pool().parallel_for)


@functools.cache
def openmp_pool(library: ctypes.CDLL) -> int:
    """Address of a `parallel_for` on the threads of an OpenMP runtime that `library` is or is linked with.

    Raises AttributeError if there is none.
    """
    entries = [_address(getattr(library, n)) for n in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    _pool().use_openmp(*map(ctypes.c_void_p, entries))
    return _address(_pool().parallel_for_openmp)


@functools.cache
def turn() -> Callable[..., None]:
    """Turns matrices: see cuda/turn.cpp."""
    entry = load(source.turn(), "turn").turn
    pointer, number = ctypes.c_void_p, ctypes.c_longlong
    entry.argtypes, entry.restype = (pointer, pointer, number, number, number, pointer, ctypes.c_int), None
    return entry


def prepared(
    kernel: Callable[..., None], pool: int | None, tasks: int, fields: Sequence[tuple[int | None, int]]
) -> Callable[[bytes], None]:
    """A kernel as a function of packed addresses, which go into its `fields` (see `sru_rt.prepared`)."""
    numbers = [n for number, rest in fields for n in (-1 if number is None else number, rest)]
    settled = struct.pack(f"={4 + len(numbers)}q", _address(kernel), pool or 0, tasks, len(fields), *numbers)
    return functools.partial(_run_prepared(), settled)


@functools.cache
def _run_prepared() -> Callable[[bytes, bytes], None]:
    entry = _pool().run_prepared
    entry.argtypes, entry.restype = (ctypes.c_char_p, ctypes.c_char_p), None
    return entry


def _pool() -> ctypes.CDLL:
    return load(source.pool(), "parallel_for", "use_openmp", "parallel_for_openmp", "run_prepared")


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
