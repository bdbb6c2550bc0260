"""The handlers that XLA calls: what they read of its frames, versions, errors, and where the kernels run."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")

from sru_rt.bindings import jax as binding
from sru_rt.bindings.jax import autodiff, frame, gpus, handlers, ops, xla
from sru_rt.bindings.jax.frame import Api, Attributes, Buffer, Buffers, ErrorCreate, Frame, Text
from sru_rt.bindings.jax.statement import Statement

import sru_rt
from emu import fake_cupy
from gpu_places import Way
from jax_tools import jax, jnp, new_programs, program, to_jax, to_numpy, with_64_bits
from problems import FULL, Problem
from sru_rt import spec
from sru_rt.errors import ArgumentError, LibraryError
from sru_rt.passes import Layout, declared
from test_arrays import assert_same_bits

__all__ = ["new_programs", "with_64_bits"]  # fixtures

_NUMBERS = {"bool": 1, "int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
_STREAM, _DEVICE = 0x770, 1


class Made:
    """A frame such as XLA's, over arrays of NumPy."""

    def __init__(self, operands: list[Any], results: list[Any], api_bytes: int = ctypes.sizeof(Api), **texts: str):
        self.errors: list[str] = []
        self._kept: list[Any] = []
        api = Api(struct_size=api_bytes)
        api.version.major, api.version.minor = 0, 3
        api.error_create = self._keep(type(api.error_create)(self._error_create))
        api.stream_get = self._keep(type(api.stream_get)(self._stream_get))
        api.device_ordinal_get = self._keep(type(api.device_ordinal_get)(self._device_get))
        self.frame = Frame(
            api=ctypes.pointer(api),
            stage=frame.EXECUTE,
            operands=self._buffers(operands),
            results=self._buffers(results),
            attributes=self._attributes(texts),
        )

    def call(self, handler: Any) -> str:
        """The error that a handler gives, or an empty text."""
        self.errors.clear()
        found = handler(ctypes.pointer(self.frame))
        assert bool(found) == bool(self.errors)
        return self.errors[0] if self.errors else ""

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def _error_create(self, made: Any) -> int:
        one = ctypes.cast(made, ctypes.POINTER(ErrorCreate)).contents
        assert one.code == frame.INVALID_ARGUMENT
        self.errors.append(one.message.decode())
        return 1

    def _stream_get(self, asked: Any) -> None:
        asked.contents.stream = _STREAM

    def _device_get(self, asked: Any) -> None:
        asked.contents.ordinal = _DEVICE

    def _buffers(self, arrays: list[Any]) -> Buffers:
        made = []
        for array in arrays:
            dims = self._keep((ctypes.c_int64 * max(1, array.ndim))(*array.shape))
            made.append(
                Buffer(
                    dtype=_NUMBERS[array.dtype.name],
                    data=self._keep(array).ctypes.data,
                    rank=array.ndim,
                    dims=ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64)),
                )
            )
        pointers = (ctypes.POINTER(Buffer) * max(1, len(made)))(*[ctypes.pointer(self._keep(b)) for b in made])
        return Buffers(size=len(made), buffers=self._keep(pointers))

    def _attributes(self, texts: dict[str, str]) -> Attributes:
        names, values = [], []
        for name, value in texts.items():
            for text, into in ((name, names), (value, values)):
                data = self._keep(ctypes.create_string_buffer(text.encode()))
                into.append(self._keep(Text(ctypes.cast(data, ctypes.POINTER(ctypes.c_char)), len(text.encode()))))
        n = max(1, len(names))
        return Attributes(
            size=len(names),
            types=self._keep((ctypes.c_int * n)(*[frame.STRING] * len(names))),
            names=self._keep((ctypes.POINTER(Text) * n)(*map(ctypes.pointer, names))),
            values=self._keep((ctypes.c_void_p * n)(*[ctypes.addressof(v) for v in values])),
        )


