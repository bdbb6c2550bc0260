"""The products of layers in PyTorch, by each of its libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sru_rt import processor
from torch_tools import torch

pytestmark = pytest.mark.usefixtures("new_plans")

from sru_rt.bindings.torch import QRNN, SRUCell, native, products

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
WAYS = [False, pytest.param(True, marks=needs_onednn)]


@pytest.fixture(params=WAYS, ids=["usual", "oneDNN"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All products by oneDNN, or none."""
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "_WORTH_ONEDNN", 0)
    monkeypatch.setattr(native, "_WORTH_TURNING", 0)
    return request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that oneDNN is given."""
    found: list[Any] = []
    onednn = products._onednn

    def noted(a: Any, b: Any, rest: Any = None) -> Any:
        found.append((tuple(a.shape), tuple(b.shape), rest is not None))
        return onednn(a, b, rest)

    monkeypatch.setattr(products, "_onednn", noted)
    return found


def near(found: Any, expected: Any) -> None:
    assert found.is_contiguous()
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reused", [0, 1 << 20], ids=["in pieces", "at once"])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_float64(by_onednn, calls, reused, turned, monkeypatch):
    monkeypatch.setattr(products, "_REUSED", reused)
    monkeypatch.setattr(products, "_PIECE", 5 * 24 * 4)
    monkeypatch.setattr(products, "_ROWS_SUMMED", 8)
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(size, generator=generator) for size in [(23, 9), (9, 24), (23, 24)])
    if turned:
        b = b.t().contiguous().t()
    near(products.times(a, b), a.double() @ b.double())
    near(products.transposed_times(a, c), a.double().t() @ c.double())
    expected = c.double() + a.double() @ b.double()
    near(products.add_times(c, a, b), expected)
    # 23 rows are five pieces of up to five, and three sums of up to eight.
    times = [(23, 9)] if reused else [(5, 9)] * 4 + [(3, 9)]
    sums = [((9, 8), False), ((9, 8), True), ((9, 7), True)]
    if by_onednn:
        assert [(shape, adds) for shape, _, adds in calls] == [
            *((shape, False) for shape in times),
            *sums,
            *((shape, True) for shape in times),
        ]
    else:
        assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_usual_way(by_onednn, calls, dtype):
    a, b = torch.ones(4, 3, dtype=dtype), torch.ones(3, 5, dtype=dtype)
    assert products.times(a, b).dtype == products.transposed_times(b, b).dtype == dtype
    assert products.add_times(torch.ones(4, 5, dtype=dtype), a, b)[0, 0] == 4
    assert not calls


@needs_onednn
def test_onednn_is_left_alone_where_it_is_turned_off(calls, monkeypatch):
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    a, b = torch.ones(4, 3), torch.ones(3, 5)
    products.times(a, b)
    assert not calls  # too small
    monkeypatch.setattr(products, "_WORTH_ONEDNN", 0)
    with torch.backends.mkldnn.flags(enabled=False):
        products.times(a, b)
    assert not calls
    products.times(a, b)
    assert len(calls) == 1


@needs_onednn
@pytest.mark.parametrize(
    ("vendor", "mkl", "width", "expected"),
    [
        ("AuthenticAMD", True, "AVX512", True),
        ("GenuineIntel", True, "AVX512", False),
        ("AuthenticAMD", False, "AVX512", False),
        ("AuthenticAMD", True, "AVX2", False),
        (None, True, "AVX512", False),
    ],
)
def test_where_onednn_is_faster(vendor, mkl, width, expected, monkeypatch):
    monkeypatch.setattr(processor, "described", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    kept: list[bool] = []
    monkeypatch.setattr(products, "_keep_freed_memory", lambda: kept.append(True))
    assert products._onednn_is_faster.__wrapped__() is expected
    assert bool(kept) is expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: SRUCell(24, 24),
        lambda: SRUCell(20, 24, bidirectional=True),
        lambda: SRUCell(20, 24, n_proj=7),
        lambda: QRNN(20, 24, window=2),
    ],
    ids=["highway", "projected highway, two directions", "low rank", "QRNN"],
)
def test_layers_and_their_gradients(by_onednn, calls, make):
    torch.manual_seed(2)
    layer = make()
    exact = make().double()
    exact.load_state_dict(layer.state_dict())
    size = layer.input_size
    x = torch.randn(9, 3, size)
    results = []
    for module, given in ((layer, x), (exact, x.double())):
        given.requires_grad_()
        h = module(given)[0]
        wanted = [given, *module.parameters()]
        first = torch.autograd.grad(h.square().sum(), wanted, create_graph=True)
        again = torch.autograd.grad(first[0].square().sum(), wanted, allow_unused=True)
        h = module(given)[0]
        h.square().sum().backward()
        results.append([h, *first, *again, *(w.grad for w in wanted)])
    assert bool(calls) == by_onednn
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            scale = float(expected.detach().abs().max()) + 1e-30
            np.testing.assert_allclose(found.detach().double() / scale, expected.detach() / scale, atol=2e-5)


def test_the_processor_is_described(tmp_path, monkeypatch):
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: A: B\nflags\t\t: fpu vme\n\nprocessor\t: 1\n"
    monkeypatch.setattr(processor.Path, "read_text", lambda self, **options: text)
    found = processor.described.__wrapped__()
    assert found == {"processor": "0", "vendor_id": "AuthenticAMD", "model name": "A: B", "flags": "fpu vme"}

    def missing(self: Any, **options: Any) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(processor.Path, "read_text", missing)
    assert processor.described.__wrapped__() == {}


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "PyTorch"])
def test_tensors_are_turned(compiled, monkeypatch):
    monkeypatch.setenv("SRU_RT_CPU", "compiled" if compiled else "numpy")
    large = torch.arange(3 * 40 * 50.0).view(3, 40, 50)
    zeros = torch._efficientzerotensor((3, 40, 50))
    others = [large[0], large[:, :, 1:], large[:1, :2, :3], large.double(), large.bfloat16()]
    for a in (large, torch._neg_view(large), zeros, *others):
        found = native.turned(a)
        assert found.is_contiguous() and torch.equal(found, a.transpose(-1, -2))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_a_layer_turns_has_the_bits_of_copies(by_onednn, bidirectional, monkeypatch):
    cell = SRUCell(40 * (1 + bidirectional), 40, bidirectional=bidirectional)
    x = torch.randn(50, 3, cell.input_size).requires_grad_()
    shapes: list[Any] = []

    def results() -> list[Any]:
        h = cell(x)[0]
        return [h, *torch.autograd.grad(h.square().sum(), [x, *cell.parameters()])]

    def by_copies(*arguments: Any) -> bool:
        shapes.append(arguments[2:5])
        return False

    found = results()
    monkeypatch.setattr(native.turn, "turn", by_copies)
    for one, other in zip(found, results(), strict=True):
        assert torch.equal(one, other)
    n = cell.input_size * (1 + bidirectional)
    of_x = [(1, 150, cell.input_size)] if by_onednn else []
    assert shapes == [(n, 40, 3), *of_x, (n, 3, 40)]
