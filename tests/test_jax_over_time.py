"""One long sequence on several devices, which here are parts of one CPU: as on one of them.

Each number of devices needs a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs JAX")

import jax.numpy as jnp
from sru_rt.bindings.jax import mingru, sharded_recurrence

import sru_rt
from jax_tools import program
from sru_rt.errors import LibraryError

SHARED = """
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_enable_x64", True)
    from jax.sharding import Mesh, PartitionSpec as P
    import sru_rt
    from sru_rt.bindings import jax as binding

    n = len(jax.devices())
    mesh = Mesh(np.array(jax.devices()), ("time",))
    rng = np.random.default_rng(0)
    L, B, d, d_in = 12, 3, 5, 4
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    try:
        from jax import shard_map
        unchecked = {"check_vma": False}  # of what varies from device to device
    except ImportError:
        from jax.experimental.shard_map import shard_map
        unchecked = {"check_rep": False}

    @sru_rt.cell(gates="a f g n", params="b", state="c m")
    def coupled(a, f, g, n, b, c, m):
        f, g = sru_rt.sigmoid(f + b), sru_rt.sigmoid(g)
        return f * c + a * m + (1 - f) * n, g * m - 0.5 * f * c + n, sru_rt.tanh(c) * m

    def of_cells(D):
        x, bias = draw(L, B, d_in), draw(D, 2, d)
        weight = lambda k, n=d_in: 0.5 * draw(D, k, d, n)
        state = draw(D, B, d)
        return {
            "mingru": (sru_rt.mingru_forward, (x, weight(2), bias, state), (0,), {}),
            "minlstm": (binding.minlstm, (x, weight(3), draw(D, 3, d), state), (0,), {}),
            "qrnn": (sru_rt.qrnn_forward, (x, weight(3, 3 * d_in), None, state), (0,), {"window": 3, "pooling": "fo"}),
            "sru without v": (
                sru_rt.sru_recurrence,
                (draw(L, B, D, 3, d), draw(L, B, D * d), bias, None, state),
                (0, 1),
                {"alpha": 1.2},
            ),
            "an own cell": (coupled.recurrence, (draw(L, B, D, 4, d), draw(D, 1, d), (state, 0.5 * state)), (0,), {}),
        }

    def flags_of(name):
        reset = jnp.asarray(rng.random((L, B)) < 0.15).at[L // 2].set(True)
        found = {"reset": reset, "mask": jnp.asarray(rng.random((L, B)) < 0.2)}
        return {"none": {}, "lengths": {"lengths": [12, 7, 0], **found}, "reset": {"reset": reset}}[name]

    def divided(function, along, options, flags, recompute=False, mesh=mesh, axis="time", rest=P(), **more):
        flags = dict(flags)
        lengths = flags.pop("lengths", None)

        def stretch(given, flags):
            return binding.sharded_recurrence(
                function, *given, axis_name=axis, recompute=recompute, lengths=lengths, **flags, **options
            )

        def run(*given):
            specs = tuple(P(axis) if i in along else rest for i in range(len(given)))
            specs = {"in_specs": (specs, P(axis)), "out_specs": (P(axis), P())}
            return shard_map(stretch, mesh=mesh, **specs, **more)(given, flags)

        return run

    def whole(function, options, flags):
        function = getattr(function, "__wrapped__", function)
        return lambda *given: function(*given, **flags, **options)

    def same(got, wanted):
        got, wanted = map(jax.tree.leaves, jax.device_get((got, wanted)))
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)

    def loss_of(function, seeds):
        def loss(*given):
            return sum((a * jnp.cos(b)).sum() for a, b in zip(jax.tree.leaves(function(*given)), seeds))
        return loss
"""

CELLS = """
    cases = {
        1: [(2, "lengths", True)],
        2: [(1, "reset", False), (2, "lengths", True)],
        4: [(1, "lengths", False), (2, "none", 2)],
    }
    for D, flags, recompute in cases[n]:
        for i, (name, (function, given, along, options)) in enumerate(of_cells(D).items()):
            flagged = flags_of(flags)
            more = {} if "check_vma" in unchecked and (i + D) % 2 else unchecked
            alone = whole(function, options, flagged)
            together = divided(function, along, options, flagged, recompute, **more)
            wanted = alone(*given)
            same(jax.jit(together)(*given), wanted)
            seeds = [draw(*a.shape) for a in jax.tree.leaves(wanted)]
            by = tuple(i for i, a in enumerate(given) if a is not None)
            same(jax.jit(jax.grad(loss_of(together, seeds), by))(*given), jax.grad(loss_of(alone, seeds), by)(*given))
    print("done")
