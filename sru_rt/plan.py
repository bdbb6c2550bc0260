"""Decides how a recurrence runs on a GPU: what its kernel is compiled with, and how it is launched.

It decides from the variant, the sizes, what is given and wanted, and two facts of the device; L alone never changes
the kernel (but one step, L = 1, has its own), and of the batch sizes only the first few of each layer do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import abi, settings
from .dtypes import state_dtype
from .errors import ArgumentError, LibraryError
from .graph import topological
from .variant import Variant

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# What a multiprocessor must have asked for at any time to keep its share of the memory busy: bandwidth times latency,
# 4.3 TB/s times 1 us over 132 multiprocessors of an H200. Computed, not measured.
_BYTES_IN_FLIGHT = 32 << 10
# Registers that a ring may take of 255; the rest are states, parameters, addresses and what a step computes. A backward
# that recomputes states ("from pieces") holds the addresses of two sweeps.
_RING_REGISTERS = {"forward": 128, "backward": 112, "from pieces": 72, "replay": 72}
_DEPTHS = (1, 2, 4, 8, 12, 16, 32)
_THREADS = (32, 64, 128, 256)
_BLOCKS_PER_MULTIPROCESSOR = 16
# From this many warps of two channels a thread on; below it, twice the warps of one channel hide more latency.
_WARPS_FOR_PAIRS = 4
_SHARED_BYTES = 48 << 10  # of one block, on every architecture
MAX_BATCHES = 8  # batch sizes of one layer that get a kernel of their own

# Multiprocessors of the usual card of an architecture, for kernels that are compiled where there is none.
USUAL_MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Device:
    """What the planner asks of a GPU: its architecture, such as 90, and its number of multiprocessors."""

    arch: int
    multiprocessors: int


@dataclass(frozen=True)
class Plan:
    """How one pass runs. All but the launch is compiled in; the C++ reads it under the same names.

    `B` is 0 where the batch size is given at run time. `keep` is 1 if the state before every step is kept, 2 if one is
    every K steps, 0 if none is. Bit i of `wants_inputs` says that the gradient of input i is wanted.
    """

    forward: bool
    width: int  # channels of a thread
    depth: int  # steps that are read ahead
    replay_depth: int  # the same where states are recomputed
    threads: int  # of a block
    B: int
    D: int
    d: int
    gate_stride: int
    input_strides: tuple[int, ...]
    keep: int = 0
    has_mask: bool = False
    has_reset: bool = False
    wants_gates: bool = False
    wants_inputs: int = 0
    scratch_in_shared: bool = False

    def grid(self, B: int) -> tuple[int, int, int]:
        """Blocks of the sweep: (channels of all sequences, directions, 1)."""
        return -(-B * (self.d // self.width) // self.threads), self.D, 1


def plan(variant: Variant, arguments: abi.Forward | abi.Backward, device: Device) -> Plan:
    """The plan for one pass.

    Raises:
        LibraryError: gates do not lie together as in U, (L, B, D, k, d), or a size is beyond what a launch takes.
        ArgumentError: SRU_RT_PLAN is not understood.
    """
    given = arguments.given
    _check_layout(variant, arguments)
    key = _static(variant, arguments)
    most = _shared_channels(variant, given.every) if key.scratch_in_shared else _THREADS[-1] * 2
    width = min(_width(variant, arguments, device), most // _THREADS[0])
    threads = min(_threads(given.B * given.D * given.d // width, device), most // width // 32 * 32)
    made = replace(
        key,
        width=width,
        depth=_depth(_sweep(key), _streams(variant, key), key, given, width, device),
        replay_depth=_depth("replay", replayed(variant), key, given, width, device),
        threads=threads,
        B=given.B if _has_own_kernel(variant, key, device, given.B) else 0,
    )
    return _overridden(made, variant, arguments)


def needs_scratch(variant: Variant, every: int) -> bool:
    """Whether a backward that recomputes `every` states needs memory for them; if not, they fit into the blocks'."""
    return every > 1 and _shared_channels(variant, every) < _THREADS[0]


def shared_bytes(variant: Variant, plan: Plan, every: int) -> int:
    """Dynamic shared memory of a block: the states that it recomputes."""
    return every * plan.threads * plan.width * _state_bytes(variant) if plan.scratch_in_shared else 0


def _shared_channels(variant: Variant, every: int) -> int:
    return _SHARED_BYTES // (every * _state_bytes(variant))


def _state_bytes(variant: Variant) -> int:
    return ITEMSIZE[state_dtype(variant.dtype)] * len(variant.cell.state)


def _static(variant: Variant, arguments: abi.Forward | abi.Backward) -> Plan:
    """What follows from the arguments alone."""
    given = arguments.given
    forward = isinstance(arguments, abi.Forward)
    wants_gates, wants_inputs = False, 0
    if isinstance(arguments, abi.Backward):
        wants_gates = any(slot.pointer for slot in arguments.dgates)
        wants_inputs = sum(1 << i for i, slot in enumerate(arguments.dinputs) if slot.pointer)
    return Plan(
        forward=forward,
        width=0,
        depth=0,
        replay_depth=0,
        threads=0,
        B=0,
        D=given.D,
        d=given.d,
        gate_stride=given.gates[0].stride,
        input_strides=tuple(slot.stride for slot in given.inputs),
        keep=min(given.every, 2),
        has_mask=bool(given.mask),
        has_reset=bool(given.reset),
        wants_gates=wants_gates,
        wants_inputs=wants_inputs,
        scratch_in_shared=not forward and given.every > 1 and not needs_scratch(variant, given.every),
    )


