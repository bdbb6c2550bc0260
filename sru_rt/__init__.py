"""Runtime-compiled kernels for gated element-wise recurrences.

Nothing happens at import: no framework is imported, nothing is compiled, no folder is made.
"""

from ._version import __version__
from .cells import sru_backward, sru_forward, sru_init, sru_recurrence, sru_step
from .graph import exp, log, maximum, minimum, relu, sigmoid, softplus, sqrt, tanh, where

__all__ = [
    "__version__",
    "exp",
    "log",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "softplus",
    "sqrt",
    "sru_backward",
    "sru_forward",
    "sru_init",
    "sru_recurrence",
    "sru_step",
    "tanh",
    "where",
]
