"""The oracle against hand-worked values, finite differences and invariants: why it may judge the rest."""

from __future__ import annotations

import importlib
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import oracle
from matrix import matrix

L, B, d = 5, 3, 2
ALL = slice(None)


class Form(NamedTuple):
    """A form of a cell: the number of gates, and the options that select it."""

    cell: str
    k: int
    options: dict[str, Any]
    skips_x: bool = False


FORMS = {
    "skip_x": Form("sru", 3, {"alpha": 1.7}, skips_x=True),
    "skip_projected": Form("sru", 4, {}),
    "no_highway": Form("sru", 3, {"highway": False}),
    "no_reset_gate": Form("sru", 2, {"reset_gate": False}),
    "qrnn_f": Form("qrnn", 2, {"pooling": "f"}),
    "qrnn_fo": Form("qrnn", 3, {}),
    "qrnn_ifo": Form("qrnn", 4, {"pooling": "ifo"}),
    "qrnn_fo_skip_x": Form("qrnn", 3, {"highway": True}, skips_x=True),
    "qrnn_ifo_skip_x": Form("qrnn", 4, {"pooling": "ifo", "highway": True}, skips_x=True),
    "qrnn_fo_skip_projected": Form("qrnn", 4, {"highway": True}),
    "qrnn_ifo_skip_projected": Form("qrnn", 5, {"pooling": "ifo", "highway": True}),
    "mingru": Form("mingru", 2, {}),
    "mingru_positive": Form("mingru", 2, {"candidate": "positive"}),
    "minlstm": Form("minlstm", 3, {}),
    "minlstm_positive": Form("minlstm", 3, {"candidate": "positive"}),
}
SRU_FORMS = [name for name, form in FORMS.items() if form.cell == "sru"]
OTHER_FORMS = [name for name in FORMS if name not in SRU_FORMS]
SRU_CELLS = [
    pytest.param(form, activation, reset_on, id=f"{form}-{activation}-{reset_on}")
    for form, activation, reset_on in itertools.product(
        SRU_FORMS, ("identity", "tanh", "relu"), ("previous", "current")
    )
    if form != "no_reset_gate" or reset_on == "previous"
]
LAYOUTS = [
    "none",
    *("+".join(c) for n in (1, 2, 3) for c in itertools.combinations(("lengths", "mask", "reset"), n)),
]
DIRECTIONS = pytest.mark.parametrize("D", [1, 2], ids=["one_direction", "two_directions"])
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
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
    """Inputs of a form's recurrence, whose state is called c here whatever the cell, and its options."""
    rng = np.random.default_rng(seed)
    cell, k, options, skips_x = FORMS[form]
    inputs = oracle.random_inputs(rng, L, B, d, D=D, k=k if cell == "sru" else 3, v=v)
    weight = inputs.pop("weight")
    if cell != "sru":
        weight = oracle.random_weight(rng, D, k, d, D * d)
        inputs["bias"] = 0.5 * rng.standard_normal((D, biases(form), d))
        del inputs["v"]
    inputs = {"u": oracle.project(inputs["x"], weight), **inputs}
    if not skips_x:
        inputs["x"] = None
    names = () if layout == "none" else layout.split("+")
    options = {**options, **oracle.random_layout(rng, L, B, **dict.fromkeys(names, True)), **more}
    if dropout and cell == "sru":
        options["dropout_mask"] = (rng.random((B, D, d)) < 0.7) / 0.7
    if dropout and cell == "qrnn":
        options["zoneout_mask"] = rng.random((L, B, D, d)) < 0.7
    return inputs, options


def biases(form: str) -> int:
    cell, k, options, _ = FORMS[form]
    if cell == "sru":
        return 1 if k == 2 else 2
    return {"f": 2, "fo": 3, "ifo": 4}[options.get("pooling", "fo")] if cell == "qrnn" else k


def cotangents(D: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"dh": rng.standard_normal((L, B, D * d)), "dc_last": rng.standard_normal((D, B, d))}


def loss(outputs: tuple[np.ndarray, np.ndarray], dh: np.ndarray, dc_last: np.ndarray) -> float:
    h, c_last = outputs
    return float((h * dh).sum() + (c_last * dc_last).sum())


def call(form: str, what: str, given: dict[str, Any]) -> Any:
    """The oracle's function for a form; minGRU and minLSTM have no x beside U, and call their state h."""
    cell = FORMS[form].cell
    if cell.startswith("min"):
        if what.startswith("recurrence"):
            given = {name: a for name, a in given.items() if name != "x"}
        given = {{"c0": "h0", "dc_last": "dh_last"}.get(name, name): a for name, a in given.items()}
    result = getattr(oracle, f"{cell}_{what}")(**given)
    return {"c0" if n == "h0" else n: a for n, a in result.items()} if isinstance(result, dict) else result


