"""`python -m sru_rt doctor`: says what is there, what is missing and what mends it, and tries each backend."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from . import advice, probes

# In the order in which they are shown. Those with arguments are given what earlier ones found.
_PROBES: dict[str, tuple[str, ...]] = {
    "packages": (),
    "machine": (),
    "compiler": (),
    "driver": (),
    "gpus": (),
    "cupy": (),
    "nvrtc": (),
    "targets": ("gpus",),
    "cublas": (),
    "cache": (),
    "settings": (),
    "plans": ("gpus",),
    "backends": ("report",),
}
_TITLES = {
    "compiler": "C++ compiler",
    "driver": "NVIDIA driver",
    "gpus": "GPUs",
    "cupy": "CuPy",
    "nvrtc": "NVRTC",
    "targets": "code for each GPU",
    "cublas": "cuBLAS",
    "cache": "cache of compiled code",
    "settings": "settings in force",
    "plans": "plans of the kernels of sru, with every state kept",
    "backends": "backends, tried on a small recurrence",
}


def run(as_json: bool = False) -> int:
    """Writes the report; returns 0 if a backend computes rightly, else 1."""
    report = examine(None if as_json else _write_section)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0 if any(row["computes"] for row in report["backends"]) else 1


def examine(show: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
    """What the probes found, by name, and the advice that follows; `show` is given each as soon as it is there."""
    report: dict[str, Any] = {}
    for name, needed in _PROBES.items():
        report[name] = _examine(name, needed, report)
        if show:
            show(name, report[name])
    report["advice"] = probes.guarded(advice.advice, report)
    if show:
        show("advice", report["advice"])
    return report


def _examine(name: str, needed: tuple[str, ...], report: dict[str, Any]) -> Any:
    probe = getattr(probes, name)
    if needed == ("gpus",):
        found = report["gpus"]
        return probes.guarded(probe, found if isinstance(found, list) else [])
    if needed:
        found = probes.guarded(probe, report)
        return found if isinstance(found, list) else [{"backend": "all", "computes": False, **found}]
    return probes.guarded(probe)


def _write_section(name: str, found: Any) -> None:
    sys.stdout.write(render(name, found))
    sys.stdout.flush()


def render(name: str, found: Any) -> str:
    """A section as text, empty if there is nothing to say."""
    if name == "advice":
        return _advice(found)
    if not found:
        return ""
    named_by_us = name not in ("packages", "settings", "targets")
    if isinstance(found, list):
        lines = _table(found)
    elif set(found) == {"error"}:
        lines = [f"{'no GPU: ' if name == 'gpus' else ''}{found['error']}"]
    else:
        lines = _pairs({_words(key) if named_by_us else key: value for key, value in found.items()})
    return "".join(f"{line}\n" for line in [_TITLES.get(name, name), *(f"  {line}" for line in lines), ""])


def _pairs(values: dict[str, Any]) -> list[str]:
    width = max(map(len, values))
    return [f"{key:{width}}  {_text(value)}" for key, value in values.items()]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_words(key) for key in keys]]
    cells += [[_text(row[key]) if key in row else "" for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return ["  ".join(f"{text:{width}}" for text, width in zip(line, widths)).rstrip() for line in cells]


def _words(key: str) -> str:
    names = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "nvidia": "NVIDIA", "gib": "GiB"}
    return " ".join(names.get(word, word) for word in key.split("_"))


def _text(value: Any) -> str:
    if isinstance(value, dict) and "error" in value:
        return f"error: {value['error']}"
    if value is None:
        return "-"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _advice(found: Any) -> str:
    if isinstance(found, dict):
        return f"what to do\n  no advice, as it failed: {found['error']}\n"
    if not found:
        return "nothing to mend\n"
    items = [f"  {item['problem']}\n      {item['command']}\n" for item in found]
    return "what to do\n" + "".join(items)
