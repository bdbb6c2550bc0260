"""Checkpoints of other releases of the package `sru`, in the layout that `SRU` and `SRUCell` load.

State dicts of 2.3.x to 2.6.0 load as they are. Those of 3.0.0-dev, of 2.1.7 and before, and of 2017 name and shape
the same numbers in other ways; `convert` brings them here. What a state dict does not hold has to be said when the
module is constructed: `has_skip_term`, `rescale`, the activation, `bidirectional`, and which norm there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError

__all__ = ["convert"]


def convert(state_dict: Mapping[str, Any], *, custom_m: bool = False) -> dict[str, Any]:
    """A state dict that `SRU` and `SRUCell` load, from one of any release of the package `sru`.

    ========================================================  ======================================================
    found                                                     becomes
    ========================================================  ======================================================
    3.0.0-dev: transform_module.weight (D*d*k, n)             weight (n, D*d*k), its transpose
    3.0.0-dev: transform_module.0.weight (p, n),              weight_proj (n, p), weight (p, D*d*k); their product
    transform_module.1.weight (D*d*k, p)                      where a projection of size p takes no effect here
    3.0.0-dev: transform_module.*, with custom_m=True         custom_m.*, for a module of the user's
    <= 2.1.7: gain, of weight_norm=True                       weight, normalised by columns and times gain
    <= 2.1.7: ln_lst.{i}.a and .b, of layer_norm=True         rnn_lst.{i}.layer_norm.weight and .bias
    2017: no weight_c, or no scale_x                          zeros, as v1=True has them; 1
    ========================================================  ======================================================

    The norm of 2.1.7 and before follows each layer (``layer_norm=True, normalize_after=True``) and takes the unbiased
    variance v of n numbers, over sqrt(v + 1e-6). The conversion accounts for v; for the same numbers to the last digit
    set ``cell.layer_norm.eps = 1e-6*(n - 1)/n``, which is 1e-5 otherwise.

    Args:
        state_dict: of `SRU` or `SRUCell`, or of a model that contains them; all other entries are left as they are.
        custom_m: whether the `transform_module` of 3.0.0-dev was one of the user's.

    Raises:
        ArgumentError: it is one of SRU++, whose attention is not built in. With custom_m=True its entries are renamed
            for a custom_m that computes it.
    """
    found = dict(state_dict)
    for key in state_dict:
        prefix, found_in_key, rest = key.rpartition("transform_module.")
        is_cell_of_3 = bool(found_in_key) and f"{prefix}weight_c" in state_dict
        if is_cell_of_3 and custom_m:
            found[f"{prefix}custom_m.{rest}"] = found.pop(key)
        elif is_cell_of_3 and rest in ("weight", "1.weight"):
            _from_transform_module(found, prefix)
        elif is_cell_of_3 and rest != "0.weight":
            raise ArgumentError(
                f"convert: state_dict has {key!r}, of SRU++ or of a module of the user's; pass custom_m=True to "
                f"name it {prefix}custom_m.{rest}, and construct SRU with a custom_m that has such parameters"
            )
        elif key.endswith("gain") and f"{key.removesuffix('gain')}weight_c" in found:
            _apply_gain(found, key.removesuffix("gain"))
        elif norm := re.fullmatch(r"(.*\b)?ln_lst\.(\d+)\.([ab])", key):
            _from_old_norm(found, key, *norm.groups(""))
    for key in list(found):
        cell = re.fullmatch(r"(|.*\brnn_lst\.\d+\.)bias", key)
        if cell is not None:
            _complete(found, cell[1])
    return found


def _from_transform_module(found: dict[str, Any], prefix: str) -> None:
    """One linear map, or two, in the layout of `weight` and `weight_proj`."""
    inner = found.pop(f"{prefix}transform_module.0.weight", None)
    outer = found.pop(f"{prefix}transform_module.{'weight' if inner is None else '1.weight'}")
    if inner is None:
        found[f"{prefix}weight"] = outer.t().contiguous()
        return
    p, n = inner.shape
    output_size = len(found[f"{prefix}bias"]) // 2
    if p < min(n, output_size):
        found[f"{prefix}weight_proj"], found[f"{prefix}weight"] = inner.t().contiguous(), outer.t().contiguous()
    else:
        found[f"{prefix}weight"] = (outer @ inner).t().contiguous()


def _apply_gain(found: dict[str, Any], prefix: str) -> None:
    weight, gain = found[f"{prefix}weight"], found.pop(f"{prefix}gain")
    found[f"{prefix}weight"] = weight * (gain / weight.norm(dim=0))


def _from_old_norm(found: dict[str, Any], key: str, before: str, layer: str, letter: str) -> None:
    value: Tensor = found.pop(key)
    n = len(value)
    name, scale = ("weight", math.sqrt((n - 1) / n)) if letter == "a" else ("bias", 1.0)
    found[f"{before}rnn_lst.{layer}.layer_norm.{name}"] = value * scale


def _complete(found: dict[str, Any], prefix: str) -> None:
    """Adds what cells of 2017 do not have."""
    weight, bias = found.get(f"{prefix}weight"), found[f"{prefix}bias"]
    if isinstance(weight, Tensor) and weight.dim() == 2 and 2 * weight.shape[1] in (3 * len(bias), 4 * len(bias)):
        found.setdefault(f"{prefix}weight_c", torch.zeros_like(bias))
        found.setdefault(f"{prefix}scale_x", torch.ones(1, device=bias.device))
