"""The operators of the PyTorch binding: what PyTorch checks of them, gradients of all orders, `vmap`, and GPUs."""

from __future__ import annotations

import types
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")

from sru_rt.bindings import torch as binding
from sru_rt.bindings.recompute import Recompute
from sru_rt.bindings.torch import autograd, native, ops, reference
from torch.autograd import gradcheck, gradgradcheck

import sru_rt
from emu import fake_cupy
from gpu_places import Way
from matrix import matrix
from own_problem import two_state_problem, two_states
from problems import (
    CELLS,
    FULL,
    LAYOUTS,
    SMOOTH_ROWS,
    Problem,
    all_rows,
    away_from_kinks,
    compare,
    covering,
    name_of,
)
from torch_tools import Recorder, array, differentiable, flat, operators, seed, tensor, torch

pytestmark = pytest.mark.usefixtures("new_plans")
poisoned = pytest.mark.usefixtures("poisoned_tensors")  # but where PyTorch looks at the memory of results

# L, B, d: odd ones, a single step
SMALL_SIZES = [(3, 2, 3), (4, 1, 5), (1, 2, 2), (2, 3, 1)]


def own_problem() -> dict[str, Any]:
    """Arguments of the own cell, of two states, as leaves of a graph."""
    arrays, options = two_state_problem()
    given = {name: tensor(value) for name, value in arrays.items()}
    for one in flat(given):
        one.requires_grad_()
    return given | options


