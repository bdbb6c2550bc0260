"""One layer of SRU, with the parameters and the semantics of the package `sru` 2.6.0."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import spec
from ...cells.sru import Options, sru_cell
from ...check import Check
from ...errors import ShapeError
from ..recompute import check_recompute, every
from . import given, sru_given
from .autograd import recurrence
from .layer import layer
from .projection import without_padding


class SRUCell(nn.Module):
    """One layer of Simple Recurrent Units over whole sequences (Lei et al., EMNLP 2018, equations 1 to 4).

        f[t] = sigmoid(uf[t] + v_f*c[t-1] + b_f)          c[t] = f[t]*c[t-1] + (1 - f[t])*u0[t]
        r[t] = sigmoid(ur[t] + v_r*c[t-1] + b_r)          h[t] = skip[t] + (g(c[t]) - skip[t])*m*r[t]

    u0, uf, ur (and u3) are the gates of U = x W; skip is alpha*x where input_size = D*d, u3 elsewhere, and nothing with
    ``has_skip_term=False``. Constructor, defaults, results, parameters and their initial values are those of
    `sru.SRUCell` 2.6.0; docs/migration.md lists what differs. `SRU` stacks such layers.

    Args:
        input_size: size of x.
        hidden_size: d, for each direction; D is 1, or 2 if `bidirectional`.
        dropout: probability of m, which scales the highway term g(c) - skip; one m (B, D*d) for all steps, scaled by
            1/(1 - dropout). The output as a whole is not dropped.
        rnn_dropout: the same for the input of the product with W, one mask (B, input_size); deprecated.
        bidirectional: two directions; h holds the forward one first. Where the skip is x, each direction sees its own
            half of x.
        n_proj: p > 0 makes W a product of (input_size, p) and (p, D*d*k). It takes effect only where
            p < input_size and p < D*d; elsewhere there is a warning and W is whole.
        use_tanh: deprecated, ``activation="tanh"``.
        highway_bias: the initial b_r.
        has_skip_term: False leaves the skip out, h = g(c)*m*r.
        layer_norm: normalise the input of the product with W (the skip sees x itself, but u3 what was normalised).
        normalize_after: normalise h instead; at padding h is then the bias of the norm, not 0.
        rescale: alpha = sqrt(1 + 2 exp(highway_bias)); it is kept in the buffer `scale_x`, and where the skip is u3 it
            scales the initial W instead. False: alpha = 1.
        v1: leave v out (ICLR 2018); `weight_c` is 0 and frozen. Deprecated there, not here.
        custom_m: a module that makes U (L, B, D*d*k) of x (L, B, input_size) in place of W, or a pair U, V with
            V (L, B, 2*D*d), which is added to v at each step. The last axis of U counts (D, d, k), that of V
            (D, d, 2), and beside a V `weight_c` counts (D, d, 2) as well, not (2, D, d).
        amp_recurrence_fp16: accepted; the state is float32 at any rate.
        weight_c_init: v is uniform up to this magnitude; None: with variance 1/2.
        activation: g, "identity", "tanh" or "relu".
        project_skip: "auto", as above; True: the skip is u3 wherever there is one; False: x, or an error.
        recompute: False keeps the state of every step for the backward; K >= 1 the state every K steps (True: 32), and
            the rest is computed again; "x" every 32 steps, and U is computed again, too.
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Parameters: `weight` (input_size or p, D*d*k), its columns counting (D, d, k); `weight_proj` (input_size, p) if
    n_proj takes effect; `weight_c` and `bias`, both (2*D*d,), counting (2, D, d), forget gate first; `layer_norm`.
    The Python number that the kernels take for alpha follows `scale_x` when a state dict is loaded; after writing to
    the buffer by hand, call `refresh_scale`.

    Raises:
        ArgumentError, ShapeError, DtypeError, LibraryError: naming the argument, what it is and what it must be.
    """

    weight: Tensor  # None with custom_m
    weight_proj: Tensor | None
    weight_c: Tensor
    bias: Tensor
    scale_x: Tensor
    layer_norm: nn.LayerNorm | None
    custom_m: Any  # a module, or None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        n_proj: int = 0,
        use_tanh: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        layer_norm: bool = False,
        rescale: bool = True,
        v1: bool = False,
        custom_m: nn.Module | None = None,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        *,
        activation: str = "identity",
        project_skip: bool | str = "auto",
        recompute: bool | int | str = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check = Check("SRUCell")
        self.input_size = given.size(check, "input_size", input_size)
        self.hidden_size = given.size(check, "hidden_size", hidden_size)
        self.bidirectional = given.flag(check, "bidirectional", bidirectional)
        self.num_directions = 2 if self.bidirectional else 1
        self.output_size = hidden_size * self.num_directions
        self.dropout = given.probability(check, "dropout", dropout, less_than_one=True)
        self.rnn_dropout = given.probability(check, "rnn_dropout", rnn_dropout, less_than_one=True)
        self.highway_bias = check.number("highway_bias", highway_bias)
        if abs(self.highway_bias) > 100:  # exp of more than 700 is infinite
            raise check.error("highway_bias", f"must be from -100 to 100 (got {highway_bias!r})")
        self.has_skip_term = given.flag(check, "has_skip_term", has_skip_term)
        self.rescale, self.v1 = given.flag(check, "rescale", rescale), given.flag(check, "v1", v1)
        self.normalize_after = given.flag(check, "normalize_after", normalize_after)
        self.amp_recurrence_fp16 = given.flag(check, "amp_recurrence_fp16", amp_recurrence_fp16)
        layer_norm = given.flag(check, "layer_norm", layer_norm)
        self.weight_c_init = None if weight_c_init is None else check.number("weight_c_init", weight_c_init)
        self.activation = sru_given.activation(check, activation, use_tanh)
        sizes = self.input_size, self.output_size
        self.num_matrices = 4 if sru_given.projects_skip(check, project_skip, self.has_skip_term, *sizes) else 3
        self.projection_size = sru_given.effective_projection(check, n_proj, *sizes)
        self.recompute = check_recompute(check.function, recompute)
        if custom_m is not None and not isinstance(custom_m, nn.Module):
            raise check.error("custom_m", f"must be a torch.nn.Module (got {type(custom_m).__name__})")
        if custom_m is not None and recompute == "x":
            raise check.error(
                "recompute", "is 'x', but the U of custom_m is not computed again; give a number of steps"
            )
        self.custom_m = custom_m
        self._make_parameters(layer_norm, {"device": device, "dtype": given.floating(check, dtype)})
        self._texts = self._texts_of_cells()
        self.reset_parameters()

    def _make_parameters(self, layer_norm: bool, factory: dict[str, Any]) -> None:
        """In the reference's order, which is that of the state of an optimizer."""
        n, columns = self.input_size, self.output_size * self.num_matrices
        shapes: dict[str, tuple[int, ...] | None] = {"weight_proj": None, "weight": None}
        if self.custom_m is None and self.projection_size:
            shapes = {"weight_proj": (n, self.projection_size), "weight": (self.projection_size, columns)}
        elif self.custom_m is None:
            shapes["weight"] = (n, columns)
        shapes |= {"weight_c": (2 * self.output_size,), "bias": (2 * self.output_size,)}
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **factory)))
        self.weight_c.requires_grad = not self.v1
        self.register_buffer("scale_x", torch.ones(1, device=factory["device"], dtype=torch.float32))
        normalized = self.output_size if self.normalize_after else n
        self.layer_norm = nn.LayerNorm(normalized, **factory) if layer_norm else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial parameters, in the reference's order: the same seed gives the same numbers.

        W is uniform with variance 1 over its number of rows. Then its columns are scaled: for the gates by sqrt(1/2)
        (unless v1), for u0 by sqrt(1 - dropout), for u3 by alpha, and all by sqrt(1 - rnn_dropout), and by 0.1 with
        layer_norm.
        """
        alpha = math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.rescale and self.has_skip_term else 1.0
        self.scale_x.fill_(alpha)
        self._alpha = float(np.float32(alpha))
        self.bias[: self.output_size] = 0
        self.bias[self.output_size :] = self.highway_bias
        if self.custom_m is None:
            self._reset_weight(alpha)
        elif hasattr(self.custom_m, "reset_parameters"):
            self.custom_m.reset_parameters()
        else:
            name = type(self.custom_m).__name__
            warnings.warn(f"SRUCell: custom_m keeps its parameters, as {name} has no reset_parameters()", stacklevel=2)
        if self.v1:
            self.weight_c.zero_()
        elif self.weight_c_init is not None:
            self.weight_c.uniform_(-self.weight_c_init, self.weight_c_init)
        else:
            self.weight_c.uniform_(-math.sqrt(3), math.sqrt(3)).mul_(math.sqrt(0.5))

    def _reset_weight(self, alpha: float) -> None:
        for factor in (self.weight, self.weight_proj):
            if factor is not None:
                bound = math.sqrt(3 / factor.shape[0])
                factor.uniform_(-bound, bound)
        gates = self.weight.view(-1, self.output_size, self.num_matrices)
        gates[..., 0] *= math.sqrt(1 - self.dropout)
        gates *= math.sqrt(1 - self.rnn_dropout) * (0.1 if self.layer_norm is not None else 1.0)
        if self.num_matrices == 4:
            gates[..., 3] *= alpha
        if not self.v1:
            gates[..., 1:3] *= math.sqrt(0.5)

    def forward(
        self,
        input: Tensor,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        *,
        lengths: Any = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer.

        Args:
            input: x (L, B, input_size), or (B, input_size) for one step, in the dtype of the parameters (any floating
                dtype but float64 under autocast).
            c0: (B, D*d), the state before the first step (of the reverse direction: after the last); zeros if None.
            mask_pad: (L, B), or (B,) for one step, what is not 0 is padding: h is 0 there and the state is carried.
            lengths: (B,) integers from 0 to L; later steps are padding, and the reverse direction starts at the last
                step of each sequence.
            reset: (L, B), or (B,) for one step, True: the state is 0 before this step, in the reverse direction after
                the step before it.

        Returns:
            h (L, B, D*d), or (B, D*d) for one step, in the dtype of U; c (B, D*d), the last state, which can be given
            as c0 again, in float32, or float64 for float64 x.
        """
        check = Check("SRUCell")
        one_step = isinstance(input, Tensor) and input.dim() == 2
        letters = "B input_size" if one_step else "L B input_size"
        x = sru_given.tokens(check, input, letters, self.input_size, self.bias.device, self.input_weight)
        x = (x.unsqueeze(0) if one_step else x).contiguous()
        L, B = x.shape[0], x.shape[1]
        if c0 is not None:
            c0 = sru_given.state(check, c0, "B D*d", (B, self.output_size), x)
            c0 = self._by_direction(c0, B)
        if one_step:
            mask_pad, reset = (f.reshape(1, -1) if isinstance(f, Tensor) else f for f in (mask_pad, reset))
        layout = {
            "lengths": given.lengths(check, lengths, L, B, x.device),
            "mask": sru_given.flags(check, "mask_pad", mask_pad, "L B", (L, B), x.device),
            "reset": sru_given.flags(check, "reset", reset, "L B", (L, B), x.device),
        }
        h, c = self._run(check, x, c0, layout, one_step)
        h = self.layer_norm(h) if self.layer_norm is not None and self.normalize_after else h
        c = c.squeeze(0) if self.num_directions == 1 else c.transpose(0, 1).reshape(B, self.output_size)
        return (h.squeeze(0) if one_step else h), c

    def _run(
        self, check: Check, x: Tensor, c0: Tensor | None, layout: dict[str, Any], one_step: bool
    ) -> tuple[Tensor, Tensor]:
        """x (L, B, input_size), c0 (D, B, d) or None -> h before a norm, and the last state (D, B, d)."""
        L, B, D, d = x.shape[0], x.shape[1], self.num_directions, self.hidden_size
        if self.custom_m is None:  # which may want to see padding
            x = without_padding(x, layout["lengths"], layout["mask"])
        seen = self.layer_norm(x) if self.layer_norm is not None and not self.normalize_after else x
        if self.training and self.rnn_dropout > 0:
            seen = seen * self.get_dropout_mask_((B, self.input_size), self.rnn_dropout).to(seen.dtype)
        dropped = self.training and self.dropout > 0
        # drawn before custom_m runs, as the reference does, so that one seed gives the same masks
        m = self.get_dropout_mask_((B, self.output_size), self.dropout) if dropped else None
        u, v = (None, None) if self.custom_m is None else self._custom_gates(check, seen)
        if v is None and not self.v1:
            v = self._by_direction(self.weight_c, 2)
        skips_x = self.has_skip_term and self.num_matrices == 3
        arrays: list[Tensor | None] = []
        if skips_x:
            arrays += [None if seen is x else x.view(L, B, D, d)]
        arrays += [m.view(B, D, d)] if m is not None else []
        arrays += [self._by_direction(self.bias, 2)]
        arrays += [v] if v is not None else []
        layout["constants"] = (self._alpha if self.rescale else 1.0,) if skips_x else ()
        text = self._texts["none" if v is None else "inputs" if v.dim() == 5 else "params", dropped]
        if u is None and (self.recompute == "x" or not self._turns_u(L * B, one_step)):
            return layer(text, seen, self._factors(), arrays, c0, recompute=self.recompute, **layout)
        u = self._gates(seen) if u is None else u
        arrays = [x.view(L, B, D, d) if a is None else a for a in arrays]
        return recurrence(text, u, arrays, c0, **layout, every=every(self.recompute))

    def _by_direction(self, tensor: Tensor, n: Any) -> Tensor:
        """(n*D*d,) or (n, D*d) -> (D, n, d), without a copy."""
        D, d = self.num_directions, self.hidden_size
        return tensor.reshape(1, n, d) if D == 1 else tensor.reshape(n, D, d).transpose(0, 1)

    def _turns_u(self, tokens: Any, one_step: bool) -> bool:
        """Whether U is turned rather than W: kernels have the gates outside of the channels, parameters inside.

        The smaller one is turned; a traced program decides nothing by L and B, which may be symbols.
        """
        return one_step or (not torch.compiler.is_compiling() and self.weight.shape[0] > tokens)

    def _gates(self, x: Tensor) -> Tensor:
        """U (L, B, D, k, d) of x (L, B, input_size), turned."""
        x = x if self.weight_proj is None else x @ self.weight_proj
        shape = (*x.shape[:2], self.num_directions, self.hidden_size, self.num_matrices)
        return _planar((x @ self.weight).view(shape))

    def _factors(self) -> list[Tensor]:
        """W as `project` takes it: (D, k, d, input_size), or (D, k, d, p) and (p, input_size)."""
        first = self.weight.view(-1, self.num_directions, self.hidden_size, self.num_matrices).permute(1, 3, 2, 0)
        return [first] if self.weight_proj is None else [first, self.weight_proj.t()]

    def _custom_gates(self, check: Check, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What custom_m makes of x: U (L, B, D, k, d), and v (L, B, D, 2, d), or (D, 2, d) or None."""
        L, B, D, d = x.shape[0], x.shape[1], self.num_directions, self.hidden_size
        result = self.custom_m(x)
        pair = tuple(result) if isinstance(result, (tuple, list)) else (result, None)
        if len(pair) != 2:
            raise check.error("custom_m", f"must return U, or U and V (got {len(pair)} values)")
        u, added = pair
        u = self._from_custom_m(check, "U", u, self.output_size * self.num_matrices, x)
        u = _planar(u.reshape(L, B, D, d, self.num_matrices))
        if added is None:
            return u, None
        if isinstance(added, Tensor) and added.dim() == 1 and len(added) == 2 * self.output_size:
            return u, self._by_direction(added + self.weight_c, 2)
        added = self._from_custom_m(check, "V", added, 2 * self.output_size, x)
        return u, _planar((added + self.weight_c).reshape(L, B, D, d, 2))

    def _from_custom_m(self, check: Check, name: str, value: Any, columns: int, x: Tensor) -> Tensor:
        """`value`, if it has so many columns for each of the tokens x."""
        value = given.tensor(check, f"the {name} of custom_m", value, x.device)
        L, B = x.shape[0], x.shape[1]
        if value.dim() < 2 or value.shape[-1] != columns or value.numel() != L * B * columns:
            problem = f"has shape {tuple(value.shape)}; it needs (L, B, {columns}), with L = {L}, B = {B}"
            raise check.error(f"the {name} of custom_m", problem, ShapeError)
        return value

    @property
    def input_weight(self) -> Tensor | None:
        """The matrix that sees x; None with custom_m."""
        return self.weight if self.weight_proj is None else self.weight_proj

    def get_dropout_mask_(self, size: tuple[int, ...], p: float) -> Tensor:
        """A mask of 0 with probability p and 1/(1-p) elsewhere; override it to drop in another way."""
        dtype = torch.promote_types(self.bias.dtype, torch.float32)  # 1/(1-p) rounded to 16 bit would scale h
        return torch.empty(size, dtype=dtype, device=self.bias.device).bernoulli_(1 - p).div_(1 - p)

    def refresh_scale(self) -> None:
        """Takes alpha from the buffer `scale_x`, which waits for the device; for those who write to it by hand."""
        self._alpha = float(self.scale_x)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        scale, v = state_dict.get(f"{prefix}scale_x"), state_dict.get(f"{prefix}weight_c")
        if isinstance(scale, Tensor) and scale.numel() == 1 and not scale.is_meta:
            self._alpha = float(scale)
        if self.v1 and isinstance(v, Tensor) and not v.is_meta and bool(v.any()):
            errors = args[-1]
            errors.append(f"{prefix}weight_c is not 0, but v1=True leaves it out; construct with v1=False")

    def _apply(self, fn: Any, recurse: bool = True) -> SRUCell:
        """Converts as any module does, but for alpha, which 16 bits would round."""
        super()._apply(fn, recurse)
        if self.scale_x.dtype in (torch.float16, torch.bfloat16):
            self.scale_x = torch.full((1,), self._alpha, dtype=torch.float32, device=self.scale_x.device)
        return self

    def _texts_of_cells(self) -> dict[tuple[str, bool], str]:
        """The texts that name the recurrences of this layer, by where v comes from and whether there is dropout."""
        skip = "none" if not self.has_skip_term else "projected" if self.num_matrices == 4 else "x"
        sources = ["none"] if self.v1 else ["params"]
        sources += ["params", "inputs"] if self.custom_m is not None else []
        return {
            (v, dropout): spec.text_of(sru_cell(Options(skip, self.activation, v=v, dropout=dropout)))
            for v in sources
            for dropout in (False, True)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_texts"}  # made by this release

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._texts = self._texts_of_cells()

    def extra_repr(self) -> str:
        shown = {
            "projection_size": (self.projection_size, 0),
            "dropout": (self.dropout, 0),
            "rnn_dropout": (self.rnn_dropout, 0),
            "bidirectional": (self.bidirectional, False),
            "highway_bias": (self.highway_bias, 0),
            "activation": (self.activation, "identity"),
            "v1": (self.v1, False),
            "rescale": (self.rescale, None),
            "has_skip_term": (self.has_skip_term, True),
            "project_skip": (self.num_matrices == 4, self.has_skip_term and self.input_size != self.output_size),
            "normalize_after": (self.normalize_after and self.layer_norm is not None, False),
            "recompute": (self.recompute, False),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in shown.items() if value != default]
        return ", ".join([str(self.input_size), str(self.hidden_size), *changed])


def _planar(u: Tensor) -> Tensor:
    """(L, B, D, d, k) -> (L, B, D, k, d), contiguous."""
    return u.transpose(3, 4).contiguous()
