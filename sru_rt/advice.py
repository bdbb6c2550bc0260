"""From what `doctor` found to what mends it: problems, each with the command that mends it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from .probes import CUPY_PACKAGES, NVRTC_PACKAGES

Advice = dict[str, str]  # {"problem", "command"}

_OLDEST, _NEWEST = 12, 13  # CUDA releases that have an extra in setup.cfg


def advice(report: dict[str, Any]) -> list[Advice]:
    """What is missing, or does not go together. `report` has the results of the probes by name."""
    checks = (_compiler, _cache, _settings, _driver, _cupy, _cupy_twice, _nvrtc, _nvrtc_twice, _targets, _cublas)
    return [{"problem": problem, "command": command} for check in checks for problem, command in check(report)]


_Found = Iterator[tuple[str, str]]


def _compiler(report: dict[str, Any]) -> _Found:
    if "error" in report["compiler"] and sys.platform != "win32":
        command = next((c for tool, c in _INSTALLERS.items() if shutil.which(tool)), "conda install gxx")
        if report["settings"].get("SRU_RT_CXX"):  # or CXX; either may be wrong
            command = "unset SRU_RT_CXX CXX"
        yield "no C++ compiler, so recurrences on the CPU run on NumPy, several times slower", _as_root(command)


_INSTALLERS = {
    "apt-get": "sudo apt-get install g++",
    "dnf": "sudo dnf install gcc-c++",
    "zypper": "sudo zypper install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add g++",
    "xcode-select": "xcode-select --install",
}


def _as_root(command: str) -> str:
    """Root, as in a container, needs no sudo, and may have none."""
    return command.removeprefix("sudo ") if getattr(os, "geteuid", lambda: 1)() == 0 else command


def _cache(report: dict[str, Any]) -> _Found:
    if error := report["cache"].get("error"):
        _, _, rest = error.partition("run `")
        command = rest.partition("`")[0] or 'export SRU_RT_CACHE_DIR="$(mktemp -d)"  # or a folder of yours that lasts'
        yield f"kernels are compiled anew in each process: {error}", command


def _settings(report: dict[str, Any]) -> _Found:
    for name, value in report["settings"].items():
        if isinstance(value, dict):  # the reader's message
            variable = name if name in value["error"] else value["error"].split()[0]
            yield value["error"], f"unset {variable}"


def _driver(report: dict[str, Any]) -> _Found:
    """An NVIDIA card that CUDA does not show, or a driver that is too old."""
    update = _as_root("sudo ubuntu-drivers install  # on Ubuntu; elsewhere https://www.nvidia.com/drivers")
    major = _driver_major(report)
    if isinstance(report["gpus"], dict) and report["machine"].get("nvidia_device"):
        if major is None:
            update = f"{update}; for a container, docker run --gpus all"
        yield f"an NVIDIA device is in this machine, but cannot be used: {report['gpus']['error']}", update
    elif major is not None and major < _OLDEST:
        yield f"the driver serves CUDA up to {report['driver']['cuda']}; CUDA {_OLDEST} or newer is needed", update


def _cupy(report: dict[str, Any]) -> _Found:
    found = report["cupy"]
    if "error" in found:
        if _has_gpu(report) or any(report["packages"].get(name) for name in CUPY_PACKAGES):
            yield f"arrays on a GPU need CuPy, which is {found['error']}", _install(report)
        return
    built, served = _major(found["built_for_cuda"]), _driver_major(report)
    if served is not None and built > served >= _OLDEST:
        yield (
            f"CuPy is built for CUDA {found['built_for_cuda']}, but the driver serves CUDA {report['driver']['cuda']}",
            f"pip uninstall -y {' '.join(_installed(report, CUPY_PACKAGES))} && {_install(report)}",
        )


def _cupy_twice(report: dict[str, Any]) -> _Found:
    found = _installed(report, CUPY_PACKAGES)
    if len(found) > 1:
        yield (
            f"{' and '.join(found)} are both installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(found)} && {_install(report)}",
        )


def _nvrtc(report: dict[str, Any]) -> _Found:
    if "error" in report["cupy"]:
        return
    found, served = report["nvrtc"], _driver_major(report)
    if "error" in found:
        yield "CuPy is there, but NVRTC is not, which compiles the kernels", _install(report)
    elif served is not None and _major(found["version"]) > served >= _OLDEST:
        newer = [name for name in _installed(report, NVRTC_PACKAGES) if name.endswith("nvrtc")]
        remove = f"pip uninstall -y {' '.join(newer)} && " if newer else ""
        yield (
            f"NVRTC {found['version']} makes code that the driver, for CUDA {report['driver']['cuda']}, may refuse",
            f"{remove}{_install(report)}",
        )


def _nvrtc_twice(report: dict[str, Any]) -> _Found:
    found = _installed(report, NVRTC_PACKAGES)
    if len(found) > 1:
        wanted = _wanted(report)
        spare = [name for name in found if name != _nvrtc_package(wanted)]
        cupy = [n for n in _installed(report, CUPY_PACKAGES) if n not in ("cupy", f"cupy-cuda{wanted}x")]
        yield (
            f"{' and '.join(found)} are both installed, of which CuPy takes the newer; another package may need the "
            "one that goes",
            f"pip uninstall -y {' '.join(spare + cupy)} && {_install(report)}",
        )


def _targets(report: dict[str, Any]) -> _Found:
    if "error" in report["nvrtc"]:  # of which _cupy or _nvrtc speaks
        return
    targets = report["targets"]
    unknown = {} if "error" in targets else {a: t for a, t in targets.items() if not t.startswith("sm_")}
    for arch, text in unknown.items():
        number = int(arch.removeprefix("sm_"))
        if number < int(report["nvrtc"]["oldest_architecture"].removeprefix("sm_")):
            remove = [*_installed(report, CUPY_PACKAGES), *_installed(report, NVRTC_PACKAGES)]
            command = f"pip uninstall -y {' '.join(remove)} && " if remove else ""
            command += f"pip install 'sru_rt[cuda{_OLDEST}]'"
        else:
            command = _install(report).replace("install", "install --upgrade --upgrade-strategy eager")
        yield f"{arch}: {text.partition(';')[0]}", command


def _cublas(report: dict[str, Any]) -> _Found:
    if "error" not in report["cupy"] and "error" in report["cublas"]:
        yield "CuPy is there, but cuBLAS is not, which forms U = W x on a GPU", _install(report)


def _install(report: dict[str, Any]) -> str:
    return f"pip install 'sru_rt[cuda{_wanted(report)}]'"


def _wanted(report: dict[str, Any]) -> int:
    """The CUDA release that goes with the driver; where there is none, with CuPy."""
    major = _driver_major(report)
    if major is None and "error" not in report["cupy"]:
        major = _major(report["cupy"]["built_for_cuda"])
    return min(max(major or _OLDEST, _OLDEST), _NEWEST)


def _nvrtc_package(major: int) -> str:
    return "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"


def _driver_major(report: dict[str, Any]) -> int | None:
    return None if "error" in report["driver"] else _major(report["driver"]["cuda"])


def _major(release: str) -> int:
    return int(release.partition(".")[0])


def _installed(report: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if report["packages"].get(name)]


def _has_gpu(report: dict[str, Any]) -> bool:
    return isinstance(report["gpus"], list)
