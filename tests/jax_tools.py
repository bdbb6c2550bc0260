"""What the tests of the binding for JAX share: problems as arrays of JAX, and results as arrays of NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from problems import Problem

jax = pytest.importorskip("jax", reason="needs JAX")

import jax.numpy as jnp

SETTINGS = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")


def bits_64(enabled: bool) -> AbstractContextManager[Any]:
    """JAX has float64 only if it is asked for it."""
    return jax.enable_x64(enabled) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(enabled)


@pytest.fixture(autouse=True)
def with_64_bits() -> Iterator[None]:
    """For the tests of a file that imports it."""
    with bits_64(True):
        yield


@pytest.fixture
def new_programs() -> Iterator[None]:
    """Programs hold the settings of when they were traced."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def to_jax(value: Any) -> Any:
    """A NumPy array as one of JAX; a pair as a pair; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(to_jax, value))
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def to_numpy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(to_numpy, value))
    return None if value is None else np.asarray(value)


def split(given: dict[str, Any], names: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments to differentiate by, as arrays of JAX, and all others."""
    given = {name: to_jax(value) for name, value in given.items()}
    of = {name: given[name] for name in names if given[name] is not None}
    return of, {name: value for name, value in given.items() if name not in of}


def seeds(problem: Problem) -> tuple[Any, Any]:
    return to_jax(problem.dh), to_jax(problem.dlast)


def run(problem: Problem, function: Any, **more: Any) -> tuple[tuple[Any, Any], Any]:
    """Results and gradients of a function on arrays of JAX, as `Problem.run` has them."""
    of, others = split(problem.given, problem.arrays)
    results, pullback = jax.vjp(lambda of: function(**of, **others, **more), of)
    (found,) = pullback(seeds(problem))
    assert all(isinstance(one, jax.Array) for one in results)
    gradients = {name: to_numpy(found.get(name)) for name in problem.arrays}
    return tuple(map(to_numpy, results)), types.SimpleNamespace(**gradients)


def program(text: str, folder: Path, *, devices: int = 0, **environment: str) -> str:
    """Runs a program in another process, from another folder; returns what it printed. It must succeed."""
    return _run(["-c", textwrap.dedent(text)], folder, devices, environment)


def script(path: Path, *arguments: object, folder: Path, devices: int = 0, **environment: str) -> str:
    """The same of a program in a file."""
    return _run([str(path), *map(str, arguments)], folder, devices, environment)


def _run(arguments: list[str], folder: Path, devices: int, environment: dict[str, str]) -> str:
    settings = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    settings |= {"JAX_PLATFORMS": "cpu", **environment}
    settings |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices else {}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout
