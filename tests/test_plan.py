"""What the planner decides for a GPU, from what, and within which limits. No GPU and no CuPy are needed."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest

from nvrtc import arguments
from sru_rt import choose, chunks, launch_gpu, plan, predict, source, traffic
from sru_rt.cell import Array, Cell
from sru_rt.cells import named_cells
from sru_rt.dtypes import IO_DTYPES, state_dtype
from sru_rt.errors import ArgumentError, LibraryError
from sru_rt.machine import USUAL_MULTIPROCESSORS, Device
from sru_rt.plan import Plan
from sru_rt.shared_memory import chunk_of_tile
from sru_rt.variant import Variant

CELLS = {cell.name: cell for cell in named_cells()}
SRU = CELLS["sru"]
H200 = Device(90, 132)
USUAL = (2048, 16, 1, 1024)  # L, B, D, d
LARGE = (2048, 128, 1, 1024)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No batch size has been seen, and nothing is overridden."""
    monkeypatch.setattr(plan, "_batches", {})
    monkeypatch.delenv("SRU_RT_PLAN", raising=False)


def variant(cell=SRU, dtype="float32", **options):
    return Variant(cell, dtype, options.pop("saved_dtype", state_dtype(dtype)), **options)


def made(dtype="float32", sizes=USUAL, device=H200, cell=SRU, **options) -> Plan:
    return plan.plan(variant(cell, dtype), arguments(cell, dtype, sizes, **options), device)


# ----------------------------------------------------------------------------------------------------------------------
# Any size


