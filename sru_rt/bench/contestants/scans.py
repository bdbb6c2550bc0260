"""What the scans of other libraries on PyTorch share: h = a*h + b on tensors a and b, in the layout that they want."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from ..problem import NDArray, Problem, given, reference
from . import tensors
from .tensors import OnTorch, Subject


class OnScan(OnTorch):
    """A scan; `axes` is the order of time, sequences and channels in its arrays."""

    does = (("scan", "linear"),)
    axes = (0, 1, 2)
    takes_log = False  # of a: g, in its place

    @abc.abstractmethod
    def function(self, torch: Any, problem: Problem) -> Any:
        """What makes h of a (or g) and b, both differentiable."""

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        return super().passes(problem, device) if problem.D == 1 and problem.L > 1 else ()

    def made(self, torch: Any, problem: Problem) -> Subject:
        arrays, function = given(problem), self.function(torch, problem)

        def own(array: NDArray) -> NDArray:
            return np.ascontiguousarray(array.transpose(self.axes))

        a, b = (own(arrays["u"][:, :, 0, i]) for i in (0, 1))
        first = {"g": tensors.leaf(np.log(a))} if self.takes_log else {"a": tensors.leaf(a)}
        leaves = first | {"b": tensors.leaf(b)}
        dh = tensors.tensor(own(arrays["dh"]))

        def run() -> Any:
            return function(*leaves.values())

        return Subject(run, run, leaves, dh, {name: f"d{name}" for name in leaves}, self.back, _expected(problem))

    def back(self, name: str, array: NDArray) -> NDArray:
        """An array in the problem's layout."""
        return array.transpose(np.argsort(self.axes))


def _expected(problem: Problem) -> dict[str, NDArray] | None:
    """Results by the names of a scan, where they are compared."""
    if problem != problem.checked():
        return None
    found, a = reference(problem), given(problem)["u"][:, :, 0, 0].astype(np.float64)
    da, db = found["du"][:, :, 0, 0], found["du"][:, :, 0, 1]
    return {"h": found["h"], "da": da, "db": db, "dg": da * a}
