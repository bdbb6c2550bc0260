"""The modules for Flax NNX and Equinox: against those for PyTorch, in training, by tokens, and given what is wrong."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("flax", reason="needs Flax")
pytest.importorskip("equinox", reason="needs Equinox")

import equinox as eqx
from flax import nnx
from sru_rt.bindings import jax as binding
from sru_rt.bindings.jax import convert
from sru_rt.bindings.jax import equinox as for_equinox
from sru_rt.bindings.jax import nnx as for_nnx

import sru_rt
from jax_tools import bits_64, jax, jnp, program, with_64_bits
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError, SruRtError

__all__ = ["with_64_bits"]  # a fixture

LENGTH, BATCH, N, SIZE = 5, 3, 6, 4
FAMILIES = pytest.mark.parametrize("family", ["nnx", "equinox"])
KINDS: dict[str, Any] = {
    "SRU": ("SRU", {"alpha": 1.0, "activation": "tanh"}),
    "MinGRU": ("MinGRU", {"candidate": "positive"}),
    "MinLSTM": ("MinLSTM", {"low_rank": 3, "recompute": "x"}),
    "QRNN": ("QRNN", {"window": 2, "highway": True, "pooling": "ifo", "recompute": 2}),
}
# What the libraries share is one file, so that kinds need not meet each other option in both.
NNX_OR_EQUINOX = pytest.mark.parametrize(
    ("family", "kind"), [("nnx", "SRU"), ("equinox", "MinGRU"), ("nnx", "MinLSTM"), ("equinox", "QRNN")]
)


def make(family: str, kind: str, seed: int = 0, dtype: Any = jnp.float64, **more: Any) -> Any:
    """A module of two layers."""
    name, options = KINDS.get(kind, (kind, {}))
    sizes, options = (N, SIZE), {"num_layers": 2} | options | more
    if family == "nnx":
        return getattr(for_nnx, name)(*sizes, param_dtype=dtype, rngs=nnx.Rngs(seed), **options)
    return getattr(for_equinox, name)(*sizes, dtype=dtype, key=jax.random.key(seed), **options)


def tokens(seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(LENGTH, BATCH, N)))


def flags() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "lengths": [5, 3, 0],
        "mask": jnp.asarray(rng.random((LENGTH, BATCH)) < 0.2),
        "reset": jnp.asarray(rng.random((LENGTH, BATCH)) < 0.3),
    }


def close(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance / 10)


# ----------------------------------------------------------------------------------------------------------------------
# As the modules for PyTorch


@pytest.mark.parametrize(("family", "D"), [("nnx", 1), ("equinox", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_pytorch(family, kind, D):
    """With the same parameters, initial states, lengths, mask and reset."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from sru_rt.bindings import torch as torch_binding

    name, options = KINDS[kind]
    given = {key: value for key, value in options.items() if key not in ("alpha",)}
    torch.manual_seed(0)
    theirs = getattr(torch_binding, name)(N, SIZE, 2, bidirectional=D == 2, dtype=torch.float64, **given)
    for key, parameter in theirs.named_parameters():
        if "bias" in key:
            torch.nn.init.normal_(parameter)
    ours = convert.from_torch(theirs.state_dict(), make(family, kind, bidirectional=D == 2))
    x, layout = tokens(), flags()
    state = np.random.default_rng(2).normal(size=(2 * D, BATCH, SIZE))
    seeds = np.cos(np.arange(LENGTH * BATCH * D * SIZE)).reshape(LENGTH, BATCH, D * SIZE), np.sin(state)

    x_there = torch.tensor(np.asarray(x), requires_grad=True)
    state_there = torch.tensor(state, requires_grad=True)
    flags_there = {key: torch.tensor(np.asarray(value)) for key, value in layout.items()}
    if kind == "SRU":  # whose states are (num_layers, B, D*d) there, and mask has another name
        flags_there["mask_pad"] = flags_there.pop("mask")
        first = state_there.reshape(2, D, BATCH, SIZE).transpose(1, 2).reshape(2, BATCH, D * SIZE)
        h, last = theirs(x_there, first, **flags_there)
        last = last.reshape(2, BATCH, D, SIZE).transpose(1, 2).reshape(2 * D, BATCH, SIZE)
    else:
        h, last = theirs(x_there, state_there, **flags_there)
    torch.autograd.backward([h, last], [torch.tensor(seed) for seed in seeds])

    @jax.jit
    def run(params: Any, x: Any, state: Any) -> Any:
        results, pullback = jax.vjp(
            lambda params, x, state: ours.with_parameters(params)(x, state, **layout), params, x, state
        )
        return results, pullback(tuple(map(jnp.asarray, seeds)))

    results, (dparams, dx, dstate) = run(ours.parameters(), x, jnp.asarray(state))
    close(results, (h.detach().numpy(), last.detach().numpy()))
    close((dx, dstate), (x_there.grad.numpy(), state_there.grad.numpy()))
    gradients = convert.to_torch(ours.with_parameters(dparams))
    for key, parameter in theirs.named_parameters():
        np.testing.assert_allclose(gradients[key], parameter.grad.numpy(), rtol=1e-9, atol=1e-10, err_msg=key)


