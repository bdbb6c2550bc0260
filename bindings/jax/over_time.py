"""One long sequence on several devices, each of which has a stretch of its steps.

Only for cells that are affine in their states: then what a stretch does to the state that it begins with is a product
of matrices, and the state that it would end with from zeros. Devices gather these, each works out its own initial
state, and its kernel runs once more from there. The backward goes the same way in the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from ... import spec
from ...errors import LibraryError
from ...inputs import Input
from ...passes import Call
from ..recompute import Recompute
from . import autodiff, ops, projection, reference, sharding
from .ops import Operands
from .statement import Stated

Axis = Any  # the name of an axis of a mesh, or a tuple of names


def size(function: str, axis: Axis) -> int:
    """The number of stretches."""
    try:
        return lax.axis_size(axis) if hasattr(lax, "axis_size") else int(lax.psum(1, axis))
    except NameError:
        raise LibraryError(
            f"{function}: axis_name is {axis!r}, of which nothing is known here; call it inside jax.shard_map over a "
            "mesh with an axis of that name"
        ) from None


def check(function: str, cell: str) -> None:
    """Raises unless the steps of a cell can be divided."""
    found = spec.cell_of(cell)
    if not (found.affine and found.formula.jacobian):
        raise LibraryError(
            f"{function}: steps can be divided among devices only of a cell that is affine in one or two states, and "
            f"{found.name} is not; divide sequences or channels instead"
        )


def recurrence(
    function: str,
    axis: Axis,
    cell: str,
    u: Array,
    arrays: Sequence[Array] = (),
    c0: Array | None = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    reset: Array | None = None,
    constants: Sequence[float] = (),
    every: int = 1,
    time_parallel: bool | str = "auto",
) -> tuple[Array, Array]:
    """As `autodiff.recurrence`, of a stretch: lengths are those of the stretch, c0 and the last states of the whole."""
    check(function, cell)
    size(function, axis)
    stated = Stated.of(Call(cell, tuple(constants), every, str(time_parallel)))
    return _jitted(stated, axis, (u, c0, lengths, mask, reset, *arrays))


@partial(jax.jit, static_argnums=(0, 1))
def _jitted(stated: Stated, axis: Axis, given: Operands) -> tuple[Array, Array]:
    return of_operands(stated, axis, ops.operands(stated, given))


def of_operands(stated: Stated, axis: Axis, o: Operands) -> tuple[Array, Array]:
    """h (L, B, D*d) of a stretch, and the last states of the whole, differentiable."""
    u, c0, *others = o
    if c0 is None:
        c0 = reference.zeros(u, *_states(stated, u))
    h, last = _stretch(stated, axis, sharding.alike((u, c0, *others)))
    return ops.side_by_side(h), lax.psum(jnp.where(_is_end(axis, last), last, 0), axis)


def _states(stated: Stated, u: Array) -> tuple[tuple[Any, ...], Any]:
    """Shape and dtype of initial states beside U."""
    (_, B, D, _, d), n = u.shape, len(spec.cell_of(stated.cell).state)
    return ((D, B, d) if n == 1 else (n, D, B, d)), reference.state_dtype(u.dtype)


def _is_end(axis: Axis, state: Array, *, first: bool = False) -> Array:
    """Whether this stretch is the last one (or the first) of each direction, (D, 1, 1)."""
    here, most = lax.axis_index(axis), size("sharded_recurrence", axis) - 1
    ends = [0, most] if first else [most, 0]
    return jnp.stack([here == one for one in ends[: state.shape[-3]]])[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# A stretch. States are (n, D, B, d) here, matrices (n, n, D, B, d).


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stretch(stated: Stated, axis: Axis, o: Operands) -> tuple[Array, Array]:
    """h (L, B, D, d) and the last states of this stretch, of which c0 are the initial states of the first."""
    _, before = _from_the_others(stated, axis, o)
    h, last, _ = ops.forward(stated._replace(keep=False), before)
    return h, last


def _stretch_forward(stated: Stated, axis: Axis, given: Any) -> Any:
    matrix, before = _from_the_others(stated, axis, autodiff.values(given))
    h, last, saved = autodiff.keeping(stated, before)
    return (h, last), (matrix, before, saved)


def _stretch_backward(stated: Stated, axis: Axis, residual: Any, seeds: Any) -> tuple[Any]:
    matrix, before, saved = residual
    dh, dlast = (None if isinstance(seed, SymbolicZero) else seed for seed in seeds)
    if dh is None and dlast is None:
        return (autodiff.gradients(stated, before, saved, dh, dlast),)
    dc0 = autodiff.gradients(stated, before, saved, dh, dlast, only=1)[1]
    transposed = jnp.swapaxes(matrix, 0, 1)
    after = _fold(axis, transposed, dc0, jnp.zeros_like(dc0), backward=True)
    # The state that leaves a stretch in the second direction is forgotten if its first step begins anew.
    leaving = _kept_on_leaving(before) * after
    dlast = leaving if dlast is None else dlast + leaving
    du, dc0, *others = autodiff.gradients(stated, before, saved, dh, dlast)
    return ((du, jnp.where(_is_end(axis, before[1], first=True), dc0, 0), *others),)


_stretch.defvjp(_stretch_forward, _stretch_backward, symbolic_zeros=True)


def _from_the_others(stated: Stated, axis: Axis, o: Operands) -> tuple[Array, Operands]:
    """What this stretch makes of states that leave it, and its operands with those that reach it."""
    u, c0, *others = o
    kept = _kept_on_leaving(o)
    matrix = kept * reference.product_of_jacobians(stated, o)
    zeros = jnp.zeros_like(c0)
    _, last = autodiff.without_keeping(stated, (u, zeros, *others))
    return matrix, (u, _fold(axis, matrix, kept * last, c0), *others)


def _kept_on_leaving(o: Operands) -> Array:
    """0 where the state is forgotten between this stretch and the next one of its direction, (D, B, 1)."""
    u, c0, lengths, _, reset, *_ = o
    D, B = u.shape[2:0:-1]
    kept = jnp.ones((D, B, 1), c0.dtype)
    if D == 1 or reset is None or u.shape[0] == 0:
        return kept
    begins = reset[0] if lengths is None else reset[0] & (lengths > 0)
    return kept.at[1, :, 0].set(jnp.where(begins, 0, 1))


def _fold(axis: Axis, matrix: Array, last: Array, first: Array, backward: bool = False) -> Array:
    """The states (adjoints, backward) that reach this stretch, if `first` reach the first one (the last one)."""
    shape, n = first.shape, matrix.shape[0]
    first, last = (a.reshape(n, *shape[-3:]) for a in (first, last))
    matrices, lasts = (lax.all_gather(a, axis) for a in (matrix, last))
    here = lax.axis_index(axis)
    found = []
    for q in range(shape[-3]):
        flip = bool(q) != backward

        def step(state: Array, one: tuple[Array, Array]) -> tuple[Array, Array]:
            matrix, last = one
            return (matrix * state[None]).sum(1) + last, state

        _, reaching = lax.scan(step, first[:, q], (matrices[:, :, :, q], lasts[:, :, q]), reverse=flip)
        found.append(lax.dynamic_index_in_dim(reaching, here, keepdims=False))
    return jnp.stack(found, 1).reshape(shape)


# ----------------------------------------------------------------------------------------------------------------------
# What a window of tokens sees of the neighbours


def project(
    function: str, axis: Axis, given: Input, lengths: Array | None, mask: Array | None, reset: Array | None
) -> Array:
    """U (L, B, D, k, d) of a stretch; lengths are those of the stretch."""
    if given.window == 1:
        return projection.project(given.x, given.factors, 1, lengths, mask, reset)
    L, more = given.x.shape[0], given.window - 1
    x = _with_neighbours(function, axis, projection.without_padding(given.x, lengths, mask), more)
    reset = None if reset is None else _with_neighbours(function, axis, reset, more)
    return projection.project(x, given.factors, given.window, None, None, reset)[more : more + L]


def _with_neighbours(function: str, axis: Axis, array: Array, steps: int) -> Array:
    """An array (L, ...) with the last steps of the stretch before and the first of the one after; zeros at the ends."""
    if array.shape[0] < steps:
        raise LibraryError(
            f"{function}: each device has {array.shape[0]} steps, and a window of {steps + 1} tokens needs at least "
            f"{steps}; use fewer devices along time"
        )
    count = size(function, axis)
    onward = [(i, i + 1) for i in range(count - 1)]
    before = lax.ppermute(array[array.shape[0] - steps :], axis, onward)
    after = lax.ppermute(array[:steps], axis, [(j, i) for i, j in onward])
    return jnp.concatenate([before, array, after])


def sharded_recurrence(
    function: Callable[..., Any],
    x: Array,
    *args: Any,
    axis_name: Axis,
    recompute: bool | int = False,
    lengths: Any = None,
    **options: Any,
) -> tuple[Array, Any]:
    """Runs one long sequence that is divided along time, inside `jax.shard_map`::

        def stretch(x, weight, bias):
            return sharded_recurrence(sru_rt.mingru_forward, x, weight, bias, axis_name="time")

        run = jax.shard_map(stretch, mesh=mesh, in_specs=(P("time"), P(), P()), out_specs=(P("time"), P()))

    Each device runs its own steps through the fused kernel, twice forward and twice backward; between, devices
    exchange what their stretches do to a state, as much as 2 N states for N devices. Equal to one device but for
    rounding, gradients included.

    Args:
        function: a ``*_forward`` or ``*_recurrence`` of `sru_rt` or of an own cell, affine in at most two states (SRU
            without v, QRNN, minGRU, minLSTM).
        x: (L/N, B, d_in), or u (L/N, B, D, k, d): the steps of this device, in the order of the axis.
        args, options: as `function` has them. mask, reset and other arrays with the axis L are of this stretch; c0,
            weights and parameters are the same everywhere.
        axis_name: of the axis of the mesh along which time is divided.
        recompute: as for `sru`, but "x".
        lengths: (B,) integers, of the whole sequences.

    Returns:
        h (L/N, B, D*d) of this stretch, and the last states of the whole, the same everywhere.

    Raises:
        LibraryError: the cell is not affine in its states, there is no such axis, or a stretch is shorter than what a
            window sees. All else as `function`.
    """
    function = getattr(function, "__wrapped__", function)
    size("sharded_recurrence", axis_name)
    if lengths is not None and hasattr(x, "shape"):
        lengths = jnp.clip(jnp.asarray(lengths) - lax.axis_index(axis_name) * x.shape[0], 0, x.shape[0])
    return function(x, *args, save=Recompute(recompute, axis_name), lengths=lengths, **options)
