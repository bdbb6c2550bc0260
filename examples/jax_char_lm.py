"""Train a character language model of recurrent layers in JAX, with Optax.

    python jax_char_lm.py                         one minute, on the source of Python's standard library
    python jax_char_lm.py --cell mingru           the same with another layer: sru, qrnn, mingru or minlstm
    python jax_char_lm.py --text novel.txt        the same on a text of yours

A character is one byte of the file. The model is an embedding, recurrent layers and a softmax over the 256
bytes; the last tenth of the text is kept for validation. Training is truncated back-propagation through time:
the text runs as --batch parallel streams, and each piece of --length characters starts from the state that the
piece before it left. A step of training is one compiled program, which is given parameters, moments and state to
write over; the text stays on the device. The sample at the end is drawn one character at a time, by the layers'
`step`, in one program, too. With --steps the same seed gives the same model again; --minutes depends on the machine.

Letters: L time steps, B sequences, d hidden size. Time comes first: tokens (L, B), hidden states (L, B, d).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _cli import Parser, Progress, number
from _text import gzip_bits, split_text, unigram_bits
from jax import Array
from sru_rt.bindings.jax.equinox import QRNN, SRU, MinGRU, MinLSTM

VOCAB = 256
# SRU's bias lets every layer begin near its skip, so that gradients reach the lowest one.
CELLS = {
    "sru": functools.partial(SRU, highway_bias=-2.0),
    "qrnn": functools.partial(QRNN, window=2, highway=True),
    "mingru": MinGRU,
    "minlstm": MinLSTM,
}


class Model(eqx.Module):
    """Embedding, recurrent layers, linear. A state is whatever the layers take and return as theirs."""

    embedding: Array
    layers: Any
    out: Array
    bias: Array

    def __init__(self, cell: str, layers: int, d: int, embed: int, key: Array):
        keys = jax.random.split(key, 3)
        self.embedding = jax.random.normal(keys[0], (VOCAB, embed))
        self.layers = CELLS[cell](embed, d, layers, key=keys[1])
        self.out = jax.random.normal(keys[2], (d, VOCAB)) / math.sqrt(d)
        self.bias = jnp.zeros(VOCAB)

    def __call__(self, tokens, state):
        """Tokens (L, B) -> logits (L, B, 256) for the tokens after them, and the state after the last."""
        h, state = self.layers(self.embedding[tokens], state)
        return h @ self.out + self.bias, state

    def step(self, token, state):
        """One token of one text () -> logits (256,) and the state."""
        h, state = self.layers.step(self.embedding[token], state)
        return h @ self.out + self.bias, state


def streams(text: bytes, B: int) -> Array:
    """The text as B parallel streams: bytes (n, B), column b is the b-th of B equal parts of the text."""
    n = len(text) // B
    return jnp.asarray(np.frombuffer(text[: n * B], np.uint8).reshape(B, n).T)


def bits(model: Model, data: Array, start: Any, L: int, state: Any) -> tuple[Array, Any]:
    """The mean of -log2 p(target) over L tokens of each stream, and the state after them."""
    piece = jax.lax.dynamic_slice_in_dim(data, start, L + 1).astype("int32")
    logits, state = model(piece[:-1], state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, piece[1:]).mean() / math.log(2), state


def make_step(optimizer: optax.GradientTransformation, L: int):
    """One step of training as a compiled program; all that it is given but the first argument is written over."""

    @eqx.filter_jit(donate="all-except-first")
    def step(kept, model, moments, state):
        data, start, rate = kept
        (loss, state), gradients = eqx.filter_value_and_grad(bits, has_aux=True)(model, data, start, L, state)
        updates, moments = optimizer.update(gradients, moments)
        return eqx.apply_updates(model, jax.tree.map(lambda u: -rate * u, updates)), moments, state, loss

    return step


@eqx.filter_jit
def measure(model: Model, data: Array, starts: Array, L: int, state: Any) -> Array:
    """The sum of the mean bits of pieces of L tokens, one after another."""

    def piece(state, start):
        loss, state = bits(model, data, start, L, state)
        return state, loss

    return jnp.sum(jax.lax.scan(piece, state, starts)[1])


def evaluate(model: Model, text: bytes, limit: int | None = None) -> float:
    """Bits per character of a text as up to 32 streams, or of the first `limit` characters of each stream."""
    data = streams(text, max(1, min(32, len(text) // 256)))[:limit]
    L = min(128, len(data) - 1)
    starts = jnp.arange(0, len(data) - L, L)
    return float(measure(model, data, starts, L, model.layers.initial_step_state(data.shape[1]))) / len(starts)


@eqx.filter_jit
def draw(model: Model, prompt: Array, N: int, temperature: float, key: Array) -> Array:
    """N characters after the prompt, each drawn from the model's distribution and fed back in."""

    def read(state, token):
        logits, state = model.step(token, state)
        return state, logits

    def write(carry, key):
        logits, state = carry
        token = jax.random.categorical(key, logits / temperature)
        return model.step(token, state), token

    state, logits = jax.lax.scan(read, model.layers.initial_step_state(), prompt)
    return jax.lax.scan(write, (logits[-1], state), jax.random.split(key, N))[1]


