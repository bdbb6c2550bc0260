"""Train a character language model of recurrent layers in PyTorch.

    python torch_char_lm.py                         two minutes, on the source of Python's standard library
    python torch_char_lm.py --cell lstm             the same with another layer: sru, qrnn, mingru, minlstm or lstm
    python torch_char_lm.py --text novel.txt        the same on a text of yours
    python torch_char_lm.py --compile               through torch.compile, which takes a while before the first step

A character is one byte of the file. The model is an embedding, recurrent layers and a softmax over the 256
bytes; the last tenth of the text is kept for validation. Training is truncated back-propagation through time:
the text runs as --batch parallel streams, and each piece of --length characters starts from the state that the
piece before it left. The sample at the end is drawn one character at a time, by the layers' `step`.
With --steps the same seed gives the same model again; --minutes depends on the machine.

Letters: L time steps, B sequences, d hidden size. Time comes first: tokens (L, B), hidden states (L, B, d).
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch
from _cli import Parser, Progress, number
from _text import gzip_bits, split_text, unigram_bits
from _torch import CHOICES, HELP, THREADS_HELP, choose, describe, use_threads
from sru_rt.bindings.torch import QRNN, SRU, MinGRU, MinLSTM
from torch import nn
from torch.nn import functional as F

VOCAB = 256
# SRU's bias lets every layer begin near its skip, so that gradients reach the lowest one.
CELLS = {
    "sru": lambda n, d, layers: SRU(n, d, layers, rescale=True, highway_bias=-2),
    "qrnn": lambda n, d, layers: QRNN(n, d, layers, window=2, highway=True),
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "lstm": nn.LSTM,
}


def detached(state):
    """The same state, as a constant: back-propagation through time ends here."""
    if isinstance(state, torch.Tensor):
        return state.detach()
    parts = map(detached, state)
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


class Model(nn.Module):
    """Embedding, recurrent layers, linear. A state is whatever the layers take and return as theirs."""

    def __init__(self, cell: str, layers: int, d: int, embed: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, embed)
        self.layers = CELLS[cell](embed, d, layers)
        self.out = nn.Linear(d, VOCAB)

    def forward(self, tokens, state):
        """Tokens (L, B) -> logits (L, B, 256) for the tokens after them, and the state after the last."""
        h, state = self.layers(self.embedding(tokens), state)
        return self.out(h), state

    def first_state(self, B: int):
        """What a text begins with: zeros, and with them the tokens that a QRNN's window sees before the first one."""
        return self.layers.initial_step_state(B) if hasattr(self.layers, "initial_step_state") else None

    def step(self, tokens, state):
        """One token of each sequence (B,) -> logits (B, 256) and the state."""
        if isinstance(self.layers, nn.LSTM):  # which has no step
            logits, state = self(tokens[None], state)
            return logits[0], state
        h, state = self.layers.step(self.embedding(tokens), state)
        return self.out(h), state


def streams(text: bytes, B: int, device: torch.device) -> torch.Tensor:
    """The text as B parallel streams: bytes (n, B), column b is the b-th of B equal parts of the text."""
    n = len(text) // B
    return torch.frombuffer(bytearray(text[: n * B]), dtype=torch.uint8).view(B, n).t().contiguous().to(device).long()


def bits(logits, targets) -> torch.Tensor:
    """The mean of -log2 p(target)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: nn.Module, text: bytes, device: torch.device, limit: int | None = None) -> float:
    """Bits per character of a text as up to 32 streams, or of the first `limit` characters of each stream."""
    data = streams(text, max(1, min(32, len(text) // 256)), device)[:limit]
    state, total = model.first_state(data.shape[1]), 0.0
    for start in range(0, len(data) - 1, 128):
        targets = data[start + 1 : start + 129]
        logits, state = model(data[start : start + len(targets)], state)
        total += float(bits(logits, targets)) * len(targets)
    return total / (len(data) - 1)


@torch.no_grad()
def sample(model: Model, prompt: bytes, N: int, temperature: float, device: torch.device) -> str:
    """The prompt and N characters after it, each drawn from the model's distribution and fed back in."""
    state, text = model.first_state(1), bytearray(prompt)
    for i in range(len(prompt) + N - 1):
        logits, state = model.step(torch.tensor([text[i]], device=device), state)
        if i + 1 == len(text):
            text.append(int(torch.multinomial(F.softmax(logits[0] / temperature, -1), 1)))
    return text.decode("utf-8", errors="replace")


def learning_rate(fraction: float, peak: float) -> float:
    """Up in the first 2 % of the run, then down along a cosine to 2 % of the peak."""
    return peak * min(1, 0.02 + fraction / 0.02) * (0.02 + 0.98 * (1 + math.cos(math.pi * fraction)) / 2)


