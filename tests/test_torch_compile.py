"""Functions and modules of the PyTorch binding under PyTorch's compilers, transformations, modes and memory tools.

"As eager" is what every test asks for; that eager mode is right is shown elsewhere.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")

from sru_rt.bindings import torch as binding
from sru_rt.bindings.torch import QRNN, RNN, SRU, MinGRU, MinLSTM, native
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import sru_rt
from problems import FULL, Problem
from test_torch_functions import two_state_problem, two_states
from torch_tools import differentiable, flat, seed, tensor, torch

SIZE, D = 4, 2


@sru_rt.cell(gates="a n", params="b", state="c", constants="k")
def leaky(a, n, b, c, k=0.5):
    c = c + sru_rt.sigmoid(a + b) * (n - k * c)
    return c, sru_rt.tanh(c)


def made(name: str, recompute: Any = False, **options: Any) -> Any:
    """A module of two layers and two directions, with inputs of 2*SIZE."""
    common: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "SRU": (SRU, {"rescale": True, "layer_norm": True}),
        "QRNN": (QRNN, {"window": 2, "pooling": "ifo", "highway": True}),
        "MinGRU": (MinGRU, {}),
        "MinLSTM": (MinLSTM, {"candidate": "positive", "low_rank": 3}),
        "RNN": (RNN, {"cell": leaky, "params": {"b": 1.0}}),
    }
    kind, own = kinds[name]
    torch.manual_seed(0)
    return kind(D * SIZE, SIZE, **common | own | {"recompute": recompute} | options)


def step(module: Any, x: Any, given: dict[str, Any]) -> None:
    """One of training."""
    h, last = module(x, **given)
    (h.square().sum() + last.sum()).backward()
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
                p.grad = None


NAMES = ["SRU", "QRNN", "MinGRU", "MinLSTM", "RNN"]


def call(L: int, B: int, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(L * 100 + B)
    lengths = torch.randint(0, L + 1, (B,), generator=generator)
    lengths[0] = L
    return torch.randn(L, B, D * SIZE, generator=generator, dtype=dtype), {"lengths": lengths}


def results_and_gradients(function: Any, x: Any, parameters: Any, **given: Any) -> list[Any]:
    """As one list, of a function that returns the output and the last state."""
    x = x.detach().clone().requires_grad_()
    h, last = function(x, **given)
    gradients = torch.autograd.grad((h * seed(h)).sum() + (last * seed(last)).sum(), [x, *parameters])
    return [h.detach(), last.detach(), *gradients]


def same(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def compilers_forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile


def function_call(name: str) -> tuple[Any, dict[str, Any]]:
    """A function, and its arguments as leaves of a graph."""
    if name == "own_cell":
        arrays, options = two_state_problem()
        given = {n: tensor(value) for n, value in arrays.items()}
        for one in flat(given):
            one.requires_grad_()
        given |= options | {"lengths": torch.tensor(options["lengths"])}
        return (lambda **given: binding.own_cell(two_states, **given)), given
    family = name.removesuffix("_forward")
    problem = Problem.make(FULL[family] | {"dtype": "float64"}, (6, 3, SIZE), D, "all", layer=True, state=True)
    return getattr(sru_rt if name.endswith("_forward") else binding, name), differentiable(problem)


def with_gradients(function: Any, given: dict[str, Any]) -> list[Any]:
    h, last = function(**given)
    results = [h, *(last if isinstance(last, tuple) else [last])]
    leaves = [one for one in flat(given) if one.requires_grad]
    gradients = torch.autograd.grad(results, leaves, [seed(r) for r in results])
    return [*(r.detach() for r in results), *gradients]


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        *(("sru", policy) for policy in (False, 3, True, "x")),
        *((name, policy) for name in ("qrnn", "mingru", "minlstm", "own_cell") for policy in (False, "x")),
        ("sru_forward", None),
    ],
)
def test_functions_compiled(name, recompute):
    function, given = function_call(name)
    options = {} if recompute is None else {"recompute": recompute}

    def two_of_them(**given: Any) -> Any:
        h, last = function(**given, **options)
        return h.sin() * 2, last

    dynamic = recompute == "x"
    compiled = torch.compile(two_of_them, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    same(with_gradients(compiled, given), with_gradients(two_of_them, given), 1e-10)
    with torch.no_grad():
        same(compiled(**given), two_of_them(**given), 1e-10)


@pytest.mark.parametrize(("name", "recompute"), [*zip(NAMES, [False, "x", 3, True, "x"])])
def test_one_compiled_module_for_all_sizes(name, recompute):
    module = made(name, recompute, num_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for L, B in ((40, 3), (70, 3), (40, 5)):  # a single kept state would be a case of its own
        x, given = call(L, B)
        got = results_and_gradients(compiled, x, module.parameters(), **given)
        same(got, results_and_gradients(module, x, module.parameters(), **given), 1e-4)
        counts.append(counter.frame_count)
    assert counts[0] and len(set(counts)) == 1
    with torch.no_grad():
        same(compiled(x, **given), module(x, **given))


@pytest.mark.parametrize(("name", "dynamic"), [pytest.param("SRU", True, marks=pytest.mark.slow), ("QRNN", False)])
def test_inductor(name, dynamic):
    module = made(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    x, given = call(7, 3)
    got = results_and_gradients(compiled, x, module.parameters(), **given)
    same(got, results_and_gradients(module, x, module.parameters(), **given))


# ----------------------------------------------------------------------------------------------------------------------
# torch.export, also into another process


def exported(module: Any, strict: bool = False) -> Any:
    L, B = Dim.DYNAMIC, Dim.DYNAMIC
    x, given = call(5, 3)
    shapes = {"input": {0: L, 1: B}, "lengths": {0: B}}
    return torch.export.export(module, (x,), given, dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_exported_programs_run_and_train_at_other_sizes(name, strict):
    module = made(name, recompute=3 if name == "MinGRU" else False)
    program = exported(module, strict).module()
    for L, B in ((2, 2), (100, 3), (9, 1)):
        x, given = call(L, B)
        same(program(x, **given), module(x, **given))
    wanted = results_and_gradients(module, x, module.parameters(), **given)
    parameters = dict(program.named_parameters())
    same(results_and_gradients(program, x, [parameters[n] for n, _ in module.named_parameters()], **given), wanted)


CELLS_OF_A_USER = """
import sru_rt

