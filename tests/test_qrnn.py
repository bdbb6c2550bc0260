"""QRNN: the parameters of table 1 of the EMNLP paper, and documents packed into one sequence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import sru_rt
import tolerance


@pytest.mark.parametrize(("highway", "thousands"), [(False, 165), (True, 204)])
def test_parameter_counts_of_table_1(highway, thousands):
    """Two layers on word vectors of 300, d = 128. Only the first has a matrix for the skip, as sizes differ there."""
    layers = [sru_rt.qrnn_init(d_in, 128, highway=highway) for d_in in (300, 128)]
    counts = [params["weight"].size + params["bias"].size for params in layers]
    assert [params["weight"].shape[1] for params in layers] == [4 if highway else 3, 3]
    assert round(sum(counts) / 1000) == thousands
    x = np.random.default_rng(0).normal(size=(3, 2, 300)).astype(np.float32)
    for params in layers:
        x, _ = sru_rt.qrnn_forward(x, **params)
    assert x.shape == (3, 2, 128)


SIZES = (3, 1, 6)
STARTS = np.cumsum((0, *SIZES))


@pytest.mark.parametrize("form", [{}, {"highway": True}, {"pooling": "ifo", "highway": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_packed_documents_are_as_if_run_alone(window, D, dtype, form, backend):
    """Values and gradients: neither the state nor a tap crosses a boundary. Sequence 1 is one document."""
    L, B, d = sum(SIZES), 2, 5
    rng = np.random.default_rng(4)
    x, dh = (rng.normal(size=(L, B, D * d)).astype(dtype) for _ in range(2))
    params = sru_rt.qrnn_init(D * d, d, directions=D, window=window, dtype=dtype, rng=rng, **form)
    params["bias"] = rng.normal(size=params["bias"].shape).astype(dtype)
    reset = np.zeros((L, B), bool)
    reset[STARTS[1:-1], 0] = True

    def run(steps: slice, sequences: slice, **more: Any) -> tuple[np.ndarray, Any]:
        h, _, saved = sru_rt.qrnn_forward(x[steps, sequences], **params, save=True, **more)
        return h, sru_rt.qrnn_backward(saved, dh[steps, sequences])

    h, gradients = run(slice(None), slice(None), reset=reset)
    pieces = [(slice(a, b), slice(0, 1)) for a, b in itertools.pairwise(STARTS)] + [(slice(None), slice(1, 2))]
    summed = {"weight": 0.0, "bias": 0.0}
    for steps, sequences in pieces:
        alone, one = run(steps, sequences)
        tolerance.check("h", h[steps, sequences], alone.astype("f8"), tolerance.STEP[dtype])
        tolerance.check("dx", gradients.x[steps, sequences], one.x.astype("f8"), tolerance.LAYER[dtype])
        summed = {name: value + getattr(one, name).astype("f8") for name, value in summed.items()}
    for name, wanted in summed.items():
        tolerance.check(f"d{name}", getattr(gradients, name), wanted, tolerance.LAYER[dtype])


@pytest.mark.parametrize("D", [1, 2])
def test_a_tap_sees_what_came_before_it_in_its_direction(D):
    """The oldest tap alone, with x = 1, 2, 3, ... and gates that are open: h says which token each step saw."""
    L, window = 5, 3
    x = np.arange(1.0, L + 1).reshape(L, 1, 1) / 10
    weight = np.zeros((D, 2, 1, window))
    weight[:, 0, 0, 0] = 1
    bias = np.broadcast_to(np.array([[0.0], [-1e4]]), (D, 2, 1)).copy()  # f = 0
    h, _ = sru_rt.qrnn_forward(x, weight, bias, pooling="f", window=window)
    np.testing.assert_allclose(np.arctanh(h[:, 0, 0]) * 10, [0, 0, 1, 2, 3], atol=1e-12)
    if D == 2:
        np.testing.assert_allclose(np.arctanh(h[:, 0, 1]) * 10, [3, 4, 5, 0, 0], atol=1e-12)
