"""Initial parameters as pytrees, drawn by keys of JAX."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import sru_rt

_LEFT_OUT = ("rng", "like")  # of the core's arguments: the key says both


class _Draws:
    """Random numbers of JAX, for which the core asks as it asks a generator of NumPy."""

    def __init__(self, key: Array, dtype: Any) -> None:
        self._key = key
        self._dtype = jnp.promote_types(dtype, jnp.float32)

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> Array:
        self._key, key = jax.random.split(self._key)
        # Of a flat array XLA compiles the random numbers several times faster.
        return jax.random.uniform(key, (prod(shape),), self._dtype, low, high).reshape(shape)


def kept(key: Array, dropped: float, shape: tuple[int, ...]) -> Array:
    """A mask of a shape, True with the probability 1 - dropped."""
    return jax.random.bernoulli(key, 1 - dropped, (prod(shape),)).reshape(shape)


def _with_key(core: Callable[..., Any]) -> Callable[..., Any]:
    """An init function of the core that takes a key in place of a generator."""

    def init(
        key: Array, d_in: int, d: int, *, dtype: Any = jnp.float32, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        refused = [name for name in _LEFT_OUT if name in options]
        if refused:
            raise TypeError(f"{core.__name__}() got an unexpected keyword argument {refused[0]!r}; pass a key first")
        made = core(d_in, d, rng=_Draws(key, dtype), dtype=dtype, **options)
        params: dict[str, Any] = {}
        for name, value in made.items():
            if isinstance(value, tuple):
                params[name] = tuple(map(jnp.asarray, value))
            elif isinstance(value, (Array, np.ndarray)):
                params[name] = jnp.asarray(value)
        return params, {name: value for name, value in made.items() if name not in params}

    taken = [p for name, p in inspect.signature(core).parameters.items() if name not in _LEFT_OUT]
    key = inspect.Parameter("key", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Array)
    init.__name__ = init.__qualname__ = core.__name__
    described: Any = init  # functions may have a signature, of which type checkers know nothing
    described.__signature__ = inspect.Signature([key, *taken])
    init.__doc__ = f"""`sru_rt.{core.__name__}` with random numbers of JAX, also in programs::

        params, options = {core.__name__}(jax.random.key(0), d_in, d)
        h, last = {core.__name__.removesuffix("_init")}(x, **params, **options)

    Args:
        key: of `jax.random`.

    All else, distributions and errors as `sru_rt.{core.__name__}`, without {" and ".join(_LEFT_OUT)}.

    Returns:
        params, a dict of arrays (and a pair of them for a low-rank weight), which is a pytree to differentiate by; and
        options, a dict of what is no array, such as alpha, which is a constant of a program.
    """
    return init


sru_init = _with_key(sru_rt.sru_init)
qrnn_init = _with_key(sru_rt.qrnn_init)
mingru_init = _with_key(sru_rt.mingru_init)
minlstm_init = _with_key(sru_rt.minlstm_init)
