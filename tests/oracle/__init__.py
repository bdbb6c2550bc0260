"""Float64 oracles of all cells: plain NumPy loops over time, forward and backward, written from the papers' equations.

They are the judges of every other implementation, so they share no code with the library. A cell's file holds one
step of its equations and the chain rule through it, derived by hand; frame.py walks over time, projection.py forms
U = W x, tools.py makes inputs and compares.

Letters: L time steps, B sequences, D directions (direction 1 runs from the last step to the first), d hidden size per
direction, k gates in U, G biases. Shapes: x (L, B, d_in), weight (D, k, d, window*d_in), u (L, B, D, k, d), bias
(D, G, d), the state before the first step and after the last one (D, B, d), h (L, B, D*d). Any dtype goes in, 16-bit
ones too; float64 comes out.

Every cell has `_recurrence`, from U, `_forward`, from x and a weight (D, k, d, d_in) or a pair P (D, k, d, p), Q
(p, d_in), and of both the `_backward`: the gradients of sum(h*dh) + sum(last*dlast) by name, where `last` is the state
after the last step; None where the input is None, and a pair for a pair.
"""

from .frame import live_steps
from .mingru import mingru_backward, mingru_forward, mingru_recurrence, mingru_recurrence_backward
from .minlstm import minlstm_backward, minlstm_forward, minlstm_recurrence, minlstm_recurrence_backward
from .projection import full_weight, project
from .qrnn import qrnn_backward, qrnn_forward, qrnn_recurrence, qrnn_recurrence_backward
from .sru import sru_backward, sru_forward, sru_recurrence, sru_recurrence_backward
from .tools import finite_differences, float64, random_inputs, random_layout, random_weight, relative_error

__all__ = [
    "finite_differences",
    "float64",
    "full_weight",
    "live_steps",
    "mingru_backward",
    "mingru_forward",
    "mingru_recurrence",
    "mingru_recurrence_backward",
    "minlstm_backward",
    "minlstm_forward",
    "minlstm_recurrence",
    "minlstm_recurrence_backward",
    "project",
    "qrnn_backward",
    "qrnn_forward",
    "qrnn_recurrence",
    "qrnn_recurrence_backward",
    "random_inputs",
    "random_layout",
    "random_weight",
    "relative_error",
    "sru_backward",
    "sru_forward",
    "sru_recurrence",
    "sru_recurrence_backward",
]
