"""JAX's transformations of recurrences: gradients of all orders, vmap, scan, remat, donation, and threads."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")

from jax.test_util import check_grads
from sru_rt.bindings import jax as binding
from sru_rt.bindings.jax import ops, reference

import sru_rt
from jax_tools import bits_64, jax, jnp, split, to_jax, with_64_bits
from own_problem import two_state_problem, two_states
from problems import FULL, LAYOUTS, SMOOTH_ROWS, Problem, away_from_kinks, name_of
from test_arrays import arguments, converted

__all__ = ["with_64_bits"]  # a fixture

SMALL_SIZES = [(3, 2, 3), (4, 1, 5), (1, 2, 2), (2, 3, 1)]  # L, B, d: odd ones, a single step


def close(got: Any, wanted: Any, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def sru_problem(size: tuple[int, int, int] = (4, 3, 5), D: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `sru_recurrence` with all that it takes, to differentiate by, and others."""
    problem = Problem.make(FULL["sru"] | {"dtype": "float64"}, size, D, "all", state=True)
    problem.arrays |= {name: np.nan_to_num(problem.arrays[name]) for name in ("u", "x")}
    return split(problem.given, problem.arrays)


def loss(results: Any) -> Any:
    """A number that depends on all of the results, each otherwise."""
    return sum(jnp.sum(jnp.cos(r) * jnp.arange(1, r.size + 1).reshape(r.shape)) for r in jax.tree.leaves(results))


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("row", SMOOTH_ROWS[::2], ids=name_of)
def test_gradients_by_finite_differences(row):
    """Of the first order and the second, with every policy."""
    n = SMOOTH_ROWS.index(row) // 2
    size, layout = SMALL_SIZES[n % 4], list(LAYOUTS)[n % len(LAYOUTS)]
    problem = away_from_kinks(row, size, 1 + n % 2, layout, layer=True)
    of, others = split(problem.given, problem.arrays)
    function = partial(getattr(binding, row["cell"]), **others, recompute=[False, 3, True, "x"][n % 4])
    check_grads(jax.jit(lambda of: function(**of)), (of,), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, "x"])
