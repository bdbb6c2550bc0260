"""PyPI's `sru`, the reference implementation."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from typing import Any

from ..clocks import Call
from ..contest import APART_AND_BOTH, LeftOut, passes_of
from ..problem import Problem, given
from . import tensors
from .in_torch import sru_like
from .tensors import OnTorch, Subject

_MOST_STEPS = 2048  # on the CPU, where the gradient of each step is written into zeros of the size of all


class Sru(OnTorch):
    """`SRUCell`: on the CPU its C++ code without gradients and its Python loop with them, on a GPU its kernels.

    As a cell it is given U, with the gates of a channel beside each other, as its kernels want it.
    """

    name = "sru"
    needs = ("torch", "sru")
    command = "'sru_rt[bench]'"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        if problem.name != "SRU" or problem.ragged:
            return ()
        return passes_of(problem, recurrence=APART_AND_BOTH, layer=APART_AND_BOTH)

    def made(self, torch: Any, problem: Problem) -> Any:
        if problem.dtype == "bfloat16":
            raise LeftOut("it has no bfloat16")
        if tensors.device() == "cpu" and problem.L > _MOST_STEPS:
            raise LeftOut(f"its backward takes minutes or all memory on the CPU beyond {_MOST_STEPS} steps")
        module, failed = _imported()
        if tensors.device() == "cuda" and failed:
            raise LeftOut(f"its CUDA code does not build with torch {torch.__version__}: {failed}")
        make = module.SRUCell
        subject: Any = sru_like(make, problem) if problem.of_layers else _cell(torch, make, problem)
        if tensors.device() == "cuda":
            subject.calls = {which: _OnLegacyStream(torch, call) for which, call in subject.calls.items()}
        return subject


class _OnLegacyStream:
    """A call of what launches on the legacy stream, which cannot be captured, in order with the current stream."""

    captures = False

    def __init__(self, torch: Any, call: Call) -> None:
        self._cuda, self._call = torch.cuda, call

    def __call__(self) -> Any:
        here, there = self._cuda.current_stream(), self._cuda.default_stream()
        there.wait_stream(here)
        with self._cuda.stream(there):
            found = self._call()
        here.wait_stream(there)
        return found


@functools.cache
def _imported() -> tuple[Any, str]:
    """The package, which builds its C++ code now, and says in a warning alone why its CUDA code does not build."""
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # for ninja
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module = importlib.import_module("sru")
        failed = next((str(w.message) for w in found if "CUDA kernels of SRU" in str(w.message)), "")
    warnings.filterwarnings("ignore", module=r"sru\.")  # it minds gradients on the CPU
    return module, failed.strip().rpartition("\n")[2]


def _cell(torch: Any, make: Any, problem: Problem) -> Subject:
    arrays, L, B, D, d = given(problem), problem.L, problem.B, problem.D, problem.d
    cell = make(problem.width, d, bidirectional=D == 2)
    u = tensors.leaf(arrays["u"].transpose(0, 1, 2, 4, 3).reshape(L, B, -1))
    x, dh = tensors.leaf(arrays["x"]), tensors.tensor(arrays["dh"])
    cell.to(tensors.device(), dh.dtype)
    v, cell.bias.data = (tensors.leaf(arrays[name].swapaxes(0, 1).reshape(-1)) for name in ("v", "bias"))
    evaluation, c0 = torch.jit.script(cell.eval()), dh.new_zeros((B, D * d))
    leaves = {"u": u, "x": x, "v": v, "bias": cell.bias}

    def function(module: Any) -> Any:
        return module.apply_recurrence(u, v, x, c0, module.scale_x, None, None)[0]

    def export(name: str, array: Any) -> Any:
        if name == "du":
            return array.reshape(L, B, D, d, 3).transpose(0, 1, 2, 4, 3)
        return array.reshape(2, D, d).swapaxes(0, 1) if name in ("dv", "dbias") else array

    names = {name: f"d{name}" for name in leaves}
    return Subject(lambda: function(evaluation), lambda: function(cell), leaves, dh, names, export)
