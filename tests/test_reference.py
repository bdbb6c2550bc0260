"""sru_rt against the reference implementation, PyPI's `sru` 2.6.0, on the CPU.

Both get the same parameters: a converter turns the reference's layout, of parameters and gradients, into
that of sru_rt. The reference runs twice, as it has two implementations: a loop in Python under autograd
(outputs and gradients) and compiled C++ without gradients (outputs). Where torch or `sru` is missing, or
`sru` cannot build its C++ code, every test here is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import sru_rt

MISSING = [name for name in ("torch", "sru") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# Largest difference over the largest magnitude of the array. float32: the same sums rounded in another order,
# through at most 21 steps. float64 rounds 2**29 times finer, which tells a different equation from rounding.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


class Option(NamedTuple):
    """One configuration; the defaults are those of the reference's cell."""

    directions: int = 1
    skip: str = "x"  # "x" (k = 3), "projected" (k = 4) or "none" (has_skip_term=False)
    tanh: bool = False
    v1: bool = False
    rescale: bool = True
    low_rank: int = 0
    padding: str = ""  # "", "mask" or "lengths"
    c0: bool = False
    dropout: float = 0.0
    highway_bias: float = 0.0
    dtype: str = "float32"
    size: tuple[int, int, int] = (9, 3, 5)  # L, B, d

    def __str__(self) -> str:
        defaults = Option()
        changed = [f"{n}={a}" for n, a, b in zip(self._fields, self, defaults, strict=True) if a != b]
        return ",".join(changed).replace(" ", "") or "defaults"


def options() -> list[Option]:
    """Every cell structure, then each further option with every skip and direction, then all at once."""
    skips = ("x", "projected", "none")
    further = [
        {"rescale": False},
        {"low_rank": 3},
        {"low_rank": 4, "v1": True},
        {"padding": "mask"},
        {"padding": "lengths", "tanh": True},
        {"c0": True},
        {"dropout": 0.4},
        {"highway_bias": -2.0},
        {"size": (21, 4, 33)},
        {"size": (1, 2, 8), "c0": True},
    ]
    everything = {"tanh": True, "padding": "mask", "c0": True, "dropout": 0.3, "highway_bias": -1.5}
    structures = list(itertools.product((1, 2), skips))
    cells = [Option(*s, tanh, v1) for s in structures for tanh in (False, True) for v1 in (False, True)]
    cells += [Option(*s, **more) for s in structures for more in further]
    cells += [Option(*s, **everything, low_rank=4, dtype=dtype) for s in structures for dtype in TOLERANCE]
    return cells


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """torch, and the reference's cell and recurrence; it builds its C++ code when first imported."""
    # ninja may lie beside a Python that runs without its environment being activated
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it has no CUDA
            import sru
            from sru.ops import elementwise_recurrence_naive
    except Exception as error:  # whatever a failing build raises
        pytest.skip(f"the reference cannot be imported or built: {type(error).__name__}: {error}")
    return SimpleNamespace(torch=torch, SRUCell=sru.SRUCell, recurrence=elementwise_recurrence_naive)


def agree(ours, theirs, dtype: str, what: str) -> None:
    """Same shape and dtype, and equal to the tolerance relative to the largest magnitude in `theirs`."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype == np.dtype(dtype), what
    assert np.isfinite(theirs).all() and np.abs(theirs).max() > 0, f"{what}: nothing to compare with"
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= TOLERANCE[dtype], f"{what}: relative difference {error:.2e}"


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def gate_rows(weight, cell) -> np.ndarray:
    """(n, D*d*k), column (q*d + j)*k + m -> (D, k, d, n): both the weight and its gradient."""
    weight = weight.detach().numpy()
    d, k = cell.hidden_size, cell.num_matrices
    return np.ascontiguousarray(weight.reshape(len(weight), -1, d, k).transpose(1, 3, 2, 0))


def by_direction(vector, cell) -> np.ndarray:
    """(2*D*d,), forget then reset -> (D, 2, d): bias, weight_c and their gradients."""
    return np.ascontiguousarray(vector.detach().numpy().reshape(2, -1, cell.hidden_size).swapaxes(0, 1))


def split_state(state, d: int) -> np.ndarray:
    """(B, D*d) -> (D, B, d): the state and its gradient."""
    state = state.detach().numpy() if hasattr(state, "detach") else state
    return np.ascontiguousarray(state.reshape(len(state), -1, d).swapaxes(0, 1))


def parameters(cell, of=lambda parameter: parameter) -> dict:
    """The cell's weight, bias and v in the layout of sru_rt; with `of` their gradients."""
    weight = gate_rows(of(cell.weight), cell)
    if cell.weight_proj is not None:
        weight = (weight, np.ascontiguousarray(of(cell.weight_proj).detach().numpy().T))
    v = None if cell.v1 else by_direction(of(cell.weight_c), cell)
    return {"weight": weight, "bias": by_direction(of(cell.bias), cell), "v": v}


