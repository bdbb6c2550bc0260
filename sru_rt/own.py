"""Cells that users write: `cell` makes of a step function what a built-in cell has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import arrays, emit, inputs, layer, spec
from .cell import Array, Cell
from .check import Check
from .errors import ShapeError, StepError
from .gradients import Gradients
from .init import Init
from .inputs import Input
from .options import Options

# What the functions of a cell call their own arguments, so that no input, value of a sequence or constant can.
_TAKEN = "self u weight params c0 c lengths mask reset time_parallel save saved_dtype out saved dh dc_last need".split()


def cell(
    *,
    gates: str | Sequence[str],
    state: str | Sequence[str],
    inputs: str | Sequence[str] = (),
    per_sequence: str | Sequence[str] = (),
    params: str | Sequence[str] = (),
    constants: str | Sequence[str] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], OwnCell]:
    """Makes a recurrence of a step function, which it decorates::

        @sru_rt.cell(gates="a n", params="b", state="c")
        def leaky(a, n, b, c):
            a = sru_rt.sigmoid(a + b)
            c = a*c + (1 - a)*n
            return c, sru_rt.tanh(c)  # new state(s), then h

    The function is called once, with symbols in place of numbers; from what it does with them come the kernels, their
    gradients, and whether steps may run in parallel. It may use + - * / and ``**`` with a small integer, numbers, and
    the functions of sru_rt: exp, log, sqrt, sigmoid, tanh, relu, softplus, minimum, maximum, and where with a
    comparison. A value that decides which text is run (an `if`) must be one from around the function, not an argument.

    Args:
        gates: names of the gates, which are formed from x by the projection, in the order of U; blanks between them.
        state: names of the states. The function returns their new values in this order, then h.
        inputs: names of what comes for each step beside the gates, without a projection. One called ``x`` is x
            itself, as the highway of SRU has it.
        per_sequence: names of what is the same for all steps of a sequence, such as a dropout mask.
        params: names of the parameters, one for each channel and direction.
        constants: names of numbers; one for which the function has a default may be left out in calls.
        name: of the cell, in messages and in C++; by default that of the function.

    Raises:
        StepError: the function does something that cannot be traced, or declarations contradict it. It names the
            function's own file and line.
    """

    def decorate(step: Callable[..., Any]) -> OwnCell:
        declared = [Array("u", "gates", _names(gates))]
        declared += [Array(one, "inputs", (one,), side_by_side=True) for one in _names(inputs)]
        declared += [Array(one, "per_sequence", (one,)) for one in _names(per_sequence)]
        declared += [Array("params", "params", _names(params))] if _names(params) else []
        declared += [Array("c0", "state", _names(state))] if _names(state) else []
        return OwnCell(Cell(name or step.__name__, step, tuple(declared), _names(constants)))

    return decorate


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else tuple(value)


class OwnCell:
    """A recurrence with the functions of a layer; `cell` makes it.

    Letters: L time steps, B sequences, D = 1 or 2 directions, d hidden size per direction, k gates, n parameters. The
    inputs, values of a sequence and constants that the cell declares are given to its functions by name: inputs
    (L, B, D*d), values of a sequence (B, D, d), constants as numbers. Called itself, it is the step function.
    """

    def __init__(self, core: Cell) -> None:
        self._cell = core
        functools.update_wrapper(self, core.step)
        for array in core.arrays:
            if array.kind in ("inputs", "per_sequence"):
                _check_name(core, array.name, array.kind)
        for constant in core.constants:
            _check_name(core, constant, "constants")
        self._source = emit.emit(core)  # traces the step now, so that mistakes are found where they are made
        self._text = spec.text_of(core)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cell.step(*args, **kwargs)

    def __repr__(self) -> str:
        c = self._cell
        kinds = {kind: c.of_kind(kind) for kind in ("gates", "inputs", "per_sequence", "params", "state", "constants")}
        return f"<cell {c.name}: {', '.join(f'{k} {chr(32).join(v)}' for k, v in kinds.items() if v)}>"

    def __reduce__(self) -> str:
        return str(self._cell.step.__qualname__)

    @property
    def name(self) -> str:
        """Of the cell, in messages and in C++."""
        return self._cell.name

    @property
    def text(self) -> str:
        """What stands for the cell in exported programs of frameworks: where it is defined, and a digest."""
        return self._text

    @property
    def affine(self) -> bool:
        """Whether the new states are affine in the states, so that the forward, too, can run in parallel over time."""
        return self._cell.affine

    def source(self) -> str:
        """The C++ that is compiled: the step and its derivatives, over any number type."""
        return self._source

    def graph(self) -> str:
        """The step as a formula, and its derivatives, to read."""
        return emit.describe(self._cell)

    def forward(
        self,
        x: Any,
        weight: Any,
        params: Any = None,
        c0: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        time_parallel: bool | str = "auto",
        save: bool | int | str = False,
        saved_dtype: Any = None,
        out: Any = None,
        **values: Any,
    ) -> tuple[Any, ...]:
        """Runs the cell over a batch of sequences, with U = W x.

        Args:
            x: (L, B, d_in), time-major; float16, bfloat16, float32 or float64. d_in = D*d where x is an input, too.
            weight: (D, k, d, d_in) in x's dtype, or a low-rank pair (P, Q) of (D, k, d, p) and (p, d_in).
            params: (D, n, d), in the order of their declaration; None if the cell has none.
            c0: (D, B, d), initial state, a tuple of them if there are several; zeros if None. params, c0, inputs and
                values of a sequence have x's dtype or float32.
            lengths: (B,), integers from 0 to L; later steps do not exist: h is 0 there and the state is carried.
            mask: (L, B), True is padding: h is 0 there and the state is carried.
            reset: (L, B), True: the state is 0 before this step; the reverse direction resets on the other side of
                the same boundary.
            time_parallel: "auto", True or False, whether steps run in parallel on a GPU (see docs/recurrences.md).
            save: keep what `backward` needs: True every state, K >= 1 the state every K steps, "x" like that but also
                without U.
            saved_dtype: dtype of kept states; x's dtype halves their memory for 16-bit x. Default: that of the state.
            out: a pair (h, c_last) of arrays to write to, either may be None; c_last a tuple if there are several
                states. A state may be written to where its initial value is.
            values: what else the cell declares, by name.

        Returns:
            h (L, B, D*d) in x's dtype, c_last (D, B, d) in float32 (float64 for float64 x), a tuple if there are
            several states, and with `save` an object for `backward`.

        Raises:
            ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
        """
        given = {"x": x, "weight": weight, "params": params, "c0": c0, "lengths": lengths, "mask": mask, "reset": reset}
        options = {"time_parallel": time_parallel, "save": save, "saved_dtype": saved_dtype, "out": out}
        return self._call("forward", self._forward, given | options, values)

    def recurrence(
        self,
        u: Any,
        params: Any = None,
        c0: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        time_parallel: bool | str = "auto",
        save: bool | int | str = False,
        saved_dtype: Any = None,
        out: Any = None,
        **values: Any,
    ) -> tuple[Any, ...]:
        """Runs the cell on a given U, the door for other projections.

        Args:
            u: (L, B, D, k, d), the gates of every step in the order of their declaration; float16, bfloat16, float32
                or float64.

        All else, results and errors as `forward`; an input called x is given by name. With ``save="x"`` U is kept,
        since it cannot be formed again. The backward gives the gradient of u.
        """
        given = {"u": u, "params": params, "c0": c0, "lengths": lengths, "mask": mask, "reset": reset}
        options = {"time_parallel": time_parallel, "save": save, "saved_dtype": saved_dtype, "out": out}
        return self._call("recurrence", self._recurrence, given | options, values)

    def backward(self, saved: Any, dh: Any, dc_last: Any = None, *, need: Any = None) -> Gradients:
        """The gradients of a loss with respect to what `forward` or `recurrence` was given.

        Args:
            saved: the third result of the forward with `save`.
            dh: (L, B, D*d), gradient of h, in x's dtype (or float32 for 16-bit x); None is zeros.
            dc_last: (D, B, d), gradient of c_last, a tuple if there are several states; None is zeros.
            need: names of the inputs whose gradients are wanted; the rest is skipped. Default: all that were given.

        Returns:
            An object with an attribute for each array that was given (but flags, arrays of bool): .x .weight (or .u)
            .params .c0, inputs and values of a sequence by their names, shaped and typed like them; .weight is a pair
            if weight was one, .c0 a tuple if there are several states.

        Raises:
            ShapeError, DtypeError, LibraryError, ArgumentError: naming the argument, what it is and what it must be.
        """
        return layer.backward(f"{self.name}.backward", saved, dh, dc_last, need)

    def step(
        self, x: Any, weight: Any, params: Any = None, c: Any = None, *, out: Any = None, **values: Any
    ) -> tuple[Any, Any]:
        """One token, for decoding: the same bits as that token in a sequence, given the same U.

        Args:
            x: (B, d_in).
            c: (D, B, d), the state before the token, a tuple if there are several; zeros if None.
            out: a pair (h, c) of arrays (B, D*d) and (D, B, d) to write to; a state may be the given one.
            values: what else the cell declares, by name; inputs are (B, D*d).

        All else and errors as `forward`.

        Returns:
            h (B, D*d) and the new state (D, B, d), a tuple if there are several.
        """
        given = {"x": x, "weight": weight, "params": params, "c": c, "out": out}
        return self._call("step", self._step, given, values)

    def init(
        self,
        d_in: int,
        d: int,
        *,
        directions: int = 1,
        low_rank: int | None = None,
        params: Mapping[str, Any] | None = None,
        dtype: Any = "float32",
        rng: Any = None,
        like: Any = None,
    ) -> dict[str, Any]:
        """Initial weights and parameters, as a dict: ``cell.forward(x, **cell.init(d_in, d))``.

        The weights are uniform with variance 1/d_in (each factor of a low-rank weight with 1 / its number of columns).

        Args:
            d_in: size of x.
            d: hidden size per direction.
            directions: 1, or 2 with a reverse direction.
            low_rank: p, to get a pair (P, Q) of (D, k, d, p) and (p, d_in) as weight.
            params: initial values by the names of parameters, numbers or arrays that broadcast to (D, d); 0 for the
                rest.
            dtype: dtype of all arrays.
            rng: a numpy.random.Generator, or a seed.
            like: an array whose library the results shall have; NumPy if None.

        Returns:
            weight, and params (D, n, d) if the cell has any.

        Raises:
            ArgumentError: a size is not a positive integer, or there is no parameter of a name.
        """
        check = Check(f"{self.name}.init")
        init = Init(check, d_in, d, directions, low_rank, dtype, rng)
        made: dict[str, Any] = {"weight": init.weight(len(self._cell.gates))}
        values, names = dict(params or {}), self._cell.params
        if names:
            made["params"] = np.zeros((init.D, len(names), init.d))
        for name, value in values.items():
            if name not in names:
                known = f"has {', '.join(names)}" if names else "declares none"
                raise check.error("params", f"has a value for {name!r}, but the cell {known}")
            try:
                made["params"][:, names.index(name)] = value
            except (TypeError, ValueError):
                raise check.error(
                    f"params[{name!r}]", f"must be a number or an array that broadcasts to {(init.D, init.d)}"
                ) from None
        return init.result(made, like)

    # ------------------------------------------------------------------------------------------------------------------

    def _call(self, method: str, function: Callable[..., Any], given: dict[str, Any], values: dict[str, Any]) -> Any:
        """Calls `function` on arrays of NumPy or CuPy, whatever library the given ones are of."""
        return arrays.call(function, f"{self.name}.{method}", (), (), given | values)

    def _forward(self, x: Any, weight: Any, params: Any, c0: Any, **rest: Any) -> tuple[Any, ...]:
        check = Check(f"{self.name}.forward")
        dtype, projected = inputs.projected(check, x, weight)
        self._check_gates(check, "weight")
        options, values = _apart(rest)
        given = {"x": x, "weight": weight, "params": params, "c0": c0}
        return self._run(check, dtype, given, values, options, projected)

    def _recurrence(self, u: Any, params: Any, c0: Any, **rest: Any) -> tuple[Any, ...]:
        check = Check(f"{self.name}.recurrence")
        dtype = inputs.given_u(check, u)
        self._check_gates(check, "u")
        options, values = _apart(rest)
        return self._run(check, dtype, {"u": u, "params": params, "c0": c0}, values, options)

    def _step(self, x: Any, weight: Any, params: Any, c: Any, out: Any, **values: Any) -> tuple[Any, Any]:
        check = Check(f"{self.name}.step", c0="c")
        dtype, projected, x = inputs.projected_token(check, x, weight)
        self._check_gates(check, "weight")
        check.set("D*d", check["D"] * check["d"], "weight")
        tokens = {
            name: inputs.of_one_token(check, name, value, "B D*d") if name in self._cell.inputs else value
            for name, value in values.items()
        }
        given = {"x": x, "weight": weight, "params": params, "c0": c}
        return inputs.one_token(check, out, lambda shared: self._run(check, dtype, given, tokens, shared, projected))

    def _check_gates(self, check: Check, name: str) -> None:
        gates = self._cell.gates
        if check["k"] != len(gates):
            needed = f"it needs {len(gates)}: {', '.join(gates)}"
            raise check.error(name, f"has k = {check['k']} gates; {needed}", ShapeError)

    def _run(
        self,
        check: Check,
        dtype: str,
        given: dict[str, Any],
        values: dict[str, Any],
        options: Options,
        projected: Input | None = None,
    ) -> tuple[Any, ...]:
        """What the functions share; `values` is what the cell declares by name."""
        core = self._cell
        self._check_values(check, given, values)
        if core.params and given["params"] is None:
            n = len(core.params)
            raise check.error("params", f"is None; the cell has {n} ({', '.join(core.params)}): pass (D, {n}, d)")
        if not core.params and given.pop("params") is not None:
            raise check.error("params", "is given, but the cell declares none; leave it out")
        numbers = {name: values.pop(name, self._defaults.get(name)) for name in core.constants}
        constants = [check.number(name, number) for name, number in numbers.items()]
        return layer.forward(check, core, dtype, given | values, constants, options, projected)

    def _check_values(self, check: Check, given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Raises unless all that the cell declares by name is given, and nothing else."""
        core = self._cell
        by_name = [name for name in (*core.inputs, *core.per_sequence) if name not in given]
        known = [*by_name, *core.constants]
        for name in values:
            if name not in known:
                has = f"it declares {', '.join(known)}" if known else "it declares nothing that is given by name"
                raise check.error(name, f"is no argument, nor does the cell declare it: {has}")
        needed = [*by_name, *(name for name in core.constants if name not in self._defaults)]
        missing = [name for name in needed if values.get(name) is None]
        if missing:
            raise check.error(missing[0], f"is missing, which the cell declares; pass {missing[0]}=...")

    @functools.cached_property
    def _defaults(self) -> dict[str, float]:
        """Of constants, from the step function."""
        taken = inspect.signature(self._cell.step).parameters
        named = {name: taken[name].default for name in self._cell.constants if name in taken}
        return {name: value for name, value in named.items() if value is not inspect.Parameter.empty}


def _apart(rest: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Options of every function, and the values of a cell."""
    names = ("lengths", "mask", "reset", "time_parallel", "save", "saved_dtype", "out")
    return Options(**{name: rest.pop(name) for name in names}), rest


def _check_name(core: Cell, name: str, kind: str) -> None:
    if name in _TAKEN or (name == "x" and kind != "inputs"):
        raise StepError(
            f"{core.where}: {name!r} cannot be the name of one of its {kind}, as the functions of a cell have an "
            "argument of that name; rename it"
        )
