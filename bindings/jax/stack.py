"""Layers of one cell on top of each other: what the modules of all libraries share.

A `Stack` says what a module is, and holds no arrays. Parameters are a dict with the names, shapes and layouts of the
modules for PyTorch; those of `SRU`, which has another layout there, are as the functions of the core take them.

Letters: L time steps, B sequences, D directions, d hidden size per direction, n the size of a layer's input.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ... import spec
from ...cell import Cell
from ...check import Check
from ...dtypes import IO_DTYPES
from ...errors import ArgumentError, DtypeError
from ...passes import declared
from ..recompute import check_recompute
from .init import kept
from .layer import layer
from .reference import state_dtype
from .sequences import Layout, as_array, checked, layout_of, like_input

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """Letters: L time steps, B sequences, D directions, d = hidden_size, n the size of a layer's input. The state is
    (num_layers*D, B, d), row k*D + q that of direction q of layer k, in float32 (float64 for float64), and can be given
    back. Parameters are one array for all gates and both directions, in each layer k.

    Args:
        input_size: size of a token.
        hidden_size: size of the state, per direction.
        num_layers: layers on top of each other.
        bidirectional: a second direction, from the last token to the first.
        batch_first: x and h are (B, L, n), mask and reset (B, L); states are not concerned.
        dropout: probability with which, in training, values between layers are set to 0, or what is said above.
        low_rank: p; the weight is a product of two factors, `weight_l{k}_p` (D, gates, d, p) and `weight_l{k}_q`
            (p, number of columns).
        recompute: what a backward computes anew, to save memory: False nothing, K >= 1 all states but every K-th, True
            these with K = 32, "x" these and U = W x.
        time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/recurrences.md).
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    _: KW_ONLY
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    low_rank: int | None = None
    recompute: bool | int | str = False
    time_parallel: bool | str = "auto"

    def __post_init__(self) -> None:
        check = self.check()
        for name in ("input_size", "hidden_size", "num_layers"):
            self._size(check, name)
        if self.low_rank is not None:
            self._size(check, "low_rank")
        for name in ("bidirectional", "batch_first"):
            check.choice(name, getattr(self, name), (True, False))
        check.choice("time_parallel", self.time_parallel, ("auto", True, False))
        self._probability(check, "dropout")
        check_recompute(check.function, self.recompute)
        if self.dropout and self.num_layers == 1:
            warnings.warn(
                f"{check.function}: dropout={self.dropout} acts below the last layer, and there is only one",
                stacklevel=5,
            )

    def _size(self, check: Check, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise check.error(name, f"must be a positive integer (got {value!r})")

    def _probability(self, check: Check, name: str) -> None:
        value = getattr(self, name)
        if not 0 <= check.number(name, value) < 1:
            raise check.error(name, f"must be a probability, 0 <= {name} < 1 (got {value!r})")

    def check(self, method: str = "") -> Check:
        """What begins messages with the name of the class, and of the method."""
        name = type(self).__name__
        return Check(f"{name}.{method}" if method else name)

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers."""
        return self.dropout > 0

    def size_of_input(self, k: int) -> int:
        return self.D * self.hidden_size if k else self.input_size

    # ------------------------------------------------------------------------------------------------------------------
    # What a cell says

    def init(self, key: Array, k: int, dtype: Any) -> dict[str, Any]:
        """Initial parameters of layer k: weight, which may be a pair, and whatever the cell takes beside it."""
        raise NotImplementedError(f"{type(self).__name__} must say how its parameters begin")

    def cell(self, k: int, is_training: bool) -> Cell:
        """The recurrence of layer k."""
        raise NotImplementedError(f"{type(self).__name__} must say which cell it has")

    def constants(self, k: int) -> tuple[float, ...]:
        """Those of the cell of layer k."""
        return ()

    def dropped(self, k: int, x: Array, key: Array | None) -> Array:
        """The input of layer k, some of it set to 0 in training."""
        if not k or not self.dropout or key is None:
            return x
        return jnp.where(kept(key, self.dropout, x.shape), x / (1 - self.dropout), jnp.zeros((), x.dtype))

    def mask(self, k: int, name: str, x: Array, key: Array) -> Array:
        """A random array that the cell of layer k takes in training."""
        raise NotImplementedError(f"{type(self).__name__} must say what {name} is")

    # ------------------------------------------------------------------------------------------------------------------
    # Parameters

    def draw(self, key: Array, dtype: Any) -> Parameters:
        """Initial parameters of all layers."""
        params: Parameters = {}
        for k, one in enumerate(jax.random.split(key, self.num_layers)):
            params |= named(k, self.init(one, k, dtype))
        return params

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by name."""
        made = jax.eval_shape(lambda: self.draw(jax.random.key(0), jnp.float32))
        return {name: tuple(array.shape) for name, array in made.items()}

    def _factors(self, params: Parameters, k: int) -> list[Array]:
        names = [f"weight_l{k}"] if self.low_rank is None else [f"weight_l{k}_p", f"weight_l{k}_q"]
        return [params[name] for name in names]

    # ------------------------------------------------------------------------------------------------------------------
    # Calls

    def forward(
        self,
        params: Parameters,
        x: Any,
        state: Any,
        layout: tuple[Any, Any, Any],
        key: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Any]:
        """Runs all layers.

        Args:
            x: (L, B, input_size), (B, L, input_size) if batch_first, or (L, input_size).
            layout: lengths, mask, reset, as the modules take them.
            key: of random numbers in training; None otherwise.
            dtype: of products and the output; None: what those of x and weights promote to.

        Returns:
            h in the form of x, and the last state.
        """
        check, x = self.check(), as_array(x)
        axes = "L" if getattr(x, "ndim", 3) == 2 else "B L" if self.batch_first else "L B"
        x = checked(check, x, axes, self.input_size)
        return self._run(check, params, x, axes, state, layout_of(check, layout, axes), key, dtype)

    def step(self, params: Parameters, x: Any, state: Any, dtype: Any = None) -> tuple[Array, Any]:
        """One token of each sequence, x (B, input_size), or of one sequence, (input_size,)."""
        check, x = self.check("step"), as_array(x)
        self._check_steps(check)
        axes = "" if getattr(x, "ndim", 2) == 1 else "B"
        x = checked(check, x, axes, self.input_size)
        return self._run(check, params, x, axes, state, Layout(), None, dtype)

    def initial_step_state(self, batch_size: int | None, dtype: Any) -> Any:
        """The state before the first token: zeros. Without B if `batch_size` is None."""
        check = self.check("initial_step_state")
        self._check_steps(check)
        if isinstance(batch_size, bool) or not (batch_size is None or (isinstance(batch_size, int) and batch_size > 0)):
            raise check.error(
                "batch_size", f"must be a positive integer, or None for one sequence (got {batch_size!r})"
            )
        state = self._zeros(batch_size or 1, dtype)
        return state if batch_size else jax.tree.map(lambda a: a[:, 0], state)

    def _zeros(self, B: int, dtype: Any) -> Any:
        return jnp.zeros((self.num_layers, B, self.hidden_size), state_dtype(jnp.dtype(dtype)))

    def _run(
        self, check: Check, params: Parameters, x: Array, axes: str, state: Any, layout: Layout, key: Any, dtype: Any
    ) -> tuple[Array, Any]:
        dtype = jnp.promote_types(x.dtype, self._factors(params, 0)[0].dtype) if dtype is None else jnp.dtype(dtype)
        if str(dtype) not in IO_DTYPES:
            raise DtypeError(f"{check.function}: dtype must be one of {', '.join(IO_DTYPES)} (got {dtype})")
        x = x.astype(dtype)
        is_one = axes in ("", "L")
        if is_one and state is not None:
            state = jax.tree.map(lambda a: jnp.expand_dims(as_array(a), 1), state)
        before, after = self._of_layers(check, state, dtype), []
        for k in range(self.num_layers):
            keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, k))
            x, last = self._layer(k, params, self.dropped(k, x, keys[0]), before[k], layout, keys[1])
            after.append(last)
        last = self._together(after)
        return like_input(x, axes), jax.tree.map(lambda a: a[:, 0], last) if is_one else last

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
        """Layer k over x (L, B, n). `seen` (L, B, window*n) is what its gates see, where windows were made already."""
        cell, arrays = self.cell(k, key is not None), []
        for array in declared(cell):
            if array.name == "x":
                arrays.append(x)
            elif f"{array.name}_l{k}" in params:
                arrays.append(params[f"{array.name}_l{k}"])
            elif key is not None:
                arrays.append(self.mask(k, array.name, x, key))
        return layer(
            spec.text_of(cell),
            x if seen is None else seen,
            [factor.astype(x.dtype) for factor in self._factors(params, k)],
            arrays,
            state,
            window=window if seen is None else 1,
            **layout._asdict(),
            constants=self.constants(k) if cell.constants else (),
            recompute=self.recompute,
            time_parallel=self.time_parallel,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # States: that of a module is (num_layers*D, B, d), whose row k*D + q is direction q of layer k

    def _of_layers(self, check: Check, state: Any, dtype: Any, name: str = "state") -> Sequence[Any]:
        """What each layer starts from, None for zeros."""
        if state is None:
            return [None] * self.num_layers
        n = self.num_layers * self.D
        check.set("num_layers*D", n, "the module")
        check.set("hidden_size", self.hidden_size, "the module")
        state = check.array(name, as_array(state), "num_layers*D B hidden_size", (str(state_dtype(dtype)), *IO_DTYPES))
        return [state[k * self.D : (k + 1) * self.D] for k in range(self.num_layers)]

    def _together(self, states: list[Any]) -> Any:
        return states[0] if len(states) == 1 else jnp.concatenate(states)

    # ------------------------------------------------------------------------------------------------------------------
    # Checks

    def _check_steps(self, check: Check) -> None:
        if self.bidirectional:
            raise ArgumentError(
                f"{check.function}: the module is bidirectional, and its reverse direction needs all later tokens; "
                "make it with bidirectional=False to decode token by token"
            )


def named(k: int, params: dict[str, Any]) -> Parameters:
    """The parameters of layer k by their names in a module."""
    found = {f"{name}_l{k}": value for name, value in params.items()}
    weight = found.pop(f"weight_l{k}", None)
    if isinstance(weight, tuple):
        return {f"weight_l{k}_p": weight[0], f"weight_l{k}_q": weight[1]} | found
    return {f"weight_l{k}": weight} | found


def of_layer(k: int, params: Parameters) -> dict[str, Any]:
    """The parameters of layer k as functions take them."""
    names = [name for name in ("weight", "bias", "v") if f"{name}_l{k}" in params]
    found = {name: params[f"{name}_l{k}"] for name in names}
    if f"weight_l{k}_p" in params:
        found["weight"] = params[f"weight_l{k}_p"], params[f"weight_l{k}_q"]
    return found


def constructor(kind: type[Stack], init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a module that names the options of its stack, from one that takes any."""

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)

    taken = inspect.signature(init).parameters
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY if f.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if f.name in ("input_size", "hidden_size") else f.default,
        )
        for f in fields(kind)
    ]
    own = [p for p in taken.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    __init__.__signature__ = inspect.Signature([taken["self"], *options, *own])  # type: ignore[attr-defined]
    return __init__


def described(kind: type[Stack], base: type) -> str:
    """The docstring of a module: of its cell, of the options of all stacks, and of its library."""
    return "\n\n".join(inspect.getdoc(part) or "" for part in (kind, Stack, base))
