"""Train a character language model of recurrent layers with NumPy and sru_rt; on a GPU with CuPy, if it is there.

    python char_lm.py                         two minutes, on the source of Python's standard library
    python char_lm.py --cell mingru           the same with another recurrence: sru, qrnn, mingru or minlstm
    python char_lm.py --text novel.txt        the same on a text of yours
    python char_lm.py --resume char_lm.npz    go on with the weights of an earlier run
    python char_lm.py --sample 1000           no training: let the weights in char_lm.npz write

A character is one byte of the file: any text in any language will do, and no character is unknown to the
model. The model is an embedding, recurrent layers with skips and a softmax over the 256 bytes. The last
tenth of the text is kept for validation. Training is truncated back-propagation through time: the text runs
as --batch parallel streams, and each piece of --length characters starts from the state that the piece
before it left; only what a QRNN's window sees before the piece is zeros. With --steps the same seed gives the
same weights again; --minutes depends on the machine.
The code is written over `xp`, which is NumPy or CuPy, and a training step never waits for the GPU.

Letters: L time steps, B sequences, d hidden size. Time comes first: tokens (L, B), hidden states (L, B, d).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from _char_lm_cli import make_parser
from _cli import Progress, check_writable
from _device import choose
from _text import gzip_bits, split_text, unigram_bits

import sru_rt

xp = np  # the library of the model's arrays, set once; only to_device and to_host move arrays between it and NumPy
VOCAB = 256
MODEL_DEFAULTS = {"cell": "sru", "layers": 4, "d": 128, "embed": 64, "dtype": "float32"}


class Cell(NamedTuple):
    """What the model needs to know of a recurrence."""

    init: Callable
    forward: Callable
    backward: Callable
    step: Callable
    options: dict  # of init
    trained: tuple = ("weight", "bias")  # the arrays in the dict of init; the rest of it are options
    state: str = "c"  # what step calls the state; forward calls it c0
    residual: bool = False  # whether the model adds a layer's input to its output, as the cell has no skip


# SRU's bias lets every layer begin near its skip, so that gradients reach the lowest one. A forget bias of 1 made
# minGRU and minLSTM learn more slowly here.
CELLS = {
    "sru": Cell(
        sru_rt.sru_init, sru_rt.sru_forward, sru_rt.sru_backward, sru_rt.sru_step,
        {"highway_bias": -2.0}, trained=("weight", "bias", "v"),
    ),
    "qrnn": Cell(
        sru_rt.qrnn_init, sru_rt.qrnn_forward, sru_rt.qrnn_backward, sru_rt.qrnn_step,
        {"pooling": "fo", "window": 2, "highway": True},
    ),
    "mingru": Cell(
        sru_rt.mingru_init, sru_rt.mingru_forward, sru_rt.mingru_backward, sru_rt.mingru_step,
        {}, state="h", residual=True,
    ),
    "minlstm": Cell(
        sru_rt.minlstm_init, sru_rt.minlstm_forward, sru_rt.minlstm_backward, sru_rt.minlstm_step,
        {}, state="h", residual=True,
    ),
}  # fmt: skip


def to_device(array):
    return xp.asarray(array)


def to_host(array) -> np.ndarray:
    return np.asarray(array) if xp is np else xp.asnumpy(array)


class Model:
    """Embedding, recurrent layers, softmax. `params` names every trained array; `layers` holds the same arrays."""

    def __init__(self, hyper: dict, seed: int):
        self.hyper, self.cell, rng = hyper, CELLS[hyper["cell"]], np.random.default_rng(seed)
        d, embed, dtype = hyper["d"], hyper["embed"], hyper["dtype"]
        self.sizes = [embed] + [d] * (hyper["layers"] - 1)  # of the layers' inputs
        like = xp.empty(0, dtype)
        self.layers = [
            self.cell.init(size, d, **self.cell.options, dtype=dtype, rng=rng, like=like) for size in self.sizes
        ]
        self.params = {
            "embed": to_device(rng.standard_normal((VOCAB, embed)).astype(dtype)),
            "out_weight": to_device((rng.standard_normal((d, VOCAB)) / math.sqrt(d)).astype(dtype)),
            "out_bias": xp.zeros(VOCAB, dtype),
        }
        self.params |= {f"{i}.{name}": layer[name] for i, layer in enumerate(self.layers) for name in self.cell.trained}

    def zero_state(self, B: int) -> list:
        return [xp.zeros((1, B, self.hyper["d"]), self.hyper["dtype"]) for _ in self.layers]

    def skips(self, i: int) -> bool:
        """Whether layer i's input is added to its output; the first layer's has another size."""
        return self.cell.residual and self.sizes[i] == self.hyper["d"]

    def forward(self, tokens, state: list, masks=None, save=False):
        """Tokens (L, B) and one state per layer -> logits (L*B, 256), the new state, and what backward needs."""
        x, new_state, tape = self.params["embed"][tokens], [], []
        for i, (layer, c0) in enumerate(zip(self.layers, state)):
            h, c_last, *saved = self.cell.forward(x, **layer, **{f"{self.cell.state}0": c0}, save=save)
            h = h * masks[i] if masks else h
            x = x + h if self.skips(i) else h
            new_state.append(c_last)
            tape += saved
        x = x.reshape(-1, self.hyper["d"])
        return x @ self.params["out_weight"] + self.params["out_bias"], new_state, (tokens, x, tape, masks)

    def backward(self, dlogits, saved) -> dict:
        """The gradient for every array in `params`; the state that came in counts as a constant."""
        tokens, x, tape, masks = saved
        grads = {"out_weight": x.T @ dlogits, "out_bias": dlogits.sum(0)}
        dx = (dlogits @ self.params["out_weight"].T).reshape(*tokens.shape, -1)
        for i in reversed(range(len(self.layers))):
            layer_grads = self.cell.backward(tape[i], dx * masks[i] if masks else dx)
            grads |= {f"{i}.{name}": getattr(layer_grads, name) for name in self.cell.trained}
            dx = dx + layer_grads.x if self.skips(i) else layer_grads.x
        # A product with the one-hot tokens adds up the rows of equal tokens, always in the same order.
        one_hot = xp.eye(VOCAB, dtype=dx.dtype)[tokens.reshape(-1)]
        grads["embed"] = one_hot.T @ dx.reshape(len(one_hot), -1)
        return grads

    def first_state(self) -> list:
        """What `step` begins with: for each layer the state, and the inputs that its window sees beside the newest."""
        dtype = self.hyper["dtype"]
        return [
            (c, xp.zeros((layer.get("window", 1) - 1, 1, size), dtype))
            for c, layer, size in zip(self.zero_state(1), self.layers, self.sizes)
        ]

    def step(self, token: int, state: list):
        """One character and the state -> logits (256,) for the character after it, and the new state."""
        x, new_state = self.params["embed"][token : token + 1], []
        for i, (layer, (c, before)) in enumerate(zip(self.layers, state)):
            seen = xp.concatenate([before, x[None]])
            h, c = self.cell.step(seen if len(seen) > 1 else x, **layer, **{self.cell.state: c})
            x = x + h if self.skips(i) else h
            new_state.append((c, seen[1:]))
        return (x @ self.params["out_weight"] + self.params["out_bias"])[0], new_state


def cross_entropy(logits, targets):
    """The mean of -log2 p(target) in bits, and its gradient with respect to the logits (N, 256)."""
    N, rows = len(targets), xp.arange(len(targets))
    logits = logits - logits.max(1, keepdims=True)
    p = xp.exp(logits)
    total = p.sum(1, keepdims=True)
    bits = (xp.log(total[:, 0]) - logits[rows, targets]).mean() / math.log(2)
    p /= total
    p[rows, targets] -= 1
    p /= N * math.log(2)
    return bits, p


class Adam:
    """Adam over a dict of arrays; a gradient whose norm exceeds `clip` is scaled down to it."""

    def __init__(self, params: dict, beta1=0.9, beta2=0.99, clip=1.0):
        self.params, self.beta1, self.beta2, self.clip, self.steps = params, beta1, beta2, clip, 0
        self.mean = {name: xp.zeros_like(p) for name, p in params.items()}
        self.square = {name: xp.zeros_like(p) for name, p in params.items()}

    def update(self, grads: dict, lr: float):
        self.steps += 1
        norm = xp.sqrt(sum((g * g).sum() for g in grads.values()))
        scale = xp.minimum(1.0, self.clip / (norm + 1e-12))
        lr *= math.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for name, p in self.params.items():
            g, mean, square = grads[name] * scale, self.mean[name], self.square[name]
            mean += (1 - self.beta1) * (g - mean)
            square += (1 - self.beta2) * (g * g - square)
            p -= lr * mean / (xp.sqrt(square) + 1e-8)


def streams(text: bytes, B: int):
    """The text as B parallel streams: bytes (n, B), column b is the b-th of B equal parts of the text."""
    n = len(text) // B
    return to_device(np.frombuffer(text, np.uint8)[: n * B].reshape(B, n).T.copy())


def evaluate(model: Model, text: bytes, limit: int | None = None, length: int = 128) -> float:
    """Bits per character of a text as up to 32 streams, or of the first `limit` characters of each stream."""
    data = streams(text, B=max(1, min(32, len(text) // 256)))[:limit]
    state, total = model.zero_state(data.shape[1]), 0.0
    for start in range(0, len(data) - 1, length):
        targets = data[start + 1 : start + 1 + length]
        logits, state, _ = model.forward(data[start : start + len(targets)], state)
        total += cross_entropy(logits, targets.reshape(-1))[0] * len(targets)
    return float(total) / (len(data) - 1)


def sample(model: Model, prompt: bytes, N: int, temperature: float, seed: int) -> str:
    """The prompt and N characters after it, each drawn from the model's distribution and fed back in."""
    rng, state, text = np.random.default_rng(seed), model.first_state(), bytearray(prompt)
    for i in range(len(prompt) + N - 1):
        logits, state = model.step(text[i], state)
        if i + 1 == len(text):
            logits = to_host(logits).astype(np.float64) / temperature
            p = np.exp(logits - logits.max())
            text.append(rng.choice(VOCAB, p=p / p.sum()))
    return text.decode("utf-8", errors="replace")