def compiled(pointer: Any) -> Any:
    function = handlers.compiled().xla_handler
    function.restype = ctypes.c_void_p
    return function(pointer)


def stated(problem: Problem, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, list[Any]]:
    """What a call of the core states, and its operands as arrays of NumPy."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(autodiff, "_jitted", lambda *given: seen.append(given) or (None, None))
        problem.forward()(**{name: to_jax(value) for name, value in problem.given.items()}, **options)
    ((found, given),) = seen
    return found, [None if a is None else np.array(to_numpy(a)) for a in ops.operands(found, given)]


def custom_call(statement: Statement, arrays: list[Any], device: str) -> tuple[Made, list[np.ndarray]]:
    """The frame of a pass, with results that are filled with NaN."""
    layouts = [Layout(a.shape, a.dtype.name) for a in arrays]
    results = [r for r in ops._results(statement, device, arrays) if r is not None]
    made = [np.full(r.shape, np.nan, frame_dtype(r.dtype)) for r in results]
    assert len(layouts) == len(arrays)
    return Made(ops_buffers(statement, arrays), made, call=statement.text()), made


def frame_dtype(name: str) -> Any:
    return to_numpy(jnp.zeros(0, name)).dtype


def ops_buffers(statement: Statement, arrays: list[Any]) -> list[Any]:
    return [np.array(to_numpy(a)) for a in ops._as_buffers(statement, [jnp.asarray(a) for a in arrays])]


def both_passes(handler: Any, found: Any, o: list[Any], problem: Problem, device: str, chunks: Any = (0, 0)) -> Any:
    """Results and gradients of the operands, by a handler."""
    given = tuple(a is not None for a in o)
    there = [a for a in o if a is not None]
    L, B, D, _, d = o[0].shape
    made, (h, last, saved, *_) = custom_call(Statement(found, given, chunks=chunks), there, device)
    assert made.call(handler) == ""
    is_wanted = [True, True, False, False, False, *(a.differentiable for a in declared(spec.cell_of(found.cell)))]
    need = tuple(a is not None and is_it for a, is_it in zip(o, is_wanted))
    backward = Statement(found, given, True, need, True, chunks)
    dh = problem.dh.reshape(L, B, D, d)
    made, results = custom_call(backward, [*there, saved, dh, problem.dlast], device)
    assert made.call(handler) == ""
    return (h.reshape(L, B, D * d), last), results[: sum(need) + (not need[1])]


# ----------------------------------------------------------------------------------------------------------------------
# On the CPU


@pytest.mark.parametrize("handler", [compiled, handlers.handler("cpu").call], ids=["compiled", "in Python"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_handler(handler, dtype, monkeypatch):
    problem = Problem.make(FULL["sru"] | {"dtype": dtype, "wide": False}, (5, 3, 7), 2, "all", state=True)
    found, o = stated(problem, monkeypatch)
    (h, last), gradients = both_passes(handler, found, o, problem, "cpu")
    wanted, of = problem.run(save=True)
    assert_same_bits((h, last), wanted)
    for name, gradient in zip(differentiable(found), gradients, strict=True):
        assert gradient.tobytes() == getattr(of, name).tobytes(), name


def differentiable(found: Any) -> list[str]:
    """The names of the operands that have a gradient, in the order of the results of a backward."""
    return ["u", *(a.name for a in declared(spec.cell_of(found.cell)) if a.differentiable), "c0"]


def test_plans_are_made_once_for_each_shape(monkeypatch):
    """In the compiled handler; they tell apart all that a pass depends on."""
    planned: list[Any] = []
    original = handlers._planned
    monkeypatch.setattr(handlers, "_planned", lambda *args: planned.append(args) or original(*args))

    @sru_rt.cell(gates="a n", state="c", constants="k")
    def fresh(a, n, c, k):
        c = sru_rt.sigmoid(a) * c + k * n
        return c, c

    function = jax.jit(lambda u, k: fresh.recurrence(u, k=k), static_argnums=1)
    for k in (0.5, 0.25):
        for shape in ((3, 2, 1, 2, 4), (4, 2, 1, 2, 4), (3, 2, 2, 2, 2)):
            for dtype in ("float32", "float64"):
                u = jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)
                for _ in range(3):
                    got = function(u, k)
                wanted = fresh.recurrence(np.array(u), k=k)
                assert_same_bits([to_numpy(a) for a in got], wanted)
    assert len(planned) == 2 * 3 * 2


@pytest.mark.parametrize("handler", [compiled, handlers.handler("cpu").call], ids=["compiled", "in Python"])
def test_frames_that_make_no_sense(handler, monkeypatch):
    """Give an error, whatever is in them."""
    problem = Problem.make(FULL["mingru"] | {"dtype": "float32", "bias": False}, (3, 2, 4), 1, "plain", state=False)
    found, o = stated(problem, monkeypatch)
    there = [a for a in o if a is not None]
    statement = Statement(found, tuple(a is not None for a in o))
    good, results = custom_call(statement, there, "cpu")
    assert good.call(handler) == ""

    def says(operands: Any, results: Any, *words: str, **texts: str) -> None:
        message = Made(operands, results, **texts).call(handler)
        assert all(word in message for word in words), message

    text = statement.text()
    says(there, results[:1], "ShapeError", "export it again", call=text)
    says(there, [*results[:2], results[2][1:]], "ShapeError", call=text)
    says(there, [results[0].astype("f8"), *results[1:]], "ShapeError", call=text)
    says([], results, "has 0 operands; its statement needs 1", call=text)
    says([there[0].astype("f8")], results, "ShapeError", call=text)
    says([there[0][..., :1, :]], results, "u has k = 1 gates", call=text)
    says(there, results, "states no recurrence", "export it again", call="[1, 2]")
    says(there, results, "states no recurrence", call="text")
    says(there, results, "states no recurrence", call=json.dumps([99, *json.loads(text)[1:]]))
    says(there, results, "is no cell of this version", call=text.replace("mingru(", "maxgru("))
    says(there, results, "call" if handler is compiled else "states no recurrence", other=text)
    assert good.call(handler) == ""


def test_errors_are_those_of_jax():
    """Of a custom call that a program holds: the process goes on, also where the message is long."""
    binding.register()
    result = jax.ShapeDtypeStruct((3,), "float32")
    for text in ("nonsense", "[" + "x" * 20_000):
        call = jax.jit(lambda a, text=text: jax.ffi.ffi_call(xla.target(), [result])(a, call=text))
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT.*states no recurrence"):
            jax.block_until_ready(call(jnp.ones(3, "float32")))


def test_an_exception_of_any_kind_is_an_error_of_jax(monkeypatch, new_programs):
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt("by the user")

    @sru_rt.cell(gates="a n", state="c")
    def another(a, n, c):
        c = sru_rt.sigmoid(a - 1) * c + n
        return c, c

    monkeypatch.setattr(handlers, "_planned", interrupted)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT.*KeyboardInterrupt: by the user"):
        jax.block_until_ready(another.recurrence(jnp.ones((3, 2, 1, 2, 4))))
    monkeypatch.undo()
    jax.block_until_ready(another.recurrence(jnp.ones((3, 2, 1, 2, 4))))


def test_many_plans():
    """More than the handler keeps."""
    text = """
        import jax, jax.numpy as jnp, numpy as np, sru_rt
        from sru_rt.bindings.jax import handlers
        from sru_rt import compile_cpu, source
        text = source.xla().replace('#include "xla.cpp"', '#define SRU_MAX_PLANS 3\\n#include "xla.cpp"')
        source.xla = lambda: text
        for L in (1, 2, 3, 4, 5, 6, 1, 6, 5):
            u = np.ones((L, 2, 1, 2, 4), "f4")
            got, wanted = sru_rt.mingru_recurrence(jnp.asarray(u)), sru_rt.mingru_recurrence(u)
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted))
        print("done")
    """
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        assert program(text, Path(folder)) == "done\n"


# ----------------------------------------------------------------------------------------------------------------------
# Versions


class Xla:
    """Registers handlers as a release of XLA does that takes some versions of the interface."""

    def __init__(self, takes: tuple[int, ...], says: int | None) -> None:
        self.takes, self.says, self.asked = takes, says, []

    def register(self, name: str, capsule: Any, platform: str = "cpu") -> None:
        name_of, get = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
        name_of.restype, name_of.argtypes = ctypes.c_char_p, (ctypes.py_object,)
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        handler = frame.HANDLER(get(capsule, name_of(capsule)))
        metadata = frame.Metadata(struct_size=36)
        extension = frame.MetadataExtension(metadata=ctypes.pointer(metadata))
        extension.base.type = frame.METADATA
        given = Frame(extensions=ctypes.cast(ctypes.pointer(extension), ctypes.POINTER(frame.Extension)))
        if self.says is not None:
            api = Api(struct_size=ctypes.sizeof(Api))
            api.version.minor = self.says
            given.api = ctypes.pointer(api)
        assert not handler(ctypes.pointer(given))
        self.asked.append((platform, metadata.version.minor, metadata.traits))
        if metadata.version.major != 0 or metadata.version.minor not in self.takes:
            raise RuntimeError(f"INVALID_ARGUMENT: version 0.{metadata.version.minor} is not supported\nmore")


@pytest.fixture
def fake_xla(monkeypatch):
    def install(takes: tuple[int, ...], says: int | None) -> Xla:
        made = Xla(takes, says)
        monkeypatch.setattr(jax.ffi, "register_ffi_target", made.register)
        monkeypatch.setattr(xla, "_done", set())
        return made

    yield install
    handlers.compiled_report(0)
    for platform in ("cpu", "CUDA"):
        handlers.handler(platform).report(0)


@pytest.mark.parametrize(
    ("takes", "says", "taken"),
    [((1,), None, 1), ((1,), 1, 1), ((1, 2, 3), 3, 3), ((3, 4, 5), 5, 3), ((2,), 7, 2), ((1,), 9, 1)],
)
def test_versions(fake_xla, takes, says, taken):
    """First that which XLA says is its own, or the nearest known one; then the others, the newest first."""
    release = fake_xla(takes, says)
    binding.register()
    accepted = [(platform, traits) for platform, minor, traits in release.asked if minor == taken]
    assert accepted == [("cpu", 0), ("CUDA", frame.COMMAND_BUFFER_COMPATIBLE)]
    assert release.asked[0][1] == min(says or 1, frame.NEWEST_MINOR)
    count = len(release.asked)
    binding.register()
    assert len(release.asked) == count


def test_no_version_is_taken(fake_xla, new_programs):
    """What XLA says, and what to do, is said where a recurrence is called; importing the binding is silent."""
    fake_xla((8, 9), 9)
    xla.register_if_known()
    with pytest.raises(LibraryError, match=r"sru_rt: XLA of JAX \S+ does not take .* 0\.1, 0\.2, 0\.3 .*version 0\.3 "):
        sru_rt.mingru_recurrence(jnp.ones((3, 2, 1, 2, 4)))


def test_unknown_releases_of_jax_are_left_alone_at_import(fake_xla, monkeypatch):
    release = fake_xla((1,), None)
    monkeypatch.setattr(jax, "__version__", "0.99.1")
    xla.register_if_known()
    assert not release.asked
    binding.register()
    assert release.asked


def test_importing_the_binding_makes_no_backend(tmp_path):
    program(
        """
        import jax, sru_rt.bindings.jax
        jax.config.update("jax_num_cpu_devices", 3)
        assert len(jax.devices()) == 3
        """,
        tmp_path,
    )


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: the handler in Python, with addresses, scratch and chunks of time; kernels run under the emulation


@pytest.mark.kernels
@pytest.mark.parametrize("plan", ["", "chunk=64"])
@pytest.mark.parametrize("case", [("sru", {}, 1), ("mingru", {}, 32), ("qrnn", {"zoneout": "bool"}, 32)], ids=str)
def test_on_a_gpu(case, plan, place, monkeypatch):
    if place.name == "gpu":
        pytest.skip("calls the handler on memory of the host; test_gpu.py::test_jax calls it on a GPU")
    cell, options, every = case
    Way(plan).go(monkeypatch)
    monkeypatch.setattr(gpus, "here", lambda: (_DEVICE,))
    problem = Problem.make(FULL[cell] | options | {"dtype": "float32"}, (130, 2, 5), 2, "all", state=True)
    found, o = stated(problem, monkeypatch, time_parallel=bool(plan))
    found = found._replace(every=every)
    layouts = [Layout(a.shape, a.dtype.name) for a in o if a is not None]
    statement = gpus.settled(Statement(found, tuple(a is not None for a in o)), layouts)
    assert bool(statement.chunks[1]) == bool(plan)
    results = [r for r in ops._results(statement, "cuda:0", [jnp.asarray(a) for a in o if a is not None]) if r]
    gpus.load(statement, layouts, results)
    loaded = dict(sru_rt.launch_gpu._launches)
    assert loaded
    handler = handlers.Handler("CUDA")
    result, gradients = both_passes(handler.call, found, o, problem, "cuda:0", statement.chunks)
    forward = [key for key in sru_rt.launch_gpu._launches if key not in loaded]
    assert len(forward) == 1, "what was loaded beforehand is not what was launched"
    assert {stream for _, _, stream in fake_cupy.record.launches} == {_STREAM}
    assert {device for _, device, _ in fake_cupy.record.launches} == {_DEVICE}
    wanted = problem.wanted()[2]
    tolerance_of = {"rtol": 2e-4, "atol": 2e-5}
    np.testing.assert_allclose(result[0], problem.wanted()[0], **tolerance_of)
    for name, gradient in zip(differentiable(found)[:-1], gradients):
        np.testing.assert_allclose(gradient.reshape(wanted[name].shape), wanted[name], rtol=1e-3, atol=1e-3)


def test_a_program_for_gpus_without_one(monkeypatch):
    """Written down here, it is not cut into chunks of time, and waits for its GPU."""
    u = jnp.ones((300, 1, 1, 2, 4), "float32")
    export = pytest.importorskip("jax.export")
    checks = [export.DisabledSafetyCheck.custom_call(binding.target())]
    function = jax.jit(lambda u: sru_rt.mingru_recurrence(u, time_parallel=True))
    text = export.export(function, disabled_checks=checks, platforms=("cuda",))(u).mlir_module()
    assert text.count(f"@{binding.target()}") == 1 and "[0,0]" in text


def test_cupy_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(LibraryError, match=r"launched through CuPy.*pip install 'sru_rt\[cuda12\]'"):
        gpus.device(0)


def test_device_of_old_releases(monkeypatch):
    made = Made([], [], api_bytes=88)
    assert frame.device(made.frame) is None
    assert frame.device(Made([], []).frame) == _DEVICE
    assert frame.stream(Made([], []).frame) == _STREAM


def test_statement_is_its_text():
    call = sru_rt.passes.Call("cell", (0.1, -0.0, float("inf")), 3, "False", True)
    statement = Statement(autodiff.Stated.of(call), (True, False), True, (True, False), True, (64, 32))
    assert Statement.parse(statement.text()) == statement
    assert str(statement.stated.call) == str(call)
    with pytest.raises(ArgumentError, match="states no recurrence"):
        Statement.parse("{}")
