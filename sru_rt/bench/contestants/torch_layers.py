"""PyTorch's own layers of the same size: other functions, which are compared with themselves in float64."""

from __future__ import annotations

import abc
import copy
from typing import Any

from ..contest import APART_AND_BOTH, Against, passes_of
from ..problem import Problem, given
from . import tensors
from .in_arrays import NAME as OURS
from .in_torch import of_module
from .tensors import NAME, OnTorch, Subject, Training


class _Layer(OnTorch):
    """A layer that is held against one of SRU."""

    does = (("layer", "SRU"), ("train", "SRU"))

    def label(self, problem: Problem, which: str) -> str:
        return f"{'training of ' if problem.level == 'train' else ''}{self.name}, {which}"

    @abc.abstractmethod
    def module(self, torch: Any, problem: Problem) -> Any:
        """The module of PyTorch."""

    def arrays(self, problem: Problem) -> dict[str, Any]:
        """x and dh as the layer wants them."""
        return {name: given(problem)[name] for name in ("x", "dh")}

    def made(self, torch: Any, problem: Problem) -> Any:
        torch.manual_seed(0)
        arrays, module = self.arrays(problem), self.module(torch, problem)
        x, dh = (tensors.tensor(arrays[name]) for name in ("x", "dh"))
        module.to(tensors.device(), x.dtype)
        names = {name: name for name, _ in module.named_parameters()}

        def results() -> dict[str, Any]:
            return {name: tensors.host(p) for name, p in module.named_parameters()}

        if problem.level == "train":
            made = Training(module, x, dh, lambda found: found[0], results)
            made.expected = Training(
                *(wide := _wide(module, x, dh)),
                lambda found: found[0],
                lambda: {name: tensors.host(p) for name, p in wide[0].named_parameters()},
            ).results()
            return made
        expected = _expected(module, x, dh, names) if problem == problem.checked() else None
        return of_module(module, arrays, names, lambda name, array: array, expected=expected)


def _wide(module: Any, x: Any, dh: Any) -> tuple[Any, Any, Any]:
    """The same in float64 on the CPU."""
    return copy.deepcopy(module).cpu().double(), x.double().cpu(), dh.double().cpu()


def _expected(module: Any, x: Any, dh: Any, names: dict[str, str]) -> dict[str, Any]:
    module, x, dh = _wide(module, x, dh)
    leaves = {"x": x.requires_grad_()} | dict(module.named_parameters())
    compared = {"x": "dx"} | {name: f"d{name}" for name in names}
    return Subject(lambda: module(x)[0], lambda: module(x)[0], leaves, dh, compared).results()


class LSTM(_Layer):
    """cuDNN's on a GPU."""

    name = "torch.nn.LSTM"
    stacks = True

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against(OURS if problem.layers > 1 else NAME, which, "x the time of")

    def module(self, torch: Any, problem: Problem) -> Any:
        kind = getattr(torch.nn, self.name.rpartition(".")[2])
        return kind(problem.width, problem.d, num_layers=problem.layers, bidirectional=problem.D == 2)


class GRU(LSTM):
    """Likewise."""

    name = "torch.nn.GRU"


class Convolution(_Layer):
    """Over k tokens, on arrays (B, d, L), which is how it wants them."""

    def __init__(self, k: int) -> None:
        self.k, self.name = k, f"conv1d, k = {k}"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        fits = (problem.level, problem.name) in self.does and problem.D == 1 and problem.L > 1 and not problem.ragged
        return passes_of(problem, recurrence=APART_AND_BOTH, layer=APART_AND_BOTH) if fits else ()

    def module(self, torch: Any, problem: Problem) -> Any:
        class Padded(torch.nn.Conv1d):  # type: ignore[misc]  # a class that is known at run time
            """As long as its input; h is the first of its results, as that of other layers."""

            def forward(self, x: Any) -> tuple[Any]:
                return (super().forward(x)[..., : x.shape[-1]],)

        return Padded(problem.d, problem.d, self.k, padding=self.k - 1)

    def arrays(self, problem: Problem) -> dict[str, Any]:
        return {name: array.transpose(1, 2, 0).copy() for name, array in super().arrays(problem).items()}
