"""CuPy arrays, and arrays of other libraries on CUDA devices, by a stand-in for CuPy on the memory of the CPU.

Most tests let the CPU's kernels do the recurrence, as what is tested here happens around a kernel; those that ask for
`emulated` also plan, compile, load and launch the GPU's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import sru_rt
import test_arrays
import tolerance
from emu import emulator, fake_cupy
from matrix import matrix
from problems import DTYPES, FULL, LAYER_ROWS, LAYOUTS, POLICIES, ROWS, SIZES, Problem, compare, name_of
from sru_rt import launch, on_cupy, prepared, recurrence
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError, SruRtError
from test_arrays import B, D, L, d

LENGTHS = [5, 0, 4]
record = fake_cupy.record


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, with recurrences by the CPU's kernels. What they are launched with is on record."""
    monkeypatch.setenv("SRU_RT_CPU", "numpy")
    run = launch.run

    def run_here(variant: Any, arguments: Any, device: str, stream: int) -> None:
        if device == "cpu":
            return run(variant, arguments)
        number = int(device.removeprefix("cuda:"))
        assert number == fake_cupy.runtime.getDevice(), "the kernel would run on another device"
        assert stream == fake_cupy.get_current_stream().ptr
        record.launches.append((type(arguments).__name__, number, stream))
        return run(variant, arguments)

    def run_prepared(self: Any, addresses: Any, stream: int = 0) -> None:
        run_here(self._variant, prepared._filled(self._arguments, addresses), self._device, stream)

    with fake_cupy.installed(monkeypatch) as module:
        monkeypatch.setattr(recurrence.launch, "run", run_here)
        monkeypatch.setattr(prepared.Prepared, "run", run_prepared)
        monkeypatch.setattr(recurrence.launch, "needs_scratch", lambda variant, every, device: every > 1)
        monkeypatch.setattr(launch, "decodes", lambda *_: False)  # as no kernel of the CPU does
        monkeypatch.setattr(launch, "in_one_launch", lambda *_: False)
        is_own = recurrence.is_own  # nor takes parameters in 16 bits
        monkeypatch.setattr(recurrence, "is_own", lambda a, given, dtype, device: is_own(a, given, dtype, "cpu"))
        yield module


@pytest.fixture
def emulated(monkeypatch):
    """The stand-in, with the GPU's kernels under the emulation."""
    if reason := emulator.why_not():
        pytest.skip(reason)
    with fake_cupy.installed(monkeypatch) as module:
        yield module


