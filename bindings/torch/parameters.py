"""Options and parameters of the modules: layers of one cell on top of each other, as in torch.nn.LSTM."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import spec
from ...cell import Cell
from ...check import Check
from ..recompute import check_recompute
from . import given


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


class Parameters(nn.Module):
    """Options and parameters of a stack of layers; `window` is how many tokens a gate sees, all else as in `MinGRU`.

    A subclass calls `_make_parameters`, and says in `_initial_params` what there is beside weights.
    """

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
        self.recompute = check_recompute(check.function, recompute)
        self.time_parallel = time_parallel
        self.num_directions = 2 if bidirectional else 1
        if dropout and num_layers == 1:
            warnings.warn(
                f"{check.function}: dropout={dropout} acts between layers, and there is only one", stacklevel=3
            )

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
        raise NotImplementedError(f"{type(self).__name__} must say which parameters its cell has")

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

    def _check(self, method: str = "") -> Check:
        """What begins messages with the name of the class, and of the method."""
        name = type(self).__name__
        return Check(f"{name}.{method}" if method else name)

    def extra_repr(self) -> str:
        """Sizes, and the options that are not the defaults."""
        ours = next(c for c in type(self).__mro__ if c.__module__.startswith(f"{__package__}."))
        taken = inspect.signature(ours.__init__).parameters.items()
        options = {name: (getattr(self, name), p.default) for name, p in taken if hasattr(self, name)}
        changed = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed[2:]])
