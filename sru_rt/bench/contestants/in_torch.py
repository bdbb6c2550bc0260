"""Our own modules and functions on PyTorch's tensors, and PyTorch's products alone."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..clocks import Call
from ..contest import APART_AND_BOTH, Against, Built, Place, passes_of
from ..problem import BACKWARD, BOTH, FORWARD, NDArray, Problem, given
from . import tensors
from .in_arrays import Products
from .tensors import NAME, OnTorch, Subject, Training


class OursInTorch(OnTorch):
    """`SRUCell` and `MinGRU` where there is a module, else the library's functions."""

    name = NAME
    process = "torch"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        few = problem.of_layers or device == "gpu"  # of which others take part
        if problem.ragged or (few and problem.name not in ("linear", "SRU", "minGRU", "minGRU positive")):
            return ()
        return passes_of(problem, recurrence=APART_AND_BOTH, layer=APART_AND_BOTH)

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        if not problem.of_layers:
            return None
        return Against(ProductsOfTorch.name, which if which in (FORWARD, BACKWARD) else self._product(which), "x")

    def _product(self, which: str) -> str:
        return FORWARD if which.startswith(FORWARD + ",") else BOTH

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        return ProductsOfTorch().work(problem, which) if problem.of_layers else (0.0, "")

    def made(self, torch: Any, problem: Problem) -> Any:
        if problem.of_layers:
            return sru_like(OURS(), problem) if problem.name == "SRU" else _mingru(problem)
        arrays, cell = given(problem), problem.cell
        dh = tensors.tensor(arrays.pop("dh"))
        leaves = {name: tensors.leaf(array) for name, array in arrays.items()}

        def function() -> Any:
            return cell.recurrence(**leaves, **cell.options)[0]

        return Subject(function, function, leaves, dh, {name: f"d{name}" for name in leaves})


def OURS() -> Any:
    """Our class of the name of the reference's."""
    return importlib.import_module("sru_rt.bindings.torch").SRUCell


def sru_like(make: Any, problem: Problem) -> Any:
    """A layer of SRU of a class that has the parameters of `sru.SRUCell`: gates innermost."""
    arrays, D, d = given(problem), problem.D, problem.d
    cell = make(problem.width, d, bidirectional=D == 2)
    cell.to(tensors.device(), tensors.tensor(arrays["x"]).dtype)
    weight = arrays["weight"].transpose(3, 0, 2, 1)  # (D, k, d, n) to (n, D, d, k)
    flat = {"weight": weight, "weight_c": arrays["v"].swapaxes(0, 1), "bias": arrays["bias"].swapaxes(0, 1)}
    for name, array in flat.items():
        parameter = getattr(cell, name)
        parameter.data = tensors.tensor(np.ascontiguousarray(array)).reshape(parameter.shape)
    parameters = dict(cell.named_parameters())
    names = {"weight": "weight", "weight_c": "v", "bias": "bias"}

    def export(name: str, array: NDArray) -> NDArray:
        if name.endswith("weight"):
            return array.reshape(problem.width, D, d, -1).transpose(1, 3, 2, 0)
        return array.reshape(2, D, d).swapaxes(0, 1) if name.endswith(("v", "bias")) else array

    if problem.level == "train":

        def results() -> dict[str, NDArray]:
            return {new: export(new, tensors.host(parameters[own])) for own, new in names.items()}

        return Training(cell, tensors.tensor(arrays["x"]), tensors.tensor(arrays["dh"]), _first, results)
    return of_module(cell, arrays, names, export)


def _first(found: Any) -> Any:
    return found[0]


def of_module(
    module: Any,
    arrays: dict[str, NDArray],
    names: dict[str, str],
    export: Callable[[str, NDArray], NDArray],
    expected: dict[str, NDArray] | None = None,
) -> Subject:
    """A module on x and its parameters; it returns h first. `names` are those of parameters in the problem."""
    evaluation, x = copy.deepcopy(module).eval(), tensors.leaf(arrays["x"])
    plain = x.detach()
    leaves = {"x": x} | dict(module.named_parameters())
    compared = {"x": "dx"} | {own: f"d{new}" for own, new in names.items()}
    dh = tensors.tensor(arrays["dh"])
    return Subject(lambda: evaluation(plain)[0], lambda: module(x)[0], leaves, dh, compared, export, expected)


def _mingru(problem: Problem) -> Any:
    make = importlib.import_module("sru_rt.bindings.torch").MinGRU
    arrays = given(problem)
    module = make(problem.width, problem.d, bias=False, bidirectional=problem.D == 2, candidate="positive")
    module.to(tensors.device(), tensors.tensor(arrays["x"]).dtype)
    module.weight_l0.data = tensors.tensor(arrays["weight"])
    return of_module(module, arrays, {"weight_l0": "weight"}, lambda name, array: array)


class ProductsOfTorch(Products):
    """The same in PyTorch, as layers form them there."""

    name = "products of PyTorch"
    process = "torch"
    needs = ("torch",)

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        return super().passes(problem, device) if problem.name in ("SRU", "minGRU positive") else ()

    def build(self, problem: Problem, place: Place) -> Built:
        tensors.start(place)
        arrays = given(problem)
        size = arrays["x"].nbytes + arrays["weight"].nbytes
        made = [_products(problem, arrays) for _ in range(place.sets(size))]
        return Built({which: [calls[which] for calls in made] for which in self.passes(problem, place.device)})


def _products(problem: Problem, arrays: dict[str, NDArray]) -> dict[str, Call]:
    products = importlib.import_module("sru_rt.bindings.torch.products")
    x = tensors.tensor(arrays["x"]).view(-1, problem.width)
    w = tensors.tensor(arrays["weight"]).view(-1, problem.width).t().contiguous()
    u = x @ w
    forward = partial(products.times, x, w)

    def backward() -> None:
        products.times(u, w.t())
        products.transposed_times(x, u)

    def both() -> None:
        forward()
        backward()

    return {FORWARD: forward, BACKWARD: backward, BOTH: both}