def test_without_64_bits():
    with bits_64(False):
        module = make("nnx", "QRNN", dtype=jnp.float32)
        h, state = jax.jit(lambda x: module(x, **flags()))(tokens().astype("float32"))
        assert h.dtype == state.dtype == jnp.float32
        assert all(a.dtype == jnp.float32 for a in module.parameters().values())


# ----------------------------------------------------------------------------------------------------------------------
# Parameters


@FAMILIES
def test_initial_parameters(family):
    options = {"low_rank": 50, "forget_bias": 1.5, "bidirectional": True}
    classes, key = {"nnx": for_nnx, "equinox": for_equinox}[family], jax.random.key(1)
    rng = {"rngs": nnx.Rngs(key)} if family == "nnx" else {"key": key}
    module = classes.MinLSTM(100, 90, 1, **options, **rng)
    params = module.parameters()
    assert {name: a.shape for name, a in params.items()} == {
        "weight_l0_p": (2, 3, 90, 50),
        "weight_l0_q": (50, 100),
        "bias_l0": (2, 3, 90),
    }
    for name in ("weight_l0_p", "weight_l0_q"):
        columns = params[name].shape[-1]
        assert abs(params[name]).max() <= math.sqrt(3 / columns) * (1 + 1e-6)
        assert float(params[name].var()) == pytest.approx(1 / columns, rel=0.1)
        assert abs(float(params[name].mean())) < 0.1 / math.sqrt(columns)
    assert (params["bias_l0"] == jnp.array([1.5, 0, 0])[:, None]).all()


@FAMILIES
def test_layers_factors_and_seeds_differ(family):
    """Random numbers of one key would be the same, or begin so."""
    first, again, other = (
        make(family, "MinLSTM", seed=seed, bidirectional=True, num_layers=3).parameters() for seed in (1, 1, 2)
    )
    close(first, again, 0)
    p, q = first["weight_l1_p"], first["weight_l1_q"]
    assert not (p == other["weight_l1_p"]).any()
    assert not (p == first["weight_l2_p"]).any() and not (q == first["weight_l2_q"]).any()
    assert not (p[0] == p[1]).any()
    assert not np.isclose(p.ravel()[:20] * math.sqrt(3), q.ravel()[:20] * math.sqrt(8)).any()


def drawn_in_a_program(init, key, **kwargs):
    return jax.jit(lambda key: init(key, N, SIZE, dtype=jnp.float64, **kwargs)[0])(key)


