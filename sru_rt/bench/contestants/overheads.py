"""What a call costs at least, where there is next to nothing to compute."""

from __future__ import annotations

import ctypes
import importlib
from functools import partial
from typing import Any

from ... import compile_cpu
from ..contest import Against, Built, Contestant, Place
from ..problem import FORWARD, SAVE, Problem, given
from . import tensors
from .in_arrays import NAME
from .in_jax import NAME as IN_JAX
from .in_jax import ready

EMPTY = """
#include "xla_ffi.h"
extern "C" __attribute__((visibility("default"))) void *empty(xla_ffi::Frame *frame) {
  xla_ffi::answers_metadata(frame, 0);
  return nullptr;
}
"""


class _Overhead(Contestant):
    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        tiny = problem.level == "cell" and problem.name == "SRU" and problem.elements <= 8
        return (FORWARD,) if tiny and device == "cpu" else ()

    def label(self, problem: Problem, which: str) -> str:
        return self.name


class WithoutOut(_Overhead):
    """Our own functions on arrays of NumPy where they make their results, for which they are given no `out=`."""

    name = f"{NAME} without out="
    process = "arrays"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        return (FORWARD, SAVE) if super().passes(problem, device) else ()

    def label(self, problem: Problem, which: str) -> str:
        return f"{problem.name} by {self.name}, {which}"

    def build(self, problem: Problem, place: Place) -> Built:
        arrays = given(problem)
        del arrays["dh"]
        forward = partial(problem.cell.recurrence, **arrays, **problem.cell.options)
        calls = {FORWARD: [forward], SAVE: [partial(forward, save=True)]}
        return Built(calls, lambda: dict(zip(("h", "last"), forward())))


class Clone(_Overhead):
    """Of a tensor such as x."""

    name = "clone() of a tensor"
    process = "torch"
    needs = ("torch",)

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        return super().passes(problem, "cpu")

    def build(self, problem: Problem, place: Place) -> Built:
        tensors.start(place)
        return Built({FORWARD: [tensors.tensor(given(problem)["x"]).clone]})


class EmptyCall(_Overhead):
    """A custom call of JAX with as many operands and results as the recurrence, whose handler does nothing."""

    name = "empty custom call of JAX"
    process = "jax"
    needs = ("jax",)

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against(IN_JAX, which, "x the time of")

    def build(self, problem: Problem, place: Place) -> Built:
        jax: Any = importlib.import_module("jax")
        address = ctypes.cast(compile_cpu.load(EMPTY, "empty").empty, ctypes.c_void_p).value
        jax.local_devices()
        jax.ffi.register_ffi_target("empty", jax.ffi.pycapsule(address), platform="cpu")
        L, B, D, d = problem.L, problem.B, problem.D, problem.d
        shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((L, B, D * d), (D, B, d))]
        call = jax.jit(lambda *arrays: tuple(jax.ffi.ffi_call("empty", shapes)(*arrays)))
        arrays = [jax.numpy.asarray(array) for name, array in given(problem).items() if name != "dh"]
        return Built({FORWARD: [lambda: ready(lambda: call(*arrays))]})
