"""SRU as modules of PyTorch: stacked layers, with the interface of the package `sru` 2.6.0."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ...check import Check
from . import given, sru_given
from .packed import repack, unpack
from .projection import without_padding
from .sru_cell import SRUCell

__all__ = ["SRU", "SRUCell"]


class SRU(nn.Module):
    """Stacked layers of Simple Recurrent Units (Lei et al., EMNLP 2018).

    Constructor, defaults, results and the keys of state dicts are those of `sru.SRU` 2.6.0, so its checkpoints load and
    give the same numbers; `checkpoints.convert` turns those of other releases into its layout. docs/migration.md lists
    what is kept of its behaviour and what differs. `SRUCell` says what the options mean in each layer.

    Args:
        input_size: size of x.
        hidden_size: d, for each direction; D is 1, or 2 if `bidirectional`. Layers beyond the first see D*d.
        num_layers: number of layers.
        dropout: of the highway term, in every layer but the last.
        rnn_dropout: of the input of the product with W; deprecated.
        bidirectional: two directions, side by side in h.
        projection_size: p of a low-rank W, 0 for a whole one; or a sequence, one for each layer. It takes effect in
            layers where p < size of x and p < D*d; elsewhere there is a warning.
        use_tanh: deprecated, ``activation="tanh"``.
        layer_norm, highway_bias, has_skip_term, rescale, v1, amp_recurrence_fp16, normalize_after, weight_c_init,
            activation, recompute: as in `SRUCell`, for every layer (rescale is False here).
        nn_rnn_compatible_return: states are (num_layers*D, B, d), as those of torch.nn.RNN, not (num_layers, B, D*d).
        custom_m: a module, copied for each layer, or a sequence of one for each layer.
        proj_input_to_hidden_first: where input_size differs from D*d, `input_to_hidden` maps x to D*d first.
        project_skip: as in `SRUCell`, or a sequence, one for each layer.
        batch_first: x and h are (B, L, ...), mask_pad and reset (B, L); states are as ever.
        device, dtype: of the parameters.

    Raises:
        ArgumentError, ShapeError, DtypeError, LibraryError: naming the argument, what it is and what it must be.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int | Sequence[int] = 0,
        use_tanh: bool = False,
        layer_norm: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        rescale: bool = False,
        v1: bool = False,
        nn_rnn_compatible_return: bool = False,
        custom_m: nn.Module | Sequence[nn.Module] | None = None,
        proj_input_to_hidden_first: bool = False,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        *,
        activation: str = "identity",
        project_skip: bool | str | Sequence[bool | str] = "auto",
        recompute: bool | int | str = False,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check = Check("SRU")
        self.input_size = given.size(check, "input_size", input_size)
        self.hidden_size = given.size(check, "hidden_size", hidden_size)
        self.num_layers = given.size(check, "num_layers", num_layers)
        self.bidirectional = given.flag(check, "bidirectional", bidirectional)
        self.num_directions = 2 if self.bidirectional else 1
        self.output_size = hidden_size * self.num_directions
        self.dropout = given.probability(check, "dropout", dropout, less_than_one=True)
        self.rnn_dropout = given.probability(check, "rnn_dropout", rnn_dropout, less_than_one=True)
        self.projection_size, self.use_layer_norm = projection_size, bool(layer_norm)
        self.has_skip_term = given.flag(check, "has_skip_term", has_skip_term)
        self.batch_first = given.flag(check, "batch_first", batch_first)
        self.nn_rnn_compatible_return = bool(nn_rnn_compatible_return)
        _warn_of_deprecated(rnn_dropout, use_tanh)
        self.input_to_hidden = None
        if proj_input_to_hidden_first and input_size != self.output_size:
            self.input_to_hidden = nn.Linear(input_size, self.output_size, bias=False, device=device, dtype=dtype)
        first = input_size if self.input_to_hidden is None else self.output_size
        per_layer = zip(
            [first] + [self.output_size] * (num_layers - 1),
            [dropout] * (num_layers - 1) + [0.0],
            _per_layer(check, "projection_size", projection_size, num_layers),
            _per_layer(check, "project_skip", project_skip, num_layers),
            _modules(check, custom_m, num_layers),
        )
        self.rnn_lst = nn.ModuleList(
            SRUCell(
                size,
                hidden_size,
                dropout=layer_dropout,
                rnn_dropout=rnn_dropout,
                bidirectional=bidirectional,
                n_proj=n_proj,
                use_tanh=use_tanh,
                highway_bias=highway_bias,
                has_skip_term=has_skip_term,
                layer_norm=layer_norm,
                rescale=rescale,
                v1=v1,
                custom_m=module,
                amp_recurrence_fp16=amp_recurrence_fp16,
                normalize_after=normalize_after,
                weight_c_init=weight_c_init,
                activation=activation,
                project_skip=skip,
                recompute=recompute,
                device=device,
                dtype=dtype,
            )
            for size, layer_dropout, n_proj, skip, module in per_layer
        )

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for module in (*self.rnn_lst, self.input_to_hidden):
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        input: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        *,
        lengths: Any = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Runs all layers.

        Args:
            input: x (L, B, input_size), with `batch_first` (B, L, input_size), or a PackedSequence; in the dtype of the
                parameters (any floating dtype but float64 under autocast).
            c0: states before the first step (of the reverse direction: after the last); zeros if None.
                (num_layers, B, D*d), or with `nn_rnn_compatible_return` also (num_layers*D, B, d).
            mask_pad: (L, B), what is not 0 is padding: h is 0 there and the state is carried.
            lengths: (B,) integers from 0 to L; later steps are padding, and the reverse direction starts at the last
                step of each sequence. A PackedSequence has its own.
            reset: (L, B), True: the state is 0 before this step, in the reverse direction after the step before it.

        Returns:
            h (L, B, D*d) in the form of the input and in the dtype of the last layer's U; c (num_layers, B, D*d), or
            (num_layers*D, B, d) with `nn_rnn_compatible_return`, the last states, in the order of the sequences before
            they were packed, in float32 (float64 for float64 x). c can be given as c0 again.
        """
        check = Check("SRU")
        packing = None
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise check.error("lengths", "must be None for a PackedSequence, which has its own")
            x, lengths, packing = unpack(input)
            x = self._checked(check, x, "L B input_size")
        else:
            x = self._checked(check, input, "B L input_size" if self.batch_first else "L B input_size")
            x = x.transpose(0, 1).contiguous() if self.batch_first else x
        L, B = x.shape[0], x.shape[1]
        states = [None] * self.num_layers if c0 is None else self._states_of_layers(check, c0, x)
        mask_pad = self._flags(check, "mask_pad", mask_pad, L, B, x.device)
        reset = self._flags(check, "reset", reset, L, B, x.device)
        lengths = given.lengths(check, lengths, L, B, x.device)
        if self.input_to_hidden is not None:
            x = self.input_to_hidden(without_padding(x, lengths, mask_pad))
        last = []
        for cell, state in zip(self.rnn_lst, states):
            x, c = cell(x, state, mask_pad, lengths=lengths, reset=reset)
            last.append(c)
        if packing is not None:
            return repack(x, packing), self._joined(last)
        return (x.transpose(0, 1) if self.batch_first else x), self._joined(last)

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token, for decoding: that of `forward` for a sequence of it.

        In training mode dropout masks are drawn anew for each token; call ``eval()`` before decoding.

        Args:
            x_t: (B, input_size).
            state: what the last step or `forward` returned; zeros if None.

        Returns:
            h_t (B, d) and the new state, in the layout of `forward`.
        """
        check = Check("SRU.step")
        if self.bidirectional:
            raise check.error("bidirectional", "is True: the reverse direction begins at the end; use forward")
        x = self._checked(check, x_t, "B input_size")
        states = [None] * self.num_layers if state is None else self._states_of_layers(check, state, x.unsqueeze(0))
        x = x if self.input_to_hidden is None else self.input_to_hidden(x)
        last = []
        for cell, c in zip(self.rnn_lst, states):
            x, c = cell(x, c)
            last.append(c)
        return x, self._joined(last)

    def _checked(self, check: Check, x: Any, letters: str) -> Tensor:
        """x, checked against the parameters that see it first."""
        cell: Any = self.rnn_lst[0]
        first = cell.input_weight if self.input_to_hidden is None else self.input_to_hidden.weight
        return sru_given.tokens(check, x, letters, self.input_size, cell.bias.device, first)

    def _flags(self, check: Check, name: str, value: Any, L: Any, B: Any, device: torch.device) -> Tensor | None:
        """(L, B) as bool, from that, or from (B, L) if batch_first."""
        letters, sizes = ("B L", (B, L)) if self.batch_first else ("L B", (L, B))
        found = sru_given.flags(check, name, value, letters, sizes, device)
        return found.transpose(0, 1) if found is not None and self.batch_first else found

    def _states_of_layers(self, check: Check, c0: Any, x: Tensor) -> Sequence[Tensor]:
        """(B, D*d) for each layer, from either layout; which one it is shows in the sizes that the module knows."""
        n, D, d, B = self.num_layers, self.num_directions, self.hidden_size, x.shape[1]
        if self.nn_rnn_compatible_return and isinstance(c0, Tensor) and c0.dim() == 3 and c0.shape[0] != n:
            c0 = sru_given.state(check, c0, "num_layers*D B d", (n * D, B, d), x)
            return c0.reshape(n, D, B, d).transpose(1, 2).reshape(n, B, D * d).unbind(0)
        return sru_given.state(check, c0, "num_layers B D*d", (n, B, D * d), x).unbind(0)

    def _joined(self, states: list[Tensor]) -> Tensor:
        """The states (B, D*d) of all layers, in the layout that the module returns."""
        n, D, d, B = self.num_layers, self.num_directions, self.hidden_size, states[0].shape[0]
        c = torch.stack(states)
        if self.nn_rnn_compatible_return:
            return c.view(n, B, D, d).transpose(1, 2).reshape(n * D, B, d)
        return c

    def extra_repr(self) -> str:
        flags = ("bidirectional", "batch_first", "nn_rnn_compatible_return")
        shown = [f"{name}=True" for name in flags if getattr(self, name)]
        return ", ".join([str(self.input_size), str(self.hidden_size), f"num_layers={self.num_layers}", *shown])


def _per_layer(check: Check, name: str, value: Any, num_layers: int) -> Iterable[Any]:
    """One value for each layer, from one for all or a sequence."""
    if not isinstance(value, (list, tuple, nn.ModuleList)):
        return [value] * num_layers
    if len(value) != num_layers:
        raise check.error(name, f"must be one, or a sequence of num_layers = {num_layers} (got {len(value)})")
    return value


def _modules(check: Check, custom_m: Any, num_layers: int) -> Iterable[Any]:
    """A module for each layer: those given, or copies of the one given."""
    if isinstance(custom_m, (list, tuple, nn.ModuleList)) or custom_m is None:
        return _per_layer(check, "custom_m", custom_m, num_layers)
    return [copy.deepcopy(custom_m) for _ in range(num_layers)]


def _warn_of_deprecated(rnn_dropout: float, use_tanh: bool) -> None:
    for name, value, instead in (
        ("rnn_dropout", rnn_dropout, "dropout"),
        ("use_tanh", use_tanh, 'activation="tanh"'),
    ):
        if value:
            warnings.warn(f"SRU: {name} is deprecated; use {instead}", DeprecationWarning, stacklevel=3)