def make_cell(reference: SimpleNamespace, option: Option):
    """The reference's cell, its biases moved away from their initial 0."""
    D, d = option.directions, option.size[2]
    n_in = D * d + 2 if option.skip == "projected" else D * d
    reference.torch.manual_seed(3)
    cell = reference.SRUCell(
        n_in,
        d,
        dropout=option.dropout,
        bidirectional=D == 2,
        n_proj=option.low_rank,
        use_tanh=option.tanh,
        highway_bias=option.highway_bias,
        has_skip_term=option.skip != "none",
        rescale=option.rescale,
        v1=option.v1,
    )
    cell.bias.data.add_(reference.torch.randn_like(cell.bias), alpha=0.5)
    # the reference ignores a low rank that it finds too large; no option may be lost that way
    assert (cell.weight_proj is not None) == bool(option.low_rank)
    assert cell.num_matrices == (4 if option.skip == "projected" else 3)
    return cell.to(getattr(reference.torch, option.dtype))


def make_inputs(option: Option, n_in: int) -> SimpleNamespace:
    """Random x, dh, dc, c0, dropout mask and padding, in the reference's layout."""
    L, B, d = option.size
    width = option.directions * d
    rng = np.random.default_rng(7)
    x, dh = normal(rng, (L, B, n_in), option.dtype), normal(rng, (L, B, width), option.dtype)
    dc, c0 = normal(rng, (2, B, width), option.dtype)
    keep = ((rng.random((B, width)) >= option.dropout) / (1 - option.dropout)).astype(option.dtype)
    lengths = rng.integers(0, L + 1, B)
    lengths[0] = L
    past_end = np.arange(L)[:, None] >= lengths
    pad = {"": None, "mask": rng.random((L, B)) < 0.3, "lengths": past_end}[option.padding]
    c0 = c0 if option.c0 else None
    return SimpleNamespace(x=x, dh=dh, dc=dc, c0=c0, keep=keep, pad=pad, lengths=lengths)


def run_reference(torch, cell, inputs: SimpleNamespace) -> SimpleNamespace:
    """Outputs and gradients of the reference's Python loop, in its layout; the cell keeps its own ones."""
    x = torch.from_numpy(inputs.x).requires_grad_()
    c0 = None if inputs.c0 is None else torch.from_numpy(inputs.c0).requires_grad_()
    pad = None if inputs.pad is None else torch.from_numpy(inputs.pad)
    cell.get_dropout_mask_ = lambda size, p: torch.from_numpy(inputs.keep)  # the mask it would draw itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about gradients on the CPU
        h, c = cell.train()(x, c0, pad)
    torch.autograd.backward([h, c], [torch.from_numpy(inputs.dh), torch.from_numpy(inputs.dc)])
    return SimpleNamespace(h=h, c=c, dx=x.grad, dc0=None if c0 is None else c0.grad)


def arguments(cell, option: Option, inputs: SimpleNamespace) -> dict:
    """What sru_forward needs beside x and the parameters."""
    B, d = option.size[1:]
    keywords: dict = {
        "alpha": float(cell.scale_x) if option.rescale else 1.0,
        "activation": "tanh" if option.tanh else "identity",
        "highway": option.skip != "none",
        "c0": None if inputs.c0 is None else split_state(inputs.c0, d),
    }
    if option.dropout:
        keywords["dropout_mask"] = inputs.keep.reshape(B, -1, d)
    if option.padding == "mask":
        keywords["mask"] = inputs.pad
    elif option.padding == "lengths":
        keywords["lengths"] = inputs.lengths
    return keywords


@pytest.mark.parametrize("option", options(), ids=str)
def test_outputs_and_gradients(reference, option):
    d, dtype = option.size[2], option.dtype
    cell = make_cell(reference, option)
    inputs = make_inputs(option, cell.input_size)
    theirs = run_reference(reference.torch, cell, inputs)
    expected = parameters(cell, of=lambda parameter: parameter.grad)

    keywords = parameters(cell) | arguments(cell, option, inputs)
    h, c_last, saved = sru_rt.sru_forward(inputs.x, **keywords, save=True)
    grads = sru_rt.sru_backward(saved, inputs.dh, split_state(inputs.dc, d))

    agree(h, theirs.h, dtype, "h")
    agree(c_last, split_state(theirs.c, d), dtype, "c_last")
    agree(grads.x, theirs.dx, dtype, "dx")
    agree(grads.bias, expected["bias"], dtype, "dbias")
    factors = zip(grads.weight, expected["weight"], strict=True) if option.low_rank else None
    for ours, want in factors or [(grads.weight, expected["weight"])]:
        agree(ours, want, dtype, "dweight")
    if option.v1:
        assert grads.v is None
    else:
        agree(grads.v, expected["v"], dtype, "dv")
    if option.c0:
        agree(grads.c0, split_state(theirs.dc0, d), dtype, "dc0")
    else:
        assert grads.c0 is None