def save(path: str, model: Model, adam: Adam):
    """Weights, Adam's state and hyper-parameters; whatever happens in here, an old file stays whole."""
    arrays = {"hyper": json.dumps(model.hyper), "adam_steps": adam.steps}
    for kind, named in ("param", adam.params), ("mean", adam.mean), ("square", adam.square):
        arrays |= {f"{kind}.{name}": to_host(array) for name, array in named.items()}
    with open(path + ".tmp", "wb") as file:
        np.savez(file, **arrays)
    os.replace(path + ".tmp", path)


def load(path: str) -> tuple[Model, Adam]:
    """What `save` wrote; OSError, ValueError or KeyError if that is not what is there."""
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        raise ValueError(path)
    with np.load(path) as file:
        model = Model(json.loads(str(file["hyper"])), seed=0)
        adam = Adam(model.params)
        adam.steps = int(file["adam_steps"])
        for kind, named in ("param", adam.params), ("mean", adam.mean), ("square", adam.square):
            for name, array in named.items():
                array[...] = to_device(file[f"{kind}.{name}"])
    return model, adam


def learning_rate(fraction: float, peak: float) -> float:
    """Up in the first 2 % of the run, then down along a cosine to 2 % of the peak."""
    return peak * min(1, 0.02 + fraction / 0.02) * (0.02 + 0.98 * (1 + math.cos(math.pi * fraction)) / 2)


