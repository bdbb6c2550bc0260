"""QRNN as a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cells.qrnn import POOLINGS, Options, qrnn_cell
from ...check import Check
from ...errors import LibraryError
from . import given, windows
from .parameters import Recipe
from .sequences import Layout, Sequences
from .stack import Stack


class QRNNState(NamedTuple):
    """The state of a QRNN with a window of several tokens, complete, so that the next piece or token can follow.

    c (num_layers, B, hidden_size), and for each layer the last tokens of its input, (window-1, B, n).
    """

    c: Tensor
    tokens: tuple[Tensor, ...]


class QRNN(Stack):
    """Quasi-RNN::

        z[t] = tanh(W_z X[t] + b_z), and f[t], o[t], i[t] are s(W X[t] + b) of their own
        pooling="f":    c[t] = f[t]*c[t-1] + (1 - f[t])*z[t],   h[t] = c[t]
        pooling="fo":   c[t] = f[t]*c[t-1] + (1 - f[t])*z[t],   h[t] = o[t]*c[t]
        pooling="ifo":  c[t] = f[t]*c[t-1] + i[t]*z[t],         h[t] = o[t]*c[t]
        highway=True:                                           h[t] = o[t]*c[t] + (1 - o[t])*skip[t]

    Bradbury, Merity, Xiong, Socher, "Quasi-Recurrent Neural Networks", ICLR 2017, section 2. X[t] are the last `window`
    tokens, x[t] among them. The highway is that of table 1 in the EMNLP paper on SRU.

    Parameters of layer k: `weight_l{k}` (D, gates, d, window*n), gates z, f (, o (, i)) (, projected skip), the oldest
    token's columns first, or with `low_rank` `weight_l{k}_p` (D, gates, d, low_rank) and `weight_l{k}_q`
    (low_rank, window*n); `bias_l{k}` (D, z f o i as far as they exist, d), initially 0, but that of f forget_bias.

    The state is c, (num_layers*D, B, hidden_size). With a window of more than one, what follows a piece of a sequence
    also needs the last tokens of the piece, at every layer: `initial_step_state` begins with a `QRNNState` that holds
    both; `forward` given one, and `step`, return one. A `forward` given c, or None, begins its windows with zeros.

    Args:
        pooling: "f", "fo" or "ifo".
        window: how many tokens a gate sees: its own and those before it (in the reverse direction after it).
        highway: True adds a skip, for "fo" and "ifo".
        project_skip: whether the skip has a matrix of its own, or is the layer's input itself; "auto": a matrix where
            the layer's input has another size than D*hidden_size.
        zoneout: probability with which, in training, a channel keeps its state at a step: f becomes 1 - m*(1 - f) with
            m = 0 there, 1 elsewhere (section 2.1, without rescaling; with "ifo" i*z is still added). Not so in
            evaluation.

    All else and errors as `MinGRU`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        pooling: str = "fo",
        window: int = 1,
        highway: bool = False,
        project_skip: bool | str = "auto",
        zoneout: float = 0.0,
        forget_bias: float = 0.0,
        low_rank: int | None = None,
        recompute: bool | int | str = False,
        time_parallel: bool | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            batch_first,
            dropout,
            bidirectional,
            low_rank,
            recompute,
            time_parallel,
            window,
        )
        check = self._check()
        check.choice("bias", bias, (True, False))
        check.choice("pooling", pooling, tuple(POOLINGS))
        check.choice("highway", highway, (True, False))
        project_skip = check.choice("project_skip", project_skip, ("auto", True, False))
        if highway and pooling == "f":
            raise check.error(
                "highway", "is True, but pooling='f' has no output gate to mix a skip in; use 'fo' or 'ifo'"
            )
        if project_skip is True and not highway:
            raise check.error("project_skip", "is True, but without highway=True there is no skip; leave it out")
        self.bias, self.pooling, self.highway, self.project_skip = bool(bias), pooling, bool(highway), project_skip
        self.zoneout = given.probability(check, "zoneout", zoneout)
        self.forget_bias = check.number("forget_bias", forget_bias)
        options = [Options(pooling, self._skip(check, k), self.bias) for k in range(self.num_layers)]
        self._with_zoneout: tuple[Recipe, ...] = ()
        if self.zoneout:
            self._with_zoneout = tuple(Recipe.of(qrnn_cell(replace(o, zoneout=True))) for o in options)
        self._make_parameters([Recipe.of(qrnn_cell(o)) for o in options], device, dtype)

    def _skip(self, check: Check, k: int) -> str:
        """What kind of skip layer k has."""
        n, d_out = self._size_of_input(k), self.num_directions * self.hidden_size
        if not self.highway:
            return "none"
        if self.project_skip is False and n != d_out:
            raise check.error(
                "project_skip",
                f"is False, but the skip adds an input of size {n} to an output of size {d_out}; use 'auto'",
            )
        return "projected" if self.project_skip is True or n != d_out else "x"

    def _initial_params(self) -> dict[str, Sequence[Any]]:
        biases = {"z": 0.0, "f": self.forget_bias, "o": 0.0, "i": 0.0}
        return {"bias": [biases[gate] for gate in POOLINGS[self.pooling]]} if self.bias else {}

    def _recipe(self, k: int) -> Recipe:
        return self._with_zoneout[k] if self._with_zoneout and self.training else self._recipes[k]

    def _array(self, k: int, name: str, x: Tensor, values: Mapping[str, Any]) -> Tensor | None:
        if name != "zoneout_mask":
            return super()._array(k, name, x, values)
        mask = torch.empty(*x.shape[:2], self.num_directions, self.hidden_size, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - self.zoneout)

    # ------------------------------------------------------------------------------------------------------------------
    # Windows across pieces

    def initial_step_state(self, batch_size: int) -> Any:
        """The state of `batch_size` sequences before their first token; zeros, a `QRNNState` if window > 1.

        Raises:
            ArgumentError: the module is bidirectional, and so has no `step`.
        """
        c = super().initial_step_state(batch_size)
        if self.window == 1:
            return c
        first, shape = self._weight(0)[0], (self.window - 1, batch_size)
        return QRNNState(c, tuple(first.new_zeros(*shape, self._size_of_input(k)) for k in range(self.num_layers)))

    def _of_layers(self, check: Check, seqs: Sequences, state: Any, name: str = "state") -> list[Any]:
        if self.window == 1:
            return super()._of_layers(check, seqs, state)
        if not isinstance(state, QRNNState):
            if seqs.form != "token":
                return super()._of_layers(check, seqs, state)
            if state is not None:
                got, way = type(state).__name__, "forward(input, initial_step_state(B)) returns one"
                raise LibraryError(
                    f"{check.function}: state must be a QRNNState, since a window of {self.window} also needs the last "
                    f"tokens (got {got}); {way}"
                )
            state = self.initial_step_state(seqs.x.shape[1])
        self._check_steps(check)
        return list(zip(super()._of_layers(check, seqs, state.c, "state.c"), self._tokens(check, seqs, state.tokens)))

    def _tokens(self, check: Check, seqs: Sequences, tokens: Any) -> Sequence[Tensor]:
        if not isinstance(tokens, (tuple, list)) or len(tokens) != self.num_layers:
            raise check.error("state.tokens", f"must be a tuple of {self.num_layers} tensors, one for each layer")
        for k, value in enumerate(tokens):
            name, sizes = f"state.tokens[{k}]", (self.window - 1, seqs.x.shape[1], self._size_of_input(k))
            given.tensor(check, name, value, seqs.x.device, "input")
            given.shape(check, name, value, "window-1 B n", sizes, "the last inputs of this layer")
            given.dtype(check, name, value, (seqs.x.dtype, *given.DTYPES))
        return tokens

    def _layer(
        self,
        k: int,
        x: Tensor,
        state: Any,
        layout: Layout,
        values: Mapping[str, Sequence[Tensor]],
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        if not isinstance(state, tuple):
            return super()._layer(k, x, state, layout, values)
        c, tokens = state
        seen, tokens = windows.unfold(x, tokens, layout)
        h, c = super()._layer(k, x, c, layout, values, seen)
        return h, (c, tokens)

    def _together(self, states: list[Any]) -> Any:
        if not isinstance(states[0], tuple):
            return super()._together(states)
        c, tokens = zip(*states)
        return QRNNState(super()._together(list(c)), tuple(tokens))
