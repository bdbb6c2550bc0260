"""minGRU and minLSTM as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...cell import Cell
from ...cells import mingru, minlstm
from .parameters import Recipe
from .stack import Stack


class _MinRNN(Stack):
    """What minGRU and minLSTM share."""

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
        candidate: str = "identity",
        forget_bias: float = 0.0,
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
        check.choice("bias", bias, (True, False))
        check.choice("candidate", candidate, tuple(mingru.CANDIDATES))
        self.bias, self.candidate = bool(bias), candidate
        self.forget_bias = check.number("forget_bias", forget_bias)
        self._make_parameters([Recipe.of(self._cell())] * self.num_layers, device, dtype)

    def _cell(self) -> Cell:
        """The recurrence of every layer."""
        raise NotImplementedError(f"{type(self).__name__} must say which cell it has")

    def _biases(self) -> Sequence[float]:
        """Initial values, gate by gate."""
        raise NotImplementedError(f"{type(self).__name__} must say where its biases begin")

    def _initial_params(self) -> dict[str, Sequence[Any]]:
        return {"bias": self._biases()} if self.bias else {}


class MinGRU(_MinRNN):
    """minGRU, a GRU whose gates see the input alone::

        z[t] = s(W_z x[t] + b_z)
        h[t] = (1 - z[t])*h[t-1] + z[t]*g(W_n x[t] + b_n)

    Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.1. The output is the state.

    Letters: D directions, d = hidden_size, n the size of a layer's input. Parameters of layer k: `weight_l{k}`
    (D, 2, d, n), gates z, n, or with `low_rank` `weight_l{k}_p` (D, 2, d, low_rank) and `weight_l{k}_q`
    (low_rank, n); `bias_l{k}` (D, 2, d). Weights are initialized uniform with variance 1 / their number of columns,
    biases with 0, but that of z with -forget_bias. float16, bfloat16, float32 and float64; the state of 16-bit modules
    is float32.

    Args:
        input_size: size of a token.
        hidden_size: size of the state, per direction.
        num_layers: layers on top of each other.
        bias: whether gates have one.
        batch_first: input and output are (B, L, n) rather than (L, B, n); states are not concerned.
        dropout: probability with which values between layers are set to 0 in training.
        bidirectional: a second direction, from the last token to the first.
        candidate: g, "identity", or "positive": n + 0.5 for n >= 0, else s(n), which keeps h positive (the paper's
            form in log space).
        forget_bias: positive keeps the state longer at the start of training.
        low_rank: p, the rank of the weight as a product of two factors.
        recompute: what a backward computes anew, to save memory: False nothing, K >= 1 all states but every K-th, True
            these with K = 32, "x" these and U = W x.
        time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/recurrences.md).
        device, dtype: of the parameters.

    Raises:
        ArgumentError: naming the argument, what it is and what it must be.
    """

    def _cell(self) -> Cell:
        return mingru.mingru_cell(mingru.Options(self.candidate, self.bias))

    def _biases(self) -> Sequence[float]:
        return -self.forget_bias, 0.0


class MinLSTM(_MinRNN):
    """minLSTM, an LSTM whose gates see the input alone and add up to one::

        F = s(W_f x[t] + b_f), I = s(W_i x[t] + b_i), f[t] = F / (F + I), i[t] = I / (F + I)
        h[t] = f[t]*h[t-1] + i[t]*g(W_n x[t] + b_n)

    Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.2. The output is the state.

    Parameters of layer k: `weight_l{k}` (D, 3, d, n), gates f, i, n, or with `low_rank` `weight_l{k}_p`
    (D, 3, d, low_rank) and `weight_l{k}_q` (low_rank, n); `bias_l{k}` (D, 3, d), initially 0, but that of f
    forget_bias. All else, arguments and errors as `MinGRU`.
    """

    def _cell(self) -> Cell:
        return minlstm.minlstm_cell(minlstm.Options(self.candidate, self.bias))

    def _biases(self) -> Sequence[float]:
        return self.forget_bias, 0.0, 0.0
