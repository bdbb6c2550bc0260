"""Runs CUDA source on the CPU, for tests: compiles it with g++ and launches kernels as CuPy does.

    module = Module('extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2; }')
    module.get_function("twice")((1,), (32,), (pointer,))

The text is that which NVRTC compiles; headers are found in the folders of `include`. What differs from a GPU is said
in runtime.cpp. Whatever goes wrong in a launch is a RuntimeError that names the kernel, the block, the thread and the
line.

Modes: "plain" also finds undefined behaviour and writes beside shared memory; "asan" finds accesses outside of arrays;
"tsan" finds accesses that no barrier orders. The latter two need a process that run_sanitized() has started.

Orders: 0 runs blocks and threads in ascending order, 1 in descending order, and each number from 2 on in a random
order of its own. Copies by cp.async are made as late as may be in even orders, as early as may be in odd ones.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent

# Headers of this folder that take the place of those of the same name beside the kernels.
REPLACED = ("ptx.h",)

DEFAULT_SHARED_LIMIT = 48 << 10  # static and dynamic together, unless a kernel asks for more
LARGEST_SHARED_LIMIT = 227 << 10  # of compute capability 9.0

_UNDEFINED = (
    "-fsanitize=alignment,null,bounds,shift,signed-integer-overflow,integer-divide-by-zero,"
    "unreachable,return -fno-sanitize-recover=all"
)
_COMMON = "-std=c++17 -fPIC -w -g1 -fno-exceptions -fno-rtti -ffp-contract=off -fvisibility=hidden -fno-gnu-unique"


@dataclass(frozen=True)
class Mode:
    """How kernels are compiled, and what their process needs."""

    kernel_flags: str
    runtime_flags: str = ""
    link_flags: str = ""
    preload: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


MODES = {
    "plain": Mode(f"-O1 {_UNDEFINED}"),
    "asan": Mode(
        f"-O1 {_UNDEFINED} -fsanitize=address -fno-omit-frame-pointer",
        "-DEMU_ASAN",
        "-fsanitize=address",
        ("libasan.so", "libstdc++.so"),  # the latter, because the former looks for its exceptions at the start
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=66"},
    ),
    "tsan": Mode(
        f"-O1 {_UNDEFINED} -fsanitize=thread -Wno-tsan",
        "-DEMU_TSAN",
        "-fsanitize=thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0"},
    ),
}


def why_not() -> str:
    """Why kernels cannot run here; empty where they can."""
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"the CUDA emulation cannot switch stacks on {platform.machine()}"
    if not sys.platform.startswith("linux"):
        return "the CUDA emulation needs Linux"
    if not shutil.which("g++"):
        return "the CUDA emulation needs g++"
    return ""


def default_mode() -> str:
    return os.environ.get("SRU_RT_EMU_MODE", "plain")


def default_order() -> int:
    return int(os.environ.get("SRU_RT_EMU_ORDER", "0"))


def default_resident() -> int:
    return int(os.environ.get("SRU_RT_EMU_RESIDENT", "2"))


# ----------------------------------------------------------------------------------------------------------------------
# From CUDA source to C++


def preprocess(source: str, include: Sequence[Path], defines: Sequence[str], name: str) -> str:
    """The text with all its headers in it. `#` lines name the true files and lines.

    The preprocessor looks for a header beside the file that names it before it looks anywhere else, so it is given
    folders of links in which the replaced headers lie beside the others.
    """
    with tempfile.TemporaryDirectory(prefix="sru_rt_emu-") as scratch:
        options, true_names = [f"-I{HERE}"], {}
        for i, folder in enumerate(Path(f).resolve() for f in include):
            copy = Path(scratch) / str(i)
            _link_headers(folder, copy)
            options.append(f"-I{copy}")
            true_names[f'"{copy}/'] = f'"{folder}/'
        command = ["g++", "-E", "-std=c++17", "-nostdinc", "-D__CUDACC__", "-D__CUDACC_RTC__", "-D__CUDA_ARCH__=900"]
        command += [*options, *(f"-D{d}" for d in defines), "-x", "c++", "-"]
        text = _run(command, f'#line 1 "{name}"\n{source}', f"the preprocessor on {name}")
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("# "):
            for wrong, right in true_names.items():
                line = line.replace(wrong, right)
            for replaced in REPLACED:
                line = re.sub(rf'"[^"]*/{re.escape(replaced)}"', f'"{HERE / replaced}"', line)
            lines[i] = line
    return "\n".join(lines)


def _link_headers(folder: Path, copy: Path) -> None:
    for at, _, files in os.walk(folder):
        to = copy / Path(at).relative_to(folder)
        to.mkdir()
        for name in files:
            if name.endswith((".h", ".cuh")):
                target = HERE / name if name in REPLACED else Path(at).resolve() / name
                (to / name).symlink_to(target)


_SHARED = re.compile(
    r"\b(?P<extern>extern\s+)?(?:static\s+)?__shared__\s+(?P<declaration>[^;{}=]*?)\s*(?P<end>[;{}=])", re.DOTALL
)
_ALIGNED = re.compile(r"\b(?:__align__|alignas)\s*\(\s*([^()]*)\s*\)")
_DECLARATOR = re.compile(r"(?P<type>.*?)\b(?P<name>\w+)\s*(?P<sizes>(?:\[.*\]\s*)?)", re.DOTALL)


def replace_shared(text: str) -> str:
    """Turns `__shared__ T name[n];` into a reference to memory of the block. Lines keep their numbers."""

    def replaced(match: re.Match[str]) -> str:
        whole = match[0]
        flat = re.sub(r"\n# [^\n]*", "\n", match["declaration"])
        if match["end"] != ";":
            raise ValueError(f"cannot read the declaration `{' '.join(whole.split())}`; write `__shared__ T name[n];`")
        build = _extern_shared if match["extern"] else _static_shared
        return build(flat) + "\n" * whole.count("\n")

    return _SHARED.sub(replaced, text)


def _static_shared(declaration: str) -> str:
    alignment = "".join(f"alignas({a}) " for a in _ALIGNED.findall(declaration))
    first, *others = _split(_ALIGNED.sub(" ", declaration))
    base, out = "", []
    for part in (first, *others):
        match = _DECLARATOR.fullmatch(part.strip())
        if not match or not (base or match["type"].strip()):
            raise ValueError(f"cannot read the declaration `__shared__ {declaration.strip()};`")
        base = base or " ".join(match["type"].split())
        name, sizes = match["name"], " ".join(match["sizes"].split())
        kind = f"{name}_emu_shared"
        out.append(
            f"struct {kind} {{ {alignment}{base} it{sizes}; }}; "
            f'auto &{name} = emu::shared<{kind}>([] {{}}, "{name}").it;'
        )
    return " ".join(out)


def _extern_shared(declaration: str) -> str:
    match = _DECLARATOR.fullmatch(_ALIGNED.sub(" ", declaration).strip())
    if not match or re.sub(r"\s", "", match["sizes"]) != "[]":
        raise ValueError(f"cannot read the declaration `extern __shared__ {declaration.strip()};`")
    kind = " ".join(match["type"].split())
    return f"{kind} *{match['name']} = emu::dynamic_shared<{kind}>();"


def _split(declaration: str) -> list[str]:
    """Splits at the commas that stand in no brackets."""
    depth, parts = 0, [""]
    for c in declaration:
        if c == "," and depth == 0:
            parts.append("")
            continue
        depth += (c in "<([") - (c in ">)]")
        parts[-1] += c
    return parts


_BOUNDS = re.compile(r"\b__launch_bounds__\s*\(")


def find_kernels(text: str) -> dict[str, str]:
    """The kernels that are no templates: name to the first of their launch bounds, or to "0"."""
    found: dict[str, str] = {}
    for match in re.finditer(r"\b__global__\b", text):
        before = re.split(r"[;{}]", text[: match.start()])[-1]
        after, bound = text[match.end() :].split("{")[0], "0"
        if bounds := _BOUNDS.search(after):
            inside, rest = _to_closing(after[bounds.end() :])
            bound, after = _split(inside)[0].strip(), after[: bounds.start()] + rest
        name = re.search(r"(\w+)\s*\(", re.sub(r"(?m)^# .*$", "", after))
        if name and not re.search(r"\btemplate\b", before):
            found[name[1]] = bound
    return found


def _to_closing(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes one opened before the text, and what stands after it."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    raise ValueError("unbalanced brackets in __launch_bounds__")


def translate(source: str, include: Sequence[Path], defines: Sequence[str], instances: Sequence[str], name: str) -> str:
    """The C++ text of a module, which ends in a table of its kernels."""
    text = preprocess(source, include, defines, name)
    kernels = find_kernels(text) | dict.fromkeys(instances, "0")
    if not kernels:
        raise ValueError(f"{name} has no __global__ function; for those that are templates, name their `instances`")
    rows = "".join(f'emu::Entry<&{k}>::named("{k}", {bound}),\n' for k, bound in kernels.items())
    table = f'extern "C" __attribute__((visibility("default"))) const emu::Kernel emu_kernels[] = {{\n{rows}{{}}}};\n'
    return f'#include "cuda_emu.h"\n{replace_shared(text)}\n#line 1 "the table of kernels"\n{table}'


# ----------------------------------------------------------------------------------------------------------------------
# Compiling


def _run(command: Sequence[str], text: str, what: str) -> str:
    # A sanitizer that is loaded into this process must not be loaded into the compiler: it takes three times as long.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def _compiler() -> tuple[str, str]:
    """The compiler's version, and flags for this machine."""
    version = _run(["g++", "--version"], "", "g++").split("\n")[0]
    cpu = Path("/proc/cpuinfo").read_text()
    return version, "-mfma" if re.search(r"^flags\s*:.*\bfma\b", cpu, re.MULTILINE) else ""