def sample(model: Model, prompt: bytes, N: int, temperature: float, key: Array) -> str:
    drawn = draw(model, jnp.asarray(np.frombuffer(prompt, np.uint8)), N, temperature, key)
    return (prompt + bytes(np.asarray(drawn, np.uint8))).decode("utf-8", errors="replace")


def learning_rate(fraction: float, peak: float) -> float:
    """Up in the first 2 % of the run, then down along a cosine to 2 % of the peak."""
    return peak * min(1, 0.02 + fraction / 0.02) * (0.02 + 0.98 * (1 + math.cos(math.pi * fraction)) / 2)


def train(model: Model, data: Array, args: argparse.Namespace, validation) -> Model:
    """Train until --steps or --minutes are used up; `data` is the training part as streams (n, B)."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.99))
    moments, step_once = optimizer.init(eqx.filter(model, eqx.is_array)), make_step(optimizer, args.length)
    progress, step, mean, position, state = Progress(), 0, 0.0, len(data), None
    start, next_note, compiled = time.perf_counter(), 0.2, 0.0
    try:
        while True:
            elapsed = time.perf_counter() - start
            fraction = min(1.0, max(step / (args.steps or math.inf), elapsed / 60 / (args.minutes or math.inf)))
            if step and (fraction == 1.0 or progress.due(fraction)):
                left = round(elapsed / fraction - elapsed)
                speed = (step - 1) * args.batch * args.length / (elapsed - compiled)
                text = f"step {step:,}  {mean:.3f} bits/char  {speed:,.0f} chars/s"
                progress.show(fraction, f"{text}  {left // 60}:{left % 60:02} left")
            if fraction == 1.0:
                return model
            if fraction >= next_note:
                progress.note(validation(model))
                next_note += 0.2
            if position + args.length >= len(data):  # the streams are at their end, or before their beginning
                position, state = 0, model.layers.initial_step_state(args.batch)
            kept = data, jnp.int32(position), jnp.float32(learning_rate(fraction, args.lr))
            model, moments, state, loss = step_once(kept, model, moments, state)
            step, position = step + 1, position + args.length
            mean += (float(loss) - mean) * max(1 / step, 0.02)  # over about the last fifty steps
            compiled = compiled or time.perf_counter() - start  # the first step is not counted in the speed
    except KeyboardInterrupt:
        args.stopped = True
        return model


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, positive, default = number(int, 1), number(float, 0, above=True), "(default %(default)s)"
    add = parser.add_argument
    add("--text", metavar="FILE", help="what to learn (default: the source of Python's standard library)")
    add("--cell", choices=CELLS, default="sru", help=f"the recurrent layers {default}")
    add("--steps", type=count, metavar="N", help="train for N pieces of --length characters")
    add("--minutes", type=positive, help="train for so long (default 0.8, or no limit with --steps)")
    add("--layers", type=count, default=4, metavar="N", help=f"their number {default}")
    add("--d", type=count, default=128, metavar="N", help=f"hidden size {default}")
    add("--embed", type=count, default=64, metavar="N", help=f"size of the embedding {default}")
    add("--batch", type=count, default=32, metavar="N", help=f"parallel streams {default}")
    add("--length", type=count, default=64, metavar="N", help=f"characters of a piece {default}")
    add("--lr", type=positive, default=0.01, help=f"highest learning rate {default}")
    add("--seed", type=number(int, 0, 2**63), default=0, help=f"of weights and sample {default}")
    add("--sample", type=number(int, 0), default=500, metavar="N", help=f"characters to write at the end {default}")
    add("--prompt", default="\n", help="what the sample begins with (default: a new line)")
    add("--temperature", type=positive, default=0.8, help=f"of the sample; lower is safer {default}")
    return parser


def run(args: argparse.Namespace, fail) -> int:
    """`fail` takes a message and does not return."""
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    if not prompt:
        fail("argument --prompt: needs at least one character")
    args.minutes = args.minutes or (None if args.steps else 0.8)
    args.stopped = False
    learn, valid = split_text(args, fail)
    of_model, of_sample = jax.random.split(jax.random.key(args.seed))
    model = Model(args.cell, args.layers, args.d, args.embed, of_model)
    yardsticks = f"unigram {unigram_bits(learn, valid):.3f}, gzip {gzip_bits(learn, valid):.3f}"

    def validation(model: Model, limit: int | None = 1000) -> str:
        part = "" if limit is None else "on a part of the text, "
        return f"validation {part}{evaluate(model, valid, limit):.3f} bits per character ({yardsticks})"

    size = sum(array.size for array in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    print(
        f"text: {len(learn):,} characters to learn from, {len(valid):,} after them for validation\n"
        "unigram: each character coded by its frequency in the training part\n"
        "gzip: level 9, the packed size of the whole text less that of the training part\n"
        f"model: {args.layers} {args.cell} layers, d = {args.d}, {size:,} parameters\n"
        f"device: {jax.devices()[0].device_kind}\n"
        f"before training: {validation(model)}",
        flush=True,
    )
    model = train(model, streams(learn, args.batch), args, validation)
    print(validation(model, None))
    if args.sample:
        print(f"sample:\n{sample(model, prompt, args.sample, args.temperature, of_sample)}")
    if args.stopped:
        print("stopped by Ctrl-C")
    return 130 if args.stopped else 0


def main() -> int:
    parser = make_parser()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    return run(parser.parse_args(), parser.error)


if __name__ == "__main__":
    sys.exit(main())
