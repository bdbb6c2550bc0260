"""The stacks of the built-in cells: the options of each, and what it makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ...cell import Cell
from ...cells import mingru, minlstm, qrnn, sru
from ...check import Check
from ...errors import LibraryError
from ...passes import declared
from . import init
from .sequences import Layout, as_array
from .stack import Parameters, Stack
from .windows import unfold


@dataclass(frozen=True, kw_only=True)
class _MinRNN(Stack):
    """What minGRU and minLSTM share."""

    use_bias: bool = True
    candidate: str = "identity"
    forget_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check = self.check()
        check.choice("use_bias", self.use_bias, (True, False))
        check.choice("candidate", self.candidate, tuple(mingru.CANDIDATES))
        check.number("forget_bias", self.forget_bias)

    def init(self, key: Array, k: int, dtype: Any) -> dict[str, Any]:
        draw = init.mingru_init if isinstance(self, MinGRU) else init.minlstm_init
        return _drawn(self, draw, key, k, dtype, forget_bias=self.forget_bias)


@dataclass(frozen=True, kw_only=True)
class MinGRU(_MinRNN):
    """minGRU, a GRU whose gates see the input alone::

        z[t] = s(W_z x[t] + b_z)
        h[t] = (1 - z[t])*h[t-1] + z[t]*g(W_n x[t] + b_n)

    Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.1. The output is the state.

    Parameters of layer k: `weight_l{k}` (D, 2, d, n), gates z, n, uniform with variance 1 / its number of columns, and
    with `use_bias` `bias_l{k}` (D, 2, d), 0, but that of z -forget_bias. `candidate` is g, "identity", or "positive":
    n + 0.5 for n >= 0, else s(n). A positive `forget_bias` keeps the state longer at the start of training.
    """

    def cell(self, k: int, is_training: bool) -> Cell:
        return mingru.mingru_cell(mingru.Options(self.candidate, bool(self.use_bias)))


@dataclass(frozen=True, kw_only=True)
class MinLSTM(_MinRNN):
    """minLSTM, an LSTM whose gates see the input alone and add up to one::

        F = s(W_f x[t] + b_f), I = s(W_i x[t] + b_i), f[t] = F / (F + I), i[t] = I / (F + I)
        h[t] = f[t]*h[t-1] + i[t]*g(W_n x[t] + b_n)

    Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs All We Needed?", 2024, section 3.2. The output is the state.

    Parameters of layer k: `weight_l{k}` (D, 3, d, n), gates f, i, n, uniform with variance 1 / its number of columns,
    and with `use_bias` `bias_l{k}` (D, 3, d), 0, but that of f forget_bias. `candidate` is g, "identity", or
    "positive": n + 0.5 for n >= 0, else s(n). A positive `forget_bias` keeps the state longer at the start of training.
    """

    def cell(self, k: int, is_training: bool) -> Cell:
        return minlstm.minlstm_cell(minlstm.Options(self.candidate, bool(self.use_bias)))


@dataclass(frozen=True, kw_only=True)
class SRU(Stack):
    """Simple Recurrent Units (Lei et al., EMNLP 2018, equations 1 to 4)::

        f[t] = s(uf[t] + v_f*c[t-1] + b_f)          c[t] = f[t]*c[t-1] + (1 - f[t])*u0[t]
        r[t] = s(ur[t] + v_r*c[t-1] + b_r)          h[t] = skip[t] + (g(c[t]) - skip[t])*m*r[t]

    u0, uf, ur (and u3) are the gates of U = W x; skip is alpha*x where n = D*d, u3 elsewhere, and nothing with
    ``highway=False``. m is the dropout mask of every layer but the last, (B, D, d), one for all steps.

    Parameters of layer k, drawn as by `sru_rt.sru_init`: `weight_l{k}` (D, gates, d, n); `v_l{k}` (D, 2, d), none with
    ``recurrent=False``; `bias_l{k}` (D, 2, d), forget gate first. `activation` is g, "identity", "tanh" or "relu".
    `highway`, `reset_gate`, `reset_on` are as in `sru_rt.sru_forward`; with `project_skip` the skip is u3 at every
    layer. `highway_bias` is the initial b_r; `alpha` None stands for sqrt(1 + 2 exp(highway_bias)).
    """

    activation: str = "identity"
    highway: bool = True
    reset_gate: bool = True
    reset_on: str = "previous"
    recurrent: bool = True
    project_skip: bool | str = "auto"
    highway_bias: float = 0.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check = self.check()
        check.choice("activation", self.activation, tuple(sru.ACTIVATIONS))
        check.choice("reset_on", self.reset_on, ("previous", "current"))
        for name in ("highway", "reset_gate", "recurrent"):
            check.choice(name, getattr(self, name), (True, False))
        if abs(check.number("highway_bias", self.highway_bias)) > 100:  # exp of more than 700 is infinite
            raise check.error("highway_bias", f"must be from -100 to 100 (got {self.highway_bias!r})")
        if self.alpha is not None:
            check.number("alpha", self.alpha)
        for k in range(self.num_layers):
            self._skip(k)

    def _skip(self, k: int) -> str:
        return _skip(self, k, bool(self.highway and self.reset_gate), self.project_skip)

    def init(self, key: Array, k: int, dtype: Any) -> dict[str, Any]:
        options = {
            name: getattr(self, name) for name in ("project_skip", "recurrent", "highway", "reset_gate", "highway_bias")
        }
        return _drawn(self, init.sru_init, key, k, dtype, **options)

    def cell(self, k: int, is_training: bool) -> Cell:
        return sru.sru_cell(
            sru.Options(
                skip=self._skip(k),
                activation=self.activation,
                reset_gate=bool(self.reset_gate),
                reset_on=self.reset_on if self.reset_gate else "previous",
                v="params" if self.recurrent else "none",
                dropout=is_training and self.dropout > 0 and k < self.num_layers - 1,
            )
        )

    def constants(self, k: int) -> tuple[float, ...]:
        return (math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.alpha is None else float(self.alpha),)

    def dropped(self, k: int, x: Array, key: Array | None) -> Array:
        return x

    def mask(self, k: int, name: str, x: Array, key: Array) -> Array:
        m = init.kept(key, self.dropout, (x.shape[1], self.D, self.hidden_size))
        return m / jnp.asarray(1 - self.dropout, jnp.promote_types(x.dtype, jnp.float32))


class QRNNState(NamedTuple):
    """The state of a QRNN with a window of several tokens, complete, so that the next piece or token can follow.

    c (num_layers, B, hidden_size), and for each layer the last tokens of its input, (window-1, B, n); without B for one
    sequence.
    """

    c: Array
    tokens: tuple[Array, ...]


@dataclass(frozen=True, kw_only=True)
class QRNN(Stack):
    """Quasi-RNN::

        z[t] = tanh(W_z X[t] + b_z), and f[t], o[t], i[t] are s(W X[t] + b) of their own
        pooling="f":    c[t] = f[t]*c[t-1] + (1 - f[t])*z[t],   h[t] = c[t]
        pooling="fo":   c[t] = f[t]*c[t-1] + (1 - f[t])*z[t],   h[t] = o[t]*c[t]
        pooling="ifo":  c[t] = f[t]*c[t-1] + i[t]*z[t],         h[t] = o[t]*c[t]
        highway=True:                                           h[t] = o[t]*c[t] + (1 - o[t])*skip[t]

    Bradbury, Merity, Xiong, Socher, "Quasi-Recurrent Neural Networks", ICLR 2017, section 2. X[t] are the last `window`
    tokens (in the reverse direction the next ones), x[t] among them; skip is x, or has a matrix of its own where
    n differs from D*d, or with ``project_skip=True``. `zoneout` is the probability with which, in training, a channel
    keeps its state at a step.

    Parameters of layer k: `weight_l{k}` (D, gates, d, window*n), gates z, f (, o (, i)) (, skip), the oldest token's
    columns first, uniform with variance 1 / its number of columns, and with `use_bias` `bias_l{k}` (D, z f o i as far
    as they exist, d), 0, but that of f forget_bias.

    With a window of more than one, what follows a piece of a sequence also needs the last tokens of the piece, at every
    layer: `initial_step_state` begins with a `QRNNState` that holds both; a call given one, and `step`, return one. A
    call given c, or None, begins its windows with zeros.
    """

    use_bias: bool = True
    pooling: str = "fo"
    window: int = 1
    highway: bool = False
    project_skip: bool | str = "auto"
    zoneout: float = 0.0
    forget_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check = self.check()
        self._size(check, "window")
        self._probability(check, "zoneout")
        check.choice("use_bias", self.use_bias, (True, False))
        check.choice("pooling", self.pooling, tuple(qrnn.POOLINGS))
        check.choice("highway", self.highway, (True, False))
        check.number("forget_bias", self.forget_bias)
        if self.highway and self.pooling == "f":
            raise check.error(
                "highway", "is True, but pooling='f' has no output gate to mix a skip in; use 'fo' or 'ifo'"
            )
        for k in range(self.num_layers):
            self._skip(k)

    @property
    def is_random(self) -> bool:
        return self.dropout > 0 or self.zoneout > 0

    def _skip(self, k: int) -> str:
        return _skip(self, k, bool(self.highway), self.project_skip)

    def init(self, key: Array, k: int, dtype: Any) -> dict[str, Any]:
        names = ("pooling", "window", "highway", "project_skip", "forget_bias")
        return _drawn(self, init.qrnn_init, key, k, dtype, **{name: getattr(self, name) for name in names})

    def cell(self, k: int, is_training: bool) -> Cell:
        zoneout = is_training and self.zoneout > 0
        return qrnn.qrnn_cell(qrnn.Options(self.pooling, self._skip(k), bool(self.use_bias), zoneout))

    def mask(self, k: int, name: str, x: Array, key: Array) -> Array:
        return init.kept(key, self.zoneout, (*x.shape[:2], self.D, self.hidden_size))

    # ------------------------------------------------------------------------------------------------------------------
    # Windows across pieces

    def _zeros(self, B: int, dtype: Any) -> Any:
        c = super()._zeros(B, dtype)
        if self.window == 1:
            return c
        return QRNNState(
            c, tuple(jnp.zeros((self.window - 1, B, self.size_of_input(k)), dtype) for k in range(self.num_layers))
        )

    def _of_layers(self, check: Check, state: Any, dtype: Any, name: str = "state") -> Any:
        if self.window == 1:
            return super()._of_layers(check, state, dtype)
        is_step = check.function.endswith(".step")
        if state is None and is_step:
            state = self._zeros(check["B"], dtype)
        if not isinstance(state, QRNNState):
            if is_step:
                raise LibraryError(
                    f"{check.function}: state must be a QRNNState, since a window of {self.window} also needs the last "
                    f"tokens (got {type(state).__name__}); forward given initial_step_state(B) returns one"
                )
            return super()._of_layers(check, state, dtype)
        self._check_steps(check)
        return list(zip(super()._of_layers(check, state.c, dtype, "state.c"), self._tokens(check, state.tokens, dtype)))

    def _tokens(self, check: Check, tokens: Any, dtype: Any) -> list[Array]:
        if not isinstance(tokens, (tuple, list)) or len(tokens) != self.num_layers:
            raise check.error("state.tokens", f"must be a tuple of {self.num_layers} arrays, one for each layer")
        found = []
        for k, value in enumerate(tokens):
            check.set("window-1", self.window - 1, "the module")
            check.set("n", self.size_of_input(k), "the input of this layer")
            value = as_array(value)
            check.shape(f"state.tokens[{k}]", check.plain(f"state.tokens[{k}]", value), "window-1 B n")
            found.append(value.astype(dtype))
        return found

    def _layer(
        self,
        k: int,
        params: Parameters,
        x: Array,
        state: Any,
        layout: Layout,
        key: Array | None,
        window: int = 1,
        seen: Array | None = None,
    ) -> tuple[Array, Any]:
        if not isinstance(state, tuple):
            return super()._layer(k, params, x, state, layout, key, self.window)
        c, tokens = state
        seen, tokens = unfold(x, tokens, *layout)
        h, c = super()._layer(k, params, x, c, layout, key, seen=seen)
        return h, (c, tokens)

    def _together(self, states: list[Any]) -> Any:
        if not isinstance(states[0], tuple):
            return super()._together(states)
        c, tokens = zip(*states)
        return QRNNState(super()._together(list(c)), tuple(tokens))


def _drawn(stack: Stack, draw: Any, key: Array, k: int, dtype: Any, **options: Any) -> dict[str, Any]:
    """The parameters that a function of `init` draws for layer k, and of these what its cell takes."""
    params, _ = draw(
        key,
        stack.size_of_input(k),
        stack.hidden_size,
        directions=stack.D,
        low_rank=stack.low_rank,
        dtype=dtype,
        **options,
    )
    taken = {"weight", *(array.name for array in declared(stack.cell(k, is_training=False)))}
    return {name: value for name, value in params.items() if name in taken}


def _skip(stack: Stack, k: int, has_skip: bool, project_skip: Any) -> str:
    """What kind of skip layer k has."""
    check, n, d_out = stack.check(), stack.size_of_input(k), stack.D * stack.hidden_size
    check.choice("project_skip", project_skip, ("auto", True, False))
    if not has_skip:
        if project_skip is True:
            raise check.error("project_skip", "is True, but these options have no skip; leave it out")
        return "none"
    if project_skip is False and n != d_out:
        raise check.error(
            "project_skip",
            f"is False, but the skip adds an input of size {n} to an output of size {d_out}; use 'auto', or "
            "highway=False",
        )
    return "projected" if project_skip is True or n != d_out else "x"
