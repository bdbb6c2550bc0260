"""Parameters of the modules for PyTorch as those for JAX, and back: the same numbers, layouts and messages."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("torch", reason="needs PyTorch")

import torch
from sru_rt.bindings import jax as binding
from sru_rt.bindings import torch as torch_binding
from sru_rt.bindings.jax import convert, stacks

from jax_tools import jax, jnp, program, with_64_bits
from sru_rt.errors import ArgumentError, ShapeError

__all__ = ["with_64_bits"]  # a fixture

N, D_HIDDEN = 6, 4
# Each with options of the module for PyTorch, of that for JAX, and of functions.
SRU_OPTIONS: dict[str, Any] = {
    "plain": ({}, {"alpha": 1.0}, {}),
    "rescaled, tanh": (
        {"rescale": True, "highway_bias": -1.0, "activation": "tanh"},
        {"highway_bias": -1.0, "activation": "tanh"},
        {"activation": "tanh"},
    ),
    "no v, no skip": ({"v1": True, "has_skip_term": False}, {"recurrent": False, "highway": False}, {"highway": False}),
    "projected": ({"project_skip": True}, {"project_skip": True}, {}),
    "low rank": ({"projection_size": 2}, {"low_rank": 2, "alpha": 1.0}, {}),
}
OTHERS: dict[str, Any] = {
    "MinGRU": {},
    "MinLSTM": {"low_rank": 3, "candidate": "positive"},
    "QRNN": {"window": 2, "highway": True, "pooling": "ifo"},
}


class Holder:
    """What a module of either library is to `convert`."""

    def __init__(self, stack: Any, params: dict[str, Any] | None = None) -> None:
        self.stack = stack
        self._params = stack.draw(jax.random.key(0), jnp.float64) if params is None else params

    def parameters(self) -> dict[str, Any]:
        return self._params

    def with_parameters(self, params: dict[str, Any]) -> Holder:
        assert params.keys() == self._params.keys()
        return Holder(self.stack, params)

    def __call__(self, x: Any) -> Any:
        return self.stack.forward(self._params, x, None, (None, None, None))


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """With other biases than 0."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return module.eval()