def _check_layout(variant: Variant, arguments: abi.Forward | abi.Backward) -> None:
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


_batches: dict[tuple[Variant, Plan, Device], set[int]] = {}


def _has_own_kernel(variant: Variant, key: Plan, device: Device, B: int) -> bool:
    """Whether the first few batch sizes of this layer include `B`."""
    seen = _batches.setdefault((variant, key, device), set())
    if B not in seen and len(seen) < MAX_BATCHES:
        seen.add(B)
    return B in seen


def _width(variant: Variant, arguments: abi.Forward | abi.Backward, device: Device) -> int:
    given = arguments.given
    if ITEMSIZE[variant.dtype] != 2 or given.d % 2:
        return 1
    warps = given.B * given.D * given.d // 2 // 32
    enough = warps >= _WARPS_FOR_PAIRS * device.multiprocessors
    return 2 if enough and _takes_pairs(variant, arguments) else 1


def _takes_pairs(variant: Variant, arguments: abi.Forward | abi.Backward) -> bool:
    """Whether all arrays over time lie such that two channels can be read at once."""
    given = arguments.given
    item, state = ITEMSIZE[variant.dtype], ITEMSIZE[state_dtype(variant.dtype)]
    places = [(slot.pointer, item) for slot in given.gates]
    places += [(pointer, ITEMSIZE[variant.saved_dtype]) for pointer in arguments.saved]
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


def _threads(packs: int, device: Device) -> int:
    """The smallest blocks that a multiprocessor can hold together, as small ones spread most evenly."""
    limit = _BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors
    return next((n for n in _THREADS if packs <= n * limit), _THREADS[-1])


def _depth(sweep: str, streams: Sequence[int], key: Plan, given: abi.Given, width: int, device: Device) -> int:
    """The least depth that keeps enough bytes in flight and fits into the registers.

    `streams` are the sizes of the elements that a step reads.
    """
    if given.L == 1 or (sweep == "replay" and _sweep(key) != "from pieces"):
        return 1
    flags = key.has_mask + key.has_reset
    words = sum(max(1, size * width // 4) for size in streams) + flags
    channels = max(1, given.B * given.D * given.d // width // device.multiprocessors)
    needed = -(-_BYTES_IN_FLIGHT // (channels * max(1, sum(streams) * width + flags)))
    fitting = [n for n in _DEPTHS if n * words <= _RING_REGISTERS[sweep]]
    return next((n for n in fitting if n >= needed), max(fitting, default=1))


def _sweep(key: Plan) -> str:
    return "forward" if key.forward else "from pieces" if key.keep > 1 else "backward"


def _streams(variant: Variant, key: Plan) -> list[int]:
    """Sizes of what one step reads."""
    item, state = ITEMSIZE[variant.dtype], ITEMSIZE[state_dtype(variant.dtype)]
    sizes = [*_inputs(variant).values()]
    if not key.forward:
        sizes += [item] + [ITEMSIZE[variant.saved_dtype] if key.keep == 1 else state] * len(variant.cell.state)
    return sizes


def replayed(variant: Variant) -> list[int]:
    """Sizes of what one step reads of which only the new state is wanted."""
    nodes = topological(variant.cell.formula.new_state)
    used = {node.args[0] for node in nodes if node.op == "input"}
    return [size for name, size in _inputs(variant).items() if name in used]


def _inputs(variant: Variant) -> dict[str, int]:
    """Sizes of the elements of gates and inputs, by name."""
    item, state = ITEMSIZE[variant.dtype], ITEMSIZE[state_dtype(variant.dtype)]
    wide = {name: state if variant.wide >> i & 1 else item for i, name in enumerate(variant.cell.inputs)}
    return dict.fromkeys(variant.cell.gates, item) | wide


def _overridden(made: Plan, variant: Variant, arguments: abi.Forward | abi.Backward) -> Plan:
    """The plan with what SRU_RT_PLAN says."""
    chosen = settings.plan()
    limits: Mapping[str, Sequence[int]] = {"width": (1, 2), "depth": range(1, 65), "threads": range(32, 1025, 32)}
    for name, value in chosen.items():
        if name not in limits or value not in limits[name]:
            raise ArgumentError(
                f"SRU_RT_PLAN has {name}={value}; it takes width=1 or 2, depth=1..64, threads=32..1024 in steps of 32, "
                "separated by commas"
            )
    depth = chosen.get("depth")
    made = replace(
        made,
        width=chosen.get("width", made.width),
        depth=depth or made.depth,
        replay_depth=depth or made.replay_depth if made.replay_depth > 1 else 1,
        threads=chosen.get("threads", made.threads),
    )
    if made.width > 1 and not _takes_pairs(variant, arguments):
        made = replace(made, width=1)
    every = arguments.given.every
    if (needed := shared_bytes(variant, made, every)) > _SHARED_BYTES:
        raise ArgumentError(
            f"SRU_RT_PLAN asks for blocks of {made.threads} threads of {made.width} channels, which need {needed} "
            f"bytes of shared memory for {every} states; there are {_SHARED_BYTES}: choose fewer threads"
        )
    return made
