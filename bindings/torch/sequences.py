"""The forms in which a module takes its sequences, and time-major tensors, which is all that its layers know."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...check import Check
from ...errors import LibraryError, ShapeError
from . import given
from .packed import repack, unpack
from .states import each


class Layout(NamedTuple):
    """Where tokens are padding, and where segments begin: lengths (B,), mask and reset (L, B); each may be None."""

    lengths: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None


class Sequences(NamedTuple):
    """Sequences of one call, x (L, B, n).

    `form` says how they were given: "batched", "unbatched" (one sequence), "token" (one of each), or how they were
    packed.
    """

    x: Tensor
    form: Any
    batch_first: bool = False
    layout: Layout = Layout()

    @property
    def axes(self) -> tuple[str, tuple[Any, ...]]:
        """Letters and sizes of the leading axes of what is given for each token."""
        L, B = self.x.shape[:2]
        if self.form == "token":
            return "B", (B,)
        if self.form == "unbatched":
            return "L", (L,)
        return ("B L", (B, L)) if self.batch_first else ("L B", (L, B))

    def time_major(self, value: Tensor) -> Tensor:
        """What is given for each token, with L and B as the first axes."""
        if self.form in ("token", "unbatched"):
            return value.unsqueeze(0 if self.form == "token" else 1)
        return value.transpose(0, 1) if self.batch_first else value

    def like_input(self, h: Tensor) -> Any:
        """h (L, B, m) in the form of the input."""
        if self.form in ("token", "unbatched"):
            return h.squeeze(0 if self.form == "token" else 1)
        if self.form != "batched":
            return repack(h, self.form)
        return h.transpose(0, 1) if self.batch_first else h

    def state(self, value: Any) -> Any:
        """A state as layers take it, whose axis 1 is B."""
        return each(lambda a: a.unsqueeze(1), value) if self.form == "unbatched" else value

    def state_like_input(self, value: Any) -> Any:
        return each(lambda a: a.squeeze(1), value) if self.form == "unbatched" else value

    def of_tokens(self, check: Check, name: str, value: Any, letters: str = "", sizes: tuple[Any, ...] = ()) -> Tensor:
        """`value`, given for each token with these axes, as (L, B, ...)."""
        value = given.tensor(check, name, value, self.x.device, "input")
        leading, of_leading = self.axes
        given.shape(
            check, name, value, f"{leading} {letters}".strip(), of_leading + sizes, "one for each token of input"
        )
        return self.time_major(value)

    def of_sequences(self, check: Check, name: str, value: Any, letters: str, sizes: tuple[Any, ...]) -> Tensor:
        """`value`, given for each sequence with these axes, as (B, ...)."""
        value = given.tensor(check, name, value, self.x.device, "input")
        if self.form == "unbatched":
            given.shape(check, name, value, letters, sizes, "for the one sequence of input")
            return value.unsqueeze(0)
        B = self.x.shape[1]
        given.shape(check, name, value, f"B {letters}", (B, *sizes), "one for each sequence of input")
        return value


def sequences(
    check: Check, input: Any, size: int, device: torch.device, batch_first: bool, lengths: Any, mask: Any, reset: Any
) -> Sequences:
    """Checks the input of a module, all but its dtype, and what comes with it."""
    if isinstance(input, PackedSequence):
        found, lengths = _packed(check, input, size, device, batch_first, lengths, mask)
    else:
        found = _padded(check, input, size, device, batch_first)
        if lengths is None and mask is None and reset is None:
            return found
        if found.form == "unbatched" and lengths is not None:
            raise check.error("lengths", "is given with one sequence (L, input_size); cut the input instead")
        lengths = given.lengths(check, lengths, *found.x.shape[:2], device)
    mask, reset = (
        None if value is None else found.of_tokens(check, name, value).bool()
        for name, value in (("mask", mask), ("reset", reset))
    )
    return found._replace(layout=Layout(lengths, mask, reset))


def tokens(check: Check, input: Any, size: int, device: torch.device) -> Sequences:
    """The same for one token of each sequence, (B, size)."""
    input = given.tensor(check, "input", input, device)
    B = input.shape[0] if input.dim() else 0
    given.shape(check, "input", input, "B input_size", (B, size), "one token of each sequence")
    return Sequences(input.unsqueeze(0), "token")


def _padded(check: Check, input: Any, size: int, device: torch.device, batch_first: bool) -> Sequences:
    axes = "(B, L, input_size)" if batch_first else "(L, B, input_size)"
    if not isinstance(input, Tensor):
        got = type(input).__name__
        raise LibraryError(f"{check.function}: input must be a torch.Tensor {axes} or a PackedSequence (got {got})")
    input = given.tensor(check, "input", input, device)
    if input.dim() not in (2, 3) or input.shape[-1] != size:
        raise ShapeError(
            f"{check.function}: input has shape {tuple(input.shape)}; it needs {axes}, or (L, input_size) for one "
            f"sequence, with input_size = {size}"
        )
    if input.dim() == 2:
        return Sequences(input.unsqueeze(1), "unbatched")
    return Sequences(input.transpose(0, 1) if batch_first else input, "batched", batch_first)


def _packed(
    check: Check, input: PackedSequence, size: int, device: torch.device, batch_first: bool, lengths: Any, mask: Any
) -> tuple[Sequences, Tensor]:
    """Packed sequences, and their lengths."""
    for name, value in (("lengths", lengths), ("mask", mask)):
        if value is not None:
            raise check.error(name, "is given with a PackedSequence, which has lengths of its own; leave it out")
    data = given.tensor(check, "input.data", input.data, device)
    given.shape(check, "input.data", data, "tokens input_size", (data.shape[0], size), "input_size of the module")
    x, lengths, packing = unpack(input)
    return Sequences(x, packing, batch_first), lengths
