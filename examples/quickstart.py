"""One SRU layer: forward, backward, and one step of gradient descent. On a GPU if CuPy finds one, else with NumPy."""

import argparse

import numpy as np
from _device import CHOICES, HELP, choose

import sru_rt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", choices=CHOICES, default="auto", help=HELP)
xp, where = choose(parser.parse_args().device, parser.error)  # NumPy or CuPy; what follows is the same for both

L, B, d_in, d = 20, 3, 8, 16  # time steps, sequences, input size, hidden size; time comes first
x = xp.asarray(np.random.default_rng(0).standard_normal((L, B, d_in)).astype(np.float32))
lengths = [20, 13, 5]  # how many steps of each sequence exist; leave it out when all have L

params = sru_rt.sru_init(d_in, d, rng=1, like=x)  # a dict with weight, bias, v and alpha
h, c_last, saved = sru_rt.sru_forward(x, **params, lengths=lengths, save=True)  # h (L, B, d), on x's device
loss = (h * h).sum() / 2  # a toy loss, whose gradient with respect to h is h itself

grads = sru_rt.sru_backward(saved, h)  # .x .weight .bias .v .c0, named like the arguments
params["weight"] -= 0.001 * grads.weight
h, c_last = sru_rt.sru_forward(x, **params, lengths=lengths)

print(f"on {where}")
print(f"loss {float(loss):.3f}, after one step down its gradient {float((h * h).sum()) / 2:.3f}")