def dropout_masks(rng, model: Model, rate: float, B: int) -> list | None:
    """One mask (B, d) per layer, the same for all time steps of a piece."""
    if not rate:
        return None
    kept = [rng.random((B, model.hyper["d"])) >= rate for _ in model.layers]
    return [to_device((mask / (1 - rate)).astype(model.hyper["dtype"])) for mask in kept]


def train(model: Model, adam: Adam, data, args: argparse.Namespace, validation):
    """Train until --steps or --minutes are used up; `data` is the training part as streams (n, B)."""
    rng, progress = np.random.default_rng(args.seed), Progress()
    step, bits, position, state = 0, 0.0, len(data), None
    start, next_note = time.perf_counter(), 0.2
    while True:
        elapsed = time.perf_counter() - start
        fraction = min(1.0, max(step / (args.steps or math.inf), elapsed / 60 / (args.minutes or math.inf)))
        if step and (fraction == 1.0 or progress.due(fraction)):
            left, speed = round(elapsed / fraction - elapsed), step * args.batch * args.length / elapsed
            text = f"step {step:,}  {float(bits):.3f} bits/char  {speed:,.0f} chars/s"
            progress.show(fraction, f"{text}  {left // 60}:{left % 60:02} left")
            if not math.isfinite(bits):
                raise FloatingPointError("the loss is not finite")
        if fraction == 1.0:
            return
        if fraction >= next_note:
            progress.note(validation())
            next_note += 0.2
        if position + args.length >= len(data):  # the streams are at their end, or before their beginning
            position, state = 0, model.zero_state(args.batch)
        tokens, targets = (data[position + i : position + i + args.length] for i in (0, 1))
        # Now and then a stream forgets its state: the model learns to begin from nothing, as a sample does.
        kept = to_device((rng.random((1, args.batch, 1)) >= 0.02).astype(model.hyper["dtype"]))
        state = [c * kept for c in state]
        masks = dropout_masks(rng, model, args.dropout, args.batch)
        logits, state, saved = model.forward(tokens, state, masks, save=True)
        loss, dlogits = cross_entropy(logits, targets.reshape(-1))
        adam.update(model.backward(dlogits, saved), learning_rate(fraction, args.lr))
        step, position = step + 1, position + args.length
        bits += (loss - bits) * max(1 / step, 0.02)  # a running mean over about the last fifty steps


