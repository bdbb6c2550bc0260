"""Train a character language model of stacked SRU layers with NumPy and sru_rt, and no other package.

    python char_lm.py                                   two minutes, on the source of Python's standard library
    python char_lm.py --text novel.txt                  the same on a text of yours
    python char_lm.py --resume char_lm.npz --minutes 10
    python char_lm.py --sample 1000 --prompt "class "   write some text with the weights in char_lm.npz

A character is one byte of the file: any text in any language will do, and none holds a character that is unknown
to the model. The model is an embedding, SRU layers with highway skips, and a softmax over the 256 bytes. The last
tenth of the text is kept for validation. Training is truncated back-propagation through time: the text runs as
--batch parallel streams, and each piece of --length characters starts from the state that the piece before it left.

Letters: L time steps, B sequences, d hidden size. Time comes first: tokens (L, B), hidden states (L, B, d).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import sys
import sysconfig
import time
import zipfile

import numpy as np

import sru_rt

xp = np  # the library that holds the model's arrays; only to_device and to_host move arrays between it and NumPy
VOCAB = 256
TRAINED = ("weight", "bias", "v")  # the arrays in the dict of sru_init; the rest of it are options
MODEL_DEFAULTS = {"layers": 4, "d": 128, "embed": 64, "dtype": "float32"}
TEXT_CAP = 4_000_000  # characters of the default text
NO_TEXT = {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def to_device(array):
    return xp.asarray(array)


def to_host(array) -> np.ndarray:
    return np.asarray(array)


class Model:
    """Embedding, SRU layers, softmax. `params` names every trained array; `layers` holds the same arrays."""

    def __init__(self, hyper: dict, seed: int):
        self.hyper, rng = hyper, np.random.default_rng(seed)
        d, embed, dtype = hyper["d"], hyper["embed"], hyper["dtype"]
        # A negative reset bias lets every layer begin near its skip, so that gradients reach the lowest layer.
        self.layers = [
            sru_rt.sru_init(d if i else embed, d, highway_bias=-2.0, dtype=dtype, rng=rng)
            for i in range(hyper["layers"])
        ]
        self.params = {
            "embed": to_device(rng.standard_normal((VOCAB, embed)).astype(dtype)),
            "out_weight": to_device((rng.standard_normal((d, VOCAB)) / math.sqrt(d)).astype(dtype)),
            "out_bias": xp.zeros(VOCAB, dtype),
        }
        self.params |= {f"{i}.{name}": layer[name] for i, layer in enumerate(self.layers) for name in TRAINED}

    def zero_state(self, B: int) -> list:
        return [xp.zeros((1, B, self.hyper["d"]), self.hyper["dtype"]) for _ in self.layers]

    def forward(self, tokens, state: list, masks=None, save=False):
        """Tokens (L, B) and one c0 per layer -> logits (L*B, 256), the new state, and what backward needs."""
        h, new_state, tape = self.params["embed"][tokens], [], []
        for i, (layer, c0) in enumerate(zip(self.layers, state)):
            mask = masks[i] if masks else None
            h, c_last, *saved = sru_rt.sru_forward(h, **layer, c0=c0, dropout_mask=mask, save=save)
            new_state.append(c_last)
            tape += saved
        h = h.reshape(-1, self.hyper["d"])
        return h @ self.params["out_weight"] + self.params["out_bias"], new_state, (tokens, h, tape)

    def backward(self, dlogits, saved) -> dict:
        """The gradient for every array in `params`; the state that came in counts as a constant."""
        tokens, h, tape = saved
        grads = {"out_weight": h.T @ dlogits, "out_bias": dlogits.sum(0)}
        dh = (dlogits @ self.params["out_weight"].T).reshape(*tokens.shape, -1)
        for i in reversed(range(len(self.layers))):
            layer_grads = sru_rt.sru_backward(tape[i], dh)
            grads |= {f"{i}.{name}": getattr(layer_grads, name) for name in TRAINED}
            dh = layer_grads.x
        # A product with the one-hot tokens adds up the rows of equal tokens, always in the same order.
        one_hot = xp.eye(VOCAB, dtype=dh.dtype)[tokens.reshape(-1)]
        grads["embed"] = one_hot.T @ dh.reshape(len(one_hot), -1)
        return grads

    def step(self, token: int, state: list):
        """One character and the state -> logits (256,) for the character after it, and the new state."""
        h, new_state = self.params["embed"][token : token + 1], []
        for layer, c in zip(self.layers, state):
            h, c = sru_rt.sru_step(h, **layer, c=c)
            new_state.append(c)
        return (h @ self.params["out_weight"] + self.params["out_bias"])[0], new_state


def cross_entropy(logits, targets):
    """The mean of -log2 p(target) over the rows, in bits, and its gradient with respect to logits (N, 256)."""
    rows, N = xp.arange(len(targets)), len(targets)
    logits = logits - logits.max(1, keepdims=True)
    p = xp.exp(logits)
    total = p.sum(1, keepdims=True)
    bits = (xp.log(total[:, 0]) - logits[rows, targets]).mean() / math.log(2)
    p /= total
    p[rows, targets] -= 1
    return bits, p / (N * math.log(2))


class Adam:
    """Adam over a dict of arrays; a gradient whose norm exceeds `clip` is scaled down to it."""

    def __init__(self, params: dict, beta1=0.9, beta2=0.99, clip=1.0):
        self.params, self.beta1, self.beta2, self.clip, self.steps = params, beta1, beta2, clip, 0
        self.mean = {name: xp.zeros_like(p) for name, p in params.items()}
        self.square = {name: xp.zeros_like(p) for name, p in params.items()}

    def update(self, grads: dict, lr: float):
        self.steps += 1
        norm = xp.sqrt(sum((g * g).sum() for g in grads.values()))
        scale = xp.minimum(1.0, self.clip / (norm + 1e-12)).astype(self.params["embed"].dtype)
        lr *= math.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for name, p in self.params.items():
            g, mean, square = grads[name] * scale, self.mean[name], self.square[name]
            mean += (1 - self.beta1) * (g - mean)
            square += (1 - self.beta2) * (g * g - square)
            p -= lr * mean / (xp.sqrt(square) + 1e-8)


class Progress:
    """On a terminal one line that rewrites itself, elsewhere a plain line every five percent."""

    def __init__(self):
        self.terminal, self.next = sys.stdout.isatty(), 0.0

    def due(self, fraction: float) -> bool:
        return time.perf_counter() >= self.next if self.terminal else fraction >= self.next

    def show(self, fraction: float, text: str):
        text = f"{fraction:4.0%}  {text}"
        if self.terminal:
            text = f"[{'#' * int(20 * fraction):-<20}] {text}"
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", flush=True)
            self.next = time.perf_counter() + 0.2
        else:
            print(text, flush=True)
            self.next = fraction + 0.05

    def note(self, text: str):
        """A line of its own, which stays."""
        if self.terminal:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r")
        print(text, flush=True)


def standard_library() -> bytes:
    """The source of Python's standard library, file after file in a fixed order, up to TEXT_CAP bytes."""
    parts, size = [], 0
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - NO_TEXT)
        for name in sorted(name for name in files if name.endswith(".py")):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    parts.append(file.read().encode())
            except (OSError, UnicodeDecodeError):
                continue
            size += len(parts[-1])
            if size >= TEXT_CAP:
                return b"".join(parts)[:TEXT_CAP]
    return b"".join(parts)


