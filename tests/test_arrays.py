"""Arrays of other libraries, through DLPack in the memory of the CPU, and bfloat16 on NumPy arrays."""

from __future__ import annotations

import re
import subprocess
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import sru_rt
from sru_rt.errors import ArgumentError, DtypeError, LibraryError, ShapeError, SruRtError

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
# PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch")


def tensors(torch: types.ModuleType, function: str = "sru_forward", dtype: Any = np.float32) -> dict[str, Any]:
    return converted(arguments(function, dtype), lambda a: torch.from_numpy(a.copy()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_torch(torch, backend, function, dtype):
    """The results are tensors with the bits that NumPy arrays give; what was given stays as it was."""
    call = tensors(torch, function, dtype)
    before = {name: value.clone() for name, value in call.items()}
    got = getattr(sru_rt, function)(**call, **OPTIONS)
    assert all(type(a) is torch.Tensor and not a.requires_grad for a in got)
    assert_same_bits([a.numpy() for a in got], getattr(sru_rt, function)(**arguments(function, dtype), **OPTIONS))
    assert all(torch.equal(call[name], before[name]) for name in call)


def test_torch_by_position(torch):
    call = tensors(torch)
    got = sru_rt.sru_forward(call["x"], call["weight"], None, call["v"])
    wanted = sru_rt.sru_forward(call["x"].numpy(), call["weight"].numpy(), None, call["v"].numpy())
    assert_same_bits([a.numpy() for a in got], wanted)


def test_torch_low_rank(torch):
    x, P, Q = torch.randn(L, B, D * d), torch.randn(D, 3, d, 2), torch.randn(2, D * d)
    wanted = sru_rt.sru_forward(x.numpy(), (P.numpy(), Q.numpy()))
    for pair in ((P, Q), [P, Q]):
        assert_same_bits([a.numpy() for a in sru_rt.sru_forward(x, pair)], wanted)


TORCH_VIEWS = {
    "transposed": lambda torch, a: a.permute(*reversed(range(a.ndim))).contiguous().permute(*reversed(range(a.ndim))),
    "expanded": lambda torch, a: a[:1].expand(a.shape),
    "sliced": lambda torch, a: torch.stack([a, a], -1)[..., 0],
    "flipped": lambda torch, a: a.flip(0),
    "negated lazily": lambda torch, a: torch.complex(a, a).conj().imag if a.is_floating_point() else a,
    "subclass": lambda torch, a: a.as_subclass(type("Subclass", (torch.Tensor,), {})),
    "frozen parameter": lambda torch, a: torch.nn.Parameter(a, requires_grad=False),
    "inference tensor": lambda torch, a: inference_copy(torch, a),
}


def inference_copy(torch: types.ModuleType, a: Any) -> Any:
    with torch.inference_mode():
        return a.clone()


@pytest.mark.parametrize("view", TORCH_VIEWS)
def test_torch_views(torch, view):
    call = {name: TORCH_VIEWS[view](torch, a) for name, a in tensors(torch).items()}
    wanted = sru_rt.sru_forward(**{name: a.detach().resolve_neg().clone().numpy() for name, a in call.items()})
    got = sru_rt.sru_forward(**call)
    assert_same_bits([a.numpy() for a in got], wanted)


def test_torch_without_steps(torch):
    call = tensors(torch) | {"x": torch.zeros(0, B, D * d), "lengths": [0] * B, "mask": None, "reset": None}
    h, c_last = sru_rt.sru_forward(**call)
    assert h.shape == (0, B, D * d)
    assert torch.equal(c_last, call["c0"])


def test_torch_bool_masks(torch):
    exportable(np.zeros(1, bool))
    call = tensors(torch)
    wanted = sru_rt.sru_forward(**call)
    call |= {name: call[name].bool() for name in ("mask", "reset")}
    call |= {"dropout_mask": torch.ones(B, D, d, dtype=torch.bool)}
    assert_same_bits([a.numpy() for a in sru_rt.sru_forward(**call)], [a.numpy() for a in wanted])


def test_torch_scalar_for_alpha(torch):
    call = tensors(torch)
    assert_same_bits(
        [a.numpy() for a in sru_rt.sru_forward(**call, alpha=torch.tensor(2.0))],
        [a.numpy() for a in sru_rt.sru_forward(**call, alpha=2.0)],
    )


@pytest.mark.parametrize("lengths", [[5, 0, 4], (5, 0, 4)])
def test_torch_with_a_list_of_lengths(torch, lengths):
    got = sru_rt.sru_forward(**tensors(torch) | {"lengths": lengths})
    assert_same_bits([a.numpy() for a in got], sru_rt.sru_forward(**arguments("sru_forward")))


@pytest.mark.parametrize("name", ["x", "weight", "v", "c0"])
def test_torch_gradients_are_not_lost_silently(torch, name):
    call = tensors(torch)
    call[name].requires_grad_()
    refused("sru_forward", call, LibraryError, name, "torch", "gradient", f"{name}.detach()", "save=True")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_torch_parameters_where_no_gradient_is_recorded(torch, mode):
    call = tensors(torch)
    wanted = sru_rt.sru_forward(**call)
    call["weight"] = torch.nn.Parameter(call["weight"])
    with getattr(torch, mode)():
        got = sru_rt.sru_forward(**call)
        assert torch.equal(got[0], wanted[0])
        assert not got[0].requires_grad


def test_torch_bfloat16(torch):
    call = {name: a.bfloat16() if a.is_floating_point() else a for name, a in tensors(torch).items()}
    refused("sru_forward", call, DtypeError, "x", "torch", "bfloat16", "DLPack", "float32")


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_torch_dtypes(torch, dtype):
    call = tensors(torch)
    call["x"] = call["x"].to(getattr(torch, dtype))
    refused("sru_forward", call, DtypeError, "x has dtype", dtype, "float32")


TORCH_ODD = {
    "meta": lambda torch, a: a.to("meta"),
    "sparse": lambda torch, a: a.to_sparse(),
    "conjugated lazily": lambda torch, a: torch.complex(a, a).conj(),
    "quantized": lambda torch, a: torch.quantize_per_tensor(a, 0.1, 0, torch.qint8),
    "nested": lambda torch, a: torch.nested.nested_tensor([a[0]]),
}


@pytest.mark.parametrize("kind", TORCH_ODD)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_torch_tensors_without_plain_memory(torch, kind, name):
    call = tensors(torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are marked as experimental or as deprecated
        call[name] = TORCH_ODD[kind](torch, call[name])
        refused("sru_forward", call, LibraryError, name, "torch", "DLPack", "dense", "CPU")


def test_torch_tensors_without_values(torch):
    fake = pytest.importorskip("torch._subclasses.fake_tensor", reason="needs a PyTorch with fake tensors")
    with fake.FakeTensorMode() as mode:
        call = {name: mode.from_tensor(a) for name, a in tensors(torch).items()}
        refused("sru_forward", call, LibraryError, "x", "FakeTensor", "no values")


def test_torch_vmap(torch):
    call = tensors(torch)
    with pytest.raises(LibraryError, match="sru_forward: x is an array of torch"):
        torch.vmap(lambda x: sru_rt.sru_forward(**call | {"x": x})[0])(torch.stack([call["x"]] * 2))


@pytest.mark.parametrize("save", [True, 2, "x"])
def test_torch_cannot_save(torch, save):
    refused("sru_forward", tensors(torch) | {"save": save}, LibraryError, "save=", "torch", "NumPy arrays")


def test_torch_save_false(torch):
    assert len(sru_rt.sru_forward(**tensors(torch), save=False, out=None)) == 2


def test_torch_tensor_for_save(torch):
    refused("sru_forward", tensors(torch) | {"save": torch.ones(2)}, LibraryError, "save=", "torch")


def test_torch_cannot_write_out(torch):
    out = (torch.zeros(L, B, D * d), None)
    refused("sru_forward", tensors(torch) | {"out": out}, LibraryError, "out=", "torch", "NumPy arrays")
    refused("sru_step", tensors(torch, "sru_step") | {"out": (out[0][0], None)}, LibraryError, "out=", "torch")
    assert not out[0].any()


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lengths", "mask"])
def test_torch_mixed_with_numpy(torch, name):
    call = tensors(torch)
    call[name] = call[name].numpy()
    message = refused("sru_forward", call, LibraryError, "different libraries", "convert them to one")
    assert re.search(rf"\b{name} of numpy", message)
    assert "of torch" in message
    other = arguments("sru_forward")
    other[name] = tensors(torch)[name]
    assert re.search(rf"\b{name} of torch", refused("sru_forward", other, LibraryError, "different libraries"))


def test_torch_mixed_in_a_low_rank_pair(torch):
    call = {"x": torch.zeros(L, B, D * d), "weight": (torch.zeros(D, 3, d, 2), np.zeros((2, D * d), np.float32))}
    refused("sru_forward", call, LibraryError, "weight of numpy", "convert them to one")


def test_torch_errors_are_those_of_numpy_arrays(torch):
    call = tensors(torch)
    refused("sru_forward", call | {"x": call["x"][0]}, ShapeError, "x has 2 axes", "(L, B, d_in)")
    refused("sru_forward", call | {"bias": call["bias"][..., 1:]}, ShapeError, "bias has shape (2, 2, 4)")
    refused("sru_forward", call | {"lengths": [7, 0, 0]}, ArgumentError, "0 to L = 6", "got 7")
    refused("sru_forward", call | {"x": torch.Tensor}, LibraryError, "x must be an array")
    with pytest.raises(TypeError, match="positional"):
        sru_rt.sru_forward(call["x"], call["weight"], None, None, None, 1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        sru_rt.sru_forward(call["x"], call["weight"], skip=1)


def test_torch_for_the_backward_of_numpy_arrays(torch):
    """The backward is one of NumPy arrays, as `save` is."""
    h, _, saved = sru_rt.sru_forward(**arguments("sru_forward"), save=True)
    call = {"saved": saved, "dh": torch.from_numpy(h)}
    refused("sru_backward", call, LibraryError, "dh must be an array", "torch", "numpy.asarray(dh)")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("low_rank", [None, 2])
def test_torch_init(torch, dtype, low_rank):
    options: dict[str, Any] = dict(low_rank=low_rank, dtype=dtype, rng=3, reset_gate=True)
    params = sru_rt.sru_init(4, 5, like=torch.zeros(1), **options)
    plain = sru_rt.sru_init(4, 5, **options)
    assert params.keys() == plain.keys()
    flat = [*(params["weight"] if low_rank else [params["weight"]]), params["bias"], params["v"]]
    assert all(type(a) is torch.Tensor and a.dtype == getattr(torch, dtype) for a in flat)
    wanted = [*(plain["weight"] if low_rank else [plain["weight"]]), plain["bias"], plain["v"]]
    assert_same_bits([a.numpy() for a in flat], wanted)
    h, _ = sru_rt.sru_forward(torch.zeros(L, B, 4, dtype=getattr(torch, dtype)), **params)
    assert h.shape == (L, B, 5)


def test_torch_init_refuses(torch):
    size = {"d_in": 4, "d": 5}
    refused(
        "sru_init", size | {"like": torch.zeros(1), "dtype": "bfloat16"}, DtypeError, "bfloat16", "torch", "float32"
    )
    refused("sru_init", size | {"dtype": torch.float32}, ArgumentError, "dtype", "'float32'", "torch.float32")
    refused("sru_init", size | {"like": torch.zeros(1, device="meta")}, LibraryError, "like", "torch", "meta")
    for like in (torch, torch.Tensor, "torch"):
        refused("sru_init", size | {"like": like}, ArgumentError, "like must be an array")


# ----------------------------------------------------------------------------------------------------------------------
# JAX


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="needs JAX")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_jax(jax, function):
    call = converted(arguments(function), jax.numpy.asarray)
    got = getattr(sru_rt, function)(**call)
    assert all(isinstance(a, jax.Array) for a in got)
    assert_same_bits([np.asarray(a) for a in got], getattr(sru_rt, function)(**arguments(function)))


def test_jax_init(jax):
    params = sru_rt.sru_init(4, 5, like=jax.numpy.zeros(1))
    assert all(isinstance(params[name], jax.Array) for name in ("weight", "bias", "v"))


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_jax_tracers(jax, transform):
    call = converted(arguments("sru_forward"), jax.numpy.asarray)
    x = call.pop("x")
    traced = getattr(jax, transform)(lambda x: sru_rt.sru_forward(x, **call)[0].sum())
    with pytest.raises(LibraryError, match=r"sru_forward: x is a \w*Tracer of jax, which has no values"):
        traced(x[None] if transform == "vmap" else x)


def test_jax_bfloat16(jax):
    call = converted(arguments("sru_forward"), lambda a: jax.numpy.asarray(a).astype(jax.numpy.bfloat16))
    refused("sru_forward", call, DtypeError, "x", "jax", "bfloat16", "float32")


def test_jax_mixed(jax):
    call = arguments("sru_forward")
    refused("sru_forward", call | {"x": jax.numpy.asarray(call["x"])}, LibraryError, "x of jax", "of numpy")


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
print([name for name in {FRAMEWORKS!r} if name in sys.modules])
"""


def test_nothing_imports_a_framework():
    done = subprocess.run([sys.executable, "-c", LONELY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
