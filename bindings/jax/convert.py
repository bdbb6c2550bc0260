"""Parameters of the modules for PyTorch as those of JAX, and back. PyTorch is not needed, nor imported.

State dicts are those of `SRU` and `SRUCell`, in the layout of the package `sru` 2.6.0, and of `QRNN`, `MinGRU` and
`MinLSTM` of `sru_rt.bindings.torch`. They may hold tensors, or whatever else `numpy.asarray` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...check import Check
from ...errors import ShapeError
from .stack import named, of_layer

NDArray = np.ndarray[Any, Any]
Layer = tuple[dict[str, Any], dict[str, Any]]

_CELLS = ("sru", "qrnn", "mingru", "minlstm")
_OF_SRU = ("weight", "weight_proj", "weight_c", "bias", "scale_x")


def from_torch(state_dict: Mapping[str, Any], like: Any, *, prefix: str = "") -> Any:
    """A copy of a module of `sru_rt.bindings.jax.nnx` or `.equinox` with the parameters of one for PyTorch.

    Args:
        state_dict: of the module for PyTorch, or of a model that contains it.
        like: the module, with the sizes and options of the other one. Its dtypes stay.
        prefix: what the names of the module's entries begin with in the state dict of a model, such as "encoder.".

    Raises:
        ArgumentError, ShapeError: an entry is missing, unknown, of the wrong shape, or belongs to other options.
    """
    check, stack = Check("from_torch"), _stack(Check("from_torch"), "like", like)
    cell = type(stack).__name__.lower()
    layers = _layers(check, state_dict, cell, stack.D, prefix)
    if len(layers) != stack.num_layers:
        raise check.error(
            "state_dict", f"has {len(layers)} layers; like has {stack.num_layers}: construct it with num_layers"
        )
    found: dict[str, Any] = {}
    for k, (params, options) in enumerate(layers):
        if cell == "sru":
            _suit_sru(check, stack, k, params, options)
        found |= named(k, params)
    now, shapes = like.parameters(), stack.shapes()
    for name in dict.fromkeys([*shapes, *found]):
        there, needed = name in found, name in shapes
        if there != needed:
            problem = f"has {name}, for which like has no place" if there else f"lacks {name}, which like has"
            raise check.error("state_dict", f"{problem}; construct like with the options of the other module")
        if tuple(found[name].shape) != shapes[name]:
            got = f"{name} has shape {tuple(found[name].shape)}, as JAX has it; like needs {shapes[name]}"
            raise check.error("state_dict", f"is of other sizes: {got}", ShapeError)
    return like.with_parameters({name: jnp.asarray(value, now[name].dtype) for name, value in found.items()})


def to_torch(module: Any, *, prefix: str = "") -> dict[str, NDArray]:
    """The state dict, of NumPy arrays, of the module for PyTorch that computes the same.

    ``other.load_state_dict({name: torch.tensor(a) for name, a in to_torch(module).items()})`` loads it into one with
    the same sizes and options. bfloat16 becomes float32, which holds the same numbers.

    Raises:
        ArgumentError: the module has options that the one for PyTorch has not.
    """
    check, stack = Check("to_torch"), _stack(Check("to_torch"), "module", module)
    cell, params = type(stack).__name__.lower(), module.parameters()
    if cell == "sru":
        _refuse_unknown(check, stack, "module")
    layers: list[Layer] = []
    for k in range(stack.num_layers):
        is_scaled = bool(stack.cell(k, is_training=False).constants)
        layers.append((of_layer(k, params), {"alpha": stack.constants(k)[0]} if is_scaled else {}))
    return _state_dict(check, layers, cell, prefix)


def layers_from_torch(
    state_dict: Mapping[str, Any], cell: str, *, directions: int = 1, prefix: str = ""
) -> list[Layer]:
    """The parameters of each layer as the functions of `sru_rt.bindings.jax` take them.

    Args:
        state_dict, prefix: as for `from_torch`.
        cell: "sru", "qrnn", "mingru" or "minlstm".
        directions: 1 or 2, which a state dict of `SRU` does not tell.

    Returns:
        For each layer a pair (params, options), as `sru_init` and the like return: ``sru(x, **params, **options)``.
        Options that a state dict does not tell, such as highway or pooling, are not among them.

    Raises:
        ArgumentError, ShapeError: an entry is missing, unknown, or of a shape that goes badly with another one.
    """
    check = Check("layers_from_torch")
    check.choice("cell", cell, _CELLS)
    check.choice("directions", directions, (1, 2))
    return [
        ({name: _each(jnp.asarray, value) for name, value in params.items()}, options)
        for params, options in _layers(check, state_dict, cell, directions, prefix)
    ]


def layers_to_torch(layers: Sequence[Layer], cell: str, *, prefix: str = "") -> dict[str, NDArray]:
    """The state dict, of NumPy arrays, of a module for PyTorch from what `layers_from_torch` returns."""
    check = Check("layers_to_torch")
    check.choice("cell", cell, _CELLS)
    return _state_dict(check, layers, cell, prefix)


# ----------------------------------------------------------------------------------------------------------------------
# From PyTorch


def _layers(check: Check, state_dict: Mapping[str, Any], cell: str, D: int, prefix: str) -> list[Layer]:
    read = _sru_layers if cell == "sru" else _plain_layers
    layers = read(check, state_dict, D, prefix)
    if not layers:
        first = f"{prefix}rnn_lst.0.weight or {prefix}weight_c" if cell == "sru" else f"{prefix}weight_l0"
        there = ", ".join([*state_dict][:4]) or "nothing"
        raise check.error("state_dict", f"lacks {first} (it has {there} ...); prefix says what names begin with")
    return layers


def _plain_layers(check: Check, state_dict: Mapping[str, Any], D: int, prefix: str) -> list[Layer]:
    layers: list[Layer] = []
    while True:
        k = len(layers)
        names = {name: f"{prefix}{name}_l{k}" for name in ("weight", "bias")}
        p, q = f"{names['weight']}_p", f"{names['weight']}_q"
        if not any(name in state_dict for name in (names["weight"], names["bias"], p, q)):
            return layers
        if p in state_dict or q in state_dict:
            weight: Any = (_entry(check, state_dict, p), _entry(check, state_dict, q))
        else:
            weight = _entry(check, state_dict, names["weight"])
        params = {"weight": weight}
        if names["bias"] in state_dict:
            params["bias"] = _entry(check, state_dict, names["bias"])
        layers.append((params, {}))


def _sru_layers(check: Check, state_dict: Mapping[str, Any], D: int, prefix: str) -> list[Layer]:
    places: list[str] = []
    while any(key.startswith(f"{prefix}rnn_lst.{len(places)}.") for key in state_dict):
        places.append(f"{prefix}rnn_lst.{len(places)}.")
    if not places and f"{prefix}weight_c" in state_dict:
        places = [prefix]
    return [_sru_layer(check, state_dict, D, place) for place in places]


def _sru_layer(check: Check, state_dict: Mapping[str, Any], D: int, place: str) -> Layer:
    for key in state_dict:
        inner = key.removeprefix(place).split(".")[0]
        if key.startswith(place) and inner in ("layer_norm", "custom_m", "transform_module"):
            problem = f"has {key}, for which the modules for JAX have no place"
            way = "convert that of other releases first, by sru_rt.bindings.torch.checkpoints"
            raise check.error("state_dict", f"{problem}; {way}" if inner == "transform_module" else problem)
    weight, bias, v = (_entry(check, state_dict, place + name) for name in ("weight", "bias", "weight_c"))
    scale = _entry(check, state_dict, f"{place}scale_x")
    d, k = bias.size // (2 * D), weight.shape[-1] * 2 // max(bias.size, 1)
    if weight.ndim != 2 or bias.shape != (2 * D * d,) or v.shape != bias.shape or weight.shape[1] != D * d * k:
        got = f"weight {weight.shape}, bias {bias.shape}, weight_c {v.shape}"
        needed = f"(n, D*d*k), (2*D*d,), (2*D*d,), with D = {D} directions and k = 3 or 4 gates"
        raise check.error("state_dict", f"has at {place or 'its top'} the shapes {got}; it needs {needed}", ShapeError)
    if k not in (3, 4):
        raise check.error("state_dict", f"has {k} gates in {place}weight; SRU has 3 or 4", ShapeError)
    first = weight.reshape(-1, D, d, k).transpose(1, 3, 2, 0)
    params: dict[str, Any] = {"weight": first}
    if f"{place}weight_proj" in state_dict:
        params["weight"] = (first, _entry(check, state_dict, f"{place}weight_proj").T)
    params |= {"bias": _by_direction(bias, D, d), "v": _by_direction(v, D, d)}
    return params, {"alpha": float(scale.reshape(-1)[0])} if k == 3 else {}


def _by_direction(array: NDArray, D: int, d: int) -> NDArray:
    return array.reshape(2, D, d).transpose(1, 0, 2)


def _suit_sru(check: Check, stack: Any, k: int, params: dict[str, Any], options: dict[str, Any]) -> None:
    """Compares what a state dict says beside shapes with the options of a module."""
    _refuse_unknown(check, stack, "like")
    if not stack.recurrent and params.pop("v").any():
        raise check.error(
            "state_dict", f"has a weight_c that is not 0 in layer {k}; construct like with recurrent=True"
        )
    alpha = stack.constants(k)[0]
    if stack.cell(k, is_training=False).constants and not np.isclose(options.get("alpha", alpha), alpha, rtol=1e-6):
        found = options["alpha"]
        raise check.error(
            "state_dict", f"has scale_x = {found:.9g} in layer {k}, and like alpha = {alpha:.9g}; construct it with "
            f"alpha={found:.9g}"
        )  # fmt: skip


def _refuse_unknown(check: Check, stack: Any, name: str) -> None:
    for option, wanted in (("reset_gate", True), ("reset_on", "previous")):
        if getattr(stack, option) != wanted:
            raise check.error(name, f"has {option}={getattr(stack, option)!r}, which SRU for PyTorch has not")


# ----------------------------------------------------------------------------------------------------------------------
# To PyTorch


def _state_dict(check: Check, layers: Sequence[Layer], cell: str, prefix: str) -> dict[str, NDArray]:
    found: dict[str, NDArray] = {}
    for k, (params, options) in enumerate(layers):
        arrays = {name: _each(_array, value) for name, value in params.items() if value is not None}
        if "weight" not in arrays:
            raise check.error(f"layers[{k}]", "has no weight")
        if cell == "sru":
            found |= _sru_entries(check, f"{prefix}rnn_lst.{k}.", k, arrays, options)
        else:
            found |= {f"{prefix}{name}": value for name, value in named(k, arrays).items()}
    return found


def _sru_entries(
    check: Check, place: str, k: int, params: dict[str, Any], options: dict[str, Any]
) -> dict[str, NDArray]:
    weight = params["weight"]
    first, *inner = weight if isinstance(weight, tuple) else (weight,)
    D, gates, d, rows = first.shape
    bias = params.get("bias", np.zeros((D, 2, d), first.dtype))
    v = params.get("v", np.zeros_like(bias))
    if gates not in (3, 4) or bias.shape != (D, 2, d) or v.shape != (D, 2, d):
        got = f"weight {first.shape}, bias {bias.shape}, v {v.shape}"
        problem = f"has the shapes {got}; SRU for PyTorch needs (D, 3 or 4, d, n), (D, 2, d), (D, 2, d)"
        raise check.error(f"layers[{k}]", problem, ShapeError)
    found = {"weight": first.transpose(3, 0, 2, 1).reshape(rows, D * d * gates)}
    found |= {"weight_proj": inner[0].T} if inner else {}
    found |= {"weight_c": v.transpose(1, 0, 2).reshape(-1), "bias": bias.transpose(1, 0, 2).reshape(-1)}
    found["scale_x"] = np.array([options.get("alpha", 1.0)], "f4")
    return {place + name: np.ascontiguousarray(found[name]) for name in _OF_SRU if name in found}


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


def _stack(check: Check, name: str, module: Any) -> Any:
    if not hasattr(module, "stack") or not hasattr(module, "with_parameters"):
        got = type(module).__name__
        raise check.error(name, f"must be a module of sru_rt.bindings.jax.nnx or .equinox (got {got})")
    return module.stack


def _entry(check: Check, state_dict: Mapping[str, Any], name: str) -> NDArray:
    if name not in state_dict:
        raise check.error("state_dict", f"lacks {name}")
    return _array(state_dict[name])


def _array(value: Any) -> NDArray:
    """A copy as an array of NumPy, of a tensor of PyTorch also with bfloat16, which NumPy lacks."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.array(np.asarray(value))
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def _each(function: Any, value: Any) -> Any:
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)