@sru_rt.cell(gates="a", state="c")
def mine(a, c):
    c = c + {factor} * (a - c)
    return c, c
"""

LOADER = """
import json, sys
import torch
import sru_rt.bindings.torch

found = {}
for name in sys.argv[2:]:
    try:
        program = torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()
        x, lengths = torch.load(f"{sys.argv[1]}/call.pt")
        found[name] = [r.tolist() for r in program(x, lengths=lengths)]
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
assert "pytest" not in sys.modules and "jax" not in sys.modules
print(json.dumps(found))
"""


def fresh(program: str, *arguments: Any, path: Any = "") -> Any:
    """What a program prints as JSON in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(path)}
    elsewhere = tempfile.gettempdir()  # not in the checkout, which would be imported in place of what is installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_programs_in_another_process(tmp_path, monkeypatch):
    """Which only imports the binding; cells of a user must be where they were, and what they were."""
    monkeypatch.syspath_prepend(tmp_path)
    own = {place: tmp_path / f"cells_that_{place}.py" for place in ("stay", "change", "go")}
    modules = {"SRU": made("SRU"), "MinGRU": made("MinGRU", 3)}
    for place, file in own.items():
        file.write_text(CELLS_OF_A_USER.format(factor=0.5))
        modules[place] = made("RNN", cell=__import__(file.stem).mine, params={})
    x, given = call(9, 4)
    wanted = {name: [r.tolist() for r in module(x, **given)] for name, module in modules.items()}
    torch.save((x, given["lengths"]), tmp_path / "call.pt")
    for name, module in modules.items():
        torch.export.save(exported(module), tmp_path / f"{name}.pt2")
    own["change"].write_text(CELLS_OF_A_USER.format(factor=0.25))
    own["go"].unlink()
    found = fresh(LOADER, tmp_path, *modules, path=tmp_path)
    for name in ("SRU", "MinGRU", "stay"):
        assert isinstance(found[name], list), found[name]
        for got, value in zip(found[name], wanted[name]):
            np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6)
    assert "'mine' of module 'cells_that_change' has changed" in found["change"]
    assert "export the program again" in found["change"]
    assert "'mine' of module 'cells_that_go' is not here" in found["go"]


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path):
    module = made("SRU").eval()
    package = str(tmp_path / "sru.pt2")
    torch._inductor.aoti_compile_and_package(exported(module), package_path=package)
    program = """
        import json, sys
        import torch
        import sru_rt.bindings.torch

        run = torch._inductor.aoti_load_package(sys.argv[1])
        x, lengths = torch.load(sys.argv[2])
        print(json.dumps([r.tolist() for r in run(x, lengths=lengths)]))
    """
    x, given = call(9, 4)
    torch.save((x, given["lengths"]), tmp_path / "call.pt")
    for got, wanted in zip(fresh(textwrap.dedent(program), package, tmp_path / "call.pt"), module(x, **given)):
        np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# torch.func