def on_device(value: Any, device: int = 0) -> Any:
    """NumPy arrays in `value` as arrays of a device, in order of their letters."""
    if isinstance(value, dict):
        return {name: on_device(v, device) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(on_device(v, device) for v in value)
    if not isinstance(value, np.ndarray):
        return value
    with fake_cupy.Device(device):
        return fake_cupy.array(value)


def host(value: Any) -> Any:
    """The values of arrays on a device, without leaving a trace in the record."""
    if isinstance(value, tuple):
        return tuple(map(host, value))
    if isinstance(value, sru_rt.gradients.Gradients):
        return types.SimpleNamespace(**{name: host(getattr(value, name)) for name in value})
    return value._memory if isinstance(value, fake_cupy.ndarray) else value


def flat(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in flat(v)] if isinstance(value, (tuple, list)) else [value]


def assert_same_bits(got: Any, wanted: Any) -> None:
    got, wanted = flat(got), flat(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


def assert_on_device(value: Any, device: int = 0) -> None:
    for array in flat(value):
        assert type(array) is fake_cupy.ndarray and array.device.id == device and array.flags.c_contiguous


def arguments(function: str = "sru_forward", dtype: Any = np.float32) -> dict[str, Any]:
    """Those of the tests on the CPU, with flags of bool."""
    result = test_arrays.arguments(function, dtype)
    return result | {name: result[name].astype(bool) for name in ("mask", "reset") if name in result}


FUNCTIONS = ("sru_forward", "sru_recurrence", "sru_step")


def close(got: Any, wanted: Any, dtype: str = "float32") -> None:
    for i, (a, b) in enumerate(zip(flat(got), flat(wanted), strict=True)):
        assert a.dtype == b.dtype
        tolerance.check(str(i), a, np.asarray(b, np.float64), tolerance.LAYER[dtype])


# ----------------------------------------------------------------------------------------------------------------------
# The stand-in is like CuPy


def real_cublas_names() -> str:
    """The text of CuPy's binding of cuBLAS, which cannot be imported without cuBLAS."""
    folder = Path(importlib.util.find_spec("cupy_backends").origin).parent / "cuda" / "libs"
    return next(folder.glob("cublas.*.so")).read_bytes().decode("latin-1")


def public(thing: Any) -> list[str]:
    own = ("__bool__", "__int__", "__float__", "__len__", "__getitem__", "__setitem__", "__array__", "__dlpack__")
    return [name for name in vars(thing) if not name.startswith("_") or name in own]


def test_the_stand_in_has_no_name_that_cupy_lacks():
    real = pytest.importorskip("cupy", reason="needs CuPy to compare with")
    pairs = [(fake_cupy.cupy, real), (fake_cupy.ndarray, real.ndarray), (fake_cupy.Flags, real._core.flags.Flags)]
    pairs += [(fake_cupy.cuda, real.cuda), (fake_cupy.cuda.memory, real.cuda.memory)]
    pairs += [(getattr(fake_cupy, name), getattr(real.cuda, name)) for name in ("runtime", "driver", "nvrtc")]
    kinds = ("Device", "Stream", "ExternalStream", "Module", "Function", "MemoryPointer")
    pairs += [(getattr(fake_cupy.cuda, name), getattr(real.cuda, name)) for name in kinds]
    for fake, there in pairs:
        missing = [name for name in public(fake) if name != "cublas" and not hasattr(there, name)]
        assert not missing, f"{there} has no {missing}"
    text = real_cublas_names()
    assert not [name for name in public(fake_cupy.cublas) if name not in text]


def test_the_numbers_of_cupy():
    real = pytest.importorskip("cupy", reason="needs CuPy to compare with")
    for name in ("CUDA_R_16F", "CUDA_R_16BF", "CUDA_R_32F", "CUDA_R_64F"):
        assert getattr(fake_cupy.runtime, name) == getattr(real.cuda.runtime, name)
    assert set(on_cupy._DATA_TYPES.values()) <= set(vars(fake_cupy.runtime))


def test_arrays_of_cupy_answer_as_those_of_the_stand_in():
    """What needs no driver: arrays on borrowed memory, which is that of the CPU."""
    real = pytest.importorskip("cupy", reason="needs CuPy to compare with")
    memory = np.zeros(1024, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :]

    def make(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
        owned = real.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        host = memory[:count].view(dtype).reshape(shape)
        there = real.ndarray(shape, dtype, real.cuda.MemoryPointer(owned, 0))
        return (there, on_cupy.library(real, 0)), (fake_cupy.ndarray._of(host), on_cupy.library(fake_cupy.cupy, 0))

    def ask(a: Any, lib: Any) -> list[Any]:
        answers = [lib.pointer(a[1:]), lib.pointer(a.T), lib.not_writable(a), lib.not_writable(a[:, 1:]), lib.device]
        answers += [lib.contiguous(a, a.dtype) is a, a.astype(a.dtype, copy=False) is a, len(a), a[None].shape]
        answers += [a.nbytes, a.itemsize, a.ndim, a.dtype, a.view(f"u{a.itemsize}").dtype, a.reshape(2, 2, -1).shape]
        answers += [lib.xp.may_share_memory(a, other) for other in (a, a[1:], a.T)]
        answers += [lib.xp.may_share_memory(a[:2], other) for other in (a[2:], a[:0])]
        return [*answers, type(a).__module__, a.data.device_id, lib.plain("f", "x", a, "x") is a]

    for dtype in (np.float32, np.float16, bfloat16, bool):
        there, here = make((4, 6), dtype)
        assert ask(*there) == ask(*here)


def test_the_stand_in_is_strict(cupy):
    a = on_device(np.ones(3))
    for wrong in (
        lambda: np.asarray(a),
        lambda: np.add(a, 1),
        lambda: np.ones(3) + a,
        lambda: a + np.ones(3),
        lambda: np.where(a, 1, 2),
        lambda: np.ascontiguousarray(a),
    ):
        with pytest.raises(TypeError):
            wrong()
    with cupy.cuda.Device(1), pytest.raises(RuntimeError, match="device 0 is used while device 1"):
        a.copy()
    assert record.reads == []
    assert float(a[0]) == 1.0 and a.get().sum() == 3
    assert record.reads == ["__float__", "get"]


# ----------------------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", matrix(ROWS[::3]), ids=name_of)
def test_recurrence_gives_what_numpy_arrays_give(cupy, row, D, layout):
    n = ROWS.index(row) + 10 * D + 3 * list(LAYOUTS).index(layout)
    problem = Problem.make(row, SIZES[n % 3], D, layout)
    results = []
    for put in (lambda a: a, on_device):
        h, last, saved = problem.forward()(**put(problem.given), save=POLICIES[n % len(POLICIES)])
        gradients = problem.cell.library("backward")(saved, **put(problem.seeds))
        results.append([h, last, *(getattr(gradients, name) for name in gradients)])
    wanted, got = results
    assert_same_bits(host(tuple(a for a in got if a is not None)), [a for a in wanted if a is not None])
    assert [a is None for a in got] == [a is None for a in wanted]
    assert_on_device([a for a in got if a is not None])
    assert [launched[0] for launched in record.launches] == ["Forward", "Backward"]
    assert record.reads == [] and record.products == []


@pytest.mark.parametrize("save", [True, 4, "x"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("row", matrix(LAYER_ROWS[::2]), ids=name_of)
def test_layer_matches_oracle(cupy, row, D, save):
    """NaN stands in the padding of x, and in all memory that CuPy hands out."""
    layout = list(LAYOUTS)[LAYER_ROWS.index(row) % len(LAYOUTS)]
    problem = Problem.make(row, (7, 3, 9), D, layout, layer=True)
    h, last, saved = problem.forward(layer=True)(**on_device(problem.given), save=save)
    gradients = problem.cell.library("backward")(saved, **on_device(problem.seeds))
    compare(problem, host((h, last)), host(gradients), layer=True)
    assert record.reads == []
    if row.get("window", 1) == 1:
        assert len(record.products) == (4 if save == "x" else 3)


@pytest.mark.parametrize("layout", ["plain", "all"])
@pytest.mark.parametrize("save", [True, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_on_the_emulated_kernels(emulated, dtype, save, layout):
    problem = Problem.make(FULL["sru"] | {"dtype": dtype}, (7, 3, 9), 2, layout, layer=True)
    h, last, saved = problem.forward(layer=True)(**on_device(problem.given), save=save)
    gradients = problem.cell.library("backward")(saved, **on_device(problem.seeds))
    compare(problem, host((h, last)), host(gradients), layer=True)
    assert record.reads == []
    assert [name for name, _, _ in record.launches] == ["forward", "backward", "sum_partials"]


def low_rank(dtype: str) -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(7)
    params = sru_rt.sru_init(12, 6, directions=2, low_rank=4, rng=rng, dtype=dtype)
    call = {"x": rng.normal(size=(8, 3, 12)).astype(DTYPES[dtype]), "lengths": [8, 0, 3], **params}
    return call, rng.normal(size=(8, 3, 12)).astype(DTYPES[dtype])


@pytest.mark.parametrize("save", [True, "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank(cupy, dtype, save):
    call, dh = low_rank(dtype)
    *wanted, saved = sru_rt.sru_forward(**call, save=save)
    gradients = sru_rt.sru_backward(saved, dh)
    wanted += [getattr(gradients, name) for name in ("x", "weight", "bias", "v")]
    *got, saved = sru_rt.sru_forward(**on_device(call), save=save)
    gradients = sru_rt.sru_backward(saved, on_device(dh))
    got += [getattr(gradients, name) for name in ("x", "weight", "bias", "v")]
    assert isinstance(gradients.weight, tuple) and record.reads == []
    assert_on_device(got)
    close(host(tuple(got)), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function(cupy, function, dtype):
    call = arguments(function, DTYPES[dtype])
    got = getattr(sru_rt, function)(**on_device(call))
    assert_on_device(got)
    close(host(got), getattr(sru_rt, function)(**call), dtype)
    assert record.reads == []


def test_a_step_is_the_same_as_in_a_sequence(cupy):
    call = on_device(arguments("sru_step"))
    h, c = sru_rt.sru_step(**call)
    x, c0 = call.pop("x"), call.pop("c")
    wanted = sru_rt.sru_forward(x[None], **call, c0=c0)
    assert_same_bits(host((h, c)), [host(wanted[0])[0], host(wanted[1])])


@pytest.mark.parametrize("shape", [(0, B), (L, 0), (0, 0)], ids=str)
def test_nothing_to_do(cupy, shape):
    """Without steps or sequences nothing reaches cuBLAS, and sums over them are 0."""
    call = arguments() | {"x": np.zeros((*shape, D * d), np.float32), "c0": None, "mask": None, "reset": None}
    call["lengths"] = np.zeros(shape[1], int)
    for put in (lambda a: a, on_device):
        h, c_last, saved = sru_rt.sru_forward(**put(call), save=True)
        gradients = sru_rt.sru_backward(saved, put(np.zeros((*shape, D * d), np.float32)))
        assert h.shape == (*shape, D * d) and c_last.shape == (D, shape[1], d)
        for name in ("weight", "bias", "v"):
            assert getattr(gradients, name).shape == call[name].shape and not host(getattr(gradients, name)).any()
    assert record.products == [] and record.reads == []


@pytest.mark.parametrize("like", ["array", "integers", "device 1"])
def test_init(cupy, like):
    example = on_device(np.zeros(1, int if like == "integers" else np.float32), int(like == "device 1"))
    params = sru_rt.sru_init(4, 5, low_rank=2, rng=3, like=example)
    wanted = sru_rt.sru_init(4, 5, low_rank=2, rng=3)
    assert params.keys() == wanted.keys()
    arrays = [params[name] for name in ("weight", "bias", "v")]
    assert_on_device(arrays, example.device.id)
    assert_same_bits(host(tuple(arrays)), [wanted[name] for name in ("weight", "bias", "v")])
    assert fake_cupy.runtime.getDevice() == 0


# ----------------------------------------------------------------------------------------------------------------------
# What is kept, and what is asked for


def test_saved(cupy):
    call = arguments()
    *_, saved = sru_rt.sru_forward(**on_device(call), save=True)
    *_, wanted = sru_rt.sru_forward(**call, save=True)
    factors = 3 * d * D * d * D  # of the weight; U has L*B*D*3*d numbers, each state that is kept B*D*d
    numbers = L * B * D * d * (1 + 3 + 1) + factors + 2 * D * 2 * d + B * D * d
    assert saved.nbytes == wanted.nbytes == 4 * numbers
    assert repr(saved) == repr(wanted)
    gradients = sru_rt.sru_backward(saved, on_device(np.ones((L, B, D * d), np.float32)))
    assert repr(gradients).startswith("Gradients(x=float32[6, 3, 10], weight=float32[2, 3, 5, 10]")
    assert dir(gradients) == ["bias", "c0", "v", "weight", "x"]
    assert record.reads == []


@pytest.mark.parametrize("need", [("weight",), ("x",), ("bias", "c0"), "v", ()])
def test_need(cupy, need):
    call, dh = arguments(), np.ones((L, B, D * d), np.float32)
    names = (need,) if isinstance(need, str) else need
    results = []
    for put in (lambda a: a, on_device):
        *_, saved = sru_rt.sru_forward(**put(call), save=True)
        record.clear()
        gradients = sru_rt.sru_backward(saved, put(dh), need=need)
        results.append(host(tuple(getattr(gradients, name) for name in names)))
        assert list(gradients) == [name for name in ("x", "weight", "bias", "v", "c0") if name in names]
    close(*results)
    assert len(record.products) == len({"x", "weight"} & set(names))


@pytest.mark.parametrize("given", ["dh", "dc_last"])
def test_one_gradient_of_the_results(cupy, given):
    call = arguments()
    seeds = {"dh": None, "dc_last": None} | {
        given: np.ones((L, B, D * d) if given == "dh" else (D, B, d), np.float32),
    }
    results = []
    for put in (lambda a: a, on_device):
        *_, saved = sru_rt.sru_forward(**put(call), save=True)
        gradients = sru_rt.sru_backward(saved, **put(seeds))
        results.append(host(tuple(getattr(gradients, name) for name in gradients)))
    close(*results)


@pytest.mark.parametrize("name", ["h", "c_last", "both"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_out(cupy, function, name):
    call = on_device(arguments(function))
    wanted = getattr(sru_rt, function)(**call)
    out = [fake_cupy.empty(a.shape, a.dtype) if name in (n, "both") else None for n, a in zip(("h", "c_last"), wanted)]
    got = getattr(sru_rt, function)(**call, out=tuple(out))
    assert_same_bits(host(got), host(wanted))
    for given, result in zip(out, got):
        assert given is None or given.data.ptr == result.data.ptr


def test_the_state_may_be_updated_in_place(cupy):
    call = on_device(arguments("sru_step"))
    wanted = sru_rt.sru_step(**call)
    got = sru_rt.sru_step(**call, out=(None, call["c"]))
    assert_same_bits(host(got), host(wanted))
    assert got[1].data.ptr == call["c"].data.ptr


# ----------------------------------------------------------------------------------------------------------------------
# Lengths and masks


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("where", ["host", "device", "list"])
def test_lengths(cupy, where, dtype):
    call = arguments()
    wanted = sru_rt.sru_forward(**call)
    lengths = {"host": np.array(LENGTHS, dtype), "device": on_device(np.array(LENGTHS, dtype)), "list": LENGTHS}[where]
    close(host(sru_rt.sru_forward(**on_device(call) | {"lengths": lengths})), wanted)
    assert record.reads == []


def test_lengths_may_change_after_the_forward(cupy):
    call, lengths = on_device(arguments()), on_device(np.array(LENGTHS))
    dh = on_device(np.ones((L, B, D * d), np.float32))
    wanted = sru_rt.sru_backward(sru_rt.sru_forward(**call | {"lengths": LENGTHS}, save=True)[2], dh)
    *_, saved = sru_rt.sru_forward(**call | {"lengths": lengths}, save=True)
    lengths.fill(0)
    assert_same_bits(host(sru_rt.sru_backward(saved, dh).x), host(wanted.x))


@pytest.mark.parametrize("wrong", [[7, 0, 0], [0, -1, 0]])
def test_lengths_out_of_range(cupy, wrong, monkeypatch):
    """Those of the host are refused; those of the device are only looked at where a setting asks for it."""
    call = on_device(arguments())
    for lengths in (wrong, np.array(wrong)):
        refused("sru_forward", call | {"lengths": lengths}, ArgumentError, "0 to L = 6", f"got {wrong[0] or wrong[1]}")
    assert record.reads == []
    lengths = on_device(np.array(wrong))
    launched = []
    monkeypatch.setattr(recurrence.launch, "run", lambda *given: launched.append(given))
    sru_rt.sru_forward(**call | {"lengths": lengths})
    assert launched and record.reads == []
    monkeypatch.setenv("SRU_RT_DEBUG", "1")
    refused("sru_forward", call | {"lengths": lengths}, ArgumentError, "0 to L = 6", f"got {wrong[0] or wrong[1]}")
    assert record.reads == ["get"]


def test_lengths_of_the_device_are_clamped_in_the_kernel(emulated):
    call = arguments()
    wanted = sru_rt.sru_forward(**on_device(call) | {"lengths": [L, 0, 4]})
    got = sru_rt.sru_forward(**on_device(call) | {"lengths": on_device(np.array([L + 9, -3, 4]))})
    assert_same_bits(host(got), host(wanted))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float32, bfloat16])
def test_masks(cupy, dtype):
    call = arguments()
    wanted = sru_rt.sru_forward(**call)
    call |= {name: (call[name] * 3).astype(dtype) for name in ("mask", "reset")}
    close(host(sru_rt.sru_forward(**on_device(call))), wanted)
    assert record.reads == []


def test_what_stands_in_padding_spoils_no_gradient(cupy):
    """It is left out before the product, as its result is not looked at."""
    call = arguments()
    padded = call["mask"] | (np.arange(L)[:, None] >= np.array(LENGTHS))
    dh = np.ones((L, B, D * d), np.float32)
    results = []
    for value in (0, np.nan, np.inf):
        call["x"][padded] = value
        *_, saved = sru_rt.sru_forward(**on_device(call), save=True)
        results.append(host(sru_rt.sru_backward(saved, on_device(dh)).weight))
    assert np.isfinite(results[0]).all()
    assert_same_bits(results[1:], results[:1] * 2)
    assert record.reads == []


# ----------------------------------------------------------------------------------------------------------------------
# Devices and streams


@pytest.mark.parametrize("kernels", ["cupy", "emulated"])
def test_everything_runs_on_the_arrays_device_and_the_current_stream(request, kernels):
    request.getfixturevalue(kernels)
    call = on_device(arguments(), 1) | {"lengths": LENGTHS}
    with fake_cupy.Device(1):
        stream = fake_cupy.Stream()
        stream.use()
    assert fake_cupy.runtime.getDevice() == 0
    *results, saved = sru_rt.sru_forward(**call, save=True)
    gradients = sru_rt.sru_backward(saved, on_device(np.ones((L, B, D * d), np.float32), 1))
    assert fake_cupy.runtime.getDevice() == 0
    assert_on_device([*results, *(getattr(gradients, name) for name in gradients)], 1)
    assert {(device, ptr) for _, device, ptr in record.launches} == {(1, stream.ptr)}
    assert {product["stream"] for product in record.products} == {stream.ptr}
    assert record.reads == []


def test_the_device_is_given_back_after_an_error(cupy):
    call = on_device(arguments(), 1)
    refused("sru_forward", call | {"activation": "gelu"}, ArgumentError, "activation")
    assert fake_cupy.runtime.getDevice() == 0


def test_threads_have_their_own_streams(cupy):
    call, streams = on_device(arguments("sru_step")), []

    def work() -> None:
        with fake_cupy.Stream() as stream:
            sru_rt.sru_step(**call)
            streams.append(stream.ptr)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [ptr for _, _, ptr in record.launches] == streams


# ----------------------------------------------------------------------------------------------------------------------
# Products


def product(dtype: Any, monkeypatch: Any, tf32: str = "0", n: int = 5) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The three kinds of product, and what NumPy makes of them in float64."""
    monkeypatch.setenv("SRU_RT_TF32", tf32)
    rng = np.random.default_rng(0)
    a, b, c, rows = (rng.normal(size=s).astype(dtype) for s in ((n, 3), (3, 4), (6, 3), (n, 7)))
    plus = rng.normal(size=(n, 4)).astype(dtype)
    gpu = on_cupy.library(fake_cupy.cupy, 0)
    A, Bm, C, R, P = map(on_device, (a, b, c, rows, plus))
    got = [gpu.times(A, Bm), gpu.times(A, Bm, P), gpu.times_transposed(A, C), gpu.transposed_times(A, R)]
    a, b, c, rows, plus = (x.astype(np.float64) for x in (a, b, c, rows, plus))
    return [host(g) for g in got], [a @ b, a @ b + plus, a @ c.T, a.T @ rows]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(cupy, dtype, monkeypatch):
    got, wanted = product(DTYPES[dtype], monkeypatch)
    summed = np.float64 if dtype == "float64" else np.float32
    assert [g.dtype for g in got] == [DTYPES[dtype]] * 3 + [summed]
    for g, w in zip(got, wanted):
        tolerance.check("product", g, w, tolerance.STEP[np.dtype(g.dtype).name])
    for asked in record.products:
        assert asked["compute"] == (70 if dtype == "float64" else 68)
        assert asked["math_mode"] == 16  # partial sums of 16-bit products are not rounded
    assert fake_cupy.getMathMode(fake_cupy.get_cublas_handle()) == 0


def test_tf32(cupy, monkeypatch):
    exact, wanted = product(np.float32, monkeypatch)
    rounded, _ = product(np.float32, monkeypatch, tf32="1")
    for e, r, w in zip(exact, rounded, wanted):
        assert (np.abs(r - w).max() > 100 * np.abs(e - w).max()) and np.abs(r - w).max() < 0.01
    got, _ = product(np.float64, monkeypatch, tf32="1")
    assert_same_bits(got, product(np.float64, monkeypatch)[0])


def test_products_leave_the_handle_as_it_was(cupy):
    handle = fake_cupy.get_cublas_handle()
    fake_cupy.setMathMode(handle, 3)
    sru_rt.sru_forward(**on_device(arguments()))
    assert fake_cupy.getMathMode(handle) == 3


def test_products_beyond_what_cublas_takes(cupy):
    """A view that repeats one row, as no machine for tests holds so many."""
    gpu = on_cupy.library(fake_cupy.cupy, 0)
    a = fake_cupy.ndarray._of(np.broadcast_to(np.zeros((1, 1), np.float16), (2**31, 1)))
    small = on_device(np.zeros((1, 1), np.float16))
    with pytest.raises(ArgumentError, match=r"2147483647.*fewer steps"):
        gpu.transposed_times(a, a)
    with pytest.raises(ArgumentError, match=r"2147483647.*fewer steps"):
        gpu.times(small, a.T, plus=small)


CUBLAS = r"""
#include <string.h>
long long seen[20];
extern "C" int cublasSetStream_v2(void *handle, void *stream) { seen[19] = (long long)stream; return handle == 0; }
extern "C" int cublasGemmEx(void *handle, int a, int b, int m, int n, int k, const void *alpha, const void *A,
                            int A_type, int lda, const void *B, int B_type, int ldb, const void *beta, void *C,
                            int C_type, int ldc, int compute, int algorithm) {
  const long long all[] = {(long long)handle, a, b, m, n, k, (long long)alpha, (long long)A, A_type, lda, (long long)B,
                           B_type, ldb, (long long)beta, (long long)C, C_type, ldc, compute, algorithm};
  memcpy(seen, all, sizeof all);
  return algorithm == -1 ? 0 : 7;
}
"""


def test_captured_products_have_the_arguments_of_cublas(tmp_path, monkeypatch):
    """The C prototype of its manual, compiled, in the place of the library."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="comes with CuPy")
    (tmp_path / "cublas.cpp").write_text(CUBLAS)
    subprocess.run(["g++", "-shared", "-fPIC", "cublas.cpp", "-o", "cublas.so"], cwd=tmp_path, check=True)
    found = types.SimpleNamespace(abs_path=str(tmp_path / "cublas.so"))
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", {"cublas": found}.__getitem__)
    monkeypatch.setattr(on_cupy, "_cublas_library", functools.cache(on_cupy._cublas_library.__wrapped__))
    arguments = tuple((1 << 40) + i if i in (0, 6, 7, 10, 13, 14) else i for i in range(18))
    on_cupy._capture_gemm(1 << 45, (*arguments, -1))
    seen = (ctypes.c_longlong * 20).in_dll(on_cupy._cublas_library(), "seen")
    assert tuple(seen) == (*arguments, -1, 1 << 45)
    with pytest.raises(LibraryError, match="cublasGemmEx failed with status 7"):
        on_cupy._capture_gemm(1 << 45, (*arguments, 0))


def test_a_layer_in_a_capture(cupy, monkeypatch):
    """CuPy's binding of cuBLAS is refused there, and so are copies from the host."""
    given = on_device(arguments())
    wanted = sru_rt.sru_forward(**given)
    streams = []

    def gemm(*gemm_arguments: int) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(fake_cupy, "_capturing", set())
            fake_cupy.gemmEx(*gemm_arguments)
        return 0

    library = types.SimpleNamespace(cublasSetStream_v2=lambda *given: streams.append(given) or 0, cublasGemmEx=gemm)
    monkeypatch.setattr(on_cupy, "_cublas_library", lambda: library)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            got = sru_rt.sru_forward(**given)
            with pytest.raises(RuntimeError, match="H2D"):
                sru_rt.sru_forward(**given | {"lengths": [1] * given["x"].shape[1]})
        finally:
            stream.end_capture()
    assert_same_bits(host(got), host(wanted))
    assert streams == [(fake_cupy.get_cublas_handle(), stream.ptr)] * len(streams) and streams


def test_without_cublas(cupy, monkeypatch):
    class WithoutCublas(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name == "cublas":
                raise ImportError("libcublas.so.12 was not found")
            return getattr(fake_cupy.cuda, name)

    monkeypatch.setattr(fake_cupy.cupy, "cuda", WithoutCublas("cupy.cuda"))
    with pytest.raises(LibraryError, match=r"cuBLAS.*libcublas.so.12.*pip install 'sru_rt\[cuda12\]'"):
        sru_rt.sru_forward(**on_device(arguments()))


# ----------------------------------------------------------------------------------------------------------------------
# How arrays lie


def spread(array: np.ndarray) -> Any:
    memory = np.zeros([2 * n for n in array.shape], array.dtype)
    memory[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return on_device(memory)[tuple(slice(None, None, 2) for _ in array.shape)]


def shifted(array: np.ndarray) -> Any:
    """Contiguous, but not at a multiple of what kernels load at once."""
    return on_device(np.concatenate([np.zeros(1, array.dtype), array.reshape(-1)]))[1:].reshape(array.shape)


@pytest.mark.parametrize("layout", [spread, shifted, lambda a: on_device(np.ascontiguousarray(a.T)).T])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts(cupy, function, dtype, layout):
    call = arguments(function, dtype)
    wanted = getattr(sru_rt, function)(**on_device(call))
    odd = {name: layout(value) for name, value in call.items()}
    assert_same_bits(host(getattr(sru_rt, function)(**odd)), host(wanted))
    if function == "sru_step":
        return
    dh = np.ones((L, B, D * d), dtype)
    *_, saved = getattr(sru_rt, function)(**on_device(call), save=True)
    *_, odd_saved = getattr(sru_rt, function)(**odd, save=True)
    for array in (*odd_saved.operands.arrays.values(), *odd_saved.operands.c0):
        assert array.flags.c_contiguous and array.data.ptr % 16 == 0
    wanted = sru_rt.sru_backward(saved, on_device(dh))
    gradients = sru_rt.sru_backward(odd_saved, layout(dh))
    for name in wanted:
        assert_same_bits(host(getattr(gradients, name)), host(getattr(wanted, name)))


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong


def refused(function: str, call: dict[str, Any], error: type[SruRtError], *says: str) -> str:
    with pytest.raises(SruRtError) as caught:
        getattr(sru_rt, function)(**call)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(f"{function}: "), message
    for text in says:
        assert text in message, message
    return message


@pytest.mark.parametrize("name", ["weight", "bias", "v", "c0", "mask", "reset", "lengths"])
def test_arrays_on_two_devices(cupy, name):
    call = arguments()
    odd = on_device(call) | {name: on_device(call[name], 1)}
    refused("sru_forward", odd, LibraryError, f"{name} is on cuda:1", "x is on cuda:0", "one device")


def test_a_gradient_on_another_device(cupy):
    *_, saved = sru_rt.sru_forward(**on_device(arguments()), save=True)
    dh = on_device(np.ones((L, B, D * d), np.float32), 1)
    refused("sru_backward", {"saved": saved, "dh": dh}, LibraryError, "dh is on cuda:1", "the forward", "cuda:0")


@pytest.mark.parametrize("name", ["x", "weight", "bias", "v", "c0", "mask", "reset"])
def test_mixed_with_numpy(cupy, name):
    call = on_device(arguments()) | {name: arguments()[name]}
    message = refused("sru_forward", call, LibraryError, "different libraries", "of cupy", "convert them to one")
    assert re.search(rf"\b{name} of numpy", message)


def test_lengths_of_a_device_with_numpy_arrays(cupy):
    call = arguments() | {"lengths": on_device(np.array(LENGTHS))}
    refused("sru_forward", call, LibraryError, "lengths of cupy", "of numpy")


def test_backward_of_mixed_arrays(cupy):
    h, _, saved = sru_rt.sru_forward(**on_device(arguments()), save=True)
    dh = np.ones((L, B, D * d), np.float32)
    refused("sru_backward", {"saved": saved, "dh": dh}, LibraryError, "dh must be a CuPy array", "cupy.asarray(dh)")
    refused("sru_backward", {"saved": saved, "dh": [1]}, LibraryError, "dh must be a CuPy array", "got list")
    *_, saved = sru_rt.sru_forward(**arguments(), save=True)
    refused("sru_backward", {"saved": saved, "dh": h}, LibraryError, "dh must be an array", "cupy.ndarray", "dh.get()")


def test_dtypes(cupy):
    call = on_device(arguments())
    wide = on_device(arguments(dtype=np.float64))
    refused("sru_forward", call | {"x": wide["x"]}, DtypeError, "weight has dtype float32", "weight.astype('float64')")
    refused("sru_forward", call | {"bias": wide["bias"]}, DtypeError, "bias has dtype float64", "bias.astype(")
    x = on_device(np.zeros((L, B, D * d), int))
    refused("sru_forward", call | {"x": x}, DtypeError, "x has dtype int64", "x.astype('float32')")
    lengths = on_device(np.ones(B))
    refused("sru_forward", call | {"lengths": lengths}, DtypeError, "cupy.asarray(lengths).astype('int64')")


def test_shapes(cupy):
    call = on_device(arguments())
    refused("sru_forward", call | {"x": call["x"][0]}, ShapeError, "x has 2 axes", "(L, B, d_in)")
    refused("sru_forward", call | {"mask": call["mask"][1:]}, ShapeError, "mask has shape (5, 3)", "L = 6")
    refused("sru_forward", call | {"lengths": call["lengths"][1:]}, ShapeError, "lengths has shape (2,)")
    refused("sru_forward", call | {"lengths": np.array([1])}, ShapeError, "lengths has shape (1,)")
    refused("sru_forward", call | {"lengths": [call["lengths"][0]] * B}, ArgumentError, "lengths must be (B,) integers")
    refused("sru_forward", call | {"weight": [1]}, ShapeError, "weight is a tuple of 1")
    refused("sru_forward", call | {"weight": "text"}, LibraryError, "weight must be a CuPy array, as x is (got str)")
    assert record.reads == []


def test_numbers_are_not_read_from_the_device(cupy):
    call = on_device(arguments()) | {"alpha": on_device(np.array(2.0))}
    refused("sru_forward", call, ArgumentError, "alpha must be a number", "cuda:0", "float(alpha)", "waits")
    assert record.reads == []


def test_wrong_out(cupy):
    call = on_device(arguments())
    h, c = fake_cupy.empty((L, B, D * d), np.float32), fake_cupy.empty((D, B, d), np.float32)
    wrong = (
        ((h.astype(np.float64), None), DtypeError, "cupy.empty((6, 3, 10), 'float32')"),
        ((h[1:], None), ShapeError, "out[0] has shape (5, 3, 10)"),
        ((spread(host(h)), None), ArgumentError, "C-contiguous", "cupy.empty"),
        ((shifted(host(h)), None), ArgumentError, "16 bytes", "cupy.empty"),
        ((call["x"], None), ArgumentError, "out[0] overlaps an input"),
        ((None, call["c0"][...].reshape(D, B, d)[::-1][::-1]), None),
        ((np.zeros((L, B, D * d), np.float32), None), LibraryError, "out of numpy"),
        ((on_device(host(h), 1), None), LibraryError, "out[0] is on cuda:1"),
        ((h, h.reshape(-1)[: c.size].reshape(c.shape)), ArgumentError, "overlapping"),
        ((1, None), LibraryError, "out[0] must be a CuPy array", "got int"),
    )
    for out, error, *says in wrong:
        if error is None:
            sru_rt.sru_forward(**call, out=out)
        else:
            refused("sru_forward", call | {"out": out}, error, *says)


# ----------------------------------------------------------------------------------------------------------------------
# Arrays of other libraries on CUDA devices


class Foreign:
    """An array on a CUDA device, of a library with `from_dlpack`."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype = array, array.dtype
        self.device = f"cuda:{array.device.id}"

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda array: type(self)(fake_cupy.from_dlpack(array)))


class OnHost(Foreign):
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.device = array, array.dtype, "cpu"


def foreign(value: Any, kind: type = Foreign, device: int = 0) -> Any:
    if isinstance(value, dict):
        return {name: foreign(v, kind, device) for name, v in value.items()}
    return kind(on_device(value, device)) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_foreign_arrays(cupy, function, device):
    call = arguments(function)
    wanted = getattr(sru_rt, function)(**on_device(call))
    record.clear()
    got = getattr(sru_rt, function)(**foreign(call, device=device))
    assert all(type(a) is Foreign for a in got)
    assert_on_device([a.array for a in got], device)
    assert_same_bits([host(a.array) for a in got], host(wanted))
    assert fake_cupy.runtime.getDevice() == 0
    # Nobody says when this library uses memory anew, so that the call waits before it lets go of it.
    assert record.reads == ["Stream.synchronize"]


@pytest.mark.parametrize(
    "lengths", [LENGTHS, np.array(LENGTHS), OnHost(np.array(LENGTHS))], ids=["list", "numpy", "own"]
)
def test_foreign_arrays_with_lengths_of_the_host(cupy, lengths):
    call = arguments()
    got = sru_rt.sru_forward(**foreign(call) | {"lengths": lengths})
    assert_same_bits([host(a.array) for a in got], host(sru_rt.sru_forward(**on_device(call))))
    wrong = type(lengths)([9, 0, 0]) if isinstance(lengths, list) else [9, 0, 0]
    refused("sru_forward", foreign(call) | {"lengths": wrong}, ArgumentError, "0 to L = 6")


def test_foreign_arrays_in_managed_memory(cupy):
    class Managed(Foreign):
        def __dlpack_device__(self) -> Any:
            return 13, self.array.device.id

    call = arguments()
    got = sru_rt.sru_forward(**foreign(call, Managed))
    assert_same_bits([host(a.array) for a in got], host(sru_rt.sru_forward(**on_device(call))))


def test_foreign_init(cupy):
    like = foreign(np.zeros(1), device=1)
    params, wanted = sru_rt.sru_init(4, 5, rng=3, like=like), sru_rt.sru_init(4, 5, rng=3)
    for name in ("weight", "bias", "v"):
        assert type(params[name]) is Foreign and params[name].array.device.id == 1
        assert_same_bits(host(params[name].array), wanted[name])


def test_foreign_arrays_that_are_refused(cupy):
    call, given = foreign(arguments()), arguments()
    refused("sru_forward", call | {"save": True}, LibraryError, "save=", "test_cupy_arrays", "CuPy", "cupy.from_dlpack")
    refused("sru_forward", call | {"out": (call["x"], None)}, LibraryError, "out=", "CuPy arrays")
    for name in ("x", "weight", "mask"):
        odd = call | {name: OnHost(given[name])}
        refused("sru_forward", odd, LibraryError, f"{name} is an array of test_cupy_arrays on device cpu", "move it")
    odd = call | {"bias": foreign(given["bias"], device=1)}
    refused("sru_forward", odd, LibraryError, "bias is on cuda:1", "x is on cuda:0")
    odd = call | {"weight": on_device(given["weight"])}
    refused("sru_forward", odd, LibraryError, "different libraries", "weight of cupy")


class Bfloat16(Foreign):
    def __init__(self, array: Any) -> None:
        super().__init__(array)
        self.dtype = "other.bfloat16"


@pytest.mark.parametrize("version", ["13.6.0", "14.2.0"])
def test_foreign_bfloat16(cupy, version, monkeypatch):
    """Versions before 14.1 crash on it, so that they are not asked; later ones say what they lack."""
    monkeypatch.setattr(cupy, "__version__", version)
    asked = []

    def from_dlpack(array: Any) -> Any:
        asked.append(array)
        raise NotImplementedError("install ml_dtypes")

    monkeypatch.setattr(cupy, "from_dlpack", from_dlpack)
    call = foreign(arguments(), Bfloat16)
    why = "this is CuPy 13.6.0" if version == "13.6.0" else "install ml_dtypes"
    refused("sru_forward", call, DtypeError, "x has dtype bfloat16", "14.1", "ml_dtypes", why, "float32")
    assert len(asked) == (version == "14.2.0")


def test_an_export_that_fails(cupy):
    class Failing(Foreign):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("no memory today")

    refused("sru_forward", foreign(arguments(), Failing), LibraryError, "x", "DLPack", "no memory today")


def without_driver() -> types.ModuleType:
    def count() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    module: Any = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=count))
    return module


@pytest.mark.parametrize("broken", [None, without_driver()], ids=["missing", "without a driver"])
def test_foreign_arrays_without_cupy(cupy, broken, monkeypatch):
    call, like = foreign(arguments()), foreign(np.zeros(1))
    says = ("through CuPy", "pip install 'sru_rt[cuda12]'", "sru_rt[cuda13]", "CPU")
    with monkeypatch.context() as patch:  # undone before the fixture takes the stand-in away
        patch.setitem(sys.modules, "cupy", broken)
        refused("sru_forward", call, LibraryError, *says)
        refused("sru_init", {"d_in": 4, "d": 5, "like": like}, LibraryError, *says)