def test_initial_parameters_of_functions():
    key = jax.random.key(3)
    for cell, kwargs in (
        ("sru", {"highway_bias": -1.0, "directions": 2}),
        ("qrnn", {"window": 2, "highway": True}),
        ("mingru", {"candidate": "positive"}),
        ("minlstm", {"low_rank": 2, "forget_bias": 1.0}),
    ):
        init, core = getattr(binding, f"{cell}_init"), getattr(sru_rt, f"{cell}_init")
        params, options = init(key, N, SIZE, dtype=jnp.float64, **kwargs)
        wanted = core(N, SIZE, dtype="float64", rng=0, **kwargs)
        assert options == {name: value for name, value in wanted.items() if name not in params}
        assert params.keys() | options.keys() == wanted.keys()
        shapes = jax.tree.map(lambda a: (a.shape, str(a.dtype)), [params[name] for name in params])
        assert shapes == jax.tree.map(lambda a: (a.shape, str(a.dtype)), [wanted[name] for name in params])
        close(params.get("bias"), wanted.get("bias"))
        close(drawn_in_a_program(init, key, **kwargs), params, 1e-15)
        h, _ = getattr(binding, cell)(tokens(), **params, **options)
        assert jnp.isfinite(h).all()
        assert list(inspect.signature(init).parameters)[:3] == ["key", "d_in", "d"]
    # The skip's own matrix is scaled by alpha.
    params, options = binding.sru_init(key, 200, 30, highway_bias=1.0)
    spread = params["weight"].std((0, 2, 3)) * math.sqrt(200)
    np.testing.assert_allclose(spread, [1, 1, 1, math.sqrt(1 + 2 * math.e)], rtol=0.05)
    assert options == {} and params["weight"].dtype == jnp.float32
    with pytest.raises(ArgumentError, match="sru_init: d_in must be a positive integer"):
        binding.sru_init(key, 0, 4)
    with pytest.raises(TypeError, match=r"sru_init\(\) got an unexpected keyword argument 'rng'; pass a key first"):
        binding.sru_init(key, 4, 4, rng=1)


def test_made_in_a_program():
    """As where parameters begin divided among devices, or are shapes alone."""
    made = nnx.jit(lambda: for_nnx.SRU(N, SIZE, 2, rngs=nnx.Rngs(0)))()
    close(made.parameters(), for_nnx.SRU(N, SIZE, 2, rngs=nnx.Rngs(0)).parameters(), 1e-6)
    shapes = nnx.eval_shape(lambda: for_nnx.SRU(N, SIZE, 2, rngs=nnx.Rngs(0)))
    assert shapes.parameters()["weight_l0"].shape == (1, 4, SIZE, N)
    shapes = eqx.filter_eval_shape(for_equinox.SRU, N, SIZE, 2, key=jax.random.key(0))
    assert shapes.params["weight_l0"].shape == (1, 4, SIZE, N)


def test_what_the_libraries_see():
    module = make("nnx", "SRU")
    _, params = nnx.split(module, nnx.Param)
    assert {"weight_l0", "v_l0", "bias_l0", "weight_l1", "v_l1", "bias_l1"} == {str(path[0]) for path in paths(params)}
    module = make("equinox", "SRU")
    arrays = jax.tree.leaves(eqx.filter(module, eqx.is_array))
    assert len(arrays) == len(module.params) == 6
    doubled = jax.tree.map(lambda a: 2 * a if eqx.is_array(a) else a, module)
    close(doubled.params["v_l1"], 2 * module.params["v_l1"])


def paths(state: Any) -> list[Any]:
    return [path for path, _ in nnx.to_flat_state(state)] if hasattr(nnx, "to_flat_state") else list(state.flat_state())


@FAMILIES
def test_documented_and_signed(family):
    for kind in ("SRU", "QRNN", "MinGRU", "MinLSTM"):
        module = getattr({"nnx": for_nnx, "equinox": for_equinox}[family], kind)
        taken = inspect.signature(module.__init__).parameters
        assert list(taken)[:4] == ["self", "input_size", "hidden_size", "num_layers"]
        assert {"bidirectional", "recompute", "low_rank", {"nnx": "rngs", "equinox": "key"}[family]} <= taken.keys()
        for name in list(taken)[1:]:
            assert name in module.__doc__, (kind, name)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("kind", ["SRU", "QRNN"])
def test_training_with_nnx(kind):
    optax = pytest.importorskip("optax", reason="needs Optax")
    module = make("nnx", kind, dropout=0.1)
    optimizer = nnx.Optimizer(module, optax.adam(0.05), wrt=nnx.Param)
    takes_module = "model" in inspect.signature(optimizer.update).parameters

    def loss(module: Any, x: Any) -> Any:
        return jnp.mean((module(x)[0] - jnp.tanh(x[..., :SIZE])) ** 2)

    @nnx.jit
    def step(module: Any, optimizer: Any, x: Any) -> Any:
        value, gradients = nnx.value_and_grad(loss)(module, x)
        # Before 0.11 Flax takes gradients alone.
        optimizer.update(*((module,) if takes_module else ()), gradients)
        return value

    losses = [float(step(module, optimizer, tokens(i % 3))) for i in range(50)]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


