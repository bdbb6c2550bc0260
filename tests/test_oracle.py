"""The oracle against hand-worked values, finite differences and invariants: why it may judge the rest."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle

L, B, d = 5, 3, 2

# k and the options that select each form of the cell.
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "skip_x": (3, {"alpha": 1.7}),
    "skip_projected": (4, {}),
    "no_highway": (3, {"highway": False}),
    "no_reset_gate": (2, {"reset_gate": False}),
}
CELLS = [
    pytest.param(form, activation, reset_on, id=f"{form}-{activation}-{reset_on}")
    for form, activation, reset_on in itertools.product(FORMS, ("identity", "tanh", "relu"), ("previous", "current"))
    if form != "no_reset_gate" or reset_on == "previous"
]
LAYOUTS = [
    "none",
    *("+".join(c) for n in (1, 2, 3) for c in itertools.combinations(("lengths", "mask", "reset"), n)),
]
DIRECTIONS = pytest.mark.parametrize("D", [1, 2], ids=["one_direction", "two_directions"])
PADDED = pytest.mark.parametrize("layout", ["lengths", "mask", "lengths+mask", "lengths+mask+reset"])


def case(
    form: str,
    D: int,
    layout: str = "none",
    *,
    v: str = "constant",
    dropout: bool = True,
    seed: int = 0,
    **more: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of sru_recurrence and its options."""
    rng = np.random.default_rng(seed)
    k, options = FORMS[form]
    inputs = oracle.random_inputs(rng, L, B, d, D=D, k=k, v=v)
    inputs = {"u": oracle.project(inputs["x"], inputs.pop("weight")), **inputs}
    if form != "skip_x":
        inputs["x"] = None
    names = () if layout == "none" else layout.split("+")
    options = {**options, **oracle.random_layout(rng, L, B, **dict.fromkeys(names, True)), **more}
    if dropout:
        options["dropout_mask"] = (rng.random((B, D, d)) < 0.7) / 0.7
    return inputs, options


def cotangents(D: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"dh": rng.standard_normal((L, B, D * d)), "dc_last": rng.standard_normal((D, B, d))}


def loss(outputs: tuple[np.ndarray, np.ndarray], dh: np.ndarray, dc_last: np.ndarray) -> float:
    h, c_last = outputs
    return float((h * dh).sum() + (c_last * dc_last).sum())


def run_and_differentiate(inputs: dict[str, Any], options: dict[str, Any], **out: np.ndarray) -> dict[str, Any]:
    """h, c_last and all gradients that exist, by name."""
    h, c_last = oracle.sru_recurrence(**inputs, **options)
    grads = oracle.sru_recurrence_backward(**inputs, **out, **options)
    return {"h": h, "c_last": c_last, **{f"d{name}": g for name, g in grads.items() if g is not None}}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Bit for bit, apart from the sign of 0."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


