"""What `doctor` looks at. Each probe returns data that JSON can hold, or raises; none of them needs a GPU.

GPUs are asked through the driver's own library, so that they are found where CuPy is missing, and hold no memory.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import cache as code_cache
from . import compile_cpu, compile_gpu, selfcheck
from . import settings as in_force
from .calls import Call
from .cells.sru import Options, sru_cell
from .errors import ArgumentError, CacheError, CompileError, SruRtError
from .machine import USUAL_MULTIPROCESSORS, Device

MAIN_PACKAGES = ("sru_rt", "numpy", "ml_dtypes", "torch", "jax")
CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
NVRTC_PACKAGES = ("nvidia-cuda-nvrtc-cu11", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")  # the last is that of 13

# Of CUdevice_attribute in cuda.h.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
# Batch size, hidden size, dtype of the table of plans.
_SHAPES = (
    (1, 1024, "bfloat16"),
    (16, 1024, "bfloat16"),
    (32, 512, "bfloat16"),
    (256, 1024, "bfloat16"),
    (32, 512, "float32"),
)


def packages() -> dict[str, str | None]:
    """Versions of the packages that matter, None for one that is not installed."""
    found: dict[str, str | None] = {"Python": f"{platform.python_version()} ({sys.executable})"}
    for name in (*MAIN_PACKAGES, *CUPY_PACKAGES, *NVRTC_PACKAGES):
        version = _version(name)
        if version or name in (*MAIN_PACKAGES, "cupy"):
            found[name] = version
    if any(found.get(name) for name in CUPY_PACKAGES):
        found = {name: version for name, version in found.items() if version or name != "cupy"}
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The system, and whether the bus has a display device of NVIDIA, None where that cannot be seen."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "nvidia_device": _has_nvidia_device(),
    }


def _has_nvidia_device() -> bool | None:
    folders = list(Path("/sys/bus/pci/devices").glob("*"))
    ids = [tuple((f / name).read_text().strip() for name in ("vendor", "class")) for f in folders]
    return any(vendor == "0x10de" and kind.startswith("0x03") for vendor, kind in ids) if ids else None


def compiler() -> dict[str, Any]:
    """The C++ compiler."""
    found = compile_cpu.compiler()
    return {"command": shlex.join(found.command), "version": found.version.splitlines()[0]}


def driver() -> dict[str, Any]:
    """The newest CUDA release that the NVIDIA driver serves."""
    version = ctypes.c_int()
    _call(_libcuda(), "cuDriverGetVersion", ctypes.byref(version))
    return {"cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}


def gpus() -> list[dict[str, Any]]:
    """The GPUs, in CUDA's order. Raises RuntimeError with the driver's reason if it shows none."""
    library = _libcuda()
    _call(library, "cuInit", 0)
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise RuntimeError("the driver shows none")
    return [_gpu(library, number) for number in range(count.value)]


def _gpu(library: Any, number: int) -> dict[str, Any]:
    device, name, total = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(library, "cuDeviceGet", ctypes.byref(device), number)
    _call(library, "cuDeviceGetName", name, 256, device)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(total), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    arch = 10 * attribute(_MAJOR) + attribute(_MINOR)
    return {
        "device": f"cuda:{number}",
        "name": name.value.decode(errors="replace"),
        "architecture": f"sm_{arch}",
        "multiprocessors": attribute(_MULTIPROCESSORS),
        "gib": round(total.value / 2**30, 1),
    }


def _libcuda() -> Any:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"no NVIDIA driver ({error})") from None


def _call(library: Any, function: str, *arguments: Any) -> None:
    code = getattr(library, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{function} of the NVIDIA driver: {(text.value or b'error').decode()} ({code})")


def cupy() -> dict[str, Any]:
    """CuPy as it can be imported, and the CUDA release that it was built for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns if it is installed twice, which we say ourselves
        try:
            import cupy
        except ImportError as error:
            if any(map(_version, CUPY_PACKAGES)):
                raise RuntimeError(f"installed, but cannot be imported: {error}") from None
            raise RuntimeError("not installed") from None
    build = int(cupy.cuda.driver.get_build_version())
    return {"version": cupy.__version__, "built_for_cuda": f"{build // 1000}.{build % 1000 // 10}"}


def nvrtc() -> dict[str, Any]:
    """NVRTC as CuPy finds it."""
    binding = compile_gpu.nvrtc()
    known = sorted(binding.getSupportedArchs())
    return {
        "version": compile_gpu.version(),
        "oldest_architecture": f"sm_{known[0]}",
        "newest_architecture": f"sm_{known[-1]}",
        "file": _loaded_file("libnvrtc.so"),
    }


