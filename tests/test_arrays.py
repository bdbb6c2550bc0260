"""Arrays of other libraries, through DLPack in the memory of the CPU, and bfloat16 on NumPy arrays."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import sru_rt
from sru_rt.errors import LibraryError, SruRtError

L, B, D, d = 6, 3, 2, 5
FUNCTIONS = ("sru_forward", "sru_recurrence", "sru_step")
OPTIONS = {"activation": "tanh", "reset_on": "current"}


def arguments(function: str, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    result: dict[str, Any] = {"x": draw(L, B, D * d), "bias": draw(D, 2, d), "v": draw(D, 2, d)}
    if function == "sru_recurrence":
        result["u"] = draw(L, B, D, 3, d)
    else:
        result["weight"] = draw(D, 3, d, D * d)
    if function == "sru_step":
        return result | {"x": result["x"][0], "c": draw(D, B, d)}
    mask, reset = (rng.random((2, L, B)) < 0.2).astype(np.uint8)  # not every NumPy has bool in its DLPack
    return result | {"c0": draw(D, B, d), "lengths": np.array([5, 0, 4]), "mask": mask, "reset": reset}


def exportable(array: np.ndarray) -> None:
    """Skips a test where NumPy's own DLPack cannot do it."""
    try:
        np.from_dlpack(array)
    except (BufferError, TypeError) as error:
        pytest.skip(f"not with this NumPy: {error}")


def converted(call: dict[str, Any], convert: Any) -> dict[str, Any]:
    return {name: convert(value) if isinstance(value, np.ndarray) else value for name, value in call.items()}


def assert_same_bits(got: Any, wanted: Any) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    """What is tested here happens around a kernel; the tests of results ask for `backend`."""
    monkeypatch.setenv("SRU_RT_CPU", "numpy")


def refused(function: str, call: dict[str, Any], error: type[SruRtError], *says: str) -> str:
    with pytest.raises(SruRtError) as caught:
        getattr(sru_rt, function)(**call)
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(f"{function}: "), message
    for text in says:
        assert text in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Libraries that nobody has heard of


class Minimal:
    """An array that can be read through DLPack, and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class OldMinimal(Minimal):
    """As before the version of DLPack could be asked for."""

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()


class WithNamespace(Minimal):
    """An array of a library that can import DLPack."""

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda source: WithNamespace(np.from_dlpack(source)))


class NamespaceWithoutImport(Minimal):
    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return types.SimpleNamespace()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", [Minimal, OldMinimal, WithNamespace, NamespaceWithoutImport])
def test_minimal_arrays(backend, function, kind):
    wanted = getattr(sru_rt, function)(**arguments(function))
    call = converted(arguments(function), kind)
    got = getattr(sru_rt, function)(**call)
    expected = WithNamespace if kind is WithNamespace else np.ndarray
    assert all(type(a) is expected for a in got)
    assert_same_bits([a.array if kind is WithNamespace else a for a in got], wanted)
    for name, value in arguments(function).items():
        assert call[name].array.tobytes() == value.tobytes()


def test_read_only_minimal_arrays():
    def read_only(array: np.ndarray) -> WithNamespace:
        array = array.copy()
        array.flags.writeable = False
        return WithNamespace(array)

    exportable(read_only(np.zeros(1)).array)
    got = sru_rt.sru_forward(**converted(arguments("sru_forward"), read_only))
    assert_same_bits([a.array for a in got], sru_rt.sru_forward(**arguments("sru_forward")))


def test_a_name_in_the_module_of_the_class_is_no_library(monkeypatch):
    """The array's own namespace goes before whatever its module has imported."""
    monkeypatch.setattr(sys.modules[__name__], "from_dlpack", lambda source: "wrong", raising=False)
    h, _ = sru_rt.sru_forward(**converted(arguments("sru_forward"), WithNamespace))
    assert type(h) is WithNamespace


def test_minimal_init():
    params = sru_rt.sru_init(4, 5, like=WithNamespace(np.zeros(1)))
    assert type(params["weight"]) is WithNamespace
    assert type(sru_rt.sru_init(4, 5, like=Minimal(np.zeros(1)))["weight"]) is np.ndarray


def test_minimal_mixed():
    call = arguments("sru_forward") | {"bias": Minimal(arguments("sru_forward")["bias"])}
    refused("sru_forward", call, LibraryError, "different libraries", "bias of test_arrays", "of numpy")


def on_device(device: Any) -> type[Minimal]:
    class OnDevice(Minimal):
        def __dlpack_device__(self) -> Any:
            return device

        def __dlpack__(self, **options: Any) -> Any:
            raise AssertionError("the memory of another device was asked for")

    return OnDevice


