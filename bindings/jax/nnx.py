"""Modules for Flax NNX, which is imported here and nowhere else in the binding."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from . import stacks
from .stack import Parameters, Stack, constructor, described
from .stacks import QRNNState as QRNNState

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        f"sru_rt.bindings.jax.nnx: Flax with its module nnx cannot be imported ({error}); install it with "
        "pip install 'flax>=0.10.7'"
    ) from error

__all__ = ["QRNN", "SRU", "MinGRU", "MinLSTM", "QRNNState"]


class _Module(nnx.Module):
    """Beside these, as elsewhere in Flax::

        dtype: of products and the output; None: what those of x and parameters promote to.
        param_dtype: of the parameters: float16, bfloat16, float32 or float64.
        rngs: `nnx.Rngs`; draws parameters from its stream "params", and dropout from "dropout".

    Raises:
        ArgumentError, ShapeError, DtypeError, LibraryError: naming the argument, what it is and what it must be.
    """

    _kind: ClassVar[type[Stack]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.stack = self._kind(input_size, hidden_size, num_layers, **options)
        self.dtype, self.param_dtype = dtype, param_dtype
        for name, value in self.stack.draw(rngs.params(), param_dtype).items():
            setattr(self, name, nnx.Param(value))
        self.deterministic = False
        if self.stack.is_random:
            stream = rngs.dropout
            self.rngs = stream.fork() if hasattr(stream, "fork") else rngs

    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> tuple[Array, Any]:
        """Runs all layers over a batch of sequences.

        Args:
            x: (L, B, input_size), (B, L, input_size) if `batch_first`, or (L, input_size) for one sequence.
            state: (num_layers*D, B, hidden_size), without B for one sequence: the initial state. Zeros if None.
            lengths: (B,), integers from 0 to L, a list or an array, a number for one sequence; later tokens do not
                exist: the output is 0 there, and the state is carried.
            mask: (L, B), or (B, L) if `batch_first`; true is padding: the output is 0 there, and the state is carried.
            reset: likewise; true: the state is 0 before this token. The reverse direction resets on the other side of
                the same boundary.
            deterministic: True leaves dropout out. None: as ``module.train()`` or ``module.eval()`` said; at first
                False.
            rngs: `nnx.Rngs`, a stream of them, or a key, for dropout; None: those of the constructor.

        Returns:
            h, in the form of x with D*hidden_size in the place of input_size, and the last state, shaped like `state`.
        """
        is_training = not (self.deterministic if deterministic is None else deterministic)
        key = _key(self.rngs if rngs is None else rngs) if self.stack.is_random and is_training else None
        return self.stack.forward(self.parameters(), x, state, (lengths, mask, reset), key, self.dtype)

    def step(self, x: Any, state: Any = None) -> tuple[Array, Any]:
        """One token, for decoding: what a deterministic call makes of it as the next one of its sequences.

        Args:
            x: (B, input_size), or (input_size,) for one sequence.
            state: what a call, `step` or `initial_step_state` returned; None before the first token.

        Returns:
            h (B, hidden_size) and the new state.
        """
        return self.stack.step(self.parameters(), x, state, self.dtype)

    def initial_step_state(self, batch_size: int | None = None) -> Any:
        """The state of sequences before their first token, zeros; without B if `batch_size` is None."""
        return self.stack.initial_step_state(batch_size, self.param_dtype if self.dtype is None else self.dtype)

    def parameters(self) -> Parameters:
        """Arrays of all parameters by name."""
        return {name: _value(variable) for name, variable in vars(self).items() if isinstance(variable, nnx.Param)}

    def with_parameters(self, params: Parameters) -> _Module:
        """A copy of the module with other parameters."""
        made = nnx.clone(self)
        for name, value in params.items():
            setattr(made, name, nnx.Param(value))
        return made


class SRU(_Module):
    __doc__ = described(stacks.SRU, _Module)
    _kind = stacks.SRU
    __init__ = constructor(stacks.SRU, _Module.__init__)


class QRNN(_Module):
    __doc__ = described(stacks.QRNN, _Module)
    _kind = stacks.QRNN
    __init__ = constructor(stacks.QRNN, _Module.__init__)


class MinGRU(_Module):
    __doc__ = described(stacks.MinGRU, _Module)
    _kind = stacks.MinGRU
    __init__ = constructor(stacks.MinGRU, _Module.__init__)


class MinLSTM(_Module):
    __doc__ = described(stacks.MinLSTM, _Module)
    _kind = stacks.MinLSTM
    __init__ = constructor(stacks.MinLSTM, _Module.__init__)


def _value(variable: Any) -> Any:
    """What a variable holds; earlier releases of Flax have no method for it."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _key(rngs: Any) -> Any:
    """The next key of what a call of a module of Flax takes as `rngs`."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout()
    return rngs() if callable(rngs) else rngs