@functools.cache
def _linker() -> list[str]:
    """gold, where it is installed: the usual one takes as long to read libstdc++ as half a kernel takes to compile."""
    return ["-fuse-ld=gold"] if shutil.which("ld.gold") else []


@functools.cache
def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sru_rt_emu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    return folder


def _build(name: str, key: Sequence[str], build: Callable[[str], object]) -> Path:
    """The file in the cache; build(path) makes it where it is missing."""
    digest = hashlib.sha256("\0".join([*key, *_compiler()]).encode()).hexdigest()[:24]
    stem, suffix = name.split(".")
    path = _cache_folder() / f"{stem}-{digest}.{suffix}"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=_cache_folder(), suffix=f".{suffix}")
        os.close(handle)
        try:
            build(temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


@functools.cache
def _own_text(suffix: str) -> str:
    return "\0".join(p.read_text() for p in sorted(HERE.glob(f"*{suffix}")))


def _runtime(mode: Mode) -> list[Path]:
    flags = f"-std=c++17 -O2 -g1 -fPIC -fno-rtti -fvisibility=hidden {mode.runtime_flags}".split()
    key = [_own_text(".h"), _own_text(".cpp"), *flags]

    def compile_to(path: str, name: str) -> None:
        _run(["g++", *flags, "-c", str(HERE / f"{name}.cpp"), "-o", path], "", f"compiling {name}.cpp")

    return [
        _build(f"{name}.o", [name, *key], functools.partial(compile_to, name=name)) for name in ("runtime", "ubsan")
    ]


def build(unit: str, mode: Mode, flags: Sequence[str]) -> Path:
    """The shared object of a translated module."""
    options = f"{_COMMON} {mode.kernel_flags} {_compiler()[1]}".split()
    command = ["g++", *options, "-nostdinc", f"-I{HERE}", *flags, "-shared", "-x", "c++", "-", "-x", "none"]
    command += [*map(str, _runtime(mode)), *mode.link_flags.split(), *_linker(), "-Wl,-Bsymbolic", "-o"]
    return _build("kernels.so", [*command, unit, _own_text(".h")], lambda p: _run([*command, p], unit, "compiling"))


# ----------------------------------------------------------------------------------------------------------------------
# Launching


class _Kernel(ctypes.Structure):  # emu::Kernel in runtime.h
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("n_arguments", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
        ("most_threads", ctypes.c_int),
    )


class _Options(ctypes.Structure):  # emu::Options in runtime.cpp
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("shared_limit", ctypes.c_size_t),
        ("order", ctypes.c_int),
        ("resident", ctypes.c_int),
    )


