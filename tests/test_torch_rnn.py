"""The modules of the PyTorch binding against the core's functions on NumPy arrays, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import oracle
import sru_rt
import tolerance

torch = pytest.importorskip("torch")

from sru_rt.bindings.torch import QRNN, RNN, MinGRU, MinLSTM, QRNNState
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

LAYOUTS = {
    "plain": {},
    "lengths": {"lengths": True},
    "mask": {"mask": True},
    "reset": {"reset": True},
    "all": {"lengths": True, "mask": True, "reset": True},
}


@sru_rt.cell(gates="a n", params="b w", state="c")
def leaky(a, n, b, w, c):
    a = sru_rt.sigmoid(a + b + w * c)
    c = a * c + (1 - a) * n
    return c, sru_rt.tanh(c)


@sru_rt.cell(
    gates="i f", inputs="x gain", per_sequence="m", params="b", state="c y", constants="alpha beta", name="two_states"
)
def two_states(i, f, x, gain, m, b, c, y, alpha, beta=0.5):
    f = sru_rt.sigmoid(f + b * y)
    c = f * c + (1 - f) * i * gain
    y = sru_rt.tanh(c) * m * beta
    return c, y, y + alpha * x


OPTIONS = [
    (MinGRU, {}),
    (MinGRU, {"candidate": "positive", "bias": False, "low_rank": 2}),
    (MinLSTM, {}),
    (MinLSTM, {"candidate": "positive", "low_rank": 3}),
    (MinLSTM, {"bias": False}),
    (QRNN, {}),
    (QRNN, {"pooling": "f", "window": 2}),
    (QRNN, {"pooling": "ifo", "window": 3, "highway": True, "low_rank": 3}),
    (QRNN, {"highway": True, "project_skip": True, "bias": False}),
    (QRNN, {"highway": True, "window": 2, "zoneout": 0.3}),
    (QRNN, {"pooling": "ifo", "zoneout": 0.3}),
    (RNN, {"cell": leaky, "params": {"b": 1.0}}),
    (RNN, {"cell": two_states, "constants": {"alpha": 0.7}}),
]


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}={getattr(v, 'name', v)}" for k, v in value.items() if k != "params") or "default"
    return getattr(value, "__name__", str(value))


ALL = pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=name_of)


def make(kind: Any, options: dict[str, Any], n: int = 5, d: int = 4, layers: int = 1, **more: Any) -> Any:
    """A module in float64 whose parameters are all random."""
    torch.manual_seed(3)
    if options.get("cell") is two_states:
        n = (2 if more.get("bidirectional") else 1) * d
    module = kind(n, d, layers, **options, dtype=torch.float64, **more)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("weight"):
                parameter.normal_()
    return module


def values_of(module: Any, L: int, B: int) -> dict[str, Any]:
    """What an own cell takes by name."""
    if getattr(module, "cell", None) is not two_states:
        return {}
    D, d = module.num_directions, module.hidden_size
    return {"gain": [normal(L, B, D * d) for _ in range(module.num_layers)], "m": normal(B, D, d)}


def state_of(module: Any, B: int) -> Any:
    shape = (module.num_layers * module.num_directions, B, module.hidden_size)
    return (normal(*shape), normal(*shape)) if getattr(module, "cell", None) is two_states else normal(*shape)


def normal(*shape: int) -> Any:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def layout_of(name: str, L: int, B: int) -> dict[str, Any]:
    drawn = oracle.random_layout(np.random.default_rng(5), L, B, **LAYOUTS[name])
    return {name: torch.from_numpy(value) for name, value in drawn.items()}


def array(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().numpy()


def each(value: Any) -> tuple[Any, ...]:
    """A state as a tuple of states."""
    return value if isinstance(value, tuple) else (value,)


# ----------------------------------------------------------------------------------------------------------------------
# Values and gradients


class InNumPy:
    """The layers of a module by the core's functions."""

    def __init__(self, module: Any) -> None:
        self.module, self.D, self.saved = module, module.num_directions, []
        if isinstance(module, RNN):
            self.call, self.pull, self.initial = module.cell.forward, module.cell.backward, "c0"
        else:
            name = type(module).__name__.lower()
            self.call, self.pull = getattr(sru_rt, f"{name}_forward"), getattr(sru_rt, f"{name}_backward")
            self.initial = "c0" if isinstance(module, QRNN) else "h0"

    def rows(self, k: int, state: Any) -> Any:
        """The part of layer k."""
        parts = tuple(array(s)[k * self.D : (k + 1) * self.D] for s in each(state))
        return parts[0] if len(parts) == 1 else parts

    def parameters(self, k: int) -> dict[str, Any]:
        found = {name.replace(f"_l{k}", ""): array(p) for name, p in self.module.named_parameters() if f"_l{k}" in name}
        if "weight_p" in found:
            found["weight"] = (found.pop("weight_p"), found.pop("weight_q"))
        return found

    def options(self, L: int, B: int) -> dict[str, Any]:
        m = self.module
        if isinstance(m, RNN):
            return m.constants or {}
        if not isinstance(m, QRNN):
            return {"candidate": m.candidate}
        found = {"pooling": m.pooling, "window": m.window, "highway": m.highway}
        if m.zoneout and m.training:
            mask = torch.empty(L, B, self.D, m.hidden_size, dtype=torch.bool).bernoulli_(1 - m.zoneout)
            found["zoneout_mask"] = array(mask)
        return found

    def forward(self, x: Any, state: Any, layout: dict[str, Any], values: dict[str, Any]) -> tuple[Any, Any]:
        h, lasts = array(x), []
        for k in range(self.module.num_layers):
            given = self.parameters(k) | self.options(*h.shape[:2]) | {n: array(v) for n, v in layout.items()}
            given |= {name: array(v[k] if isinstance(v, list) else v) for name, v in values.items()}
            given[self.initial] = None if state is None else self.rows(k, state)
            h, last, saved = self.call(h, **given, save=True)
            self.saved.append(saved)
            lasts.append(each(last))
        return h, tuple(np.concatenate(states) for states in zip(*lasts))

    def backward(self, dh: Any, dlast: Any) -> tuple[Any, list[Any]]:
        """The gradient of x, and the gradients of each layer."""
        gradients, dh = [], array(dh)
        for k in reversed(range(self.module.num_layers)):
            gradients.append(self.pull(self.saved[k], dh, self.rows(k, dlast)))
            dh = gradients[-1].x
        return dh, gradients[::-1]


