"""Recurrences by JAX's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..problem import ALPHA, Problem
from .in_jax import OnJax


class Scan(OnJax):
    """`lax.scan`: a loop over steps."""

    name = "lax.scan"

    def does(self, problem: Problem) -> bool:
        return problem.D == 1 and not problem.of_layers and problem.name in ("linear", "minGRU", "SRU")

    def function(self, problem: Problem) -> Callable[..., Any]:
        loops: dict[str, Callable[..., Any]] = {"linear": _linear_loop, "minGRU": _mingru_loop, "SRU": _sru_loop}
        return loops[problem.name]


class AssociativeScan(OnJax):
    """`lax.associative_scan`: pairs that are combined."""

    name = "lax.associative_scan"

    def does(self, problem: Problem) -> bool:
        return problem.D == 1 and not problem.of_layers and problem.name in ("linear", "minGRU")

    def function(self, problem: Problem) -> Callable[..., Any]:
        return _linear_pairs if problem.name == "linear" else _mingru_pairs


def _loop(a: Any, b: Any) -> Any:
    import jax

    def step(h: Any, given: Any) -> Any:
        h = given[0] * h + given[1]
        return h, h

    return jax.lax.scan(step, jax.numpy.zeros_like(b[0]), (a, b))[1]


def _pairs(a: Any, b: Any) -> Any:
    import jax

    def combined(first: Any, second: Any) -> Any:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(combined, (a, b))[1]


def _linear_loop(u: Any) -> Any:
    return _loop(u[:, :, 0, 0], u[:, :, 0, 1])


def _linear_pairs(u: Any) -> Any:
    return _pairs(u[:, :, 0, 0], u[:, :, 0, 1])


def _coefficients(u: Any, bias: Any) -> tuple[Any, Any]:
    """Of minGRU."""
    import jax

    z, n = jax.nn.sigmoid(u[:, :, 0, 0] + bias[0, 0]), u[:, :, 0, 1] + bias[0, 1]
    return 1 - z, z * n


def _mingru_loop(u: Any, bias: Any) -> Any:
    return _loop(*_coefficients(u, bias))


def _mingru_pairs(u: Any, bias: Any) -> Any:
    return _pairs(*_coefficients(u, bias))


def _sru_loop(u: Any, x: Any, bias: Any, v: Any) -> Any:
    import jax

    def step(c: Any, given: Any) -> Any:
        (n, f, r), x = given
        f = jax.nn.sigmoid(f + v[0, 0] * c + bias[0, 0])
        r = jax.nn.sigmoid(r + v[0, 1] * c + bias[0, 1])
        c = f * c + (1 - f) * n
        return c, r * c + (1 - r) * ALPHA * x

    gates = jax.numpy.moveaxis(u[:, :, 0], 2, 1)
    return jax.lax.scan(step, jax.numpy.zeros_like(x[0]), (gates, x))[1]