def test_gradients_of_an_own_cell_by_finite_differences(recompute):
    arrays, options = two_state_problem()
    of = {name: to_jax(value) for name, value in arrays.items()}
    function = jax.jit(lambda of: binding.own_cell(two_states, **of, **options, recompute=recompute))
    check_grads(function, (of,), order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_gradient_penalty(monkeypatch):
    """Three orders, as by JAX's own gradient of the same recurrence as a loop."""
    problem = Problem.make(FULL["mingru"] | {"dtype": "float64"}, (3, 2, 2), 1, "all", state=True)
    problem.arrays |= {name: np.nan_to_num(a) for name, a in problem.arrays.items() if name in ("u", "x")}
    of, others = split(problem.given, problem.arrays)

    def penalty(function: Any, of: Any) -> Any:
        gradients = jax.grad(lambda of: function(of))(of)
        return sum(jnp.sum(g**2) for g in gradients.values())

    def fused(of: Any) -> Any:
        return loss(problem.forward()(**of, **others))

    def orders(function: Any) -> Any:
        second = partial(penalty, function)
        return jax.jit(lambda of: [jax.grad(f)(of) for f in (function, second, partial(penalty, second))])(of)

    got = orders(fused)
    monkeypatch.setattr(sru_rt.bindings.jax.autodiff, "_jitted", by_reference)
    close(got, orders(lambda of: fused(of)), rtol=1e-9, atol=1e-9)


def by_reference(stated: Any, given: Any) -> Any:
    h, last = reference.recurrence(stated, ops.operands(stated, given))
    return ops.side_by_side(h), last


@pytest.mark.parametrize("recompute", [False, "x"])
def test_differentiated_by_this_and_then_by_that(recompute):
    """A program that is traced once, by different arguments and from different results."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)))
    params = sru_rt.sru_init(3, 3, rng=0, dtype="float64", like=x)
    alpha = params.pop("alpha")
    traced = jax.jit(lambda x, params: binding.sru(x, **params, alpha=alpha, recompute=recompute))
    every = jax.jit(jax.jacrev(lambda x, params: [jnp.sum(r**2) for r in traced(x, params)], (0, 1)))(x, params)
    for i in (0, 1):
        for by in (0, 1, (0, 1)):
            got = jax.grad(lambda x, params, i=i: jnp.sum(traced(x, params)[i] ** 2), by)(x, params)
            close(got, every[i][by] if isinstance(by, int) else every[i])


def test_jacobian_and_hessian():
    of, others = sru_problem((3, 1, 2), 1)

    def function(b: Any) -> Any:
        return sru_rt.sru_recurrence(**of | {"bias": b}, **others)[0]

    full = jax.jit(jax.jacrev(jax.jacrev(lambda b: jnp.sum(function(b) ** 2))))(of["bias"]).reshape(4, 4)
    close(full, full.T)
    step = 1e-5 * jnp.eye(4)[1].reshape(of["bias"].shape)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(function(b) ** 2)))
    difference = (gradient(of["bias"] + step) - gradient(of["bias"] - step)).ravel() / 2e-5
    close(full[1], difference, rtol=1e-6, atol=1e-8)


def test_remat_and_scan():
    """A stack of layers as a scan over their parameters, each computed again in the backward."""
    rng = np.random.default_rng(2)
    layers = [sru_rt.sru_init(6, 6, rng=rng, dtype="float64") for _ in range(3)]
    alpha = layers[0]["alpha"]
    stacked = {name: jnp.stack([layer[name] for layer in layers]) for name in ("weight", "bias", "v")}
    x = jnp.asarray(rng.normal(size=(5, 2, 6)))

    def step(x: Any, params: Any) -> Any:
        return sru_rt.sru_forward(x, **params, alpha=alpha)

    def scanned(x: Any, stacked: Any, step: Any = step) -> Any:
        return jax.lax.scan(step, x, stacked)

    def looped(x: Any, stacked: Any) -> Any:
        states = []
        for i in range(3):
            x, c = step(x, {name: a[i] for name, a in stacked.items()})
            states.append(c)
        return x, jnp.stack(states)

    functions = (looped, scanned, partial(scanned, step=jax.checkpoint(step)))
    results = [jax.jit(jax.grad(lambda *a, f=f: loss(f(*a)), (0, 1)))(x, stacked) for f in functions]
    close(results[1], results[0])
    close(results[2], results[0])


def test_recomputation_does_without_u():
    """The backward of recompute="x" forms U again: XLA does not find the one of the forward, which is the same."""
    x = jnp.ones((64, 4, 8))
    params = sru_rt.mingru_init(8, 8, rng=0, dtype="float64", like=x)
    kept = []
    for recompute in (False, "x"):
        function = jax.jit(lambda x, r=recompute: jax.vjp(lambda x: binding.mingru(x, **params, recompute=r), x)[1])
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(function(x))))
        compiled = jax.jit(
            jax.grad(lambda x, r=recompute: binding.mingru(x, **params, recompute=r)[0].sum()),
        ).lower(x)
        products = compiled.compile().as_text().count(" dot(")
        assert products == (3 if recompute else 2)
    assert kept[1] < kept[0] - 64 * 4 * 2 * 8 + x.size + 1


# ----------------------------------------------------------------------------------------------------------------------
# vmap

# Where the batch is in each operand; all others are shared.
BATCHES = {
    "parameters": {"bias": 0, "v": 1},
    "u": {"u": 0},
    "inputs and state": {"u": 1, "x": 2, "c0": 0},
    "lengths": {"u": 0, "lengths": 0, "bias": 2},
    "mask and reset": {"mask": 1, "reset": 0, "x": 0},
    "channels last": {"u": 5, "bias": 3, "c0": 3},
}


def stacked(given: dict[str, Any], dims: dict[str, int], n: int, rng: Any) -> dict[str, Any]:
    """Arguments with batches of n in some of them, each another one."""

    def other(value: Any) -> Any:
        if jnp.issubdtype(value.dtype, jnp.floating):
            return value + rng.normal(size=value.shape)
        return value[rng.permutation(len(value))]

    return {
        name: jnp.stack([other(value) for _ in range(n)], dims[name]) if name in dims else value
        for name, value in given.items()
    }


def with_gradients(given: dict[str, Any], options: dict[str, Any]) -> Any:
    of = {name: a for name, a in given.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    flags = {name: a for name, a in given.items() if name not in of}
    results, pullback = jax.vjp(lambda of: sru_rt.sru_recurrence(**of, **flags, **options), of)
    return results, pullback(tuple(jnp.cos(jnp.arange(r.size, dtype=r.dtype)).reshape(r.shape) for r in results))


def arrays_and_options() -> tuple[dict[str, Any], dict[str, Any]]:
    of, others = sru_problem()
    given = of | {name: value for name, value in others.items() if isinstance(value, jax.Array)}
    return given, {name: value for name, value in others.items() if name not in given}


def one_of(given: dict[str, Any], dims: dict[str, int], i: int) -> dict[str, Any]:
    return {name: jnp.take(a, i, dims[name]) if name in dims else a for name, a in given.items()}


@pytest.mark.parametrize("batch", BATCHES)
def test_vmap_is_a_loop(batch):
    dims, n = BATCHES[batch], 3
    plain, options = arrays_and_options()
    given = stacked(plain, dims, n, np.random.default_rng(0))
    in_axes = ({name: dims.get(name) for name in given},)
    got = jax.jit(jax.vmap(lambda given: with_gradients(given, options), in_axes))(given)
    one = jax.jit(lambda given: with_gradients(given, options))
    close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *[one(one_of(given, dims, i)) for i in range(n)]))


def test_gradient_of_vmap():
    """The gradient of what is shared is a sum over the batch."""
    plain, options = arrays_and_options()
    dims = BATCHES["u"]
    given = stacked(plain, dims, 3, np.random.default_rng(0))
    in_axes = ({name: dims.get(name) for name in given},)

    def of_all(bias: Any, call: Any) -> Any:
        return loss(call(lambda one: sru_rt.sru_recurrence(**one, **options), given | {"bias": bias}))

    def loop(function: Any, given: Any) -> Any:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *[function(one_of(given, dims, i)) for i in range(3)])

    got, wanted = (
        jax.grad(of_all)(given["bias"], call) for call in (lambda f, given: jax.vmap(f, in_axes)(given), loop)
    )
    close(got, wanted)


def test_vmap_of_vmap_is_a_loop_of_loops():
    plain, options = arrays_and_options()
    inner, outer, rng = BATCHES["lengths"], {"u": 0, "bias": 0}, np.random.default_rng(1)
    given = stacked(stacked(plain, inner, 2, rng), outer, 3, rng)
    axes = [({name: dims.get(name) for name in given},) for dims in (inner, outer)]

    def one(given: Any) -> Any:
        return with_gradients(given, options)

    got = jax.jit(jax.vmap(jax.vmap(one, axes[0]), axes[1]))(given)
    one = jax.jit(one)
    rows = [[one(one_of(one_of(given, outer, i), inner, j)) for j in range(2)] for i in range(3)]
    each = [jax.tree.map(lambda *parts: jnp.stack(parts), *row) for row in rows]
    close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *each))


def test_second_order_under_vmap():
    of, others = sru_problem((3, 2, 2), 1)
    batch = jnp.stack([of["bias"], 2 * of["bias"]])

    def penalty(bias: Any) -> Any:
        gradient = jax.grad(lambda u: loss(sru_rt.sru_recurrence(**of | {"u": u, "bias": bias}, **others)))(of["u"])
        return jnp.sum(gradient**2)

    got = jax.vmap(jax.grad(penalty))(batch)
    close(got, jnp.stack([jax.grad(penalty)(one) for one in batch]), rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Programs


def test_donated_arrays():
    call = converted(arguments("sru_recurrence"), jnp.asarray)
    wanted = [np.asarray(a) for a in sru_rt.sru_recurrence(**call)]
    donating = jax.jit(lambda x, u, c0, rest: sru_rt.sru_recurrence(u, x, c0=c0, **rest), donate_argnums=(0, 1, 2))
    rest = {name: call[name] for name in call if name not in ("x", "u", "c0")}
    for _ in range(2):
        given = [jnp.array(call[name]) for name in ("x", "u", "c0")]
        got = donating(*given, rest)
        assert given[0].is_deleted()
        for a, b in zip(got, wanted):
            np.testing.assert_array_equal(a, b)


def test_compiled_ahead():
    call = converted(arguments("sru_forward"), jnp.asarray)
    function = jax.jit(lambda given: sru_rt.sru_forward(**given))
    compiled = function.lower(jax.eval_shape(lambda: call)).compile()
    close(compiled(call), function(call), rtol=0, atol=0)


def test_what_is_given_stays():
    call = converted(arguments("sru_forward"), jnp.asarray)
    before = {name: np.array(a) for name, a in call.items()}
    jax.grad(lambda x: loss(sru_rt.sru_forward(**call | {"x": x})))(call["x"])
    for name, a in call.items():
        np.testing.assert_array_equal(a, before[name])


@pytest.mark.parametrize("jitted", [True, False])
def test_many_threads(jitted):
    """Each with shapes of its own, which are planned at the same time."""
    of, others = sru_problem((6, 3, 5))
    others = {name: value for name, value in others.items() if name not in ("lengths", "mask", "reset")}

    def function(of: Any) -> Any:
        return jax.value_and_grad(lambda of: loss(sru_rt.sru_recurrence(**of, **others)))(of)

    parts = [{n: a[:, :b] if n in ("u", "x", "c0") else a for n, a in of.items()} for b in (1, 2, 3)]
    wanted = [function(part) for part in parts]
    run, failures = jax.jit(function) if jitted else function, []

    def work(k: int) -> None:
        try:
            with bits_64(True):  # which holds for one thread
                for i in range(12):
                    close(run(parts[(k + i) % 3]), wanted[(k + i) % 3], rtol=1e-13)
        except BaseException as error:
            failures.append(error)

    jax.clear_caches()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
