"""What the tests of the binding for PyTorch share: problems as tensors, and results as arrays."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from problems import Problem

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch.utils._python_dispatch import TorchDispatchMode


def tensor(array: Any) -> Any:
    """A NumPy array as a tensor with its values; a pair as a pair; anything else as it is."""
    if isinstance(array, tuple):
        return tuple(map(tensor, array))
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array(value: Any) -> Any:
    """A tensor as a NumPy array."""
    if isinstance(value, tuple):
        return tuple(map(array, value))
    if value is None:
        return None
    value = value.detach()
    return value.view(torch.int16).numpy().view(bfloat16) if value.dtype == torch.bfloat16 else value.numpy()


def differentiable(problem: Problem) -> dict[str, Any]:
    """The arguments of a problem as tensors, those that have a gradient as leaves of a graph."""
    given = {name: tensor(value) for name, value in problem.given.items()}
    for name in problem.arrays:
        for one in given[name] if isinstance(given[name], tuple) else [given[name]]:
            if one is not None:
                one.requires_grad_()
    return given


def run(problem: Problem, function: Any, **more: Any) -> tuple[tuple[Any, Any], Any]:
    """Results and gradients of a function on tensors, as `Problem.run` has them."""
    given = differentiable(problem)
    h, last = function(**given, **more)
    assert not isinstance(h, np.ndarray)
    torch.autograd.backward([h, last], [tensor(problem.dh), tensor(problem.dlast)])
    gradients = {}
    for name in problem.arrays:
        value = given[name]
        pair = isinstance(value, tuple)
        gradients[name] = tuple(array(v.grad) for v in value) if pair else value if value is None else array(value.grad)
    return (array(h), array(last)), types.SimpleNamespace(**gradients)


def flat(given: dict[str, Any]) -> list[Any]:
    """The tensors that have a gradient."""
    every = [one for value in given.values() for one in (value if isinstance(value, tuple) else (value,))]
    return [one for one in every if isinstance(one, torch.Tensor) and one.is_floating_point()]


class Recorder(TorchDispatchMode):
    """Notes the calls of our operators, with what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sru_rt":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def operators(function: Any, given: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that a function and its gradient call, with their arguments."""
    with Recorder() as recorder:
        h, last = function(**given)
        results = [h, *(last if isinstance(last, tuple) else [last])]
        torch.autograd.backward(results, [seed(r) for r in results])
    return recorder.calls


def seed(result: Any) -> Any:
    """A gradient of a result, no two numbers of which are alike."""
    return torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device).reshape(result.shape).cos()
