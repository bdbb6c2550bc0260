"""The core's functions on tensors of PyTorch, and those of the binding: results, gradients, messages."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest

import sru_rt
from own_problem import two_state_problem, two_states
from problems import CELLS, DTYPES, FULL, LAYER_ROWS, LAYOUTS, ROWS, SIZES, Problem, compare, name_of
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError, SruRtError
from test_arrays import OPTIONS, D, L, arguments, assert_same_bits, converted
from test_arrays import B as BATCH
from test_arrays import d as SIZE
from torch_tools import array, run, tensor, torch

pytest_plugins = ()
pytestmark = pytest.mark.usefixtures("poisoned_tensors", "new_plans")

from sru_rt.bindings import torch as binding

# ----------------------------------------------------------------------------------------------------------------------
# Results and gradients

RECURRENCES = ROWS[::2]  # of what test_cells.py has; all options meet two by two in the layers


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", RECURRENCES, ids=name_of)
def test_recurrence_matches_oracle(row, D):
    n = RECURRENCES.index(row) + 3 * D
    problem = Problem.make(row, SIZES[n % len(SIZES)], D, list(LAYOUTS)[n % len(LAYOUTS)])
    result, gradients = run(problem, problem.forward())
    compare(problem, result, gradients)
    (h, last), wanted = problem.run(save=True)
    assert_same_bits(result, (h, last))
    for name, value in problem.arrays.items():
        if value is not None:
            assert_same_bits([getattr(gradients, name)], [getattr(wanted, name)])


@pytest.mark.parametrize("recompute", [False, 3, True, "x"])
@pytest.mark.parametrize("row", LAYER_ROWS, ids=name_of)
def test_layer_matches_oracle(row, recompute):
    n = LAYER_ROWS.index(row)
    problem = Problem.make(row, (7, 3, 9), 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)], layer=True)
    result, gradients = run(problem, getattr(binding, row["cell"]), recompute=recompute)
    compare(problem, result, gradients, layer=True)


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
    """As with NumPy arrays, but that products are rounded otherwise; what was given stays as it was."""
    call = arguments(function.replace("mingru", "sru").replace("qrnn", "sru"), DTYPES[dtype])
    options = OPTIONS if function.startswith("sru") else {}
    if function == "mingru_step":
        call = {"x": call["x"], "weight": call["weight"][:, :2], "h": call["c"]}
    if function == "qrnn_step":
        call = {"x": np.stack([call["x"]] * 2), "weight": np.concatenate([call["weight"]] * 2, -1), "c": call["c"]}
        options = {"window": 2}
    tensors = converted(call, tensor)
    before = {name: value.clone() for name, value in tensors.items()}
    got = getattr(sru_rt, function)(**tensors, **options)
    wanted = getattr(sru_rt, function)(**call, **options)
    assert all(type(a) is torch.Tensor and not a.requires_grad for a in got)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    bound = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 1e-5, "float64": 1e-13}[dtype]
    for a, b in zip(got, wanted):
        assert array(a).dtype == b.dtype
        np.testing.assert_allclose(array(a).astype("f8"), b.astype("f8"), rtol=bound, atol=bound)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    problem = Problem.make(FULL["sru"] | {"dtype": "float32"}, (5, 3, 7), 2, "all")
    compare(problem, *run(problem, problem.forward()))


def test_gradients_that_nobody_wants_are_not_formed(monkeypatch):
    from sru_rt.bindings.torch import native

    wanted = []
    like = native.gradients_like
    monkeypatch.setattr(native, "gradients_like", lambda o, need: wanted.append(need) or like(o, need))
    problem = Problem.make(FULL["sru"] | {"dtype": "float32"}, (5, 3, 7), 1, "plain")
    given = {name: tensor(value) for name, value in problem.given.items()}
    given["bias"].requires_grad_()
    sru_rt.sru_recurrence(**given)[0].sum().backward()
    (need,) = wanted
    assert sum(need) == 1
    assert given["u"].grad is None


def test_state_that_is_not_used_or_alone():
    problem = Problem.make(FULL["sru"] | {"dtype": "float64"}, (5, 3, 7), 2, "all")
    for seeds in ("h", "last"):
        x = {name: tensor(value) for name, value in problem.given.items()}
        x["u"].requires_grad_()
        h, last = sru_rt.sru_recurrence(**x)
        (h if seeds == "h" else last).square().sum().backward()
        *_, saved = sru_rt.sru_recurrence(**problem.given, save=True)
        dh, dlast = (2 * array(h), None) if seeds == "h" else (None, 2 * array(last))
        np.testing.assert_array_equal(array(x["u"].grad), sru_rt.sru_backward(saved, dh, dlast).u)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors of many kinds


class Subclass(torch.Tensor):
    pass


VIEWS = {
    "transposed": lambda a: a.permute(*reversed(range(a.ndim))).contiguous().permute(*reversed(range(a.ndim))),
    "expanded": lambda a: a[:1].expand(a.shape),
    "sliced": lambda a: torch.stack([a, a], -1)[..., 0],
    "part of rows": lambda a: torch.cat([a, a], 1)[:, : a.shape[1]] if a.ndim > 1 else a,
    "flipped": lambda a: a.flip(0),
    "negated lazily": lambda a: torch.complex(a, a).conj().imag if a.is_floating_point() else a,
    "subclass": lambda a: a.as_subclass(Subclass),
    "frozen parameter": lambda a: torch.nn.Parameter(a, requires_grad=False),
    "inference tensor": lambda a: inference_copy(a),
}


def inference_copy(a: Any) -> Any:
    with torch.inference_mode():
        return a.clone()


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    call = {name: VIEWS[view](a) for name, a in converted(arguments("sru_recurrence"), tensor).items()}
    wanted = sru_rt.sru_recurrence(**{name: a.detach().resolve_neg().clone().numpy() for name, a in call.items()})
    for _ in range(2):  # the second time by what the first one has found out
        assert_same_bits([a.numpy() for a in sru_rt.sru_recurrence(**call)], wanted)


@pytest.mark.parametrize("view", ["transposed", "expanded", "sliced", "part of rows", "flipped"])
def test_gradients_of_views(view):
    call = converted(arguments("sru_recurrence", np.float64), tensor)
    gradients = []
    for make in (VIEWS[view], lambda a: VIEWS[view](a).contiguous()):
        leaves = {name: call[name].clone().requires_grad_() for name in ("u", "x", "bias", "v", "c0")}
        h, last = sru_rt.sru_recurrence(**call | {name: make(a) for name, a in leaves.items()})
        seed = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).reshape(h.shape)
        torch.autograd.backward([h, last], [VIEWS["flipped"](seed), torch.ones(()).double().expand(last.shape)])
        gradients.append({name: a.grad for name, a in leaves.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-14)


PARTS = {
    "first of a bank": lambda bank: bank[:, :2],
    "every other": lambda bank: bank[:, ::2],
    "overlapping": lambda bank: bank.as_strided((bank.shape[0], 2, SIZE), (bank.stride(0), 2, 1)),
    "directions inside": lambda bank: bank.transpose(0, 1)[: bank.shape[0], :2] if bank.shape[0] == 2 else bank[:, :2],
}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("part", PARTS)
def test_gradients_of_parts_of_a_bank_of_parameters(part, directions):
    """Memory for a gradient is laid out as the parameter is only where that is dense."""
    u = torch.randn(L, BATCH, directions, 2, SIZE)
    bank = torch.randn(directions, 4, SIZE)
    gradients = []
    for make in (PARTS[part], lambda bank: PARTS[part](bank).contiguous()):
        leaf = bank.clone().requires_grad_()
        sru_rt.mingru_recurrence(u, make(leaf))[0].square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_tensors_that_have_no_memory():
    u, zeros = torch.randn(3, 2, 1, 2, 4, requires_grad=True), torch._efficientzerotensor
    h, _ = sru_rt.mingru_recurrence(u)
    h.backward(zeros(h.shape))
    assert not u.grad.any()
    h, _ = sru_rt.mingru_recurrence(zeros(u.shape))
    assert torch.equal(h, sru_rt.mingru_recurrence(torch.zeros(u.shape))[0])
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(1, 2, 4))
    with pytest.raises((LibraryError, RuntimeError, AssertionError)):  # and no crash
        sru_rt.mingru_recurrence(u.detach(), h0=fake)


def test_operands_of_a_subclass_beside_a_plain_u():
    from torch.testing._internal.two_tensor import TwoTensor

    u, h0 = torch.randn(3, 2, 1, 2, 4), torch.randn(1, 2, 4)
    wanted, _ = sru_rt.mingru_recurrence(u, h0=h0)
    got, _ = sru_rt.mingru_recurrence(TwoTensor(u, u), h0=TwoTensor(h0, h0))
    assert isinstance(got, TwoTensor) and torch.equal(got.a, wanted)
    got, _ = sru_rt.mingru_recurrence(u, h0=TwoTensor(h0, h0))
    assert torch.equal(got.a, wanted)


def test_constants_that_are_equal_and_not_the_same():
    @sru_rt.cell(gates="a", state="c", constants="k")
    def divided(a, c, k):
        c = c + a
        return c, c / k

    u = torch.ones(2, 1, 1, 1, 3)
    assert (divided.recurrence(u, k=0.0)[0] == float("inf")).all()
    assert (divided.recurrence(u, k=-0.0)[0] == -float("inf")).all()


def test_forward_mode_is_refused():
    from torch.autograd import forward_ad

    u = torch.randn(3, 2, 1, 2, 4)
    with forward_ad.dual_level(), pytest.raises(LibraryError, match=r"no derivative in forward mode .* use reverse"):
        sru_rt.mingru_recurrence(forward_ad.make_dual(u, torch.ones_like(u)))
    with pytest.raises(LibraryError, match="forward mode"):
        torch.func.jvp(lambda u: sru_rt.mingru_recurrence(u)[0], (u,), (u,))


def test_traced_by_jit():
    module = binding.MinGRU(4, 5, bidirectional=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and of shapes that become constants
        traced = torch.jit.trace(module, torch.randn(6, 3, 4), check_trace=False)
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)


def test_recomputation_forms_no_gradient_that_nobody_wants():
    from torch.utils.flop_counter import FlopCounterMode

    weight = torch.randn(1, 2, 8, 8, requires_grad=True)
    counted = []
    for recompute in (False, "x"):
        with FlopCounterMode(display=False) as counter:
            binding.mingru(torch.randn(5, 3, 8), weight, recompute=recompute)[0].sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[1] == counted[0] * 3 / 2  # U and the gradient of the weight, and U once more


def test_without_steps_and_without_sequences():
    call = converted(arguments("sru_forward"), tensor)
    none = {"lengths": None, "mask": None, "reset": None}
    x = torch.zeros(0, BATCH, D * SIZE, requires_grad=True)
    h, c_last = sru_rt.sru_forward(**call | none | {"x": x, "lengths": [0] * BATCH})
    assert h.shape == (0, BATCH, D * SIZE)
    assert torch.equal(c_last, call["c0"])
    (h.sum() + c_last.sum()).backward()
    assert x.grad.shape == x.shape
    weight = call["weight"].requires_grad_()
    h, _ = sru_rt.sru_forward(**call | none | {"x": torch.zeros(L, 0, D * SIZE), "c0": None})
    h.sum().backward()
    assert h.shape == (L, 0, D * SIZE)
    assert not weight.grad.any()


def test_bool_masks_and_lists():
    call = converted(arguments("sru_forward"), tensor)
    wanted = sru_rt.sru_forward(**call)
    call |= {name: call[name].bool() for name in ("mask", "reset")}
    call |= {"dropout_mask": torch.ones(BATCH, D, SIZE, dtype=torch.bool)}
    for lengths in ([5, 0, 4], (5, 0, 4), np.array([5, 0, 4]), torch.tensor([5, 0, 4], dtype=torch.int16)):
        got = sru_rt.sru_forward(**call | {"lengths": lengths})
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_by_position_and_a_scalar_for_alpha():
    call = converted(arguments("sru_forward"), tensor)
    got = sru_rt.sru_forward(call["x"], call["weight"], None, call["v"], alpha=torch.tensor(2.0))
    wanted = sru_rt.sru_forward(x=call["x"], weight=call["weight"], v=call["v"], alpha=2.0)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    with pytest.raises(ArgumentError, match=r"alpha must be a number .* requires a gradient"):
        sru_rt.sru_forward(**call, alpha=torch.tensor(2.0, requires_grad=True))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_parameters_where_no_gradient_is_recorded(mode):
    call = converted(arguments("sru_forward"), tensor)
    wanted = sru_rt.sru_forward(**call)
    call["weight"] = torch.nn.Parameter(call["weight"])
    with getattr(torch, mode)():
        got = sru_rt.sru_forward(**call)
        assert torch.equal(got[0], wanted[0])
        assert not got[0].requires_grad


def test_padding_may_hold_anything():
    """A NaN there reaches no gradient, not even through the product."""
    problem = Problem.make(FULL["mingru"] | {"dtype": "float64"}, (6, 3, 4), 2, "lengths", layer=True)
    assert np.isnan(problem.arrays["x"]).any()
    _, gradients = run(problem, binding.mingru)
    assert np.isfinite(gradients.weight).all() and np.isfinite(gradients.x).all()


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


def test_errors_are_those_of_numpy_arrays():
    call = converted(arguments("sru_forward"), tensor)
    refused("sru_forward", call | {"x": call["x"][0]}, ShapeError, "x has 2 axes", "shape (3, 10)", "(L, B, d_in)")
    refused("sru_forward", call | {"bias": call["bias"][..., 1:]}, ShapeError, "bias has shape (2, 2, 4)")
    refused("sru_forward", call | {"c0": call["c0"][:, :1]}, ShapeError, "c0 has shape (2, 1, 5)", "B = 3 comes from x")
    refused("sru_forward", call | {"lengths": [7, 0, 0]}, ArgumentError, "0 to L = 6", "got 7")
    refused("sru_forward", call | {"lengths": torch.tensor([7, 0, 0])}, ArgumentError, "0 to L = 6", "got 7")
    refused("sru_forward", call | {"lengths": torch.ones(3)}, DtypeError, "lengths", "float32", ".to(torch.int64)")
    refused("sru_forward", call | {"mask": torch.ones(6, 3).to(torch.complex64)}, DtypeError, "mask", ".to(torch.bool)")
    refused("sru_forward", call | {"x": torch.Tensor}, LibraryError, "x must be an array")
    refused("sru_forward", call | {"bias": [1.0]}, LibraryError, "bias must be a tensor", "torch.as_tensor(bias")
    with pytest.raises(TypeError, match="positional"):
        sru_rt.sru_forward(call["x"], call["weight"], None, None, None, 1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        sru_rt.sru_forward(call["x"], call["weight"], skip=1)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_dtypes_that_no_kernel_takes(dtype):
    call = converted(arguments("sru_forward"), tensor)
    call["x"] = call["x"].to(getattr(torch, dtype))
    refused("sru_forward", call, DtypeError, "x has dtype", dtype, "x.to(torch.float32)")


def test_dtypes_that_do_not_go_together():
    call = converted(arguments("sru_forward"), tensor)
    half = call | {"weight": call["weight"].half()}
    refused("sru_forward", half, DtypeError, "weight has dtype float16; it needs float32", "weight.to(torch.float32)")


@pytest.mark.parametrize("name", ["weight", "bias", "c0", "lengths", "mask"])
def test_tensors_on_different_devices(name):
    call = converted(arguments("sru_forward"), tensor)
    call[name] = call[name].to("meta")
    refused("sru_forward", call, LibraryError, name, "device meta", "cpu", f"{name}.to('cpu')")


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_tensors_without_plain_memory(kind):
    call = converted(arguments("sru_forward"), tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested ones are marked as experimental
        odd = call["x"].to_sparse() if kind == "sparse" else torch.nested.nested_tensor([call["x"][0]])
        refused("sru_forward", call | {"x": odd}, LibraryError, "x", kind, "dense")


def test_meta_tensors_give_meta_tensors():
    call = converted(arguments("sru_forward"), lambda a: tensor(a).to("meta"))
    call = {name: a.requires_grad_(a.is_floating_point()) for name, a in call.items()}
    h, c_last = sru_rt.sru_forward(**call)
    assert (h.device.type, h.shape, c_last.shape) == ("meta", (L, BATCH, D * SIZE), (D, BATCH, SIZE))
    h.sum().backward()
    assert call["weight"].grad.shape == call["weight"].shape
    refused("sru_forward", call | {"bias": call["bias"][..., 1:]}, ShapeError, "bias has shape")


@pytest.mark.parametrize("save", [True, 2, "x", torch.ones(2)])
def test_save_is_not_for_tensors(save):
    call = converted(arguments("sru_forward"), tensor)
    refused("sru_forward", call | {"save": save}, ArgumentError, "save=", "PyTorch", "backward()", "recompute=")


def test_options_that_mean_nothing():
    call = converted(arguments("sru_forward"), tensor)
    out = (torch.zeros(L, BATCH, D * SIZE), None)
    refused("sru_forward", call | {"out": out}, ArgumentError, "out=", "PyTorch")
    refused("sru_forward", call | {"saved_dtype": "float16"}, ArgumentError, "saved_dtype=", "PyTorch")
    assert not out[0].any()
    assert len(sru_rt.sru_forward(**call, save=False, out=None)) == 2
    for recompute in (-1, 0.0, 1.5, "y", None):
        with pytest.raises(ArgumentError, match="sru_forward: recompute must be"):
            binding.sru(**call, recompute=recompute)
    with pytest.raises(TypeError, match=r"sru\(\) got an unexpected keyword argument 'save'"):
        binding.sru(**call, save=True)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "mask"])
def test_mixed_with_numpy(name):
    call = converted(arguments("sru_forward"), tensor)
    call[name] = call[name].numpy()
    message = refused("sru_forward", call, LibraryError, "different libraries", "convert them to one")
    assert re.search(rf"\b{name} of numpy", message)
    other = arguments("sru_forward") | {name: tensor(arguments("sru_forward")[name])}
    assert re.search(rf"\b{name} of torch", refused("sru_forward", other, LibraryError, "different libraries"))


def test_for_the_backward_of_numpy_arrays():
    """The backward is one of NumPy arrays, as `save` is."""
    h, _, saved = sru_rt.sru_forward(**arguments("sru_forward"), save=True)
    call = {"saved": saved, "dh": torch.from_numpy(h)}
    refused("sru_backward", call, LibraryError, "dh must be an array", "torch", "numpy.asarray(dh)")


# ----------------------------------------------------------------------------------------------------------------------
# Initial values, signatures, imports


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low_rank", [None, 2])
def test_init(dtype, low_rank):
    options: dict[str, Any] = dict(low_rank=low_rank, dtype=dtype, rng=3)
    params = sru_rt.sru_init(4, 5, like=torch.zeros(1), **options)
    plain = sru_rt.sru_init(4, 5, **options)
    assert params.keys() == plain.keys()
    flat = [*(params["weight"] if low_rank else [params["weight"]]), params["bias"], params["v"]]
    assert all(type(a) is torch.Tensor and a.dtype == getattr(torch, dtype) for a in flat)
    wanted = [*(plain["weight"] if low_rank else [plain["weight"]]), plain["bias"], plain["v"]]
    assert_same_bits([array(a) for a in flat], wanted)
    h, _ = sru_rt.sru_forward(torch.zeros(L, BATCH, 4, dtype=getattr(torch, dtype)), **params)
    assert h.shape == (L, BATCH, 5)


def test_init_refuses():
    size = {"d_in": 4, "d": 5}
    refused("sru_init", size | {"dtype": torch.float32}, ArgumentError, "dtype", "'float32'", "torch.float32")
    for like in (torch, torch.Tensor, "torch"):
        refused("sru_init", size | {"like": like}, ArgumentError, "like must be an array")


def test_signatures_are_those_of_the_core():
    for name in CELLS:
        own = inspect.signature(getattr(binding, name)).parameters
        core = inspect.signature(getattr(sru_rt, f"{name}_forward")).parameters
        assert [n for n in core if n not in ("save", "saved_dtype", "out")] == [n for n in own if n != "recompute"]
        assert "recompute" in getattr(binding, name).__doc__


def test_the_binding_is_imported_when_a_tensor_comes(tmp_path):
    program = """
        import sys, sru_rt
        assert "torch" not in sys.modules
        import torch
        assert not [name for name in sys.modules if name.startswith("sru_rt.bindings")]
        x = torch.ones(3, 2, 4, requires_grad=True)
        h, _ = sru_rt.sru_forward(x, **sru_rt.sru_init(4, 4, rng=0, like=x))
        h.sum().backward()
        assert x.grad.any()
        assert "jax" not in sys.modules and "cupy" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Own cells


