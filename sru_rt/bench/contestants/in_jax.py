"""Our own functions in programs of JAX, and JAX's products alone."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..clocks import Call
from ..contest import Against, Built, Contestant, Place, float64, passes_of
from ..problem import BACKWARD, BOTH, FORWARD, NDArray, Problem, given
from .in_arrays import Products

NAME = "sru_rt in JAX"
WITHOUT_SAVE = (FORWARD, BACKWARD, BOTH)  # what a program keeps is XLA's to decide


class OnJax(Contestant):
    """A function under `jax.jit`, with gradients of all that it is given."""

    process = "jax peers"
    needs: tuple[str, ...] = ("jax",)

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        found = passes_of(problem, recurrence=WITHOUT_SAVE, layer=WITHOUT_SAVE)
        if device == "gpu" and problem.name not in ("linear", "SRU", "minGRU", "minGRU positive"):
            return ()  # of which no others take part
        return found if self.does(problem) and problem.level != "train" and not problem.ragged else ()

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against(NAME, which, "x the time of")

    @abc.abstractmethod
    def does(self, problem: Problem) -> bool:
        """Whether it computes this."""

    @abc.abstractmethod
    def function(self, problem: Problem) -> Callable[..., Any]:
        """h of the arrays of the problem, in their order."""

    def build(self, problem: Problem, place: Place) -> Built:
        import jax

        arrays = given(problem)
        dh = jax.numpy.asarray(arrays.pop("dh"))
        leaves = [jax.numpy.asarray(array) for array in arrays.values()]
        made = calls(self.function(problem), leaves, dh, place)

        def results() -> dict[str, NDArray]:
            h, gradients = made[BOTH]()
            found = {"h": h, f"{FORWARD}: h": made[FORWARD]()} | _named("", arrays, gradients)
            found |= _named(f"{BACKWARD}: ", arrays, made[BACKWARD]())
            return {name: float64(array) for name, array in found.items()}

        return Built({which: [made[which]] for which in self.passes(problem, place.device)}, results)


def _named(prefix: str, names: Mapping[str, Any], gradients: Sequence[Any]) -> dict[str, Any]:
    return {f"{prefix}d{name}": gradient for name, gradient in zip(names, gradients)}


def calls(function: Callable[..., Any], leaves: Sequence[Any], dh: Any, place: Place) -> dict[str, Call]:
    """Programs of a function's passes; on the CPU their results are there when a call returns."""
    import jax

    def with_gradients(dh: Any, *leaves: Any) -> Any:
        h, pullback = jax.vjp(function, *leaves)
        return h, pullback(dh)

    kept: list[Any] = []

    def backward(pull: Any) -> Any:
        kept[:] = kept or [jax.jit(lambda *leaves: jax.vjp(function, *leaves)[1])(*leaves)]
        return pull(kept[0], dh)

    made: dict[str, Call] = {
        FORWARD: partial(jax.jit(function), *leaves),
        BACKWARD: partial(backward, jax.jit(lambda pullback, dh: pullback(dh))),
        BOTH: partial(jax.jit(with_gradients), dh, *leaves),
    }
    if place.device == "gpu":
        return made
    return {which: partial(ready, call) for which, call in made.items()}


def ready(call: Call) -> Any:
    return importlib.import_module("jax").block_until_ready(call())


class OursInJax(OnJax):
    """The library's functions; a layer by `sru_rt.bindings.jax`."""

    name = NAME
    process = "jax"
    recompute = False

    def does(self, problem: Problem) -> bool:
        return not problem.of_layers or problem.name in ("SRU", "minGRU positive")

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against(ProductsOfJax.name, which, "x") if problem.of_layers else None

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        return Products().work(problem, which) if problem.of_layers else (0.0, "")

    def function(self, problem: Problem) -> Callable[..., Any]:
        cell, names = problem.cell, [name for name in given(problem._replace(L=1, B=1)) if name != "dh"]
        function, options = cell.recurrence, cell.options
        if problem.of_layers:
            binding: Any = importlib.import_module("sru_rt.bindings.jax")
            function = binding.sru if problem.name == "SRU" else binding.mingru
            options = options | {"recompute": self.recompute}
        return lambda *leaves: function(**dict(zip(names, leaves)), **options)[0]


class Recomputing(OursInJax):
    """A layer that forms states again in the backward."""

    name = f"{NAME}, recompute=True"
    recompute = True

    def does(self, problem: Problem) -> bool:
        return problem.level == "layer" and problem.name == "SRU"


class ProductsOfJax(Products):
    """The same in JAX."""

    name = "products of JAX"
    process = "jax"
    needs = ("jax",)

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        if problem.level != "layer" or problem.name not in ("SRU", "minGRU positive"):
            return ()
        return super().passes(problem, device)

    def build(self, problem: Problem, place: Place) -> Built:
        import jax

        arrays = given(problem)
        x = jax.numpy.asarray(arrays["x"].reshape(-1, problem.width))
        w = jax.numpy.asarray(arrays["weight"].reshape(-1, problem.width))
        du = jax.numpy.ones((x.shape[0], w.shape[0]), x.dtype)
        made = calls(lambda x, w: x @ w.T, [x, w], du, place)
        return Built({which: [made[which]] for which in self.passes(problem, place.device)})
