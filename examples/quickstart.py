"""One SRU layer on NumPy arrays: forward, backward, and one step of gradient descent."""

import numpy as np

import sru_rt

L, B, d_in, d = 20, 3, 8, 16  # time steps, sequences, input size, hidden size; time comes first
x = np.random.default_rng(0).standard_normal((L, B, d_in)).astype(np.float32)
lengths = np.array([20, 13, 5])  # how many steps of each sequence exist; leave it out when all have L

params = sru_rt.sru_init(d_in, d, rng=1)  # a dict with weight, bias, v and alpha
h, c_last, saved = sru_rt.sru_forward(x, **params, lengths=lengths, save=True)  # h (L, B, d)
loss = np.square(h).sum() / 2  # a toy loss, whose gradient with respect to h is h itself

grads = sru_rt.sru_backward(saved, h)  # .x .weight .bias .v .c0, named like the arguments
params["weight"] -= 0.001 * grads.weight
h, c_last = sru_rt.sru_forward(x, **params, lengths=lengths)

print(f"loss {loss:.3f}, after one step down its gradient {np.square(h).sum() / 2:.3f}")