def train(model: Model, data: torch.Tensor, args: argparse.Namespace, validation):
    """Train until --steps or --minutes are used up; `data` is the training part as streams (n, B)."""
    forward = torch.compile(model) if args.compile else model
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    progress, step, mean, position, state = Progress(), 0, torch.zeros((), device=data.device), len(data), None
    start, next_note = time.perf_counter(), 0.2
    while True:
        elapsed = time.perf_counter() - start
        fraction = min(1.0, max(step / (args.steps or math.inf), elapsed / 60 / (args.minutes or math.inf)))
        if step and (fraction == 1.0 or progress.due(fraction)):
            left, speed = round(elapsed / fraction - elapsed), step * args.batch * args.length / elapsed
            text = f"step {step:,}  {float(mean):.3f} bits/char  {speed:,.0f} chars/s"
            progress.show(fraction, f"{text}  {left // 60}:{left % 60:02} left")
        if fraction == 1.0:
            return
        if fraction >= next_note:
            progress.note(validation())
            next_note += 0.2
        if position + args.length >= len(data):  # the streams are at their end, or before their beginning
            position, state = 0, model.first_state(args.batch)
        tokens, targets = (data[position + i : position + i + args.length] for i in (0, 1))
        logits, state = forward(tokens, state)
        state = detached(state)
        loss = bits(logits, targets)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = learning_rate(fraction, args.lr)
        adam.step()
        step, position = step + 1, position + args.length
        mean = mean + (loss.detach() - mean) * max(1 / step, 0.02)  # over about the last fifty steps


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, positive, default = number(int, 1), number(float, 0, above=True), "(default %(default)s)"
    add = parser.add_argument
    add("--text", metavar="FILE", help="what to learn (default: the source of Python's standard library)")
    add("--cell", choices=CELLS, default="sru", help=f"the recurrent layers {default}")
    add("--steps", type=count, metavar="N", help="train for N pieces of --length characters")
    add("--minutes", type=positive, help="train for so long (default 1.7, or no limit with --steps)")
    add("--layers", type=count, default=4, metavar="N", help=f"their number {default}")
    add("--d", type=count, default=128, metavar="N", help=f"hidden size {default}")
    add("--embed", type=count, default=64, metavar="N", help=f"size of the embedding {default}")
    add("--batch", type=count, default=32, metavar="N", help=f"parallel streams {default}")
    add("--length", type=count, default=64, metavar="N", help=f"characters of a piece {default}")
    add("--lr", type=positive, default=0.01, help=f"highest learning rate {default}")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--seed", type=number(int, 0), default=0, help=f"of weights and sample {default}")
    add("--sample", type=number(int, 0), default=500, metavar="N", help=f"characters to write at the end {default}")
    add("--prompt", default="\n", help="what the sample begins with (default: a new line)")
    add("--temperature", type=positive, default=0.8, help=f"of the sample; lower is safer {default}")
    add("--threads", type=count, metavar="N", help=THREADS_HELP)
    add("--device", choices=CHOICES, default="auto", help=HELP)
    return parser


def run(args: argparse.Namespace, fail) -> int:
    """`fail` takes a message and does not return."""
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if not prompt:
        fail("argument --prompt: needs at least one character")
    args.minutes = args.minutes or (None if args.steps else 1.7)
    use_threads(args.threads)
    device = choose(args.device, fail)
    learn, valid = split_text(args, fail)
    torch.manual_seed(args.seed)
    model = Model(args.cell, args.layers, args.d, args.embed).to(device)
    yardsticks = f"unigram {unigram_bits(learn, valid):.3f}, gzip {gzip_bits(learn, valid):.3f}"

    def validation(limit: int | None = 1000) -> str:
        part = "" if limit is None else "on a part of the text, "
        return f"validation {part}{evaluate(model, valid, device, limit):.3f} bits per character ({yardsticks})"

    print(
        f"text: {len(learn):,} characters to learn from, {len(valid):,} after them for validation\n"
        "unigram: each character coded by its frequency in the training part\n"
        "gzip: level 9, the packed size of the whole text less that of the training part\n"
        f"model: {args.layers} {args.cell} layers, d = {args.d}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters\ndevice: {describe(device)}\n"
        f"before training: {validation()}",
        flush=True,
    )
    stopped = False
    try:
        train(model, streams(learn, args.batch, device), args, validation)
    except KeyboardInterrupt:
        stopped = True
    print(validation(None))
    if args.sample:
        print(f"sample:\n{sample(model, prompt, args.sample, args.temperature, device)}")
    if stopped:
        print("stopped by Ctrl-C")
    return 130 if stopped else 0


def main() -> int:
    parser = make_parser()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    return run(parser.parse_args(), parser.error)


if __name__ == "__main__":
    sys.exit(main())