CPP_OPTIONS = [o for o in options() if o.dtype == "float32" and not o.dropout]  # all that its C++ code can do


@pytest.mark.parametrize("option", CPP_OPTIONS, ids=str)
def test_outputs_without_gradients(reference, option):
    """The reference's C++ path in evaluation mode, against a forward pass that saves nothing."""
    torch, d = reference.torch, option.size[2]
    cell = make_cell(reference, option).eval()
    inputs = make_inputs(option, cell.input_size)
    x, c0, pad = (None if a is None else torch.from_numpy(a) for a in (inputs.x, inputs.c0, inputs.pad))
    with torch.no_grad():
        theirs_h, theirs_c = cell(x, c0, pad)

    L, B, D = *option.size[:2], option.directions
    out = np.full((L, B, D * d), np.nan, np.float32), np.full((D, B, d), np.nan, np.float32)
    sru_rt.sru_forward(inputs.x, **parameters(cell), **arguments(cell, option, inputs), out=out)
    agree(out[0], theirs_h, "float32", "h")
    agree(out[1], split_state(theirs_c, d), "float32", "c_last")


@pytest.mark.parametrize("k", (3, 4))
@pytest.mark.parametrize("directions", (1, 2))
def test_given_u_and_v_per_step(reference, directions, k):
    """What a custom producer of U and V feeds: the recurrence alone, with v of every step."""
    torch = reference.torch
    (L, B, d), D, alpha = (8, 3, 7), directions, 1.75
    rng = np.random.default_rng(11)
    u, v, x = normal(rng, (L, B, D, k, d)), normal(rng, (L, B, D, 2, d)), normal(rng, (L, B, D * d))
    bias, c0, dh, dc = (normal(rng, s) for s in ((D, 2, d), (D, B, d), (L, B, D * d), (D, B, d)))

    # theirs has the gates innermost, the bias (2, D, d), the state (B, D*d)
    axes = (u.swapaxes(3, 4), x, v.swapaxes(3, 4), bias.swapaxes(0, 1), c0.swapaxes(0, 1))
    leaves = [torch.from_numpy(a.copy()).requires_grad_() for a in axes]
    shapes = ((L, B, -1), (L, B, -1), (L, B, -1), (-1,), (B, -1))
    views = [leaf.reshape(shape) for leaf, shape in zip(leaves, shapes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about gradients on the CPU
        theirs_h, theirs_c = reference.recurrence(*views, 0, d, D == 2, True, torch.tensor([alpha]))
    dc_theirs = torch.from_numpy(dc.swapaxes(0, 1).reshape(B, D * d))
    torch.autograd.backward([theirs_h, theirs_c], [torch.from_numpy(dh), dc_theirs])

    h, c_last, saved = sru_rt.sru_recurrence(u, x if k == 3 else None, bias, v, c0, alpha=alpha, save=True)
    grads = sru_rt.sru_backward(saved, dh, dc)
    agree(h, theirs_h, "float32", "h")
    agree(c_last, split_state(theirs_c, d), "float32", "c_last")
    du, dx, dv, dbias, dc0 = (None if t.grad is None else t.grad.numpy() for t in leaves)
    agree(grads.u, du.swapaxes(3, 4), "float32", "du")
    agree(grads.v, dv.swapaxes(3, 4), "float32", "dv")
    agree(grads.bias, dbias.swapaxes(0, 1), "float32", "dbias")
    agree(grads.c0, dc0.swapaxes(0, 1), "float32", "dc0")
    if k == 3:
        agree(grads.x, dx, "float32", "dx")
    else:
        assert grads.x is None and dx is None


@pytest.mark.parametrize("skip", ("x", "projected", "none"))
def test_step(reference, skip):
    """Token by token, the state handed on, against the reference over the whole sequence."""
    option = Option(skip=skip, c0=True, tanh=True)
    cell = make_cell(reference, option).eval()
    inputs = make_inputs(option, cell.input_size)
    with reference.torch.no_grad():
        theirs_h, theirs_c = cell(reference.torch.from_numpy(inputs.x), reference.torch.from_numpy(inputs.c0))

    keywords = arguments(cell, option, inputs)
    c = keywords.pop("c0")
    rows = []
    for x in inputs.x:
        h, c = sru_rt.sru_step(x, **parameters(cell), c=c, **keywords)
        rows.append(h)
    agree(np.stack(rows), theirs_h, "float32", "h")
    agree(c, split_state(theirs_c, option.size[2]), "float32", "c")