_LAUNCHING = threading.Lock()  # each shared object runs one launch at a time


class Module:
    """Kernels compiled for the emulation; `instances` names templates, as in "sum<float, 4>"."""

    def __init__(
        self,
        source: str,
        include: Sequence[Path] = (),
        mode: str | None = None,
        defines: Sequence[str] = (),
        flags: Sequence[str] = (),
        instances: Sequence[str] = (),
        name: str = "kernel.cu",
    ):
        if reason := why_not():
            raise RuntimeError(reason)
        chosen = mode or default_mode()
        _check_preloaded(chosen)
        unit = translate(source, include, defines, instances, name)
        self.path = build(unit, MODES[chosen], flags)
        self._library = ctypes.CDLL(str(self.path))
        self._kernels = {}
        table = ctypes.cast(self._library.emu_kernels, ctypes.POINTER(_Kernel))
        i = 0
        while table[i].name:
            self._kernels[table[i].name.decode()] = table[i]
            i += 1

    def get_function(self, name: str) -> Function:
        if name not in self._kernels:
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: there is no kernel {name}; there are {', '.join(self._kernels)}")
        return Function(self._library, self._kernels[name])


class Function:
    """One kernel: function(grid, block, args, shared_mem=0, stream=None), as in CuPy."""

    def __init__(self, library: ctypes.CDLL, kernel: _Kernel):
        self.name = kernel.name.decode()
        self.shared_limit = DEFAULT_SHARED_LIMIT  # set it to what the host asks of the driver
        self._kernel = kernel
        self._launch = library.emu_launch
        self._launch.restype = ctypes.c_char_p
        self._library = library

    @property
    def argument_sizes(self) -> list[int]:
        return self._kernel.sizes[: self._kernel.n_arguments]

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_mem: int = 0,
        stream: object = None,
        *,
        order: int | None = None,
        resident: int | None = None,
    ) -> None:
        """Runs the kernel to its end. See the top of this file for `order`; `resident` blocks run at once."""
        grid, block = ((*map(int, sizes), 1, 1, 1) for sizes in (grid, block))
        order = default_order() if order is None else order
        resident = default_resident() if resident is None else resident
        if order < 0 or resident < 1:
            raise ValueError(f"order is {order} and resident is {resident}; they must be at least 0 and 1")
        self._check_limits(grid[:3], block[:3], shared_mem)
        values = [_as_bytes(a, f"{self.name}: argument {i}") for i, a in enumerate(args)]
        got = [len(v) for v in values]
        if got != self.argument_sizes:
            raise RuntimeError(f"{self.name}: got arguments of {got} bytes; the kernel takes {self.argument_sizes}")
        holders = [_aligned(v) for v in values]
        pointers = (ctypes.c_void_p * len(holders))(*[address for _, address in holders])
        options = _Options(
            (ctypes.c_uint * 3)(*grid[:3]),
            (ctypes.c_uint * 3)(*block[:3]),
            shared_mem,
            self.shared_limit,
            order,
            resident,
        )
        with _LAUNCHING:
            error = self._launch(ctypes.byref(self._kernel), ctypes.byref(options), pointers)
        if error:
            raise RuntimeError(f"CUDA_ERROR_LAUNCH_FAILED: {error.decode()}")

    def _check_limits(self, grid: Sequence[int], block: Sequence[int], shared_mem: int) -> None:
        limits = (
            ("grid", grid, (2**31 - 1, 65535, 65535)),
            ("block", block, (1024, 1024, 64)),
        )
        for what, sizes, most in limits:
            if any(not 1 <= s <= m for s, m in zip(sizes, most)):
                raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {self.name}: {what} {sizes}; each is from 1 to {most}")
        threads, most_threads = int(np.prod(block)), self._kernel.most_threads or 1024
        if threads > most_threads:
            raise RuntimeError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {threads} threads in a block; it takes up to {most_threads}"
            )
        if not 0 <= shared_mem <= self.shared_limit <= LARGEST_SHARED_LIMIT:
            raise RuntimeError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {shared_mem} bytes of dynamic shared memory; its limit is "
                f"{self.shared_limit}, which may be raised up to {LARGEST_SHARED_LIMIT}"
            )