def streams(text: bytes, B: int):
    """The text as B parallel streams: bytes (n, B) whose column b is the b-th of B equal parts of the text."""
    n = len(text) // B
    return to_device(np.frombuffer(text, np.uint8)[: n * B].reshape(B, n).T.copy())


def unigram_bits(train: bytes, valid: bytes) -> float:
    """Bits per character of a model that knows how often each byte occurs in the training part, and no more."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=VOCAB) + 1.0
    return float(-np.log2(counts / counts.sum())[np.frombuffer(valid, np.uint8)].mean())


def gzip_bits(train: bytes, valid: bytes) -> float:
    return 8 * (len(gzip.compress(train + valid, 9)) - len(gzip.compress(train, 9))) / len(valid)


def evaluate(model: Model, text: bytes, length: int = 128) -> float:
    """Bits per character over the text, which is cut into up to 32 streams of 256 characters or more."""
    data = streams(text, B=max(1, min(32, len(text) // 256)))
    state, total = model.zero_state(data.shape[1]), 0.0
    for start in range(0, len(data) - 1, length):
        targets = data[start + 1 : start + 1 + length]
        logits, state, _ = model.forward(data[start : start + len(targets)], state)
        total += cross_entropy(logits, targets.reshape(-1))[0] * len(targets)
    return float(total) / (len(data) - 1)


def sample(model: Model, prompt: bytes, N: int, temperature: float, seed: int) -> str:
    """The prompt and N characters after it, each drawn from the model's distribution and fed back in."""
    rng, state, text = np.random.default_rng(seed), model.zero_state(1), bytearray(prompt)
    for i in range(len(prompt) + N - 1):
        logits, state = model.step(text[i], state)
        if i + 1 == len(text):
            logits = to_host(logits).astype(np.float64) / temperature
            p = np.exp(logits - logits.max())
            text.append(rng.choice(VOCAB, p=p / p.sum()))
    return text.decode("utf-8", errors="replace")


