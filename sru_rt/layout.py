"""How arrays lie in a GPU's memory: what kernels cannot run on, and what they can read at once."""

from __future__ import annotations

from . import abi
from .dtypes import state_dtype
from .errors import LibraryError
from .traffic import ITEMSIZE
from .variant import Variant


def check(variant: Variant, arguments: abi.Forward | abi.Backward) -> None:
    """Raises LibraryError where gates do not lie together, or sizes are beyond what a launch takes."""
    given = arguments.given
    sets = [given.gates] + ([arguments.dgates] if isinstance(arguments, abi.Backward) else [])
    for slots in sets:
        step = given.d * ITEMSIZE[variant.dtype]
        first = slots[0]
        if first.pointer and any(s.pointer != first.pointer + i * step for i, s in enumerate(slots)):
            raise LibraryError(
                f"sru_rt: the gates of {variant.cell.name} must lie together as in U, (L, B, D, k, d), on a GPU; copy "
                "them into one array"
            )
    row = given.gates[0].stride
    strides = [(slot, row) for slots in sets for slot in slots]
    if isinstance(arguments, abi.Backward):
        strides += [(slot, other.stride) for slot, other in zip(arguments.dinputs, given.inputs)]
    if any(slot.pointer and slot.stride != needed for slot, needed in strides):
        raise LibraryError(
            f"sru_rt: on a GPU the gates of {variant.cell.name} must have the same distance from row to row, and so "
            "must gradients and what they are the gradients of; copy them"
        )
    if given.L >= 1 << 31 or given.B * given.d >= 1 << 36:
        raise LibraryError(
            f"sru_rt: a recurrence on a GPU takes L < 2^31 and B*d < 2^36 (got L = {given.L}, B = {given.B}, d = "
            f"{given.d}); cut it into pieces, handing c_last on as c0"
        )


def takes_pairs(variant: Variant, arguments: abi.Forward | abi.Backward) -> bool:
    """Whether all arrays over time lie such that two channels can be read at once."""
    given = arguments.given
    item, state = ITEMSIZE[variant.dtype], ITEMSIZE[state_dtype(variant.dtype)]
    places = [(slot.pointer, item) for slot in given.gates]
    places += [(pointer, ITEMSIZE[variant.saved_dtype]) for pointer in arguments.saved] + [(given.carry, state)]
    inputs = [given.inputs]
    if isinstance(arguments, abi.Backward):
        places += [(slot.pointer, item) for slot in arguments.dgates]
        places += [(arguments.dh, item), *((pointer, state) for pointer in arguments.states)]
        inputs.append(arguments.dinputs)
    else:
        places.append((arguments.h, item))
    for slots in inputs:
        places += [(slot.pointer, state if variant.wide >> i & 1 else item) for i, slot in enumerate(slots)]
    strides = [given.d, *(slot.stride for slots in inputs for slot in slots)]
    return not any(pointer % (2 * size) for pointer, size in places) and not any(stride % 2 for stride in strides)


def reads_multiples(variant: Variant, arguments: abi.Forward | abi.Backward, size: int) -> bool:
    """Whether all rows that a pass reads begin at multiples of `size` bytes, of a backward but for states."""
    given, item = arguments.given, ITEMSIZE[variant.dtype]
    sizes = [ITEMSIZE[state_dtype(variant.dtype)] if variant.wide >> i & 1 else item for i in range(len(given.inputs))]
    bytes_of = [(slot, item) for slot in given.gates] + [*zip(given.inputs, sizes)]
    places = [arguments.dh, given.d * item] if isinstance(arguments, abi.Backward) else []
    places += [place for slot, each in bytes_of for place in (slot.pointer, slot.stride * each)]
    return not any(place % size for place in places)