def targets(found: list[dict[str, Any]]) -> dict[str, str]:
    """The architecture that code is compiled for, for that of each GPU; a message where NVRTC knows none."""
    answers = {}
    for name in dict.fromkeys(gpu["architecture"] for gpu in found):
        try:
            answers[name] = f"sm_{compile_gpu.target(int(name.removeprefix('sm_')))}"
        except CompileError as error:
            answers[name] = message(error)
    return answers


def cublas() -> dict[str, Any]:
    """cuBLAS as CuPy finds it."""
    import cupy

    try:
        cupy.cuda.cublas.gemmEx  # noqa: B018  # it is loaded when it is first used
    except ImportError as error:
        raise RuntimeError(f"CuPy does not find it: {message(error)}") from None
    return {"file": _loaded_file("libcublas.so")}


def _loaded_file(name: str) -> str | None:
    """The file of a library in this process, None where that cannot be seen."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return next((line[line.index("/") :] for line in lines if f"/{name}" in line), None)


def cache() -> dict[str, Any]:
    """The folder of compiled code: why it cannot be used if so, and what is in it."""
    found: dict[str, Any] = {"folder": None}
    try:
        found["folder"] = str(in_force.cache_dir())
        code_cache.folder()
    except (CacheError, RuntimeError) as error:
        found["error"] = message(error)
    for kind, suffix in (("cpu", ".so"), ("gpu", ".cubin")):
        sizes = [p.stat().st_size for p in Path(found["folder"] or ".").glob(f"*{suffix}")] if found["folder"] else []
        found |= {f"{kind}_kernels": len(sizes), f"{kind}_bytes": sum(sizes)}
    return found


def settings() -> dict[str, Any]:
    """Each setting as it is in force; the message of one that is not understood."""
    readers: dict[str, Callable[[], Any]] = {
        "SRU_RT_CPU": in_force.cpu_backend,
        "SRU_RT_CXX": in_force.cxx,
        "SRU_RT_CXXFLAGS": lambda: " ".join(in_force.cxx_flags()) or None,
        "SRU_RT_CACHE_DIR": lambda: str(in_force.cache_dir()),
        "SRU_RT_NUM_THREADS": in_force.num_threads,
        "SRU_RT_POOL_MB": lambda: in_force.pool_bytes() >> 20,
        "SRU_RT_PLAN": lambda: in_force.plan_text() if in_force.plan() else None,
        "SRU_RT_TF32": in_force.tf32,
        "SRU_RT_DEBUG": in_force.debug,
    }
    return {name: _value_or_message(read) for name, read in readers.items()}


def _value_or_message(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (ArgumentError, RuntimeError) as error:
        return {"error": message(error)}


def plans(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the planner decides for a few shapes: for each kind of GPU, for sm_90 if there is none."""
    devices = [Device(int(g["architecture"].removeprefix("sm_")), g["multiprocessors"]) for g in found]
    rows = []
    for device in dict.fromkeys(devices or [Device(90, USUAL_MULTIPROCESSORS[90])]):
        for B, d, dtype in _SHAPES:
            call = Call(sru_cell(Options()), dtype, 1, d, every=1)
            row: dict[str, Any] = {"architecture": f"sm_{device.arch}", "multiprocessors": device.multiprocessors}
            row |= {"dtype": dtype, "B": B, "d": d}
            for which in call.passes:
                made = call.plan(which, B, device)
                row[which] = f"width {made.width}, depth {made.depth}, {made.threads} threads"
                if any(p.parallel for p in call.plans(which, B, device)):
                    row[which] += "; long sequences in parallel over time"
            rows.append(row)
    return rows


def backends(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether each backend that was found computes rightly."""
    reference = selfcheck.on("cpu", "numpy")
    rows = [{"backend": "NumPy", **selfcheck.verdict(reference, reference)}]
    if "error" in report["compiler"]:
        rows.append({"backend": "compiled for the CPU", "computes": False, "error": "no C++ compiler"})
    else:
        compiled = selfcheck.on("cpu", "compiled")
        rows.append({"backend": "compiled for the CPU", **selfcheck.verdict(compiled, reference)})
    for gpu in report["gpus"] if isinstance(report["gpus"], list) else []:
        if "error" in report["cupy"]:
            found = {"error": f"CuPy is {report['cupy']['error']}"}
        else:
            found = selfcheck.on(gpu["device"], "auto")
        rows.append({"backend": gpu["device"], **selfcheck.verdict(found, reference)})
    return rows


def message(error: BaseException) -> str:
    """The first line of what an error says, after its kind if it was not raised on purpose."""
    first = next(iter(str(error).removeprefix("sru_rt: ").strip().splitlines()), "")
    expected = isinstance(error, (SruRtError, ImportError, OSError)) or type(error) is RuntimeError
    return first if first and expected else f"{type(error).__name__}: {first}"


def guarded(probe: Callable[..., Any], *arguments: Any) -> Any:
    """What the probe returns, {"error": ...} if it fails."""
    try:
        return probe(*arguments)
    except Exception as error:
        return {"error": message(error)}
