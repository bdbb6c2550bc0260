"""The modules `SRU` and `SRUCell` alone: what the reference does not have, how they fit into PyTorch, and errors."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sru_rt.bindings.torch import SRU, SRUCell
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import oracle
import tolerance
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError

L, B, N, D = 6, 4, 5, 8  # N and D: sizes of x and h
LENGTHS = [3, 6, 0, 2]
KINDS = (
    {},
    {"bidirectional": True, "rescale": True},
    {"projection_size": 3, "layer_norm": True},
    {"v1": True, "num_layers": 1},
    {"has_skip_term": False, "normalize_after": True, "layer_norm": True, "activation": "relu"},
)


@pytest.fixture(autouse=True)
def unwritten_results_are_nan():
    """PyTorch fills new memory with NaN where it is asked to be deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(size=D, **keywords):
    """A module whose h has D numbers, in evaluation mode, its parameters away from their initial values."""
    torch.manual_seed(1)
    made = SRU(size, D // (2 if keywords.get("bidirectional") else 1), **keywords).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return made


def tokens(*shape, **keywords):
    return torch.randn(shape or (L, B, D), generator=torch.Generator().manual_seed(9), **keywords)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gradients(made, results):
    """Of a loss of the results, with respect to all parameters."""
    made.zero_grad()
    sum(r.double().square().sum() for r in results).backward()
    return [p.grad for p in made.parameters() if p.grad is not None]


# ----------------------------------------------------------------------------------------------------------------------
# What the reference does not have


def of_oracle(cell, x, c0=None, v=None, **keywords):
    """h and the state (B, D*d) of a cell without norms, dropout and projection, by the oracle."""
    q, d, k = cell.num_directions, cell.hidden_size, cell.num_matrices
    by_direction = [p.detach().numpy().reshape(2, q, d).swapaxes(0, 1) for p in (cell.bias, cell.weight_c)]
    if cell.custom_m is None:
        weight = cell.weight.detach().numpy().reshape(-1, q, d, k).transpose(1, 3, 2, 0)
    else:
        weight = cell.custom_m.u.weight.detach().numpy().reshape(q, d, k, -1).swapaxes(1, 2)
    c0 = None if c0 is None else c0.numpy().reshape(B, q, d).swapaxes(0, 1)
    skip = {"alpha": float(cell.scale_x) if cell.rescale else 1.0, "activation": cell.activation}
    h, c = oracle.sru_forward(
        x.numpy(), weight, by_direction[0], by_direction[1] if v is None else v, c0, **skip, **keywords
    )
    return h, c.swapaxes(0, 1).reshape(B, -1)


@pytest.mark.parametrize("activation", ("identity", "tanh", "relu"))
@pytest.mark.parametrize("project_skip", ("auto", True))
@pytest.mark.parametrize("bidirectional", (False, True))
def test_activation_projected_skip_lengths_and_reset(bidirectional, project_skip, activation):
    d = D // 2 if bidirectional else D
    cell = SRUCell(D, d, bidirectional=bidirectional, activation=activation, project_skip=project_skip)
    assert cell.num_matrices == (4 if project_skip is True else 3)
    x, c0, reset = tokens(), tokens(B, D), tokens(L, B) > 1
    h, c = cell(x, c0, lengths=LENGTHS, reset=reset)
    expected = of_oracle(cell, x, c0, lengths=LENGTHS, reset=reset.numpy())
    tolerance.check("h", h.detach().numpy(), expected[0], tolerance.LAYER["float32"])
    tolerance.check("c", c.detach().numpy(), expected[1], tolerance.LAYER["float32"])


class WithV(torch.nn.Module):
    """U of a linear map without bias, and a given V."""

    def __init__(self, columns, v):
        super().__init__()
        self.u, self.v = torch.nn.Linear(D, columns, bias=False), v

    def reset_parameters(self):
        self.u.reset_parameters()

    def forward(self, x):
        return self.u(x), self.v


def test_v_per_step_of_two_directions():
    """The reference's C++ code takes V of the wrong step here."""
    d = D // 2
    added = tokens(L, B, 2 * D)
    cell = SRUCell(D, d, bidirectional=True, custom_m=WithV(3 * D, added))
    v = (added + cell.weight_c).detach().reshape(L, B, 2, d, 2).transpose(3, 4).numpy()
    x = tokens()
    h, _ = cell(x)
    tolerance.check("h", h.detach().numpy(), of_oracle(cell, x, v=v)[0], tolerance.LAYER["float32"])


def test_v_for_all_steps():
    cell = SRUCell(D, D, custom_m=WithV(3 * D, tokens(2 * D)))
    h, _ = cell(tokens())
    v = (tokens(2 * D) + cell.weight_c).detach().reshape(2, 1, D).transpose(0, 1).numpy()
    tolerance.check("h", h.detach().numpy(), of_oracle(cell, tokens(), v=v)[0], tolerance.LAYER["float32"])


@pytest.mark.parametrize("keywords", KINDS, ids=str)
def test_lengths_mask_and_packed_sequences_agree(keywords):
    made = make(**keywords)
    x, lengths = tokens(), torch.tensor([3, 6, 1, 6])
    h, c = made(x, lengths=lengths)
    mask = torch.arange(L)[:, None] >= lengths
    for other in (made(x, mask_pad=mask), made(x, None, mask.to(torch.uint8)), made(x, lengths=lengths.tolist())):
        close(other, (h, c))
    for packed in (
        pack_padded_sequence(x, lengths, enforce_sorted=False),
        pack_padded_sequence(x.transpose(0, 1), lengths, batch_first=True, enforce_sorted=False),
    ):
        out, c_packed = made(packed)
        close(pad_packed_sequence(out)[0], h.masked_fill(mask[..., None], 0))
        close(c_packed, c)
    order = lengths.argsort(descending=True)
    packed = pack_padded_sequence(x[:, order], lengths[order])  # sorted by the user: no indices
    out, c_sorted = made(packed, c[:, order])
    assert out.sorted_indices is None
    close(c_sorted, made(x, c, lengths=lengths)[1][:, order])
    none_left = torch.ones(L, B, dtype=torch.bool)
    close(made(packed, c, none_left)[1], c)  # a mask counts beside the packing


@pytest.mark.parametrize("keywords", (*KINDS, {"proj_input_to_hidden_first": True}), ids=str)
def test_padding_may_hold_anything(keywords):
    made = make(N, **keywords) if "proj_input_to_hidden_first" in keywords else make(**keywords)
    x, lengths = tokens(L, B, made.input_size), torch.tensor(LENGTHS)
    dirty = x.masked_fill((torch.arange(L)[:, None] >= lengths)[..., None], float("nan")).requires_grad_()
    results = made(dirty, lengths=lengths)
    close(results, made(x, lengths=lengths))
    assert all(torch.isfinite(g).all() for g in gradients(made, results))
    assert torch.isfinite(dirty.grad).all()


def test_batch_first():
    plain, made = make(bidirectional=True), make(bidirectional=True, batch_first=True)
    x, mask, reset = tokens(), tokens(L, B) > 0.5, tokens(L, B) < -1
    h, c = plain(x, None, mask, reset=reset)
    close(made(x.transpose(0, 1), None, mask.t(), reset=reset.t()), (h.transpose(0, 1), c))
    assert made(x.transpose(0, 1), None, mask.t())[0].shape == (B, L, D)


@pytest.mark.parametrize("compatible", (False, True))
@pytest.mark.parametrize("bidirectional", (False, True))
def test_states_can_be_given_again(bidirectional, compatible):
    made = make(bidirectional=bidirectional, nn_rnn_compatible_return=compatible)
    other = make(bidirectional=bidirectional, nn_rnn_compatible_return=not compatible)
    h, c = made(tokens())
    d = D // 2 if bidirectional else D
    assert c.shape == ((2 * D // d, B, d) if compatible else (2, B, D))
    again, last = made(tokens(), c)
    by_layer = c.view(2, D // d, B, d).transpose(1, 2).reshape(2, B, D) if compatible else c
    close(made(tokens(), by_layer) if compatible else (again, last), (again, last))
    close(other(tokens(), by_layer)[0], again)
    assert not torch.allclose(h, again, atol=1e-2)


@pytest.mark.parametrize("keywords", [k for k in KINDS if not k.get("bidirectional")], ids=str)
def test_step(keywords):
    made = make(**keywords)
    x, state, rows = tokens(), None, []
    h, c = made(x)
    for t in range(L):
        row, state = made.step(x[t], state)
        rows.append(row)
    close((torch.stack(rows), state), (h, c))
    row, state = made.step(x[0], c)  # a state of the whole sequence
    close(row, made(x[:1], c)[0][0])


def test_step_of_a_cell():
    cell = SRUCell(N, D, layer_norm=True)
    x, c0, mask = tokens(B, N), tokens(B, D), torch.tensor([True, False, False, True])
    h, c = cell(x, c0, mask)
    assert h.shape == (B, D)
    close((h[None], c), cell(x[None], c0, mask[None]))


@pytest.mark.parametrize("recompute", (1, 4, "x"))
@pytest.mark.parametrize("keywords", KINDS, ids=str)
def test_recompute(keywords, recompute):
    plain, made = make(**keywords), make(**keywords, recompute=recompute)
    results, expected = made(tokens(), lengths=LENGTHS), plain(tokens(), lengths=LENGTHS)
    close(results, expected)
    close(gradients(made, results), gradients(plain, expected), 1e-4)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("keywords", KINDS, ids=str)
def test_dtypes(keywords, dtype):
    made = make(**keywords)
    x = tokens().to(dtype)
    lower = copy.deepcopy(made).to(dtype)
    exact = copy.deepcopy(lower).double()  # what the parameters are after rounding
    h, c = lower(x)
    assert h.dtype == dtype and c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 3 * tolerance.LAYER[str(dtype).removeprefix("torch.")]  # of up to two layers and a norm
    expected = exact(x.double())
    tolerance.check("h", h.detach().double().numpy(), expected[0].detach().numpy(), bound)
    for g in gradients(lower, (h, c)):
        assert g.dtype == dtype and torch.isfinite(g).all()
    made_so = SRU(D, D, dtype=dtype)
    assert {p.dtype for p in made_so.parameters()} == {dtype}
    state = c.to(dtype)
    assert lower(x, state)[0].dtype == dtype


@pytest.mark.parametrize("keywords", KINDS, ids=str)
def test_autocast(keywords):
    made = make(**keywords)
    h, c = made(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, c_low = made(tokens(), lengths=[L] * B)
        made(tokens().bfloat16(), c)
    assert c_low.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert (low - h).abs().max() < 0.05 * h.abs().max()
    assert all(g.dtype == torch.float32 for g in gradients(made, (low, c_low)))


def test_per_layer_options():
    made = SRU(D, D, 3, project_skip=[False, True, "auto"], projection_size=(0, 2, 3))
    assert [cell.num_matrices for cell in made.rnn_lst] == [3, 4, 3]
    assert [cell.projection_size for cell in made.rnn_lst] == [0, 2, 3]


def test_sizes_of_zero():
    made = make(bidirectional=True)
    h, c = made(tokens(0, B, D), tokens(2, B, D))
    assert h.shape == (0, B, D)
    close(c, tokens(2, B, D))
    assert made(tokens(L, 0, D))[0].shape == (L, 0, D)


# ----------------------------------------------------------------------------------------------------------------------
# How they fit into PyTorch


def test_dropout():
    """One mask for all steps, on the highway term, in all layers but the last, and in training alone."""
    made = make(num_layers=1, dropout=0.5)
    assert made.rnn_lst[0].dropout == 0
    cell = SRUCell(D, D, dropout=0.5)
    x = tokens()
    assert torch.equal(cell.eval()(x)[0], cell(x)[0])
    torch.manual_seed(4)
    h, c = cell.train()(x)
    torch.manual_seed(4)
    mask = cell.get_dropout_mask_((B, D), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    expected = of_oracle(cell, x, dropout_mask=mask.reshape(B, 1, D).numpy())
    tolerance.check("h", h.detach().numpy(), expected[0], tolerance.LAYER["float32"])
    close(c, cell.eval()(x)[1])  # the state is not dropped
    share = SRUCell(D, D).get_dropout_mask_((1000, 100), 0.2).eq(0).float().mean()
    assert abs(share - 0.2) < 0.01


@pytest.mark.parametrize("keywords", KINDS, ids=str)
def test_inputs_of_any_layout(keywords):
    made = make(**keywords)
    x = tokens(B, D, L).permute(2, 0, 1)
    close(made(x), made(x.contiguous()))
    expanded = tokens(1, 1, D).expand(L, B, D)
    state = tokens(1, 1, D).expand(made.num_layers, B, D)
    mask = torch.zeros(1, 1, dtype=torch.bool).expand(L, B)
    close(made(expanded, state, mask), made(expanded.contiguous(), state.contiguous()))


def test_copies_and_pickles():
    for keywords in KINDS:
        made = make(**keywords)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(other(tokens())[0], made(tokens())[0])


def test_alpha_comes_from_the_checkpoint():
    """The number that kernels take follows the buffer, wherever the module was made."""
    made = make(rescale=True, highway_bias=-1.0, num_layers=1)
    h = made(tokens())[0]
    for other in (
        SRU(D, D, 1, rescale=True, highway_bias=2.0),
        SRU(D, D, 1, rescale=True, device="meta").to_empty(device="cpu"),
        SRU(D, D, 1, rescale=True).half().float(),
    ):
        other.load_state_dict(made.state_dict())
        close(other(tokens())[0], h)
    other = SRU(D, D, 1, rescale=True, device="meta")
    assert other(tokens().to("meta"))[0].shape == (L, B, D)
    other.load_state_dict(made.state_dict(), assign=True)
    close(other(tokens())[0], h)
    half = copy.deepcopy(made).half()
    assert torch.equal(half.rnn_lst[0].scale_x, made.rnn_lst[0].scale_x)  # 16 bits would round it
    cell = made.rnn_lst[0]
    cell.scale_x.fill_(3.0)
    cell.refresh_scale()
    assert not torch.allclose(made(tokens())[0], h)


def test_v1_refuses_what_it_leaves_out():
    with pytest.raises(RuntimeError, match=r"rnn_lst.0.weight_c is not 0, but v1=True"):
        SRU(D, D, v1=True).load_state_dict(SRU(D, D).state_dict())


@pytest.mark.parametrize("keywords", KINDS, ids=str)
def test_compiled(keywords):
    made = make(**keywords)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps, b in ((L, B), (L - 2, B), (L, B - 1)):
        x, lengths = tokens(steps, b, D), torch.tensor(LENGTHS[:b]).clamp(max=steps)
        results, expected = compiled(x, lengths=lengths), made(x, lengths=lengths)
        close(results, expected)
        close(gradients(made, results), gradients(made, expected), 1e-4)
    torch.compiler.reset()


def test_compiled_in_training_and_step_by_step():
    with pytest.warns(DeprecationWarning):
        made = make(dropout=0.3, rnn_dropout=0.2).train()
    h, _ = torch.compile(made, backend="aot_eager", fullgraph=True)(tokens())
    assert torch.isfinite(h).all()
    made.eval()
    step = torch.compile(made.step, backend="aot_eager", fullgraph=True)
    close(step(tokens(B, D), made(tokens())[1]), made.step(tokens(B, D), made(tokens())[1]))
    torch.compiler.reset()


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("keywords", KINDS[:3], ids=str)
def test_exported(keywords, strict):
    made = make(**keywords)
    steps, b = (torch.export.Dim(name, min=2, max=1000) for name in "LB")
    arguments = {"input": tokens(), "c0": tokens(2, B, D), "lengths": torch.tensor(LENGTHS)}
    shapes = {"input": {0: steps, 1: b}, "c0": {1: b}, "lengths": {0: b}}
    program = torch.export.export(made, (), arguments, dynamic_shapes=shapes, strict=strict)
    given = {"input": tokens(9, 3, D), "c0": tokens(2, 3, D), "lengths": torch.tensor([9, 0, 4])}
    close(program.module()(**given), made(**given))


def test_second_derivatives():
    made = make(num_layers=1, bidirectional=True).double()
    x = tokens(3, 2, D).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: made(x)[0].sum(0), (x,))


def test_gradients_of_each_sequence():
    """`vmap` over sequences of the gradient with respect to all parameters."""
    made = make()
    parameters = {name: p.detach() for name, p in made.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(made, parameters, (x[:, None],))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, tokens())
    total = gradients(made, made(tokens())[:1])
    close([g.sum(0) for g in each.values()], total, 1e-4)


def test_optimizer_reaches_all_parameters():
    made = make().train()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    before = copy.deepcopy(made.state_dict())
    gradients(made, made(tokens()))
    optimizer.step()
    assert all(not torch.equal(v, before[k]) for k, v in made.state_dict().items() if not k.endswith("scale_x"))


def test_values_written_past_autograd_are_seen():
    """As averaging of weights writes them."""
    made = make()
    with torch.no_grad():
        before = made(tokens())[0]
        for cell in made.rnn_lst:
            cell.weight.data.mul_(2)
        assert not torch.allclose(made(tokens())[0], before)


# ----------------------------------------------------------------------------------------------------------------------
# Errors and warnings


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"input_size": 0}, r"SRU: input_size must be a positive integer \(got 0\)"),
        ({"hidden_size": 2.5}, r"SRU: hidden_size must be a positive integer"),
        ({"num_layers": 0}, r"SRU: num_layers must be"),
        ({"dropout": 1.0}, r"SRU: dropout must be a probability"),
        ({"rnn_dropout": -0.1}, r"SRU: rnn_dropout must be"),
        ({"projection_size": -1}, r"n_proj must be an integer >= 0 \(got -1\)"),
        ({"projection_size": [1, 2, 3]}, r"SRU: projection_size must be one, or a sequence of num_layers = 2"),
        ({"highway_bias": "a"}, r"highway_bias must be a number"),
        ({"activation": "selu"}, r"activation must be one of 'identity', 'tanh', 'relu' \(got 'selu'\)"),
        ({"activation": "relu", "use_tanh": True}, r"activation is 'relu', but use_tanh=True"),
        ({"project_skip": False}, r"project_skip is False, but the skip adds x of size 5 to h of size 8"),
        ({"project_skip": True, "has_skip_term": False}, r"project_skip is True, but has_skip_term=False"),
        ({"recompute": 0}, r"recompute must be False"),
        ({"recompute": "x", "custom_m": torch.nn.Linear(5, 32)}, r"recompute is 'x', but the U of custom_m"),
        ({"custom_m": 3}, r"custom_m must be a torch.nn.Module \(got int\)"),
        ({"custom_m": [torch.nn.Linear(5, 32)]}, r"SRU: custom_m must be one, or a sequence of num_layers = 2"),
        ({"dtype": torch.int32}, r"dtype must be one of"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_options(keywords, message):
    with pytest.raises(ArgumentError, match=message):
        SRU(**({"input_size": N, "hidden_size": D} | keywords))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (LibraryError, r"SRU: input must be a torch.Tensor \(got ndarray\)", {"input": np.zeros((L, B, N))}),
        (ShapeError, r"SRU: input has shape \(6, 4, 6\); it needs .*input_size = 5", {"input": torch.zeros(L, B, 6)}),
        (ShapeError, r"SRU: input has shape \(4, 5\); it needs \(L, B, input_size\)", {"input": torch.zeros(B, N)}),
        (
            DtypeError,
            r"SRU: input has dtype torch.float64; it needs torch.float32",
            {"input": torch.zeros(L, B, N).double()},
        ),
        (DtypeError, r"SRU: input has dtype torch.int64", {"input": torch.zeros(L, B, N).long()}),
        (
            LibraryError,
            r"SRU: input is on meta, but the module is on cpu",
            {"input": torch.zeros(L, B, N, device="meta")},
        ),
        (
            ShapeError,
            r"SRU: c0 has shape \(2, 3, 8\); it needs .*\(2, 4, 8\): B comes from input",
            {"c0": torch.zeros(2, 3, D)},
        ),
        (ShapeError, r"SRU: c0 has shape \(4, 4, 4\)", {"c0": torch.zeros(4, B, 4)}),
        (DtypeError, r"SRU: c0 has dtype torch.int64", {"c0": torch.zeros(2, B, D).long()}),
        (DtypeError, r"SRU: c0 has dtype torch.float64", {"c0": torch.zeros(2, B, D).double()}),
        (LibraryError, r"SRU: c0 is on meta", {"c0": torch.zeros(2, B, D, device="meta")}),
        (LibraryError, r"SRU: c0 must be a torch.Tensor \(got tuple\)", {"c0": (torch.zeros(2, B, D),)}),
        (
            ShapeError,
            r"SRU: mask_pad has shape \(4, 6\); it needs \(L, B\) = \(6, 4\)",
            {"mask_pad": torch.zeros(B, L)},
        ),
        (ShapeError, r"SRU: lengths has shape \(3,\)", {"lengths": [1, 2, 3]}),
        (ArgumentError, r"SRU: lengths must be from 0 to L = 6", {"lengths": torch.tensor([1, 2, 3, 7])}),
        (DtypeError, r"SRU: lengths has dtype torch.float32", {"lengths": torch.ones(B)}),
        (ShapeError, r"SRU: reset has shape \(6, 1\)", {"reset": torch.zeros(L, 1)}),
    ],
)
def test_wrong_inputs(error, message, arguments):
    made = make(N)
    with pytest.raises(error, match=message):
        made(**({"input": torch.zeros(L, B, N)} | arguments))


def test_more_wrong_inputs():
    made = make(bidirectional=True, nn_rnn_compatible_return=True)
    with pytest.raises(ShapeError, match=r"c0 has shape \(5, 4, 4\); it needs \(num_layers\*D, B, d\) = \(4, 4, 4\)"):
        made(tokens(), torch.zeros(5, B, 4))
    with pytest.raises(ArgumentError, match=r"SRU.step: bidirectional is True"):
        made.step(tokens(B, D))
    packed = pack_padded_sequence(tokens(), [L] * B)
    with pytest.raises(ArgumentError, match=r"SRU: lengths must be None for a PackedSequence"):
        made(packed, lengths=[L] * B)
    with pytest.raises(DtypeError, match=r"SRU: input has dtype torch.float64"):
        made(packed.to(torch.float64))
    with pytest.raises(ShapeError, match=r"SRUCell: c0 has shape \(2, 8\); it needs \(B, D\*d\) = \(4, 8\)"):
        SRUCell(D, D)(tokens(), torch.zeros(2, D))
    half = make().half()
    with pytest.raises(DtypeError, match=r"input has dtype torch.float32; it needs torch.float16.*module.to"):
        half(tokens())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x, r"SRUCell: the U of custom_m has shape \(6, 4, 8\); it needs \(L, B, 24\)"),
        (lambda x: (x.repeat(1, 1, 3), x), r"the V of custom_m has shape \(6, 4, 8\); it needs \(L, B, 16\)"),
        (lambda x: (x, x, x), r"custom_m must return U, or U and V \(got 3 values\)"),
        (lambda x: None, r"the U of custom_m must be a torch.Tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_results_of_custom_m(result, message):
    class Custom(torch.nn.Module):
        def forward(self, x):
            return result(x)

    with pytest.raises((ArgumentError, LibraryError), match=message):
        SRUCell(D, D, custom_m=Custom())(tokens())


def test_warnings():
    with pytest.warns(UserWarning, match=r"a projection of size 6 has no effect, .* below input_size 5"):
        assert SRU(N, D, projection_size=6).rnn_lst[0].projection_size == 0
    with pytest.warns(DeprecationWarning, match=r"use_tanh is deprecated"):
        assert SRU(N, D, use_tanh=True).rnn_lst[0].activation == "tanh"
    with pytest.warns(DeprecationWarning, match=r"rnn_dropout is deprecated"):
        SRU(N, D, rnn_dropout=0.1)
    with pytest.warns(UserWarning, match=r"custom_m keeps its parameters, as Identity has no reset_parameters"):
        SRUCell(N, D, custom_m=torch.nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SRU(N, D, v1=True, projection_size=3)


def test_repr():
    text = repr(SRU(N, D // 2, bidirectional=True, dropout=0.1, projection_size=3))
    assert "5, 4, num_layers=2, bidirectional=True" in text
    assert "SRUCell(5, 4, projection_size=3, dropout=0.1, bidirectional=True, rescale=False)" in text
