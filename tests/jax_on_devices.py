"""A program of test_jax_sharding.py: python jax_on_devices.py jit|shard_map DIRECTIONS, with a number of devices."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sru_rt.bindings import jax as binding

import sru_rt

what, D = sys.argv[1], int(sys.argv[2])
n = len(jax.devices())
L, B, d = 6, 8, 8
EVERY = tuple(range(5))
BATCH = (P(None, "b"), P(None, "b"), P(), P(), P(None, "b"))
CHANNELS = (P(None, None, None, None, "b"), P(None, None, "b"), *(P(None, None, "b"),) * 3)

rng = np.random.default_rng(0)


def draw(*shape: int) -> Any:
    return jnp.asarray(rng.normal(size=shape), "float32")


OF = (draw(L, B, D, 3, d), draw(L, B, D * d), draw(D, 2, d), draw(D, 2, d), draw(D, B, d))
FLAGS = {"lengths": jnp.asarray([6, 3, 0, 5, 1, 6, 2, 4]), "mask": jnp.asarray(rng.random((L, B)) < 0.2)}


def function(*of: Any, flags: Any) -> Any:
    return sru_rt.sru_recurrence(*of, alpha=1.2, **flags)


def loss(*of: Any, flags: Any) -> Any:
    return number(function(*of, flags=flags))


def number(results: Any) -> Any:
    h, c = results
    return (h * jnp.cos(h)).sum() + (c**2).sum()


def gradient(*of: Any, flags: Any) -> Any:
    return jax.grad(lambda *of: loss(*of, flags=flags), EVERY)(*of)


def close(got: Any, wanted: Any, bound: float = 2e-5) -> None:
    got, wanted = jax.device_get((got, wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


def exchanged(compiled: Any) -> dict[str, int]:
    """How often devices send to each other."""
    text = compiled.as_text()
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}


def used(spec: Any) -> list[Any]:
    return [axis for axis in spec if axis is not None]


def placed(mesh: Mesh, arrays: Any, specs: Any) -> list[Any]:
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]


# ----------------------------------------------------------------------------------------------------------------------
# jit: what is divided stays so


def by_jit() -> None:
    line = Mesh(np.array(jax.devices()), ("b",))
    square = Mesh(np.array(jax.devices()).reshape(-1, 2 if n % 2 == 0 else 1), ("b", "d"))
    both = (
        P(None, "b", None, None, "d"),
        P(None, "b", "d"),
        P(None, None, "d"),
        P(None, None, "d"),
        P(None, "b", "d"),
    )
    stays(line, BATCH, sums=True)
    if D == 1:  # with two of them, h holds them side by side, and so its channels are no block of those of U
        stays(line, CHANNELS, sums=False)
        if n == 4:
            stays(square, both, sums=True)
    is_right(line, [P(None, None, None, None, "b"), P(), *(P(None, None, "b"),) * 3])
    if L % n == 0:  # time cannot be divided: it is gathered
        is_right(line, [P("b"), P("b"), P(), P(), P()])
    if D == n == 2:  # directions neither: the second one goes from the end
        is_right(line, [P(None, None, "b"), P(), P("b"), P("b"), P("b")])
    if n > 1:
        sequences_that_do_not_divide(line)
    if hasattr(jax, "set_mesh") and hasattr(jax.sharding, "AxisType"):
        explicit()


def stays(mesh: Mesh, specs: Any, sums: bool) -> None:
    """Results and gradients are divided as what they belong to, and but for sums over sequences nothing is sent."""
    is_right(mesh, specs)
    given = placed(mesh, OF, specs)
    forward = jax.jit(lambda *of: function(*of, flags={}))
    backward = jax.jit(lambda *of: gradient(*of, flags={}))
    results, gradients = forward(*given), backward(*given)
    is_old = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 8)
    if n > 1:
        assert used(results[0].sharding.spec) == used(specs[1]), results[0].sharding
        assert [used(g.sharding.spec) for g in gradients] == [used(s) for s in specs]
        assert not any(exchanged(forward.lower(*given).compile()).values())
        found = exchanged(backward.lower(*given).compile())
        assert bool(found.pop("all-gather" if is_old else "all-reduce")) == sums
        assert not any(found.values()), found


def is_right(mesh: Mesh, specs: Any) -> None:
    given = placed(mesh, OF, specs)
    for flags in ({}, FLAGS):

        def both(*of: Any, flags: Any = flags) -> Any:
            return function(*of, flags=flags), gradient(*of, flags=flags)

        close(jax.jit(both)(*given), jax.jit(both)(*OF))


def explicit() -> None:
    """On a mesh whose axes are a part of types, as `jax.make_mesh` makes it by default in recent releases."""
    mesh = jax.make_mesh((n,), ("b",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, weight = OF[1], draw(D, 3, d, D * d) / 4

    def layer(x: Any, weight: Any) -> Any:
        return number(binding.sru(x, weight, recompute="x"))

    def everything(of: Any, x: Any, weight: Any) -> Any:
        return function(*of, flags={}), gradient(*of, flags={}), jax.grad(layer, (0, 1))(x, weight)

    wanted = jax.jit(everything)(OF, x, weight)
    with jax.set_mesh(mesh):
        for specs in (BATCH, CHANNELS) if D == 1 else (BATCH,):
            divided = [jax.device_put(x, NamedSharding(mesh, specs[1]))] if specs is BATCH else [x]
            got = jax.jit(everything)(placed(mesh, OF, specs), *divided, weight)
            close(got, wanted, 1e-4)
            assert used(jax.typeof(got[0][0]).sharding.spec) == ["b"]
            assert [used(jax.typeof(g).sharding.spec) for g in got[1]] == [used(s) for s in specs]


def sequences_that_do_not_divide(mesh: Mesh) -> None:
    fewer = [a[:, : n - 1] if i in (0, 1, 4) else a for i, a in enumerate(OF)]

    def constrained(u: Any, *rest: Any) -> Any:
        u = jax.lax.with_sharding_constraint(u, NamedSharding(mesh, P(None, "b")))
        return loss(u, *rest, flags={})

    close(jax.jit(jax.grad(constrained, EVERY))(*fewer), jax.jit(lambda *of: gradient(*of, flags={}))(*fewer))


# ----------------------------------------------------------------------------------------------------------------------
# shard_map, with and without count of what varies


def by_shard_map() -> None:
    shard_map: Any = getattr(jax, "shard_map", None)
    if shard_map is None:
        from jax.experimental.shard_map import shard_map
    counts = "check_vma" in inspect.signature(shard_map).parameters
    mesh = Mesh(np.array(jax.devices()), ("b",))
    for check in (True, False) if counts else (False,):
        options = {"mesh": mesh, "check_vma" if counts else "check_rep": check}

        def mapped(f: Any, in_specs: Any, out_specs: Any, options: Any = options) -> Any:
            return jax.jit(shard_map(f, in_specs=in_specs, out_specs=out_specs, **options))

        inside(mapped, check)
        around(mapped)


def inside(mapped: Any, check: bool) -> None:
    """Gradients of the part of each device."""
    flag_specs = {"lengths": P("b"), "mask": P(None, "b")}

    def of_part(of: Any, flags: Any) -> Any:
        found = gradient(*of, flags=flags)
        if not check:  # where JAX does not keep count, sums over devices are the caller's
            found = tuple(g if "b" in s else jax.lax.psum(g, "b") for g, s in zip(found, BATCH))
        return function(*of, flags=flags), found

    got = mapped(of_part, (BATCH, flag_specs), ((P(None, "b"), P(None, "b")), BATCH))(OF, FLAGS)
    close(got, (function(*OF, flags=FLAGS), gradient(*OF, flags=FLAGS)))
    # Without initial states there are zeros, which vary as u does.
    last = mapped(lambda *of: function(*of, flags={})[1], BATCH[:3], P(None, "b"))(*OF[:3])
    close(last, function(*OF[:3], flags={})[1])


def around(mapped: Any) -> None:
    """Gradients of a sum over devices."""
    whole = mapped(lambda *of: jax.lax.psum(loss(*of, flags={}), "b"), BATCH, P())
    close(jax.grad(whole, EVERY)(*OF), gradient(*OF, flags={}))
    if D == 1:
        whole = mapped(lambda *of: jax.lax.psum(loss(*of, flags={}), "b"), CHANNELS, P())
        close(jax.grad(whole, EVERY)(*OF), gradient(*OF, flags={}))
    x, weight = OF[1], draw(D, 3, d, D * d) / 4
    for recompute in ("x",) if n > 2 else (False, "x"):

        def layer(x: Any, weight: Any, recompute: Any = recompute) -> Any:
            return number(binding.sru(x, weight, recompute=recompute))

        whole = mapped(lambda *given, layer=layer: jax.lax.psum(layer(*given), "b"), (P(None, "b"), P()), P())
        close(jax.grad(whole, (0, 1))(x, weight), jax.grad(layer, (0, 1))(x, weight), 1e-4)

    if n > 2:
        return

    def penalty(*of: Any) -> Any:
        first = jax.grad(lambda u, x: loss(u, x, *of[2:], flags={}), (0, 1))(*of[:2])
        return sum((g**2).sum() for g in first)

    whole = mapped(lambda *of: jax.lax.psum(penalty(*of), "b"), BATCH, P())
    close(jax.grad(whole, (0, 2, 4))(*OF), jax.jit(jax.grad(penalty, (0, 2, 4)))(*OF), 1e-4)


{"jit": by_jit, "shard_map": by_shard_map}[what]()
print("done")
