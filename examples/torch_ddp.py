"""Data-parallel training of an SRU model in PyTorch, one process for each GPU, or several on a CPU.

    torchrun --nproc-per-node 2 examples/torch_ddp.py             with DistributedDataParallel
    torchrun --nproc-per-node 2 examples/torch_ddp.py --fsdp      with FSDP2: parameters lie in shards, too

A small character language model learns a file of Python's standard library; each rank has its own part of the
text and its own random order, and PyTorch averages the gradients. At the end every rank computes the loss of the
same text: with equal parameters these are equal to the last bit. The model and the optimiser are then saved
by torch.distributed.checkpoint, and loaded into a new model, which must give that loss again and go on training.
Nothing here is special to SRU: its layers are modules like any other.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from _cli import Parser, number
from sru_rt.bindings.torch import SRU
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

VOCAB = 256


class Model(nn.Module):
    """Embedding, SRU, linear: tokens (L, B) -> logits (L, B, 256) for the tokens after them."""

    def __init__(self, d: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, d)
        self.layers = SRU(d, d, num_layers=2, rescale=True)
        self.out = nn.Linear(d, VOCAB)

    def forward(self, tokens):
        h, _ = self.layers(self.embedding(tokens))
        return self.out(h)


def loss_of(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """The mean loss of predicting each character of text (L + 1, B) from those before it."""
    return F.cross_entropy(model(text[:-1]).flatten(0, 1), text[1:].flatten())


def distributed(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A new model, the same on every rank, and its optimiser."""
    torch.manual_seed(args.seed)
    model = Model(args.hidden).to(device)
    if args.fsdp:
        fully_shard(model.layers)  # gathered, used and freed by itself
        fully_shard(model)  # the rest
    else:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return model, torch.optim.Adam(model.parameters(), lr=args.lr)


def pieces(text: torch.Tensor, args: argparse.Namespace, seed: int):
    """Batches (length + 1, batch) of pieces from anywhere in the text, without end."""
    rng = torch.Generator().manual_seed(seed)
    steps = torch.arange(args.length + 1)[:, None]
    while True:
        yield text[torch.randint(len(text) - args.length, (args.batch,), generator=rng) + steps]


def train(model: nn.Module, adam: torch.optim.Optimizer, batches, steps: int) -> list[torch.Tensor]:
    """The loss of every step, averaged over the ranks."""
    losses = []
    for _ in range(steps):
        loss = loss_of(model, next(batches))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.detach())
        dist.all_reduce(losses[-1])  # the sum
    return [loss / dist.get_world_size() for loss in losses]


@torch.no_grad()
def agreed_loss(model: nn.Module, text: torch.Tensor) -> float:
    """The loss of a text on every rank, which must be one and the same."""
    loss = loss_of(model, text)
    everyone = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, loss)
    if len({float(other) for other in everyone}) > 1:
        raise RuntimeError(f"the ranks disagree: {everyone}")
    return float(loss)


def save(folder: str, model: nn.Module, adam: torch.optim.Optimizer):
    """Every rank writes its part; the names are those of the model itself, whoever wraps it."""
    weights, moments = get_state_dict(model, adam)
    checkpoint.save({"model": weights, "adam": moments}, checkpoint_id=folder)


def load(folder: str, model: nn.Module, adam: torch.optim.Optimizer):
    """What `save` wrote, on any number of ranks and in shards or not."""
    weights, moments = get_state_dict(model, adam)
    state = {"model": weights, "adam": moments}
    checkpoint.load(state, checkpoint_id=folder)  # into the tensors of the state
    set_state_dict(model, adam, model_state_dict=state["model"], optim_state_dict=state["adam"])


def run(args: argparse.Namespace, device: torch.device, folder: str):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_: None
    text = torch.tensor(list(Path(textwrap.__file__).read_bytes()), device=device)
    learn, valid = text[: -args.length - 1], text[-args.length - 1 :, None]
    batches = pieces(learn.chunk(ranks)[rank], args, seed=args.seed + rank)

    model, adam = distributed(args, device)
    how = "FSDP2" if args.fsdp else "DistributedDataParallel"
    say(f"{how}, {ranks} ranks on {device.type} over {dist.get_backend()}; rank 0 holds {held(model):,} parameters")
    before = agreed_loss(model, valid)
    losses = train(model, adam, batches, args.steps)
    after = agreed_loss(model, valid)
    say(f"training loss {losses[0]:.3f}, after {args.steps} steps {losses[-1]:.3f}")
    say(f"validation loss {before:.3f}, then {after:.3f}, on all ranks the same")

    save(folder, model, adam)
    model, adam = distributed(args, device)
    load(folder, model, adam)
    again = agreed_loss(model, valid)
    if again != after:
        raise RuntimeError(f"the loaded model has loss {again}, the saved one {after}")
    losses = train(model, adam, batches, 5)
    where = f" in {args.checkpoint}" if args.checkpoint else ""
    say(f"saved{where} and loaded: validation loss {again:.3f}; five steps on: training loss {losses[-1]:.3f}")


def held(model: nn.Module) -> int:
    """How many parameters lie on this rank: all of them, or its shards."""
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, default = number(int, 1), "(default %(default)s)"
    add = parser.add_argument
    add("--fsdp", action="store_true", help="FSDP2 in the place of DistributedDataParallel")
    add("--steps", type=count, default=100, metavar="N", help=f"training steps {default}")
    add("--hidden", type=count, default=128, metavar="N", help=f"hidden size {default}")
    add("--batch", type=count, default=16, metavar="N", help=f"sequences of a batch on each rank {default}")
    add("--length", type=number(int, 1, 2000), default=64, metavar="N", help=f"characters of a sequence {default}")
    add("--lr", type=number(float, 0, above=True), default=0.005, help=f"Adam's learning rate {default}")
    add("--seed", type=number(int, 0), default=0, help=f"of weights and data {default}")
    add("--checkpoint", metavar="FOLDER", help="where the checkpoint goes and stays (default: a temporary folder)")
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("is started by torchrun: torchrun --nproc-per-node 2 examples/torch_ddp.py")
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = [args.checkpoint or temporary]
            dist.broadcast_object_list(folder)  # that of rank 0
            run(args, device, folder[0])
            dist.barrier()  # no rank removes its folder while others read it
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