def run(form: str, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return call(form, "recurrence", inputs | options)


def differentiate(form: str, inputs: dict[str, Any], options: dict[str, Any], **out: Any) -> dict[str, Any]:
    return call(form, "recurrence_backward", inputs | options | out)


def run_and_differentiate(
    form: str, inputs: dict[str, Any], options: dict[str, Any], **out: np.ndarray
) -> dict[str, Any]:
    """h, c_last and all gradients that exist, by name."""
    h, c_last = run(form, inputs, options)
    grads = differentiate(form, inputs, options, **out)
    return {"h": h, "c_last": c_last, **{f"d{name}": g for name, g in grads.items() if g is not None}}


AXES = {
    "u": "tbq",
    "x": "tb",
    "bias": "q",
    "v": "q",
    "c0": "qb",
    "dropout_mask": "bq",
    "zoneout_mask": "tbq",
    "lengths": "b",
    "mask": "tb",
    "reset": "tb",
    "dh": "tb",
    "dc_last": "qb",
    "h": "tb",
    "c_last": "qb",
}
AXES |= {f"d{name}": AXES[name] for name in ("u", "x", "bias", "v", "c0", "dropout_mask")}


def part(arrays: dict[str, Any], *, t: Any = ALL, b: Any = ALL, q: Any = ALL) -> dict[str, Any]:
    """Some steps, sequences and directions of inputs, options or results; what is no array stays as it is."""
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            axes = "tbq" if name in ("v", "dv") and array.ndim == 5 else AXES[name]
            if name in ("x", "h", "dx", "dh"):
                array = array.reshape(*array.shape[:2], -1, d)[:, :, q].reshape(*array.shape[:2], -1)
            array = array[tuple({"t": t, "b": b, "q": q}[axis] for axis in axes)]
        found[name] = array
    return found


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Bit for bit, apart from the sign of 0."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


class TestSruByHand:
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


class TestOthersByHand:
    """One channel, two steps, from state 1; gates are chosen as above, z is tanh of the inverse of tanh."""

    log3 = math.log(3)
    half = math.atanh(0.5)
    # z = 1/2, -1/2; f = 3/4, 1/4; o = 1/2, 3/4; i = 1/2, 3/4; w = 7, 4
    qrnn = np.array([[half, log3, 0, 0, 7], [-half, -log3, log3, log3, 4]])
    x = np.array([10.0, -20.0]).reshape(2, 1, 1)
    bias = np.array([0.5, -1.5, 2.0, 0.25])
    c0 = np.ones((1, 1, 1))

    @pytest.mark.parametrize(
        ("gates", "options", "h", "c_last"),
        [
            # c = 3/4 + 1/4 * 1/2, then 1/4 * 7/8 - 3/4 * 1/2
            pytest.param("zf", {"pooling": "f"}, [0.875, -0.15625], -0.15625, id="f"),
            pytest.param("zfo", {}, [0.4375, -0.1171875], -0.15625, id="fo"),
            # c = 3/4 + 1/2 * 1/2, then 1/4 * 1 - 3/4 * 1/2
            pytest.param("zfoi", {"pooling": "ifo"}, [0.5, -0.09375], -0.125, id="ifo"),
            pytest.param("zfo", {"highway": True}, [5.4375, -5.1171875], -0.15625, id="fo_skip_x"),
            pytest.param("zfow", {"highway": True}, [3.9375, 0.8828125], -0.15625, id="fo_skip_projected"),
            pytest.param("zfoi", {"pooling": "ifo", "highway": True}, [5.5, -5.09375], -0.125, id="ifo_skip_x"),
            pytest.param("zfoiw", {"pooling": "ifo", "highway": True}, [4, 0.90625], -0.125, id="ifo_skip_projected"),
            # f = 1 in the second step, and i as it was
            pytest.param("zf", {"pooling": "f", "zoneout_mask": [1, 0]}, [0.875, 0.875], 0.875, id="f_zoneout"),
            pytest.param("zfo", {"zoneout_mask": [1, 0]}, [0.4375, 0.65625], 0.875, id="fo_zoneout"),
            pytest.param("zfoi", {"pooling": "ifo", "zoneout_mask": [1, 0]}, [0.5, 0.46875], 0.625, id="ifo_zoneout"),
        ],
    )
    def test_qrnn(self, gates: str, options: dict[str, Any], h: list[float], c_last: float) -> None:
        bias = self.bias[: len(gates.rstrip("w"))]
        u = self.qrnn[:, ["zfoiw".index(gate) for gate in gates]].copy()
        u[:, : len(bias)] -= bias
        skips_x = options.get("highway") and "w" not in gates
        if "zoneout_mask" in options:
            options = {**options, "zoneout_mask": np.reshape(options["zoneout_mask"], (2, 1, 1, 1))}
        got = oracle.qrnn_recurrence(
            u.reshape(2, 1, 1, -1, 1), self.x if skips_x else None, bias.reshape(1, -1, 1), self.c0, **options
        )
        np.testing.assert_allclose(got[0].ravel(), h, rtol=1e-14)
        np.testing.assert_allclose(got[1].ravel(), c_last, rtol=1e-14)

    @pytest.mark.parametrize(
        ("cell", "candidate", "h"),
        [
            # z = 3/4, 1/2; n = 2, -log3, or 2.5, 1/4
            ("mingru", "identity", [1.75, 0.875 - log3 / 2]),
            ("mingru", "positive", [2.125, 1.1875]),
            # F = 3/4, 1/4 and I = 1/4, 1/2, so f = 3/4, 1/3
            ("minlstm", "identity", [1.25, 1.25 / 3 - 2 / 3 * log3]),
            ("minlstm", "positive", [1.375, 0.625]),
        ],
    )
    def test_min_rnns(self, cell: str, candidate: str, h: list[float]) -> None:
        log3 = self.log3
        u = {"mingru": [[log3, 2], [0, -log3]], "minlstm": [[log3, -log3, 2], [-log3, 0, -log3]]}[cell]
        bias = self.bias[: len(u[0])]
        got, h_last = getattr(oracle, f"{cell}_recurrence")(
            (np.array(u) - bias).reshape(2, 1, 1, -1, 1), bias.reshape(1, -1, 1), self.c0, candidate=candidate
        )
        np.testing.assert_allclose(got.ravel(), h, rtol=1e-14)
        np.testing.assert_array_equal(h_last.ravel(), got.ravel()[-1:])

    @pytest.mark.parametrize(
        ("uf", "ui", "f"),
        [(-1e4, -1e4, 0.5), (1e4, 1e4, 0.5), (-1e4, 1e4, 0), (1e4, -1e4, 1), (-1e4, -1e4 + math.log(3), 0.25)],
    )
    def test_gates_of_minlstm_where_both_saturate(self, uf: float, ui: float, f: float) -> None:
        """F and I alone would be 0 and 0; the state goes from 1 to f, as the candidate is 0."""
        u = np.array([uf, ui, 0.0]).reshape(1, 1, 1, 3, 1)
        with np.errstate(all="raise", under="ignore"):
            _, h_last = oracle.minlstm_recurrence(u, h0=self.c0)
            grads = oracle.minlstm_recurrence_backward(u, h0=self.c0, dh=self.c0)
        np.testing.assert_allclose(h_last.item(), f, rtol=1e-11)
        # Where F and I are near 0, f = s(uf - ui); where they are near 1, f does not move.
        slope = f * (1 - f) if uf < 0 and ui < 0 else 0
        np.testing.assert_allclose(grads["u"].ravel(), [slope, -slope, 1 - f], rtol=1e-11, atol=1e-300)


class TestWindow:
    """x = 1, 10, 100, 1000, 10000, so that the digits of U say which tap saw which token."""

    x = 10.0 ** np.arange(5).reshape(5, 1, 1)
    weight = np.array([[[[3.0, 2.0, 1.0]]], [[[6.0, 5.0, 4.0]]]])  # oldest tap first, of each direction

    @pytest.mark.parametrize(
        ("layout", "forward", "reverse"),
        [
            pytest.param({}, [1, 12, 123, 1230, 12300], [654, 6540, 65400, 54000, 40000], id="plain"),
            pytest.param({"lengths": [3]}, [1, 12, 123, 230, 300], [654, 540, 400, 0, 0], id="lengths"),
            pytest.param(
                {"mask": [0, 0, 1, 0, 0]}, [1, 12, 23, 1030, 12000], [54, 6040, 65000, 54000, 40000], id="mask"
            ),
            pytest.param(
                {"reset": [0, 0, 1, 0, 0]}, [1, 12, 100, 1200, 12300], [54, 40, 65400, 54000, 40000], id="reset"
            ),
            pytest.param(
                {"mask": [0, 0, 1, 0, 0], "reset": [0, 0, 1, 0, 0]},
                [1, 12, 0, 1000, 12000],
                [54, 40, 65000, 54000, 40000],
                id="reset_at_a_masked_step",
            ),
        ],
    )
    def test_what_each_tap_sees(self, layout: dict[str, Any], forward: list[float], reverse: list[float]) -> None:
        layout = {name: np.reshape(a, (1,) if name == "lengths" else (5, 1)) for name, a in layout.items()}
        x = self.x.copy()
        x[~oracle.live_steps(5, 1, layout.get("lengths"), layout.get("mask"))] = np.nan
        u = oracle.project(x, self.weight, 3, **layout)
        np.testing.assert_array_equal(u[:, 0, 0, 0, 0], forward)
        np.testing.assert_array_equal(u[:, 0, 1, 0, 0], reverse)

    def test_several_columns_to_a_tap(self) -> None:
        rng = np.random.default_rng(9)
        x, weight = rng.standard_normal((L, B, 3)), rng.standard_normal((2, 4, d, 2 * 3))
        before, after = np.zeros_like(x), np.zeros_like(x)
        before[1:], after[:-1] = x[:-1], x[1:]
        for q, older in ((0, before), (1, after)):
            want = np.einsum("kji,lbi->lbkj", weight[q], np.concatenate([older, x], axis=2))
            np.testing.assert_allclose(oracle.project(x, weight, 2)[:, :, q], want, rtol=1e-13)

    @pytest.mark.parametrize("window", [1, 2, 3])
    @DIRECTIONS
    def test_packed_documents_are_as_if_run_alone(self, D: int, window: int) -> None:
        """Values and gradients; the state starts from 0 in each document, so only one has c0."""
        rng = np.random.default_rng(10)
        sizes = (3, 1, 4)
        starts = np.cumsum((0, *sizes))
        x, dh = rng.standard_normal((sum(sizes), 1, D * d)), rng.standard_normal((sum(sizes), 1, D * d))
        weight, bias = oracle.random_weight(rng, D, 3, d, window * D * d), rng.standard_normal((D, 3, d))
        reset = np.zeros((sum(sizes), 1), bool)
        reset[starts[1:-1]] = True
        given = {"weight": weight, "bias": bias, "window": window, "highway": True}
        packed = oracle.qrnn_forward(x, **given, reset=reset)[0]
        grads = oracle.qrnn_backward(x, **given, reset=reset, dh=dh)
        alone = [oracle.qrnn_forward(x[i:j], **given)[0] for i, j in itertools.pairwise(starts)]
        parts = [oracle.qrnn_backward(x[i:j], **given, dh=dh[i:j]) for i, j in itertools.pairwise(starts)]
        np.testing.assert_allclose(packed, np.concatenate(alone), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(grads["x"], np.concatenate([p["x"] for p in parts]), rtol=1e-12, atol=1e-13)
        for name in ("weight", "bias"):
            np.testing.assert_allclose(grads[name], sum(p[name] for p in parts), rtol=1e-12, atol=1e-13)


def check_slope(form: str, D: int, layout: str, **more: Any) -> None:
    """The slope along a line through all inputs at once; see TestGradients."""
    inputs, options = case(form, D, layout, **more)
    out = cotangents(D)
    grads = differentiate(form, inputs, options, **out)
    arrays = {name: a for name, a in inputs.items() if a is not None}
    if "dropout_mask" in options:
        arrays["dropout_mask"] = options.pop("dropout_mask")
    rng = np.random.default_rng(2)
    line = {name: rng.standard_normal(a.shape) for name, a in arrays.items()}

    def along(s: np.ndarray) -> float:
        moved = {name: a + s[0] * line[name] for name, a in arrays.items()}
        return loss(run(form, moved, options), **out)

    slope = oracle.finite_differences(along, {"s": np.zeros(1)})["s"].item()
    # The inputs' shares may cancel in the slope, so the bound is relative to the sum of their sizes.
    terms = [float((grads[name] * line[name]).sum()) for name in arrays]
    assert abs(sum(terms) - slope) <= TestGradients.bound * sum(map(abs, terms))


def check_every_element(form: str, D: int, layout: str, **more: Any) -> None:
    inputs, options = case(form, D, layout, **more)
    out = cotangents(D)
    grads = differentiate(form, inputs, options, **out)
    arrays = {name: a for name, a in inputs.items() if a is not None}
    if "dropout_mask" in options:
        arrays["dropout_mask"] = options.pop("dropout_mask")
    want = oracle.finite_differences(lambda **point: loss(run(form, point, options), **out), arrays)
    assert all(grads.get(name) is None for name in inputs if inputs[name] is None)
    for name in arrays:
        assert oracle.relative_error(grads[name], want[name]) <= TestGradients.bound, name


class TestGradients:
    """Finite differences of step 1e-5 have errors near 1e-10; a wrong term shows as an error near 1."""

    bound = 1e-7

    @pytest.mark.parametrize("v", ["none", "constant", "per_step"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @DIRECTIONS
    @pytest.mark.parametrize(("form", "activation", "reset_on"), SRU_CELLS)
    def test_slope_of_sru(self, form: str, activation: str, reset_on: str, D: int, layout: str, v: str) -> None:
        check_slope(form, D, layout, v=v, activation=activation, reset_on=reset_on)

    @pytest.mark.parametrize("zoneout", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @DIRECTIONS
    @pytest.mark.parametrize("form", OTHER_FORMS)
    def test_slope_of_the_others(self, form: str, D: int, layout: str, zoneout: bool) -> None:
        if FORMS[form].cell == "qrnn" or not zoneout:
            check_slope(form, D, layout, dropout=zoneout)

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
    def test_every_element_of_the_recurrence_of_sru(
        self, form: str, D: int, v: str, activation: str, reset_on: str, layout: str
    ) -> None:
        check_every_element(form, D, layout, v=v, activation=activation, reset_on=reset_on)

    @pytest.mark.parametrize("layout", ["none", "lengths+mask+reset"])
    @DIRECTIONS
    @pytest.mark.parametrize("form", matrix(OTHER_FORMS))
    def test_every_element_of_the_recurrence_of_the_others(self, form: str, D: int, layout: str) -> None:
        check_every_element(form, D, layout)

    @pytest.mark.parametrize("layout", ["none", "lengths+mask+reset"])
    @pytest.mark.parametrize("low_rank", [None, 3], ids=["full", "low_rank"])
    @DIRECTIONS
    @pytest.mark.parametrize(
        ("form", "window"),
        matrix([*((form, 1) for form in FORMS), ("qrnn_fo", 2), ("qrnn_fo_skip_x", 3), ("qrnn_ifo_skip_projected", 3)]),
    )
    def test_every_element_of_the_layer(
        self, form: str, window: int, D: int, low_rank: int | None, layout: str
    ) -> None:
        rng = np.random.default_rng(3)
        inputs, options = case(form, D, layout, dropout=False)
        d_in = D * d if FORMS[form].skips_x else 3
        inputs["x"] = rng.standard_normal((L, B, d_in))
        del inputs["u"]
        weight = oracle.random_weight(rng, D, FORMS[form].k, d, window * d_in, low_rank)
        options |= {"window": window} if window > 1 else {}
        out = cotangents(D)
        grads = call(form, "backward", {"weight": weight, **inputs, **options, **out})
        if low_rank:
            inputs["P"], inputs["Q"] = weight
            grads["P"], grads["Q"] = grads.pop("weight")
        else:
            inputs["weight"] = weight

        def scalar(P: Any = None, Q: Any = None, weight: Any = None, **point: Any) -> float:
            given = {"weight": (P, Q) if low_rank else weight, **point, **options}
            return loss(call(form, "forward", given), **out)

        want = oracle.finite_differences(scalar, inputs)
        for name in inputs:
            assert oracle.relative_error(grads[name], want[name]) <= self.bound, name

    @EVERY_FORM
    def test_absent_dc_last_is_zero(self, form: str) -> None:
        inputs, options = case(form, 2)
        dh = cotangents(2)["dh"]
        want = run_and_differentiate(form, inputs, options, dh=dh, dc_last=np.zeros((2, B, d)))
        assert_same(run_and_differentiate(form, inputs, options, dh=dh), want)


class TestDirections:
    @pytest.mark.parametrize("v", ["constant", "per_step"])
    @EVERY_FORM
    def test_two_directions_are_two_runs(self, form: str, v: str) -> None:
        """Direction 1 is direction 0 on the sequence turned round, from its own weights and its half of x."""
        inputs, options = case(form, 2, v=v)
        out = cotangents(2)
        both = run_and_differentiate(form, inputs, options, **out)
        for q in (0, 1):
            one = {"t": slice(None, None, -1) if q else ALL, "q": slice(q, q + 1)}
            got = run_and_differentiate(form, part(inputs, **one), part(options, **one), **part(out, **one))
            want = part(both, **one)
            assert got.keys() == want.keys()
            for name in want:
                # Sums over time run in the other order for the turned sequence.
                np.testing.assert_allclose(got[name], want[name], rtol=1e-13, atol=1e-14, err_msg=name)

    @DIRECTIONS
    @EVERY_FORM
    def test_sequences_do_not_see_each_other(self, form: str, D: int) -> None:
        inputs, options = case(form, D, "lengths+mask+reset")
        h, c_last = run(form, inputs, options)
        for b in range(B):
            one = slice(b, b + 1)
            h_b, c_b = run(form, part(inputs, b=one), part(options, b=one))
            np.testing.assert_array_equal(h_b, h[:, one])
            np.testing.assert_array_equal(c_b, c_last[:, one])


# Gradients that every step has of its own, and what there is one of for each sequence.
PER_STEP, PER_SEQUENCE = ("h", "du", "dx"), ("c_last", "dc0")


class TestPadding:
    @DIRECTIONS
    @EVERY_FORM
    def test_lengths_is_truncation(self, form: str, D: int) -> None:
        inputs, options = case(form, D)
        lengths = np.array([L, 2, 0], np.uint8)
        out = cotangents(D)
        got = run_and_differentiate(form, inputs, {**options, "lengths": lengths}, **out)
        for b, length in enumerate(lengths):
            exists = np.arange(L) < length
            self.check_that_the_rest_was_left_out(form, got, inputs, options, out, b, exists)

    @DIRECTIONS
    @EVERY_FORM
    def test_masked_steps_are_as_if_left_out(self, form: str, D: int) -> None:
        inputs, options = case(form, D, "mask")
        mask = options["mask"]
        assert mask[:, 0].any() and not mask[:, 0].all()
        out = cotangents(D)
        got = run_and_differentiate(form, inputs, options, **out)
        without = {name: value for name, value in options.items() if name != "mask"}
        for b in range(B):
            self.check_that_the_rest_was_left_out(form, got, inputs, without, out, b, ~mask[:, b])

    @staticmethod
    def check_that_the_rest_was_left_out(
        form: str, got: Any, inputs: Any, options: Any, out: Any, b: int, steps: np.ndarray
    ) -> None:
        """Sequence b has what it has if it consists of these steps alone, and zeros at the others."""
        some = {"t": steps, "b": slice(b, b + 1)}
        want = run_and_differentiate(form, part(inputs, **some), part(options, **some), **part(out, **some))
        assert want.keys() >= {"h", "du", *PER_SEQUENCE}
        mine = part({name: got[name] for name in (*PER_STEP, *PER_SEQUENCE) if name in got}, b=some["b"])
        for name in PER_STEP:
            if name in mine:
                np.testing.assert_array_equal(mine[name][steps], want[name], err_msg=name)
                assert not mine[name][~steps].any()
        for name in PER_SEQUENCE:
            np.testing.assert_array_equal(mine[name], want[name], err_msg=name)

    @DIRECTIONS
    @EVERY_FORM
    def test_mask_everywhere_carries_c0(self, form: str, D: int) -> None:
        inputs, options = case(form, D, mask=np.ones((L, B)))
        h, c_last = run(form, inputs, options)
        assert not h.any()
        np.testing.assert_array_equal(c_last, inputs["c0"])

    @DIRECTIONS
    @EVERY_FORM
    def test_trailing_mask_is_lengths(self, form: str, D: int) -> None:
        inputs, options = case(form, D)
        lengths = np.array([L, 2, 0])
        out = cotangents(D)
        assert_same(
            run_and_differentiate(form, inputs, {**options, "mask": np.arange(L)[:, None] >= lengths}, **out),
            run_and_differentiate(form, inputs, {**options, "lengths": lengths}, **out),
        )

    @PADDED
    @DIRECTIONS
    @EVERY_FORM
    def test_content_of_padding_has_no_influence(self, form: str, D: int, layout: str) -> None:
        inputs, options = case(form, D, layout, v="per_step")
        out = cotangents(D)
        want = run_and_differentiate(form, inputs, options, **out)
        dead = ~oracle.live_steps(L, B, options.get("lengths"), options.get("mask"))
        assert dead.any()
        poisoned = {name: None if a is None else a.copy() for name, a in inputs.items()}
        if "zoneout_mask" in options:
            options = {**options, "zoneout_mask": options["zoneout_mask"].astype(float)}
        for array in (poisoned["u"], poisoned["x"], poisoned.get("v"), options.get("zoneout_mask")):
            if array is not None:
                array[dead] = np.nan
        out["dh"][dead] = np.nan
        got = run_and_differentiate(form, poisoned, options, **out)
        assert_same(got, want)
        assert all(not got[name][dead].any() for name in ("h", "du", "dv") if name in got)

    @DIRECTIONS
    @pytest.mark.parametrize("cell", ["sru", "qrnn", "mingru", "minlstm"])
    def test_content_of_padding_has_no_influence_on_the_layer(self, cell: str, D: int) -> None:
        form = {"sru": "skip_x", "qrnn": "qrnn_fo_skip_x"}.get(cell, cell)
        rng = np.random.default_rng(4)
        inputs, options = case(form, D, "lengths+mask", dropout=False)
        del inputs["u"]
        inputs["x"] = rng.standard_normal((L, B, D * d))
        window = 2 if cell == "qrnn" else 1
        inputs["weight"] = oracle.random_weight(rng, D, FORMS[form].k, d, window * D * d)
        options |= {"window": window} if cell == "qrnn" else {}
        dead = ~oracle.live_steps(L, B, options["lengths"], options["mask"])
        poisoned = {**inputs, "x": np.where(dead[:, :, None], np.nan, inputs["x"])}
        for got, want in zip(call(form, "forward", poisoned | options), call(form, "forward", inputs | options)):
            np.testing.assert_array_equal(got, want)
        grads = call(form, "backward", poisoned | options | cotangents(D))
        assert_same(grads, call(form, "backward", inputs | options | cotangents(D)))
        assert not grads["x"][dead].any()


class TestReset:
    @pytest.mark.parametrize("cut", range(1, L))
    @EVERY_FORM
    def test_reset_is_two_runs(self, form: str, cut: int) -> None:
        """From state 0, the forward direction runs the second part and the reverse direction the first."""
        inputs, options = case(form, 2, v="per_step")
        reset = np.zeros((L, B), bool)
        reset[cut] = True
        out = cotangents(2)
        got = run_and_differentiate(form, inputs, {**options, "reset": reset}, **out)
        c0, dc_last = inputs["c0"], out["dc_last"]
        parts = []
        for steps, q in ((slice(0, cut), 0), (slice(cut, L), 1)):
            # Direction q enters the whole sequence through this part, and leaves it through the other.
            some, some_out = part(inputs, t=steps), part(out, t=steps)
            some["c0"], some_out["dc_last"] = np.zeros_like(c0), dc_last.copy()
            some["c0"][q] = c0[q]
            some_out["dc_last"][q] = 0
            parts.append(run_and_differentiate(form, some, part(options, t=steps), **some_out))
        first, second = parts
        for name in got.keys() & {"h", "du", "dv", "dx"}:
            np.testing.assert_array_equal(got[name], np.concatenate([first[name], second[name]]), err_msg=name)
        np.testing.assert_array_equal(got["c_last"], np.stack([second["c_last"][0], first["c_last"][1]]))
        np.testing.assert_array_equal(got["dc0"], np.stack([first["dc0"][0], second["dc0"][1]]))

    @EVERY_FORM
    def test_reset_at_the_first_step(self, form: str) -> None:
        """The forward direction ignores c0; the reverse direction has no boundary there."""
        inputs, options = case(form, 2)
        reset = np.zeros((L, B), bool)
        reset[0] = True
        out = cotangents(2)
        zeroed = {**inputs, "c0": inputs["c0"] * [[[0]], [[1]]]}
        want = run_and_differentiate(form, zeroed, options, **out)
        want["dc0"][0] = 0
        inputs["c0"][0] = np.nan
        assert_same(run_and_differentiate(form, inputs, {**options, "reset": reset}, **out), want)

    @EVERY_FORM
    def test_reset_at_a_masked_step_zeroes_the_carried_state(self, form: str) -> None:
        inputs, options = case(form, 2)
        mask, reset = np.zeros((L, B), bool), np.zeros((L, B), bool)
        mask[2:] = reset[3] = True
        h, c_last = run(form, inputs, {**options, "mask": mask, "reset": reset})
        assert not c_last[0].any() and not h[2:].any()
        # The reverse direction carries c0 through steps 4 and 3, and 0 from the boundary on to step 1.
        some = {**part(inputs, t=slice(0, 2)), "c0": inputs["c0"] * [[[1]], [[0]]]}
        from_zero, c_from_zero = run(form, some, part(options, t=slice(0, 2)))
        np.testing.assert_array_equal(h[:2], from_zero)
        np.testing.assert_array_equal(c_last[1], c_from_zero[1])

    @DIRECTIONS
    @EVERY_FORM
    def test_no_boundary_beyond_the_length(self, form: str, D: int) -> None:
        inputs, options = case(form, D)
        lengths = np.array([3, 0, 1])
        reset = np.arange(L)[:, None] >= lengths
        out = cotangents(D)
        assert_same(
            run_and_differentiate(form, inputs, {**options, "lengths": lengths, "reset": reset}, **out),
            run_and_differentiate(form, inputs, {**options, "lengths": lengths}, **out),
        )


class TestArguments:
    @pytest.mark.parametrize(
        ("form", "name"),
        [
            (form, name)
            for form in FORMS
            for name in ("bias", "v", "c0", "dropout_mask", "zoneout_mask", "lengths", "mask", "reset")
            if name
            not in {"sru": ("zoneout_mask",), "qrnn": ("v", "dropout_mask")}.get(
                FORMS[form].cell, ("v", "dropout_mask", "zoneout_mask")
            )
        ],
    )
    def test_defaults(self, form: str, name: str) -> None:
        """None means zeros, ones for the masks of dropout and zoneout, full lengths, and no padding or boundary."""
        inputs, options = case(form, 2, "lengths+mask+reset")
        everything = inputs | options
        ones = {"dropout_mask": (B, 2, d), "zoneout_mask": (L, B, 2, d)}
        neutral = np.full(B, L) if name == "lengths" else np.zeros_like(everything[name])
        want = run(form, {**everything, name: np.ones(ones[name]) if name in ones else neutral}, {})
        without = dict(everything)
        del without[name]
        for got in (run(form, without, {}), run(form, {**everything, name: None}, {})):
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])
        changed = run(form, everything, {})
        assert any((a != b).any() for a, b in zip(changed, want))

    @pytest.mark.parametrize("form", SRU_FORMS)
    def test_alpha_enters_the_skip_of_x_only(self, form: str) -> None:
        inputs, options = case(form, 2)
        (h1, c1), (h2, c2) = (run(form, inputs, {**options, "alpha": alpha}) for alpha in (1, 7))
        assert (h1 != h2).any() == (form == "skip_x")
        np.testing.assert_array_equal(c1, c2)

    @DIRECTIONS
    @pytest.mark.parametrize("form", SRU_FORMS)
    def test_v_per_step_that_is_constant(self, form: str, D: int) -> None:
        inputs, options = case(form, D, "lengths+mask+reset")
        out = cotangents(D)
        want = run_and_differentiate(form, inputs, options, **out)
        inputs["v"] = np.broadcast_to(inputs["v"], (L, B, *inputs["v"].shape))
        got = run_and_differentiate(form, inputs, options, **out)
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

    @EVERY_FORM
    def test_inputs_are_left_as_they_are(self, form: str) -> None:
        inputs, options = case(form, 2, "lengths+mask+reset")
        out = cotangents(2)
        arrays = [a for a in (*inputs.values(), *options.values(), *out.values()) if isinstance(a, np.ndarray)]
        before = [a.copy() for a in arrays]
        run_and_differentiate(form, inputs, options, **out)
        for array, copy in zip(arrays, before):
            np.testing.assert_array_equal(array, copy)

    @pytest.mark.parametrize(
        ("form", "change", "error"),
        [
            pytest.param("skip_x", {"activation": "selu"}, ValueError, id="activation"),
            pytest.param("skip_x", {"reset_on": "next"}, ValueError, id="reset_on"),
            pytest.param("skip_x", {"reset_gate": False}, ValueError, id="gates"),
            pytest.param("skip_x", {"x": None}, (ValueError, TypeError), id="no_x"),
            pytest.param("skip_x", {"bias": np.zeros((1, 1, d))}, ValueError, id="bias"),
            pytest.param("skip_x", {"lengths": [L + 1, 0, 0]}, ValueError, id="lengths"),
            pytest.param("skip_x", {"mask": np.zeros((B, L))}, ValueError, id="mask"),
            pytest.param("skip_x", {"time_parallel": True}, TypeError, id="unknown_option"),
            pytest.param("qrnn_fo", {"pooling": "fi"}, ValueError, id="pooling"),
            pytest.param("qrnn_f", {"highway": True}, ValueError, id="pooling_f_with_highway"),
            pytest.param("qrnn_fo", {"pooling": "ifo"}, ValueError, id="gates_of_qrnn"),
            pytest.param("qrnn_fo_skip_x", {"x": None}, ValueError, id="no_x_of_qrnn"),
            pytest.param("qrnn_fo", {"x": np.zeros((L, B, d))}, ValueError, id="x_without_highway"),
            pytest.param("qrnn_fo", {"zoneout_mask": np.zeros((B, 1, d))}, ValueError, id="zoneout_mask"),
            pytest.param("mingru", {"candidate": "negative"}, ValueError, id="candidate"),
            pytest.param("mingru", {"bias": np.zeros((1, 3, d))}, ValueError, id="bias_of_mingru"),
            pytest.param("minlstm", {"u": np.zeros((L, B, 1, 2, d))}, ValueError, id="gates_of_minlstm"),
        ],
    )
    def test_wrong_arguments_are_refused(self, form: str, change: dict[str, Any], error: Any) -> None:
        inputs, options = case(form, 1)
        with pytest.raises(error):
            run(form, {**inputs, **options, **change}, {})

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


# Errors that one might make, as replacements in a file of the oracle; the checks above find each.
MUTATIONS = {
    "frame.py": [
        ("state = np.where(fresh, 0.0, state)", "pass"),
        ("dstate = np.where(fresh, 0.0, dstate)", "pass"),
        ("np.where(live, before, dstate)", "before"),
        ("np.where(live, new, state)", "new"),
        ("boundary[:-1], boundary[1:]", "boundary[:-1], boundary[:-1]"),
        ("range(L - 1, -1, -1)", "range(L)"),
    ],
    "projection.py": [
        ("window - 1 - tap", "tap"),
        ("t - back if q == 0 else t + back", "t - back"),
        ("live[source] & (segment[source] == segment[t])", "live[source]"),
        ("live[source] & (segment[source] == segment[t])", "segment[source] == segment[t]"),
        ("dx[source] += ", "dx[t] += "),
    ],
    "sru.py": [
        ("(1 - f) * p[", "f * p["),
        ("df = dc * (c_in - u0)", "df = dc * c_in"),
        ('c_in if o.reset_on == "previous" else c)', "c)"),
    ],
    "qrnn.py": [
        ("Z, F, O, I = range(4)", "F, Z, O, I = range(4)"),
        ("np.tanh(a[:, Z])", "a[:, Z]"),
        ('1 - p["zoneout"] * (1 - gate)', 'p["zoneout"] * gate'),
        ("f * c_in + i * z", "f * c_in + (1 - f) * z"),
        ("o * c + (1 - o) * skip", "o * c + skip"),
        ("dh * (c - skip)", "dh * c"),
        ("df = df - dc * z", "pass"),
        ('df * p["zoneout"] * gate', "df * gate"),
        ("(1 - z * z)", "(1 - z)"),
        ("return found, dc * f", "return found, dc * gate"),
    ],
    "mingru.py": [
        ("(1 - z) * h_in + z * n", "z * h_in + (1 - z) * n"),
        ("dh * (n - h_in)", "dh * n"),
        ("dh = dh + dstate", "pass"),
        ("dh * (1 - z)", "dh * z"),
    ],
    "minlstm.py": [
        ("keep * h_in + take * n", "keep * h_in + n"),
        ("by_i / (by_i + by_f), by_f / (by_i + by_f)", "by_f / (by_i + by_f), by_i / (by_i + by_f)"),
        ("df * sigmoid(-a[:, 0])", "df * sigmoid(a[:, 0])"),
        ("-df * sigmoid(-a[:, 1])", "df * sigmoid(-a[:, 1])"),
        ("}, dh * keep", "}, dh"),
        ("m = np.maximum(np.maximum(-af, -ai), 0.0)", "m = 0.0"),
    ],
    "minrnn.py": [
        ("np.where(n >= 0, n + 0.5, sigmoid(n))", "n + 0.5"),
        ("sigmoid(n) * (1 - sigmoid(n))", "sigmoid(n)"),
    ],
}


def check_all(cell: str | None) -> None:
    """What the tests above check of the forms of a cell, or of all cells."""
    mine = [name for name, form in FORMS.items() if cell in (None, form.cell)]
    for form in mine:
        for D, layout in ((1, "none"), (2, "lengths+mask+reset")):
            check_slope(form, D, layout)
        TestDirections().test_two_directions_are_two_runs(form, "constant")
        TestPadding().test_lengths_is_truncation(form, 2)
        TestReset().test_reset_is_two_runs(form, 2)
    TestGradients().test_every_element_of_the_layer("qrnn_fo_skip_x", 3, 2, 3, "lengths+mask+reset")
    runs: list[tuple[Any, str]] = []
    runs += [(TestSruByHand(), name) for name in ("test_two_steps", "test_gradients_of_one_step")]
    runs += [(TestOthersByHand(), name) for name in ("test_qrnn", "test_min_rnns")]
    runs += [(TestOthersByHand(), "test_gates_of_minlstm_where_both_saturate")]
    runs += [(TestWindow(), "test_what_each_tap_sees"), (TestWindow(), "test_packed_documents_are_as_if_run_alone")]
    for owner, name in runs:
        test = getattr(owner, name)
        marks = [mark.args for mark in getattr(test, "pytestmark", [])]
        names = [[n.strip() for n in args[0].split(",")] if isinstance(args[0], str) else args[0] for args in marks]
        for values in itertools.product(*(args[1] for args in marks)):
            given: dict[str, Any] = {}
            for keys, value in zip(names, values):
                value = getattr(value, "values", value)
                given |= zip(keys, value if len(keys) > 1 or isinstance(value, tuple) else [value])
            test(**given)


class TestMutations:
    @pytest.mark.parametrize(
        ("file", "text", "wrong"), [(file, *pair) for file, pairs in MUTATIONS.items() for pair in pairs]
    )
    def test_an_error_in_the_oracle_is_found(
        self, file: str, text: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "mutated_oracle"
        shutil.copytree(Path(oracle.__file__).parent, tmp_path / name)
        source = (tmp_path / name / file).read_text()
        assert source.count(text) >= 1
        (tmp_path / name / file).write_text(source.replace(text, wrong))
        monkeypatch.syspath_prepend(tmp_path)
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys.modules[__name__], "oracle", importlib.import_module(name))
        with pytest.raises((AssertionError, FloatingPointError)):
            check_all({"minrnn.py": None, "frame.py": None, "projection.py": None}.get(file, file[:-3]))

    def test_the_checks_pass_without_an_error(self) -> None:
        check_all(None)