def double(name: str, recompute: Any = False, **options: Any) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """A module in float64 with its parameters and a call."""
    module = made(name, recompute, **options).double()
    return module, {n: p.detach() for n, p in module.named_parameters()}, *call(4, 3, torch.float64)


def loss_of(module: Any, parameters: dict[str, Any], x: Any, given: dict[str, Any]) -> Any:
    h, last = torch.func.functional_call(module, parameters, (x,), given)
    return (h * seed(h)).sum() + (last * seed(last)).sum()


TRANSFORMED = pytest.mark.parametrize(
    ("name", "recompute"), [("SRU", False), ("QRNN", "x"), ("MinGRU", 3), ("MinLSTM", "x"), ("RNN", True)]
)


@TRANSFORMED
def test_grad_of_a_function(name, recompute):
    module, parameters, x, given = double(name, recompute)
    got = torch.func.grad(lambda p: loss_of(module, p, x, given))(parameters)
    wanted = torch.autograd.grad(loss_of(module, dict(module.named_parameters()), x, given), [*module.parameters()])
    same([*got.values()], list(wanted), 1e-11)


@TRANSFORMED
def test_gradients_of_each_sequence(name, recompute):
    """`vmap` of `grad`, with a length of its own for each."""
    module, parameters, x, given = double(name, recompute)

    def of_one(p: Any, x: Any, length: Any) -> Any:
        return loss_of(module, p, x[:, None], {"lengths": length[None]})

    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 1, 0))(parameters, x, given["lengths"])
    for i in range(x.shape[1]):
        alone = torch.func.grad(of_one)(parameters, x[:, i], given["lengths"][i])
        same({n: g[i] for n, g in each.items()}, alone, 1e-11)


@TRANSFORMED
def test_jacobian(name, recompute):
    module, _, x, given = double(name, recompute, num_layers=1)
    got = torch.func.jacrev(lambda x: module(x, **given)[1])(x)
    same(got, torch.autograd.functional.jacobian(lambda x: module(x, **given)[1], x), 1e-11)


@TRANSFORMED
def test_ensemble(name, recompute):
    modules = [made(name, recompute).double() for _ in range(3)]
    for k, module in enumerate(modules):
        for p in module.parameters():
            p.data += k * seed(p)
    x, given = call(4, 3, torch.float64)
    parameters, buffers = torch.func.stack_module_state(modules)

    def of_one(p: Any, b: Any) -> Any:
        return torch.func.functional_call(modules[0], (p, b), (x,), given)

    got = torch.func.vmap(of_one)(parameters, buffers)
    wanted = [module(x, **given) for module in modules]
    same(got, tuple(torch.stack(parts) for parts in zip(*wanted)), 1e-11)
    gradients = torch.autograd.grad(got[0].sum(), [*parameters.values()], allow_unused=True)
    for k, (module, (h, _)) in enumerate(zip(modules, wanted)):
        alone = torch.autograd.grad(h.sum(), [*module.parameters()], allow_unused=True)
        same([g[k] for g in gradients], list(alone), 1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Modes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "recompute"), [("SRU", False), ("QRNN", "x"), ("MinGRU", 3)])
