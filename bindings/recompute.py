"""What a backward computes again, where a framework records gradients and owns memory: in the place of `save`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..options import Options

_EVERY = 32  # steps between kept states where the caller leaves it to us: as in the core
_LEFT_OUT = ("save", "saved_dtype", "out")  # of the core's arguments


@dataclass(frozen=True)
class Recompute:
    """What the functions of a binding say as `save`: False nothing is computed again, K >= 1 all states but every
    K-th, True these with K = 32, "x" these and U.

    `axis` is that of a mesh of JAX along which time is divided.
    """

    value: bool | int | str
    axis: Any = None


def every(recompute: bool | int | str) -> int:
    """Steps between the states that are kept."""
    return _EVERY if recompute is True or recompute == "x" else int(recompute) or 1


def check_recompute(function: str, value: Any) -> bool | int | str:
    """`value`, if it is a policy of what the backward computes again."""
    if isinstance(value, bool) or (isinstance(value, str) and value == "x"):
        return value
    if hasattr(type(value), "__index__") and int(value) >= 1:  # a compiler may leave open what a number is
        return int(value)
    raise ArgumentError(
        f"{function}: recompute must be False, True, a number K >= 1 of steps between kept states, or 'x' "
        f"(got {value!r})"
    )


def policy(function: str, options: Options, arrays: str, instead: str) -> Recompute:
    """What the options of a call of the core say; refuses what means nothing for `arrays` of a framework."""
    save = options.save
    if not isinstance(save, Recompute) and save is not False and save is not None:
        raise ArgumentError(f"{function}: save={save!r} is not for {arrays}, {instead}")
    for name in ("saved_dtype", "out"):
        if getattr(options, name) is not None:
            raise ArgumentError(f"{function}: {name}= is not available for {arrays}; leave it out")
    if not isinstance(save, Recompute):
        return Recompute(False)
    return Recompute(check_recompute(function, save.value), save.axis)


def refuse_left_out(name: str, keywords: Any) -> None:
    """Raises as Python does where a function of a binding is given what only the core's takes."""
    for one in _LEFT_OUT:
        if one in keywords:
            raise TypeError(f"{name}() got an unexpected keyword argument {one!r}")


def with_recompute(
    core: Callable[..., Any], name: str, on: str, result: str, settled: Callable[[Any], Any] = lambda value: value
) -> Callable[..., Any]:
    """A function of the core with `recompute=` in place of what a framework says otherwise.

    Args:
        on, result: what its description says of arrays, and of the dtype of h.
        settled: what becomes of an argument given by name.
    """
    parameters = [p for p in inspect.signature(core).parameters.values() if p.name not in _LEFT_OUT]
    added = inspect.Parameter("recompute", inspect.Parameter.KEYWORD_ONLY, default=False)

    def function(*args: Any, recompute: bool | int | str = False, **keywords: Any) -> Any:
        refuse_left_out(name, keywords)
        options = {n: settled(v) for n, v in keywords.items()}
        if recompute is not False:  # as is the core's own way, by which it knows calls again
            options["save"] = Recompute(settled(recompute))
        return core(*args, **options)

    made: Any = function
    made.__name__ = made.__qualname__ = name
    made.__wrapped__ = core
    made.__signature__ = inspect.Signature([*parameters, added])
    made.__doc__ = f"""`sru_rt.{core.__name__}` on {on}.

    Args:
        recompute: what the backward computes again to save memory: False nothing, K >= 1 all states but every K-th,
            True these with K = 32, "x" these and U.

    All else, shapes, dtypes and errors as `sru_rt.{core.__name__}`, without {", ".join(_LEFT_OUT)}.

    Returns:
        h (L, B, D*d) in {result}, and the last state (D, B, d) in float32 (float64 for float64).
    """
    return function