@pytest.mark.parametrize("device", [10, 8])
def test_arrays_on_another_device(device):
    """ROCm, Metal; for CUDA see test_cupy_arrays.py."""
    call = converted(arguments("sru_forward"), on_device((device, 0)))
    refused("sru_forward", call, LibraryError, "x", "device", str(device), "CPU", "move it there")
    refused("sru_init", {"d_in": 4, "d": 5, "like": call["x"]}, LibraryError, "like", "device", str(device), "CPU")


@pytest.mark.parametrize("device", [5, (), None, ("a",)])
def test_a_device_that_makes_no_sense(device):
    call = converted(arguments("sru_forward"), on_device(device))
    refused("sru_forward", call, LibraryError, "x", "test_arrays", "DLPack")


@pytest.mark.parametrize("error", [BufferError, KeyError, NotImplementedError, OSError])
def test_an_export_that_fails(error):
    class Failing(Minimal):
        def __dlpack__(self, **options: Any) -> Any:
            raise error("no memory today")

    call = converted(arguments("sru_forward"), Failing)
    refused("sru_forward", call, LibraryError, "x", "test_arrays", "DLPack", "no memory today")


class Unknown:
    """As a pandas.DataFrame: convertible, but without DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lengths", "mask", "c0"])
def test_what_has_no_dlpack_is_converted_by_the_user(name):
    call = arguments("sru_forward")
    odd = call | {name: Unknown(call[name])}
    refused("sru_forward", odd, LibraryError, f"{name} must be an array", "Unknown", f"numpy.asarray({name})")
    sru_rt.sru_forward(**odd | {name: np.asarray(odd[name])})


# ----------------------------------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("given", ["all", "only x and weight"])
def test_bfloat16(given):
    """Every function takes it, with small arrays in it or in float32."""
    call = arguments("sru_forward", bfloat16)
    if given != "all":
        call |= {name: call[name].astype(np.float32) for name in ("bias", "v", "c0")}
    wide = converted(call, lambda a: a.astype(np.float32) if a.dtype == bfloat16 else a)
    h, c_last, saved = sru_rt.sru_forward(**call, save=True)
    wanted_h, wanted_c, wide_saved = sru_rt.sru_forward(**wide, save=True)
    assert (h.dtype, c_last.dtype) == (bfloat16, np.float32)
    np.testing.assert_allclose(h.astype(np.float32), wanted_h, rtol=0.1, atol=0.1)
    np.testing.assert_allclose(c_last, wanted_c, rtol=0.1, atol=0.1)
    for dh in (h, h.astype(np.float32)):
        grads = sru_rt.sru_backward(saved, dh, c_last)
        wanted = sru_rt.sru_backward(wide_saved, h.astype(np.float32), c_last)
        for name in grads:
            assert getattr(grads, name).dtype == call[name].dtype
            scale = np.abs(getattr(wanted, name)).max()
            difference = np.abs(getattr(grads, name).astype(np.float32) - getattr(wanted, name)).max()
            assert difference < 0.1 * scale, name

    u = arguments("sru_recurrence", bfloat16)
    assert [a.dtype for a in sru_rt.sru_recurrence(**u)] == [bfloat16, np.float32]
    one = arguments("sru_step", bfloat16)
    out = np.zeros((B, D * d), bfloat16), np.zeros((D, B, d), np.float32)
    assert_same_bits(sru_rt.sru_step(**one, out=out), sru_rt.sru_step(**one))
    for dtype in (bfloat16, "bfloat16"):
        assert sru_rt.sru_init(4, 5, dtype=dtype)["weight"].dtype == bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Nobody's library is imported

FRAMEWORKS = ("torch", "jax", "cupy", "tensorflow", "paddle", "mlx", "ml_dtypes", "pandas", "scipy")
LONELY = f"""
import sys
import numpy as np
of_numpy = set(sys.modules)
import sru_rt

class Foreign:
    def __init__(self, array): self.array = array
    def __dlpack__(self, **options): return self.array.__dlpack__(**options)
    def __dlpack_device__(self): return self.array.__dlpack_device__()

params = sru_rt.sru_init(4, 4, rng=0)
h, c, saved = sru_rt.sru_forward(np.ones((3, 2, 4), np.float32), **params, save=True)
sru_rt.sru_backward(saved, h)
alpha = params.pop("alpha")
foreign = {{name: Foreign(array) for name, array in params.items()}}
sru_rt.sru_forward(Foreign(np.ones((3, 2, 4), np.float32)), alpha=alpha, **foreign)
try:
    sru_rt.sru_forward("text", **params)
except sru_rt.errors.SruRtError:
    pass
print([name for name in {FRAMEWORKS!r} if name in sys.modules] + sorted({{"numpy.ma"}} & set(sys.modules) - of_numpy))
"""


def test_nothing_imports_a_framework():
    done = subprocess.run([sys.executable, "-c", LONELY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