def test_checkpoint(name, recompute, reentrant):
    module, x, given = made(name, recompute), *call(7, 3)

    def again(x: Any, **given: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda x: module(x, **given), x, use_reentrant=reentrant)

    x.requires_grad_()
    wanted = results_and_gradients(module, x, [], **given)
    if not reentrant:  # that one refuses torch.autograd.grad
        wanted = results_and_gradients(module, x, module.parameters(), **given)
        same(results_and_gradients(again, x, module.parameters(), **given), wanted, 0)
        return
    leaf = x.detach().clone().requires_grad_()
    h, last = again(leaf, **given)
    ((h * seed(h)).sum() + (last * seed(last)).sum()).backward()
    same([h, last, leaf.grad], wanted, 0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "recompute"), [("SRU", False), ("QRNN", "x"), ("MinGRU", 3), ("RNN", "x")])
def test_autocast(name, recompute, dtype, compiled):
    """Parameters stay float32, and so do their gradients; the input is what came before."""
    module, (x, given) = made(name, recompute), call(7, 3)
    narrow = made(name, recompute).bfloat16()
    function = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        h, last = function(x, **given)
    assert last.dtype == torch.float32
    gradients = torch.autograd.grad(h.float().sum(), [x, *module.parameters()], allow_unused=True)
    assert [g.dtype for g in gradients if g is not None] == [dtype] + [torch.float32] * (
        sum(g is not None for g in gradients) - 1
    )
    wanted, _ = module(x.float(), **given)
    same(h.float(), wanted, 0.05)
    exact = torch.autograd.grad(wanted.sum(), [*module.parameters()], allow_unused=True)
    for got, near in zip(gradients[1:], exact):
        if near is not None:
            assert (got - near).norm() <= 0.03 * near.norm()
    assert narrow(x.bfloat16(), **given)[1].dtype == torch.float32


def test_inference_mode_and_training_after_it():
    module, (x, given) = made("SRU"), call(7, 3)
    with torch.inference_mode():
        h, last = module(x, **given)
        assert h.is_inference() and last.is_inference()
    wanted = results_and_gradients(module, x, module.parameters(), **given)
    same([h, last], wanted[:2], 0)


@pytest.mark.parametrize("recompute", [False, 3, "x"])
def test_deterministic_algorithms(recompute):
    """Where PyTorch fills new memory with NaN, none of it is seen."""
    module, (x, given) = made("SRU", recompute), call(7, 3)
    wanted = results_and_gradients(module, x, module.parameters(), **given)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        same(results_and_gradients(module, x, module.parameters(), **given), wanted, 0)
    finally:
        torch.use_deterministic_algorithms(False)


