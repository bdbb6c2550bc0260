"""The two passes of a recurrence as operations of a JAX program: custom calls, `vmap`, and division among devices.

Operands are as in `sru_rt.passes`, in the dtypes that kernels take (`operands`); but lengths are int32. Here h is
(L, B, D, d). No gradient is recorded; `autodiff` does that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ... import settings, spec
from ...dtypes import name_of
from ...errors import ArgumentError, CompileError
from ...log import warn_once
from ...passes import Layout, declared
from . import gpus, handlers, planner, reference, sharding, xla
from .reference import state_dtype
from .statement import Stated, Statement, wanted

Operands = tuple[Any, ...]

_LENGTHS = 2
_FLAGS = (2, 3, 4)  # lengths, mask, reset among the operands
_MOST_OPERATORS = 4096


def operands(stated: Stated, given: Operands) -> Operands:
    """Converts arrays to what kernels take; a gradient goes through. Some may be side by side, as users give them."""
    return given[0], *beside_u(stated, given[0].dtype, given[0].shape[2], given[1:])


def beside_u(stated: Stated, dtype: Any, D: int, given: Operands) -> Operands:
    """The operands beside U of `dtype` and D directions."""
    cell = spec.cell_of(stated.cell)
    c0, lengths, mask, reset, *arrays = given
    if len(arrays) != len(declared(cell)):
        names = ", ".join(a.name for a in declared(cell))
        raise ArgumentError(f"recurrence of {cell.name}: arrays has {len(arrays)} of them; it needs {names}")
    acc = state_dtype(dtype)
    made = []
    for a, array in zip(declared(cell), arrays):
        if a.side_by_side and array.ndim == 3:
            array = array.reshape(*array.shape[:2], D, array.shape[2] // D)
        own = a.kind == "inputs" and array.dtype in (dtype, jnp.bool_)
        array = array.astype(dtype if own else acc)
        made.append(array if a.differentiable else lax.stop_gradient(array))
    c0 = None if c0 is None else c0.astype(acc)
    mask, reset = (None if flags is None else flags.astype(bool) for flags in (mask, reset))
    return c0, None if lengths is None else _as_int32(lengths), mask, reset, *made


def side_by_side(h: Array) -> Array:
    """(L, B, D, d) as (L, B, D*d)."""
    L, B, D, d = h.shape
    return h.reshape(L, B, D * d)


def _as_int32(lengths: Array) -> Array:
    """Lengths, of which no array of JAX needs more than 31 bits."""
    if lengths.dtype == jnp.int32:
        return lengths
    most = jnp.iinfo(jnp.int32).max
    return jnp.minimum(lengths, most).astype(jnp.int32) if jnp.iinfo(lengths.dtype).max > most else lengths.astype("i4")


def forward(stated: Stated, o: Operands) -> tuple[Array, Array, Array | None]:
    """h (L, B, D, d), the last states, and the states that are kept for the backward, if any are."""
    statement = Statement(stated, tuple(a is not None for a in o))
    h, last, *saved = _operator(statement)(*(a for a in o if a is not None))
    return h, last, saved[0] if saved else None


def backward(
    stated: Stated, o: Operands, saved: Array, dh: Array, dlast: Array | None, need: tuple[bool, ...]
) -> list[Array | None]:
    """The gradients of the operands, None of those that `need` leaves out. dh is (L, B, D, d)."""
    statement = Statement(stated, tuple(a is not None for a in o), True, need, dlast is not None)
    *some, dc0 = _operator(statement)(*(a for a in (*o, saved, dh, dlast) if a is not None))
    found: list[Array | None] = [None] * len(o)
    for i, gradient in zip(wanted(need), some):
        found[i] = gradient
    found[1] = dc0 if need[1] else None
    return found


# ----------------------------------------------------------------------------------------------------------------------
# vmap. Channels know nothing of each other, and their axis is the last one of all arrays but flags. So a batch of
# recurrences is one with more channels, unless each has flags of its own: then they run one after another.


@functools.lru_cache(_MOST_OPERATORS)
def _operator(statement: Statement) -> Callable[..., tuple[Array, ...]]:
    divided = sharding.partitioned(statement, functools.partial(_run, statement))

    @jax.custom_batching.custom_vmap
    def operator(*arrays: Array) -> tuple[Array, ...]:
        return divided(*arrays)

    @operator.def_vmap
    def batched(n: int, is_batched: Sequence[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        if any(is_batched[i] for i in _places(statement, _FLAGS)):
            found = _one_by_one(operator, is_batched, arrays)
        else:
            found = _as_channels(operator, n, is_batched, arrays, _places(statement, _FLAGS))
        return found, (True,) * len(found)

    return operator


def _places(statement: Statement, operands: Sequence[int]) -> list[int]:
    """Where operands stand among the arrays of a custom call, of those that are given."""
    return [sum(statement.given[:i]) for i in operands if statement.given[i]]


def _one_by_one(operator: Any, is_batched: Sequence[bool], arrays: Sequence[Array]) -> tuple[Array, ...]:
    chosen = [i for i, it_is in enumerate(is_batched) if it_is]

    def one(parts: Sequence[Array]) -> tuple[Array, ...]:
        return operator(*put(arrays, chosen, parts))

    return lax.map(one, tuple(arrays[i] for i in chosen))


def _as_channels(
    operator: Any, n: int, is_batched: Sequence[bool], arrays: Sequence[Array], flags: Sequence[int]
) -> tuple[Array, ...]:
    def folded(array: Array, is_batched: bool) -> Array:
        *rows, d = array.shape[1:] if is_batched else array.shape
        array = jnp.moveaxis(array, 0, -2) if is_batched else jnp.broadcast_to(array[..., None, :], (*rows, n, d))
        return array.reshape(*rows, n * d)

    given = [a if i in flags else folded(a, it_is) for i, (a, it_is) in enumerate(zip(arrays, is_batched))]
    return tuple(jnp.moveaxis(r.reshape(*r.shape[:-1], n, r.shape[-1] // n), -2, 0) for r in operator(*given))


def put(values: Sequence[Any], at: Sequence[int], chosen: Sequence[Any]) -> list[Any]:
    """`values` with others at some places."""
    found = list(values)
    for i, value in zip(at, chosen):
        found[i] = value
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Custom calls. Which device will run a program is not known when it is traced, so there is a branch for each kind, of
# which all but one are dropped.


def _run(statement: Statement, *arrays: Array) -> tuple[Array, ...]:
    """The results of a pass, without scratch."""
    xla.register()
    if any(isinstance(size, int) and size == 0 for a in arrays for size in a.shape):
        return _nothing(statement, arrays)
    here = jax.default_backend()
    branches = {
        "cpu": functools.partial(_on_cpu, statement, here == "cpu"),
        "cuda": functools.partial(_on_cuda, statement, here in ("gpu", "cuda")),
    }
    if here not in ("cpu", "gpu", "cuda"):
        branches["default"] = functools.partial(_by_reference, statement)
    return lax.platform_dependent(*arrays, **branches)


def _on_cpu(statement: Statement, is_likely: bool, *arrays: Array) -> tuple[Array, ...]:
    """By a kernel, which is compiled now if it is likely to be used; where there is no compiler, by the reference."""
    has_kernel = _has_compiler(is_likely)
    if has_kernel and is_likely:
        has_kernel = planner.passes_of(statement, _layouts(arrays), "cpu")[0].has_kernel()
    return _custom_call(statement, "cpu", *arrays) if has_kernel else _by_reference(statement, *arrays)


def _has_compiler(is_likely: bool) -> bool:
    if settings.cpu_backend() == "numpy":
        return False
    try:
        handlers.compiled()
        return True
    except CompileError as error:
        if is_likely and settings.cpu_backend() == "compiled":
            raise
        if is_likely:
            warn_once(
                "xla",
                f"{error}\nUntil then recurrences in programs of JAX run as loops of its own operations: same results "
                "to rounding, but several times slower. SRU_RT_CPU=numpy silences this",
            )
        return False


def _on_cuda(statement: Statement, is_likely: bool, *arrays: Array) -> tuple[Array, ...]:
    """By kernels, which are compiled and loaded now if they are likely to be used."""
    if is_likely and gpus.here():
        statement = gpus.settled(statement, _layouts(arrays))
        gpus.load(statement, _layouts(arrays), [r for r in _results(statement, "cuda:0", arrays) if r is not None])
    return _custom_call(statement, "cuda:0", *arrays)


def _custom_call(statement: Statement, device: str, *arrays: Array) -> tuple[Array, ...]:
    given, made = sharding.letters(statement)
    D = arrays[0].shape[2]
    results = [r for r in _results(statement, device, arrays) if r is not None]
    shapes = [planner.folded(r.shape, its, D) for r, its in itertools.zip_longest(results, made, fillvalue=())]
    types = [sharding.like(arrays[0], shape, r.dtype) for r, shape in zip(results, shapes)]
    call = jax.ffi.ffi_call(xla.target(), types, vmap_method="sequential")
    buffers = [a.reshape(planner.folded(a.shape, its, D)) for a, its in zip(arrays, given)]
    found = call(*_as_buffers(statement, buffers), call=statement.text())
    return tuple(one.reshape(r.shape) for one, r, _ in zip(found, results, made))


def _results(statement: Statement, device: str, arrays: Sequence[Array]) -> list[Layout | None]:
    """Those of a custom call, scratch included."""
    passes, o = planner.passes_of(statement, _layouts(arrays), device)
    if statement.backward:
        return [*(o[i] for i in wanted(statement.need)), *passes.allocated_by_backward()]
    L, B, D, _, d = arrays[0].shape
    h, *others = passes.allocated_by_forward()
    return [h and h._replace(shape=(L, B, D, d)), *others]


def _layouts(arrays: Sequence[Array]) -> list[Layout]:
    return [Layout(tuple(a.shape), name_of(a.dtype)) for a in arrays]


def _as_buffers(statement: Statement, arrays: Sequence[Array]) -> list[Array]:
    """What a custom call is given: lengths as pairs of int32, which have the bytes of an int64."""
    at = _places(statement, (_LENGTHS,))
    pairs = [jnp.stack([low, jnp.where(low < 0, -1, 0)], -1) for low in (arrays[i] for i in at)]
    return put(arrays, at, pairs)


def _by_reference(statement: Statement, *arrays: Array) -> tuple[Array, ...]:
    left = iter(arrays)
    o = [next(left) if there else None for there in statement.given]
    stated = statement.stated
    if not statement.backward:
        h, last, before = reference.keeping(stated, o)
        kept = before[:: stated.every] if before.ndim == 4 else before[:, :: stated.every]
        return (h, last, kept) if stated.keep else (h, last)
    _, dh, *dlast = left
    chosen = [*wanted(statement.need), 1]
    _, B, D, _, d = o[0].shape
    if o[1] is None:
        n = len(spec.cell_of(stated.cell).state)
        o[1] = reference.zeros(o[0], (D, B, d) if n == 1 else (n, D, B, d), state_dtype(o[0].dtype))
    results, pullback = jax.vjp(
        lambda *some: reference.recurrence(stated, put(o, chosen, some)), *(o[i] for i in chosen)
    )
    return pullback((dh, dlast[0] if dlast else jnp.zeros_like(results[1])))


def _nothing(statement: Statement, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Of arrays without numbers, for which XLA calls no handler: the state stays what it is."""
    made = jax.eval_shape(functools.partial(_by_reference, statement), *arrays)
    found = [reference.zeros(arrays[0], r.shape, r.dtype) for r in made]
    if statement.backward and statement.dlast:
        found[-1] = arrays[-1]
    if not statement.backward and statement.given[1]:
        found[1] = arrays[1]
    return tuple(found)
