"""Calls that are made ready once and then run again and again, on the arrays that they were given.

Memory for results and for all in between is taken once; what is left of a call is its products and kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import abi, launch
from .errors import ArgumentError
from .library import Library, NDArray
from .projection import Projection
from .variant import Variant


@dataclass(frozen=True, eq=False)
class Forward:
    """What a forward does once its arguments are checked.

    Args:
        conversions: pairs of an array that a kernel or a product reads, and the given one that it was made from.
        projection: None where U is given, or the kernel forms it.
        u: (L*B, D*k*d), what the projection writes.
        held: arrays that the addresses among the arguments belong to.
    """

    library: Library
    conversions: Sequence[tuple[NDArray, NDArray]]
    projection: Projection | None
    u: NDArray | None
    variant: Variant
    arguments: abi.Forward
    held: Sequence[Any]

    def bound(self) -> Callable[[], None]:
        """All of it as a function, which can be called on any stream."""
        library = self.library
        recurrence = launch.bound(self.variant, self.arguments, library.device)

        def run() -> None:
            with library.current():
                for array, given in self.conversions:
                    array.reshape(given.shape)[...] = given
                if self.projection:
                    self.projection.u(lambda *_: self.u)
                recurrence(library.stream())

        return run


class _Recorder(threading.local):
    """Where a thread notes down what its call does, if it does."""

    found: list[Forward] | None = None


_recorder = _Recorder()


def is_recording() -> bool:
    """Whether this thread's call is one that is made ready."""
    return _recorder.found is not None


def record(forward: Callable[[], Forward]) -> None:
    """Notes down what is done, if this thread's call is made ready."""
    if _recorder.found is not None:
        _recorder.found.append(forward())


@contextmanager
def _recording() -> Iterator[list[Forward]]:
    before, _recorder.found = _recorder.found, []
    try:
        yield _recorder.found
    finally:
        _recorder.found = before


def conversions(
    library: Library, pairs: Iterable[tuple[NDArray | None, NDArray | None]]
) -> list[tuple[NDArray, NDArray]]:
    """Of pairs of what is read and what was given, those where the former is a copy."""
    return [
        (array, given)
        for array, given in pairs
        if array is not None and given is not None and library.pointer(array) != library.pointer(given)
    ]


class PreparedCall:
    """A call that `prepare` has made ready.

    Attributes:
        results: what the function returned. `run` writes to the same arrays.
    """

    def __init__(self, name: str, results: Any, forward: Forward) -> None:
        self._name, self.results, self._forward = name, results, forward
        self._run = forward.bound()

    def run(self) -> Any:
        """Does the call again with what its arrays hold now, on the current stream, and returns the same results.

        Neither asks for memory (but for a window of several tokens, whose rows are laid side by side anew) nor waits
        for a device; in a stream capture it becomes part of the graph.
        """
        self._run()
        return self.results

    def __repr__(self) -> str:
        return f"<prepared call of {self._name} on {self._forward.library.device}>"


def prepare(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> PreparedCall:
    """Calls a function, and makes the call ready to be run again with what its arrays then hold.

    The arrays are looked at anew in each run, but not `lengths`, which are those of now. Results are written to the
    same memory each time: that of `out`, where it is given. What depends on settings is settled now.

        call = sru_rt.prepare(sru_rt.sru_step, x, **params, c=c, out=(h, c))
        for token in tokens:
            x[...] = embedded(token)
            call.run()                      # h and c are those after the token

    Args:
        function: a forward, recurrence or step function, such as `sru_forward`, or such a method of a cell of one's
            own.
        args, kwargs: its arguments, with arrays of NumPy or CuPy.

    Returns:
        the call, with `results` and `run()`. It holds the arrays.

    Raises:
        ArgumentError: it is another function, or arrays are of another library.
        ShapeError, DtypeError, LibraryError: from the function.
    """
    name = getattr(function, "__name__", repr(function))
    if not callable(function):
        raise ArgumentError(f"prepare: function must be a function of sru_rt (got {function!r}); pass sru_rt.sru_step")
    with _recording() as found:
        results = function(*args, **kwargs)
    if len(found) != 1 or not isinstance(results[0], found[0].library.xp.ndarray):
        raise ArgumentError(
            f"prepare: function must be one forward, recurrence or step of sru_rt on arrays of NumPy or CuPy (got "
            f"{name}); call others as they are"
        )
    return PreparedCall(name, results, found[0])