def ring_registers(cell: Cell, dtype: str, p: Plan, wide: int = 0) -> int:
    """Of one thread: what the C++ keeps of a row that is read ahead, with two 16-bit channels in one register."""
    item, state = traffic.ITEMSIZE[dtype], traffic.ITEMSIZE[state_dtype(dtype)]
    items = [item] * len(cell.gates) + [state if wide >> i & 1 else item for i in range(len(cell.inputs))]
    if not p.forward:
        items += [item] + [state] * len(cell.state)
    return p.depth * (sum(max(1, n * p.width // 4) for n in items) + p.has_mask + p.has_reset)


sizes = st.tuples(
    st.integers(1, 1 << 20), st.integers(0, 300), st.integers(1, 2), st.one_of(st.integers(1, 70), st.just(1024))
)


@hypothesis.settings(deadline=None)  # as other processes may be in the way
@hypothesis.given(
    cell=st.sampled_from(list(CELLS.values())),
    dtype=st.sampled_from(IO_DTYPES),
    sizes=sizes,
    forward=st.booleans(),
    every=st.sampled_from([0, 1, 2, 32, 100, 5000]),
    device=st.builds(Device, st.sampled_from(list(USUAL_MULTIPROCESSORS)), st.integers(1, 200)),
    mask=st.booleans(),
    reset=st.booleans(),
)
def test_any_plan_can_be_run(cell, dtype, sizes, forward, every, device, mask, reset):
    every = every if forward else max(1, every)
    L, B, D, d = sizes
    given = arguments(cell, dtype, sizes, forward=forward, every=every, mask=mask, reset=reset)
    p = plan.plan(variant(cell, dtype), given, device)
    assert p.width in (1, 2) and d % p.width == 0
    assert p.width == 1 or dtype in ("float16", "bfloat16")
    assert p.threads % 32 == 0 and 32 <= p.threads <= 256
    assert p.depth == 1 if L == 1 else p.depth in choose.DEPTHS
    assert p.B in (0, B) and p.D == D and p.d == d
    assert (p.has_mask, p.has_reset, p.keep) == (mask, reset, min(every, 2))
    assert p.gate_stride == len(cell.gates) * d
    # A grid covers every channel of every sequence, and no block is without work.
    x, y, z = p.grid(B)
    assert (y, z) == (D, 1)
    assert (x - 1) * p.threads * p.width < B * d <= x * p.threads * p.width or x == B == 0
    # The ring leaves registers for all else, half of the 255 or more, if it is not in shared memory.
    assert p.laps or ring_registers(cell, dtype, p) <= 128
    # Recomputed states lie in shared memory where they fit, and only then.
    shared = plan.shared_bytes(variant(cell, dtype), p, every)
    assert shared <= 48 << 10
    if forward or every < 2:
        row = sum(traffic.read(variant(cell, dtype), forward, keep=1))
        assert not p.scratch_in_shared and shared == p.threads * p.width * p.laps * 8 * row
    else:
        assert p.scratch_in_shared is not plan.needs_scratch(variant(cell, dtype), every)
        # Rows lie beside them where they are staged; of two pieces all that is known, by two warps.
        rows = traffic.ITEMSIZE[dtype] * (len(cell.gates) + len(cell.inputs) + 1) * p.staged
        states = traffic.ITEMSIZE[state_dtype(dtype)] * p.scratch_in_shared * (1 + p.known) * min(2, max(1, p.staged))
        assert shared == every * p.threads * p.width * (rows + states)
        assert p.block == p.threads * (2 if p.staged > 1 else 1) and p.block <= 1024


@pytest.fixture
def in_registers(monkeypatch):
    """Rings, wherever they might lie."""
    monkeypatch.setenv("SRU_RT_PLAN", "laps=0")


@pytest.mark.parametrize("forward", [True, False])
def test_ring_is_deepest_where_channels_are_few(forward, in_registers):
    depths = [made(sizes=(2048, B, 1, 1024), forward=forward, every=1).depth for B in (1, 4, 16, 64, 256, 1024)]
    assert depths == sorted(depths, reverse=True) and depths[0] > depths[-1]


def test_recomputation_leaves_the_ring_less(in_registers):
    depths = [made(sizes=(2048, 2, 1, 1024), forward=False, every=every).depth for every in (1, 32)]
    assert depths[0] > depths[1]


def test_masks_and_wide_inputs_count_as_registers(in_registers):
    cell = Cell("many", lambda a, b, c, s, x, y, z: (a * s + x, b + c + y + z), (
        Array("u", "gates", ("a", "b", "c")),
        Array("i", "inputs", ("x", "y", "z"), stacked=True),
        Array("s0", "state", ("s",)),
    ))  # fmt: skip
    given = arguments(cell, "bfloat16", (2048, 128, 1, 1024))
    plans = [plan.plan(variant(cell, "bfloat16", wide=wide), given, Device(90, 1000)) for wide in (0, 7)]
    assert [p.width for p in plans] == [1, 1]
    assert all(ring_registers(cell, "bfloat16", p, wide) <= 128 for p, wide in zip(plans, (0, 7)))
    few = (2048, 1, 1, 1024)
    assert made(sizes=few).depth == 32 > made(sizes=few, mask=True, reset=True).depth


def test_small_blocks_spread_over_all_multiprocessors(in_registers):
    for B, threads in ((1, 32), (16, 32), (64, 32), (128, 64), (256, 128), (4096, 256)):
        assert made(sizes=(512, B, 1, 1024)).threads == threads


# ----------------------------------------------------------------------------------------------------------------------
# What does not change the kernel


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("dtype", IO_DTYPES)
def test_length_alone_does_not_change_the_kernel(dtype, forward):
    plans = {made(dtype, (L, *USUAL[1:]), forward=forward, every=1) for L in (2, 3, 100, 1 << 20)}
    assert len(plans) == 1
    one = made(dtype, (1, *USUAL[1:]), forward=forward, every=1)
    assert one.depth == 1 and replace(one, depth=plans.pop().depth) != one


def test_interval_of_kept_states_does_not_change_the_forward():
    assert len({made(every=every, forward=True) for every in (2, 32, 100)}) == 1


def test_first_eight_batch_sizes_have_kernels_of_their_own():
    assert [made(sizes=(9, B, 1, 64)).B for B in range(1, 12)] == [*range(1, 9), 0, 0, 0]
    assert [made(sizes=(9, B, 1, 64)).B for B in (8, 1, 9, 5)] == [8, 1, 0, 5]


@pytest.mark.parametrize(
    "other",
    [
        dict(forward=False, every=1),
        dict(every=1),
        dict(mask=True),
        dict(sizes=(9, 100, 1, 65)),
        dict(sizes=(9, 100, 2, 64)),
        dict(dtype="float64"),
        dict(cell=CELLS["sru_tanh"]),
    ],
)
def test_each_layer_has_its_own_eight(other):
    for B in range(1, 10):
        made(sizes=(9, B, 1, 64))
    assert made(**{"sizes": (9, 100, 1, 64)} | other).B == 100


def test_kernels_for_any_batch_differ_in_nothing_else():
    own = made(sizes=(9, 20, 1, 64))
    for B in range(1, 9):
        made(sizes=(9, B, 1, 64))
    plan._batches.clear()
    for B in range(1, 9):
        made(sizes=(9, B, 1, 64))
    assert made(sizes=(9, 20, 1, 64)) == replace(own, B=0)


# ----------------------------------------------------------------------------------------------------------------------
# Two channels at once


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_channels_of_16_bit_where_there_are_many(dtype, forward):
    assert made(dtype, LARGE, forward=forward, every=1).width == 2
    assert made(dtype, (2048, 2, 1, 1024), forward=forward, every=1).width == 1
    assert made(dtype, (2048, 128, 1, 1023), forward=forward, every=1).width == 1  # a pair would lie in two rows


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_channel_of_wider_dtypes(dtype):
    assert made(dtype, LARGE).width == 1


def widths(given, dtype="bfloat16", wide=0, cell=SRU):
    return plan.plan(variant(cell, dtype, wide=wide), given, H200).width


def test_misaligned_arrays_are_read_one_channel_at_a_time():
    assert [made("bfloat16", LARGE, address=(1 << 20) + n).width for n in (0, 2, 4, 8)] == [2, 1, 2, 2]
    # Kept states are of 4 bytes, two of them of 8.
    kept = [made("bfloat16", LARGE, address=(1 << 20) + n, every=1).width for n in (0, 2, 4, 8)]
    assert kept == [2, 1, 1, 2]


@pytest.mark.parametrize("name", ["h", "saved", "gates", "inputs", "wide inputs", "strides"])
def test_every_array_of_the_forward_counts(name):
    given = arguments(SRU, "bfloat16", LARGE, every=1)
    assert widths(given) == 2
    wide = 0
    if name == "h":
        given = given._replace(h=given.h + 2)
    elif name == "saved":
        given = given._replace(saved=[given.saved[0] + 4])
    elif name == "gates":
        shifted = [slot._replace(pointer=slot.pointer + 2) for slot in given.given.gates]
        given = given._replace(given=given.given._replace(gates=shifted))
    elif name == "strides":
        uneven = [slot._replace(stride=slot.stride + 1) for slot in given.given.inputs]
        given = given._replace(given=given.given._replace(inputs=uneven))
    else:
        wide = int(name == "wide inputs")
        shifted = [slot._replace(pointer=slot.pointer + (4 if wide else 2)) for slot in given.given.inputs]
        given = given._replace(given=given.given._replace(inputs=shifted))
    assert widths(given, wide=wide) == 1


@pytest.mark.parametrize("name", ["dh", "dgates", "dinputs", "wide dinputs", "states"])
def test_every_array_of_the_backward_counts(name):
    given = arguments(SRU, "bfloat16", LARGE, forward=False, every=5000)
    assert widths(given) == 2
    wide = 0
    if name == "dh":
        given = given._replace(dh=given.dh + 2)
    elif name == "states":
        given = given._replace(states=[given.states[0] + 4])
    elif name == "dgates":
        given = given._replace(dgates=[slot._replace(pointer=slot.pointer + 2) for slot in given.dgates])
    else:
        wide = int(name == "wide dinputs")
        shift = 4 if wide else 2
        given = given._replace(dinputs=[slot._replace(pointer=slot.pointer + shift) for slot in given.dinputs])
    assert widths(given, wide=wide) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted


def test_gradients_that_are_not_wanted_are_left_out():
    plans = {need: made(forward=False, every=1, need=need) for need in ((), ("gates",), ("inputs",), ("params",))}
    assert [(p.wants_gates, p.wants_inputs) for p in plans.values()] == [(False, 0), (True, 0), (False, 1), (False, 0)]
    assert plans[()] == replace(plans["params",], B=plans[()].B)
    per_step = CELLS["sru_v_per_step_dropout"]
    assert made(cell=per_step, forward=False, every=1).wants_inputs == 0b111


def test_the_kernel_text_holds_the_whole_plan():
    """Every field but the pass itself, which chooses the entry points: kernels are cached by their text."""
    base = replace(made("bfloat16", forward=False, every=32), staged=0, threads=32)  # staged, it is never parallel
    changed = dict(width=2, depth=4, threads=64, B=99, D=2, d=2048, gate_stride=7, input_strides=(5,), keep=1)
    changed |= dict(has_mask=True, has_reset=True, wants_gates=False, wants_inputs=0, scratch_in_shared=False)
    changed |= dict(forward=True, replay_depth=2, reduce_depth=2, parallel=True, warm_up=9)
    changed |= dict(reduce_reads_state=True, saved_in_chunks=True, lookahead=True, in_tile=5, tile_bytes=8)
    changed |= dict(staged=1, known=3, laps=3, copied=4, d_in=96, line=16)
    assert set(changed) == set(Plan.__dataclass_fields__)

    def text(p: Plan) -> str:
        return source.gpu_kernel("", "cell", Variant(CELLS["sru"], "bfloat16", "float32"), p, 8)

    for name, value in changed.items():
        assert getattr(base, name) != value, name
        assert text(replace(base, **{name: value})) != text(base), name


# ----------------------------------------------------------------------------------------------------------------------
# SRU_RT_PLAN


def test_override(monkeypatch):
    usual = made()
    monkeypatch.setenv("SRU_RT_PLAN", "laps=0")
    in_registers = made()
    monkeypatch.setenv("SRU_RT_PLAN", " depth = 7, threads=96 ")
    assert made() == replace(in_registers, depth=7, threads=96)
    assert made().grid(16) == (-(-16 * 1024 // 96), 1, 1)
    monkeypatch.setenv("SRU_RT_PLAN", "width=2")
    assert made("bfloat16").width == 2
    monkeypatch.setenv("SRU_RT_PLAN", "")
    assert made() == usual


def test_a_token_has_a_warp_for_each_channel(monkeypatch):
    """Its batch size is compiled in, however many there have been."""
    for B in range(1, 9):
        found = made("bfloat16", (1, B, 2, 1023), d_in=1000)
        assert (found.decodes, found.B, found.d_in) == (True, B, 1000)
        assert found.grid(B) == (256, 2, 1)
    monkeypatch.setenv("SRU_RT_PLAN", "depth=7,threads=96,width=2")
    other = made("bfloat16", (1, 8, 2, 1023), d_in=1000)
    assert other == replace(found, depth=7, threads=96) and other.grid(8) == (341, 2, 1)


@pytest.mark.parametrize(
    "value",
    ["depth=0", "depth=65", "threads=33", "threads=2048", "width=3", "width=0", "registers=3", "B=4", "depth=-4"],
)
def test_override_beyond_its_limits(value, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", value)
    with pytest.raises(ArgumentError) as caught:
        made()
    message = str(caught.value)
    assert f"SRU_RT_PLAN has {value};" in message
    assert "width=1 or 2" in message and "depth=1..64" in message and "threads=32..1024" in message


@pytest.mark.parametrize("value", ["depth", "depth=x", "depth=4;threads=64", "depth=4,,threads=64"])
def test_override_that_is_no_list(value, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", value)
    with pytest.raises(ArgumentError, match="SRU_RT_PLAN must be a list such as depth=16,threads=64"):
        made()


def test_override_of_the_width_where_pairs_cannot_be_read(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "width=2")
    assert made("float32").width == 2
    assert made("bfloat16", (9, 3, 1, 13)).width == 1
    assert made("float32", address=(1 << 20) + 4).width == 1


def test_override_that_asks_for_more_shared_memory_than_there_is(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "threads=512")
    with pytest.raises(ArgumentError, match=r"SRU_RT_PLAN asks for blocks of 512 threads.*65536.*49152"):
        made(forward=False, every=32)
    monkeypatch.setenv("SRU_RT_PLAN", "threads=384")
    assert made(forward=False, every=32).scratch_in_shared


# ----------------------------------------------------------------------------------------------------------------------
# Rows in shared memory, where states are recomputed


RECOMPUTED = {"forward": False, "every": 32}
BACK = {"forward": False, "every": 1}


@pytest.mark.parametrize(
    "dtype, staged, threads, known, depth",
    [("float32", 1, 64, 0, 8), ("float32", 2, 32, 0, 8), ("bfloat16", 3, 32, 1, 16)],
)
def test_rows_are_staged(dtype, staged, threads, known, depth, monkeypatch):
    """With the forget gate where there is room for it, too. Two pieces are asked for."""
    monkeypatch.setenv("SRU_RT_PLAN", "staged=2" if staged == 2 else "")
    p, row = made(dtype, **RECOMPUTED), 5 * traffic.ITEMSIZE[dtype]
    assert (p.staged, p.in_tile, p.tile_bytes, p.known) == (staged, 0b11111, row, known)
    assert (p.width, p.threads, p.block) == (1, threads, 64)
    states = min(staged, 2) * (4 + 4 * known)
    assert plan.shared_bytes(variant(dtype=dtype), p, 32) == 32 * threads * (staged * row + states)
    assert p.depth == p.replay_depth == depth


@pytest.mark.parametrize("staged", [2, 3])
@pytest.mark.parametrize("every, known", [(2, 2), (31, 2), (32, 2), (33, 0), (48, 0)])
def test_activations_are_kept_where_there_is_room(staged, every, known, monkeypatch):
    """In pieces of 32 steps, or of twice as many, for shorter ones, too."""
    monkeypatch.setenv("SRU_RT_PLAN", f"staged={staged}")
    p = made("bfloat16", cell=CELLS["qrnn"], forward=False, every=every)
    assert (p.staged, p.known) == (staged, known)


def test_wider_blocks_have_room_for_fewer_activations(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "width=2")
    p = made("bfloat16", cell=CELLS["mingru_positive"], forward=False, every=32)
    assert (p.staged, p.depth, p.width, p.known) == (2, 8, 2, 0)  # of three planned pieces with activations


def test_more_pieces_than_there_is_room_for(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "staged=3")
    assert made("float32", **RECOMPUTED).staged in (1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_short_sequences_have_the_kernel_of_long_ones(dtype):
    """Layers keep no more states than there are steps, and L compiles nothing."""
    plans = {made(dtype, (L, 16, 1, 1024), forward=False, every=min(L, 32)) for L in range(2, 40)}
    assert len(plans) == 1


@pytest.mark.parametrize(
    "staged, every, depth",
    [
        *((2, every, depth) for every, depth in ((2, 1), (5, 2), (8, 2), (16, 4), (28, 7), (29, 8), (32, 8), (64, 8))),
        *((3, every, depth) for every, depth in ((2, 2), (5, 5), (15, 15), (16, 16), (17, 16), (32, 16), (48, 16))),
    ],
)
def test_pairs_meet_in_a_piece(staged, every, depth, monkeypatch):
    """Four times at least, or at its end, so that rows are on their way long before they are needed."""
    monkeypatch.setenv("SRU_RT_PLAN", f"staged={staged}")
    p = made("bfloat16", cell=CELLS["mingru"], forward=False, every=every)
    assert (p.staged, p.depth, p.replay_depth) == (staged, depth, depth)


@pytest.mark.parametrize("cell", ["sru", "qrnn", "mingru"])
def test_pieces_of_no_whole_laps_are_as_good(cell):
    plans = [made("bfloat16", cell=CELLS[cell], forward=False, every=every) for every in (16, 17, 20, 24, 31, 32)]
    assert {(p.staged, p.depth) for p in plans} == {(3, 16)}


def test_a_second_turn_of_blocks_counts():
    """Of pairs, which a multiprocessor has room for four of."""
    cell = CELLS["sru_tanh"]
    held = {B: made("bfloat16", (2048, B, 1, 1024), cell=cell, forward=False, every=32) for B in (16, 20)}
    assert held[16].staged == 3
    for B, p in held.items():
        shared = plan.shared_bytes(variant(cell, "bfloat16"), p, 32) + 1024
        assert p.grid(B)[0] <= 132 * (228 * 1024 // shared)


def test_a_block_is_one_pair(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "threads=64,width=1,staged=2")
    p = made("bfloat16", cell=CELLS["mingru"], forward=False, every=8)
    assert (p.staged, p.block) == (1, 64)


@pytest.mark.parametrize(
    "other",
    [
        dict(forward=True),
        dict(every=1),
        dict(every=65),  # of which no piece has room
        dict(mask=True, sizes=(2048, 16, 1, 1056)),  # pairs of warps lie in two sequences
        dict(reset=True, every=65, dtype="bfloat16"),
        dict(sizes=(1, *USUAL[1:])),
        dict(chunk=64),
        dict(device=Device(75, 40)),
        dict(dtype="bfloat16", sizes=(2048, 16, 1, 1023)),
        dict(dtype="bfloat16", address=(1 << 20) + 2),
        dict(dtype="float64", every=33),
        dict(dtype="float64", cell=CELLS["sru_v_per_step_dropout"]),
    ],
)
def test_where_rows_are_not_staged(other):
    assert not made(**RECOMPUTED | other).staged


@pytest.mark.parametrize(
    "other, pieces",
    [
        (dict(sizes=(2048, 16, 1, 1023)), 1),  # warps lie in two sequences; elements of four bytes lie as copies demand
        (dict(dtype="float64"), 1),
        (dict(dtype="float16", every=54), 2),
        (dict(dtype="float16", every=55), 1),
        (dict(every=2), 3),
        (dict(every=34), 1),
        (dict(every=64), 1),
        (dict(dtype="bfloat16", device=Device(80, 108), sizes=(2048, 8, 1, 1024)), 3),
        (dict(dtype="bfloat16", saved_chunk=64), 3),
        (dict(dtype="bfloat16", mask=True, reset=True), 3),
        (dict(every=65, dtype="bfloat16"), 1),
        (dict(cell=CELLS["sru_v_per_step_dropout"]), 1),
    ],
)
def test_where_rows_are_staged_too(other, pieces):
    assert made(**RECOMPUTED | other).staged == pieces


@pytest.mark.parametrize(
    "dtype, sizes, copied",
    [
        ("float32", USUAL, 4),
        ("bfloat16", USUAL, 8),
        ("float32", (2048, 16, 1, 1040), 1),  # warps lie in two sequences
        ("bfloat16", (2048, 16, 1, 1040), 2),
        ("float64", USUAL, 2),
    ],
)
def test_copies_are_of_16_bytes_where_warps_lie_in_one_sequence(dtype, sizes, copied):
    assert made(dtype, sizes, **RECOMPUTED).copied == copied


@pytest.mark.parametrize("name", ["gates", "inputs", "dh", "strides"])
def test_every_array_counts_for_copies(name):
    backward = arguments(SRU, "float32", USUAL, **RECOMPUTED)
    given = backward.given
    if name == "dh":
        backward = backward._replace(dh=backward.dh + 8)
    elif name == "strides":
        longer = [slot._replace(stride=slot.stride + 2) for slot in given.inputs]
        backward = backward._replace(
            given=given._replace(inputs=longer), dinputs=[s._replace(pointer=0) for s in longer]
        )
    else:
        shifted = [slot._replace(pointer=slot.pointer + 8) for slot in getattr(given, name)]
        backward = backward._replace(given=given._replace(**{name: shifted}))
    p = plan.plan(variant(), backward, H200)
    assert (p.staged, p.copied) == (1, 1)


@pytest.mark.parametrize("text, staged", [("staged=0", 0), ("staged=1", 1), ("staged=2", 2), ("threads=64", 1)])
def test_override_of_staging(text, staged, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", text)
    p = made(**RECOMPUTED)
    assert p.staged == staged and bool(p.tile_bytes) == bool(staged) and p.scratch_in_shared


# ----------------------------------------------------------------------------------------------------------------------
# Rings in shared memory


@pytest.mark.parametrize("options, held, row", [({}, 0b1111, 4), (dict(every=32), 0b1111, 4), (BACK, 0b111111, 6)])
@pytest.mark.parametrize("dtype, copied", [("float32", 4), ("bfloat16", 8), ("float64", 2)])
def test_a_ring_holds_all_that_is_read(dtype, copied, options, held, row):
    p, item = made(dtype, **options), traffic.ITEMSIZE[dtype]
    row = row * item + (2 if dtype == "bfloat16" and held > 15 else 0)  # states are wider
    assert (p.depth, p.copied, p.in_tile, p.tile_bytes) == (8, copied, held, row * p.width)
    assert plan.shared_bytes(variant(dtype=dtype), p, p.keep) == p.threads * p.width * p.laps * 8 * row > 0


def test_few_channels_take_more_laps_and_smaller_blocks():
    plans = [made("bfloat16", (512, B, 1, 1024)) for B in (4, 16, 64)]
    assert [p.laps for p in plans] == sorted((p.laps for p in plans), reverse=True)
    assert [(p.width, p.threads) for p in plans] == [(1, 32), (1, 64), (2, 64)]


@pytest.mark.parametrize(
    "other",
    [
        dict(sizes=(1, *USUAL[1:])),
        dict(sizes=(2048, 16, 1, 1040)),  # warps lie in two sequences
        dict(dtype="bfloat16", sizes=(2048, 16, 1, 1056)),  # warps of pairs do
        dict(address=(1 << 20) + 8),
        dict(chunk=64),
        dict(device=Device(75, 40)),
        dict(forward=False, every=2),
    ],
)
def test_where_there_is_none(other):
    assert made().laps and not made(**other).laps


@pytest.mark.parametrize("name", ["saved", "dh", "gates", "inputs"])
def test_every_array_counts_for_a_ring(name):
    backward = arguments(SRU, "float32", USUAL, **BACK)
    given = backward.given
    if name == "saved":
        backward = backward._replace(saved=[pointer + 8 for pointer in backward.saved])
    elif name == "dh":
        backward = backward._replace(dh=backward.dh + 8)
    else:
        shifted = [slot._replace(pointer=slot.pointer + 8) for slot in getattr(given, name)]
        backward = backward._replace(given=given._replace(**{name: shifted}))
    assert not plan.plan(variant(), backward, H200).laps


@pytest.mark.parametrize("text, laps", [("laps=0", 0), ("laps=5", 5), ("laps=16,threads=256", 0), ("depth=8", 0)])
def test_override_of_laps(text, laps, monkeypatch):
    """Where a block has no room for so many, the ring is in registers; there it is too where its depth is given."""
    monkeypatch.setenv("SRU_RT_PLAN", text)
    p = made()
    assert p.laps == laps and bool(p.tile_bytes) == bool(laps)


# ----------------------------------------------------------------------------------------------------------------------
# Parallel over time


AFFINE = CELLS["sru_no_v"]
FEW = (65536, 1, 1, 1024)


def chunk(sizes=FEW, forward=True, how: bool | str = "auto", cell=AFFINE, dtype="float32", device=H200, **options):
    return chunks.length(variant(cell, dtype, **options), sizes, forward, how, device)


def test_what_can_be_cut():
    """Every forward, and backwards of steps that can be composed."""
    three = Cell("three", lambda a, p, q, r: (a * q, a * r, a * p, p), (
        Array("u", "gates", ("a",)),
        *(Array(f"{n}0", "state", (n,)) for n in "pqr"),
    ))  # fmt: skip
    cut = {
        cell.name: tuple(chunk(cell=cell, forward=f, how=True) > 0 for f in (True, False))
        for cell in (three, SRU, AFFINE)
    }
    assert cut == {"three": (True, False), "sru": (True, True), "sru_no_v": (True, True)}
    assert [choose.shoots(cell, True) for cell in (three, SRU, AFFINE)] == [True, True, False]
    assert not any(choose.shoots(cell, False) for cell in (three, SRU, AFFINE))


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((65, 1, 1, 8), 64),
        ((64, 1, 1, 8), 0),  # one chunk
        ((200, 64, 1, 1024), 64),
        ((65536, 1, 1, 1024), 64),
        ((2048, 1, 1, 1024), 64),
        ((1 << 27, 1, 1, 1), 4096),  # a grid holds no more than 65535 chunks
        ((1, 1, 1, 8), 0),
        ((0, 1, 1, 8), 0),
        ((500, 0, 1, 8), 0),
    ],
)
def test_length_of_chunks(sizes, expected):
    assert chunk(sizes, how=True) == expected
    assert chunk(sizes, how=False) == 0


@pytest.mark.parametrize(
    "sizes, expected",
    [((200, 64, 1, 1024), 128), ((65536, 1, 1, 1024), 1024), ((2048, 1, 1, 1024), 64)],  # 128: the best would be one
)
def test_length_of_chunks_of_three_kernels(sizes, expected, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "lookahead=0")
    assert chunk(sizes, how=True) == expected


def seconds(sizes, forward, length, one_kernel) -> float:
    """What the model says of one pass, in chunks of `length` steps; 0: of the sequential kernels."""
    L, B, D, d = sizes
    task = chunks._task(variant(AFFINE), forward, d, one_kernel)
    at = 2 ** (1 / 8) * choose.load(B * D * d, H200)
    kernels = (
        chunks.in_chunks(task, L, length, D * d, at, H200) if length else chunks.sequential(task, L, D * d, at, H200)
    )
    return predict.together(kernels)[1]


@pytest.mark.parametrize("one_kernel", [True, False])
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("L", [300, 2048, 65536])
def test_the_fastest_is_taken(L, forward, one_kernel, monkeypatch):
    """Of all lengths for three kernels; one takes chunks of the one length that has a tile. But they take longer than
    predicted, so that they have to be faster by more than a little."""
    monkeypatch.setenv("SRU_RT_PLAN", f"lookahead={int(one_kernel)}")
    lengths = (64,) if one_kernel else (64, 128, 256, 512, 1024)
    for B in (1, 4, 16):
        sizes = L, B, 1, 1024
        best = min((n for n in lengths if n < L), key=lambda n: seconds(sizes, forward, n, one_kernel))
        assert chunk(sizes, forward, how=True) == best
        faster = seconds(sizes, forward, best, one_kernel) < 0.7 * seconds(sizes, forward, 0, one_kernel)
        assert chunk(sizes, forward) == (best if faster else 0)


@hypothesis.settings(deadline=None)
@hypothesis.given(L=st.integers(2, 1 << 31), chosen=st.sampled_from((1, 3, 64, 4096)))
def test_chunks_fit_a_grid(L, chosen):
    length = chunks._fitting(L, chosen)
    assert chunks.count(L, length) <= 65535
    assert length >= chosen and length % chosen == 0


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("dtype", IO_DTYPES)
def test_few_channels_are_cut_and_many_are_not(dtype, forward):
    cut = [chunk((4096, B, 1, 256), forward, dtype=dtype) > 0 for B in (1, 4, 8, 16, 32, 64, 128, 256, 512)]
    assert cut == sorted(cut, reverse=True) and cut[0] and not cut[-1]
    assert chunk((130, 1, 1, 256), forward, how=True, dtype=dtype) == (64 if forward or dtype != "float64" else 32)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("dtype", IO_DTYPES)
def test_longer_sequences_are_cut_if_shorter_ones_are(dtype, forward):
    """`warm` asks for a long one, and has the kernels of all."""
    for B in (1, 3, 9, 17, 33):
        cut = [chunk((L, B, 1, 256), forward, dtype=dtype) > 0 for L in (100, 256, 512, 1024, 4096, 1 << 15, 1 << 20)]
        assert cut == sorted(cut) and not cut[0]


@pytest.mark.parametrize("forward, bytes_moved", [(True, 20), (False, 40)])
def test_where_it_begins_to_pay(forward, bytes_moved):
    """Where a warp takes longer for a step than the memory does for what is read and written, each once: some 20 ns,
    where the copies of a ring in shared memory are made ahead of time."""
    limit = 20e-9 / (bytes_moved / 4.32e12)
    cut = [chunk((1 << 20, 1, 1, int(part * limit) // 32 * 32), forward) > 0 for part in (0.3, 0.5, 2, 4)]
    assert cut == [True, True, False, False]


def test_kept_states_of_forwards_that_guess_are_those_of_the_sequential_kernel():
    assert chunks.counted_in(SRU, 64) == 0 and chunks.counted_in(AFFINE, 64) == 64


@pytest.mark.parametrize("cell", [SRU, AFFINE])
@pytest.mark.parametrize("forward", [True, False])
def test_scratch(cell, forward, monkeypatch):
    """Of 3 chunks: begin and two ends, or A, b and a state, with a word for 32 channels and one more, or A and b."""
    sizes, words = (130, 2, 2, 17), 3 * 2 * 2 + 1
    guesses = choose.shoots(cell, forward)
    assert chunks.carried(cell, forward, sizes, 64) == 9 * 68 + (0 if guesses else words)
    monkeypatch.setenv("SRU_RT_PLAN", "lookahead=0")
    assert chunks.carried(cell, forward, sizes, 64) == (9 if guesses else 6) * 68


def test_what_summaries_read():
    assert traffic.reduced(variant(AFFINE), True, 1) == [4, 4]  # u0, uf
    assert traffic.reduced(variant(AFFINE), False, 1) == [4, 4, 4]  # uf, ur, dh
    assert traffic.reduced(variant(SRU, "bfloat16"), False, 1) == [2, 2, 2, 2, 2, 4]
    assert traffic.reduced(variant(SRU, "bfloat16", saved_dtype="bfloat16"), False, 1) == [2] * 6
    assert traffic.reduced(variant(SRU, "bfloat16", saved_dtype="bfloat16"), False, 2) == [2, 2, 2, 2, 2, 4]
    assert not traffic.reduction_reads_state(AFFINE) and traffic.reduction_reads_state(SRU)


def test_the_decision_does_not_depend_on_what_is_kept():
    for B in range(1, 40):
        assert (
            len({chunk((4096, B, 1, 256), False, dtype="float16", saved_dtype=s) for s in ("float16", "float32")}) == 1
        )


@pytest.mark.parametrize(
    "L, cut, every, expected", [(20, 20, 3, 7), (20, 6, 3, 7), (20, 6, 1, 20), (20, 6, 50, 4), (18, 6, 4, 6)]
)
def test_states_kept_of_chunks(L, cut, every, expected):
    kept = {start + n for start in range(0, L, cut) for n in range(0, cut, every) if start + n < L}
    assert chunks.kept(L, cut, every) == len(kept) == expected


def test_long_forwards_in_chunks_go_by_three_kernels(monkeypatch):
    """Of the same chunks, as what is kept for a backward depends on these."""
    sizes = (65536, 1, 1, 1024)
    kernels = {
        (name, dtype, device): made(dtype, sizes, device=device, cell=CELLS[name], chunk=64).kernels[0]
        for name in ("qrnn", "mingru")
        for dtype in ("bfloat16", "float32")
        for device in (H200, Device(86, 84))
    }
    assert [key for key, first in kernels.items() if first != "clear"] == [("qrnn", "bfloat16", H200)]
    assert chunks.length(variant(CELLS["qrnn"], "bfloat16"), sizes, True, "auto", H200) == 64
    for chosen, first in ("lookahead=1", "clear"), ("lookahead=0", "reduce"):
        monkeypatch.setenv("SRU_RT_PLAN", chosen)
        assert {made("bfloat16", sizes, cell=CELLS[name], chunk=64).kernels[0] for name in ("qrnn", "mingru")} == {
            first
        }


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("dtype", IO_DTYPES)
def test_sizes_do_not_change_the_parallel_kernels(dtype, forward):
    cell = AFFINE if forward else SRU
    C = chunk_of_tile(variant(cell, dtype), forward)
    plans = {
        replace(made(dtype, (L, B, 1, 64), cell=cell, forward=forward, every=1, chunk=chunk), B=0, keep=0)
        for L, B, chunk in ((65, 1, C), (65536, 1, C), (1 << 20, 300, C), (2000, 16, C - 3))
    }
    assert len(plans) == 1
    (p,) = plans
    assert p.parallel and p.width == (2 if dtype in ("float16", "bfloat16") else 1) and p.reduce_depth >= 4
    looks_ahead = ("clear", "forward" if forward else "backward")
    assert p.kernels[:2] == looks_ahead
    cut = {"sizes": (65536, 1, 1, 64), "forward": forward, "every": 1}
    guesses = made(dtype, chunk=64, **cut)
    assert guesses.kernels[:2] == (("forward", "mend") if forward else looks_ahead)
    assert guesses.warm_up == ((512 if dtype == "float64" else 256) if forward else 0)
    assert not forward or guesses == made(dtype, chunk=1024, **cut)


def test_what_a_tile_holds():
    """Of SRU without v the summaries read u0 and uf forward, and uf, ur and dh backward; with v backward everything."""
    given = {"sizes": FEW, "chunk": 64, "every": 1}
    p = made("bfloat16", cell=AFFINE, **given)
    assert (p.in_tile, p.tile_bytes, p.threads) == (0b11, 8, 64)
    p = made("bfloat16", cell=AFFINE, forward=False, **given)
    assert (p.in_tile, p.tile_bytes, p.threads) == (0b10110, 12, 32)
    assert plan.shared_bytes(variant(AFFINE), p, 1, 64) == 64 * 12 * 32
    assert chunk_of_tile(variant(AFFINE), False) == 64 > chunk_of_tile(variant(SRU), False) == 32
    p = made("bfloat16", cell=AFFINE, **given | {"chunk": 128})
    assert (p.in_tile, p.tile_bytes, p.threads) == (0b11, 8, 32)
    assert plan.shared_bytes(variant(AFFINE), p, 1, 128) == 128 * 8 * 32
    p = made(forward=False, **given | {"chunk": 32})
    assert (p.in_tile, p.tile_bytes, p.threads) == (0b111111, 24, 32)
    assert plan.shared_bytes(variant(), p, 1, 30) == 32 * 24 * 32
    for more in ({"chunk": 64}, {"chunk": 65}, {"chunk": 32, "every": 3}):
        assert made(forward=False, **given | more).in_tile == 0
    assert made(**given).in_tile == 0, "chunks that guess have none"


@pytest.mark.parametrize("text, has", [("", 8), ("lookahead=0", 0), ("threads=96", 0), ("threads=32,width=1", 4)])
def test_what_an_override_leaves_of_a_tile(text, has, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", text)
    p = made("bfloat16", FEW, cell=AFFINE, chunk=64, every=1)
    assert p.tile_bytes == has and bool(p.in_tile) == bool(has) and p.lookahead == (text != "lookahead=0")


def test_chunks_have_kernels_of_their_own():
    given = {"forward": False, "every": 3}
    plans = [
        made(**given),
        made(chunk=64, **given),
        made(saved_chunk=64, **given),
        made(chunk=64, saved_chunk=64, **given),
    ]
    assert len(set(plans)) == 4
    assert [p.saved_in_chunks for p in plans] == [False, False, True, True]
    assert made(forward=False, every=1, saved_chunk=64) == made(forward=False, every=1)
    calls = [arguments(SRU, "float32", USUAL, chunk=c, saved_chunk=s, **given) for c in (0, 64) for s in (0, 64)]
    assert len({launch_gpu._key(variant(), call, 0) for call in calls}) == 4
    other, long = (arguments(SRU, "float32", USUAL, chunk=c, saved_chunk=32, **given) for c in (50, 128))
    assert launch_gpu._key(variant(), other, 0) == launch_gpu._key(variant(), calls[-1], 0)
    assert launch_gpu._key(variant(), long, 0) != launch_gpu._key(variant(), calls[-1], 0)  # it has no tile


def test_one_channel_where_chunks_recompute_states():
    given = {"forward": False, "sizes": LARGE, "dtype": "bfloat16"}
    assert [made(every=every, chunk=c, **given).width for every in (1, 3) for c in (0, 64)] == [2, 2, 2, 1]


def test_carried_states_are_pairs_as_well():
    given = arguments(AFFINE, "bfloat16", LARGE, chunk=64)
    assert widths(given, cell=AFFINE) == 2
    assert widths(given._replace(given=given.given._replace(carry=given.given.carry + 4)), cell=AFFINE) == 1


@pytest.mark.parametrize("dtype, depth, expected", [("float32", 8, 16), ("bfloat16", 16, 16), ("float64", 4, 8)])
def test_chunks_are_settled_by_rings_of_80_registers(dtype, depth, expected):
    """By as few threads as sequential kernels have: so rings as deep as fit, of 4 or 8 registers a step."""
    found = made(dtype, FEW, chunk=64)
    assert (found.depth, found.replay_depth) == (depth, expected)
    assert made(dtype, FEW).replay_depth == 1


def test_override_of_the_warm_up(monkeypatch):
    wanted = made("bfloat16", FEW, chunk=64)
    monkeypatch.setenv("SRU_RT_PLAN", "warm_up=9")
    assert made("bfloat16", FEW, chunk=64) == replace(wanted, warm_up=9)
    assert made("bfloat16", FEW).warm_up == made("bfloat16", FEW, forward=False, every=1, chunk=64).warm_up == 0


def test_override_of_the_chunk(monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=100,depth=5")
    assert chunk() == 100
    assert chunk((200, 1, 1, 8)) == 0 and chunk((200, 1, 1, 8), how=True) == 100 and chunk(how=False) == 0
    p = made(forward=False, every=3, chunk=100)
    assert (p.depth, p.replay_depth, p.reduce_depth) == (5, 5, 5)
    monkeypatch.setenv("SRU_RT_PLAN", "chunk=0")
    with pytest.raises(ArgumentError, match=r"SRU_RT_PLAN has chunk=0; .*chunk=1 or more"):
        chunk()
    with pytest.raises(ArgumentError, match="SRU_RT_PLAN has chunk=0"):
        made()


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_gates_that_do_not_lie_together():
    given = arguments(SRU, "float32", USUAL)
    apart = [slot._replace(pointer=slot.pointer + 4 * i) for i, slot in enumerate(given.given.gates)]
    with pytest.raises(LibraryError, match=r"the gates of sru must lie together as in U, \(L, B, D, k, d\)"):
        plan.plan(variant(), given._replace(given=given.given._replace(gates=apart)), H200)
    backward = arguments(SRU, "float32", USUAL, forward=False, every=1)
    with pytest.raises(LibraryError, match="the gates of sru must lie together"):
        plan.plan(variant(), backward._replace(dgates=apart), H200)


def test_some_of_the_gates_gradients():
    """One of them null is no array of U's shape either."""
    backward = arguments(SRU, "float32", USUAL, forward=False, every=1)
    some = [*backward.dgates[:2], backward.dgates[2]._replace(pointer=0)]
    with pytest.raises(LibraryError, match="the gates of sru must lie together"):
        plan.plan(variant(), backward._replace(dgates=some), H200)


def test_rows_of_another_length():
    """The kernels go through gradients as through what they are the gradients of."""
    backward = arguments(SRU, "float32", USUAL, forward=False, every=1)
    for name in ("dgates", "dinputs"):
        longer = [slot._replace(stride=slot.stride + 8) for slot in getattr(backward, name)]
        with pytest.raises(LibraryError, match="the same distance from row to row"):
            plan.plan(variant(), backward._replace(**{name: longer}), H200)


def test_launches_are_told_apart_by_what_plans_depend_on():
    """Each address by itself: what lets two channels be read at once differs with the size of the elements."""
    usual = arguments(SRU, "bfloat16", USUAL, forward=False, every=1)
    pairs = [("dh", usual.dh + 4), ("saved", [usual.saved[0] + 4])]
    pairs += [
        (name, [s._replace(pointer=s.pointer + 4) for s in getattr(usual, name)]) for name in ("dgates", "dinputs")
    ]
    apart = [slot._replace(pointer=slot.pointer + 16 * i) for i, slot in enumerate(usual.dgates)]
    calls = [usual, *(usual._replace(**{name: value}) for name, value in [*pairs, ("dgates", apart)])]
    assert len({launch_gpu._key(variant(SRU, "bfloat16"), call, 0) for call in calls}) == len(calls)


@pytest.mark.parametrize("sizes, fits", [((2**31 - 1, 1, 1, 8), True), ((2**31, 1, 1, 8), False)])
def test_limit_of_steps(sizes, fits):
    if fits:
        assert made(sizes=sizes).d == 8
    else:
        with pytest.raises(LibraryError, match=r"takes L < 2\^31 .*got L = 2147483648.*handing c_last on as c0"):
            made(sizes=sizes)


@pytest.mark.parametrize("sizes, fits", [((9, 2**26 - 1, 1, 2**10), True), ((9, 2**26, 1, 2**10), False)])
def test_limit_of_channels(sizes, fits):
    if fits:
        x, _, _ = made(sizes=sizes).grid(sizes[1])
        assert x < 2**31  # blocks that CUDA takes
    else:
        with pytest.raises(LibraryError, match=r"B\*d < 2\^36 \(got L = 9, B = 67108864, d = 1024\)"):
            made(sizes=sizes)


def test_planner_asks_nothing_of_a_device():
    """It can plan for a GPU that is not there."""
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(plan)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert not imported & {"cupy", "launch_gpu", "compile_gpu"}
