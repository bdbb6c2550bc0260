"""Our own functions on arrays of NumPy or, on a GPU, CuPy; and the matrix products of a layer alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import sru_rt

from ... import on_cupy, shared_memory
from ...calls import Call
from ...dtypes import state_dtype, to_numpy
from ...library import Library
from ...machine import Device
from ...on_numpy import NUMPY
from ..clocks import Call as Timed
from ..contest import APART, APART_AND_BOTH, RECOMPUTED, Against, Built, Contestant, Place, passes_of
from ..problem import BACKWARD, BACKWARD_32, BOTH, FORWARD, RATE, SAVE, SAVE_32, STEP, Problem, given, moved

NAME = "sru_rt"
SMALL_ELEMENTS = 1 << 18  # of h, beside which what a call costs can be seen


def plan_of(problem: Problem, which: str, gpu: Device) -> str:
    """How a pass runs on a GPU, as far as the planner decides it from sizes."""
    every = {SAVE: 1, BACKWARD: 1, SAVE_32: 32, BACKWARD_32: 32}.get(which, 0)
    call = Call(
        problem.cell.core, problem.dtype, problem.D, problem.d, every, saved_dtype=problem.saved_dtype, L=problem.L
    )
    made = call.plans("backward" if which in (BACKWARD, BACKWARD_32) else "forward", problem.B, gpu)[0]
    ahead = shared_memory.ahead(made.forward, made.laps) if made.laps else made.depth
    text = f"{made.width} x {made.threads} threads, {ahead} ahead"
    text += ", through shared memory" if made.laps or made.staged else ""
    text += ", pairs of warps" if made.paired else ""
    return text + ", in parallel over time" if made.parallel else text


def library_of(device: str) -> Library:
    """NumPy, or CuPy's current device."""
    if device == "cpu":
        return NUMPY
    cupy: Any = importlib.import_module("cupy")
    return on_cupy.library(cupy, cupy.cuda.get_device_id())


def library_arrays(arrays: dict[str, Any], library: Library) -> dict[str, Any]:
    """Arrays of NumPy as those of a library."""
    return {name: library.from_host(array) for name, array in arrays.items()}


def sets_of(problem: Problem, place: Place, library: Library) -> list[dict[str, Any]]:
    """As many copies of the arrays of a problem as the place wants."""
    on_host = given(problem)
    first = library_arrays(on_host, library)
    n = place.sets(sum(array.nbytes for array in on_host.values()))
    return [first, *({name: array.copy() for name, array in first.items()} for _ in range(n - 1))]


def fresh(call: Timed, library: Library) -> Timed:
    """On a GPU, gives back what the last call gave, and keeps what this one gives: each set of arrays has results of
    its own, which are as cold as the rest."""
    if library is NUMPY:
        return call
    kept: list[Any] = [None]

    def run() -> Any:
        kept[0] = None
        kept[0] = call()
        return kept[0]

    return run


class Ours(Contestant):
    """The functions of the library, with `out=` where they have it."""

    name = NAME
    process = "arrays"
    stacks = True

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        more = RECOMPUTED if device == "gpu" and problem.L > 32 else ()
        return passes_of(problem, recurrence=APART + more, layer=APART_AND_BOTH)

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        if problem.ragged:
            return Against(NAME, which, "x faster than", problem._replace(ragged=False))
        if problem.layers > 1:
            return None
        if problem.of_layers:
            product = {FORWARD: FORWARD, SAVE: FORWARD, BACKWARD: BACKWARD}.get(which, BOTH)
            return Against("products", product, "x")
        if device == "gpu":
            return Against("copy", "1 GiB", "of")
        return Against("copy", f"{moved(problem, which) / problem.elements:g} B/element", "of")

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        if problem.ragged:  # padding is not read
            return 0.0, ""
        if problem.of_layers:
            return 1e-9 * problem.flops * {FORWARD: 1, SAVE: 1, BACKWARD: 2}.get(which, 3), "GF"
        return 1e-9 * moved(problem, which), "GB"

    def build(self, problem: Problem, place: Place) -> Built:
        library = library_of(place.device)
        sets = sets_of(problem, place, library)
        build = {"layer": _layer, "train": _train}.get(problem.level, _recurrence)
        made = [build(problem, arrays, library, self.passes(problem, place.device)) for arrays in sets]
        initial = {name: array.copy() for name, array in sets[0].items()} if problem.level == "train" else {}

        def results() -> dict[str, Any]:
            found: dict[str, Any] = {}
            if problem.level == "train":
                for name, array in initial.items():
                    sets[0][name][...] = array
            for which, calls in made[0].items():
                for name, array in _named(which, calls()).items():
                    found[f"{which}: {name}"] = np.array(library.to_host(array))  # the next pass may write there
            return found

        return Built({which: [calls[which] for calls in made] for which in made[0]}, results)


def _named(which: str, found: Any) -> dict[str, Any]:
    """What a pass gave."""
    if which == STEP:
        return dict(found)
    arrays = {} if which in (BACKWARD, BACKWARD_32) else {"h": found[0], "last": found[1]}
    gradients = found[2] if which == BOTH else found if not arrays else ()
    there = [name for name in gradients if getattr(gradients, name) is not None]
    return arrays | {f"d{name}": getattr(gradients, name) for name in there}


_Passes = tuple[str, ...]