def flat(values: Any) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize("how", ["method", "function", "recompute"])
def test_own_cell(how):
    arrays, options = two_state_problem()
    h, last, saved = two_states.forward(**arrays, **options, save=True)
    wanted = two_states.backward(saved, np.sin(h), tuple(map(np.cos, last)))
    leaves = {name: tensor(value) for name, value in arrays.items()}
    for leaf in flat(leaves.values()):
        leaf.requires_grad_()
    if how == "method":
        got, states = two_states.forward(**leaves, **options)
    else:
        got, states = binding.own_cell(two_states, **leaves, **options, recompute=3 if how == "recompute" else False)
    assert isinstance(states, tuple)
    np.testing.assert_allclose(array(got), h, rtol=1e-12, atol=1e-13)
    torch.autograd.backward([got, *states], [tensor(np.sin(h)), *(tensor(np.cos(s)) for s in last)])
    for leaf, gradient in zip(flat(leaves.values()), flat(getattr(wanted, name) for name in leaves)):
        np.testing.assert_allclose(array(leaf.grad), gradient, rtol=1e-10, atol=1e-12)


def test_own_cell_with_one_state_missing():
    arrays, options = two_state_problem()
    arrays["c0"] = (arrays["c0"][0], None)
    wanted, _ = two_states.forward(**arrays, **options)
    got, _ = two_states.forward(**{name: tensor(value) for name, value in arrays.items()}, **options)
    np.testing.assert_allclose(array(got), wanted, rtol=1e-12, atol=1e-13)
