"""The model of a GPU: what it makes of kernels whose time can be told by hand, of cards, and of formulas."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sru_rt import choose, chunks, costs, decode, launch_gpu, machine, predict, shared_memory, traffic
from sru_rt.cells import named_cells
from sru_rt.dtypes import state_dtype
from sru_rt.machine import Device, Machine
from sru_rt.predict import Kernel
from sru_rt.variant import Variant

ROOT = Path(__file__).parent.parent
CELLS = {cell.name: cell for cell in named_cells()}
# A card of round numbers: 1 TB/s, 1 GHz, 100 multiprocessors, a microsecond of latency.
ROUND = Machine("round", 90, 100, 1e12 / 0.9, 1e9 / 0.88, 1 << 20, (1e15 / 0.8, 1e14 / 0.8, 1e13 / 0.8), 1e-6)
BEFORE = 2e-6 + ROUND.launch  # the first step


def took(channels: int, steps: int, **kernel) -> predict.Time:
    return predict.sweep(ROUND, Kernel(**{"reads": 0, "writes": 0} | kernel), channels, steps)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels whose time can be told by hand


@pytest.mark.parametrize(
    "channels, kernel, step, bound",
    [
        # 100,000 channels of 10 bytes are a megabyte.
        (100_000, dict(reads=6, writes=4, depth=32, threads=64), 1e-6, "memory"),
        (100_000, dict(reads=6, writes=4, depth=32, threads=64, again=2, every=4), 1.2e-6, "memory"),
        # (The cache holds no piece of 4 steps.) A ring of 4 steps has 4 steps under way in a microsecond.
        (3_200, dict(reads=4, writes=0, depth=4), 250e-9, "loads in flight"),
        (
            3_200,
            dict(reads=4, writes=0, depth=4, replay_depth=2, every=1 << 30, refills=2),
            750e-9,
            "loads in flight and refills",
        ),
        # 4 warps a multiprocessor, one for each scheduler, at an instruction a nanosecond; twice the warps, twice that.
        (12_800, dict(depth=64, instructions=50), 50e-9, "instructions"),
        (25_600, dict(depth=64, instructions=50), 100e-9, "instructions"),
        (25_600, dict(depth=64, instructions=50, width=2), 100e-9, "instructions"),
        (12_800, dict(depth=64, instructions=10, chain=68), 68e-9, "chain"),
        # 128 channels of 8 special functions, 16 in a nanosecond.
        (12_800, dict(depth=64, special=8), 64e-9, "special functions"),
        # Blocks of 256 threads of 255 registers: one at a time, so that 300 of them come in three turns.
        (76_800, dict(depth=2, threads=256, registers=255), 1500e-9, "loads in flight"),
        (76_800, dict(depth=2, threads=256, registers=64), 500e-9, "loads in flight"),
        (76_800, dict(depth=2, threads=256, registers=64, shared=100 << 10), 1000e-9, "loads in flight"),
        # One multiprocessor takes 64 bytes a nanosecond.
        (32 * 8, dict(reads=640, writes=0, depth=10_000, threads=256), 2560e-9, "cache"),
    ],
)
def test_a_step(channels, kernel, step, bound):
    steps = 1 << 20
    found = took(channels, steps, **kernel)
    assert found.best - found.fill - found.launch == pytest.approx(steps * step, rel=0.001)
    assert found.bound == bound


def test_before_the_first_step():
    found = took(32, 1)
    assert found.best == pytest.approx(BEFORE + 1e-6) and found.bound == "launch and latency"
    assert took(76_800, 1, threads=256, registers=255).fill == 3 * took(76_800, 1, threads=256, registers=64).fill


def test_at_worst_a_warp_does_nothing_while_it_waits_for_its_chain():
    found = took(12_800, 1 << 20, depth=64, instructions=30, chain=68)
    assert (found.worst - BEFORE) / (found.best - BEFORE) == pytest.approx(98 / 68)
    assert (found.bound, found.bound_at_worst) == ("chain", "instructions and chain")


def test_pieces_refill_their_rings():
    """Twice a microsecond for each piece, but that the other warps of a scheduler fill in."""
    ring = dict(depth=64, replay_depth=64, every=32, reads=0, refills=2)
    assert took(3_200, 3200, **ring).refill == pytest.approx(100 * 2e-6)
    assert took(4 * 12_800, 3200, **ring).refill == pytest.approx(100 * 2e-6 / 4)


def ahead(channels: int, steps: int, first: dict, then: dict, **both) -> predict.Time:
    """Of a kernel whose sweeps read or write as `first` and `then` say."""
    kernels = (Kernel(**{"reads": 0, "writes": 0, "depth": 64} | kernel | both) for kernel in (first, then))
    return predict.looking_ahead(ROUND, *kernels, channels, steps, chunks=1)


def test_a_kernel_whose_blocks_look_ahead():
    """It moves the bytes of both sweeps; what a block waits for is time in which others may move theirs."""
    many = ahead(10_000_000, 64, {"reads": 6}, {"writes": 4}, threads=64)
    assert many.memory == pytest.approx(64 * 100e-6) and many.bound == "memory"
    # Blocks of 32 threads, one at a time and ten in all: each waits for the first sweep's two latencies and one of its
    # ring, and for the five of looking ahead; then for those of the second sweep, if it reads from memory.
    alone = {"shared": 200 << 10, "threads": 32}
    few = ahead(32_000, 64, {"reads": 6}, {"writes": 4}, **alone)
    assert few.in_flight == pytest.approx(10 * 8e-6) and few.bound == "loads in flight"
    assert few.fill + few.launch == pytest.approx(BEFORE)
    assert ahead(32_000, 64, {"reads": 6}, {"reads": 1}, **alone).in_flight == pytest.approx(10 * 11e-6)
    assert ahead(32_000, 64, {"reads": 6}, {"again": 6}, **alone).in_flight == pytest.approx(10 * 11e-6)


def test_a_kernel_that_forms_u_of_a_token():
    """A launch and one latency, then bytes: from memory, or from the cache if it has the weight."""
    one = predict.Token(lines=128, depth=4, gates=3, line=16, x=2048, threads=128, instructions=100, chain=500)
    channels, weight = 4000, 4000 * 3 * 128 * 16
    before = 1e-6 + ROUND.launch
    found = predict.token(ROUND, one, channels, in_cache=False)
    assert found.best == pytest.approx(weight / ROUND.bandwidth + before) and found.bound == "memory"
    near = predict.token(ROUND, one, channels, in_cache=True)
    assert near.memory == 0 and near.best == pytest.approx(near.cache + before)
    assert near.cache == found.cache == pytest.approx((weight + 1000 * 2048) / ROUND.cache_bandwidth)
    alone = predict.token(ROUND, one, 4, in_cache=True)  # of one block, whose multiprocessor takes only so much
    assert alone.cache == pytest.approx((weight / 1000 + 2048) / ROUND.port_bandwidth)
    # Ten blocks of a multiprocessor are ten warps of a scheduler, of four lines a row each.
    assert found.issue == pytest.approx(10 * 4 * 100 / ROUND.clock)
    assert found.chain == pytest.approx(500 / ROUND.clock)
    rings = [predict.token(ROUND, one._replace(depth=n), channels, False).in_flight for n in (4, 3, 2, 1)]
    assert rings == pytest.approx([0, 1e-6, 1e-6, 3e-6])


def test_what_a_token_takes():
    """A product of each element of the weight with each sequence; in 16 bits, conversions of both."""
    variant = Variant(CELLS["sru_projected"], "bfloat16", "float32")
    taken = [costs.token(variant, B, 1024, decode.Reads(16, 4)) for B in (1, 2)]
    assert taken[0].lines == 128 and (taken[0].gates, taken[0].x) == (4, 2048)
    assert taken[1].instructions - taken[0].instructions == 8 * (4 + 1) + 1
    single = costs.token(Variant(CELLS["sru_projected"], "float32", "float32"), 1, 1024, decode.Reads(16, 4))
    assert single.lines == 256 and single.instructions < taken[0].instructions / 2


@pytest.mark.parametrize(
    "sequences, chain, waves, expected, bound",
    [
        # A microsecond for the weight of 64 KB from the cache, one for the first tile of 6 million operations. Then 160
        # steps of 100 ns, or the other nine tiles.
        (10, 100, 1, 16e-6, "chain"),
        (10, 10, 1, 9e-6, "products"),
        (100, 100, 1, 16e-6, "chain"),
        (200, 100, 2, 32e-6, "chain"),  # blocks that there is no room for
        (101, 10, 2, 18e-6, "products"),
    ],
)
def test_a_kernel_that_forms_u_itself(sequences, chain, waves, expected, bound):
    kernel = Kernel(0, 0, threads=512, registers=128, chain=chain)
    own = predict.Own(weight=64_000, operations=6_000_000, tile=16, rows=48, warps=4)
    found = predict.small_layer(ROUND, kernel, own, "float16", sequences, 128, 160)
    # All blocks at once are served 2.4 bytes a picosecond of the weights.
    weight = max(1e-6, sequences / waves * 64_000 / 2.4e12)
    assert found.best == pytest.approx(waves * (2e-6 + weight + 1e-6) + ROUND.launch + expected)
    assert found.bound == bound


def test_products():
    large = predict.product(ROUND, "bfloat16", 1 << 14, 1 << 12, 1 << 12)
    assert large.best - BEFORE == pytest.approx(2 * 2.0**38 / 1e15) and large.bound == "instructions"
    assert predict.product(ROUND, "float32", 1 << 14, 1 << 12, 1 << 12).issue == pytest.approx(100 * large.issue)
    tf32 = predict.product(ROUND, "float32", 1 << 14, 1 << 12, 1 << 12, tf32=True)
    assert tf32.issue == pytest.approx(10 * large.issue)
    token = predict.product(ROUND, "bfloat16", 1, 1 << 12, 1 << 12)
    assert token.memory == pytest.approx(2 * 2.0**24 / 1e12, rel=0.01) and token.memory > token.issue
    assert predict.together([large, token]) == (large.best + token.best, large.worst + token.worst)


# ----------------------------------------------------------------------------------------------------------------------
# Cards


def test_an_h200():
    h200 = machine.named("h200")
    assert machine.of(Device(90, 132)) == h200
    assert h200.bandwidth == pytest.approx(4.3e12, rel=0.01) and h200.clock == pytest.approx(1.75e9, rel=0.01)
    assert h200.product_rate("bfloat16") == pytest.approx(790e12, rel=0.01)
    assert h200.limits == (2048, 32, 228 << 10)
    assert machine.of(h200.device) == h200


def test_what_a_driver_tells_takes_the_place_of_what_is_listed():
    h100 = machine.of(Device(90, 132, bandwidth=3.35e12, clock=1.98e9, l2_bytes=50 << 20))
    assert replace(h100, name="H100") == machine.named("H100")


def test_a_card_that_is_not_listed_is_made_to_its_measure():
    part = machine.of(Device(90, 66))
    assert part.sheet_bandwidth == machine.named("H200").sheet_bandwidth / 2
    assert "sm_90 with 66" in part.name
    assert machine.of(Device(86, 28, bandwidth=360e9)).bandwidth == pytest.approx(324e9)
    assert machine.usual(121, 48).limits == machine.named("RTX 5090").limits
    assert machine.usual(70, 80).limits == machine.named("T4").limits


def test_no_kernel_depends_on_what_only_a_driver_tells():
    """So that `warm` finds on another machine what a GPU will look for."""
    task = choose.Task(Variant(CELLS["sru"], "float32", "float32"), True, 1)
    plans = [choose.choose(task, choose.load(9000, device), device.arch, device.multiprocessors)
             for device in (Device(90, 132), machine.named("H100").device)]  # fmt: skip
    assert plans[0] == plans[1]


def test_facts_of_a_device(monkeypatch):
    """As CuPy gives them: kHz and bits. What it does not know is looked up."""
    attributes = {"MultiProcessorCount": 132, "MemoryClockRate": 2_619_000, "GlobalMemoryBusWidth": 5120}

    class FakeDevice:
        compute_capability = "90"

        def __init__(self, number):
            self.attributes = attributes

    cuda = type("cuda", (), {"Device": FakeDevice})
    monkeypatch.setitem(sys.modules, "cupy", type("cupy", (), {"cuda": cuda}))
    found = launch_gpu.device_facts.__wrapped__(0)
    assert found.bandwidth == pytest.approx(3.35e12, rel=0.01) and (found.clock, found.l2_bytes) == (0, 0)
    assert machine.of(found).clock == machine.named("H200").clock


# ----------------------------------------------------------------------------------------------------------------------
# What kernels take, from their formulas


def test_estimates_beside_the_record():
    """Instructions within a fifth on the whole and two fifths each, registers within a quarter on the whole."""
    budget = json.loads((ROOT / "tests" / "gpu_budget.json").read_text())["kernels"]
    off = {"instructions": [], "registers": []}
    for key, kernel in budget.items():
        name, dtype, direction, kept = key.split(", ")[:4]
        if kept not in ("nothing kept", "all states kept", "1 of 32 kept") or not key.endswith("sm_90"):
            continue
        every = {"nothing kept": 0, "all states kept": 1}.get(kept, 32)
        taken = {k: kernel.get(k, 0) for k in ("width", "depth", "replay_depth", "threads", "staged", "laps")}
        variant = Variant(CELLS[name], dtype, state_dtype(dtype))
        estimate = costs.sweep(variant, direction == "forward", every, **taken)
        assert estimate.special == pytest.approx(kernel["mufu"], abs=0.1), key
        for what, found in off.items():
            found.append(getattr(estimate, what) / kernel[what] - 1)
    for what, found in off.items():
        assert len(found) > 100
        assert sum(map(abs, found)) / len(found) < {"instructions": 0.1, "registers": 0.15}[what]
        assert max(map(abs, found)) < 0.45, what


def test_chains():
    """Of SRU with v: a product and a sum, a sigmoid, then the new state; of one without, the new state alone."""
    assert [costs.chain(CELLS[name], True, False) for name in ("sru", "sru_no_v")] == [68, 8]
    assert costs.chain(CELLS["sru"], False, True) == 68 + costs.chain(CELLS["sru"], False, False)


@pytest.mark.parametrize(
    "forward, chunk, cached",
    [(True, 32, False), (False, 32, False), (True, 128, False), (True, 129, True), (False, 129, True)],
)
def test_what_chunks_in_one_kernel_read(forward, chunk, cached):
    """Everything once; without a tile, what summaries have read once more from the cache."""
    names, dtypes = ("sru_no_v", "mingru", "qrnn", "minlstm"), ("float32", "bfloat16", "float64")
    if chunk == 128:  # there is room for two values
        names, dtypes = ("mingru",), dtypes[:2]
    for name, dtype in itertools.product(names, dtypes):
        variant = Variant(CELLS[name], dtype, state_dtype(dtype))
        task = choose.Task(variant, forward, 1, parallel=True, tile=shared_memory.tile_steps(chunk))
        sweeps = choose.choose(task, choose.load(9000, Device(90, 132)), 90, 132).looking_ahead(task, chunk)
        reads, writes = traffic.moved(variant, forward, 1)
        assert (sum(k.reads for k in sweeps), sum(k.writes for k in sweeps)) == (reads, writes)
        assert sum(k.again for k in sweeps) == (sum(traffic.reduced(variant, forward, 1)) if cached else 0)
        assert len({(k.shared, k.registers, k.threads, k.width) for k in sweeps}) == 1
        assert (sweeps[0].shared > 0) is not cached


def test_a_plan_is_never_slower_than_another_by_the_model():
    """The choice is made by predictions, within the two per cent that count as alike."""
    for dtype, forward, B in (("float32", True, 3), ("bfloat16", True, 64), ("bfloat16", False, 16)):
        task = choose.Task(Variant(CELLS["sru"], dtype, "float32"), forward, 1, pairs=dtype == "bfloat16")
        at = choose.load(1024 * B, Device(90, 132))
        chosen = choose.choose(task, at, 90, 132)
        cautious = choose._cautious(90, 132)
        assert cautious.latency > machine.named("H200").latency

        def seconds(choice, task=task, at=at, machine=cautious):
            return choose._time(machine, choice.kernel(task), at).worst

        fitting = {1: 32, 2: 32} if forward else {1: 16, 2: 16}
        for width in (1, 2) if task.pairs else (1,):
            for depth in (1, 2, 4, 8, 12, 16, 24, 32):
                if depth <= fitting[width]:
                    assert seconds(chosen) <= 1.021 * seconds(chosen._replace(width=width, depth=depth))


# ----------------------------------------------------------------------------------------------------------------------
# benchmarks/model.py


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delenv("SRU_RT_PLAN", raising=False)
    import model

    yield model
    del sys.modules["model"]


def report(*rows: tuple[str, str, float]) -> str:
    """What the bench writes, of (cell, pass, microseconds) at (2048, 16, 1024), and what is none of the model's."""
    one = {"level": "cell", "who": "sru_rt", "dtype": "float32", "shape": [2048, 16, 1024], "D": 1, "ragged": False}
    made = [one | {"cell": cell, "pass": which, "median_ms": us / 1e3} for cell, which, us in rows]
    others = ({"ragged": True}, {"who": "naive kernel"}, {"level": "layer"}, {"cell": "own cell"}, {"pass": "step"})
    return json.dumps({"rows": [*made, *(made[0] | {"median_ms": 7.0} | other for other in others)]})