@pytest.mark.parametrize("kind", ["MinGRU", "MinLSTM"])
def test_training_with_equinox(kind):
    optax = pytest.importorskip("optax", reason="needs Optax")
    module, adam = make("equinox", kind, dropout=0.1), optax.adam(0.05)
    state = adam.init(eqx.filter(module, eqx.is_array))

    def loss(module: Any, x: Any, key: Any) -> Any:
        h, _ = jax.vmap(lambda x, key: module(x, key=key), (1, 0), 1)(x, jax.random.split(key, BATCH))
        return jnp.mean((h - jnp.tanh(x[..., :SIZE])) ** 2)

    @eqx.filter_jit
    def step(module: Any, state: Any, x: Any, key: Any) -> Any:
        value, gradients = eqx.filter_value_and_grad(loss)(module, x, key)
        updates, state = adam.update(gradients, state)
        return eqx.apply_updates(module, updates), state, value

    losses = []
    for i in range(50):
        module, state, value = step(module, state, tokens(i % 3), jax.random.key(i))
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def applied(family: str, module: Any, x: Any, seed: int, **more: Any) -> Any:
    """h of a call in training, with random numbers of a seed."""
    random = {"rngs": nnx.Rngs(seed)} if family == "nnx" else {"key": jax.random.key(seed)}
    return module(x, **random, **more)[0]


@FAMILIES
def test_dropout_between_layers(family):
    module = make(family, "MinGRU", dropout=0.4)
    x, alone = tokens(), make(family, "MinGRU")
    first, again, other = (applied(family, module, x, seed) for seed in (0, 0, 1))
    close(first, again, 0)
    assert not (first == other).all()
    off = {"deterministic": True} if family == "nnx" else {"inference": True}
    close(module(x, **off), alone(x), 0)
    # What the second layer sees is 0, or what it was over 0.6.
    stack, seen = module.stack, []
    h = jnp.ones((40, 5, SIZE))
    for key in (jax.random.key(0), jax.random.key(1)):
        seen.append(np.asarray(stack.dropped(1, h, key)))
    for one in seen:
        np.testing.assert_allclose(np.unique(one), [0, 1 / 0.6])
        assert np.mean(one == 0) == pytest.approx(0.4, abs=0.07)
    assert (seen[0] != seen[1]).any()
    assert stack.dropped(0, h, key) is h


@FAMILIES
def test_dropout_of_sru_is_one_mask_for_all_steps(family):
    module = make(family, "SRU", dropout=0.4)
    mask = module.stack.mask(0, "dropout_mask", jnp.ones((LENGTH, 50, N)), jax.random.key(0))
    assert mask.shape == (50, 1, SIZE)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / 0.6])
    assert module.stack.cell(0, True).name != module.stack.cell(0, False).name
    assert module.stack.cell(1, True).name == module.stack.cell(1, False).name  # not in the last layer
    x = tokens()
    assert not (applied(family, module, x, 0) == applied(family, module, x, 1)).all()
    # Where m is 0, h of the first layer is its skip, at all steps or at none.
    one = for_equinox.SRU(SIZE, SIZE, 1, dtype=jnp.float64, key=jax.random.key(0))
    two = for_equinox.SRU(SIZE, SIZE, 2, dropout=0.4, dtype=jnp.float64, key=jax.random.key(0))
    assert one.stack.constants(0) == two.stack.constants(0) == (math.sqrt(3),)


@FAMILIES
def test_zoneout_keeps_states(family):
    module = make(family, "QRNN", zoneout=0.5)
    x = tokens()
    mask = module.stack.mask(0, "zoneout_mask", jnp.ones((40, 50, N)), jax.random.key(0))
    assert mask.shape == (40, 50, 1, SIZE) and mask.dtype == bool
    assert float(mask.mean()) == pytest.approx(0.5, abs=0.03)
    assert not (applied(family, module, x, 0) == applied(family, module, x, 1)).all()
    off = {"deterministic": True} if family == "nnx" else {"inference": True}
    close(module(x, **off), make(family, "QRNN")(x), 0)