def _as_bytes(value: Any, what: str) -> bytes:
    """An argument as CuPy passes it: numbers and arrays of size one by value, other arrays by their address."""
    if hasattr(value, "data") and hasattr(value.data, "ptr"):
        value = value.data
    if hasattr(value, "ptr"):
        return np.uint64(value.ptr).tobytes()
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError(f"{what} is an array of size {value.size}; only size one is passed by value")
        return value.tobytes()
    if isinstance(value, (bool, np.generic)):
        return np.asarray(value).tobytes()
    if isinstance(value, int):
        return np.int64(value).tobytes()
    if isinstance(value, float):
        return np.float64(value).tobytes()
    raise TypeError(f"{what} has the unsupported type {type(value).__name__}")


def _aligned(value: bytes) -> tuple[object, int]:
    """A copy at an address that suits every type, and the address."""
    buffer = ctypes.create_string_buffer(len(value) + 64)
    address = (ctypes.addressof(buffer) + 63) // 64 * 64
    ctypes.memmove(address, value, len(value))
    return buffer, address


# ----------------------------------------------------------------------------------------------------------------------
# Processes for the sanitizers


def _check_preloaded(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"SRU_RT_EMU_MODE or mode is {mode!r}; it must be one of {', '.join(MODES)}")
    loaded = Path("/proc/self/maps").read_text() if MODES[mode].preload else ""
    missing = [name for name in MODES[mode].preload if name.split(".")[0] not in loaded]
    if missing:
        names = ", ".join(missing)
        raise RuntimeError(f"mode {mode} needs {names} in the process; start it by emulator.run_sanitized()")