def test_prediction_and_measurement_side_by_side(model, tmp_path, capsys):
    """The largest difference first, whichever way it is; what the model agrees with last."""
    expected = model.row(model.Case("sru", "float32", 2048, 16, 1024, 1, True, 0), machine.named("H200"))
    made = report(("SRU", "forward", expected.best), ("minGRU", "forward", 20.0), ("minGRU", "backward", 1e3))
    (file := tmp_path / "gpu.json").write_text(made)
    assert model.main(["--measured", str(file)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(line[0], line[3], line[8]) for line in lines] == [
        ("| mingru", "backward, save=True", "1000.0"),
        ("| mingru", "forward", "20.0"),
        ("| sru", "forward", f"{expected.best:.1f}"),
    ]
    ratios = [float(line[9].rstrip(" |")) for line in lines]
    assert ratios[0] > 4 and ratios[1] < 0.3 and ratios[2] == 1
    assert {line[6] for line in lines} == {"memory"}


def test_every_listed_card_has_predictions(model, capsys):
    for card in machine.CARDS:
        assert model.main(["--gpu", card.name, "--cell", "sru", "--dtype", "float32"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + len(model.SHAPES) * len(model.PASSES) and "measured" not in lines[0]


def test_predicted_targets_are_those_of_the_page(model):
    text = model.PAGE.read_text()
    assert model.page(text, machine.named("H200")) == text, "run `python benchmarks/model.py --targets` and commit"
    with pytest.raises(ValueError, match=r"performance\.md needs the lines <!-- predicted targets -->"):
        model.page("", machine.named("H200"))


def test_the_model_is_asked_for_chunks_by_what_is_decided(model):
    """A row in chunks adds up more than one kernel."""
    few = model.Case("mingru", "bfloat16", 65536, 1, 1024, 1, True, 0)
    cut, times = few.kernels(machine.named("H200"))
    assert cut == chunks.length(few.variant, (65536, 1, 1, 1024), True, "auto", machine.named("H200").device) > 0
    assert len(times) == 2 and len(few._replace(time_parallel=False).kernels(machine.named("H200"))[1]) == 1
