"""The plainest kernel, with our own steps: what the arrangement of the work brings, and nothing about others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ... import abi
from ...dtypes import state_dtype, to_numpy
from ...emit import emit, struct_name
from ...library import Library
from ...source import CPP_TYPES
from ..contest import APART, Against, Built, Contestant, Place
from ..problem import BACKWARD, FORWARD, SAVE, Problem
from .copies import function
from .in_arrays import NAME, library_of, sets_of

THREADS = 128  # of a block


class Naive(Contestant):
    """naive_sweep.h: one thread for each channel, no reading ahead, sizes at run time."""

    name = "naive kernel"
    process = "arrays"
    only = "gpu"

    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        return APART if device == "gpu" and not problem.of_layers and not problem.ragged else ()

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        return Against(NAME, which, "x the time of")

    def build(self, problem: Problem, place: Place) -> Built:
        library = library_of(place.device)
        sets = [_Arrays(problem, arrays, library) for arrays in sets_of(problem, place, library)]
        calls = {which: [partial(one.run, which) for one in sets] for which in APART}
        return Built(calls, sets[0].results)


class _Arrays:
    """One set of arrays: what is given, and what the kernels write, by name and by ``d`` + name."""

    def __init__(self, problem: Problem, given: dict[str, Any], library: Library) -> None:
        self.problem, self.library, self.core = problem, library, problem.cell.core
        L, B, D, d = problem.L, problem.B, problem.D, problem.d
        acc, io = to_numpy(state_dtype(problem.dtype)), to_numpy(problem.dtype)
        inputs = ("u", "x")
        self.arrays = {n: a if n in (*inputs, "dh") else a.astype(acc) for n, a in given.items()}
        made: dict[str, tuple[tuple[int, ...], Any]] = {"h": ((L, B, D * d), io)}
        made |= {f"d{name}": (given[name].shape, io) for name in inputs if name in given}
        for i in range(len(self.core.state)):
            made |= {f"last{i}": ((D, B, d), acc), f"saved{i}": ((L, B, D, d), acc), f"dc{i}": ((D, B, d), acc)}
        made["partial"] = ((B, D, max(1, len(self.core.params)), d), acc)
        for name, (shape, dtype) in made.items():
            self.arrays[name] = library.empty(shape, dtype)

    def run(self, which: str) -> None:
        """Puts one pass on the current stream."""
        packed = abi.pack(self.core, self._arguments(which))
        kernel = function(text(self.problem), "backward" if which == BACKWARD else "forward")
        values = (np.frombuffer(packed, np.dtype((np.void, len(packed)))),)
        stream = importlib.import_module("cupy").cuda.get_current_stream()
        kernel((-(-self.problem.channels // THREADS), 1, 1), (THREADS, 1, 1), values, stream=stream)

    def results(self) -> dict[str, Any]:
        """All but the gradients of parameters, which the kernel leaves as sums for each sequence."""
        self.run(FORWARD)
        plain: Any = self.library.to_host(self.arrays["h"])
        self.run(SAVE)
        self.run(BACKWARD)
        names = {"h": "h", "last": "last0", "du": "du"} | ({"dx": "dx"} if "dx" in self.arrays else {})
        found: dict[str, Any] = {name: self.library.to_host(self.arrays[own]) for name, own in names.items()}
        return found if np.array_equal(plain, found["h"]) else found | {"h": np.full_like(plain, np.nan)}

    def _pointer(self, name: str) -> int:
        return self.library.pointer(self.arrays.get(name))

    def _slots(self, kind: str, prefix: str = "") -> list[abi.Slot]:
        d, found = self.problem.d, []
        for declared in self.core.arrays:
            if declared.kind == kind:
                n, start = len(declared.members), self._pointer(prefix + declared.name)
                item = self.arrays[prefix + declared.name].itemsize if start else 0
                found += [abi.Slot(start + i * d * item, n * d if start else 0) for i in range(n)]
        return found

    def _arguments(self, which: str) -> abi.Forward | abi.Backward:
        p, states = self.problem, range(len(self.core.state))
        slots: Callable[..., list[abi.Slot]] = self._slots
        given = abi.Given(
            L=p.L,
            B=p.B,
            D=p.D,
            d=p.d,
            every=0 if which == FORWARD else 1,
            lengths=0,
            mask=0,
            reset=0,
            gates=slots("gates"),
            inputs=slots("inputs"),
            per_sequence=slots("per_sequence"),
            params=slots("params"),
            c0=[0 for _ in states],
            constants=tuple(p.cell.options[name] for name in self.core.constants),
        )
        saved = [self._pointer(f"saved{i}") for i in states]
        if which != BACKWARD:
            last = [self._pointer(f"last{i}") for i in states]
            return abi.Forward(given, h=self._pointer("h"), c_last=last, saved=saved)
        return abi.Backward(
            given,
            dh=self._pointer("dh"),
            dc_last=[0 for _ in states],
            saved=saved,
            states=[0 for _ in states],
            partial=abi.Slot(self._pointer("partial"), p.d),
            dgates=slots("gates", "d"),
            dinputs=slots("inputs", "d"),
            dper_sequence=slots("per_sequence", "d"),
            dparams=slots("params", "d"),
            dc0=[self._pointer(f"dc{i}") for i in states],
        )


def text(problem: Problem) -> str:
    """The compile unit of naive_sweep.h for a problem."""
    core = problem.cell.core
    types = {"naive_cell": struct_name(core), "io": CPP_TYPES[problem.dtype]}
    types["saved_io"] = CPP_TYPES[state_dtype(problem.dtype)]
    sizes = {"Forward": abi.layout(core, True).size, "Backward": abi.layout(core, False).size}
    lines = ['#include "arguments.h"', emit(core), *(f"typedef {there} {here};" for here, there in types.items())]
    lines.append(Path(__file__).parent.with_name("naive_sweep.h").read_text())
    for kind, n in sizes.items():
        lines.append(f'static_assert(sizeof({kind}Arguments<naive_cell>) == {n}, "not as abi.py");')
    return "\n".join([*lines, ""])
