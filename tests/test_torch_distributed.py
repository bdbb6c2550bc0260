"""Modules of the PyTorch binding in two processes: what they learn is what one process learns from the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)

_PROCESSES = 2


# What both processes do, and one alone. They run this file.


def model(name: str) -> Any:
    from sru_rt.bindings.torch import QRNN, SRU, MinGRU

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kinds = {"SRU": SRU, "QRNN": QRNN, "MinGRU": MinGRU}
            options = {"recompute": "x"} if name == "QRNN" else {}
            self.rnn = kinds[name](6, 4, 2, bidirectional=True, **options)
            self.head = torch.nn.Linear(8, 1)
            self.unused = torch.nn.Linear(1, 1)  # wants find_unused_parameters

        def forward(self, x: Any, lengths: Any) -> Any:
            h, _ = self.rnn(x, lengths=lengths)
            return self.head(h).tanh()

    torch.manual_seed(3)
    return Model().double()


def loss_of(module: Any, x: Any, lengths: Any) -> Any:
    """A mean over sequences, so that the mean over processes is that over the batch."""
    return module(x, lengths).square().sum((0, 2)).mean()


def batches() -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(7, 4, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 8, (4,), generator=generator),
        )
        for _ in range(2)
    ]


def train(module: Any, rows: slice) -> list[dict[str, Any]]:
    """Gradients of two steps, then the parameters."""
    optimizer = torch.optim.Adam([p for n, p in module.named_parameters() if "unused" not in n], lr=0.05)
    found = []
    for x, lengths in batches():
        optimizer.zero_grad()
        loss_of(module, x[:, rows], lengths[rows]).backward()
        found.append({n: whole(p.grad) for n, p in module.named_parameters() if p.grad is not None})
        optimizer.step()
    return [*found, {n: whole(p.detach()) for n, p in module.named_parameters()}]


def whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for got, expected in zip(found, wanted):
        got = {n.replace("module.", "").replace("_orig_mod.", ""): value for n, value in got.items()}
        assert got.keys() >= {n for n in expected if "unused" not in n}
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-13)


def alone(name: str) -> list[dict[str, Any]]:
    return train(model(name), slice(None))


def my_rows() -> slice:
    return slice(torch.distributed.get_rank(), None, _PROCESSES)


def replicated(name: str, compiled: bool = False, **options: Any) -> None:
    module = torch.nn.parallel.DistributedDataParallel(without_unused(model(name), options), **options)
    run = torch.compile(module, backend="aot_eager") if compiled else module
    same(train(run, my_rows()), alone(name))


def without_unused(module: Any, options: dict[str, Any]) -> Any:
    if not options:
        module.unused.requires_grad_(False)
    return module


def sharded(name: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = model(name)
    mesh = init_device_mesh("cpu", (_PROCESSES,))
    fully_shard(module.rnn, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def fully_sharded(name: str) -> None:
    same(train(sharded(name), my_rows()), alone(name))


def checkpointed(name: str, folder: str) -> None:
    """From shards to other shards and to one piece."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    trained = sharded(name)
    train(trained, my_rows())
    checkpoint.save({"model": get_model_state_dict(trained)}, checkpoint_id=folder)
    for other in (sharded(name), model(name)):
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        state = {"model": get_model_state_dict(other)}
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(other, state["model"])
        same([{n: whole(p.detach()) for n, p in other.named_parameters()}], alone(name)[-1:])


def main(folder: str, what: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(sys.argv[3]), world_size=_PROCESSES
    )
    try:
        WHAT[what](folder)
    finally:
        torch.distributed.destroy_process_group()


WHAT = {
    "DDP of SRU": lambda folder: replicated("SRU"),
    "DDP of QRNN with unused parameters": lambda folder: replicated("QRNN", find_unused_parameters=True),
    "DDP of MinGRU with a static graph": lambda folder: replicated("MinGRU", static_graph=True),
    "DDP of MinGRU, compiled": lambda folder: replicated("MinGRU", compiled=True),
    "FSDP of SRU": lambda folder: fully_sharded("SRU"),
    "FSDP of QRNN": lambda folder: fully_sharded("QRNN"),
    "checkpoint of MinGRU": lambda folder: checkpointed("MinGRU", f"{folder}/checkpoint"),
}


@pytest.mark.parametrize("what", WHAT)
def test_two_processes(what, tmp_path):
    """They meet at a file, so that tests that run beside this one do not matter."""
    command = [sys.executable, str(Path(__file__).resolve()), str(tmp_path), what]
    running = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * _PROCESSES, "\n".join(outputs)


if __name__ == "__main__":
    main(*sys.argv[1:3])