class TestByHand:
    """One channel, two steps; gates are chosen so that s() gives 1/2, 3/4 and 1/4, as s(log 3) = 3/4."""

    log3 = math.log(3)
    u = np.array([[2.0, 0.5, -0.5], [-2.5, log3 + 1, -log3 - 1.5]]).reshape(2, 1, 1, 3, 1)
    x = np.array([10.0, -20.0]).reshape(2, 1, 1)
    bias = np.array([0.5, -1.5]).reshape(1, 2, 1)
    v = np.array([-1.0, 2.0]).reshape(1, 2, 1)
    c0 = np.ones((1, 1, 1))

    def test_two_steps(self) -> None:
        # t=0: f = s(0.5 - 1 + 0.5) = 1/2, c = 1/2 + 1 = 1.5, r = s(-0.5 + 2 - 1.5) = 1/2, h = 0.75 + 0.5*3
        # t=1: f = s(log3) = 3/4, c = 1.125 - 0.625 = 0.5, r = s(-log3) = 1/4, h = 0.125 - 0.75*6
        h, c_last = oracle.sru_recurrence(self.u, self.x, self.bias, self.v, self.c0, alpha=0.3)
        np.testing.assert_allclose(h.ravel(), [2.25, -4.375], rtol=1e-14)
        np.testing.assert_allclose(c_last.ravel(), [0.5], rtol=1e-14)

    def test_two_steps_with_reset_on_current(self) -> None:
        # r = s(-0.5 + 2*1.5 - 1.5) = s(1) at t=0 and s(-log3 - 1.5 + 2*0.5 - 1.5) = s(-log3 - 2) at t=1
        r0, r1 = 1 / (1 + math.exp(-1)), 1 / (1 + 3 * math.exp(2))
        h, c_last = oracle.sru_recurrence(self.u, self.x, self.bias, self.v, self.c0, alpha=0.3, reset_on="current")
        np.testing.assert_allclose(h.ravel(), [1.5 * r0 + 3 * (1 - r0), 0.5 * r1 - 6 * (1 - r1)], rtol=1e-14)
        np.testing.assert_allclose(c_last.ravel(), [0.5], rtol=1e-14)

    def test_gradients_of_one_step(self) -> None:
        # dh = 8, dc_last = 12: dskip = 8/2, dr = 8*(1.5 - 3) = -12, dur = -12/4, dc = 12 + 8/2 = 16,
        # du0 = 16/2, df = 16*(1 - 2), duf = -16/4, dc0 = 16/2 + (-4)(-1) + (-3)*2 = 6, dm = 8*(1.5 - 3)/2
        one = np.ones((1, 1, 1))
        inputs = (self.u[:1], self.x[:1], self.bias, self.v, self.c0)
        grads = oracle.sru_recurrence_backward(*inputs, alpha=0.3, dropout_mask=one, dh=8 * one, dc_last=12 * one)
        want = {
            "u": [8, -4, -3],
            "x": [1.2],
            "bias": [-4, -3],
            "v": [-4, -3],
            "c0": [6],
            "dropout_mask": [-6],
        }
        assert grads.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(grads[name].ravel(), value, rtol=1e-14, err_msg=name)

    @pytest.mark.parametrize(
        ("k", "options", "want"),
        [
            pytest.param(3, {}, 0.5 * 1.5 + 0.5 * 10, id="skip_x"),
            pytest.param(3, {"alpha": 0.3}, 0.5 * 1.5 + 0.5 * 3, id="skip_x_alpha"),
            pytest.param(3, {"dropout_mask": 0.5}, 0.25 * 1.5 + 0.75 * 10, id="skip_x_dropout"),
            pytest.param(3, {"dropout_mask": 0.0}, 10, id="skip_x_dropped"),
            pytest.param(4, {"alpha": 0.3}, 0.5 * 1.5 + 0.5 * 7, id="skip_projected"),
            pytest.param(4, {"dropout_mask": 0.5}, 0.25 * 1.5 + 0.75 * 7, id="skip_projected_dropout"),
            pytest.param(3, {"highway": False, "alpha": 0.3}, 0.5 * 1.5, id="no_highway"),
            pytest.param(3, {"highway": False, "dropout_mask": 4.0}, 0.5 * 1.5 * 4, id="no_highway_dropout"),
            pytest.param(2, {"reset_gate": False, "alpha": 0.3}, 1.5, id="no_reset_gate"),
            pytest.param(2, {"reset_gate": False, "dropout_mask": 4.0}, 6, id="no_reset_gate_dropout"),
            pytest.param(3, {"activation": "tanh"}, 0.5 * math.tanh(1.5) + 0.5 * 10, id="tanh"),
            pytest.param(3, {"activation": "relu"}, 0.5 * 1.5 + 0.5 * 10, id="relu_of_positive"),
        ],
    )
    def test_output_of_each_form(self, k: int, options: dict[str, Any], want: float) -> None:
        u = np.array([2.0, 0.5, -0.5, 7.0])[:k].reshape(1, 1, 1, k, 1)
        if "dropout_mask" in options:
            options = {**options, "dropout_mask": np.full((1, 1, 1), options["dropout_mask"])}
        gates = slice(0, 1 if k == 2 else 2)
        h, c_last = oracle.sru_recurrence(u, self.x[:1], self.bias[:, gates], self.v[:, gates], self.c0, **options)
        np.testing.assert_allclose([h.item(), c_last.item()], [want, 1.5], rtol=1e-14)

    @pytest.mark.parametrize("c", [-1.5, 0.0])
    def test_relu_of_nonpositive(self, c: float) -> None:
        u, c0 = np.array([c, 0.3]).reshape(1, 1, 1, 2, 1), np.full((1, 1, 1), c)
        options = {"activation": "relu", "reset_gate": False}
        h, c_last = oracle.sru_recurrence(u, c0=c0, **options)
        assert (h.item(), c_last.item()) == (0.0, pytest.approx(c, rel=1e-14))
        grads = oracle.sru_recurrence_backward(u, c0=c0, dh=np.ones((1, 1, 1)), **options)
        assert not grads["u"].any() and not grads["c0"].any()

    def test_projection(self) -> None:
        weight = np.arange(12.0).reshape(1, 2, 2, 3)
        np.testing.assert_array_equal(oracle.project([[[1, 10, 100]]], weight), [[[[[210, 543], [876, 1209]]]]])

    def test_saturated_gates_give_no_warning(self) -> None:
        u = np.array([[2.0, 2000.0], [3.0, -2000.0]]).reshape(2, 1, 1, 2, 1)
        with np.errstate(all="raise", under="ignore"):
            h, _ = oracle.sru_recurrence(u, c0=np.ones((1, 1, 1)), reset_gate=False)
        np.testing.assert_array_equal(h.ravel(), [1, 3])


