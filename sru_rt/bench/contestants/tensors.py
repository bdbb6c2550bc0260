"""What contestants on PyTorch share: tensors of a problem, calls, and results."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..clocks import Call
from ..contest import APART_AND_BOTH, Against, Built, Contestant, Place, passes_of
from ..problem import BACKWARD, BOTH, FORWARD, RATE, SAVE, STEP, NDArray, Problem

NAME = "sru_rt in PyTorch"

Names = dict[str, str]  # of results, by those of leaves; only of those that are to be compared


class OnTorch(Contestant):
    """Another library on PyTorch."""

    process = "torch peers"
    needs: tuple[str, ...] = ("torch",)
    does: tuple[tuple[str, str], ...] = ()  # level and cell

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        if (problem.level, problem.name) not in self.does or problem.ragged:
            return ()
        return passes_of(problem, recurrence=APART_AND_BOTH, layer=APART_AND_BOTH)

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against(NAME, which, "x the time of")

    def build(self, problem: Problem, place: Place) -> Built:
        """Of `made` on as many sets of tensors as are wanted."""
        torch = start(place)
        first = self.made(torch, problem)
        size = sum(t.numel() * t.element_size() for t in first.tensors)
        made = [first, *(self.made(torch, problem) for _ in range(place.sets(size) - 1))]
        wanted = self.passes(problem, place.device)
        return Built({which: [one.calls[which] for one in made] for which in wanted}, first.results, first.expected)

    @abc.abstractmethod
    def made(self, torch: Any, problem: Problem) -> Subject:
        """The calls on one set of tensors."""


class Subject:
    """Functions of `leaves` that return h, of which `evaluate` is called without gradients.

    Args:
        names: of the results that are compared, by those of leaves.
        export: makes of a tensor, by the name of its result, an array such as the problem has.
        expected: results in float64, where the problem's are not meant.
    """

    def __init__(
        self,
        evaluate: Callable[[], Any],
        train: Callable[[], Any],
        leaves: Mapping[str, Any],
        dh: Any,
        names: Names,
        export: Callable[[str, NDArray], NDArray] = lambda name, array: array,
        expected: Mapping[str, NDArray] | None = None,
    ) -> None:
        self.leaves, self.names, self.export, self.expected = leaves, names, export, expected
        self.tensors = [*leaves.values(), dh]
        self.calls = calls(evaluate, train, list(leaves.values()), dh)

    def results(self) -> dict[str, NDArray]:
        """Of all passes."""
        h, gradients = self.calls[BOTH]()
        found = {"h": h} | self._gradients("", gradients)
        found[f"{FORWARD}: h"] = self.calls[FORWARD]()
        found |= self._gradients(f"{BACKWARD}: ", self.calls[BACKWARD]())
        return {name: self.export(name.rpartition(": ")[2], host(value)) for name, value in found.items()}

    def _gradients(self, prefix: str, gradients: Any) -> dict[str, Any]:
        named = zip(self.leaves, gradients)
        return {f"{prefix}{self.names[name]}": value for name, value in named if name in self.names}


class Training:
    """Steps of gradient descent of a module towards `target`, from its parameters as they are."""

    expected: Mapping[str, NDArray] | None = None

    def __init__(
        self,
        module: Any,
        x: Any,
        target: Any,
        output: Callable[[Any], Any],
        results: Callable[[], dict[str, NDArray]],
    ) -> None:
        torch = importlib.import_module("torch")
        self.tensors = [x, target, *module.parameters()]
        self._parameters, self._results = list(module.parameters()), results
        self._initial = [p.detach().clone() for p in self._parameters]
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        steps = x.shape[0] * x.shape[1]

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss = (output(module(x)) - target).square().sum() / (2 * steps)
            loss.backward()
            optimizer.step()

        self.calls: dict[str, Call] = {STEP: step}

    def results(self) -> dict[str, NDArray]:
        """Parameters after one step."""
        for parameter, value in zip(self._parameters, self._initial):
            parameter.data.copy_(value)
        self.calls[STEP]()
        return self._results()


def start(place: Place) -> Any:
    """PyTorch with the threads and the device of a place."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(place.threads)
    _devices[:] = ["cuda" if place.device == "gpu" else "cpu"]
    return torch


_devices = ["cpu"]  # the one of the last place; PyTorch's own default device would cost time in every call


def device() -> str:
    """Where tensors are made."""
    return _devices[0]


def tensor(array: NDArray) -> Any:
    """A tensor on the device."""
    torch = importlib.import_module("torch")
    if array.dtype.name == "bfloat16":  # which PyTorch does not take from NumPy
        return torch.tensor(array.astype(np.float32), device=device()).bfloat16()
    return torch.tensor(array, device=device())


def leaf(array: NDArray) -> Any:
    """A tensor of which a gradient is wanted."""
    return tensor(array).requires_grad_()


def host(value: Any) -> NDArray:
    """A tensor as an array in float64."""
    found: NDArray = value.detach().double().cpu().numpy()
    return found


def calls(evaluate: Callable[[], Any], train: Callable[[], Any], leaves: list[Any], dh: Any) -> dict[str, Call]:
    """All passes of functions that return h."""
    torch = importlib.import_module("torch")
    recorded: list[Any] = []

    def forward() -> Any:
        with torch.no_grad():
            return evaluate()

    def both() -> Any:
        h = train()
        return h.detach(), torch.autograd.grad(h, leaves, dh)

    def backward() -> Any:
        recorded[:] = recorded or [train()]
        return torch.autograd.grad(recorded[0], leaves, dh, retain_graph=True)

    return {FORWARD: forward, SAVE: train, BACKWARD: backward, BOTH: both}
