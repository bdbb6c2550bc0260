"""What every contestant is, and what it brings to a measuring process."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .clocks import Call
from .problem import BACKWARD, BACKWARD_32, BOTH, FORWARD, SAVE, SAVE_32, STEP, NDArray, Problem


class LeftOut(Exception):
    """A contestant cannot run here; says why."""


class Place(NamedTuple):
    """Where a contestant computes."""

    device: str  # cpu or gpu
    threads: int
    sets: Callable[[int], int]  # how many sets of arrays of so many bytes are wanted


class Built(NamedTuple):
    """A contestant with the arrays of a problem."""

    calls: Mapping[str, Sequence[Call]]  # by pass, one for each set of arrays
    results: Callable[[], dict[str, NDArray]] | None = None  # on the host; None where there is nothing to compare
    expected: Mapping[str, NDArray] | None = None  # in float64, where they are not those of the problem


class Against(NamedTuple):
    """The row that one is held against: of this contestant, in the same group, of the same problem or another one."""

    who: str
    which: str
    sense: str  # "of": our rate over its; "x": our time over its; "x the time of": the same, and more is better for it
    problem: Problem | None = None


class Contestant(abc.ABC):
    """Who computes a problem. Subclasses say what they need and how; listing their rows imports nothing."""

    name = ""
    process = ""  # those of one name share a process, with the library of its first word: arrays, torch or jax
    needs: tuple[str, ...] = ()  # modules
    only = ""  # gpu, where there is no other
    slack = 1.0  # how much farther than our own results its may be from float64
    stacks = False  # several layers
    divides_work = False  # among the threads of a place, of itself
    command = ""  # what installs it; its own name by default

    @abc.abstractmethod
    def passes(self, problem: Problem, device: str) -> tuple[str, ...]:
        """What it can do for a problem; nothing if it computes something else."""

    def against(self, problem: Problem, which: str, device: str) -> Against | None:
        """What a row is held against."""
        return None

    def work(self, problem: Problem, which: str) -> tuple[float, str]:
        """The work of a row, and its unit; none by default."""
        return 0.0, ""

    def label(self, problem: Problem, which: str) -> str:
        """Of a row."""
        what = {"scan": "scan", "cell": problem.name, "layer": f"layer of {problem.name}"}
        return f"{what.get(problem.level, f'training of {problem.name}')} by {self.name}, {which}"

    @abc.abstractmethod
    def build(self, problem: Problem, place: Place) -> Built:
        """Makes the arrays, in a measuring process. What it raises is the reason why it is left out."""

    def missing(self, device: str) -> str:
        """Why it cannot run here, as far as that can be told without importing it; empty if it can."""
        if self.only and self.only != device:
            return "left out: needs a GPU"
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"left out: {module} is not installed (pip install {self.command or module})"
        return ""


def passes_of(problem: Problem, *, recurrence: tuple[str, ...], layer: tuple[str, ...]) -> tuple[str, ...]:
    """The passes of a library with gradients: of scans and cells, of layers; one token has a forward alone."""
    if problem.level == "train":
        return (STEP,)
    if problem.L == 1:
        return (FORWARD,)
    return layer if problem.of_layers else recurrence


APART = (FORWARD, SAVE, BACKWARD)
APART_AND_BOTH = (*APART, BOTH)
RECOMPUTED = (SAVE_32, BACKWARD_32)


def float64(array: Any) -> NDArray:
    """An array of NumPy in a dtype that all comparisons know."""
    return np.asarray(array).astype(np.float64)
