"""What must agree to the last bit: repetition, memory policies, threads, single steps, other sequences in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sru_rt

L, B, d = 19, 5, 37
OPTIONS = [
    {},
    {"activation": "tanh", "reset_on": "current"},
    {"highway": False},
]


def problem(dtype: str, D: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    params = sru_rt.sru_init(D * d, d, directions=D, rng=rng, dtype=dtype)
    c0 = rng.normal(size=(D, B, d)).astype("f8" if dtype == "float64" else "f4")
    lengths = rng.integers(0, L + 1, B)
    reset = rng.random((L, B)) < 0.15
    x = rng.normal(size=(L, B, D * d)).astype(params["weight"].dtype)
    return {"x": x, **params, "c0": c0, "lengths": lengths, "reset": reset}


def backward(saved: Any, like: np.ndarray) -> Any:
    rng = np.random.default_rng(1)
    dh = rng.normal(size=like.shape).astype(like.dtype)
    return sru_rt.sru_backward(saved, dh)


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_same(a: Any, b: Any) -> None:
    for name in a:
        assert getattr(a, name) is None or same_bits(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_memory_policies_give_the_same_bits(dtype, D, options, backend):
    given = problem(dtype, D) | options
    h, c_last, saved = sru_rt.sru_forward(**given, save=True)
    wanted = backward(saved, h)
    for save in (True, 2, 7, 100, "x"):
        other, other_last, saved = sru_rt.sru_forward(**given, save=save)
        assert same_bits(h, other) and same_bits(c_last, other_last), save
        assert_same(wanted, backward(saved, h))


@pytest.mark.parametrize("D", [1, 2])
def test_threads_give_the_same_bits(D, monkeypatch):
    from sru_rt import launch

    monkeypatch.setenv("SRU_RT_CPU", "compiled")
    monkeypatch.setattr(launch, "_ELEMENTS_PER_TASK", 1)
    results = []
    for threads in (1, 2, 3, 7, 64):
        monkeypatch.setenv("SRU_RT_NUM_THREADS", str(threads))
        h, c_last, saved = sru_rt.sru_forward(**problem("float32", D), save=True)
        results.append((h, c_last, backward(saved, h)))
    for h, c_last, gradients in results[1:]:
        assert same_bits(h, results[0][0]) and same_bits(c_last, results[0][1])
        assert_same(results[0][2], gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_step_is_the_same_token_in_a_sequence(dtype, options, backend):
    """Given the same U: the products of a batch of tokens may round otherwise than those of one token."""
    rng = np.random.default_rng(3)
    params = sru_rt.sru_init(d, d, rng=rng, dtype=dtype)
    kind = params["weight"].dtype
    params["weight"] = np.round(params["weight"].astype("f4") * 8).astype(kind)  # products are exact in any order
    params["weight"][:, :, :, 4:] = 0
    x = np.round(rng.normal(size=(L, B, d)) * 4).astype(kind)
    h, c_last = sru_rt.sru_forward(x, **params, **options)
    c = None
    for t in range(L):
        h_t, c = sru_rt.sru_step(x[t], c=c, **params, **options)
        assert same_bits(h_t, h[t]), t
    assert same_bits(c, c_last)


@pytest.mark.parametrize("D", [1, 2])
def test_a_sequence_does_not_depend_on_the_others(D, backend):
    rng = np.random.default_rng(4)
    u = rng.normal(size=(L, B, D, 3, d)).astype("f4")
    x = rng.normal(size=(L, B, D * d)).astype("f4")
    v = rng.normal(size=(D, 2, d)).astype("f4")
    h, c_last = sru_rt.sru_recurrence(u, x, v=v)
    for b in range(B):
        one, one_last = sru_rt.sru_recurrence(u[:, b : b + 1], x[:, b : b + 1], v=v)
        assert same_bits(np.ascontiguousarray(h[:, b : b + 1]), one)
        assert same_bits(np.ascontiguousarray(c_last[:, b : b + 1]), one_last)


def test_states_in_16_bits_cost_half_the_memory_and_little_accuracy():
    given = problem("bfloat16", 1)
    h, _, wide = sru_rt.sru_forward(**given, save=True)
    other, _, narrow = sru_rt.sru_forward(**given, save=True, saved_dtype="bfloat16")
    assert same_bits(h, other), "the state itself is carried in float32"
    assert narrow.nbytes == wide.nbytes - 2 * L * B * d
    a, b = backward(wide, h), backward(narrow, h)
    for name in ("x", "weight", "bias", "v"):
        wanted, got = getattr(a, name).astype("f4"), getattr(b, name).astype("f4")
        assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max(), name
    assert any(not same_bits(getattr(a, n), getattr(b, n)) for n in ("x", "weight", "bias", "v"))


def test_memory_kept_for_the_backward():
    """U and 4/K bytes an element beyond x with save=K, 4/32 alone with save="x"."""
    L, B, d = 256, 4, 64
    x = np.zeros((L, B, d), "f4")
    params = sru_rt.sru_init(d, d, rng=0)
    kept = {save: sru_rt.sru_forward(x, **params, save=save)[2].nbytes for save in (True, 16, 32, "x")}
    elements, fixed = L * B * d, sum(params[name].nbytes for name in ("weight", "bias", "v"))
    assert kept[True] - fixed == elements * (4 + 3 * 4 + 4)
    assert kept[16] - fixed == elements * (4 + 3 * 4) + elements * 4 // 16
    assert kept["x"] - fixed == elements * 4 + elements * 4 // 32
