"""One token of a few sequences on a GPU, by the kernel that forms U itself: against a product and a step, and the ways
to call it. tests/gpu_places.py says where these run.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import sru_rt
import tolerance
from emu import fake_cupy
from problems import CELLS, DTYPES
from sru_rt import decode, layer, on_cupy, repeat
from sru_rt.errors import ArgumentError, ShapeError
from test_repeat import same_bits, two_states

pytestmark = pytest.mark.kernels

OPTIONS: dict[str, dict[str, Any]] = {"sru": {}, "qrnn": {"highway": True}, "mingru": {}, "minlstm": {}}
MANY = decode.MOST + 1

# (B, D, d, d_in): every number of sequences; one direction and two; channels that fill blocks and that do not; rows of
# every width of a load, of fewer lines than a warp has lanes, of as many, of more, and of more than the ring holds.
SIZES = [
    (1, 1, 5, 1),
    (2, 1, 4, 2000),
    (3, 2, 7, 3),
    (4, 1, 9, 66),
    (5, 2, 3, 257),
    (6, 1, 1, 1020),
    (7, 1, 6, 872),
    (8, 2, 5, 768),
]


def arguments(cell: str, dtype: str, size: tuple[int, int, int, int], seed: int = 0, exact: bool = False, **options):
    """Of a step; with `exact` such that products are the same in any order of a sum."""
    B, D, d, d_in = size
    rng = np.random.default_rng(seed)
    options = OPTIONS[cell] | options
    given = getattr(sru_rt, f"{cell}_init")(d_in, d, directions=D, dtype=dtype, rng=rng, **options)
    kind = given["weight"].dtype
    x = rng.normal(size=(B, d_in)).astype(kind)
    if exact:
        weight = given["weight"]
        x = np.round(x.astype("f4") * 2).astype(kind)
        given["weight"] = np.where(rng.random(weight.shape) < 8 / d_in, rng.integers(-2, 3, weight.shape), 0).astype(
            kind
        )
    state = rng.normal(size=(D, B, d)).astype("f8" if dtype == "float64" else "f4")
    return {"x": x, **given, CELLS[cell].state: state}


def step_of(cell: str):
    return getattr(sru_rt, f"{cell}_step")


def counted(place, products: int) -> None:
    """Fails unless since the record was cleared as many products were asked for, and one kernel."""
    if place.name == "emulated":
        assert len(fake_cupy.record.products) == products
        assert [name for name, *_ in fake_cupy.record.launches] == ["forward"]
        assert not fake_cupy.record.reads


def both_ways(place, cell: str, given: dict[str, Any], monkeypatch) -> list[Any]:
    """What the kernel gives, and what a product and a step do."""
    arrays, results = place.put(given), []
    for way, products in (("", 0), ("decode=0,small=0", 1)):
        monkeypatch.setenv("SRU_RT_PLAN", way)
        fake_cupy.record.clear()
        found = step_of(cell)(**arrays)
        counted(place, products)
        results.append(place.get(found))
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_a_product_and_a_step(place, dtype, size, monkeypatch):
    """Where no sum is rounded; of a cell for each size, all of them in any dtype."""
    cell = list(CELLS)[(SIZES.index(size) + list(DTYPES).index(dtype)) % len(CELLS)]
    same_bits(*both_ways(place, cell, arguments(cell, dtype, size, exact=True), monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_sums_are_right(place, cell, dtype, monkeypatch):
    """As far as they may differ from those of a product."""
    given = arguments(cell, dtype, (3, 2, 6, 264))
    for found, wanted in zip(*both_ways(place, cell, given, monkeypatch)):
        tolerance.check("step", found.astype("f8"), wanted.astype("f8"), tolerance.LAYER[dtype])


def test_u_is_rounded_as_a_product_leaves_it(place, monkeypatch):
    """To 8 bits: a sum of 257 becomes 256."""
    given = {"x": np.ones((1, 257)), "weight": np.ones((1, 2, 3, 257)), "h": np.zeros((1, 1, 3))}
    given = {n: a.astype(DTYPES["bfloat16"] if n != "h" else "f4") for n, a in given.items()}
    given["weight"][:, 0] = 1  # z is 1 in float32
    one, other = both_ways(place, "mingru", given, monkeypatch)
    same_bits(one, other)
    assert (one[1] == 256).all()


@pytest.mark.parametrize(
    "cell, options",
    [
        ("sru", {"project_skip": True}),
        ("sru", {"recurrent": False, "highway": False}),
        ("sru", {"reset_gate": False}),
        ("qrnn", {"pooling": "ifo", "project_skip": True}),
        ("qrnn", {"pooling": "f", "highway": False}),
    ],
)
def test_variants(place, cell, options, monkeypatch):
    same_bits(*both_ways(place, cell, arguments(cell, "float16", (3, 1, 8, 8), exact=True, **options), monkeypatch))


def test_inputs_and_values_of_a_token(place, monkeypatch):
    """A v for each step, in the dtype of the state or of x, and a dropout mask."""
    rng = np.random.default_rng(2)
    for wide in (False, True):
        given = arguments("sru", "float16", (3, 2, 5, 10), exact=True)
        given["v"] = rng.normal(size=(1, 3, 2, 2, 5)).astype("f4" if wide else "f2")
        given["dropout_mask"] = rng.integers(0, 2, (3, 2, 5)).astype("f4")
        same_bits(*both_ways(place, "sru", given, monkeypatch))


def test_without_a_state_and_with_several(place):
    given = arguments("mingru", "float32", (3, 1, 7, 12))
    zeros = given | {"h": np.zeros_like(given["h"])}
    same_bits(*(place.get(sru_rt.mingru_step(**place.put(a))) for a in (given | {"h": None}, zeros)))
    rng = np.random.default_rng(0)
    x, weight, params = rng.normal(size=(3, 12)), rng.normal(size=(1, 2, 7, 12)), rng.normal(size=(1, 1, 7))
    states = rng.normal(size=(1, 3, 7)), rng.normal(size=(1, 3, 7))
    h, last = place.get(two_states.step(*place.put((x, weight, params, states))))
    wanted, wanted_last = two_states.step(x, weight, params, states)
    for found, one in zip((h, *last), (wanted, *wanted_last), strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-12, atol=1e-12)


def test_a_window_of_tokens(place, monkeypatch):
    given = arguments("qrnn", "float32", (4, 2, 5, 6), exact=True, window=2)
    given["x"] = np.stack([given["x"], 2 * given["x"]])
    same_bits(*both_ways(place, "qrnn", given, monkeypatch))


# ----------------------------------------------------------------------------------------------------------------------
# The same bits, however it is called


@pytest.mark.parametrize("cell", CELLS)
def test_called_repeated_and_prepared(place, cell, monkeypatch):
    """With one sequence and several, with memory for the results and without."""
    for B, dtype in ((1, "bfloat16"), (5, "float32")):
        given = place.put(arguments(cell, dtype, (B, 1, 9, 36)))
        step, state = step_of(cell), given[CELLS[cell].state]
        first = step(**given)
        assert len(repeat._repeats) == 1
        fake_cupy.record.clear()
        second = step(**given)
        counted(place, 0)
        call = sru_rt.prepare(step, **given)
        for result in call.results:
            result.fill(0)
        fake_cupy.record.clear()
        with monkeypatch.context() as patch:
            patch.setattr(on_cupy.CuPy, "empty", None)
            call.run()
        counted(place, 0)
        h, kept = place.xp.empty(first[0].shape, first[0].dtype), state.copy()
        step(**given | {"out": (h, state)})
        state[...] = kept
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", None)  # nothing is checked again,
            patch.setattr(on_cupy.CuPy, "empty", None)  # nor made
            third = step(**given | {"out": (h, state)})
        assert third[0].data.ptr == h.data.ptr and third[1].data.ptr == state.data.ptr
        for other in (second, call.results, (h, state)):
            same_bits(place.get(tuple(first)), place.get(tuple(other)))
        state[...] = kept
        repeat._repeats.clear()


def test_values_count_at_each_run(place):
    given = arguments("sru", "float16", (2, 1, 8, 8))
    arrays = place.put(given)
    call = sru_rt.prepare(sru_rt.sru_step, **arrays)
    sru_rt.sru_step(**arrays)
    for name in ("x", "weight"):
        given[name] = (given[name] / 2).astype(given[name].dtype)
        arrays[name][...] = place.put(given[name])
    repeated = place.get(sru_rt.sru_step(**arrays))
    repeat._repeats.clear()
    wanted = place.get(sru_rt.sru_step(**place.put(given)))
    same_bits(repeated, wanted)
    same_bits(place.get(tuple(call.run())), wanted)


def test_rows_of_other_lengths_have_kernels_of_their_own(place, monkeypatch):
    for d_in in (8, 16, 12):
        same_bits(*both_ways(place, "mingru", arguments("mingru", "float16", (2, 1, 5, d_in), exact=True), monkeypatch))


def test_x_and_weight_may_lie_anywhere(place):
    """In memory that kernels take as it is, and in such as is copied first: in each run of a prepared call."""
    given = arguments("sru", "float32", (3, 1, 8, 8))
    arrays = place.put(given)
    wanted = place.get(sru_rt.sru_step(**arrays))
    memory = {name: place.xp.zeros(2 * given[name].size + 1, "f4") for name in ("x", "weight")}
    for every in (1, 2):
        for name, whole in memory.items():
            arrays[name] = whole[1 : 1 + every * given[name].size : every].reshape(given[name].shape)
            arrays[name][...] = place.put(given[name])
        call = sru_rt.prepare(sru_rt.sru_step, **arrays)
        same_bits(place.get(tuple(call.results)), wanted)
        arrays["x"][...] = place.put(np.zeros_like(given["x"]))
        zeros = place.get(sru_rt.sru_step(**place.put(given | {"x": np.zeros_like(given["x"])})))
        same_bits(place.get(tuple(call.run())), zeros)


def test_no_order_of_threads_and_no_plan_changes_a_bit(place, monkeypatch):
    given = place.put(arguments("sru", "bfloat16", (5, 2, 40, 640), project_skip=True))
    wanted = place.get(sru_rt.sru_step(**given))
    for order, way in itertools.product("0123", ("", "depth=1", "depth=3,threads=32", "threads=1024")):
        monkeypatch.setenv("SRU_RT_EMU_ORDER", order)
        monkeypatch.setenv("SRU_RT_PLAN", way)
        same_bits(place.get(sru_rt.sru_step(**given)), wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sequence_does_not_depend_on_the_others(place, dtype):
    """However many there are: products of cuBLAS promise less."""
    given = arguments("minlstm", dtype, (8, 1, 6, 300))
    whole = place.get(sru_rt.minlstm_step(**place.put(given)))
    for B in range(1, 8):
        one = given | {"x": given["x"][8 - B :], "h": given["h"][:, 8 - B :].copy()}
        h, state = place.get(sru_rt.minlstm_step(**place.put(one)))
        assert h.tobytes() == whole[0][8 - B :].tobytes() and state.tobytes() == whole[1][:, 8 - B :].tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Which way


def low_rank(given: dict[str, Any]) -> dict[str, Any]:
    weight = given["weight"]
    return given | {"weight": (weight[..., :2].copy(), np.ones((2, weight.shape[3]), weight.dtype))}


def test_what_goes_by_a_product(place):
    at_most = decode.X_BYTES // 4
    products = {
        "few sequences": (arguments("mingru", "float32", (decode.MOST, 1, 5, 6)), 0),
        "many": (arguments("mingru", "float32", (MANY, 1, 5, 6)), 1),
        "x has room": (arguments("mingru", "float32", (1, 1, 1, at_most)), 0),
        "x has no room": (arguments("mingru", "float32", (1, 1, 1, at_most + 1)), 1),
        "a low-rank weight": (low_rank(arguments("mingru", "float32", (2, 1, 5, 6))), 2),
    }
    for name, (given, n) in products.items():
        fake_cupy.record.clear()
        sru_rt.mingru_step(**place.put(given))
        if place.name == "emulated":
            assert len(fake_cupy.record.products) == n, name


def test_a_sequence_of_one_step_is_no_step(place):
    """Its products are those of longer ones."""
    given = arguments("mingru", "float32", (2, 1, 5, 6))
    given = {"x": given["x"][None], "weight": given["weight"], "bias": given["bias"]}
    fake_cupy.record.clear()
    sru_rt.mingru_forward(**place.put(given))
    counted(place, 1)


def test_no_sequences(place):
    x, weight = np.zeros((0, 4), np.float32), np.zeros((1, 2, 3, 4), np.float32)
    h, state = place.get(sru_rt.mingru_step(*place.put((x, weight))))
    assert h.shape == (0, 3) and state.shape == (1, 0, 3)


def test_errors_are_those_of_the_other_way(place):
    given = arguments("sru", "float32", (2, 1, 6, 6))
    arrays = place.put(given)
    for name, array in (("x", given["x"][:, :5]), ("c", given["c"][:, :1])):
        with pytest.raises(ShapeError, match=r"d_in|B = "):
            sru_rt.sru_step(**arrays | {name: place.put(array.copy())})
    with pytest.raises(ArgumentError, match=r"out\[0\] overlaps an input"):
        sru_rt.sru_step(**arrays, out=(arrays["x"], None))


@pytest.mark.parametrize("way", ["decode=2", "decode=-1"])
def test_a_bad_plan_is_refused(place, way, monkeypatch):
    monkeypatch.setenv("SRU_RT_PLAN", way)
    with pytest.raises(ArgumentError, match="decode=0 or 1"):
        sru_rt.mingru_step(**place.put(arguments("mingru", "float32", (2, 1, 3, 4))))


def test_a_step_is_captured(place):
    """Nothing on its way is what a capture refuses."""
    given = place.put(arguments("sru", "float16", (2, 1, 8, 8)))
    call = sru_rt.prepare(sru_rt.sru_step, **given)
    wanted = place.get(tuple(call.results))
    stream = place.xp.cuda.Stream()
    with stream:
        stream.begin_capture()
        for result in call.results:
            result.fill(0)
        call.run()
        graph = stream.end_capture()
    if graph:  # the stand-in for CuPy has none, and has done at once what was put on the stream
        graph.launch(stream)
        stream.synchronize()
    same_bits(place.get(tuple(call.results)), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# How rows are read


@pytest.mark.parametrize(
    "dtype, d_in, line",
    [
        ("float16", 8, 16),
        ("float16", 4, 8),
        ("bfloat16", 1026, 4),
        ("bfloat16", 7, 2),
        ("float32", 12, 16),
        ("float32", 6, 8),
        ("float32", 5, 4),
        ("float64", 6, 16),
        ("float64", 5, 8),
    ],
)
def test_lines(dtype, d_in, line):
    assert decode.reads(dtype, 3, d_in, 256, 512).line == line
    assert decode.reads(dtype, 3, d_in, 256, 512 + 8).line == min(line, 8)
    assert decode.reads(dtype, 3, d_in, 2 + 256, 512).line == min(line, 2)


@pytest.mark.parametrize(
    "gates, d_in, depth", [(3, 8, 1), (3, 256, 1), (3, 264, 2), (3, 1024, 4), (3, 8192, 5), (2, 8192, 8)]
)
def test_lines_ahead(gates, d_in, depth):
    """As many as a lane has of a row, or as the ring has room for."""
    assert decode.reads("bfloat16", gates, d_in, 256, 256).depth == depth
