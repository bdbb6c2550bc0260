"""minGRU-pytorch, in log space."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ..contest import APART_AND_BOTH, passes_of
from ..problem import NDArray, Problem, given
from . import tensors
from .tensors import OnTorch, Subject


class MinGRUPyTorch(OnTorch):
    """`minGRU`, batch first as it wants its arrays."""

    name = "minGRU-pytorch"
    needs = ("torch", "minGRU_pytorch")
    command = "minGRU-pytorch"
    slack = 100  # its sums of logarithms lose digits with L

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        fits = (problem.level, problem.name, problem.D) == ("layer", "minGRU positive", 1)
        return passes_of(problem, recurrence=(), layer=APART_AND_BOTH) if fits and not problem.ragged else ()

    def made(self, torch: Any, problem: Problem) -> Any:
        arrays = given(problem)
        module = importlib.import_module("minGRU_pytorch.minGRU").minGRU(problem.d)
        x, dh = (np.ascontiguousarray(arrays[name].swapaxes(0, 1)) for name in ("x", "dh"))
        leaves = {"x": tensors.leaf(x)}
        module.to(tensors.device(), leaves["x"].dtype)
        weight = arrays["weight"][0, ::-1].reshape(2 * problem.d, problem.d)  # candidate, then gate
        module.to_hidden_and_gate.weight.data = tensors.tensor(np.ascontiguousarray(weight))
        leaves["weight"] = module.to_hidden_and_gate.weight

        def export(name: str, array: NDArray) -> NDArray:
            if name == "dweight":
                return array.reshape(1, 2, problem.d, problem.d)[:, ::-1]
            return array.swapaxes(0, 1)

        names = {name: f"d{name}" for name in leaves}

        def run() -> Any:
            return module(leaves["x"])

        return Subject(run, run, leaves, tensors.tensor(dh), names, export)