def make_model(args: argparse.Namespace, path: str | None, fail) -> tuple[Model, Adam]:
    """The model in the weights file `path`, or a new one."""
    given = {name: getattr(args, name) for name in MODEL_DEFAULTS if getattr(args, name) is not None}
    if path is None:
        model = Model(MODEL_DEFAULTS | given, args.seed)
        return model, Adam(model.params)
    option = "--resume" if args.resume else "--sample"
    try:
        model, adam = load(path)
    except OSError as error:
        fail(f"argument {option}: cannot read weights from {path}: {error.strerror}")
    except (ValueError, KeyError):
        fail(f"argument {option}: {path} is no weights file of this program")
    for name, value in given.items():
        if value != model.hyper[name]:
            fail(f"argument --{name}: is {value}, but the weights in {path} have {model.hyper[name]}")
    return model, adam


def run(args: argparse.Namespace, fail) -> int:
    """`fail` takes a message and does not return."""
    global xp
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if not prompt:
        fail("argument --prompt: needs at least one character")
    xp, where = choose(args.device, fail)
    out = args.out or args.resume or "char_lm.npz"
    model, adam = make_model(args, args.resume or (out if args.sample else None), fail)
    if args.sample:
        print(sample(model, prompt, args.sample, args.temperature, args.seed))
        return 0
    args.minutes = args.minutes or (None if args.steps else 1.7)
    learn, valid = split_text(args, fail)
    try:
        check_writable(out)
    except OSError as error:
        fail(f"argument --out: cannot write {out}: {error.strerror}")
    yardsticks = f"unigram {unigram_bits(learn, valid):.3f}, gzip {gzip_bits(learn, valid):.3f}"

    def validation(limit: int | None = 1000) -> str:
        part = "" if limit is None else "on a part of the text, "
        return f"validation {part}{evaluate(model, valid, limit):.3f} bits per character ({yardsticks})"

    size, hyper = sum(p.size for p in model.params.values()), model.hyper
    print(
        f"text: {len(learn):,} characters to learn from, {len(valid):,} after them for validation\n"
        "unigram: each character coded by its frequency in the training part\n"
        "gzip: level 9, the packed size of the whole text less that of the training part\n"
        f"model: {hyper['layers']} {hyper['cell']} layers, d = {hyper['d']}, {size:,} parameters, {hyper['dtype']}\n"
        f"device: {where}\n"
        f"before training: {validation()}",
        flush=True,
    )
    stopped = False
    try:
        train(model, adam, streams(learn, args.batch), args, validation)
    except KeyboardInterrupt:
        stopped = True
    except FloatingPointError as error:
        fail(f"argument --lr: training diverged at {args.lr} ({error}), no weights saved; try a lower one")
    save(out, model, adam)
    print(f"\nweights saved in {out}: --resume {out} goes on, --sample --resume {out} lets them write")
    if stopped:
        print("stopped by Ctrl-C")
        return 130
    print(f"{validation(None)}\nsample:")
    print(sample(model, prompt, 500, args.temperature, args.seed))
    return 0


def main() -> int:
    parser = make_parser(__doc__, MODEL_DEFAULTS, CELLS)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    try:
        return run(parser.parse_args(), parser.error)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C")
        return 130
    except MemoryError:
        parser.error("not enough memory: lower --d, --layers, --batch or --length")


if __name__ == "__main__":
    sys.exit(main())