class TestGradients:
    """Finite differences of step 1e-5 have errors near 1e-10; a wrong term shows as an error near 1."""

    bound = 1e-7

    @pytest.mark.parametrize("v", ["none", "constant", "per_step"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @DIRECTIONS
    @pytest.mark.parametrize(("form", "activation", "reset_on"), CELLS)
    def test_slope_along_a_random_line(
        self, form: str, activation: str, reset_on: str, D: int, layout: str, v: str
    ) -> None:
        """Every combination of options: the slope along a line through all inputs at once."""
        inputs, options = case(form, D, layout, v=v, activation=activation, reset_on=reset_on)
        out = cotangents(D)
        grads = oracle.sru_recurrence_backward(**inputs, **out, **options)
        arrays = {
            name: a for name, a in (inputs | {"dropout_mask": options.pop("dropout_mask")}).items() if a is not None
        }
        rng = np.random.default_rng(2)
        line = {name: rng.standard_normal(a.shape) for name, a in arrays.items()}

        def along(s: np.ndarray) -> float:
            moved = {name: a + s[0] * line[name] for name, a in arrays.items()}
            return loss(oracle.sru_recurrence(**moved, **options), **out)

        slope = oracle.finite_differences(along, {"s": np.zeros(1)})["s"].item()
        # The inputs' shares may cancel in the slope, so the bound is relative to the sum of their sizes.
        terms = [float((grads[name] * line[name]).sum()) for name in arrays]
        assert abs(sum(terms) - slope) <= self.bound * sum(map(abs, terms))

    @pytest.mark.parametrize("layout", ["none", "lengths+mask+reset"])
    @pytest.mark.parametrize(
        ("form", "D", "v", "activation", "reset_on"),
        [
            ("skip_x", 1, "constant", "tanh", "previous"),
            ("skip_x", 2, "per_step", "identity", "current"),
            ("skip_projected", 2, "constant", "identity", "previous"),
            ("skip_projected", 1, "constant", "relu", "current"),
            ("no_highway", 2, "constant", "tanh", "current"),
            ("no_highway", 1, "per_step", "relu", "previous"),
            ("no_reset_gate", 2, "constant", "tanh", "previous"),
            ("no_reset_gate", 1, "none", "identity", "previous"),
        ],
    )
    def test_every_element_of_the_recurrence(
        self, form: str, D: int, v: str, activation: str, reset_on: str, layout: str
    ) -> None:
        inputs, options = case(form, D, layout, v=v, activation=activation, reset_on=reset_on)
        out = cotangents(D)
        grads = oracle.sru_recurrence_backward(**inputs, **out, **options)
        arrays = {
            name: a for name, a in (inputs | {"dropout_mask": options.pop("dropout_mask")}).items() if a is not None
        }
        absent = {name: a for name, a in inputs.items() if a is None}
        want = oracle.finite_differences(
            lambda **point: loss(oracle.sru_recurrence(**point, **absent, **options), **out), arrays
        )
        assert all(grads[name] is None for name in absent)
        for name in arrays:
            assert oracle.relative_error(grads[name], want[name]) <= self.bound, name

    @pytest.mark.parametrize("layout", ["none", "lengths+mask+reset"])
    @pytest.mark.parametrize("low_rank", [None, 3], ids=["full", "low_rank"])
    @DIRECTIONS
    @pytest.mark.parametrize("form", FORMS)
    def test_every_element_of_the_layer(self, form: str, D: int, low_rank: int | None, layout: str) -> None:
        rng = np.random.default_rng(3)
        k, options = FORMS[form]
        d_in = D * d if form == "skip_x" else 3
        inputs = oracle.random_inputs(rng, L, B, d, D=D, k=k, d_in=d_in, low_rank=low_rank)
        names = () if layout == "none" else layout.split("+")
        options = {**options, **oracle.random_layout(rng, L, B, **dict.fromkeys(names, True))}
        out = cotangents(D)
        grads = oracle.sru_backward(**inputs, **out, **options)
        if low_rank:
            inputs["P"], inputs["Q"] = inputs.pop("weight")
            grads["P"], grads["Q"] = grads.pop("weight")

        def scalar(P: Any = None, Q: Any = None, weight: Any = None, **point: Any) -> float:
            return loss(oracle.sru_forward(weight=(P, Q) if low_rank else weight, **point, **options), **out)

        want = oracle.finite_differences(scalar, inputs)
        for name in inputs:
            assert oracle.relative_error(grads[name], want[name]) <= self.bound, name

    def test_absent_dc_last_is_zero(self) -> None:
        inputs, options = case("skip_x", 2)
        dh = cotangents(2)["dh"]
        want = run_and_differentiate(inputs, options, dh=dh, dc_last=np.zeros((2, B, d)))
        assert_same(run_and_differentiate(inputs, options, dh=dh), want)


class TestDirections:
    @pytest.mark.parametrize("v", ["constant", "per_step"])
    @pytest.mark.parametrize("form", FORMS)
    def test_two_directions_are_two_runs(self, form: str, v: str) -> None:
        """Direction 1 is direction 0 on the sequence turned round, from its own weights and its half of x."""
        inputs, options = case(form, 2, v=v)
        out = cotangents(2)
        both = run_and_differentiate(inputs, options, **out)
        for q in (0, 1):
            turn = slice(None, None, -1) if q else slice(None)
            part, half = slice(q, q + 1), slice(q * d, (q + 1) * d)
            one = {
                "u": inputs["u"][turn, :, part],
                "x": None if inputs["x"] is None else inputs["x"][turn, :, half],
                "bias": inputs["bias"][part],
                "v": inputs["v"][part] if v == "constant" else inputs["v"][turn, :, part],
                "c0": inputs["c0"][part],
            }
            single = {**options, "dropout_mask": options["dropout_mask"][:, part]}
            got = run_and_differentiate(one, single, dh=out["dh"][turn, :, half], dc_last=out["dc_last"][part])
            want = {
                "h": both["h"][turn, :, half],
                "c_last": both["c_last"][part],
                "du": both["du"][turn, :, part],
                "dbias": both["dbias"][part],
                "dv": both["dv"][part] if v == "constant" else both["dv"][turn, :, part],
                "dc0": both["dc0"][part],
                "ddropout_mask": both["ddropout_mask"][:, part],
            }
            if form == "skip_x":
                want["dx"] = both["dx"][turn, :, half]
            assert got.keys() == want.keys()
            for name in want:
                # Sums over time run in the other order for the turned sequence.
                np.testing.assert_allclose(got[name], want[name], rtol=1e-13, atol=1e-14, err_msg=name)

    @DIRECTIONS
    def test_sequences_do_not_see_each_other(self, D: int) -> None:
        inputs, options = case("skip_projected", D, "lengths+mask+reset")
        h, c_last = oracle.sru_recurrence(**inputs, **options)
        for b in range(B):
            one = slice(b, b + 1)
            alone = {
                "u": inputs["u"][:, one],
                "bias": inputs["bias"],
                "v": inputs["v"],
                "c0": inputs["c0"][:, one],
            }
            mine = {name: options[name][:, one] for name in ("mask", "reset")}
            mine |= {name: options[name][one] for name in ("lengths", "dropout_mask")}
            h_b, c_b = oracle.sru_recurrence(**alone, **mine)
            np.testing.assert_array_equal(h_b, h[:, one])
            np.testing.assert_array_equal(c_b, c_last[:, one])


class TestPadding:
    @DIRECTIONS
    def test_lengths_is_truncation(self, D: int) -> None:
        inputs, options = case("skip_x", D)
        lengths = np.array([L, 2, 0], np.uint8)
        out = cotangents(D)
        got = run_and_differentiate(inputs, {**options, "lengths": lengths}, **out)
        for b, length in enumerate(lengths):
            one = slice(b, b + 1)
            cut = {name: a[:length, one] for name, a in inputs.items() if name in ("u", "x")}
            cut |= {"bias": inputs["bias"], "v": inputs["v"], "c0": inputs["c0"][:, one]}
            single = {**options, "dropout_mask": options["dropout_mask"][one]}
            want = run_and_differentiate(cut, single, dh=out["dh"][:length, one], dc_last=out["dc_last"][:, one])
            for name in ("h", "du", "dx"):
                np.testing.assert_array_equal(got[name][:length, one], want[name], err_msg=name)
                assert not got[name][length:, one].any()
            for name in ("c_last", "dc0"):
                np.testing.assert_array_equal(got[name][:, one], want[name], err_msg=name)

    @DIRECTIONS
    def test_masked_steps_are_as_if_left_out(self, D: int) -> None:
        inputs, options = case("skip_x", D, "mask")
        assert options["mask"][:, 0].any() and not options["mask"][:, 0].all()
        out = cotangents(D)
        got = run_and_differentiate(inputs, options, **out)
        for b in range(B):
            one, rest = slice(b, b + 1), ~options["mask"][:, b]
            kept = {name: a[rest][:, one] for name, a in inputs.items() if name in ("u", "x")}
            kept |= {"bias": inputs["bias"], "v": inputs["v"], "c0": inputs["c0"][:, one]}
            single = {"alpha": options["alpha"], "dropout_mask": options["dropout_mask"][one]}
            want = run_and_differentiate(kept, single, dh=out["dh"][rest][:, one], dc_last=out["dc_last"][:, one])
            for name in ("h", "du", "dx"):
                np.testing.assert_array_equal(got[name][rest][:, one], want[name], err_msg=name)
                assert not got[name][~rest][:, one].any()
            for name in ("c_last", "dc0"):
                np.testing.assert_array_equal(got[name][:, one], want[name], err_msg=name)

    @DIRECTIONS
    def test_mask_everywhere_carries_c0(self, D: int) -> None:
        inputs, options = case("skip_projected", D, mask=np.ones((L, B)))
        h, c_last = oracle.sru_recurrence(**inputs, **options)
        assert not h.any()
        np.testing.assert_array_equal(c_last, inputs["c0"])

    @DIRECTIONS
    def test_trailing_mask_is_lengths(self, D: int) -> None:
        inputs, options = case("skip_x", D)
        lengths = np.array([L, 2, 0])
        out = cotangents(D)
        assert_same(
            run_and_differentiate(inputs, {**options, "mask": np.arange(L)[:, None] >= lengths}, **out),
            run_and_differentiate(inputs, {**options, "lengths": lengths}, **out),
        )

    @PADDED
    @DIRECTIONS
    @pytest.mark.parametrize("form", FORMS)
    def test_content_of_padding_has_no_influence(self, form: str, D: int, layout: str) -> None:
        inputs, options = case(form, D, layout, v="per_step")
        out = cotangents(D)
        want = run_and_differentiate(inputs, options, **out)
        dead = ~oracle.live_steps(L, B, options.get("lengths"), options.get("mask"))
        assert dead.any()
        poisoned = {name: None if a is None else a.copy() for name, a in inputs.items()}
        for array in (poisoned["u"], poisoned["x"], poisoned["v"]):
            if array is not None:
                array[dead] = np.nan
        out["dh"][dead] = np.nan
        got = run_and_differentiate(poisoned, options, **out)
        assert_same(got, want)
        assert all(not got[name][dead].any() for name in ("h", "du", "dv"))

    @DIRECTIONS
    def test_content_of_padding_has_no_influence_on_the_layer(self, D: int) -> None:
        rng = np.random.default_rng(4)
        inputs = oracle.random_inputs(rng, L, B, d, D=D)
        options = oracle.random_layout(rng, L, B, lengths=True, mask=True)
        dead = ~oracle.live_steps(L, B, **options)
        poisoned = {**inputs, "x": np.where(dead[:, :, None], np.nan, inputs["x"])}
        for got, want in zip(oracle.sru_forward(**poisoned, **options), oracle.sru_forward(**inputs, **options)):
            np.testing.assert_array_equal(got, want)
        grads = oracle.sru_backward(**poisoned, **cotangents(D), **options)
        assert_same(grads, oracle.sru_backward(**inputs, **cotangents(D), **options))
        assert not grads["x"][dead].any()


class TestReset:
    @pytest.mark.parametrize("cut", range(1, L))
    @pytest.mark.parametrize("form", FORMS)
    def test_reset_is_two_runs(self, form: str, cut: int) -> None:
        """From state 0, the forward direction runs the second part and the reverse direction the first."""
        inputs, options = case(form, 2, v="per_step")
        reset = np.zeros((L, B), bool)
        reset[cut] = True
        out = cotangents(2)
        got = run_and_differentiate(inputs, {**options, "reset": reset}, **out)
        c0, dc_last = inputs["c0"], out["dc_last"]
        parts = []
        for part, q in ((slice(0, cut), 0), (slice(cut, L), 1)):
            # Direction q enters the whole sequence through this part, and leaves it through the other.
            part_inputs = {name: a if a is None else a[part] for name, a in inputs.items() if name in ("u", "x", "v")}
            part_inputs["bias"], part_inputs["c0"] = inputs["bias"], np.zeros_like(c0)
            part_inputs["c0"][q] = c0[q]
            part_dc = dc_last.copy()
            part_dc[q] = 0
            parts.append(run_and_differentiate(part_inputs, options, dh=out["dh"][part], dc_last=part_dc))
        first, second = parts
        for name in got.keys() & {"h", "du", "dv", "dx"}:
            np.testing.assert_array_equal(got[name], np.concatenate([first[name], second[name]]), err_msg=name)
        np.testing.assert_array_equal(got["c_last"], np.stack([second["c_last"][0], first["c_last"][1]]))
        np.testing.assert_array_equal(got["dc0"], np.stack([first["dc0"][0], second["dc0"][1]]))

    def test_reset_at_the_first_step(self) -> None:
        """The forward direction ignores c0; the reverse direction has no boundary there."""
        inputs, options = case("skip_projected", 2)
        reset = np.zeros((L, B), bool)
        reset[0] = True
        out = cotangents(2)
        zeroed = {**inputs, "c0": inputs["c0"] * [[[0]], [[1]]]}
        want = run_and_differentiate(zeroed, options, **out)
        want["dc0"][0] = 0
        inputs["c0"][0] = np.nan
        assert_same(run_and_differentiate(inputs, {**options, "reset": reset}, **out), want)

    def test_reset_at_a_masked_step_zeroes_the_carried_state(self) -> None:
        inputs, options = case("no_highway", 2)
        mask, reset = np.zeros((L, B), bool), np.zeros((L, B), bool)
        mask[2:] = reset[3] = True
        h, c_last = oracle.sru_recurrence(**inputs, **options, mask=mask, reset=reset)
        assert not c_last[0].any() and not h[2:].any()
        # The reverse direction carries c0 through steps 4 and 3, and 0 from the boundary on to step 1.
        from_zero, c_from_zero = oracle.sru_recurrence(
            **{**inputs, "u": inputs["u"][:2], "c0": inputs["c0"] * [[[1]], [[0]]]}, **options
        )
        np.testing.assert_array_equal(h[:2], from_zero)
        np.testing.assert_array_equal(c_last[1], c_from_zero[1])

    @DIRECTIONS
    def test_no_boundary_beyond_the_length(self, D: int) -> None:
        inputs, options = case("skip_projected", D)
        lengths = np.array([3, 0, 1])
        reset = np.arange(L)[:, None] >= lengths
        out = cotangents(D)
        assert_same(
            run_and_differentiate(inputs, {**options, "lengths": lengths, "reset": reset}, **out),
            run_and_differentiate(inputs, {**options, "lengths": lengths}, **out),
        )


class TestArguments:
    @pytest.mark.parametrize(
        ("form", "name"),
        [(form, name) for form in FORMS for name in ("bias", "v", "c0", "dropout_mask", "lengths", "mask", "reset")],
    )
    def test_defaults(self, form: str, name: str) -> None:
        """None means zeros, ones for dropout_mask, full lengths, and no padding or boundary."""
        inputs, options = case(form, 2, "lengths+mask+reset")
        everything = inputs | options
        neutral = {"dropout_mask": np.ones((B, 2, d)), "lengths": np.full(B, L)}.get(
            name, np.zeros_like(everything[name])
        )
        want = oracle.sru_recurrence(**{**everything, name: neutral})
        without = dict(everything)
        del without[name]
        for got in (oracle.sru_recurrence(**without), oracle.sru_recurrence(**{**everything, name: None})):
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
        changed = oracle.sru_recurrence(**everything)
        assert any((a != b).any() for a, b in zip(changed, want))

    @pytest.mark.parametrize("form", FORMS)
    def test_alpha_enters_the_skip_of_x_only(self, form: str) -> None:
        inputs, options = case(form, 2)
        (h1, c1), (h2, c2) = (oracle.sru_recurrence(**inputs, **{**options, "alpha": alpha}) for alpha in (1, 7))
        assert (h1 != h2).any() == (form == "skip_x")
        np.testing.assert_array_equal(c1, c2)

    @DIRECTIONS
    @pytest.mark.parametrize("form", FORMS)
    def test_v_per_step_that_is_constant(self, form: str, D: int) -> None:
        inputs, options = case(form, D, "lengths+mask+reset")
        out = cotangents(D)
        want = run_and_differentiate(inputs, options, **out)
        inputs["v"] = np.broadcast_to(inputs["v"], (L, B, *inputs["v"].shape))
        got = run_and_differentiate(inputs, options, **out)
        got["dv"] = got["dv"].sum(axis=(0, 1))
        assert_same(got, want)

    @DIRECTIONS
    def test_low_rank_is_the_product(self, D: int) -> None:
        inputs = oracle.random_inputs(np.random.default_rng(5), L, B, d, D=D, low_rank=3)
        P, Q = inputs.pop("weight")
        product = np.einsum("qkjp,pi->qkji", P, Q)
        for got, want in zip(oracle.sru_forward(weight=(P, Q), **inputs), oracle.sru_forward(weight=product, **inputs)):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)

    @DIRECTIONS
    def test_layer_is_projection_and_recurrence(self, D: int) -> None:
        inputs = oracle.random_inputs(np.random.default_rng(6), L, B, d, D=D)
        weight, x = inputs.pop("weight"), inputs["x"]
        u = np.einsum("qkji,lbi->lbqkj", weight, x)
        for got, want in zip(oracle.sru_forward(weight=weight, **inputs), oracle.sru_recurrence(u, **inputs)):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
    def test_narrow_dtypes_are_widened(self, name: str) -> None:
        dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
        inputs = oracle.random_inputs(np.random.default_rng(7), L, B, d)
        narrow = {name: a.astype(dtype) for name, a in inputs.items()}
        wide = {name: a.astype(np.float64) for name, a in narrow.items()}
        out = {name: a.astype(dtype) for name, a in cotangents(1).items()}
        for got, want in zip(oracle.sru_forward(**narrow), oracle.sru_forward(**wide)):
            assert got.dtype == np.float64
            np.testing.assert_array_equal(got, want)
        grads = oracle.sru_backward(**narrow, **out)
        assert {g.dtype for g in grads.values() if g is not None} == {np.dtype(np.float64)}
        assert_same(grads, oracle.sru_backward(**wide, **out))

    @pytest.mark.parametrize(("steps", "sequences"), [(0, 3), (4, 0), (0, 0)])
    @DIRECTIONS
    def test_zero_sizes(self, steps: int, sequences: int, D: int) -> None:
        rng = np.random.default_rng(8)
        inputs = oracle.random_inputs(rng, steps, sequences, d, D=D)
        layout = oracle.random_layout(rng, steps, sequences, lengths=True, mask=True, reset=True)
        h, c_last = oracle.sru_forward(**inputs, **layout)
        assert h.shape == (steps, sequences, D * d)
        if steps == 0:
            np.testing.assert_array_equal(c_last, inputs["c0"])
        grads = oracle.sru_backward(**inputs, dh=h, dc_last=np.ones_like(c_last), **layout)
        assert {name: g.shape for name, g in grads.items() if g is not None} == {
            name: a.shape for name, a in inputs.items()
        }
        assert not grads["weight"].any() and not grads["bias"].any() and not grads["v"].any()

    def test_inputs_are_left_as_they_are(self) -> None:
        inputs, options = case("skip_x", 2, "lengths+mask+reset")
        out = cotangents(2)
        arrays = [a for a in (*inputs.values(), *options.values(), *out.values()) if isinstance(a, np.ndarray)]
        before = [a.copy() for a in arrays]
        run_and_differentiate(inputs, options, **out)
        for array, copy in zip(arrays, before):
            np.testing.assert_array_equal(array, copy)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            pytest.param({"activation": "selu"}, ValueError, id="activation"),
            pytest.param({"reset_on": "next"}, ValueError, id="reset_on"),
            pytest.param({"reset_gate": False}, ValueError, id="gates"),
            pytest.param({"x": None}, (ValueError, TypeError), id="no_x"),
            pytest.param({"bias": np.zeros((1, 1, d))}, ValueError, id="bias"),
            pytest.param({"lengths": [L + 1, 0, 0]}, ValueError, id="lengths"),
            pytest.param({"mask": np.zeros((B, L))}, ValueError, id="mask"),
            pytest.param({"time_parallel": True}, TypeError, id="unknown_option"),
        ],
    )
    def test_wrong_arguments_are_refused(self, change: dict[str, Any], error: Any) -> None:
        inputs, options = case("skip_x", 1)
        with pytest.raises(error):
            oracle.sru_recurrence(**{**inputs, **options, **change})

    def test_independence(self) -> None:
        """The oracle runs without the library that it judges."""
        program = "import sys, oracle; sys.exit(any(name.split('.')[0] == 'sru_rt' for name in sys.modules))"
        subprocess.run([sys.executable, "-c", program], cwd=Path(oracle.__file__).parents[1], check=True)


