"""Decides how a recurrence runs on a GPU: what its kernel is compiled with, and how it is launched.

It decides from the variant, the sizes, what is given and wanted, and two facts of the device; L alone never changes
the kernel (but one step, L = 1, has its own), and of the batch sizes only the first few of each layer do. Whether a
recurrence runs in parallel over time `chunks.py` decides, before there are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import abi, decode, layout, overrides, shared_memory, small
from .choose import LAPS, THREADS, Task, choose, load, shoots, too_long, warm_up
from .errors import ArgumentError, LibraryError
from .machine import Device
from .shared_memory import (
    LAP,
    PAIRED_THREADS,
    activations,
    fewest_laps,
    lap_of_staged,
    ring,
    ring_bytes,
    ring_channels,
    shared_channels,
    staged,
    staged_bytes,
    staged_channels,
    state_bytes,
    tile,
    tile_steps,
    tile_threads,
)
from .traffic import ITEMSIZE, USUAL_EVERY, reduction_reads_state
from .variant import Variant

MAX_BATCHES = 8  # batch sizes of one layer that get a kernel of their own
_USUALLY_KEPT = 2  # of a forward that keeps every K-th state, whatever K is: its kernel is the same


@dataclass(frozen=True)
class Plan:
    """How one pass runs. All but the launch is compiled in; the C++ reads it under the same names.

    `B` is 0 where the batch size is given at run time. `keep` is 1 if the state before every step is kept, 2 if one is
    every K steps, 0 if none is. Bit i of `wants_inputs` says that the gradient of input i is wanted. `parallel` is
    over time, in chunks, by one kernel if `lookahead`; `reduce_reads_state` says that summaries of a backward depend
    on the states, and `saved_in_chunks` that the forward was parallel, and counted the states that it kept anew in
    each chunk. `in_tile` has a bit for each value of a step, in the order of traffic.read(), that is kept in shared
    memory when it is first read, or `staged` there.
    """

    forward: bool
    width: int  # channels of a thread
    depth: int  # steps that are read ahead
    replay_depth: int  # the same where states are recomputed, or chunks are settled
    reduce_depth: int  # the same where chunks are summarised, or arrive at a guess
    threads: int  # of a block, each with channels of its own
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
    parallel: bool = False
    lookahead: bool = False
    warm_up: int = 0  # steps that a chunk makes its guess of; 0: it need not guess
    reduce_reads_state: bool = False
    saved_in_chunks: bool = False
    in_tile: int = 0
    tile_bytes: int = 0  # of one step of a thread
    staged: int = 0  # pieces whose rows are copied to shared memory: see cuda/gpu_stage.h, and of more gpu_pair.h
    known: int = 0  # activations of a step that are kept beside recomputed states
    laps: int = 0  # of a ring in shared memory: see cuda/gpu_ring.h
    copied: int = 0  # channels that a thread copies at once to rows that are staged, or to a ring
    d_in: int = 0  # of a kernel that forms U itself; 0: U is given
    line: int = 0  # bytes of a load of such a kernel of one token

    @property
    def decodes(self) -> bool:
        """Whether the kernel forms U of one token itself: see cuda/gpu_decode.h."""
        return self.line > 0

    @property
    def is_small(self) -> bool:
        """Whether the kernel forms U of sequences itself: see cuda/gpu_small.h."""
        return self.d_in > 0 and not self.decodes

    @property
    def shoots(self) -> bool:
        """Whether chunks guess the state that they begin with: see cuda/gpu_shoot.h."""
        return self.warm_up > 0

    @property
    def paired(self) -> bool:
        """Whether two warps go over the same channels: see cuda/gpu_pair.h."""
        return self.staged >= 2

    @property
    def block(self) -> int:
        """All threads of a block of the sweep."""
        return self.threads * (2 if self.paired else 1)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels that are compiled together."""
        if self.shoots:
            return "forward", "mend", "settle"
        names = ("forward",) if self.forward else ("backward", "sum_partials")
        if self.parallel:
            before = ("clear",) if self.lookahead else ("reduce", "fold")
            names = (*before, *names, *(() if self.forward else ("sum_chunks",)))
        return names

    def grid(self, B: int) -> tuple[int, int, int]:
        """Blocks of the sweep: (channels of all sequences, directions, 1)."""
        if self.decodes:
            return -(-self.d // (self.threads // 32)), self.D, 1
        if self.is_small:
            return B, self.D, 1
        return -(-B * (self.d // self.width) // self.threads), self.D, 1


def plan(variant: Variant, arguments: abi.Forward | abi.Backward, device: Device) -> Plan:
    """The plan for one pass.

    Raises:
        LibraryError: gates do not lie together as in U, (L, B, D, k, d), or a size is beyond what a launch takes.
        ArgumentError: SRU_RT_PLAN is not understood.
    """
    given = arguments.given
    layout.check(variant, arguments)
    if isinstance(arguments, abi.Forward) and arguments.d_in:
        sizes = given.L, given.B, given.D, given.d
        decodes = decode.has_kernel(variant.dtype, sizes, arguments.d_in)
        return _decoding(variant, arguments) if decodes else _of_small_layer(variant, arguments, device)
    key, one_kernel = _static(variant, arguments), in_one_kernel(variant, isinstance(arguments, abi.Forward), device)
    key = replace(key, lookahead=key.lookahead and one_kernel)
    pairs = ITEMSIZE[variant.dtype] == 2 and given.d % 2 == 0 and layout.takes_pairs(variant, arguments)
    task = Task(
        variant,
        key.forward,
        min(given.every, _USUALLY_KEPT) if key.forward else _planned_for(given),
        parallel=key.parallel,
        flags=key.has_mask + key.has_reset,
        pairs=pairs,
        one_step=given.L == 1,
        in_shared=key.scratch_in_shared,
        one_kernel=one_kernel,
        tile=tile_steps(given.chunk),
        staged=_pieces(variant, key, arguments, pairs),
        laps=_laps(variant, key, arguments),
    )
    at = load(given.B * given.D * given.d, device)
    choice = choose(task, at, device.arch, device.multiprocessors)
    own = given.B if _has_own_kernel(variant, key, device, given.B) else 0
    return _overridden(replace(key, **choice._asdict(), B=own), variant, arguments)


def in_one_kernel(variant: Variant, forward: bool, device: Device) -> bool:
    """Whether chunks of time go through one kernel where their steps compose, not three."""
    chosen = overrides.read()
    if "lookahead" in chosen or not forward:
        return overrides.in_one_kernel(chosen)
    return not too_long(variant, device.arch, device.multiprocessors)


def _planned_for(given: abi.Given) -> int:
    """The steps of a piece: of one that is all of a short sequence, those that it usually has."""
    return given.every if given.every < 2 or given.every < given.L else max(given.every, USUAL_EVERY)


def _decoding(variant: Variant, arguments: abi.Forward) -> Plan:
    """The plan for one token whose U the kernel forms; the batch size is compiled in."""
    f, chosen = arguments, overrides.read()
    line, depth = decode.reads(variant.dtype, len(variant.cell.gates), f.d_in, f.x, f.weight)
    return replace(
        _static(variant, arguments),
        width=1,
        depth=chosen.get("depth", depth),
        replay_depth=1,
        reduce_depth=1,
        threads=chosen.get("threads", decode.THREADS),
        B=f.given.B,
        d_in=f.d_in,
        line=line,
    )


def _of_small_layer(variant: Variant, arguments: abi.Forward, device: Device) -> Plan:
    """The plan of a kernel that forms U of sequences; one for any batch size."""
    key, k = _static(variant, arguments), len(variant.cell.gates)
    block = small.block_of(variant, key.d, arguments.d_in, device.arch)
    if block is None or key.keep:
        raise LibraryError(
            f"sru_rt: no kernel for sm_{device.arch} forms U of {variant.dtype} for {k} gates of d = {key.d} from d_in "
            f"= {arguments.d_in} itself{', and keeps states' if key.keep else ''}; give it U"
        )
    return replace(
        key,
        width=1,
        depth=small.depth(variant, key.has_mask + key.has_reset),
        replay_depth=1,
        reduce_depth=1,
        threads=block.threads,
        in_tile=(1 << k) - 1,
        d_in=arguments.d_in,
    )


def needs_scratch(variant: Variant, every: int) -> bool:
    """Whether a backward that recomputes `every` states needs memory for them; if not, they fit into the blocks'."""
    return every > 1 and shared_channels(variant, every) < THREADS[0]


def shared_bytes(variant: Variant, plan: Plan, every: int, chunk: int = 0) -> int:
    """Dynamic shared memory of a block: the states that it recomputes, with rows if they are staged, or the tile."""
    if plan.staged:
        return plan.threads * plan.width * staged_bytes(variant, every, plan.staged, plan.known)
    if plan.laps:
        return plan.threads * plan.width * ring_bytes(variant, plan.forward, plan.laps)
    states = every * plan.width * state_bytes(variant) if plan.scratch_in_shared else 0
    return plan.threads * (states + tile_steps(chunk) * plan.tile_bytes)


def _pieces(variant: Variant, key: Plan, arguments: abi.Forward | abi.Backward, pairs: bool) -> tuple[int, ...]:
    """How many may be staged: up to three where whole warps copy rows to shared memory, one where it can be done four
    bytes at a time.

    Flags are read by warps that lie in one sequence, two for each thread.
    """
    given = arguments.given
    recomputes = not key.forward and key.keep > 1 and not key.parallel and given.L > 1
    fits = pairs or ITEMSIZE[variant.dtype] > 2
    flags = not (key.has_mask or key.has_reset) or (key.d % 64 == 0 and given.every <= 64)
    if not (recomputes and fits and flags):
        return (0,)
    most = 3 if by_warps(variant.dtype, given.d) and layout.reads_multiples(variant, arguments, 16) else 1
    chosen = overrides.read().get("staged")
    return tuple(range(most + 1)) if chosen is None else (min(chosen, most),)


def by_warps(dtype: str, d: int) -> bool:
    """Whether warps lie in one sequence, whatever the width."""
    return d % (64 if ITEMSIZE[dtype] == 2 else 32) == 0


def _laps(variant: Variant, key: Plan, arguments: abi.Forward | abi.Backward) -> tuple[int, ...]:
    """How many laps a ring may have; (0,) where rows cannot come through one, 16 bytes at a time and by whole warps."""
    given, chosen = arguments.given, overrides.read()
    alone = key.parallel or given.L == 1 or not (key.forward or key.keep == 1)
    states = () if key.forward else arguments.saved
    aligned = not any(p % 16 for p in states) and layout.reads_multiples(variant, arguments, 16)
    if alone or not (by_warps(variant.dtype, given.d) and aligned):
        return (0,)
    return (chosen["laps"],) if "laps" in chosen else (0,) if "depth" in chosen else LAPS


def _static(variant: Variant, arguments: abi.Forward | abi.Backward) -> Plan:
    """What follows from the arguments alone."""
    given = arguments.given
    forward = isinstance(arguments, abi.Forward)
    chosen, cut = overrides.read(), given.chunk > 0
    guesses = cut and shoots(variant.cell, forward)
    wants_gates, wants_inputs = False, 0
    if isinstance(arguments, abi.Backward):
        wants_gates = any(slot.pointer for slot in arguments.dgates)
        wants_inputs = sum(1 << i for i, slot in enumerate(arguments.dinputs) if slot.pointer)
    return Plan(
        forward=forward,
        width=0,
        depth=0,
        replay_depth=0,
        reduce_depth=0,
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
        parallel=cut,
        lookahead=cut and not guesses and overrides.in_one_kernel(chosen),
        warm_up=chosen.get("warm_up", warm_up(variant)) if guesses else 0,
        saved_in_chunks=isinstance(arguments, abi.Backward) and arguments.saved_chunk > 0 and given.every > 1,
        reduce_reads_state=cut and not forward and reduction_reads_state(variant.cell),
    )


_batches: dict[tuple[Variant, Plan, Device], set[int]] = {}


def _has_own_kernel(variant: Variant, key: Plan, device: Device, B: int) -> bool:
    """Whether the first few batch sizes of this layer include `B`."""
    seen = _batches.setdefault((variant, key, device), set())
    if B not in seen and len(seen) < MAX_BATCHES:
        seen.add(B)
    return B in seen


def _overridden(made: Plan, variant: Variant, arguments: abi.Forward | abi.Backward) -> Plan:
    """The plan with what SRU_RT_PLAN says."""
    chosen = overrides.read()
    depth = chosen.get("depth")
    made = replace(
        made,
        width=chosen.get("width", made.width),
        depth=depth or made.depth,
        replay_depth=depth or made.replay_depth if made.replay_depth > 1 else 1,
        reduce_depth=depth or made.reduce_depth if made.parallel else 1,
        threads=chosen.get("threads", made.threads),
    )
    if made.width > 1 and not layout.takes_pairs(variant, arguments):
        made = replace(made, width=1)
    every, chunk = arguments.given.every, arguments.given.chunk
    if made.laps:
        made = _in_ring(made, variant)
    elif made.staged and isinstance(arguments, abi.Backward):
        made = _staged(made, variant, arguments)
    else:
        made = _tiled(made, variant, every, tile_steps(chunk))
    if (needed := shared_bytes(variant, made, every, chunk)) > shared_memory.SHARED_BYTES:
        raise ArgumentError(
            f"SRU_RT_PLAN asks for blocks of {made.threads} threads of {made.width} channels, which need {needed} "
            f"bytes of shared memory for {every} states; there are {shared_memory.SHARED_BYTES}: choose fewer threads"
        )
    return made


def _tiled(made: Plan, variant: Variant, every: int, steps: int) -> Plan:
    """The plan with a tile of `steps` steps, if a block has room for it."""
    held = tile(variant, made.forward, every) if made.lookahead and steps else {}
    step_bytes = made.width * sum(held.values())
    if made.threads > tile_threads(steps, step_bytes):
        return made
    return replace(made, in_tile=sum(1 << i for i in held), tile_bytes=step_bytes)


def _in_ring(made: Plan, variant: Variant) -> Plan:
    """The plan with what its ring holds, if its warps lie in one sequence and a block has room for it."""
    held, item = ring(variant, made.forward), ITEMSIZE[variant.dtype]
    fits = made.threads * made.width <= ring_channels(variant, made.forward, made.laps)
    if made.d % (32 * made.width) or made.laps < fewest_laps(made.forward) or not fits:
        return replace(made, laps=0)
    row = made.width * sum(held.values())
    return replace(made, depth=LAP, in_tile=sum(1 << i for i in held), tile_bytes=row, copied=16 // item)


def _staged(made: Plan, variant: Variant, arguments: abi.Backward) -> Plan:
    """The plan with as many pieces staged as it says, or as a block has room for."""
    held, item = staged(variant), ITEMSIZE[variant.dtype]
    whole_warps = made.d % (32 * made.width) == 0 and layout.reads_multiples(variant, arguments, 16)
    channels, every = made.threads * made.width, arguments.given.every
    most = made.staged if whole_warps and made.threads <= PAIRED_THREADS else min(made.staged, 1)
    fitting = next((n for n in range(most, 0, -1) if channels <= staged_channels(variant, every, n)), 0)
    if fitting and fitting < made.staged and "depth" not in overrides.read():
        lap = lap_of_staged(every, fitting)
        made = replace(made, depth=lap, replay_depth=lap)
    made = replace(made, staged=fitting)
    if not fitting:
        return made
    copied = 16 // item if whole_warps else max(made.width, 4 // item)
    row = made.width * sum(held.values())
    known = activations(variant, every, made.staged, channels) if made.paired else 0
    return replace(made, in_tile=sum(1 << i for i in held), tile_bytes=row, copied=copied, known=known)