def save(path: str, model: Model, adam: Adam):
    """Weights, Adam's state and hyper-parameters; a run that dies in here leaves the old file whole."""
    arrays = {"hyper": json.dumps(model.hyper), "adam_steps": adam.steps}
    for kind, named in ("param", adam.params), ("mean", adam.mean), ("square", adam.square):
        arrays |= {f"{kind}.{name}": to_host(array) for name, array in named.items()}
    with open(path + ".tmp", "wb") as file:
        np.savez(file, **arrays)
    os.replace(path + ".tmp", path)


def load(path: str) -> tuple[Model, Adam]:
    """What `save` wrote; OSError, ValueError or KeyError if the file is something else."""
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
    """One mask (B, 1, d) per layer, the same for all time steps of a piece."""
    if not rate:
        return None
    kept = [rng.random((B, 1, model.hyper["d"])) >= rate for _ in model.layers]
    return [to_device((mask / (1 - rate)).astype(model.hyper["dtype"])) for mask in kept]


def train(model: Model, adam: Adam, data, args, validate):
    """Train until --steps or --minutes are used up; `data` is the training part as streams (n, B)."""
    rng, progress = np.random.default_rng(args.seed), Progress()
    step, bits, position, state = 0, 0.0, len(data), None
    start, next_note = time.perf_counter(), 0.2
    while True:
        elapsed = time.perf_counter() - start
        fraction = min(1.0, max(step / (args.steps or math.inf), elapsed / 60 / (args.minutes or math.inf)))
        if fraction == 1.0 or (step and progress.due(fraction)):
            left, speed = elapsed / fraction - elapsed, step * args.batch * args.length / elapsed
            text = f"step {step:,}  {float(bits):.3f} bits per character  {speed:,.0f} characters/s"
            progress.show(fraction, f"{text}  {left // 60:.0f}:{left % 60:02.0f} left")
            if not math.isfinite(bits):
                raise FloatingPointError
        if fraction == 1.0:
            progress.note("")
            return
        if fraction >= next_note:
            progress.note(validate())
            next_note += 0.2
        if position + args.length >= len(data):  # the streams are at their end, or at their very beginning
            position, state = 0, model.zero_state(args.batch)
        tokens, targets = (data[position + i : position + i + args.length] for i in (0, 1))
        masks = dropout_masks(rng, model, args.dropout, args.batch)
        logits, state, saved = model.forward(tokens, state, masks, save=True)
        loss, dlogits = cross_entropy(logits, targets.reshape(-1))
        adam.update(model.backward(dlogits, saved), learning_rate(fraction, args.lr))
        step, position = step + 1, position + args.length
        bits += (loss - bits) * max(1 / step, 0.02)  # a running mean over about the last fifty steps