def _recurrence(problem: Problem, arrays: dict[str, Any], library: Library, passes: _Passes) -> dict[str, Timed]:
    arrays = dict(arrays)
    dh, cell = arrays.pop("dh"), problem.cell
    last = library.empty((problem.D, problem.B, problem.d), to_numpy(state_dtype(problem.dtype)))
    forward = partial(cell.recurrence, **arrays, **cell.options, out=(library.empty(dh.shape, dh.dtype), last))
    calls: dict[str, Timed] = {FORWARD: forward}
    for save, backward, every in ((SAVE, BACKWARD, True), (SAVE_32, BACKWARD_32, 32)):
        if save in passes:
            keeping = partial(forward, save=every, saved_dtype=problem.saved_dtype)
            calls[save] = fresh(keeping, library)
            saved = keeping()[2]
            calls[backward] = fresh(partial(cell.backward, saved, dh), library)
    return calls


def _layer(problem: Problem, arrays: dict[str, Any], library: Library, passes: _Passes) -> dict[str, Timed]:
    arrays = dict(arrays)
    dh, cell = arrays.pop("dh"), problem.cell
    if problem.L == 1:
        token = arrays.pop("x")[0]
        above = [library_arrays(given(problem, upper), library) for upper in range(1, problem.layers)]
        state = library.xp.zeros((problem.D, problem.B, problem.d), to_numpy(state_dtype(problem.dtype)))
        name = next(array.name for array in cell.core.arrays if array.kind == "state").removesuffix("0")
        layers = [arrays, *({n: a for n, a in one.items() if n not in ("x", "dh")} for one in above)]

        def step() -> Any:
            h = token
            for parameters in layers:
                h, last = cell.step(h, **parameters, **{name: state}, **cell.options)
            return h.reshape((1, *h.shape)), last

        return {FORWARD: fresh(step, library)}
    forward = partial(cell.layer, **arrays, **cell.options)

    def both() -> Any:
        h, last, saved = forward(save=True)
        return h, last, cell.backward(saved, dh)

    saved = forward(save=True)[2]
    calls = {FORWARD: forward, SAVE: partial(forward, save=True), BACKWARD: partial(cell.backward, saved, dh)}
    return {which: fresh(call, library) for which, call in (calls | {BOTH: both}).items()}


def _train(problem: Problem, arrays: dict[str, Any], library: Library, passes: _Passes) -> dict[str, Timed]:
    arrays = dict(arrays)
    target, cell = arrays.pop("dh"), problem.cell
    names = ("weight", *cell.params)

    def step() -> dict[str, Any]:
        h, _, saved = cell.layer(**arrays, **cell.options, save=True)
        gradients = cell.backward(saved, (h - target) * (1 / (problem.L * problem.B)), need=names)
        for name in names:
            arrays[name] += getattr(gradients, name) * -RATE
        return {name: arrays[name] for name in names}

    return {STEP: step}


class Prepared(Ours):
    """Small forwards that `sru_rt.prepare` has made ready."""

    name = f"{NAME}, prepared"
    stacks = False

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        small = problem.elements <= SMALL_ELEMENTS and not problem.ragged
        return (FORWARD,) if small and problem.level in ("cell", "layer") else ()

    def build(self, problem: Problem, place: Place) -> Built:
        library, cell = library_of(place.device), problem.cell
        function = cell.layer if problem.of_layers else cell.recurrence
        calls = []
        for arrays in sets_of(problem, place, library):
            del arrays["dh"]
            calls.append(sru_rt.prepare(function, **arrays, **cell.options))

        def results() -> dict[str, Any]:
            calls[0].run()
            return {name: np.array(library.to_host(a)) for name, a in zip(("h", "last"), calls[0].results)}

        return Built({FORWARD: [call.run for call in calls]}, results)


class Products(Contestant):
    """U = X W', and with the backward dX = dU W and dW = dU' X; on NumPy into arrays that exist."""

    name = "products"
    process = "arrays"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        if not problem.of_layers:
            return ()
        if problem.level == "train":
            return (BOTH,)
        return (FORWARD,) if problem.L == 1 else (FORWARD, BACKWARD, BOTH)

    def label(self, problem: Problem, which: str) -> str:
        return f"{self.name} for {problem.gates} gates, {which}"

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        return 1e-9 * problem.flops * {FORWARD: 1, BACKWARD: 2}.get(which, 3), "GF"

    def build(self, problem: Problem, place: Place) -> Built:
        library = library_of(place.device)
        sets = [self._calls(problem, arrays, library) for arrays in sets_of(problem, place, library)]
        return Built({which: [calls[which] for calls in sets] for which in self.passes(problem, place.device)})

    def _calls(self, problem: Problem, arrays: dict[str, Any], library: Library) -> dict[str, Timed]:
        x = arrays["x"].reshape(-1, problem.width)
        w = arrays["weight"].reshape(-1, problem.width)
        u = library.times_transposed(x, w)
        forward: Callable[[], Any] = partial(library.times_transposed, x, w, out=u)
        ways: list[Timed] = [partial(library.times, u, w), partial(library.transposed_times, u, x)]
        if library is NUMPY and x.itemsize > 2:
            dx, dw = np.empty_like(x), np.empty_like(w)
            ways = [partial(np.matmul, u, w, out=dx), partial(np.matmul, u.T, x, out=dw)]

        def backward() -> None:
            for way in ways:
                way()

        def both() -> None:
            forward()
            backward()

        return {FORWARD: forward, BACKWARD: backward, BOTH: both}
