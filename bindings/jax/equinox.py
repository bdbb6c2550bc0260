"""Modules for Equinox, which is imported here and nowhere else in the binding."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from . import stacks
from .stack import Parameters, Stack, constructor, described
from .stacks import QRNNState as QRNNState

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        f"sru_rt.bindings.jax.equinox: Equinox cannot be imported ({error}); install it with "
        "pip install 'equinox>=0.13'"
    ) from error

__all__ = ["QRNN", "SRU", "MinGRU", "MinLSTM", "QRNNState"]


class _Module(eqx.Module):
    """Beside these, as elsewhere in Equinox::

        dtype: of the parameters: float16, bfloat16, float32 or float64. Products and the output have the dtype that x
            and parameters promote to.
        inference: whether dropout is left out; `equinox.nn.inference_mode` changes it.
        key: of `jax.random`, from which parameters are drawn.

    Parameters are in the dict `params`, by name. Modules take one sequence, for `jax.vmap`, or a batch of them, which
    costs less where `lengths`, `mask` or `reset` are given.

    Raises:
        ArgumentError, ShapeError, DtypeError, LibraryError: naming the argument, what it is and what it must be.
    """

    params: Parameters
    stack: Stack = eqx.field(static=True)
    inference: bool

    _kind: ClassVar[type[Stack]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        dtype: Any = jnp.float32,
        inference: bool = False,
        key: Array,
        **options: Any,
    ) -> None:
        self.stack = self._kind(input_size, hidden_size, num_layers, **options)
        self.params = self.stack.draw(key, dtype)
        self.inference = inference

    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> tuple[Array, Any]:
        """Runs all layers over one sequence, or a batch of them.

        Args:
            x: (L, input_size) for one sequence, (L, B, input_size), or (B, L, input_size) if `batch_first`.
            state: (num_layers*D, hidden_size), with B (num_layers*D, B, hidden_size): the initial state. Zeros if None.
            lengths: a number from 0 to L for one sequence, else (B,); later tokens do not exist: the output is 0 there,
                and the state is carried.
            mask: (L,), (L, B), or (B, L) if `batch_first`; true is padding: the output is 0 there, and the state is
                carried.
            reset: likewise; true: the state is 0 before this token. The reverse direction resets on the other side of
                the same boundary.
            key: for dropout and zoneout; needed where there are some, but in inference.
            inference: whether dropout is left out; None: as the module says.

        Returns:
            h, in the form of x with D*hidden_size in the place of input_size, and the last state, shaped like `state`.
        """
        is_training = not (self.inference if inference is None else inference)
        if self.stack.is_random and is_training and key is None:
            name = type(self).__name__
            raise self.stack.check().error(
                "key", f"is None, but {name} draws random numbers in training; pass a key, or inference=True"
            )
        key = key if self.stack.is_random and is_training else None
        return self.stack.forward(self.params, x, state, (lengths, mask, reset), key)

    def step(self, x: Any, state: Any = None) -> tuple[Array, Any]:
        """One token, for decoding: what a call in inference makes of it as the next one of its sequences.

        Args:
            x: (input_size,) for one sequence, or (B, input_size).
            state: what a call, `step` or `initial_step_state` returned; None before the first token.

        Returns:
            h (hidden_size,) or (B, hidden_size), and the new state.
        """
        return self.stack.step(self.params, x, state)

    def initial_step_state(self, batch_size: int | None = None) -> Any:
        """The state of sequences before their first token, zeros; without B if `batch_size` is None."""
        return self.stack.initial_step_state(batch_size, next(iter(self.params.values())).dtype)

    def parameters(self) -> Parameters:
        """Arrays of all parameters by name."""
        return dict(self.params)

    def with_parameters(self, params: Parameters) -> _Module:
        """A copy of the module with other parameters."""
        return eqx.tree_at(lambda module: module.params, self, params)


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
