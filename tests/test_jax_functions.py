"""The core's functions on arrays of JAX, and those of the binding: results, gradients, messages."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")

from sru_rt.bindings import jax as binding
from sru_rt.bindings.jax import autodiff, ops, reference, sharding

import sru_rt
from jax_tools import bits_64, jax, jnp, new_programs, program, run, split, to_jax, to_numpy, with_64_bits
from own_problem import two_state_problem, two_states
from problems import CELLS, DTYPES, FULL, LAYER_ROWS, LAYOUTS, ROWS, SIZES, Problem, compare, name_of
from sru_rt.errors import ArgumentError, CompileError, DtypeError, LibraryError, ShapeError, SruRtError
from test_arrays import OPTIONS, D, L, arguments, assert_same_bits, converted
from test_arrays import B as BATCH
from test_arrays import d as SIZE

__all__ = ["new_programs", "with_64_bits"]  # fixtures

# ----------------------------------------------------------------------------------------------------------------------
# Results and gradients

RECURRENCES = ROWS[::5]  # of what test_cells.py has; all options meet two by two in the layers


@pytest.mark.parametrize("row", RECURRENCES, ids=name_of)
def test_recurrence_matches_oracle(row):
    """And has the bits of the same recurrence on NumPy arrays, whose kernel it is."""
    n = RECURRENCES.index(row)
    problem = Problem.make(row, SIZES[n % len(SIZES)], 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)])
    result, gradients = run(problem, problem.forward())
    compare(problem, result, gradients)
    wanted_result, wanted = problem.run(save=True)
    assert_same_bits(result, wanted_result)
    for name, value in problem.arrays.items():
        if value is not None:
            assert_same_bits([getattr(gradients, name)], [getattr(wanted, name)])


@pytest.mark.parametrize("row", LAYER_ROWS[::4], ids=name_of)
def test_layer_matches_oracle(row):
    n = LAYER_ROWS.index(row) // 4
    problem = Problem.make(row, (7, 3, 9), 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)], layer=True)
    recompute = [False, 3, True, "x"][n // 2 % 4]
    compare(problem, *run(problem, getattr(binding, row["cell"]), recompute=recompute), layer=True)


@pytest.mark.parametrize("recompute", [False, "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_matches_oracle(dtype, recompute):
    rng = np.random.default_rng(7)
    params = sru_rt.qrnn_init(12, 6, directions=2, low_rank=4, rng=rng, dtype=dtype, window=2, highway=True)
    x = rng.normal(size=(8, 3, 12)).astype(DTYPES[dtype])
    arrays = {"x": x, "weight": params.pop("weight"), "bias": params.pop("bias")}
    dlast = np.ones((2, 3, 6), "f8" if dtype == "float64" else "f4")
    problem = Problem(CELLS["qrnn"], arrays, params, x, dlast, dtype, np.zeros((8, 3), bool))
    compare(problem, *run(problem, binding.qrnn, recompute=recompute), layer=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["sru_forward", "sru_recurrence", "sru_step", "mingru_step", "qrnn_step"])
def test_functions_of_the_core(function, dtype):
    """As with NumPy arrays, but that products are rounded otherwise."""
    call = arguments(function.replace("mingru", "sru").replace("qrnn", "sru"), DTYPES[dtype])
    options = OPTIONS if function.startswith("sru") else {}
    if function == "mingru_step":
        call = {"x": call["x"], "weight": call["weight"][:, :2], "h": call["c"]}
    if function == "qrnn_step":
        call = {"x": np.stack([call["x"]] * 2), "weight": np.concatenate([call["weight"]] * 2, -1), "c": call["c"]}
        options = {"window": 2}
    got = getattr(sru_rt, function)(**converted(call, jnp.asarray), **options)
    wanted = getattr(sru_rt, function)(**call, **options)
    assert all(isinstance(a, jax.Array) for a in got)
    bound = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 1e-5, "float64": 1e-13}[dtype]
    for a, b in zip(got, wanted):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a).astype("f8"), b.astype("f8"), rtol=bound, atol=bound)


@pytest.mark.parametrize("cell", FULL)
def test_without_64_bits(cell):
    """As JAX is by default: no array has 64 bits, lengths neither, which kernels read as int64."""
    problem = Problem.make(FULL[cell] | {"dtype": "float32"}, (6, 4, 5), 2, "all", state=True)
    problem.arrays |= {name: np.nan_to_num(problem.arrays[name]) for name in ("u", "x") if name in problem.arrays}
    problem.options["lengths"] = np.array([6, 0, 3, 1], np.uint8)
    problem.padded = np.arange(6)[:, None] >= problem.options["lengths"]
    problem.padded |= problem.options["mask"]
    with bits_64(False):
        compare(problem, *run(problem, problem.forward()))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64"])
def test_lengths_that_are_traced(dtype):
    """Their values are not checked, but clamped by the kernel."""
    call = converted(arguments("sru_recurrence"), jnp.asarray)
    given = np.array([200, 3, 0]).astype(dtype)
    if dtype == "uint32":
        given[0] = 1 << 31
    if dtype == "int64":
        given[:] = 1 << 40, -(1 << 40), -3
    got = jax.jit(lambda lengths: sru_rt.sru_recurrence(**call | {"lengths": lengths}))(jnp.asarray(given))
    wanted = sru_rt.sru_recurrence(**arguments("sru_recurrence") | {"lengths": np.clip(given.astype("i8"), 0, L)})
    assert_same_bits(map_list(got), wanted)


def map_list(values: Any) -> list[Any]:
    return [to_numpy(value) for value in values]


@pytest.mark.parametrize("recompute", [False, 3, "x"])
@pytest.mark.parametrize("cell", ["sru", "minlstm"])
def test_without_a_compiler(cell, recompute, monkeypatch, new_programs):
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    asked: list[str] = []
    call = ops._custom_call
    monkeypatch.setattr(
        ops, "_custom_call", lambda statement, device, *a: asked.append(device) or call(statement, device, *a)
    )
    problem = Problem.make(FULL[cell] | {"dtype": "float32"}, (5, 3, 6), 2, "all", layer=True)
    compare(problem, *run(problem, getattr(binding, cell), recompute=recompute), layer=True)
    assert "cpu" not in asked


def test_what_needs_no_gradient_is_left_out(monkeypatch, new_programs):
    """Flags and masks, and the gradient of a last state that is not used."""
    wanted = []
    backward = ops.backward
    monkeypatch.setattr(ops, "backward", lambda *args: wanted.append((args[-1], args[-2])) or backward(*args))
    row = FULL["sru"] | {"dtype": "float32", "dropout": True}
    problem = Problem.make(row, (5, 3, 7), 1, "all", state=True)
    of, others = split(problem.given, ["bias"])
    jax.grad(lambda of: sru_rt.sru_recurrence(**of, **others)[0].sum())(of)
    ((need, dlast),) = wanted
    assert need == (True, True, False, False, False, True, False, True, True) and dlast is None


def test_state_that_is_not_used_or_alone():
    problem = Problem.make(FULL["sru"] | {"dtype": "float64"}, (5, 3, 7), 2, "all")
    of, others = split(problem.given, ["u"])
    for i in (0, 1):
        (du,) = jax.grad(lambda of, i=i: (sru_rt.sru_recurrence(**of, **others)[i] ** 2).sum())(of).values()
        h, last, saved = sru_rt.sru_recurrence(**problem.given, save=True)
        dh, dlast = (None, 2 * last) if i else (2 * h, None)
        np.testing.assert_array_equal(to_numpy(du), sru_rt.sru_backward(saved, dh, dlast).u)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("recompute", [False, 2, "x"])
def test_arrays_without_numbers(shape, recompute):
    """The last state is the first one, and its gradient that of the first one."""
    problem = Problem.make(FULL["sru"] | {"dtype": "float64"}, (*shape, 2), 2, "all", state=True, layer=True)
    of, others = split(problem.given, problem.arrays)
    (h, last), pullback = jax.vjp(lambda of: binding.sru(**of, **others, recompute=recompute), of)
    assert h.shape == (*shape, 4)
    np.testing.assert_array_equal(last, problem.arrays["c0"])
    (found,) = pullback((h, last))
    np.testing.assert_array_equal(found["c0"], last)
    assert not any(found[name].any() for name in ("x", "weight", "bias", "v"))
    second = jax.grad(
        lambda c0: (jax.grad(lambda c0: (binding.sru(**of | {"c0": c0}, **others)[1] ** 3).sum())(c0)).sum()
    )
    np.testing.assert_allclose(second(of["c0"]), 6 * problem.arrays["c0"])


def test_constants_that_are_equal_and_not_the_same():
    @sru_rt.cell(gates="a", state="c", constants="k")
    def divided(a, c, k):
        c = c + a
        return c, c / k

    u = jnp.ones((2, 1, 1, 1, 3))
    assert (divided.recurrence(u, k=0.0)[0] == float("inf")).all()
    assert (divided.recurrence(u, k=-0.0)[0] == -float("inf")).all()


@pytest.mark.parametrize("how", ["method", "function", "recompute", "jit"])
def test_own_cell(how):
    arrays, options = two_state_problem()
    h, last, saved = two_states.forward(**arrays, **options, save=True)
    wanted = two_states.backward(saved, np.sin(h), tuple(map(np.cos, last)))

    def function(of: Any) -> Any:
        if how == "method":
            return two_states.forward(**of, **options)
        return binding.own_cell(two_states, **of, **options, recompute=3 if how == "recompute" else False)

    function = jax.jit(function) if how == "jit" else function
    (got, states), pullback = jax.vjp(function, {name: to_jax(value) for name, value in arrays.items()})
    assert isinstance(states, tuple)
    np.testing.assert_allclose(got, h, rtol=1e-12, atol=1e-13)
    (found,) = pullback((jnp.sin(h), tuple(map(jnp.cos, states))))
    for name in arrays:
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(getattr(wanted, name))):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_own_cell_with_one_state_missing():
    arrays, options = two_state_problem()
    arrays["c0"] = (arrays["c0"][0], None)
    wanted, _ = two_states.forward(**arrays, **options)
    got, _ = two_states.forward(**{name: to_jax(value) for name, value in arrays.items()}, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)


def test_masks_are_constants():
    """As in the core, the gradient of a dropout mask is none; here it is zero."""
    problem = Problem.make(FULL["sru"] | {"dtype": "float64", "dropout": True}, (4, 2, 3), 1, "plain")
    of, others = split(problem.given, ["dropout_mask"])
    assert not jax.grad(lambda of: sru_rt.sru_recurrence(**of, **others)[0].sum())(of)["dropout_mask"].any()


def test_flags_of_other_dtypes():
    call = arguments("sru_recurrence")  # mask and reset are uint8
    wanted = sru_rt.sru_recurrence(**call)
    for dtype in ("bool", "int32", "float32", "bfloat16"):
        flags = {name: jnp.asarray(call[name]).astype(dtype) for name in ("mask", "reset")}
        assert_same_bits(map_list(sru_rt.sru_recurrence(**converted(call, jnp.asarray) | flags)), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize("row", [*FULL.values(), FULL["sru"] | {"v": "inputs", "dropout": True}], ids=name_of)
def test_reference_is_the_kernel(row, monkeypatch):
    """And what it would keep is what the kernel keeps."""
    problem = Problem.make(row | {"dtype": "float64"}, (7, 3, 4), 2, "all", state=True)
    seen: list[Any] = []
    monkeypatch.setattr(autodiff, "_jitted", lambda *given: seen.append(given) or (None, None))
    problem.forward()(**{name: to_jax(value) for name, value in problem.given.items()})
    ((stated, given),) = seen
    stated, o = stated._replace(every=3), ops.operands(stated, given)
    h, last, before = jax.jit(lambda *o: reference.keeping(stated, o))(*o)
    forward = jax.jit(lambda *o: ops.forward(stated, o))(*o)
    for a, b in zip(forward, (h, last, before[::3])):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    need = tuple(a is not None and a.dtype == h.dtype for a in o)
    given_to_backward = (o, forward[2], jnp.cos(h), jnp.sin(last))
    gradients = jax.jit(lambda o, *rest: ops.backward(stated, o, *rest, need))(*given_to_backward)
    o_wanted = [i for i, is_wanted in enumerate(need) if is_wanted]

    def of(*some: Any) -> Any:
        return reference.recurrence(stated, ops.put(o, o_wanted, some))

    _, pullback = jax.vjp(of, *(o[i] for i in o_wanted))
    for i, wanted in zip(o_wanted, pullback((jnp.cos(h), jnp.sin(last)))):
        np.testing.assert_allclose(gradients[i], wanted, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(function: str, call: dict[str, Any], error: type[SruRtError], *says: str) -> str:
    with pytest.raises(SruRtError) as caught:
        getattr(sru_rt, function)(**call)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(f"{function}: "), message
    for text in says:
        assert text in message
    return message


def test_shapes_and_dtypes_inside_of_programs():
    call = converted(arguments("sru_forward"), jnp.asarray)
    for change, error, says in (
        ({"bias": call["bias"][..., 1:]}, ShapeError, "bias has shape (2, 2, 4); it needs (D, 2, d) = (2, 2, 5)"),
        ({"c0": call["c0"].astype("float16")}, DtypeError, "convert it with c0.astype('float32')"),
        ({"x": call["x"].astype("int32")}, DtypeError, "x has dtype int32"),
        ({"mask": call["mask"][1:]}, ShapeError, "mask has shape"),
    ):
        with pytest.raises(error, match=f"sru_forward: .*{re.escape(says)}"):
            jax.jit(lambda given: sru_rt.sru_forward(**given))(call | change)
    refused("sru_forward", call | {"time_parallel": "yes"}, ArgumentError, "time_parallel must be one of")


@pytest.mark.parametrize("save", [True, 2, "x"])
def test_save_is_not_for_arrays_of_jax(save):
    call = converted(arguments("sru_forward"), jnp.asarray)
    refused("sru_forward", call | {"save": save}, ArgumentError, "save=", "JAX", "jax.grad", "recompute=")


def test_options_that_mean_nothing():
    call = converted(arguments("sru_forward"), jnp.asarray)
    out = (jnp.zeros((L, BATCH, D * SIZE), "f4"), None)
    refused("sru_forward", call | {"out": out}, ArgumentError, "out=", "JAX")
    refused("sru_forward", call | {"saved_dtype": "float16"}, ArgumentError, "saved_dtype=", "JAX")
    assert len(sru_rt.sru_forward(**call, save=False, out=None)) == 2
    for recompute in (-1, 0.0, 1.5, "y", None):
        with pytest.raises(ArgumentError, match="sru_forward: recompute must be"):
            binding.sru(**call, recompute=recompute)
    with pytest.raises(TypeError, match=r"sru\(\) got an unexpected keyword argument 'save'"):
        binding.sru(**call, save=True)
    with pytest.raises(TypeError, match=r"own_cell\(\) got an unexpected keyword argument 'out'"):
        binding.own_cell(two_states, call["x"], call["weight"], out=out)
    with pytest.raises(ArgumentError, match="own_cell: cell must be what"):
        binding.own_cell(sru_rt.sru_forward, call["x"], call["weight"])


@pytest.mark.parametrize("name", ["x", "weight", "bias", "mask"])
def test_mixed_with_numpy(name):
    call = converted(arguments("sru_forward"), jnp.asarray)
    call[name] = np.asarray(call[name])
    message = refused("sru_forward", call, LibraryError, "different libraries", "convert them to one")
    assert re.search(rf"\b{name} of numpy", message)
    other = arguments("sru_forward") | {name: jnp.asarray(arguments("sru_forward")[name])}
    assert re.search(rf"\b{name} of jax", refused("sru_forward", other, LibraryError, "different libraries"))


def test_lengths_of_the_host():
    call = converted(arguments("sru_forward"), jnp.asarray)
    wanted = map_list(sru_rt.sru_forward(**call))
    for lengths in ([5, 0, 4], np.array([5, 0, 4]), jnp.array([5, 0, 4])):
        assert_same_bits(map_list(sru_rt.sru_forward(**call | {"lengths": lengths})), wanted)
    for lengths in ([5, 0, 9], np.array([5, -1, 4]), jnp.array([5, 0, 7])):
        refused("sru_forward", call | {"lengths": lengths}, ArgumentError, "lengths must be from 0 to L = 6")


def test_numbers_that_are_traced():
    call = converted(arguments("sru_forward"), jnp.asarray)
    sru_rt.sru_forward(**call, alpha=jnp.float32(1.5))
    with pytest.raises(ArgumentError, match=r"sru_forward: alpha must be a number \(got an array"):
        jax.jit(lambda alpha: sru_rt.sru_forward(**call, alpha=alpha))(1.5)


def test_arrays_of_64_bits_where_jax_has_none():
    """Made in another thread, or before the setting was changed: parts would be converted to half as many bytes."""
    call = converted(arguments("sru_recurrence", np.float64), jnp.asarray)
    refusal = pytest.raises(DtypeError, match=r"has dtype float32; beside u of float64 it needs .* jax_enable_x64")
    with bits_64(False), pytest.warns(UserWarning, match="float64"), refusal:
        sru_rt.sru_recurrence(**call)


def test_forward_mode_is_refused():
    u = jnp.ones((3, 2, 1, 2, 4))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda u: sru_rt.mingru_recurrence(u)[0], (u,), (u,))


def test_compiler_that_fails(monkeypatch, new_programs):
    """What is wrong is said where the recurrence is called, not where its results are waited for."""
    from sru_rt import launch

    def fails(*args: Any) -> Any:
        raise CompileError("sru_rt: no compiler today")

    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    monkeypatch.setattr(launch.compile_cpu, "kernel", fails)
    monkeypatch.setattr(launch, "_kernel_or_error", launch._kernel_or_error.__wrapped__)
    u = jnp.ones((3, 2, 1, 2, 4))
    with pytest.raises(CompileError, match="no compiler today"):
        sru_rt.mingru_recurrence(u)


# ----------------------------------------------------------------------------------------------------------------------
# Initial values, signatures, imports


@pytest.mark.parametrize("dtype", DTYPES)
def test_init(dtype):
    options: dict[str, Any] = dict(low_rank=2, dtype=dtype, rng=3)
    params = sru_rt.sru_init(4, 5, like=jnp.zeros(1), **options)
    plain = sru_rt.sru_init(4, 5, **options)
    assert params.keys() == plain.keys()
    got, wanted = ([*p["weight"], p["bias"], p["v"]] for p in (params, plain))
    assert all(isinstance(a, jax.Array) for a in got)
    assert_same_bits(map_list(got), wanted)
    h, _ = sru_rt.sru_forward(jnp.zeros((L, BATCH, 4), dtype), **params)
    assert h.shape == (L, BATCH, 5)


def test_signatures_are_those_of_the_core():
    for name in CELLS:
        own = inspect.signature(getattr(binding, name)).parameters
        core = inspect.signature(getattr(sru_rt, f"{name}_forward")).parameters
        assert [n for n in core if n not in ("save", "saved_dtype", "out")] == [n for n in own if n != "recompute"]
        assert "recompute" in getattr(binding, name).__doc__


def test_the_binding_is_imported_when_an_array_comes(tmp_path):
    program(
        """
        import sys, sru_rt
        assert "jax" not in sys.modules
        import jax, jax.numpy as jnp
        assert not [name for name in sys.modules if name.startswith("sru_rt.bindings")]
        x = jnp.ones((3, 2, 4))
        params = sru_rt.sru_init(4, 4, rng=0, like=x)
        assert jax.grad(lambda x: sru_rt.sru_forward(x, **params)[0].sum())(x).any()
        assert "torch" not in sys.modules and "cupy" not in sys.modules
        """,
        tmp_path,
    )


def test_letters_of_all_cells(monkeypatch, new_programs):
    """Every operand and result has as many letters as axes."""
    seen: list[Any] = []
    run_pass = ops._run

    def run_and_note(statement: Any, *arrays: Any) -> Any:
        results = run_pass(statement, *arrays)
        seen.append((statement, arrays, results))
        return results

    monkeypatch.setattr(ops, "_run", run_and_note)
    ops._operator.cache_clear()
    for row in ROWS[::16]:
        problem = Problem.make(row, (3, 2, 4), 2, "all", state=True)
        run(problem, problem.forward())
    arrays, options = two_state_problem()
    jax.grad(lambda of: two_states.forward(**of, **options)[0].sum())({n: to_jax(a) for n, a in arrays.items()})
    ops._operator.cache_clear()
    assert {statement.backward for statement, *_ in seen} == {False, True}
    for statement, *lists in seen:
        for names, arrays in zip(sharding.letters(statement), lists):
            assert [len(one) for one in names] == [array.ndim for array in arrays]
