"""Checkpoints of other releases of `sru`, made by hand: the layout of each, written from a module of ours."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from sru_rt.bindings.torch import SRU, SRUCell
from sru_rt.bindings.torch.checkpoints import convert

from sru_rt.errors import ArgumentError

L, B, N, D = 5, 3, 7, 8  # the last two: sizes of x and h


def module(**keywords):
    torch.manual_seed(2)
    made = SRU(N, D, 2, **keywords).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def same(state_dict, made, **keywords):
    """Whether a module with the same options computes the same from `state_dict` as `made` does."""
    other = SRU(N, D, 2, **keywords).eval()
    other.load_state_dict(state_dict)
    x = torch.randn(L, B, N, generator=torch.Generator().manual_seed(5))
    for found, expected in zip(other(x), made(x)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_own_layout_is_left_alone():
    state_dict = module(layer_norm=True, projection_size=3).state_dict() | {"decoder.bias": torch.ones(3)}
    assert convert(state_dict).keys() == state_dict.keys()
    assert all(convert(state_dict)[key] is value for key, value in state_dict.items())


def renamed_as_in_3(state_dict, prefix=""):
    """`weight` and `weight_proj` as one or two torch.nn.Linear of `transform_module`."""
    found = {}
    for key, value in state_dict.items():
        cell, _, name = key.rpartition(".")
        if name == "weight_proj":
            key, value = f"{cell}.transform_module.0.weight", value.t()
        elif name == "weight" and cell.startswith("rnn_lst") and not cell.endswith("layer_norm"):
            middle = "1." if f"{cell}.weight_proj" in state_dict else ""
            key, value = f"{cell}.transform_module.{middle}weight", value.t()
        found[prefix + key] = value
    return found


@pytest.mark.parametrize("projection_size", (0, 3))
def test_3_0_0_dev(projection_size):
    keywords = {"projection_size": projection_size, "layer_norm": True, "proj_input_to_hidden_first": True}
    made = module(**keywords)
    same(convert(renamed_as_in_3(made.state_dict())), made, **keywords)


def test_3_0_0_dev_within_a_model():
    made = module()
    found = convert(renamed_as_in_3(made.state_dict(), "encoder."))
    assert all(key.startswith("encoder.") for key in found)
    same({key.removeprefix("encoder."): value for key, value in found.items()}, made)


def test_3_0_0_dev_with_a_projection_that_has_no_effect_here():
    """That release makes a pair of matrices of any size."""
    made = module()
    weight = made.rnn_lst[0].weight.detach()
    inner = torch.eye(N + 2, N) * 2
    outer = torch.cat([weight / 2, torch.ones(2, weight.shape[1])]).t()  # outer @ inner = weight.t()
    old = renamed_as_in_3(made.state_dict())
    del old["rnn_lst.0.transform_module.weight"]
    old |= {"rnn_lst.0.transform_module.0.weight": inner, "rnn_lst.0.transform_module.1.weight": outer}
    same(convert(old), made)


def test_transform_module_of_the_user():
    keys = {"rnn_lst.0.transform_module.linear1.weight": torch.ones(2, 2), "rnn_lst.0.weight_c": torch.ones(4)}
    with pytest.raises(ArgumentError, match=r"convert: state_dict has .*linear1.weight.*custom_m=True"):
        convert(keys)
    assert "rnn_lst.0.custom_m.linear1.weight" in convert(keys, custom_m=True)


def test_weight_norm_of_2_1_7():
    made = module()
    old = dict(made.state_dict())
    for i in range(2):
        weight = old[f"rnn_lst.{i}.weight"]
        old[f"rnn_lst.{i}.gain"] = weight.norm(dim=0)
        old[f"rnn_lst.{i}.weight"] = weight * torch.rand(weight.shape[1]).add(0.5)
    same(convert(old), made)


def test_layer_norm_of_2_1_7():
    """It follows each layer, with a variance that is the sum of squares over n - 1."""
    made = module()
    a, b = torch.randn(2, D), torch.randn(2, D)
    old = made.state_dict() | {f"ln_lst.{i}.{n}": v[i] for i in range(2) for n, v in (("a", a), ("b", b))}
    new = SRU(N, D, 2, layer_norm=True, normalize_after=True).eval()
    new.load_state_dict(convert(old))
    h = x = torch.randn(L, B, N)
    for i, cell in enumerate(made.rnn_lst):
        new.rnn_lst[i].layer_norm.eps = 1e-6 * (D - 1) / D
        h, _ = cell(h)
        h = a[i] * (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-6).sqrt() + b[i]
    torch.testing.assert_close(new(x)[0], h, rtol=1e-5, atol=1e-6)


def test_2017_without_v_and_alpha():
    made = module(v1=True)
    old = {k: v for k, v in made.state_dict().items() if not k.endswith(("weight_c", "scale_x"))}
    same(convert(old), made, v1=True)
    cell = SRUCell(N, D, v1=True, rescale=False)
    old = {k: v for k, v in cell.state_dict().items() if k in ("weight", "bias")}
    SRUCell(N, D, v1=True).load_state_dict(convert(old))