def sru(name: str, D: int, layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    options = SRU_OPTIONS[name][0]
    return randomized(
        torch_binding.SRU(N, D_HIDDEN, layers, bidirectional=D == 2, dtype=torch.float64, **options).double()
    )


def tokens() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 3, N))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", SRU_OPTIONS)
def test_sru_both_ways(name, D):
    module, x = sru(name, D), tokens()
    like = Holder(stacks.SRU(N, D_HIDDEN, 2, bidirectional=D == 2, **SRU_OPTIONS[name][1]))
    found = convert.from_torch(module.state_dict(), like)
    h, c = (a.detach().numpy() for a in module(torch.as_tensor(x)))
    got, state = found(x)
    np.testing.assert_allclose(got, h, rtol=1e-6, atol=1e-7)  # of alpha, scale_x has 24 bits
    # (num_layers, B, D*d) there
    state = np.asarray(state).reshape(2, D, 3, D_HIDDEN).swapaxes(1, 2).reshape(2, 3, -1)
    np.testing.assert_allclose(state, c, rtol=1e-6, atol=1e-7)

    back, wanted = convert.to_torch(found), module.state_dict()
    assert back.keys() == wanted.keys()
    for key, value in back.items():
        if key == "rnn_lst.0.scale_x" and D * D_HIDDEN != N:
            continue  # the skip has a matrix of its own, and is not scaled
        np.testing.assert_allclose(value, wanted[key].numpy(), rtol=1e-7, err_msg=key)
    other = sru(name, D)
    other.load_state_dict({key: torch.tensor(a) for key, a in back.items()})
    np.testing.assert_allclose(other(torch.as_tensor(x))[0].detach().numpy(), h, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", SRU_OPTIONS)
def test_sru_as_functions(name, D):
    module, x = sru(name, D), tokens()
    layers = convert.layers_from_torch(module.state_dict(), "sru", directions=D)
    h = jnp.asarray(x)
    for params, options in layers:
        h, _ = binding.sru(h, **params, **options | SRU_OPTIONS[name][2])
    wanted = module(torch.as_tensor(x))[0].detach().numpy()
    np.testing.assert_allclose(h, wanted, rtol=1e-10, atol=1e-12)
    back = convert.layers_to_torch(layers, "sru")
    for key, value in module.state_dict().items():
        if not key.endswith("scale_x"):
            np.testing.assert_array_equal(back[key], value.numpy())


def test_a_single_cell_and_one_inside_of_a_model():
    torch.manual_seed(0)
    cell = torch_binding.SRUCell(N, N, dtype=torch.float64)
    x = tokens()
    ((params, options),) = convert.layers_from_torch(cell.state_dict(), "sru")
    wanted = cell(torch.as_tensor(x))[0].detach().numpy()
    np.testing.assert_allclose(binding.sru(jnp.asarray(x), **params, **options)[0], wanted, rtol=1e-10, atol=1e-12)
    model = torch.nn.ModuleDict({"encoder": sru("plain", 1), "out": torch.nn.Linear(2, 2)})
    inner = convert.layers_from_torch(model.state_dict(), "sru", prefix="encoder.")
    for (a, _), (b, _) in zip(inner, convert.layers_from_torch(model["encoder"].state_dict(), "sru")):
        np.testing.assert_array_equal(a["weight"], b["weight"])
    assert len(inner) == 2


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_others_both_ways(name, D):
    torch.manual_seed(0)
    options = OTHERS[name] | {"bidirectional": D == 2}
    module = randomized(getattr(torch_binding, name)(N, D_HIDDEN, 2, dtype=torch.float64, **options))
    x = tokens()
    found = convert.from_torch(module.state_dict(), Holder(getattr(stacks, name)(N, D_HIDDEN, 2, **options)))
    got, state = found(x)
    h, wanted = (a.detach().numpy() for a in module(torch.as_tensor(x)))
    np.testing.assert_allclose(got, h, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state, wanted, rtol=1e-10, atol=1e-12)
    back = convert.to_torch(found)
    assert back.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        np.testing.assert_array_equal(back[key], value.numpy())
        assert back[key].flags.writeable


def test_names_are_those_of_the_modules_for_pytorch():
    for name, options in OTHERS.items():
        module = getattr(torch_binding, name)(N, D_HIDDEN, 2, **options)
        shapes = getattr(stacks, name)(N, D_HIDDEN, 2, **options).shapes()
        assert shapes == {key: tuple(p.shape) for key, p in module.named_parameters()}


def test_dtypes_stay():
    module = torch_binding.MinGRU(N, D_HIDDEN, dtype=torch.bfloat16)
    stack = stacks.MinGRU(N, D_HIDDEN)
    like = Holder(stack, stack.draw(jax.random.key(0), jnp.bfloat16))
    found = convert.from_torch(module.state_dict(), like)
    assert found.parameters()["weight_l0"].dtype == jnp.bfloat16
    back = convert.to_torch(found)
    assert back["weight_l0"].dtype == np.float32
    np.testing.assert_array_equal(back["weight_l0"], module.weight_l0.detach().float().numpy())


def test_no_other_library_is_imported(tmp_path):
    found = "[name for name in ('torch', 'flax', 'equinox', 'optax') if name in sys.modules]"
    assert program(f"import sys, sru_rt.bindings.jax.convert\nprint({found})", tmp_path) == "[]\n"


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(says: str, error: type[Exception], state_dict: Any, stack: Any) -> None:
    with pytest.raises(error, match="^from_torch: " + re.escape(says)) as caught:
        convert.from_torch(state_dict, Holder(stack))
    assert type(caught.value) is error


def test_what_is_missing_or_wrong_is_named():
    plain = torch_binding.MinGRU(N, D_HIDDEN, 2).state_dict()
    stack = stacks.MinGRU(N, D_HIDDEN, 2)
    without = {key: value for key, value in plain.items() if key != "bias_l1"}
    refused("state_dict lacks bias_l1, which like has", ArgumentError, without, stack)
    refused("state_dict has bias_l0, for which", ArgumentError, plain, stacks.MinGRU(N, D_HIDDEN, 2, use_bias=False))
    refused("state_dict has 2 layers; like has 1", ArgumentError, plain, stacks.MinGRU(N, D_HIDDEN))
    refused(
        "state_dict is of other sizes: bias_l0 has shape (1, 2, 4), as JAX has it",
        ShapeError,
        plain,
        stacks.MinGRU(N, 5, 2),
    )
    refused("state_dict lacks weight_l0 (it has x ...)", ArgumentError, {"x": np.zeros(2)}, stack)
    half = {"weight_l0_p": np.zeros((1, 2, 4, 3))}
    refused("state_dict lacks weight_l0_q", ArgumentError, half, stacks.MinGRU(N, D_HIDDEN, low_rank=3))
    with pytest.raises(ArgumentError, match="from_torch: like must be a module of sru_rt"):
        convert.from_torch(plain, stack)


def test_what_does_not_suit_sru_is_named():
    state_dict = sru("rescaled, tanh", 1).state_dict()
    stack = stacks.SRU(N, D_HIDDEN, 2, alpha=1.0, activation="tanh")
    refused("state_dict has scale_x = 1.31748", ArgumentError, state_dict, stack)
    stack = stacks.SRU(N, D_HIDDEN, 2, highway_bias=-1.0, recurrent=False)
    refused("state_dict has a weight_c that is not 0 in layer 0", ArgumentError, state_dict, stack)
    refused("like has reset_on='current'", ArgumentError, state_dict, stacks.SRU(N, D_HIDDEN, 2, reset_on="current"))
    stack = stacks.SRU(N, D_HIDDEN, 2, alpha=1.0)
    normed = torch_binding.SRU(N, D_HIDDEN, layer_norm=True).state_dict()
    refused("state_dict has rnn_lst.0.layer_norm.weight, for which", ArgumentError, normed, stack)
    cut = dict(state_dict, **{"rnn_lst.1.weight": state_dict["rnn_lst.1.weight"][:, 1:]})
    refused("state_dict has at rnn_lst.1. the shapes weight (4, 11)", ShapeError, cut, stack)
    without = {key: value for key, value in state_dict.items() if key != "rnn_lst.1.weight_c"}
    refused("state_dict lacks rnn_lst.1.weight_c", ArgumentError, without, stack)


def test_bad_arguments_of_the_functions():
    with pytest.raises(ArgumentError, match="layers_from_torch: cell must be one of"):
        convert.layers_from_torch({}, "lstm")
    with pytest.raises(ArgumentError, match="layers_from_torch: directions must be one of 1, 2"):
        convert.layers_from_torch({}, "sru", directions=3)
    with pytest.raises(ShapeError, match=r"layers_to_torch: layers\[0\] has the shapes weight \(1, 2, 4, 6\)"):
        convert.layers_to_torch([({"weight": np.zeros((1, 2, 4, 6))}, {})], "sru")
    with pytest.raises(ArgumentError, match="to_torch: module has reset_gate=False, which"):
        convert.to_torch(Holder(stacks.SRU(N, D_HIDDEN, reset_gate=False)))
