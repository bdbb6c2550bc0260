"""A module for cells of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...check import Check
from ...errors import LibraryError, ShapeError
from ...own import OwnCell
from . import given
from .native import state_dtype
from .parameters import Recipe
from .sequences import Sequences
from .stack import Stack


class RNN(Stack):
    """Layers of a cell of one's own, which `sru_rt.cell` made of a step function (see docs/own_cells.md)::

        rnn = RNN(input_size, hidden_size, num_layers=2, cell=leaky, params={"b": 1.0})

    Parameters of layer k: `weight_l{k}` (D, gates, d, n), or with `low_rank` `weight_l{k}_p` (D, gates, d, low_rank)
    and `weight_l{k}_q` (low_rank, n); `params_l{k}` (D, parameters, d), both in the order of the declaration. The state
    is a tensor (num_layers*D, B, d), or a tuple of them for a cell of several states.

    Args:
        cell: what `sru_rt.cell` made. If it declares an input x, that is the layer's input itself, as the highway of
            SRU has it, and input_size must be D*hidden_size.
        params: initial values by the names of the cell's parameters, numbers or arrays that broadcast to (D, d); 0 for
            the rest.
        constants: values of the cell's constants by name; those with a default in the step function may be left out.

    To be pickled with the module, the cell must stand at the top of an importable file. All else and errors as
    `MinGRU`, but that biases are the cell's own affair.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        cell: OwnCell,
        params: Mapping[str, Any] | None = None,
        constants: Mapping[str, float] | None = None,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        low_rank: int | None = None,
        recompute: bool | int | str = False,
        time_parallel: bool | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, batch_first, dropout, bidirectional, low_rank, recompute, time_parallel
        )
        check = self._check()
        if not isinstance(cell, OwnCell):
            got = type(cell).__name__
            raise LibraryError(f"{check.function}: cell must be what @sru_rt.cell makes of a step function (got {got})")
        self.cell, core = cell, cell._cell
        self.constants = dict(constants) if constants else None
        self._params = {name: self._initial_value(name, value) for name, value in (params or {}).items()}
        self._constants = self._numbers()
        d_out = self.num_directions * self.hidden_size
        if "x" in core.inputs and self.input_size != d_out:
            problem = f"is {self.input_size}, but cell {core.name} takes x itself: it must be D*hidden_size = {d_out}"
            raise check.error("input_size", problem, ShapeError)
        self._make_parameters([Recipe.of(core)] * self.num_layers, device, dtype)

    def _numbers(self) -> tuple[float, ...]:
        """The constants in the order of their declaration."""
        check, core, chosen = self._check(), self.cell._cell, self.constants or {}
        for name in chosen:
            if name not in core.constants:
                known = ", ".join(core.constants) or "none"
                raise check.error("constants", f"has {name!r}; constants of cell {core.name} are: {known}")
        numbers = self.cell._defaults | chosen
        for name in core.constants:
            if name not in numbers:
                raise check.error(
                    "constants", f"lacks {name!r}, which has no default; pass constants={{{name!r}: ...}}"
                )
        return tuple(check.number(f"constants[{name!r}]", numbers[name]) for name in core.constants)

    def _initial_value(self, name: str, value: Any) -> Tensor:
        check, known, shape = self._check(), self.cell._cell.params, (self.num_directions, self.hidden_size)
        if name not in known:
            text = f"has a value for {name!r}; parameters of cell {self.cell.name} are: {', '.join(known) or 'none'}"
            raise check.error("params", text)
        try:
            return torch.broadcast_to(torch.as_tensor(value, device="cpu"), shape).clone()
        except (TypeError, ValueError, RuntimeError):
            problem = f"must be a number or an array that broadcasts to {shape} (got {value!r})"
            raise check.error(f"params[{name!r}]", problem) from None

    def _initial_params(self) -> dict[str, Sequence[Any]]:
        names = self.cell._cell.params
        return {"params": [self._params.get(name, 0.0) for name in names]} if names else {}

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        values: Mapping[str, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Runs all layers over a batch of sequences.

        Args:
            values: what the cell declares beside gates, parameters and x, by name; a tensor for all layers, or a list
                with one for each. Inputs are (L, B, D*d), or as `batch_first` and one sequence have it; values of a
                sequence (B, D, d). For a PackedSequence both are padded, in the order of the batch.

        All else, results and errors as `MinGRU.forward`.
        """
        return self._forward(input, state, lengths, mask, reset, values)

    def step(self, input: Tensor, state: Any = None, *, values: Mapping[str, Any] | None = None) -> tuple[Tensor, Any]:
        """One token, for decoding, as `MinGRU.step`; in `values` inputs are (B, d)."""
        return self._step(input, state, values)

    def _values(self, check: Check, seqs: Sequences, values: Mapping[str, Any]) -> dict[str, Sequence[Tensor]]:
        kinds = {name: kind for name, kind in self._recipes[0].arrays if kind != "params" and name != "x"}
        for name in values:
            if name not in kinds:
                known = ", ".join(kinds) or "none"
                raise check.error("values", f"has {name!r}; cell {self.cell.name} takes by name: {known}")
        for name in kinds:
            if name not in values:
                raise check.error("values", f"lacks {name!r}, which the cell declares; pass values={{{name!r}: ...}}")
        return {name: self._of_each_layer(check, seqs, name, kinds[name], value) for name, value in values.items()}

    def _of_each_layer(self, check: Check, seqs: Sequences, name: str, kind: str, value: Any) -> Sequence[Tensor]:
        what = f"values[{name!r}]"
        if not isinstance(value, (list, tuple)):
            return [self._value(check, seqs, what, kind, value)] * self.num_layers
        if len(value) != self.num_layers:
            raise check.error(
                what, f"has {len(value)} tensors; it needs one, or one for each of {self.num_layers} layers"
            )
        return [self._value(check, seqs, f"{what}[{k}]", kind, one) for k, one in enumerate(value)]

    def _value(self, check: Check, seqs: Sequences, name: str, kind: str, value: Any) -> Tensor:
        D, d = self.num_directions, self.hidden_size
        L, B = seqs.x.shape[:2]
        wide = state_dtype(seqs.x.dtype)
        if kind == "inputs":
            value = seqs.of_tokens(check, name, value, "D*d", (D * d,)).reshape(L, B, D, d)
            given.dtype(check, name, value, (seqs.x.dtype, wide))
        else:
            value = seqs.of_sequences(check, name, value, "D d", (D, d))
            given.dtype(check, name, value, (seqs.x.dtype, wide, torch.bool))
        return value
