"""Speed of recurrences and layers in programs of JAX on the CPU, beside loops of JAX's own operations.

One run, one table, as `cpu.py` measures and prints; float32, d_in = d, one direction; all under `jax.jit`. Peers are
`lax.scan` over SRU's steps, and `lax.scan` and `lax.associative_scan` over those of minGRU. Results are compared with
float64 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cpu
import jax
import jax.numpy as jnp
import numpy as np
from cpu import ALPHA, LARGE, PASSES, ROWS, Layer, Row, Shape
from jax import lax
from sru_rt.bindings.jax import sru

import oracle
import sru_rt

TARGET = {"forward + backward": {LARGE: 3}}  # against every loop


def sru_scan(u: Any, x: Any, bias: Any, v: Any) -> Any:
    """SRU's recurrence, as a loop."""

    def step(c: Any, given: Any) -> Any:
        (n, f, r), x = given
        f, r = jax.nn.sigmoid(f + v[0] * c + bias[0]), jax.nn.sigmoid(r + v[1] * c + bias[1])
        c = f * c + (1 - f) * n
        return c, r * c + (1 - r) * ALPHA * x

    gates = jnp.moveaxis(u[:, :, 0], 2, 1)
    return lax.scan(step, jnp.zeros_like(x[0]), (gates, x))[1]


def mingru_scan(u: Any) -> Any:
    """minGRU's recurrence, as a loop."""

    def step(h: Any, given: Any) -> Any:
        z, n = jax.nn.sigmoid(given[:, 0]), given[:, 1]
        h = (1 - z) * h + z * n
        return h, h

    u = u[:, :, 0]
    return lax.scan(step, jnp.zeros_like(u[0, :, 0]), u)[1]


def mingru_associative(u: Any) -> Any:
    """minGRU's recurrence, as pairs that are combined."""
    z, n = jax.nn.sigmoid(u[:, :, 0, 0]), u[:, :, 0, 1]

    def combined(first: Any, second: Any) -> Any:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return lax.associative_scan(combined, (1 - z, z * n))[1]


def calls(function: Callable[..., Any], given: tuple[Any, ...], dh: Any) -> dict[str, Callable[[], Any]]:
    """Forward, and forward + backward to all that is given, whose results are ready."""

    def with_gradients(*given: Any) -> Any:
        h, pullback = jax.vjp(function, *given)
        return h, pullback(dh)

    both = jax.jit(function), jax.jit(with_gradients)
    return {which: functools.partial(ready, one, given) for which, one in zip(PASSES, both)}


def ready(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(function(*given))


def rows_of(
    label: str, made: dict[str, Callable[[], Any]], expected: dict[str, Any], threads: int, against: str, target: bool
) -> list[Row]:
    """A row for each pass, if results and gradients are those of float64."""
    h, gradients = made["forward + backward"]()
    fault = cpu.compare(dict(zip(expected, map(np.asarray, (h, *gradients)))), expected)
    fault = fault or cpu.compare({"h": np.asarray(made["forward"]())}, expected)
    shape = h.shape
    return [
        Row(
            f"{label}, {which}",
            threads,
            call,
            against=f"{against}, {which}" if against else "",
            sense="x the time of" if against else "",
            target=TARGET.get(which, {}).get(shape) if target else None,
            fault=fault,
        )
        for which, call in made.items()
    ]


def recurrences(p: Layer, group: str) -> list[Row]:
    u = oracle.project(p.x, p.weight).astype(np.float32)
    two = np.ascontiguousarray(u[:, :, :, :2])
    of_sru = oracle.sru_recurrence_backward(u, p.x, p.bias, p.v, dh=p.dh, alpha=ALPHA)
    expected_sru = {"h": p.expected["h"], **{name: of_sru[name] for name in ("u", "x", "bias", "v")}}
    of_mingru = oracle.mingru_recurrence_backward(two, dh=p.dh)
    expected_mingru = {"h": oracle.mingru_recurrence(two)[0], "u": of_mingru["u"]}
    given = tuple(map(jnp.asarray, (u, p.x, p.bias, p.v)))
    dh = jnp.asarray(p.dh)
    rows = []

    def add(label: str, function: Callable[..., Any], given: Any, expected: Any, against: str = "") -> None:
        rows.extend(rows_of(label, calls(function, given, dh), expected, p.threads, against, bool(against)))

    if group == "ours":
        add("SRU", lambda *given: sru_rt.sru_recurrence(*given, alpha=ALPHA)[0], given, expected_sru)
        add("minGRU", lambda u: sru_rt.mingru_recurrence(u)[0], (jnp.asarray(two),), expected_mingru)
    else:
        as_loop = (given[0], given[1], given[2][0], given[3][0])
        flat = expected_sru | {name: expected_sru[name][0] for name in ("bias", "v")}
        add("SRU by lax.scan", sru_scan, as_loop, flat, "SRU")
        add("minGRU by lax.scan", mingru_scan, (jnp.asarray(two),), expected_mingru, "minGRU")
        add("minGRU by lax.associative_scan", mingru_associative, (jnp.asarray(two),), expected_mingru, "minGRU")
    return rows


def layers(p: Layer) -> list[Row]:
    """The layer of SRU under two policies of memory, and its products alone."""
    d = p.shape[2]
    x, weight, bias, v, dh = map(jnp.asarray, (p.x, p.weight, p.bias, p.v, p.dh))
    expected = {name: p.expected[name] for name in ("h", "x", "weight", "bias", "v")}
    matrix, du = weight.reshape(3 * d, d), jnp.ones((x.shape[0] * x.shape[1], 3 * d), x.dtype)

    def product(x: Any, w: Any) -> Any:
        return x.reshape(-1, d) @ w.T

    products = calls(product, (x, matrix), du)
    rows = [Row(f"products, {which}", p.threads, call) for which, call in products.items()]
    for recompute in (False, True):
        layer = functools.partial(sru, alpha=ALPHA, recompute=recompute)
        made = calls(lambda *given, layer=layer: layer(*given)[0], (x, weight, bias, v), dh)
        rows += rows_of(f"layer of SRU, recompute={recompute}", made, expected, p.threads, "", False)
    return [row if row.label.startswith("products") else as_product(row) for row in rows]


def as_product(row: Row) -> Row:
    """A row held against the products of its pass."""
    which = PASSES["backward" in row.label]
    return row._replace(against=f"products, {which}", sense="x")


def prepare(shape: Shape, threads: int, group: str) -> list[Row]:
    """In a measuring process: sets ROWS, and returns them without their calls."""
    p = Layer(shape, threads)
    ROWS.extend(recurrences(p, group) + (layers(p) if group == "ours" else []))
    return [row._replace(call=None) for row in ROWS]


def main() -> int:
    args = cpu.options(__doc__, "jax-cpu").parse_args()
    threads = "--xla_cpu_multi_thread_eigen=" + ("true" if args.threads > 1 else "false")
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": threads, "SRU_RT_NUM_THREADS": str(args.threads)}
    return cpu.finish(args, cpu.run(args, prepare, **settings))


if __name__ == "__main__":
    raise SystemExit(main())