"""

MORE = """
    function, given, along, options = of_cells(2)["mingru"]
    seeds = [draw(L, B, 2 * d), draw(2, B, d)]
    gradient = lambda f: jax.grad(loss_of(f, seeds), (0, 1, 2, 3))
    alone = whole(function, options, flags_of("none"))
    together = divided(function, along, options, flags_of("none"))

    # Gradients of gradients.
    def second(f):
        return jax.grad(lambda *given: sum((g * jnp.sin(g)).sum() for g in gradient(f)(*given)), (0, 1, 2, 3))
    same(jax.jit(second(together))(*given), second(alone)(*given))

    # A gradient of one result alone, and of a part of the arguments.
    for which in (0, 1):
        of = lambda f: jax.jit(jax.grad(lambda *given: (f(*given)[which] ** 2).sum(), 3))
        same(of(together)(*given), of(alone)(*given))

    # Without an initial state.
    same(together(*given[:3]), alone(*given[:3]))

    # In float32 and bfloat16, to rounding.
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        x, weight, bias, state = given
        narrow = (x.astype(dtype), weight.astype(dtype), bias.astype("float32"), state.astype("float32"))
        for a, b in zip(together(*narrow), alone(*narrow)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance)

    # Beside an axis over sequences.
    if n == 4:
        grid = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "time"))
        x, weight, bias, state = of_cells(1)["mingru"][1]
        x, state = jnp.concatenate([x, -x], 1), jnp.concatenate([state, state], 1)
        def stretch(x, weight, bias, state):
            return binding.sharded_recurrence(sru_rt.mingru_forward, x, weight, bias, state, axis_name="time")
        specs = (P("time", "batch"), P(), P(), P(None, "batch"))
        run = shard_map(stretch, mesh=grid, in_specs=specs, out_specs=(P("time", "batch"), P(None, "batch")))
        seeds = [draw(L, 2 * B, d), draw(1, 2 * B, d)]
        by = (0, 1, 2, 3)
        of = (x, weight, bias, state)
        same(jax.jit(jax.grad(loss_of(run, seeds), by))(*of), jax.grad(loss_of(sru_rt.mingru_forward, seeds), by)(*of))
    print("done")
"""

MISTAKES = """
    from sru_rt.errors import ArgumentError, LibraryError

    def refused(call, *words):
        try:
            call()
        except (ArgumentError, LibraryError) as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(words)

    function, given, along, options = of_cells(1)["mingru"]
    x, weight, bias, state = given
    sru = lambda recompute=False: divided(sru_rt.sru_forward, (0,), {"highway": False}, {}, recompute)
    with_v = (x, draw(1, 3, d, d_in), bias, draw(1, 2, d))
    refused(lambda: sru()(*with_v), "sru_forward", "affine", "sequences or channels")
    refused(lambda: divided(function, (0,), {}, {}, "x")(*given), "recompute='x'", "jax.checkpoint")
    qrnn = divided(sru_rt.qrnn_forward, (0,), {"window": 8}, {})
    refused(lambda: qrnn(x, draw(1, 3, d, 8 * d_in)), "qrnn_forward", "6 steps", "at least 7", "fewer devices")
    print("done")
"""


EXCHANGED = """
    import re
    function, given, along, options = of_cells(1)["mingru"]
    x, *rest = given
    for steps in (64, 256):
        of = (draw(steps, B, d_in), *rest)
        seeds = [draw(steps, B, d), draw(1, B, d)]
        run = jax.jit(jax.grad(loss_of(divided(function, along, options, {}), seeds), (0, 1, 2, 3)))
        text = run.lower(*of).compile().as_text()
        sizes = [
            np.prod([int(n) for n in shape.split(",")])
            for shape in re.findall(r"f64\\[([0-9,]+)\\][^ ]* (?:all-gather|all-reduce|collective-permute)\\(", text)
        ]
        assert sizes and max(sizes) <= max(4 * B * d, 2 * d * d_in), (steps, sizes)
        assert "all-gather(" in text
    print("done")
"""


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_cells_as_on_one_device(devices, tmp_path):
    assert program(SHARED + CELLS, tmp_path, devices=devices) == "done\n"


@pytest.mark.parametrize("devices", [4])
def test_transformations_and_other_axes(devices, tmp_path):
    assert program(SHARED + MORE, tmp_path, devices=devices) == "done\n"


def test_mistakes(tmp_path: Path):
    assert program(SHARED + MISTAKES, tmp_path, devices=2) == "done\n"


@pytest.mark.parametrize("function", [mingru, sru_rt.mingru_forward], ids=["binding", "core"])
def test_outside_of_a_mesh(function):
    x, weight = jnp.zeros((4, 2, 3)), jnp.zeros((1, 2, 5, 3))
    with pytest.raises(LibraryError, match=r"sharded_recurrence: axis_name is 'time'.*jax\.shard_map"):
        sharded_recurrence(function, x, weight, axis_name="time")


def test_devices_exchange_states_and_not_steps(tmp_path):
    assert program(SHARED + EXCHANGED, tmp_path, devices=4) == "done\n"
