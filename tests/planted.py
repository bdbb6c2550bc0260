"""Plants bugs in copies of the C++ sources: that tests pass says something only if they find these."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from emu import fake_cupy
from gpu_places import forget_kernels
from sru_rt import source


def sources(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the sources in which `new` stands in the place of `old`."""
    copy = Path(shutil.copytree(source.cuda_dir(), folder / "cuda"))
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{old!r} does not stand in {file} exactly once; plant the bug anew"
    (copy / file).write_text(text.replace(old, new))
    return copy


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, old: str, new: str) -> None:
    """Has the emulation compile such a copy."""
    monkeypatch.setattr(fake_cupy, "CUDA_SOURCES", sources(folder, file, old, new))
    monkeypatch.setattr(fake_cupy, "_emulated", functools.cache(fake_cupy._emulated.__wrapped__))
    forget_kernels()
