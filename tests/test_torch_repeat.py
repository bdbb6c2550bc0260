"""Calls of the core's functions on tensors like one before, which are not checked again."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import sru_rt
from problems import CELLS, FULL, Problem
from sru_rt import repeat
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError
from test_arrays import assert_same_bits
from test_repeat import remembered, two_states
from test_repeat_forms import ordinary
from torch_tools import differentiable, run, tensor, torch

__all__ = ["ordinary"]  # a fixture
pytestmark = pytest.mark.usefixtures("poisoned_tensors", "new_plans")

RNG = np.random.default_rng(0)


def drawn(*shape, dtype=torch.float32):
    return torch.from_numpy(RNG.normal(size=shape)).to(dtype)


def calls(ordinary):
    """How many calls were checked; the binding checks operands of new plans, too."""
    return sum(not name.startswith("recurrence of ") and not name.endswith("_init") for name in ordinary)


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("layout", ["plain", "mask", "reset"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_call_like_one_before_has_its_results_and_gradients(cell, dtype, D, layer, layout, ordinary):
    problem = Problem.make(FULL[cell] | {"dtype": dtype}, (5, 3, 7), D, layout, layer=layer, state=True)
    first, of_first = run(problem, problem.forward(layer))
    assert remembered() == 1 and calls(ordinary) == 1
    again, of_again = run(problem, problem.forward(layer))
    assert remembered() == 1 and calls(ordinary) == 1
    assert_same_bits(again, first)
    for name, value in problem.arrays.items():
        if value is not None:
            assert_same_bits([getattr(of_again, name)], [getattr(of_first, name)])
    # Other values in other places, without a gradient.
    other = {n: v * 0.5 if hasattr(v, "is_floating_point") else v for n, v in differentiable(problem).items()}
    other |= {n: tensor(v) for n, v in problem.options.items()}
    with torch.no_grad():
        found = problem.forward(layer)(**other)
    assert calls(ordinary) == 1 and not found[0].requires_grad
    repeat._repeats.clear()
    same(found, problem.forward(layer)(**{n: v.detach() if hasattr(v, "detach") else v for n, v in other.items()}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_token_like_one_before(cell, dtype, ordinary):
    params = getattr(sru_rt, f"{cell}_init")(6, 6, rng=0, like=torch.empty(0))
    params = {n: v.to(dtype) if hasattr(v, "to") and v.dim() == 4 else v for n, v in params.items()}
    params = {n: v.double() if hasattr(v, "to") and dtype == torch.float64 else v for n, v in params.items()}
    state = torch.ones(1, 3, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    step, x = getattr(sru_rt, f"{cell}_step"), drawn(3, 6, dtype=dtype)
    first = step(x, **params, **{CELLS[cell].state: state})
    again = step(x, **params, **{CELLS[cell].state: state})
    assert calls(ordinary) == 1
    assert again[0].shape == (3, 6) and again[1].shape == (1, 3, 6)
    same(again, first)


def test_a_cell_of_two_states_and_low_rank_weights(ordinary):
    x, weight, params = drawn(5, 2, 3), (drawn(1, 2, 3, 2), drawn(2, 3)), drawn(1, 1, 3)
    for states in (None, (drawn(1, 2, 3), None)):
        count = calls(ordinary)
        (h, first), (again, last) = (two_states.forward(x, weight, params, states) for _ in range(2))
        assert calls(ordinary) == count + 1 and torch.equal(h, again) and isinstance(last, tuple)
        same(last, first)


@pytest.mark.parametrize(
    "change",
    [
        {"u": lambda u: u[:4]},
        {"u": lambda u: u.double()},
        {"u": lambda u: u.transpose(0, 1).contiguous().transpose(0, 1)},
        {"u": lambda u: u.repeat_interleave(2, -1)[..., ::2]},
        {"u": lambda u: u[:1].expand(u.shape)},
        {"u": lambda u: u.to(torch.complex64).mul(-1j).conj().imag},
        {"h0": lambda h: None},
        {"h0": lambda h: h.flip(1)},
        {"candidate": lambda _: "positive"},
        {"mask": lambda _: torch.eye(5, 3).bool()},
        {"mask": lambda _: torch.eye(5, 3)},
        {"lengths": lambda _: [1, 2, 3]},
        {"lengths": lambda _: torch.tensor([1, 2, 3])},
    ],
)
def test_what_differs_is_another_call(change):
    given = {"u": drawn(5, 3, 1, 2, 7), "h0": drawn(1, 3, 7)}
    for _ in range(2):
        sru_rt.mingru_recurrence(**given)
    changed = given | {name: make(given.get(name)) for name, make in change.items()}
    if changed["u"].dtype == torch.float64:
        changed["h0"] = changed["h0"].double()
    found = [sru_rt.mingru_recurrence(**changed) for _ in range(2)]
    repeat._repeats.clear()
    plain = {
        n: v.clone(memory_format=torch.contiguous_format) if hasattr(v, "clone") else v for n, v in changed.items()
    }
    wanted = sru_rt.mingru_recurrence(**plain)
    same(found[0], wanted)
    same(found[1], wanted)


def test_tensors_of_any_order_after_contiguous_ones():
    """x is side by side, (L, B, D*d), where kernels have directions apart, and a mask is read as it lies."""
    u, mask = drawn(5, 3, 2, 3, 4), torch.eye(5, 3).bool()
    sru_rt.sru_recurrence(u, drawn(5, 3, 8), mask=mask)
    assert remembered() == 1
    for x in (drawn(5, 3, 16)[..., ::2], drawn(3, 5, 8).transpose(0, 1), drawn(1, 3, 8).expand(5, 3, 8)):
        found = sru_rt.sru_recurrence(u, x, mask=torch.eye(3, 5).bool().t())
        assert remembered() == 1
        repeat._repeats.clear()
        same(found, sru_rt.sru_recurrence(u, x.contiguous(), mask=mask))


def test_names_count_where_layouts_are_the_same():
    u, x, one, other = drawn(5, 3, 1, 3, 7), drawn(5, 3, 7), drawn(1, 2, 7), drawn(1, 2, 7)
    wanted = sru_rt.sru_recurrence(u, x, bias=one, v=other), sru_rt.sru_recurrence(u, x, v=one, bias=other)
    assert remembered() == 2 and not torch.equal(wanted[0][0], wanted[1][0])
    same(wanted[0], sru_rt.sru_recurrence(u, x, one, other))
    same(wanted[1], sru_rt.sru_recurrence(u, x, v=one, bias=other))
    same(wanted[0], sru_rt.sru_recurrence(u, x, v=other, bias=one))


def test_one_tensor_in_two_places():
    x, weight, ones = drawn(3, 2, 4), drawn(1, 3, 4, 4), torch.ones(1, 2, 4)
    sru_rt.sru_forward(x, weight, ones, ones)  # bias and v are one tensor, where it was seen first
    assert remembered() == 0
    found = sru_rt.sru_forward(x, weight, ones, 2 * ones)
    repeat._repeats.clear()
    same(found, sru_rt.sru_forward(x, weight, ones.clone(), 2 * ones))


def test_the_value_of_a_number_in_a_tensor_counts():
    u, x = torch.ones(2, 1, 1, 3, 4), torch.ones(2, 1, 4)
    for alpha in (1.0, 2.0, 3.0):
        same(sru_rt.sru_recurrence(u, x, alpha=torch.tensor(alpha)), sru_rt.sru_recurrence(u, x, alpha=alpha))


def test_bad_calls_after_good_ones_are_refused():
    u, h0 = torch.zeros(5, 3, 1, 2, 7), torch.zeros(1, 3, 7)
    for _ in range(2):
        sru_rt.mingru_recurrence(u, None, h0)
    for bad, error in (
        ({"h0": h0[:, :2]}, ShapeError),
        ({"h0": h0.double()}, DtypeError),
        ({"h0": h0.numpy()}, LibraryError),
        ({"h0": h0.to_sparse()}, LibraryError),
        ({"h0": h0.to("meta")}, LibraryError),
        ({"lengths": torch.tensor([6, 0, 0])}, ArgumentError),
        ({"candidate": "nonsense"}, ArgumentError),
        ({"save": True}, ArgumentError),
        ({"out": (u, h0)}, ArgumentError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                sru_rt.mingru_recurrence(**({"u": u, "h0": h0} | bad))
    assert remembered() == 1


def test_lengths_are_looked_at_each_time():
    u, lengths = torch.zeros(5, 3, 1, 2, 7), torch.tensor([5, 0, 2])
    for _ in range(2):
        sru_rt.mingru_recurrence(u, lengths=lengths)
    lengths[1] = 6
    with pytest.raises(ArgumentError, match="lengths"):
        sru_rt.mingru_recurrence(u, lengths=lengths)


def test_what_is_remembered_is_not_for_autocast_or_transformations():
    x, params = drawn(5, 3, 7), sru_rt.sru_init(7, 7, rng=0, like=torch.empty(0))

    def loss(x):
        h, c = sru_rt.sru_forward(x, **params)
        return h.square().sum() + c.sum()

    h, _ = sru_rt.sru_forward(x, **params)
    assert remembered() == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = sru_rt.sru_forward(x, **params)
        assert low.dtype == torch.bfloat16 and remembered() == 1
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    several = torch.func.vmap(loss)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(several, torch.stack([loss(x), loss(2 * x)]))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))
    assert torch.equal(sru_rt.sru_forward(x, **params)[0], h)


def test_calls_under_autocast_are_not_remembered():
    x, params = drawn(5, 3, 7), sru_rt.sru_init(7, 7, rng=0, like=torch.empty(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sru_rt.sru_forward(x, **params)
    assert remembered() == 0
    assert sru_rt.sru_forward(x, **params)[0].dtype == torch.float32


def test_no_tensor_is_held():
    u, x = drawn(5, 3, 1, 3, 7), drawn(5, 3, 7)
    found = sru_rt.sru_recurrence(u, x)
    assert remembered() == 1
    held = [weakref.ref(t) for t in (u, x, *found)]
    del u, x, found
    gc.collect()
    assert [ref() for ref in held] == [None] * 4
