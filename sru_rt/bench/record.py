"""Where a run was made: machine, device, versions and commit. A run goes on only where these are the same."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import sru_rt

from .. import compile_gpu, probes, processor

ROOT = Path(sru_rt.__file__).resolve().parents[1]  # of a checkout
LIBRARIES = r"accelerated.scan|cupy.*|fla-core|flash-linear-attention|jax|jaxlib|minGRU.pytorch|ml_dtypes|numpy"
LIBRARIES += r"|nvidia-(cublas|cudnn|cuda-nvrtc|cuda-runtime).*|sru|torch|triton"
# Variables that say how many threads there are, and which instructions and kernels are used.
_SETTINGS = r"(ATEN|DNNL|GOMP|KMP|MKL|OMP|ONEDNN|OPENBLAS|SRU_RT|XLA)_(?!CACHE)"


def environment(device: str) -> dict[str, Any]:
    """All that times depend on but the sizes."""
    found: dict[str, Any] = {"commit": commit(), "machine": machine(), "versions": versions()}
    return found | ({"gpu": gpu()} if device == "gpu" else {})


def commit() -> str:
    """Of the checkout that sru_rt is imported from, "unknown" elsewhere."""
    if not (ROOT / ".git").exists():
        return "unknown"
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def machine() -> dict[str, Any]:
    """The processor, and what is set of the libraries that compute on it."""
    known = processor.described()
    features = set(known.get("flags", "").split())
    return {
        "cpu": known.get("model name") or platform.machine(),
        "simd": next((name for name in ("avx512f", "avx2") if name in features), "unknown"),
        "cores": os.cpu_count(),
        "caches": caches(),
        "set": {name: os.environ[name] for name in sorted(os.environ) if re.match(_SETTINGS, name)},
        "python": platform.python_version(),
    }


def caches() -> dict[str, int]:
    """Bytes of the caches of core 0, by level and kind, where the system tells."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return {f"L{level} {kind}": int(size.rstrip("K")) << 10 for level, kind, size in read}


def cache_bytes() -> int:
    """Of the largest cache."""
    return max(caches().values(), default=32 << 20)


def versions() -> dict[str, str]:
    """Of sru_rt and of everything that takes part, and is installed."""
    blas = getattr(np.__config__, "CONFIG", {}).get("Build Dependencies", {}).get("blas", {})  # from numpy 1.26 on
    found = {"sru_rt": sru_rt.__version__, "blas": f"{blas.get('name')} {blas.get('version')}"}
    installed = {one.metadata["Name"] or "": one.version for one in importlib.metadata.distributions()}
    named = {name: installed[name] for name in sorted(installed) if re.fullmatch(LIBRARIES, name, re.IGNORECASE)}
    compiler = probes.guarded(probes.compiler)
    return found | named | {"compiler": str(compiler.get("version", compiler.get("error")))}


def gpu() -> dict[str, Any]:
    """The GPU and its driver."""
    runtime = importlib.import_module("cupy").cuda.runtime
    properties = runtime.getDeviceProperties(0)
    return {
        "device": properties["name"].decode(),
        "architecture": 10 * properties["major"] + properties["minor"],
        "multiprocessors": properties["multiProcessorCount"],
        "l2_bytes": int(properties["l2CacheSize"]),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "nvrtc": compile_gpu.version(),
    }


def why_no_gpu() -> str:
    """Why there is no GPU to measure; empty if there is one."""
    try:
        cupy: Any = importlib.import_module("cupy")
        return "" if cupy.cuda.is_available() else "CuPy finds none"
    except Exception as error:  # what CuPy raises for a missing library has many types
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def clocks() -> str:
    """What nvidia-smi says of the clocks, or why it says nothing."""
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    try:
        asked = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    return (asked.stdout or asked.stderr).strip()
