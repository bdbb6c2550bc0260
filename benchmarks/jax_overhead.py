"""What a recurrence of JAX costs on the CPU beyond an empty custom call, in microseconds of a call from Python.

    python benchmarks/jax_overhead.py

The arrays are so small that the kernel takes no time. Each number is the least of many rounds, in turn.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import sru_rt
from sru_rt import compile_cpu

L, B, d = 2, 1, 4
CALLS, ROUNDS = 1000, 15

EMPTY = """
#include "xla_ffi.h"
extern "C" __attribute__((visibility("default"))) void *empty(xla_ffi::Frame *frame) {
  xla_ffi::answers_metadata(frame, 0);
  return nullptr;
}
"""


def empty() -> Callable[..., Any]:
    """A custom call with as many operands and results, whose handler does nothing."""
    address = ctypes.cast(compile_cpu.load(EMPTY, "empty").empty, ctypes.c_void_p).value
    jax.local_devices()
    jax.ffi.register_ffi_target("empty", jax.ffi.pycapsule(address), platform="cpu")
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((L, B, d), (1, B, d))]
    return jax.jit(lambda *arrays: tuple(jax.ffi.ffi_call("empty", shapes)(*arrays)))


def main() -> None:
    u, x = jnp.ones((L, B, 1, 3, d)), jnp.ones((L, B, d))
    arrays = (u, x, jnp.ones((1, 2, d)), jnp.ones((1, 2, d)), jnp.zeros((1, B, d)))
    functions = {
        "empty custom call": empty(),
        "sru_recurrence in jit": jax.jit(sru_rt.sru_recurrence),
        "sru_recurrence": sru_rt.sru_recurrence,
    }
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            jax.block_until_ready(function(*arrays))
            began = time.perf_counter()
            for _ in range(CALLS):
                jax.block_until_ready(function(*arrays))
            least[name] = min(least[name], (time.perf_counter() - began) / CALLS)
    for name, seconds in least.items():
        print(f"{name:24}{seconds * 1e6:8.1f} us")


if __name__ == "__main__":
    main()
