"""The two passes of a recurrence on operands of known layouts, prepared for bindings, which run them again and again.

The operands of a recurrence are a tuple (u, c0, lengths, mask, reset, *arrays), where `arrays` are what the cell
declares beside gates and states, and all but u and arrays may be None. U is (L, B, D, k, d), states are (D, B, d), or
(n, D, B, d) for a cell with n > 1 of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

from . import abi, chunks, launch, spec
from .cell import Array, Cell
from .check import Check
from .dtypes import IO_DTYPES, name_of, state_dtype
from .errors import ArgumentError, DtypeError, ShapeError
from .launch import Threads
from .prepared import Prepared, place
from .variant import Variant

ARRAYS = 5  # where the arrays begin among the operands

_ITEMSIZES = {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_ROW_PADDING = 80  # so that rows of partial sums do not all begin at the same place of a page


class Call(NamedTuple):
    """All of a recurrence that is no array.

    `cell` is a text of `spec`. If states are to be kept for the backward, they are those before steps 0, K, 2K, ...
    with `every` = K.
    """

    cell: str
    constants: tuple[float, ...] = ()
    every: int = 1
    time_parallel: str = "auto"  # or "True", "False"
    keep: bool = True

    @property
    def plan(self) -> Hashable:
        """What a pass depends on: of constants, how many there are."""
        return self.cell, len(self.constants), self.every, self.time_parallel, self.keep


class Layout(NamedTuple):
    """An array of whose values nothing is known. Without strides (in elements) it is C-contiguous."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Pass(NamedTuple):
    """A pass and the arrays to be allocated for it, of which None is not wanted.

    The addresses that `prepared` takes are, in order: the constants; the operands; of a backward then the kept states,
    dh, dc_last and the gradients of U and arrays (0 for those of other operands); and the results: of a forward h (L,
    B, D*d), the last states, the kept states; of a backward the gradient of the initial states. The rest is scratch.
    """

    prepared: Prepared
    results: Sequence[Layout | None]


@cache
def declared(cell: Cell) -> tuple[Array, ...]:
    """What the arrays among the operands are."""
    return tuple(a for a in cell.arrays if a.kind not in ("gates", "state"))


def shape_of_state(cell: Cell, *axes: Any) -> tuple[Any, ...]:
    """Of all states, which have the given axes each."""
    n = len(cell.state)
    return axes if n == 1 else (n, *axes)


def shape_of_h(shape_of_u: Sequence[Any]) -> tuple[Any, ...]:
    L, B, D, _, d = shape_of_u
    return L, B, D * d


