"""What the modules share: layers of one cell on top of each other, as in torch.nn.LSTM, and their step for decoding."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ... import spec
from ...cell import Cell
from ...check import Check
from ...errors import ArgumentError
from . import given
from .layer import layer
from .sequences import Layout, Sequences, sequences, tokens
from .states import of_layers, together


class Recipe(NamedTuple):
    """What a module keeps of a cell; text and names, which go with it wherever it is pickled or copied to."""

    text: str
    gates: int
    states: int
    arrays: tuple[tuple[str, str], ...]  # names and kinds of what the cell takes beside gates and states

    @classmethod
    def of(cls, cell: Cell) -> Recipe:
        arrays = tuple((a.name, a.kind) for a in cell.arrays if a.kind not in ("gates", "state"))
        return cls(spec.text_of(cell), len(cell.gates), len(cell.state), arrays)


class Stack(nn.Module):
    """Layers of one cell. A subclass gives each layer its cell, and parameters beside the weight.

    Args:
        recipes: of each layer.
        window: how many tokens a gate sees.

    All else as in `MinGRU`.
    """

    _constants: tuple[float, ...] = ()

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        low_rank: int | None,
        recompute: bool | int | str,
        time_parallel: bool | str,
        window: int = 1,
    ) -> None:
        super().__init__()
        check = self._check()
        self.input_size = given.size(check, "input_size", input_size)
        self.hidden_size = given.size(check, "hidden_size", hidden_size)
        self.num_layers = given.size(check, "num_layers", num_layers)
        self.low_rank = None if low_rank is None else given.size(check, "low_rank", low_rank)
        self.window = given.size(check, "window", window)
        self.dropout = given.probability(check, "dropout", dropout)
        for name, value in (("batch_first", batch_first), ("bidirectional", bidirectional)):
            check.choice(name, value, (True, False))
        check.choice("time_parallel", time_parallel, ("auto", True, False))
        self.batch_first, self.bidirectional = bool(batch_first), bool(bidirectional)
        self.recompute = given.memory_policy(check, recompute)
        self.time_parallel = time_parallel
        self.num_directions = 2 if bidirectional else 1
        if dropout and num_layers == 1:
            warnings.warn(
                f"{check.function}: dropout={dropout} acts between layers, and there is only one", stacklevel=3
            )

    # ------------------------------------------------------------------------------------------------------------------
    # Parameters

    def _make_parameters(self, recipes: Sequence[Recipe], device: Any, dtype: torch.dtype | None) -> None:
        """Registers and initializes the parameters of all layers."""
        self._recipes = tuple(recipes)
        like = {"device": device, "dtype": given.floating(self._check(), dtype)}
        D, d = self.num_directions, self.hidden_size
        for k, recipe in enumerate(self._recipes):
            columns = self.window * self._size_of_input(k)
            if self.low_rank is None:
                shapes = {f"weight_l{k}": (D, recipe.gates, d, columns)}
            else:
                p = self.low_rank
                shapes = {f"weight_l{k}_p": (D, recipe.gates, d, p), f"weight_l{k}_q": (p, columns)}
            shapes |= {f"{name}_l{k}": (D, len(rows), d) for name, rows in self._initial_params().items()}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **like)))
        self.reset_parameters()

    def _size_of_input(self, k: int) -> int:
        return self.num_directions * self.hidden_size if k else self.input_size

    def _initial_params(self) -> dict[str, Sequence[Any]]:
        """Parameters of each layer beside the weight, (D, rows, d), and the initial values of each row."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weights, uniform with variance 1 / their number of columns, and sets all else to its initial value."""
        for k in range(self.num_layers):
            for weight in self._weight(k):
                bound = math.sqrt(3 / weight.shape[-1])
                weight.uniform_(-bound, bound)
            for name, rows in self._initial_params().items():
                parameter = getattr(self, f"{name}_l{k}")
                for row, value in enumerate(rows):
                    parameter[:, row] = value.to(parameter) if isinstance(value, Tensor) else value

    def _weight(self, k: int) -> tuple[Tensor, ...]:
        """The factors of the weight of layer k."""
        if self.low_rank is None:
            return (getattr(self, f"weight_l{k}"),)
        return getattr(self, f"weight_l{k}_p"), getattr(self, f"weight_l{k}_q")

    # ------------------------------------------------------------------------------------------------------------------
    # Calls

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
        first = self._weight(0)[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        made = [
            first.new_zeros(self.num_layers, batch_size, self.hidden_size, dtype=dtype)
            for _ in range(self._recipes[0].states)
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def _forward(
        self, input: Any, state: Any, lengths: Any, mask: Any, reset: Any, values: Mapping[str, Any] | None = None
    ) -> tuple[Any, Any]:
        check, device = self._check("forward"), self._weight(0)[0].device
        seqs = sequences(check, input, self.input_size, device, self.batch_first, lengths, mask, reset)
        return self._call(check, seqs, state, values)

    def _step(self, input: Any, state: Any, values: Mapping[str, Any] | None = None) -> tuple[Tensor, Any]:
        check = self._check("step")
        self._check_steps(check)
        return self._call(check, tokens(check, input, self.input_size, self._weight(0)[0].device), state, values)

    def _call(self, check: Check, seqs: Sequences, state: Any, values: Mapping[str, Any] | None) -> tuple[Any, Any]:
        """What forward and step share once the input is time-major."""
        seqs = seqs._replace(x=self._cast(check, seqs.x))
        before, after = self._of_layers(check, seqs, seqs.state(state)), []
        prepared = self._values(check, seqs, values or {})
        x = seqs.x
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
        return layer(
            recipe.text,
            x if seen is None else seen,
            self._weight(k),
            [self._array(k, name, x, values) for name, _ in recipe.arrays],
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

    def _array(self, k: int, name: str, x: Tensor, values: Mapping[str, Any]) -> Tensor:
        """What layer k gives its cell under this name."""
        if name in values:
            return values[name][k]
        if name == "x":
            return x.reshape(*x.shape[:2], self.num_directions, self.hidden_size)
        return getattr(self, f"{name}_l{k}")

    def _values(self, check: Check, seqs: Sequences, values: Mapping[str, Any]) -> dict[str, Sequence[Tensor]]:
        """What the cell takes by name, for each layer."""
        return {}

    # ------------------------------------------------------------------------------------------------------------------
    # States, dtypes, messages

    def _of_layers(self, check: Check, seqs: Sequences, state: Any, name: str = "state") -> list[Any]:
        """What each layer starts from."""
        sizes = (self.num_layers, self.num_directions, seqs.x.shape[1], self.hidden_size)
        return of_layers(check, name, state, self._recipes[0].states, sizes, seqs.x)

    def _together(self, states: list[Any]) -> Any:
        """The state of the module from those of its layers."""
        return together(states, self._recipes[0].states)

    def _cast(self, check: Check, x: Tensor) -> Tensor:
        """x in the dtype of autocast where that is on, else checked to be in that of the parameters."""
        kind, needed = x.device.type, self._weight(0)[0].dtype
        narrowed = x.is_floating_point() and x.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
        if narrowed and torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
        given.dtype(check, "input", x, (needed,), f", or the module with .to({x.dtype})")
        return x

    def _check(self, method: str = "") -> Check:
        """What begins messages with the name of the class, and of the method."""
        return Check(".".join(filter(None, (type(self).__name__, method))))

    def _check_steps(self, check: Check) -> None:
        if self.bidirectional:
            raise ArgumentError(
                f"{check.function}: the module is bidirectional, and its reverse direction needs all later tokens; "
                "make it with bidirectional=False to decode token by token"
            )

    def extra_repr(self) -> str:
        """Sizes, and the options that are not the defaults."""
        names = inspect.signature(type(self).__init__).parameters
        options = {
            name: getattr(self, name)
            for name, parameter in names.items()
            if hasattr(self, name)
            and name not in ("self", "input_size", "hidden_size")
            and getattr(self, name) != parameter.default
        }
        sizes = [f"{self.input_size}, {self.hidden_size}"]
        return ", ".join(sizes + [f"{name}={value!r}" for name, value in options.items()])
