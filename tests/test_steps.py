"""One token at a time, for decoding: into memory that was given, of every cell. (That a step has the bits of its token
in a sequence is tested with the bits, in test_bits.py and test_gpu_kernels.py.)"""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

import sru_rt
from sru_rt import on_cupy, on_numpy

B, d = 64, 96

CELLS: dict[str, dict[str, Any]] = {
    "sru": {},
    "qrnn": {"highway": True},
    "mingru": {"candidate": "positive"},
    "minlstm": {},
}


def call_of(name: str, directions: int = 1, dtype: str = "float32", **options: Any) -> tuple[Any, dict[str, Any]]:
    """The step function of a cell, and arguments in which the state is updated in place."""
    given = getattr(sru_rt, f"{name}_init")(directions * d, d, directions=directions, rng=0, dtype=dtype, **options)
    rng, state = np.random.default_rng(1), "c" if name in ("sru", "qrnn") else "h"
    x = rng.normal(size=(B, directions * d)).astype(given["weight"].dtype)
    c = rng.normal(size=(directions, B, d)).astype("f8" if dtype == "float64" else "f4")
    return getattr(sru_rt, f"{name}_step"), {"x": x, **given, state: c, "out": (np.empty_like(x), c)}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CELLS)
def test_no_memory_is_allocated(name, dtype, directions, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    step, arguments = call_of(name, directions, dtype, **CELLS[name])
    for _ in range(2):
        step(**arguments)
    monkeypatch.setattr(on_numpy, "empty", lambda *_: pytest.fail("an array was made"))
    tracemalloc.start()
    try:
        step(**arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < arguments["x"].nbytes / 2, "even h would take more"


@pytest.mark.parametrize("name", CELLS)
def test_no_memory_is_allocated_on_a_gpu(place, name, monkeypatch):
    step, arguments = call_of(name, **CELLS[name])
    given = {n: place.put(a) for n, a in arguments.items()}
    given["out"] = (given["out"][0], given["c" if "c" in given else "h"])
    for _ in range(2):
        step(**given)
    monkeypatch.setattr(on_cupy.CuPy, "empty", lambda *_: pytest.fail("an array was made"))
    for function in ("empty", "zeros", "array"):
        monkeypatch.setattr(place.xp, function, lambda *_, **__: pytest.fail("an array was made"))
    step(**given)


@pytest.mark.parametrize("name", CELLS)
def test_steps_in_threads_do_not_share_memory(name, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    step, arguments = call_of(name, **CELLS[name])
    state = "c" if "c" in arguments else "h"
    sequential, results = [], {}

    def run(i: int, to: Any) -> None:
        own = arguments | {"x": arguments["x"] * (i + 1), state: None, "out": None}
        for _ in range(20):
            to[i] = step(**own)
            own[state] = to[i][1]

    for i in range(4):
        run(i, box := {})
        sequential.append(box[i])
    threads = [threading.Thread(target=run, args=(i, results)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (h, c) in enumerate(sequential):
        assert results[i][0].tobytes() == h.tobytes() and results[i][1].tobytes() == c.tobytes(), i


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("window", [2, 3])
def test_a_window_is_the_last_tokens(window, directions, backend):
    """Zeros before the first. Each direction takes the tokens in the order in which they are given."""
    given = sru_rt.qrnn_init(7, 5, directions=directions, window=window, highway=True, rng=0, dtype="float64")
    x = np.random.default_rng(1).normal(size=(6, 3, 7))
    alone = [
        sru_rt.qrnn_forward(x, **{n: a[q : q + 1] if isinstance(a, np.ndarray) else a for n, a in given.items()})
        for q in range(directions)
    ]
    h, c_last = np.concatenate([one[0] for one in alone], 2), np.concatenate([one[1] for one in alone])
    tokens, c = np.zeros((window, 3, 7)), None
    for t in range(6):
        tokens = np.concatenate([tokens[1:], x[t : t + 1]])
        got, c = sru_rt.qrnn_step(tokens, c=c, **given)
        np.testing.assert_allclose(got, h[t], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(c, c_last, rtol=1e-12, atol=1e-12)