def test_modes_of_the_libraries():
    x = tokens()
    module, plain = make("nnx", "MinGRU", dropout=0.5), make("nnx", "MinGRU")(x)[0]
    first, second = module(x)[0], module(x)[0]
    assert not (first == second).all()  # the stream goes on
    module.eval()
    close(module(x)[0], plain, 0)
    module.train()
    assert not (module(x)[0] == plain).all()
    keyed = [module(x, rngs=jax.random.key(5))[0] for _ in range(2)]
    close(*keyed, 0)

    module = make("equinox", "MinGRU", dropout=0.5)
    with pytest.raises(ArgumentError, match="MinGRU: key is None, but MinGRU draws random numbers in training; pass"):
        module(x)
    plain = make("equinox", "MinGRU")(x)[0]
    close(eqx.nn.inference_mode(module)(x)[0], plain, 0)
    assert not (module(x, key=jax.random.key(0))[0] == plain).all()


@FAMILIES
def test_dtypes(family):
    module = make(family, "QRNN", dtype=jnp.bfloat16)
    h, state = module(tokens().astype("bfloat16"))
    assert h.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert module(tokens().astype("float32"))[0].dtype == jnp.float32  # as elsewhere they promote
    token, state = module.step(tokens()[0].astype("bfloat16"), module.initial_step_state(BATCH))
    assert token.dtype == jnp.bfloat16 and state.c.dtype == jnp.float32 and state.tokens[0].dtype == jnp.bfloat16