class TestTools:
    def test_finite_differences(self) -> None:
        arrays = {"a": np.array([[1.0, -2.0]]), "b": np.array(3.0)}
        got = oracle.finite_differences(lambda a, b: float((a**3).sum() * b), arrays)
        np.testing.assert_allclose(got["a"], [[9, 36]], rtol=1e-8)
        np.testing.assert_allclose(got["b"], -7, rtol=1e-8)
        np.testing.assert_array_equal(arrays["a"], [[1, -2]])

    def test_relative_error(self) -> None:
        assert oracle.relative_error([1.0, -4.0], [2.0, -4.0]) == 0.25
        assert oracle.relative_error([0.5], [0.0]) == 0.5
        assert oracle.relative_error([], []) == 0
        for pair in (([np.nan], [1.0]), ([1.0], [np.nan]), ([np.nan, 0.0], [0.0, 0.0])):
            assert not oracle.relative_error(*pair) <= 1e9
        with pytest.raises(ValueError, match="shape"):
            oracle.relative_error([1.0], [1.0, 1.0])

    @pytest.mark.parametrize("seed", range(3))
    def test_random_layout_has_the_corner_cases(self, seed: int) -> None:
        layout = oracle.random_layout(np.random.default_rng(seed), L, B, lengths=True, mask=True, reset=True)
        assert layout["lengths"][0] == L and layout["lengths"][-1] == 0
        assert layout["reset"][0, 0] and (layout["reset"] & layout["mask"])[1:, 0].any()
        assert oracle.random_layout(np.random.default_rng(seed), L, B) == {}