def of_leaves(function: Any, given: dict[str, Any], **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """A function of tensors alone, flags and masks aside, and these."""
    leaves = tuple(one for one in flat(given) if one.requires_grad)

    def of(*tensors: Any) -> tuple[Any, ...]:
        values = {id(leaf): one for leaf, one in zip(leaves, tensors)}

        def put(value: Any) -> Any:
            return tuple(map(put, value)) if isinstance(value, tuple) else values.get(id(value), value)

        h, last = function(**{name: put(value) for name, value in given.items()}, **options)
        return h, *(last if isinstance(last, tuple) else [last])

    return of, leaves


# ----------------------------------------------------------------------------------------------------------------------
# What PyTorch checks of an operator: its schema, its gradient, its results without values, and that it can be traced

# Every option of every cell
CHECKED = [row for cell in CELLS.values() for row in covering(all_rows(cell), [(name,) for name in cell.factors])]


def check_operators(calls: list[tuple[Any, tuple[Any, ...]]], twice: bool = False) -> None:
    """`twice` says that the gradient of the backward is traced, too, which takes long: as many operations as steps."""
    for operator, arguments in calls:
        with_gradient = twice or operator is torch.ops.sru_rt.forward.default
        torch.library.opcheck(operator, tuple(leaf_of(value, with_gradient) for value in arguments))


def leaf_of(value: Any, with_gradient: bool) -> Any:
    if isinstance(value, list):
        return [leaf_of(one, with_gradient) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(with_gradient and value.is_floating_point())


@pytest.mark.parametrize("row", CHECKED, ids=name_of)
def test_operators_are_what_pytorch_wants(row):
    n = CHECKED.index(row)
    problem = Problem.make(row, (4, 3, 5), 1 + n % 2, list(LAYOUTS)[n % len(LAYOUTS)])
    calls = operators(problem.forward(), differentiable(problem))
    assert [operator.name() for operator, _ in calls] == ["sru_rt::forward", "sru_rt::backward"]
    check_operators(calls)


def test_operators_of_an_own_cell():
    check_operators(operators(binding.own_cell, own_problem() | {"cell": two_states, "recompute": 3}))


def test_the_gradient_of_the_backward_is_what_pytorch_wants():
    problem = Problem.make(FULL["mingru"] | {"dtype": "float64"}, (2, 2, 3), 1, "plain", state=True)
    check_operators(operators(problem.forward(), differentiable(problem)), twice=True)


def test_operator_that_keeps_nothing():
    """What is traced without a gradient, and differentiated after all."""
    problem = Problem.make(FULL["sru"] | {"dtype": "float32"}, (4, 3, 5), 2, "all")
    (forward, arguments), *_ = operators(problem.forward(), differentiable(problem))
    *arguments, keep = arguments
    assert keep
    assert not forward(*arguments, False)[2].numel()
    check_operators([(forward, (*arguments, False))])


# ----------------------------------------------------------------------------------------------------------------------
# Gradients of all orders


@pytest.mark.parametrize("row", matrix(SMOOTH_ROWS, every=4), ids=name_of)
@poisoned
def test_gradients_by_finite_differences(row):
    """Of the first order and the second, with every policy."""
    n = SMOOTH_ROWS.index(row)
    size, layout = SMALL_SIZES[n % 4], list(LAYOUTS)[n % len(LAYOUTS)]
    problem = away_from_kinks(row, size, 1 + n // 4 % 2, layout, layer=True)
    function, leaves = of_leaves(
        getattr(binding, row["cell"]), differentiable(problem), recompute=[False, 3, True, "x"][n // 2 % 4]
    )
    assert gradcheck(function, leaves, fast_mode=n % 3 > 0)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("recompute", [False, 2, "x"])
@poisoned
def test_gradients_of_an_own_cell_by_finite_differences(recompute):
    function, leaves = of_leaves(binding.own_cell, own_problem() | {"cell": two_states}, recompute=recompute)
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@poisoned
def test_gradients_without_steps():
    """The last state is the first one, through the gradient of the gradient, too."""
    problem = Problem.make(FULL["sru"] | {"dtype": "float64"}, (0, 2, 2), 2, "plain", state=True)
    given = differentiable(problem)
    _, last = sru_rt.sru_recurrence(**given)
    (first,) = torch.autograd.grad(last.pow(3).sum(), given["c0"], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), given["c0"])
    torch.testing.assert_close((first, second), (3 * given["c0"] ** 2, 6 * given["c0"]))


def penalties(function: Any, *given: Any) -> list[Any]:
    """Gradients of a gradient, and of that: nothing has one that is not a tensor of the function."""
    h, last = function()
    first = torch.autograd.grad(h.sum() + last.sum(), given, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), given, create_graph=True)
    third = torch.autograd.grad(sum(g.square().sum() for g in second), given)
    return [*first, *second, *third]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", FULL)
@poisoned
def test_gradient_penalty(name, traced):
    """As by PyTorch's own gradient of the same recurrence as a loop, where the gradient of h does not need one."""
    problem = Problem.make(FULL[name] | {"dtype": "float64"}, (4, 2, 3), 2, "all", state=True)
    (_, arguments), *_ = operators(problem.forward(), differentiable(problem))
    call, o = ops.split(arguments)
    o = tuple(leaf_of(t, True) for t in o)
    wanted_of = [t for t in o if t is not None and t.requires_grad]

    def fused() -> Any:
        u, c0, lengths, mask, reset, *arrays = o
        flags = {"lengths": lengths, "mask": mask, "reset": reset}
        h, last = autograd.recurrence(call.cell, u, arrays, c0, **flags, constants=call.constants)
        return h, last

    def plain() -> Any:
        h, last = reference.recurrence(call, o)
        return h.flatten(2), last

    with Recorder() if traced else nullcontext():
        got = penalties(fused, *wanted_of)
    for a, b in zip(got, penalties(plain, *wanted_of)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# vmap

# Where the batch is in each operand; None: all share it.
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
        if value.is_floating_point():
            return value + torch.from_numpy(rng.normal(size=value.shape))
        return value.clone()[torch.from_numpy(rng.permutation(len(value)))]

    return {
        name: torch.stack([other(value) for _ in range(n)], dims[name]) if name in dims else value
        for name, value in given.items()
    }


def vmap_problem() -> dict[str, Any]:
    problem = Problem.make(FULL["sru"] | {"dtype": "float64"}, (4, 3, 5), 2, "all", state=True)
    given = {name: tensor(value) for name, value in problem.given.items()}
    given |= {name: given[name].nan_to_num() for name in ("u", "x")}
    return given


def with_gradients(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """Results and gradients as one tuple of tensors, in terms of torch.func."""
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    flags = {name: value for name, value in tensors.items() if name not in floating}

    def of(floating: dict[str, Any]) -> Any:
        return sru_rt.sru_recurrence(**floating, **flags, **options)

    results, pullback = torch.func.vjp(of, floating)
    (gradients,) = pullback(tuple(seed(r) for r in results))
    return *results, *gradients.values()


def slices(tensors: dict[str, Any], dims: dict[str, int], i: int) -> dict[str, Any]:
    return {name: value.select(dims[name], i) if name in dims else value for name, value in tensors.items()}


@pytest.mark.parametrize("batch", BATCHES)
@poisoned
def test_vmap_is_a_loop(batch):
    dims, n = BATCHES[batch], 3
    given = stacked(vmap_problem(), dims, n, np.random.default_rng(0))
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    options = {name: value for name, value in given.items() if name not in tensors}
    in_dims = {name: dims.get(name) for name in tensors}
    got = torch.func.vmap(lambda t: with_gradients(t, options), in_dims=(in_dims,))(tensors)
    each = [with_gradients(slices(tensors, dims, i), options) for i in range(n)]
    for result, parts in zip(got, zip(*each)):
        torch.testing.assert_close(result, torch.stack(parts), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("inner", ["parameters", "lengths"])
@pytest.mark.parametrize("outer", ["u", "mask and reset"])
@poisoned
def test_vmap_of_vmap_is_a_loop_of_loops(outer, inner):
    rng = np.random.default_rng(1)
    given = stacked(stacked(vmap_problem(), BATCHES[inner], 2, rng), dict.fromkeys(BATCHES[outer], 0), 3, rng)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    options = {name: value for name, value in given.items() if name not in tensors}

    def of_one(t: dict[str, Any]) -> tuple[Any, ...]:
        return with_gradients(t, options)

    inner_dims = {name: BATCHES[inner].get(name) for name in tensors}
    outer_dims = {name: 0 if name in BATCHES[outer] else None for name in tensors}
    got = torch.func.vmap(torch.func.vmap(of_one, in_dims=(inner_dims,)), in_dims=(outer_dims,))(tensors)
    zeros = dict.fromkeys(BATCHES[outer], 0)
    rows = [[of_one(slices(slices(tensors, zeros, i), BATCHES[inner], j)) for j in range(2)] for i in range(3)]
    for n, result in enumerate(got):
        wanted = torch.stack([torch.stack([one[n] for one in row]) for row in rows])
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# GPUs: plans, scratch and addresses are those of the device, whose kernels run under the emulation where there is none

_STREAM = 0x770


@pytest.fixture
def device(place, monkeypatch):
    """Moves tensors to where the kernels of `place` run."""
    if place.name == "gpu":
        return lambda value: value.cuda() if isinstance(value, torch.Tensor) else value
    monkeypatch.setattr(native, "_gpu", lambda tensor: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(native, "_stream", lambda gpu: _STREAM)
    return lambda value: value


def on_gpu(problem: Problem, device: Any, every: int, time_parallel: bool) -> tuple[tuple[Any, Any], Any]:
    """Results and gradients, brought back."""
    given = {name: device(value) for name, value in differentiable(problem).items()}
    for name in problem.arrays:
        if given[name] is not None:
            given[name].retain_grad()
    save = Recompute(every)
    h, last = problem.forward()(**given, save=save, time_parallel=time_parallel)
    torch.autograd.backward([h, last], [device(tensor(problem.dh)), device(tensor(problem.dlast))])
    gradients = {n: None if given[n] is None else array(given[n].grad.cpu()) for n in problem.arrays}
    return (array(h.cpu()), array(last.cpu())), types.SimpleNamespace(**gradients)


GPU_CASES = [
    # row, dtype, (L, B, d), D, layout, K, SRU_RT_PLAN
    ("sru", {}, "float32", (9, 3, 34), 2, "all", 1, "chunk=2"),
    ("sru", {"v": "inputs", "dropout": True}, "float16", (70, 2, 6), 1, "reset", 32, ""),
    ("sru", {"v": "none", "kind": "no_skip"}, "bfloat16", (300, 2, 4), 2, "all", 32, "chunk=64"),
    ("sru", {"v": "none", "dropout": True}, "float32", (300, 2, 3), 2, "lengths", 1, ""),
    ("qrnn", {}, "float32", (300, 2, 3), 1, "all", 32, "chunk=40"),
    ("qrnn", {"form": "ifo-projected", "zoneout": "bool"}, "bfloat16", (9, 3, 7), 2, "mask", 1, "chunk=2"),
    ("mingru", {}, "float32", (300, 2, 3), 2, "all", 32, "chunk=32"),
    ("mingru", {"candidate": "positive"}, "float16", (300, 2, 4), 1, "plain", 1, ""),
    ("minlstm", {}, "float64", (300, 1, 3), 2, "lengths", 32, ""),
]


@pytest.mark.kernels
@pytest.mark.parametrize("time_parallel", [False, True])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: "-".join(map(str, (case[0], case[2], *case[5:]))))
@poisoned
def test_on_a_gpu(case, time_parallel, place, device, monkeypatch):
    name, options, dtype, size, D, layout, every, plan = case
    Way(plan if time_parallel else "").go(monkeypatch)
    problem = Problem.make(FULL[name] | options | {"dtype": dtype}, size, D, layout, state=True)
    compare(problem, *on_gpu(problem, device, every, time_parallel))
    if place.name == "emulated":
        kernels = {kernel for kernel, _, _ in fake_cupy.record.launches}
        assert {stream for _, _, stream in fake_cupy.record.launches} == {_STREAM}
        assert ("clear" in kernels) == time_parallel


@pytest.mark.kernels
@pytest.mark.parametrize("skip", ["auto", True])
@poisoned
def test_a_token_on_a_gpu(skip, place, device):
    """Without a gradient a kernel forms U; a product does, of a weight that is no matrix of rows, or with a mask."""
    rng, launches = np.random.default_rng(0), fake_cupy.record.launches
    params = sru_rt.sru_init(6, 6, rng=0, dtype="float64", project_skip=skip)
    given = {"x": rng.normal(size=(1, 3, 6)), **params, "c0": rng.normal(size=(1, 3, 6))}
    tensors = {n: device(torch.tensor(a)) if isinstance(a, np.ndarray) else a for n, a in given.items()}
    wanted = sru_rt.sru_forward(**given)
    flags = {"mask": device(torch.zeros(1, 3, dtype=torch.bool))}
    shifted = device(torch.zeros(19, dtype=torch.float64))[1:].view(1, 3, 6)  # at no multiple of 16 bytes
    shifted.copy_(tensors["x"])
    other = {"weight": device(tensors["weight"].transpose(2, 3).contiguous().transpose(2, 3))}
    with noted_products() as products:
        for change, n in (({}, 0), (flags, 1), (other, 1), ({"x": shifted}, 0), ({}, 0)):
            before, count = len(launches), len(products)
            found = sru_rt.sru_forward(**tensors | change)
            assert len(products) - count == n
            assert place.name == "gpu" or len(launches) - before == 1
            for one, of_arrays in zip(found, wanted):
                torch.testing.assert_close(one.cpu(), torch.tensor(of_arrays), rtol=1e-12, atol=1e-13)
        x = tensors["x"].requires_grad_()
        sru_rt.sru_forward(**tensors)[0].sum().backward()
        assert x.grad is not None and len(products) > 2


@pytest.mark.kernels
@poisoned
def test_steps_of_modules_on_a_gpu(device):
    """Those whose weights are matrices of rows have no products without a gradient."""
    x = device(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    for module in (binding.MinGRU(6, 6), binding.QRNN(6, 5), binding.MinLSTM(6, 7)):
        module = module.to(x.device)
        with noted_products() as products, torch.no_grad():
            found = module.step(x)
        assert not products
        wanted = module.step(x)  # which records
        for one, other in zip(found, wanted):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@contextmanager
def noted_products():
    """Notes down the products of eager layers while it is entered."""
    found, really = [], torch.mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda *a, **k: found.append(a) or really(*a, **k))
        yield found


@pytest.mark.kernels
@pytest.mark.parametrize("every", [1, 3])
@poisoned
def test_own_cell_on_a_gpu(every, device):
    leaves = own_problem()
    host = flat(leaves)
    function, _ = of_leaves(binding.own_cell, leaves | {"cell": two_states}, recompute=every)
    results = function(*map(device, host))
    torch.autograd.backward(results, [seed(r) for r in results])
    got = [r.detach().cpu() for r in results] + [t.grad for t in host]
    native._plans.clear()
    arrays, options = two_state_problem()
    h, last, saved = two_states.forward(**arrays, **options, save=True)
    wanted = two_states.backward(saved, array(seed(tensor(h))), tuple(array(seed(tensor(s))) for s in last))
    flat_wanted = flat({n: tensor(getattr(wanted, n)) for n in arrays})
    for a, b in zip(got, [*map(tensor, (h, *last)), *flat_wanted]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
