"""Programs that outlive their process: exported, compiled into JAX's cache, and loaded elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs JAX")

import sru_rt
from jax_tools import jax, program, script

export = pytest.importorskip("jax.export", reason="this JAX has no jax.export")

CELLS = """
import sru_rt

@sru_rt.cell(gates="a n", params="b", state="c", constants="k")
def leaky(a, n, b, c, k=1.0):
    a = sru_rt.sigmoid(a + b)
    c = a * c + k * (1 - a) * n
    return c, sru_rt.tanh(c)
"""

PROGRAM = Path(__file__).resolve().parent / "jax_exported.py"


def write(folder: Path, *arguments: str) -> Path:
    """Writes down a program for sequences of any number and length, and what it is to give."""
    pytest.importorskip("flatbuffers", reason="JAX needs it to write programs down")
    (folder / "cells.py").write_text(CELLS)
    script(PROGRAM, "write", *arguments, folder=folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("exported"), "all", "cpu", "cuda")


def test_exported_program_in_a_fresh_process(written):
    assert script(PROGRAM, "read", "all", folder=written).endswith("done\n")


def test_exported_program_without_a_compiler(written):
    """The handler in Python has NumPy do the work."""
    assert script(PROGRAM, "read", "all", folder=written, SRU_RT_CXX="/no/such/compiler").endswith("done\n")


def test_exported_program_that_forms_u_again(tmp_path):
    write(tmp_path, "x", "cpu")
    assert script(PROGRAM, "read", "x", folder=tmp_path).endswith("done\n")


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_cell_of_an_exported_program_that_is_not_the_same(written, tmp_path, change):
    """An error of JAX's, with what is wrong and what to do; the process goes on."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cells.py").write_text("" if change == "gone" else CELLS.replace("sigmoid(a + b)", "sigmoid(a - b)"))
    printed = script(PROGRAM, "error", "all", folder=tmp_path)
    assert "ArgumentError: sru_rt: the " in printed
    assert ("is not here" if change == "gone" else "has changed since the program") in printed
    assert printed.endswith("done\n")


def test_loading_without_the_binding(written):
    """XLA says which handler it misses; its name says whose it is."""
    printed = script(PROGRAM, "error", "no binding", folder=written)
    assert "sru_rt_" in printed and printed.endswith("done\n")


def test_cache_of_compiled_programs(tmp_path):
    """What one process compiled another one takes as it is: there is nothing in it of the process."""
    text = """
        import jax, jax.numpy as jnp, numpy as np
        import sru_rt
        jax.config.update("jax_compilation_cache_dir", "cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        hits = []
        jax.monitoring.register_event_listener(lambda name, **more: hits.append(name) if "cache_hits" in name else None)
        u = jnp.sin(jnp.arange(5 * 3 * 2 * 4.0)).reshape(5, 3, 1, 2, 4)
        g = jax.jit(jax.grad(lambda u: (sru_rt.mingru_recurrence(u)[0] ** 2).sum()))
        hits.clear()
        print(float(jnp.abs(g(u)).sum()), len(hits))
    """
    first, second = (program(text, tmp_path).split() for _ in range(2))
    assert first[0] == second[0]
    assert (int(first[1]) > 0, int(second[1]) > 0) == (False, True)


def test_statement_is_by_value():
    """Two processes write down the same: no addresses, no counters."""
    import jax.numpy as jnp

    u = jnp.ones((3, 2, 1, 2, 4))
    texts = []
    for _ in range(2):
        jax.clear_caches()
        texts.append(jax.jit(lambda u: sru_rt.mingru_recurrence(u)).lower(u).as_text())
    assert texts[0] == texts[1]
    assert "mingru(" in texts[0]
    assert "stablehlo.custom_call @sru_rt_" in texts[0]