@functools.cache
def preload(mode: str) -> tuple[str, str]:
    """The value of LD_PRELOAD for a mode, and why that cannot be (empty where it can)."""
    if reason := why_not():
        return "", reason
    paths = []
    for name in MODES[mode].preload:
        path = _run(["g++", f"-print-file-name={name}"], "", "g++").strip()
        if not os.path.isabs(path):
            return "", f"g++ has no {name}"
        paths.append(path)
    value = " ".join(paths)
    environment = os.environ | MODES[mode].environment | {"LD_PRELOAD": value}
    probe = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, text=True)
    if probe.returncode:
        return "", f"Python does not start with {value}: {probe.stderr.strip()[:300]}"
    return value, ""


def run_sanitized(arguments: Sequence[str], mode: str, timeout: float = 600) -> tuple[int, str]:
    """Runs Python with these arguments, and kernels in this mode: its exit status (66 where a sanitizer ended it) and
    what it printed. Raises RuntimeError where the sanitizer cannot be had; preload(mode)[1] tells why beforehand."""
    libraries, reason = preload(mode)
    if reason:
        raise RuntimeError(reason)
    environment = os.environ | MODES[mode].environment
    environment |= {"SRU_RT_EMU_MODE": mode, "LD_PRELOAD": libraries, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    return done.returncode, done.stdout
