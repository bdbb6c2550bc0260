"""What the modules share: how layers on top of each other are called, and their step for decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...check import Check
from ...errors import ArgumentError
from . import given
from .layer import layer
from .native import state_dtype
from .parameters import Parameters, Recipe
from .sequences import Layout, Sequences, sequences, tokens
from .states import of_layers, together


class Stack(Parameters):
    """Layers of one cell; the base of all modules."""

    _constants: tuple[float, ...] = ()

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
    ) -> tuple[Any, Any]:
        """Runs all layers over a batch of sequences.

        Args:
            input: (L, B, input_size), (B, L, input_size) if `batch_first`, (L, input_size) for one sequence, or a
                PackedSequence; in the dtype of the parameters, or any under autocast.
            state: (num_layers*D, B, hidden_size), without B for one sequence: the initial state, whose row k*D + q is
                that of direction q of layer k. Zeros if None. In the dtype of the input or of the returned state.
            lengths: (B,), a tensor or a list of integers from 0 to L; later tokens do not exist: the output is 0
                there, and the state is carried.
            mask: (L, B), or (B, L) if `batch_first`; true is padding: the output is 0 there, and the state is carried.
            reset: likewise; true: the state is 0 before this token, as at the beginning of a document among packed
                ones or of an episode. The reverse direction resets on the other side of the same boundary.

        Returns:
            The output, in the form of the input with D*hidden_size in the place of input_size, and the last state,
            shaped like `state`, in float32 (float64 for float64). Both in the order of the batch as it was before a
            PackedSequence was sorted, as torch.nn.LSTM has it.

        Raises:
            ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
        """
        return self._forward(input, state, lengths, mask, reset)

    def step(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token, for decoding: what `forward` makes of it as the next one of its sequences.

        Args:
            input: (B, input_size).
            state: what `forward`, `step` or `initial_step_state` returned; None before the first token.

        Returns:
            The output (B, hidden_size) and the new state.

        Raises:
            ArgumentError: the module is bidirectional. The others as `forward`.
        """
        return self._step(input, state)

    def initial_step_state(self, batch_size: int) -> Any:
        """The state of `batch_size` sequences before their first token; zeros.

        Raises:
            ArgumentError: the module is bidirectional, and so has no `step`.
        """
        check = self._check("initial_step_state")
        self._check_steps(check)
        batch_size = given.size(check, "batch_size", batch_size)
        first = self._weight(0)[0]
        dtype = state_dtype(first.dtype)
        made = [
            first.new_zeros(self.num_layers, batch_size, self.hidden_size, dtype=dtype)
            for _ in range(self._recipes[0].states)
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def _forward(
        self, input: Any, state: Any, lengths: Any, mask: Any, reset: Any, values: Mapping[str, Any] | None = None
    ) -> tuple[Any, Any]:
        check, first = self._check("forward"), self._weight(0)[0]
        seqs = sequences(check, input, self.input_size, first.device, self.batch_first, lengths, mask, reset)
        return self._call(check, seqs, first.dtype, state, values)

    def _step(self, input: Any, state: Any, values: Mapping[str, Any] | None = None) -> tuple[Tensor, Any]:
        check, first = self._check("step"), self._weight(0)[0]
        self._check_steps(check)
        return self._call(check, tokens(check, input, self.input_size, first.device), first.dtype, state, values)

    def _call(
        self, check: Check, seqs: Sequences, dtype: torch.dtype, state: Any, values: Mapping[str, Any] | None
    ) -> tuple[Any, Any]:
        """What forward and step share once the input is time-major; `dtype` is that of the parameters."""
        x = _in_dtype(check, seqs.x, dtype)
        seqs = seqs if x is seqs.x else seqs._replace(x=x)
        before, after = self._of_layers(check, seqs, seqs.state(state)), []
        prepared = self._values(check, seqs, values or {})
        for k in range(self.num_layers):
            if k and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            x, last = self._layer(k, x, before[k], seqs.layout, prepared)
            after.append(last)
        return seqs.like_input(x), seqs.state_like_input(self._together(after))

    def _layer(
        self,
        k: int,
        x: Tensor,
        state: Any,
        layout: Layout,
        values: Mapping[str, Sequence[Tensor]],
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Layer k over x (L, B, n). `seen` (L, B, window*n) is what its gates see, where windows were made already."""
        recipe = self._recipe(k)
        arrays = [self._array(k, name, x, values) for name, _ in recipe.arrays]
        if seen is not None:  # which x is not
            arrays = [
                x.reshape(*x.shape[:2], self.num_directions, self.hidden_size) if a is None else a for a in arrays
            ]
        return layer(
            recipe.text,
            x if seen is None else seen,
            self._weight(k),
            arrays,
            state,
            window=self.window if seen is None else 1,
            lengths=layout.lengths,
            mask=layout.mask,
            reset=layout.reset,
            constants=self._constants,
            recompute=self.recompute,
            time_parallel=self.time_parallel,
        )

    def _recipe(self, k: int) -> Recipe:
        return self._recipes[k]

    def _array(self, k: int, name: str, x: Tensor, values: Mapping[str, Any]) -> Tensor | None:
        """What layer k gives its cell under this name; None is its input."""
        if name in values:
            return values[name][k]
        return None if name == "x" else getattr(self, f"{name}_l{k}")

    def _values(self, check: Check, seqs: Sequences, values: Mapping[str, Any]) -> dict[str, Sequence[Tensor]]:
        """What the cell takes by name, for each layer."""
        return {}

    def _of_layers(self, check: Check, seqs: Sequences, state: Any, name: str = "state") -> list[Any]:
        """What each layer starts from."""
        sizes = (self.num_layers, self.num_directions, seqs.x.shape[1], self.hidden_size)
        return of_layers(check, name, state, self._recipes[0].states, sizes, seqs.x)

    def _together(self, states: list[Any]) -> Any:
        """The state of the module from those of its layers."""
        return together(states, self._recipes[0].states)

    def _check_steps(self, check: Check) -> None:
        if self.bidirectional:
            raise ArgumentError(
                f"{check.function}: the module is bidirectional, and its reverse direction needs all later tokens; "
                "make it with bidirectional=False to decode token by token"
            )


def _in_dtype(check: Check, x: Tensor, needed: torch.dtype) -> Tensor:
    """x in the dtype of autocast where that is on, else checked to be in that of the parameters."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.is_floating_point() and torch.float64 not in (x.dtype, needed):
        return x.to(torch.get_autocast_dtype(kind))
    if x.dtype != needed:
        way = f", or the module with .to({x.dtype})" if x.is_floating_point() else ""
        given.dtype(check, "input", x, (needed,), way)
    return x