def number(kind, above: float, below: float = math.inf):
    """An argparse type: an int or float between two bounds."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not above < value < below:
            what = "a whole number" if kind is int else "a number"
            limit = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"needs {what} above {above:g}{limit}, got {text!r}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Every complaint to the user goes through here: one line, exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default %(default)s)"
    add("--text", metavar="FILE", help="what to learn (default: the source of Python's standard library)")
    add("--out", metavar="FILE", help="weights are written here (default: the --resume file, or char_lm.npz)")
    add("--resume", metavar="FILE", help="go on from these weights; they fix --layers, --d, --embed and --dtype")
    add("--steps", type=number(int, 0), metavar="N", help="train for so many pieces of --length characters")
    add("--minutes", type=number(float, 0), help="train for so long (default 1.7 if --steps is not given)")
    for name, what in ("layers", "SRU layers"), ("d", "hidden size"), ("embed", "size of a character's embedding"):
        add(f"--{name}", type=number(int, 0), metavar="N", help=f"{what} (default {MODEL_DEFAULTS[name]})")
    add("--dtype", choices=["float32", "float64"], help=f"of all arrays (default {MODEL_DEFAULTS['dtype']})")
    add("--batch", type=number(int, 0), default=32, metavar="N", help=f"parallel streams {default}")
    add("--length", type=number(int, 0), default=64, metavar="N", help=f"characters of a piece {default}")
    add("--lr", type=number(float, 0), default=0.01, help=f"highest learning rate {default}")
    add("--dropout", type=number(float, -1e-9, 1), default=0.0, help=f"rate between the layers {default}")
    add("--seed", type=number(int, -1), default=0, metavar="N", help=f"of weights, dropout and samples {default}")
    add("--sample", type=number(int, 0), nargs="?", const=500, metavar="N",
        help="no training: write N characters (default 500) with the weights of --resume, --out or char_lm.npz")
    add("--prompt", default="\n", help="what a sample begins with (default: a new line)")
    add("--temperature", type=number(float, 0), default=0.8, help=f"of samples; lower is safer {default}")
    return parser


def read_text(args, fail) -> bytes:
    try:
        if args.text:
            with open(args.text, "rb") as file:
                text = file.read()
        else:
            text = standard_library()
    except OSError as error:
        fail(f"argument --text: cannot read {args.text}: {error.strerror}")
    needed = max(100, args.batch * (args.length + 1) * 10 // 9 + 10)
    if len(text) < needed:
        fail(f"argument --text: {args.text or 'the standard library'} has {len(text)} characters; "
             f"--batch {args.batch} and --length {args.length} need {needed}")
    return text


def make_model(args, path: str | None, fail) -> tuple[Model, Adam]:
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


def check_writable(path: str, fail):
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(0, "it is a folder")
        with open(path + ".tmp", "wb"):
            pass
        os.remove(path + ".tmp")
    except OSError as error:
        fail(f"argument --out: cannot write {path}: {error.strerror}")


def run(args, fail) -> int:
    out = args.out or args.resume or "char_lm.npz"
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if not prompt:
        fail("argument --prompt: needs at least one character")
    model, adam = make_model(args, args.resume or (out if args.sample else None), fail)
    if args.sample:
        print(sample(model, prompt, args.sample, args.temperature, args.seed))
        return 0
    args.minutes = args.minutes or (None if args.steps else 1.7)
    text = read_text(args, fail)
    check_writable(out, fail)
    cut = len(text) - len(text) // 10
    learn, valid = text[:cut], text[cut:]
    yardsticks = f"unigram {unigram_bits(learn, valid):.3f}, gzip {gzip_bits(learn, valid):.3f}"

    def validation(part: bytes = valid[:32_000]) -> str:
        what = "" if len(part) == len(valid) else f" on the first {len(part):,} characters"
        return f"validation: {evaluate(model, part):.3f} bits per character{what} ({yardsticks})"

    parameters = sum(p.size for p in model.params.values())
    print(f"text: {len(text):,} characters, the last {len(valid):,} of them for validation\n"
          f"unigram: the entropy coding of each byte by its frequency in the training part\n"
          f"gzip: level 9, the size of the whole text packed less that of the training part packed\n"
          f"model: {model.hyper['layers']} SRU layers, d = {model.hyper['d']}, {parameters:,} parameters\n"
          f"before training, {validation()}", flush=True)
    stopped = False
    try:
        train(model, adam, streams(learn, args.batch), args, validation)
    except KeyboardInterrupt:
        stopped = True
    except FloatingPointError:
        fail("argument --lr: training diverged (the loss is not finite), no weights saved; try a lower rate")
    save(out, model, adam)
    if stopped:
        print(f"\nStopped by Ctrl-C. Weights saved in {out}; go on with --resume {out}")
        return 130
    print(validation(valid))
    print(f"weights saved in {out}: --resume {out} goes on, --sample --resume {out} writes text\nsample:")
    print(sample(model, prompt, args.sample or 500, args.temperature, args.seed))
    return 0


def main() -> int:
    parser = make_parser()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    try:
        return run(parser.parse_args(), parser.error)
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