@TRANSFORMED
def test_second_derivatives_of_modules(name, recompute):
    module, parameters, x, given = double(name, recompute, num_layers=1)
    names = sorted(parameters)

    def function(x: Any, *values: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values)), (x,), given)

    leaves = [t.clone().requires_grad_() for t in (x[:3, :2], *(parameters[n] for n in names))]
    given["lengths"] = torch.tensor([3, 2])
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_threads(monkeypatch):
    """At once, from a state in which nothing has been planned."""
    monkeypatch.setattr(native, "_plans", {})
    module = made("QRNN", 3)
    calls = [call(5 + i % 3, 2 + i % 2) for i in range(8)]
    wanted = [results_and_gradients(module, x, module.parameters(), **given) for x, given in calls]
    native._plans.clear()
    found: dict[int, list[Any]] = {}
    together = threading.Barrier(len(calls))

    def work(i: int) -> None:
        together.wait()
        for _ in range(5):
            x, given = calls[i]
            found[i] = results_and_gradients(module, x, module.parameters(), **given)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in enumerate(wanted):
        same(found[i], value, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Memory

POLICIES = [False, 5, True, "x"]


@pytest.mark.parametrize("recompute", POLICIES)
def test_what_is_kept_for_the_backward(recompute):
    """U (k numbers per step and channel) and as many states as the policy says, and no copies of what was given."""
    L, B, k, number = 100, 3, 2, 4
    module = made("MinGRU", recompute, num_layers=1)
    x, _ = call(L, B)
    given = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Any) -> Any:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h, _ = module(x.requires_grad_())
    states = math.ceil(L / {False: 1, True: 32, "x": 32}.get(recompute, recompute))
    rows = states + (0 if recompute == "x" else k * L)
    assert sum(kept.values()) == rows * B * D * SIZE * number
    assert h.requires_grad


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("recompute", POLICIES)
def test_what_was_kept_dies_with_the_graph(recompute, traced):
    """At once, not when cycles of references are looked for."""
    module, (x, given) = made("SRU", recompute), call(7, 3)
    function = torch.compile(module, fullgraph=True, backend="aot_eager") if traced else module
    if traced:
        function(x, **given)
    kept = []

    def pack(t: Any) -> Any:
        kept.append(weakref.ref(t))
        return t

    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                h, last = function(x, **given)
            if backward:
                (h.sum() + last.sum()).backward()
            del h, last
        alive = [ref() for ref in kept]
        parameters = {id(p) for p in module.parameters()} | {id(x), *map(id, given.values())}
        assert len(kept) > 8
        assert not [t.shape for t in alive if t is not None and id(t) not in parameters]
    finally:
        gc.enable()


@pytest.mark.parametrize(("name", "recompute"), [("SRU", False), ("MinGRU", "x")])
def test_training_does_not_gather_memory(name, recompute, monkeypatch):
    monkeypatch.setattr(native, "_plans", {})
    module, (x, given) = made(name, recompute), call(7, 3)

    def used_after(steps: int) -> tuple[int, int, int]:
        """Tensors and plans that are there, and bytes of objects of Python."""
        for _ in range(steps):
            step(module, x, given)
        gc.collect()
        tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
        return tensors, len(native._plans), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = used_after(50), used_after(200)
        assert after[0] <= before[0] and after[1] == before[1]
        assert after[2] < before[2] + 500 * 200  # lists that Python keeps for new objects grow a little
    finally:
        tracemalloc.stop()


# ----------------------------------------------------------------------------------------------------------------------
# What only a GPU has


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "recompute"), [("SRU", False), ("QRNN", 3), ("MinGRU", "x")])
def test_cuda_graph(name, recompute):
    """Forward and backward are captured, and replayed on other values."""
    needs_gpu()
    module, (x, given) = made(name, recompute).cuda(), call(40, 3)
    x, given = x.cuda().requires_grad_(), {n: value.cuda() for n, value in given.items()}
    parameters = [x, *module.parameters()]

    def work() -> list[Any]:
        h, last = module(x, **given)
        return [h, last, *torch.autograd.grad(h.square().sum() + last.square().sum(), parameters)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        x.copy_(x.flip(0) * 0.7)
        for p in module.parameters():
            p *= 0.9
    graph.replay()
    same(captured, work())


@pytest.mark.gpu
@pytest.mark.parametrize("time_parallel", [False, True])
def test_streams(time_parallel):
    """Work is put on the current stream, behind what is there, and the other streams go on."""
    needs_gpu()
    module = made("MinGRU", 3, time_parallel=time_parallel).cuda()
    x, _ = call(300, 3)
    wanted = [r.clone() for r in results_and_gradients(module, x.cuda(), module.parameters())]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(x.shape, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(x.cuda(), non_blocking=True)
        got = results_and_gradients(module, late, module.parameters())
    stream.synchronize()
    same(got, wanted, 0)


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
