"""A recurrence of your own: written as one step, trained on the adding problem, then run token by token.

The cell is the gated unit of HGRN, with a real state in place of the paper's complex one: Qin, Yang and Zhong,
"Hierarchically Gated Recurrent Network for Sequence Modeling", NeurIPS 2023. Its forget gate is bounded from below,
more so in upper layers, which then remember for longer. (The paper learns the bounds; here they are given.)

In the adding problem (Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997) a token is a number from 0 to 1 and
a mark. Two tokens have the mark 1, all others 0, and the answer at the end is the sum of the two marked numbers.
"""

import argparse
import math

import numpy as np
from _device import CHOICES, HELP, choose

import sru_rt


@sru_rt.cell(gates="uf uc ug", params="b_f", state="c", constants="lowest")
def hgru(uf, uc, ug, b_f, c, lowest):
    f = lowest + (1 - lowest) * sru_rt.sigmoid(uf + b_f)
    c = f * c + (1 - f) * uc * sru_rt.sigmoid(uc)
    return c, c * sru_rt.sigmoid(ug)  # the new state, then h


xp = np  # or CuPy, set once
L, B, d = 50, 64, 32  # time steps, sequences, hidden size; time comes first
LOWEST = 0.0, 0.9  # one layer for each bound


def problems(rng, B):
    """Tokens (L, B, 2), and answers (B,)."""
    x = np.zeros((L, B, 2), np.float32)
    x[:, :, 0] = rng.random((L, B))
    np.put_along_axis(x[:, :, 1], rng.random((L, B)).argsort(0)[:2], 1, axis=0)
    return xp.asarray(x), xp.asarray(x.prod(2).sum(0))


def forward(layers, out, x):
    """Answers (B,), which are read from h of the last step, and what backward needs."""
    h, saved = x, []
    for params, lowest in zip(layers, LOWEST):
        h, _, kept = hgru.forward(h, **params, lowest=lowest, save=True)
        saved.append(kept)
    return h[-1] @ out, (h, saved)


def backward(out, danswers, saved):
    """The gradient of each array in `trained`, see `train`."""
    h, saved = saved
    grads, dh = [danswers @ h[-1]], xp.zeros_like(h)
    dh[-1] = danswers[:, None] * out
    for kept in reversed(saved):
        layer_grads = hgru.backward(kept, dh)
        grads += [layer_grads.params, layer_grads.weight]
        dh = layer_grads.x
    return grads


def train(layers, out, rng, steps, lr=0.02):
    """Adam, with a learning rate that falls to 0."""
    trained = [out, *(params[name] for params in reversed(layers) for name in ("params", "weight"))]
    means, squares = ([xp.zeros_like(p) for p in trained] for _ in range(2))
    for step in range(1, steps + 1):
        x, answers = problems(rng, B)
        found, saved = forward(layers, out, x)
        error = found - answers
        if step == 1 or step % max(1, steps // 5) == 0:
            print(f"step {step}: mean squared error {float((error * error).mean()):.4f}")
        rate = lr * (1 - step / steps) * math.sqrt(1 - 0.99**step) / (1 - 0.9**step)
        for p, g, mean, square in zip(trained, backward(out, error * (2 / B), saved), means, squares):
            mean += 0.1 * (g - mean)
            square += 0.01 * (g * g - square)
            p -= rate * mean / (xp.sqrt(square) + 1e-8)


def main():
    global xp
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CHOICES, default="auto", help=HELP)
    parser.add_argument("--steps", type=int, default=600, help="of training (default %(default)s)")
    args = parser.parse_args()
    xp, where = choose(args.device, parser.error)

    print(f"{hgru.graph()}\n\non {where}; the answer 1, always, has a mean squared error of {1 / 6:.4f}")
    rng, like = np.random.default_rng(0), xp.empty(0, np.float32)
    layers = [hgru.init(d_in, d, params={"b_f": 2}, rng=rng, like=like) for d_in in (2, d)]
    out = xp.zeros(d, np.float32)
    train(layers, out, rng, args.steps)

    x, answers = problems(rng, 1)
    state = [None] * len(layers)  # None is a state of zeros
    print("\none more problem, token by token:")
    for t in range(L):
        h = x[t]
        for i, (params, lowest) in enumerate(zip(layers, LOWEST)):
            h, state[i] = hgru.step(h, **params, c=state[i], lowest=lowest)
        number, mark = map(float, x[t, 0])
        if mark:
            print(f"token {t} is marked: {number:.3f}")
    at_once, _ = forward(layers, out, x)
    print(f"answer by step {float(h[0] @ out):.3f}, by forward {float(at_once[0]):.3f}, right {float(answers[0]):.3f}")


if __name__ == "__main__":
    main()
