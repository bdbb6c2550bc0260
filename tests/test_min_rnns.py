"""minGRU and minLSTM in linear space: as exact as float32 is over 65,536 steps, finite where gates saturate, and equal
to the authors' form in log space, which is neither."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import oracle
import tolerance
from problems import CELLS, DTYPES

MIN_RNNS = pytest.mark.parametrize("cell", ["mingru", "minlstm"])
GATES = {"mingru": 2, "minlstm": 3}

# ----------------------------------------------------------------------------------------------------------------------
# Long sequences


def in_log_space(cell: str, u: np.ndarray) -> np.ndarray:
    """h of candidate="positive" from state 0 as in the paper's appendix: a parallel scan of logarithms.

    h[t] = a[t]*h[t-1] + b[t] has log h = A + logcumsumexp(log b - A), where A is the cumulative sum of log a. All is in
    the dtype of u, (L, gates, d).
    """
    n = u[:, -1]
    log_g = np.where(n >= 0, np.log(np.maximum(n, 0) + u.dtype.type(0.5)), -softplus(-n))
    if cell == "mingru":
        log_a, log_take = -softplus(u[:, 0]), -softplus(-u[:, 0])
    else:
        difference = softplus(-u[:, 0]) - softplus(-u[:, 1])
        log_a, log_take = -softplus(difference), -softplus(-difference)
    A = np.cumsum(log_a, axis=0)
    return np.exp(A + np.logaddexp.accumulate(log_take + log_g - A, axis=0))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, x.dtype.type(0))


@MIN_RNNS
def test_float32_over_65536_steps(cell):
    """The state forgets its own errors at the rate at which it forgets; a sum of logarithms keeps them all."""
    L, B, d = 65_536, 1, 8
    u = np.random.default_rng(1).normal(size=(L, B, 1, GATES[cell], d)).astype(np.float32)
    recurrence = CELLS[cell].library("recurrence")
    wanted, wanted_last = recurrence(u.astype(np.float64), candidate="positive")
    h, h_last = recurrence(u, candidate="positive")
    ours = max(oracle.relative_error(h, wanted), oracle.relative_error(h_last, wanted_last))
    exact = in_log_space(cell, u[:, 0, 0].astype(np.float64))[:, None]
    theirs = oracle.relative_error(in_log_space(cell, u[:, 0, 0])[:, None], wanted)
    assert oracle.relative_error(exact, wanted) < 1e-9, "the form in log space is another recurrence"
    assert ours <= 1e-6 and theirs > 100 * ours, (ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Saturated gates

EXTREMES = {"float16": (1e4, 6e4), "bfloat16": (100, 1e4), "float32": (100, 1e4), "float64": (100, 1e4)}


def saturated(cell: str, dtype: str) -> np.ndarray:
    """u (L, B, 1, k, d) in which every combination of extreme gates and of a few candidates has a step of its own."""
    values = [sign * size for size in EXTREMES[dtype] for sign in (-1, 1)]
    grids = np.meshgrid(*[values] * (GATES[cell] - 1), [-3.0, -1.0, 0.5, 2.0], indexing="ij")
    steps = np.stack([grid.reshape(-1) for grid in grids], axis=-1)
    steps = np.concatenate([steps, np.random.default_rng(2).permutation(steps)])
    return steps.reshape(-1, 1, 1, GATES[cell], 1).astype(DTYPES[dtype])


@pytest.mark.parametrize("candidate", ["identity", "positive"])
@pytest.mark.parametrize("dtype", DTYPES)
@MIN_RNNS
def test_saturated_gates_are_finite_and_right(cell, dtype, candidate, backend):
    u = saturated(cell, dtype)
    rng, state = np.random.default_rng(3), np.float64 if dtype == "float64" else np.float32
    h0, dh_last = np.ones((1, 1, 1), state), np.ones((1, 1, 1), state)
    bias, dh = np.zeros((1, GATES[cell], 1), state), rng.normal(size=(len(u), 1, 1)).astype(u.dtype)
    h, h_last, saved = CELLS[cell].library("recurrence")(u, bias, h0, candidate=candidate, save=True)
    gradients = CELLS[cell].library("backward")(saved, dh, dh_last)
    wanted = CELLS[cell].oracle("recurrence")(u, bias, h0, candidate=candidate)
    slopes = CELLS[cell].oracle("recurrence_backward")(u, bias, h0, candidate=candidate, dh=dh, dh_last=dh_last)
    tolerance.check("h", h, wanted[0], tolerance.STEP[dtype])
    tolerance.check("h_last", h_last, wanted[1], tolerance.STEP[np.dtype(state).name])
    tolerance.check("du", gradients.u, slopes["u"], tolerance.STEP[dtype])
    tolerance.check("dbias", gradients.bias, slopes["bias"], tolerance.SUM[np.dtype(state).name])
    tolerance.check("dh0", gradients.h0, slopes["h0"], tolerance.SUM[np.dtype(state).name])


@pytest.mark.parametrize("dtype", DTYPES)
@MIN_RNNS
def test_a_step_with_saturated_gates_is_finite_and_right(cell, dtype, backend):
    """The gates are the token itself, as the weight is 1 and the token has as many values."""
    u = saturated(cell, dtype)[:, 0, 0, :, 0]
    weight = np.eye(GATES[cell], dtype=u.dtype).reshape(1, GATES[cell], 1, GATES[cell])
    h0 = np.ones((1, len(u), 1), np.float64 if dtype == "float64" else np.float32)
    h, h_last = CELLS[cell].library("step")(u, weight, h=h0)
    wanted, _ = CELLS[cell].oracle("forward")(u[None], weight, h0=h0)
    tolerance.check("h", h, wanted[0], tolerance.STEP[dtype])
    assert np.isfinite(h_last).all()


def test_equal_gates_of_minlstm_share_alike_however_small(backend):
    """F and I are 0 in every float, but F/(F + I) is 1/2, and s(uf - ui) next to it."""
    u = np.array([[-1e4, -1e4, 1], [-1e4 + 1, -1e4, 1], [1e4, 1e4, 1]], np.float32).reshape(1, 3, 1, 3, 1)
    h, _ = CELLS["minlstm"].library("recurrence")(u)
    np.testing.assert_allclose(h.ravel(), [0.5, 1 / (1 + math.e), 0.5], rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The PyPI package minGRU-pytorch


@pytest.mark.parametrize("L", [1, 2, 33])
@MIN_RNNS
def test_agrees_with_mingru_pytorch(cell, L):
    """In float64, values and gradients; its linear layer gives the candidate first, where we have it last."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("minGRU_pytorch", reason="needs the PyPI package minGRU-pytorch")
    B, size = 3, 6
    torch.manual_seed(0)
    if cell == "mingru":
        module, linear, order = theirs.minGRU(size), "to_hidden_and_gate", [1, 0]
    else:
        from minGRU_pytorch.minLSTM import minLSTM

        module, linear, order = minLSTM(size), "to_hidden_and_f_i_gate", [1, 2, 0]
    module = module.double()
    matrix = getattr(module, linear).weight
    x = torch.randn(B, L, size, dtype=torch.float64, requires_grad=True)
    out = module(x)
    dh = torch.randn_like(out)
    out.backward(dh)

    def ours(array: Any) -> np.ndarray:
        return np.ascontiguousarray(array.detach().numpy().reshape(-1, size, size)[order][None])

    def time_major(array: Any) -> np.ndarray:
        return np.ascontiguousarray(array.detach().numpy().swapaxes(0, 1))

    forward, backward = CELLS[cell].library("forward"), CELLS[cell].library("backward")
    h, _, saved = forward(time_major(x), ours(matrix), candidate="positive", save=True)
    gradients = backward(saved, time_major(dh))
    tolerance.check("h", h, time_major(out), 1e-12)
    tolerance.check("dx", gradients.x, time_major(x.grad), 1e-11)
    tolerance.check("dweight", gradients.weight, ours(matrix.grad), 1e-11)