def test_dtype_of_products_in_flax():
    module = for_nnx.MinGRU(N, SIZE, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = tokens().astype("float32")
    h, state = module(x)
    assert h.dtype == jnp.bfloat16 and state.dtype == module.parameters()["weight_l0"].dtype == jnp.float32
    wide = for_nnx.MinGRU(N, SIZE, rngs=nnx.Rngs(0))(x)[0]
    close(h.astype("float32"), wide, 0.05)
    gradient = nnx.grad(lambda module: module(x)[0].astype("float32").sum())(module)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


# ----------------------------------------------------------------------------------------------------------------------
# Forms of sequences


@NNX_OR_EQUINOX
def test_token_by_token(family, kind):
    """A prompt, then tokens, are the whole sequence."""
    module, x = make(family, kind, dropout=0.3), tokens()
    off = {"deterministic": True} if family == "nnx" else {"inference": True}
    whole, last = module(x, module.initial_step_state(BATCH), **off)
    close(module(x, **off)[0], whole, 1e-12)
    h, state = module(x[:2], module.initial_step_state(BATCH), **off)
    step, found = (eqx.filter_jit if family == "equinox" else jax.jit)(module.step), [*h]
    for token in x[2:]:
        h, state = step(token, state)
        found.append(h)
    close(jnp.stack(found), whole, 1e-11)
    close(state, last, 1e-11)
    state, found = None, []
    for token in x[:, 1]:  # of one sequence, from nothing
        h, state = module.step(token, state)
        found.append(h)
    close(jnp.stack(found), whole[:, 1], 1e-11)
    close(state, jax.tree.map(lambda a: a[:, 1], last), 1e-11)


def test_windows_across_pieces():
    """Padding and boundaries in the first piece count for what the second one sees."""
    module = make("equinox", "QRNN", window=3)
    first, second, rng = np.asarray(tokens(0)), np.asarray(tokens(1)), np.random.default_rng(3)
    lengths, reset = [5, 3, 1], rng.random((2 * LENGTH, BATCH)) < 0.3
    reset[LENGTH : LENGTH + 2] = False
    reset[[4, 2], [0, 1]] = True  # what is kept of the first piece begins with a boundary
    h, state = module(first, module.initial_step_state(BATCH), lengths=lengths, reset=reset[:LENGTH])
    after, last = module(second, state, reset=reset[LENGTH:])

    def joined(a: Any, b: Any) -> Any:
        """The two pieces of each sequence without what is between them."""
        lines = [np.concatenate([a[:n, i], b[:, i], a[n:, i]]) for i, n in enumerate(lengths)]
        return np.stack(lines, 1)

    flags = {"lengths": [n + LENGTH for n in lengths], "reset": joined(reset[:LENGTH], reset[LENGTH:])}
    whole, end = module(joined(first, second), module.initial_step_state(BATCH), **flags)
    assert not np.asarray(h)[4, 1].any()
    close(joined(np.asarray(h), np.asarray(after)), whole, 1e-11)
    close(last, end, 1e-11)


@pytest.mark.parametrize(("family", "D"), [("nnx", 1), ("equinox", 2)])
def test_forms_of_input(family, D):
    module = make(family, "MinLSTM", bidirectional=D == 2)
    x, layout = tokens(), flags()
    state = jnp.asarray(np.random.default_rng(2).normal(size=(2 * D, BATCH, SIZE)))
    h, last = module(x, state, **layout)
    first = make(family, "MinLSTM", bidirectional=D == 2, batch_first=True)
    turned = {"lengths": np.array([5, 3, 0]), "mask": np.asarray(layout["mask"]).T, "reset": layout["reset"].T}
    got, got_last = first(np.asarray(x).swapaxes(0, 1), np.asarray(state), **turned)
    close((got.swapaxes(0, 1), got_last), (h, last), 1e-12)
    for b in (0, 1):
        one = {name: value[:, b] for name, value in layout.items() if name != "lengths"}
        close(module(x[:, b], state[:, b], lengths=layout["lengths"][b], **one), (h[:, b], last[:, b]), 1e-12)


def test_vmap_over_a_module_is_a_batch():
    module, x, layout = make("equinox", "SRU", bidirectional=True), tokens(), flags()
    close(jax.vmap(module, 1, 1)(x), module(x), 1e-12)
    lengths = jnp.asarray(layout.pop("lengths"))
    every = jax.jit(jax.vmap(lambda x, n, flags: module(x, lengths=n, **flags), (1, 0, 1), 1))
    close(every(x, lengths, layout), module(x, lengths=lengths, **layout), 1e-12)
    # A batch of modules, as of an ensemble.
    keys = jax.random.split(jax.random.key(0), 2)
    ensemble = eqx.filter_vmap(lambda key: for_equinox.MinGRU(N, SIZE, 2, dtype=jnp.float64, key=key))(keys)
    h, _ = eqx.filter_vmap(lambda module, x: module(x), in_axes=(eqx.if_array(0), None))(ensemble, x)
    for i in (0, 1):
        alone = jax.tree.map(lambda a, i=i: a[i] if eqx.is_array(a) else a, ensemble)
        close(h[i], alone(x)[0], 1e-12)


@FAMILIES
def test_in_a_scan(family):
    """A state of a QRNN goes round as it came."""
    module, x = make(family, "QRNN"), tokens()
    _, h = jax.lax.scan(lambda state, x: module.step(x, state)[::-1], module.initial_step_state(BATCH), x)
    close(h, module(x, **({"deterministic": True} if family == "nnx" else {}))[0], 1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(error: type[SruRtError], says: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(SruRtError, match="^" + re.escape(says)) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error


@FAMILIES
def test_bad_options(family):
    for kind, options, says in (
        ("MinGRU", {"dropout": 1.0}, "MinGRU: dropout must be a probability, 0 <= dropout < 1 (got 1.0)"),
        ("MinGRU", {"low_rank": 0}, "MinGRU: low_rank must be a positive integer (got 0)"),
        ("MinGRU", {"bidirectional": "yes"}, "MinGRU: bidirectional must be one of True, False"),
        ("MinLSTM", {"candidate": "g"}, "MinLSTM: candidate must be one of"),
        ("MinLSTM", {"recompute": "u"}, "MinLSTM: recompute must be False, True, a number K >= 1"),
        ("QRNN", {"pooling": "f", "highway": True}, "QRNN: highway is True, but pooling='f' has no output gate"),
        (
            "QRNN",
            {"project_skip": True, "highway": False},
            "QRNN: project_skip is True, but these options have no skip",
        ),
        (
            "SRU",
            {"project_skip": False},
            "SRU: project_skip is False, but the skip adds an input of size 6 to an output",
        ),
        ("SRU", {"activation": "gelu"}, "SRU: activation must be one of 'identity', 'tanh', 'relu' (got 'gelu')"),
        ("SRU", {"highway_bias": 101}, "SRU: highway_bias must be from -100 to 100"),
        ("SRU", {"time_parallel": 1}, "SRU: time_parallel must be one of 'auto', True, False"),
    ):
        refused(ArgumentError, says, make, family, kind, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'activation'"):
        make(family, "MinGRU", activation="tanh")
    with pytest.warns(UserWarning, match=r"MinGRU: dropout=0.1 acts below the last layer, and there is only one"):
        for_equinox.MinGRU(N, SIZE, dropout=0.1, key=jax.random.key(0))


@FAMILIES
def test_bad_arguments_of_calls(family):
    module, x = make(family, "MinGRU"), tokens()
    for error, says, args, kwargs in (
        (ShapeError, "MinGRU: x has shape (5, 3, 5); it needs (L, B, input_size)", (x[..., 1:],), {}),
        (ShapeError, "MinGRU: x has shape (6,); it needs (L, B, input_size), or (L, input_size)", (x[0, 0],), {}),
        (DtypeError, "MinGRU: x has dtype int32; it needs one of float16", (x.astype("int32"),), {}),
        (LibraryError, "MinGRU: x must be an array of JAX or NumPy (got builtins.list); pass jax.numpy", ([1.0],), {}),
        (ShapeError, "MinGRU: state has shape (2, 2, 4); it needs (num_layers*D, B, hidden_size) = (2, 3, 4)",
         (x, jnp.zeros((2, 2, 4))), {}),
        (ShapeError, "MinGRU: lengths has shape (2,); it needs (B,) = (3,)", (x,), {"lengths": [1, 2]}),
        (ArgumentError, "MinGRU: lengths must be from 0 to L = 5 (got 6 for sequence 1)", (x,), {"lengths": [1, 6, 2]}),
        (ShapeError, "MinGRU: mask has shape (3, 5); it needs (L, B) = (5, 3)", (x,), {"mask": jnp.zeros((3, 5))}),
        (ShapeError, "MinGRU: reset has 1 axes, shape (5,); it needs (L, B)", (x,), {"reset": jnp.zeros(5)}),
        (LibraryError, "MinGRU: mask must be an array of JAX or NumPy (got builtins.str)", (x,), {"mask": "no"}),
        (ShapeError, "MinGRU: lengths has shape (1,); it needs (), a number for one", (x[:, 0],), {"lengths": [1]}),
    ):  # fmt: skip
        refused(error, says, module, *args, **kwargs)
    refused(
        ShapeError, "MinGRU.step: x has shape (5, 3, 6); it needs (B, input_size), or (input_size,)", module.step, x
    )
    both = make(family, "MinGRU", bidirectional=True)
    refused(ArgumentError, "MinGRU.step: the module is bidirectional, and its reverse", both.step, x[0])
    refused(ArgumentError, "MinGRU.initial_step_state: the module is bidirectional", both.initial_step_state, 3)
    refused(ArgumentError, "MinGRU.initial_step_state: batch_size must be", module.initial_step_state, 0)
    window = make(family, "QRNN")
    refused(LibraryError, "QRNN.step: state must be a QRNNState, since a window of 2", window.step, x[0], jnp.zeros(2))
    state = window.initial_step_state(BATCH)
    refused(
        ShapeError, "QRNN: state.tokens[1] has shape (1, 3, 6); it needs (window-1, B, n) = (1, 3, 4)",
        window, x, for_nnx.QRNNState(state.c, state.tokens[:1] * 2),
    )  # fmt: skip
    refused(ArgumentError, "QRNN: state.tokens must be a tuple of 2 arrays", window, x, for_nnx.QRNNState(state.c, ()))


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_a_missing_library_is_named(library: str, tmp_path: Path) -> None:
    name = {"flax": "nnx", "equinox": "equinox"}[library]
    text = f"""
    import sys
    sys.modules["{library}"] = None
    import sru_rt.bindings.jax
    try:
        import sru_rt.bindings.jax.{name}
    except ImportError as error:
        print(error)
    """
    printed = program(text, tmp_path)
    assert printed.startswith(f"sru_rt.bindings.jax.{name}: ")
    assert f"pip install '{library}>=" in printed


@pytest.mark.slow
def test_the_page_runs():
    pytest.importorskip("torch", reason="needs PyTorch")
    text = (Path(__file__).resolve().parents[1] / "docs" / "jax.md").read_text()
    names: dict[str, Any] = {}
    with bits_64(False):
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            exec(compile(block, "jax.md", "exec"), names)
    assert names["gradients"]["weight"].shape == (1, 4, 16, 8)
    assert names["token"].shape == (3, 16) and names["state"].tokens[1].shape == (2, 3, 16)
