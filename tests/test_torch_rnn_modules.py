"""The modules of the PyTorch binding as modules: made, initialized, copied, traced, and given what is wrong."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import sru_rt
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError

torch = pytest.importorskip("torch")

from sru_rt.bindings.torch import QRNN, RNN, MinGRU, MinLSTM
from torch.nn.utils.rnn import pack_sequence


@sru_rt.cell(gates="a n", params="b w", state="c", constants="alpha beta")
def leaky(a, n, b, w, c, alpha, beta=2.0):
    a = sru_rt.sigmoid(a + b + w * c)
    c = a * c + (1 - a) * n
    return c, sru_rt.tanh(alpha * c) * beta


@sru_rt.cell(gates="a", inputs="x gain", per_sequence="m", state="c y")
def two_states(a, x, gain, m, c, y):
    c = sru_rt.sigmoid(a) * (c + y) * m
    return c, c * gain, c + x


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MinGRU, {"forget_bias": 1.5}),
        (MinLSTM, {"candidate": "positive"}),
        (QRNN, {"window": 2, "highway": True, "pooling": "ifo"}),
        (RNN, {"cell": leaky, "params": {"b": 1.0}, "constants": {"alpha": 0.5}}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_names_and_shapes_of_parameters():
    assert shapes(MinGRU(5, 4, 2, bidirectional=True)) == {
        "weight_l0": (2, 2, 4, 5),
        "bias_l0": (2, 2, 4),
        "weight_l1": (2, 2, 4, 8),
        "bias_l1": (2, 2, 4),
    }
    assert shapes(MinLSTM(5, 4, bias=False, low_rank=3)) == {"weight_l0_p": (1, 3, 4, 3), "weight_l0_q": (3, 5)}
    # The first layer's skip needs a matrix, the second's does not.
    assert shapes(QRNN(5, 4, 2, pooling="ifo", highway=True, window=3)) == {
        "weight_l0": (1, 5, 4, 15),
        "bias_l0": (1, 4, 4),
        "weight_l1": (1, 4, 4, 12),
        "bias_l1": (1, 4, 4),
    }
    assert shapes(QRNN(4, 4, highway=True, project_skip=True, low_rank=2))["weight_l0_p"] == (1, 4, 4, 2)
    assert shapes(RNN(5, 4, cell=leaky, constants={"alpha": 1})) == {"weight_l0": (1, 2, 4, 5), "params_l0": (1, 2, 4)}
    assert shapes(RNN(4, 4, cell=two_states)) == {"weight_l0": (1, 1, 4, 4)}


@pytest.mark.parametrize(("kind", "row", "sign"), [(MinGRU, 0, -1), (MinLSTM, 0, 1), (QRNN, 1, 1)])
def test_initial_values(kind, row, sign):
    torch.manual_seed(1)
    module = kind(100, 90, 2, forget_bias=1.5, low_rank=50, dropout=0.1)
    for name, parameter in module.named_parameters():
        if name.startswith("weight"):
            columns = parameter.shape[-1]
            assert parameter.abs().max() <= math.sqrt(3 / columns) * (1 + 1e-6)
            assert parameter.var().item() == pytest.approx(1 / columns, rel=0.1)
        else:
            rows = range(parameter.shape[1])
            assert all((parameter[:, i] == (sign * 1.5 if i == row else 0)).all() for i in rows)
    torch.manual_seed(1)
    again = kind(100, 90, 2, forget_bias=1.5, low_rank=50, dropout=0.1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters()))


def test_initial_values_of_an_own_cell():
    module = RNN(5, 3, cell=leaky, params={"b": 2.0, "w": torch.arange(3.0)}, constants={"alpha": 1.0})
    assert torch.equal(module.params_l0[0], torch.tensor([[2.0, 2, 2], [0, 1, 2]]))


@KINDS
def test_made_without_memory_first(kind, options):
    module = kind(5, 4, 2, bidirectional=True, device="meta", dtype=torch.float64, **options)
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(2)
    module.reset_parameters()
    torch.manual_seed(2)
    wanted = kind(5, 4, 2, bidirectional=True, dtype=torch.float64, **options)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), wanted.parameters()))
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    assert torch.equal(module(x)[0], wanted(x)[0])


@KINDS
def test_shapes_without_values(kind, options):
    module = kind(5, 4, 2, device="meta", **options)
    h, last = module(torch.empty(6, 3, 5, device="meta"))
    assert h.is_meta and h.shape == (6, 3, 4) and last.shape == (2, 3, 4)


@KINDS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(kind, options, copied):
    module = kind(5, 4, 2, **options)
    x = torch.randn(6, 3, 5)
    other = copied(module)
    assert repr(other) == repr(module) and torch.equal(other(x)[0], module(x)[0])
    with torch.no_grad():
        other.weight_l0.zero_()
    assert not torch.equal(other(x)[0], module(x)[0])
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])


def test_repr_says_what_is_no_default():
    assert repr(MinGRU(5, 4)) == "MinGRU(5, 4)"
    assert repr(MinLSTM(5, 4, 2, batch_first=True)) == "MinLSTM(5, 4, num_layers=2, batch_first=True)"
    module = QRNN(5, 4, bias=False, window=2, highway=True, zoneout=0.1, recompute="x")
    assert repr(module) == "QRNN(5, 4, bias=False, window=2, highway=True, zoneout=0.1, recompute='x')"
    text = repr(RNN(5, 4, cell=leaky, constants={"alpha": 1.0}))
    assert "cell=<cell leaky" in text and "constants={'alpha': 1.0}" in text


def test_dropout_of_one_layer_warns():
    with pytest.warns(UserWarning, match=r"QRNN: dropout=0.2 acts between layers"):
        QRNN(5, 4, dropout=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QRNN(5, 4, 2, dropout=0.2)


# ----------------------------------------------------------------------------------------------------------------------
# Tracing, and autocast


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_whole(training):
    torch.manual_seed(0)
    module = QRNN(5, 4, 2, window=2, highway=True, bidirectional=True, batch_first=True, dropout=0.5, zoneout=0.5)
    module.train(training)
    x = torch.randn(3, 6, 5, requires_grad=True)
    given = {"lengths": torch.tensor([6, 2, 0]), "reset": torch.rand(3, 6) < 0.3}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    h, last = compiled(x, torch.zeros(4, 3, 4), **given)
    torch.manual_seed(1)
    wanted, wanted_last = module(x, torch.zeros(4, 3, 4), **given)
    torch.testing.assert_close(h, wanted)
    torch.testing.assert_close(last, wanted_last)
    parameters = [x, *module.parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in (h, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_compiled_step():
    module = QRNN(5, 4, 2, window=3)
    step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    state = other = module.initial_step_state(2)
    for token in torch.randn(4, 2, 5):
        h, state = step(token, state)
        wanted, other = module.step(token, other)
        torch.testing.assert_close((h, *state), (wanted, *other))


def test_exported_for_any_length_and_batch():
    module = RNN(4, 4, 2, cell=two_states)
    L, B = torch.export.Dim("L"), torch.export.Dim("B")

    def arguments(L, B):
        values = {"gain": torch.randn(L, B, 4), "m": torch.randn(B, 1, 4)}
        state = (torch.randn(2, B, 4), torch.randn(2, B, 4))
        return (torch.randn(L, B, 4), state), {"lengths": torch.randint(0, L + 1, (B,)), "values": values}

    tokens, batch = {0: L, 1: B}, {1: B}
    shapes = {"input": tokens, "state": (batch, batch), "lengths": {0: B}, "values": {"gain": tokens, "m": {0: B}}}
    args, kwargs = arguments(5, 3)
    exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes).module()
    for sizes in ((9, 4), (2, 7)):
        args, kwargs = arguments(*sizes)
        torch.testing.assert_close(exported(*args, **kwargs), module(*args, **kwargs))


@KINDS
def test_autocast(kind, options):
    module = kind(5, 4, 2, **options)
    x = torch.randn(6, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        h, last = module(x)
        again, _ = module(x, last)
    assert h.dtype == again.dtype == torch.bfloat16 and last.dtype == torch.float32
    h.float().sum().backward()
    assert module.weight_l0.grad.dtype == torch.float32
    torch.testing.assert_close(h.float(), module(x)[0], atol=0.05, rtol=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong

WRONG_OPTIONS = [
    (MinGRU, dict(hidden_size=0), ArgumentError, r"MinGRU: hidden_size must be a positive integer \(got 0\)"),
    (MinGRU, dict(input_size=2.0), ArgumentError, r"input_size must be a positive integer \(got 2.0\)"),
    (MinGRU, dict(num_layers=True), ArgumentError, r"num_layers must be a positive integer \(got True\)"),
    (MinGRU, dict(low_rank=0), ArgumentError, "low_rank must be a positive integer"),
    (MinGRU, dict(dropout=1.5), ArgumentError, r"dropout must be a probability, .* \(got 1.5\)"),
    (MinGRU, dict(dropout="much"), ArgumentError, "dropout must be a number"),
    (MinGRU, dict(batch_first="yes"), ArgumentError, "batch_first must be one of True, False"),
    (MinGRU, dict(candidate="log"), ArgumentError, "candidate must be one of 'identity', 'positive'"),
    (MinGRU, dict(forget_bias=math.nan), ArgumentError, "forget_bias must be finite"),
    (MinGRU, dict(recompute=0), ArgumentError, r"recompute must be False, True, .* \(got 0\)"),
    (MinGRU, dict(recompute="u"), ArgumentError, "recompute must be"),
    (MinGRU, dict(time_parallel=2), ArgumentError, "time_parallel must be one of"),
    (MinGRU, dict(dtype=torch.int32), ArgumentError, "dtype must be one of torch.float16"),
    (QRNN, dict(pooling="of"), ArgumentError, "pooling must be one of 'f', 'fo', 'ifo'"),
    (QRNN, dict(window=0), ArgumentError, "window must be a positive integer"),
    (QRNN, dict(zoneout=-0.1), ArgumentError, "zoneout must be a probability"),
    (QRNN, dict(pooling="f", highway=True), ArgumentError, "highway is True, but pooling='f' has no output gate"),
    (QRNN, dict(project_skip=True), ArgumentError, "project_skip is True, but without highway=True"),
    (QRNN, dict(highway=True, project_skip=False), ArgumentError, "adds an input of size 5 to an output of size 4"),
    (RNN, dict(cell=len), LibraryError, "cell must be what @sru_rt.cell makes"),
    (RNN, dict(cell=leaky), ArgumentError, "constants lacks 'alpha', which has no default"),
    (RNN, dict(cell=leaky, constants={"gamma": 1}), ArgumentError, "constants has 'gamma'.* are: alpha, beta"),
    (RNN, dict(cell=leaky, constants={"alpha": "x"}), ArgumentError, r"constants\['alpha'\] must be a number"),
    (RNN, dict(cell=leaky, params={"c": 1}), ArgumentError, "params has a value for 'c'; .* are: b, w"),
    (
        RNN,
        dict(cell=leaky, constants={"alpha": 1}, params={"b": "x"}),
        ArgumentError,
        r"\['b'\] must be a number",
    ),
    (RNN, dict(cell=leaky, constants={"alpha": 1}, params={"b": [1, 2]}), ArgumentError, r"broadcasts to \(1, 4\)"),
    (RNN, dict(cell=two_states), ShapeError, r"input_size is 5, but cell two_states takes x itself: .* = 4"),
]


@pytest.mark.parametrize(("kind", "options", "error", "match"), WRONG_OPTIONS, ids=lambda v: "")
def test_wrong_options(kind, options, error, match):
    with pytest.raises(error, match=match) as e:
        kind(**({"input_size": 5, "hidden_size": 4} | options))
    assert str(e.value).startswith(f"{kind.__name__}: ")


X, STATE = torch.zeros(6, 3, 5), torch.zeros(2, 3, 4)
PACKED = pack_sequence([torch.zeros(2, 5), torch.zeros(1, 5)])
WRONG_CALLS = [
    ((X.numpy(),), {}, LibraryError, r"input must be a torch.Tensor \(L, B, input_size\) or a PackedSequence \(got nd"),
    ((X[..., :4],), {}, ShapeError, r"input has shape \(6, 3, 4\); it needs .* with input_size = 5"),
    ((X[0, 0],), {}, ShapeError, r"input has shape \(5,\)"),
    ((X.double(),), {}, DtypeError, r"input has dtype torch.float64; it needs torch.float32: convert it with input.to"),
    ((X.long(),), {}, DtypeError, "input has dtype torch.int64"),
    ((X.to("meta"),), {}, LibraryError, "input is on meta, but the module is on cpu; move it with"),
    ((X, STATE[:1]), {}, ShapeError, r"state has shape \(1, 3, 4\); it needs \(num_layers\*D, B, hid.* = \(2, 3, 4\)"),
    ((X, STATE[:, :2]), {}, ShapeError, r"state has shape \(2, 2, 4\)"),
    ((X, (STATE, STATE)), {}, LibraryError, r"state must be a torch.Tensor \(got tuple\)"),
    ((X, STATE.double()), {}, DtypeError, "state has dtype torch.float64; it needs torch.float32"),
    ((X, STATE.to("meta")), {}, LibraryError, "state is on meta, but input is on cpu"),
    ((X,), {"lengths": [1, 2]}, ShapeError, r"lengths has shape \(2,\); it needs \(B\) = \(3\)"),
    ((X,), {"lengths": [1, 2, 7]}, ArgumentError, r"lengths must be from 0 to L = 6 \(got values from 1 to 7\)"),
    ((X,), {"lengths": [1, 2, 3.5]}, DtypeError, "lengths has dtype torch.float32; it needs an integer dtype"),
    ((X,), {"lengths": [1, 2, "a"]}, ArgumentError, "lengths must be a tensor or a list of integers"),
    ((X,), {"lengths": 3}, LibraryError, r"lengths must be a tensor or a list of integers \(got int\)"),
    ((X[:, 0],), {"lengths": [3]}, ArgumentError, "lengths is given with one sequence"),
    ((X,), {"mask": torch.zeros(3, 6)}, ShapeError, r"mask has shape \(3, 6\); it needs \(L, B\) = \(6, 3\)"),
    ((X,), {"reset": [[True]]}, LibraryError, r"reset must be a torch.Tensor \(got list\)"),
    ((PACKED,), {"lengths": [2, 1]}, ArgumentError, "lengths is given with a PackedSequence"),
    ((PACKED,), {"mask": torch.zeros(2, 2)}, ArgumentError, "mask is given with a PackedSequence"),
    ((PACKED, STATE), {}, ShapeError, r"state has shape \(2, 3, 4\); it needs .* = \(2, 2, 4\)"),
    ((pack_sequence([torch.zeros(2, 4)]),), {}, ShapeError, r"input.data has shape \(2, 4\)"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "match"), WRONG_CALLS, ids=lambda v: "")
def test_wrong_calls(args, kwargs, error, match):
    with pytest.raises(error, match=match) as e:
        MinGRU(5, 4, bidirectional=True)(*args, **kwargs)
    assert str(e.value).startswith("MinGRU.forward: ")


def test_wrong_steps():
    both = MinLSTM(5, 4, bidirectional=True)
    with pytest.raises(ArgumentError, match=r"MinLSTM.step: the module is bidirectional"):
        both.step(X[0])
    with pytest.raises(ArgumentError, match=r"MinLSTM.initial_step_state: the module is bidirectional"):
        both.initial_step_state(3)
    module = QRNN(5, 4, window=3)
    with pytest.raises(ShapeError, match=r"QRNN.step: input has shape \(6, 3, 5\); it needs \(B, input_size\)"):
        module.step(X)
    with pytest.raises(LibraryError, match=r"QRNN.step: state must be a QRNNState, since a window of 3 .*got Tensor"):
        module.step(X[0], module(X)[1])
    state = module.initial_step_state(3)
    with pytest.raises(ShapeError, match=r"state.tokens\[0\] has shape \(1, 3, 5\); it needs .* = \(2, 3, 5\)"):
        module.step(X[0], state._replace(tokens=(state.tokens[0][:1],)))
    with pytest.raises(ArgumentError, match=r"state.tokens must be a tuple of 1 tensors"):
        module.step(X[0], state._replace(tokens=()))
    with pytest.raises(ShapeError, match=r"state.c has shape"):
        module.step(X[0], state._replace(c=state.c[:, :1]))


def test_wrong_values():
    module, x, gain, m = RNN(4, 4, 2, cell=two_states), torch.zeros(6, 3, 4), torch.zeros(6, 3, 4), torch.ones(3, 1, 4)
    for values, error, match in (
        (None, ArgumentError, "RNN.forward: values lacks 'gain'"),
        ({"gain": gain}, ArgumentError, "values lacks 'm'"),
        ({"gain": gain, "m": m, "x": x}, ArgumentError, "values has 'x'; cell two_states takes by name: gain, m"),
        ({"gain": gain[:5], "m": m}, ShapeError, r"values\['gain'\] has shape \(5, 3, 4\); it needs \(L, B, D\*d\) ="),
        (
            {"gain": [gain], "m": m},
            ArgumentError,
            r"values\['gain'\] has 1 tensors; it needs one, or one for each",
        ),
        ({"gain": [gain, 1], "m": m}, LibraryError, r"values\['gain'\]\[1\] must be a torch.Tensor"),
        ({"gain": gain.double(), "m": m}, DtypeError, r"values\['gain'\] has dtype torch.float64"),
        (
            {"gain": gain, "m": m[:, 0]},
            ShapeError,
            r"values\['m'\] has shape \(3, 4\); it needs \(B, D, d\) = \(3, 1",
        ),
    ):
        with pytest.raises(error, match=match):
            module(x, values=values)
    with pytest.raises(LibraryError, match=r"state must be a tuple of 2 tensors, one for each state \(got Tensor\)"):
        module(x, torch.zeros(2, 3, 4), values={"gain": gain, "m": m})
    assert module(x, values={"gain": gain, "m": m > 0})[0].shape == (6, 3, 4)


def test_reset_of_packed_sequences_is_in_the_order_of_the_batch():
    module = MinGRU(5, 4)
    x, reset = torch.randn(2, 3, 5), torch.tensor([[False, False], [True, False], [False, True]])
    packed = pack_sequence([x[0, :2], x[1]], enforce_sorted=False)
    _, last = module(packed, reset=reset)
    assert torch.equal(last[0, 0], module(x[0, :2], reset=reset[:2, 0])[1][0])
    assert torch.equal(last[0, 1], module(x[1], reset=reset[:, 1])[1][0])


# ----------------------------------------------------------------------------------------------------------------------
# The docs


def run_page(name: str, *headings: str) -> dict[str, Any]:
    """What the Python of a page of docs/, or of some of its sections, defines."""
    text = (Path(__file__).resolve().parents[1] / "docs" / name).read_text()
    sections = re.split(r"^(?=## )", text, flags=re.M)
    names: dict[str, Any] = {}
    for section in sections:
        if not headings or section.startswith(tuple(f"## {heading}\n" for heading in headings)):
            for block in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
                exec(compile(block, name, "exec"), names)
    return names


def test_the_page_runs():
    names = run_page("torch.md", "Modules in the manner of torch.nn.LSTM")
    assert names["h"].shape == (20, 3, 16) and names["y"].shape == (2, 3, 16) and names["token"].shape == (3, 16)


def test_the_migration_from_lstm_runs():
    names = run_page("migration.md", "From torch.nn.LSTM")
    assert names["h"].shape == (3, 20, 32) and names["state"].shape == names["h_n"].shape


@pytest.mark.parametrize(("kind", "function"), [("minGRU", "from_mingru"), ("minLSTM", "from_minlstm")])
def test_the_migration_from_mingru_pytorch_is_right(kind, function):
    pytest.importorskip("minGRU_pytorch", reason="needs the PyPI package minGRU-pytorch")
    from minGRU_pytorch import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    theirs = {"minGRU": minGRU, "minLSTM": minLSTM}[kind](6, expansion_factor=1.5).double()
    ours = run_page("migration.md", "From minGRU-pytorch")[function](theirs)
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    wanted, hidden = theirs(x, return_next_prev_hidden=True)
    out, state = ours(x)
    torch.testing.assert_close(theirs.to_out(out), wanted)
    torch.testing.assert_close(state, hidden.transpose(0, 1))
    token = torch.randn(3, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(theirs.to_out(ours.step(token[:, 0], state)[0]), theirs(token, hidden)[:, 0])