def kept(call: Call, L: Any) -> Any:
    """The number of states that are kept for the backward."""
    return -(-L // call.every) if call.keep else 0


def check(call: Call, cell: Cell, o: Sequence[Any]) -> Check:
    """Raises unless the operands, layouts or arrays of any library, fit the cell and each other; else returns sizes."""
    found, u = Check(f"recurrence of {cell.name}"), o[0]
    found.shape("u", u, "L B D k d")
    if found["k"] != len(cell.gates):
        raise ShapeError(
            f"{found.function}: u has k = {found['k']} gates, shape {tuple(u.shape)}; it needs {len(cell.gates)}: "
            f"{', '.join(cell.gates)}"
        )
    if found["D"] not in (1, 2):
        raise ShapeError(f"{found.function}: u has D = {found['D']} directions; D is 1 (forward) or 2")
    if name_of(u.dtype) not in IO_DTYPES:
        raise DtypeError(f"{found.function}: u has dtype {u.dtype}; it needs one of {', '.join(IO_DTYPES)}")
    axes = [" ".join(map(str, shape_of_state(cell, "D", "B", "d"))), "B", "L B", "L B"]
    names = [cell.initial, "lengths", "mask", "reset"]
    named = [*zip(names, axes), *((a.name, a.axes) for a in declared(cell))]
    for (name, its_axes), array in zip(named, o[1:]):
        if array is not None:
            found.shape(name, array, its_axes)
    if len(call.constants) != len(cell.constants):
        raise ArgumentError(
            f"{found.function}: constants has {len(call.constants)} numbers; it needs {len(cell.constants)}"
            f"{': ' if cell.constants else ''}{', '.join(cell.constants)}"
        )
    return found


class Passes:
    """The passes of one call on operands, each a `Layout` or None, on ``cpu`` or such as ``cuda:0``.

    Args:
        chunks: steps of the chunks of time of forward and backward, 0 for none, where they are settled already. With
            them no axis need be a number to ask for what a pass allocates.
        threads: of a framework, on which they run on the CPU; the library's own if None.

    Raises:
        ShapeError, DtypeError, ArgumentError: the operands do not fit the cell or each other.
    """

    def __init__(
        self,
        call: Call,
        operands: Sequence[Any],
        device: str = "cpu",
        *,
        chunks: tuple[int, int] | None = None,
        threads: Threads | None = None,
    ) -> None:
        cell = spec.cell_of(call.cell)
        self._check = check(call, cell, operands)
        self._call, self._cell, self._device, self._threads = call, cell, device, threads
        self._o = operands
        self._u = operands[0]
        self._shape = (self._check["L"], self._check["B"], self._check["D"], self._check["d"])
        self._acc = state_dtype(self._u.dtype)
        dtypes = {a.name: array.dtype for a, array in zip(declared(cell), operands[ARRAYS:])}
        wide = cell.bits("inputs", lambda a: dtypes[a.name] != self._u.dtype)
        narrow = cell.bits("params", lambda a: dtypes[a.name] != self._acc)
        self._variant = Variant(cell, self._u.dtype, self._acc, wide, narrow)
        self._chunks = chunks
        self._forward_chunk = self._chunk(forward=True)
        self._kept = kept(call, self._shape[0])

    @property
    def chunks(self) -> tuple[int, int]:
        """Steps of the chunks of time of forward and backward, 0 for none."""
        return self._forward_chunk, self._chunk(forward=False)

    def has_kernel(self) -> bool:
        """Whether the CPU has a compiled kernel, which is compiled now; if not, NumPy is to do the work."""
        return launch.has_kernel(self._variant)

    def allocated_by_forward(self) -> list[Layout | None]:
        """The results of `forward`."""
        L, B, D, d = self._shape
        return [
            Layout((L, B, D * d), self._u.dtype),
            self._states(D, B, d),
            self._states(self._kept, B, D, d) if self._call.keep else None,
            *self._carry(self._forward_chunk, forward=True),
        ]

    def forward(self, d_in: int = 0) -> Pass:
        """With `d_in`, of one token whose U the kernel forms: the first address is that of x (B, d_in) then, and the
        last one that of the weight (D, k, d, d_in).
        """
        _, B, D, d = self._shape
        results = self.allocated_by_forward()
        at = self._places(len(self._o) + len(results) + bool(d_in))
        h, c_last, saved = at[len(self._o) :][:3]
        given = self._given(at, self._forward_chunk)
        if d_in:
            given = given._replace(gates=[abi.NOT_WANTED] * len(self._cell.gates))
        arguments = abi.Forward(
            given=given,
            h=h,
            c_last=self._each(c_last, D * B * d),
            saved=self._each(saved if self._call.keep else 0, self._kept * B * D * d),
            x=at[0] if d_in else 0,
            weight=at[-1] if d_in else 0,
            d_in=d_in,
        )
        return Pass(self._prepared(arguments, len(at)), results)

    def backward(self, saved: Layout, dh: Layout, dlast: Layout | None, need: Sequence[bool]) -> Pass:
        """Args:
        saved, dh, dlast: the kept states, and the gradients of h (L, B, D*d) and of the last states.
        need: of which operands the gradient is wanted.
        """
        cell, (_, B, D, d) = self._cell, self._shape
        self._check.shape("saved", saved, " ".join(map(str, shape_of_state(cell, self._kept, B, D, d))))
        self._check.shape("dh", dh, f"L B {D * d}")
        chunk = self._chunk(forward=False)
        results = self.allocated_by_backward()
        _, sums, scratch, *_ = results
        rows, row = scratch.shape[1] if scratch else 0, sums.shape[-1] if sums else 0
        n = len(self._o)
        at = self._places(2 * n + 3 + len(results))
        p_saved, p_dh, p_dlast = at[n : n + 3]
        wanted = [p if needed else 0 for p, needed in zip(at[n + 3 :], need)]
        dc0, partial, states = at[2 * n + 3 :][:3]
        slots = self._slots(wanted, gradients=True)
        arguments = abi.Backward(
            given=self._given(at, chunk),
            dh=p_dh,
            dc_last=self._each(0 if dlast is None else p_dlast, D * B * d),
            saved=self._each(p_saved, self._kept * B * D * d),
            states=self._each(states if scratch else 0, rows * B * D * d),
            partial=abi.Slot(partial, row),
            dgates=slots["gates"],
            dinputs=slots["inputs"],
            dper_sequence=slots["per_sequence"],
            dparams=slots["params"],
            dc0=self._each(dc0, D * B * d),
            saved_chunk=chunks.counted_in(cell, self._forward_chunk),
        )
        return Pass(self._prepared(arguments, len(at)), results)

    def allocated_by_backward(self) -> list[Layout | None]:
        """The results of `backward`."""
        cell, (L, B, D, d), every = self._cell, self._shape, self._call.every
        chunk = self._chunk(forward=False)
        count = chunks.count(L, chunk) if chunk else 1
        scratch = launch.needs_scratch(self._variant, every, self._device)
        rows = count * min(every, chunk) if chunk else every
        sums = len(cell.params) + (len(cell.per_sequence) if chunk else 0)
        row = d + (_ROW_PADDING if self._device == "cpu" else 0)
        return [
            self._states(D, B, d),
            Layout((count, B, D, sums, row), self._acc),
            Layout((len(cell.state), rows, B, D, d), self._acc) if scratch else None,
            *self._carry(chunk, forward=False),
        ]

    def _prepared(self, arguments: abi.Forward | abi.Backward, n: int) -> Prepared:
        """Of `n` addresses beside the constants."""
        return Prepared(self._variant, arguments, len(self._call.constants) + n, self._device, self._threads)

    def _places(self, n: int) -> list[int]:
        """Of operands and results; constants come before them."""
        first = len(self._call.constants)
        return [place(first + i) for i in range(n)]

    def _states(self, *axes: int) -> Layout:
        return Layout(shape_of_state(self._cell, *axes), self._acc)

    def _chunk(self, forward: bool) -> int:
        """Steps of the chunks of time of one pass.

        The number of kept states is to depend on L alone, as a traced program must know it: a forward that counts them
        anew in chunks of no whole number of `every` steps takes all steps in order.
        """
        if self._chunks is not None:
            return self._chunks[not forward]
        call = self._call
        time_parallel = {"True": True, "False": False}.get(call.time_parallel, call.time_parallel)
        found = launch.chunk(self._variant, self._shape, forward, time_parallel, self._device)
        return 0 if forward and chunks.counted_in(self._cell, found) % call.every else found

    def _carry(self, chunk: int, forward: bool) -> list[Layout]:
        """Scratch for what chunks of time leave to each other; the last of the results."""
        if not chunk:
            return []
        return [Layout((chunks.carried(self._cell, forward, self._shape, chunk),), self._acc)]

    def _each(self, address: int, elements: int) -> list[int]:
        """The addresses of the states that follow upon each other."""
        step = elements * _ITEMSIZES[self._acc]
        return [address + i * step if address else 0 for i in range(len(self._cell.state))]

    def _given(self, at: list[int], chunk: int) -> abi.Given:
        slots = self._slots(at)
        c0, lengths, mask, reset = (0 if a is None else p for a, p in zip(self._o[1:ARRAYS], at[1:]))
        L, B, D, d = self._shape
        return abi.Given(
            L=L,
            B=B,
            D=D,
            d=d,
            every=self._call.every if self._call.keep else 0,
            lengths=lengths,
            mask=mask,
            reset=reset,
            gates=slots["gates"],
            inputs=slots["inputs"],
            per_sequence=slots["per_sequence"],
            params=slots["params"],
            c0=self._each(c0, D * B * d),
            constants=[place(i) for i in range(len(self._call.constants))],  # they are given at each run
            chunk=chunk,
            carry=at[-1] if chunk else 0,
        )

    def _slots(self, at: Sequence[int], gradients: bool = False) -> dict[str, list[abi.Slot]]:
        """A slot for each value of the step function, of U and the arrays at the addresses `at`, or their gradients."""
        found: dict[str, list[abi.Slot]] = {kind: [] for kind in ("gates", "inputs", "per_sequence", "params")}
        gates = next(a for a in self._cell.arrays if a.kind == "gates")
        arrays = [(gates, self._u, at[0]), *zip(declared(self._cell), self._o[ARRAYS:], at[ARRAYS:])]
        for a, array, address in arrays:
            n, d = len(a.members), self._shape[3]
            row, between = n * d, d
            if a.kind == "params" and array.strides and not gradients:
                row, between = array.strides[:2]
            for i in range(n):
                step = i * between * _ITEMSIZES[array.dtype]
                found[a.kind].append(abi.Slot(address + step, row) if address else abi.NOT_WANTED)
        return found