@pytest.mark.parametrize(("D", "layers", "size"), [(1, 1, (6, 3)), (2, 2, (7, 2))], ids=["1x1", "2x2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@ALL
def test_values_and_gradients_are_those_of_the_core(kind, options, layout, D, layers, size):
    L, B = size
    module = make(kind, options, layers=layers, bidirectional=D == 2)
    x, state, values = normal(L, B, module.input_size), state_of(module, B), values_of(module, L, B)
    layout = layout_of(layout, L, B)
    torch.manual_seed(11)  # for zoneout
    h, last = module(x, state, **layout, **({"values": values} if values else {}))
    dh, dlast = torch.randn_like(h), tuple(torch.randn_like(s) for s in each(last))
    torch.autograd.backward([h, *each(last)], [dh, *dlast])

    core = InNumPy(module)
    torch.manual_seed(11)
    wanted, wanted_last = core.forward(x, state, layout, values)
    dx, gradients = core.backward(dh, dlast)
    check("h", h, wanted)
    for got, want in zip(each(last), wanted_last):
        check("last", got, want)
    check("dx", x.grad, dx)
    for k, found in enumerate(gradients):
        for name, want in found_parameters(k, found):
            check(name, getattr(module, name).grad, want)
        for i, want in enumerate(each(getattr(found, core.initial))):
            check("dstate", each(state)[i].grad[k * D : (k + 1) * D], want)
        if values:
            check("dgain", values["gain"][k].grad, found.gain)
    if values:
        check("dm", values["m"].grad, sum(found.m for found in gradients))


def found_parameters(k: int, gradients: Any) -> list[tuple[str, Any]]:
    """Gradients by the names of parameters of layer k."""
    weight = gradients.weight
    found = {f"weight_l{k}_p": weight[0], f"weight_l{k}_q": weight[1]} if isinstance(weight, tuple) else {}
    found = found or {f"weight_l{k}": weight}
    names = [name for name in gradients if name in ("bias", "params") and getattr(gradients, name) is not None]
    return [*found.items(), *((f"{name}_l{k}", getattr(gradients, name)) for name in names)]


def check(name: str, got: Any, wanted: Any, bound: float = 1e-11) -> None:
    tolerance.check(name, array(got), array(wanted) if isinstance(wanted, torch.Tensor) else wanted, bound)


@pytest.mark.parametrize("recompute", [False, 1, 3, "x"])
def test_recomputing_changes_no_gradient(recompute):
    module = make(QRNN, {"window": 2, "highway": True, "recompute": recompute}, layers=2)
    torch.manual_seed(1)
    x = normal(7, 2, 5)
    h, last = module(x)
    (h.square().sum() + last.sum()).backward()
    core = InNumPy(module)
    core.forward(x, None, {}, {})
    dx, gradients = core.backward(2 * h, torch.ones_like(last))
    check("dx", x.grad, dx)
    check("dweight", module.weight_l0.grad, gradients[0].weight)


@ALL
def test_gradients_agree_with_finite_differences(kind, options):
    module = make(kind, options, n=2, d=2).eval()
    L, B = 3, 2
    x, state, values = normal(L, B, module.input_size), state_of(module, B), values_of(module, L, B)
    parameters = dict(module.named_parameters())

    def run(x, *rest):
        state, rest = rest[: len(each_state)], rest[len(each_state) :]
        given = {"values": {"gain": rest[0], "m": rest[1]}} if values else {}
        weights = dict(zip(parameters, rest[-len(parameters) :]))
        state = state if len(state) > 1 else state[0]
        h, last = torch.func.functional_call(module, weights, (x, state), given)
        return h, *each(last)

    each_state = each(state)
    flat = [*values["gain"], values["m"]] if values else []
    assert torch.autograd.gradcheck(run, (x, *each_state, *flat, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [QRNN, MinGRU, MinLSTM])
def test_narrow_dtypes(kind, dtype):
    module = kind(6, 5, dtype=dtype)
    x = torch.randn(9, 3, 6, dtype=dtype)
    h, last = module(x)
    wide = kind(6, 5, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    wanted, wanted_last = wide(x.double())
    assert h.dtype == dtype and last.dtype == torch.float32
    name = str(dtype).removeprefix("torch.")
    check("h", h.double(), wanted, tolerance.LAYER[name])
    check("last", last.double(), wanted_last, tolerance.LAYER[name])
    again, _ = module(x, last)
    assert again.dtype == dtype
    assert torch.equal(module(x, last.to(dtype))[0], module(x, last.to(dtype).float())[0])


# ----------------------------------------------------------------------------------------------------------------------
# Forms of input


@ALL
def test_forms_of_input(kind, options):
    module = make(kind, options, layers=2, bidirectional=True).eval()
    L, B = 6, 4
    lengths = torch.tensor([3, 6, 1, 5])
    x, state, values = normal(L, B, module.input_size), state_of(module, B), values_of(module, L, B)
    reset = layout_of("reset", L, B)["reset"]
    given = {"values": values} if values else {}
    h, last = module(x, state, lengths=lengths, reset=reset, **given)

    module.batch_first = True
    swapped = {"values": {"gain": [v.transpose(0, 1) for v in values["gain"]], "m": values["m"]}} if values else {}
    h2, last2 = module(x.transpose(0, 1), state, lengths=lengths.tolist(), reset=reset.T, **swapped)
    check("batch_first", h2.transpose(0, 1), h)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    h3, last3 = module(packed, state, reset=reset.T, **swapped)
    module.batch_first = False
    h4, last4 = module(packed, state, reset=reset, **given)
    check("packed", pad_packed_sequence(h3)[0], h)
    check("packed", pad_packed_sequence(h4)[0], h)
    assert torch.equal(h4.batch_sizes, packed.batch_sizes) and torch.equal(h4.sorted_indices, packed.sorted_indices)
    for other in (last2, last3, last4):
        for got, want in zip(each(other), each(last)):
            check("last", got, want)

    one = tuple(s[:, 2] for s in each(state))
    alone = {"values": {"gain": [v[:1, 2] for v in values["gain"]], "m": values["m"][2]}} if values else {}
    h5, last5 = module(x[:1, 2], one if len(one) > 1 else one[0], reset=reset[:1, 2], **alone)
    check("one sequence", h5, h[:1, 2])
    for got, want in zip(each(last5), each(last)):
        check("one state", got, want[:, 2])


def test_gradients_reach_packed_tokens():
    module = make(MinGRU, {}, bidirectional=True)
    x, lengths = normal(5, 3, 5), torch.tensor([5, 4, 2])  # already sorted, so without indices
    h, _ = module(pack_padded_sequence(x, lengths))
    h.data.square().sum().backward()
    dx, x.grad = x.grad, None
    module(x, lengths=lengths)[0].square().sum().backward()
    check("dx", dx, x.grad)


@pytest.mark.parametrize("form", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize(("kind", "options"), [(QRNN, {"window": 2, "highway": True}), (MinLSTM, {})], ids=name_of)
def test_layouts_in_memory(kind, options, form):
    module = make(kind, options, n=4)
    x = {
        "transposed": torch.randn(3, 6, 4, dtype=torch.float64).transpose(0, 1),
        "strided": torch.randn(6, 3, 8, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(1, 1, 4, dtype=torch.float64).expand(6, 3, 4),
    }[form].requires_grad_()
    state = torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 3, 4)
    plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    h, last = module(x, state)
    wanted, wanted_last = module(plain, state.contiguous())
    assert torch.equal(h, wanted) and torch.equal(last, wanted_last)
    h.sum().backward()  # whose gradient is expanded
    wanted.sum().backward()
    check("dx", x.grad, plain.grad)


@pytest.mark.parametrize(("L", "B"), [(0, 3), (4, 0), (0, 0)])
@ALL
def test_nothing_to_do(kind, options, L, B):
    module = make(kind, options, layers=2, bidirectional=True)
    x, state, values = normal(L, B, module.input_size), state_of(module, B), values_of(module, L, B)
    h, last = module(x, state, lengths=[0] * B, **({"values": values} if values else {}))
    assert h.shape == (L, B, 8)
    for got, want in zip(each(last), each(state)):
        assert torch.equal(got, want)
    (h.sum() + sum(s.sum() for s in each(last))).backward()
    assert all((s.grad == 1).all() for s in each(state))


# ----------------------------------------------------------------------------------------------------------------------
# Pieces and single tokens


@pytest.mark.parametrize(("kind", "options"), [row for row in OPTIONS if row[1].get("window", 1) == 1], ids=name_of)
def test_the_state_goes_back_in(kind, options):
    module = make(kind, options, layers=2).eval()
    x, values = normal(7, 3, module.input_size), values_of(module, 7, 3)
    pieces = [
        {"values": {"gain": [v[part] for v in values["gain"]], "m": values["m"]}} if values else {}
        for part in (slice(0, 4), slice(4, 7))
    ]
    h, last = module(x, **({"values": values} if values else {}))
    first, state = module(x[:4], **pieces[0])
    second, state = module(x[4:], state, **pieces[1])
    check("h", torch.cat([first, second]), h)
    for got, want in zip(each(state), each(last)):
        check("last", got, want)


@ALL
def test_steps_are_the_sequence(kind, options):
    module = make(kind, options, layers=2).eval()
    L, B = 5, 3
    x, values = normal(L, B, module.input_size), values_of(module, L, B)
    h, last = module(x, **({"values": values} if values else {}))
    for state in (None, module.initial_step_state(B)):
        rows = []
        for t in range(L):
            given = {"values": {"gain": [v[t] for v in values["gain"]], "m": values["m"]}} if values else {}
            row, state = module.step(x[t], state, **given)
            assert row.shape == (B, 4)
            rows.append(row)
        check("h", torch.stack(rows), h)
        for got, want in zip(each(state.c if isinstance(state, QRNNState) else state), each(last)):
            check("last", got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [2, 4])
def test_windows_reach_across_pieces(window, layout):
    """Pieces of 0, 1, 3 and 4 tokens, then steps; against all at once, gradients included."""
    module = make(QRNN, {"window": window, "highway": True}, layers=2)
    L, B = 10, 3
    x = normal(L, B, 5)
    layout = layout_of(layout, L, B)
    lengths = layout.pop("lengths", torch.full((B,), L))
    if len(lengths) == B and (lengths < L).any():
        lengths = torch.tensor([L, 6, 0])  # a sequence that has ended takes no further step
    h, last = module(x, lengths=lengths, **layout)
    pieces, state, t = [], module.initial_step_state(B), 0
    for n in (0, 1, 3, 4, 2):
        part = slice(t, t + n)
        rest = {name: value[part] for name, value in layout.items()}
        piece, state = module(x[part], state, lengths=(lengths - t).clamp(0, n), **rest)
        pieces.append(piece)
        t += n
    check("h", torch.cat(pieces), h)
    check("c", state.c, last)
    dh = torch.randn_like(h)
    (wanted,) = torch.autograd.grad((h * dh).sum() + last.sum(), x)
    (got,) = torch.autograd.grad((torch.cat(pieces) * dh).sum() + state.c.sum(), x)
    check("dx", got, wanted)


def test_a_prompt_of_many_lengths_then_steps():
    """What follows a ragged prompt is what follows each of its sequences alone."""
    module = make(QRNN, {"window": 3}, layers=2, batch_first=True)
    lengths = [4, 1, 0, 2]
    x, more = torch.randn(4, 4, 5, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    _, state = module(x, module.initial_step_state(4), lengths=lengths)
    rows = []
    for t in range(2):
        row, state = module.step(more[:, t], state)
        rows.append(row)
    for b, n in enumerate(lengths):
        alone, _ = module(torch.cat([x[b, :n], more[b]]))
        check(f"sequence {b}", torch.stack(rows, 1)[b], alone[n:])


# ----------------------------------------------------------------------------------------------------------------------
# Randomness


def test_dropout_is_between_layers_and_only_in_training():
    module = make(MinGRU, {}, layers=3, dropout=0.5)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    torch.manual_seed(7)
    h, _ = module(x)
    torch.manual_seed(7)
    y = x
    for k in range(3):
        y = torch.nn.functional.dropout(y, 0.5) if k else y
        bias, weight = getattr(module, f"bias_l{k}"), getattr(module, f"weight_l{k}")
        y = torch.from_numpy(sru_rt.mingru_forward(y.numpy(), array(weight), array(bias))[0])
    check("h", h, y)
    module.eval()
    quiet, _ = module(x)
    module.dropout = 0.0
    assert torch.equal(quiet, module.train()(x)[0]) and not torch.equal(quiet, h)


def test_zoneout_keeps_the_state_and_only_in_training():
    module = make(QRNN, {"zoneout": 1.0})
    x, state = torch.randn(6, 2, 5, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    assert torch.equal(module(x, state)[1], state)
    assert torch.equal(module.step(x[0], state)[1], state)
    plain = make(QRNN, {})
    assert torch.equal(module.eval()(x, state)[0], plain(x, state)[0])


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@ALL
def test_a_gpu_gives_what_the_cpu_gives(kind, options):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    module = make(kind, options, layers=2, bidirectional=True).eval()
    L, B, lengths = 7, 3, [4, 7, 0]
    x, state, values = normal(L, B, module.input_size), state_of(module, B), values_of(module, L, B)
    dh = torch.randn(L, B, 8, dtype=torch.float64)

    def run(to: Any) -> list[Any]:
        """Results, and gradients of x, parameters and values."""
        here = module.to(to)
        moved = {"gain": [to_device(v, to) for v in values["gain"]], "m": to_device(values["m"], to)} if values else {}
        x_, state_ = to_device(x, to), tuple(to_device(s, to) for s in each(state))
        given = {"values": moved} if values else {}
        h, last = here(x_, state_ if len(state_) > 1 else state_[0], lengths=lengths, **given)
        wanted = [x_, *state_, *here.parameters(), *moved.get("gain", ())]
        return [h, *each(last), *torch.autograd.grad(h, wanted, dh.to(to, non_blocking=True))]

    on_cpu = run("cpu")
    run("cuda")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = run("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, (got, want) in enumerate(zip(on_gpu, on_cpu)):
        check(str(i), got.cpu(), want, 1e-9)


def to_device(tensor: Any, to: Any) -> Any:
    return tensor.detach().to(to, non_blocking=True).requires_grad_()


@pytest.mark.gpu
def test_packed_sequences_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    module, x, lengths = make(MinGRU, {}, layers=2, bidirectional=True), normal(6, 3, 5), torch.tensor([3, 6, 1])
    wanted, wanted_last = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    packed = pack_padded_sequence(x.cuda(), lengths, enforce_sorted=False)
    module.cuda()(packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        h, last = module(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check("h", h.data.cpu(), wanted.data, 1e-9)
    check("last", last.cpu(), wanted_last, 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# The PyPI package minGRU-pytorch


@pytest.mark.parametrize(("kind", "order"), [(MinGRU, [1, 0]), (MinLSTM, [1, 2, 0])], ids=name_of)
def test_weights_of_mingru_pytorch(kind, order):
    """To and fro; as docs/migration.md has it. Theirs has the candidate first."""
    pytest.importorskip("minGRU_pytorch", reason="needs the PyPI package minGRU-pytorch")
    from minGRU_pytorch import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    torch.manual_seed(0)
    size, x = 6, normal(3, 9, 6)
    theirs = (minGRU if kind is MinGRU else minLSTM)(size).double()
    linear = theirs.to_hidden_and_gate if kind is MinGRU else theirs.to_hidden_and_f_i_gate
    ours = kind(size, size, bias=False, batch_first=True, candidate="positive", dtype=torch.float64)
    with torch.no_grad():
        ours.weight_l0.copy_(linear.weight.view(-1, size, size)[order])
    check("h", ours(x)[0], theirs(x))

    with torch.no_grad():
        ours.reset_parameters()
        inverse = [order.index(i) for i in range(len(order))]
        linear.weight.copy_(ours.weight_l0[0, inverse].flatten(0, 1))
    h, last = ours(x)
    out, hidden = theirs(x, return_next_prev_hidden=True)
    check("h", h, out)
    check("last", last[0], hidden[:, 0])
    if kind is MinGRU:  # theirs maps an initial state of minLSTM through g first, unless L is 1
        check("next", ours(x, last)[0], theirs(x, hidden))
