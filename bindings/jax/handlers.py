"""The handlers that XLA calls: one compiled, for the CPU, which asks Python for its plans; and one in Python.

The handler in Python launches kernels on GPUs, and serves the CPU where there is no C++ compiler, through NumPy. What
it launches depends on shapes and statements alone, and it neither allocates nor waits, so that XLA may capture it into
a graph of CUDA once, and replay that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Hashable
from ctypes import POINTER, Structure, c_char, c_int64, c_void_p
from typing import Any

from ... import compile_cpu, source
from ...errors import CompileError
from . import frame as frames
from . import gpus
from .frame import Frame
from .planner import Planned, planned
from .statement import Statement

_MAX_FIELDS = _MAX_MESSAGE = 1 << 13
_MOST_PLANS = 4096


class _Field(Structure):
    _fields_ = [("buffer", c_int64), ("rest", c_int64)]


class _Reply(Structure):
    """As cuda/xla.cpp has it."""

    _fields_ = [
        ("kernel", c_void_p),
        ("pool", c_void_p),
        ("tasks", c_int64),
        ("n_fields", c_int64),
        ("fields", _Field * _MAX_FIELDS),
        ("message", c_char * _MAX_MESSAGE),
    ]


_PLANNER = ctypes.CFUNCTYPE(None, POINTER(Frame), POINTER(_Reply))


# ----------------------------------------------------------------------------------------------------------------------
# The compiled handler


@functools.cache
def compiled() -> ctypes.CDLL:
    """The shared object with the CPU's handler. Raises CompileError where there is no compiler."""
    library = compile_cpu.load(source.xla(), "xla_handler", "xla_set_planner", "xla_report_version", "xla_reply_size")
    library.xla_reply_size.restype = c_int64
    if library.xla_reply_size() != ctypes.sizeof(_Reply):
        raise CompileError(
            "sru_rt: cuda/xla.cpp and bindings/jax/handlers.py disagree on the struct of a reply; the installation is "
            "damaged: reinstall it"
        )
    library.xla_set_planner(_planner)
    return library


def compiled_address() -> int:
    return ctypes.cast(compiled().xla_handler, c_void_p).value or 0


def compiled_report(minor: int) -> None:
    """Sets the version that the handler reports, 0.`minor`; with 0 that which suits."""
    compiled().xla_report_version(minor)


def _plan(frame: Any, reply: Any) -> None:
    """Fills in a reply. Nothing is raised through XLA."""
    reply = reply.contents
    try:
        _fill(frame.contents, reply)
    except BaseException as error:  # of the user's modules, that a cell is in, too
        reply.kernel = None
        reply.message = _message(error).encode(errors="replace")[: _MAX_MESSAGE - 1]


_planner = _PLANNER(_plan)  # at module level: XLA's threads call it as long as the process lives


def _fill(frame: Frame, reply: Any) -> None:
    arrays = frames.arrays(frame)
    plan = _planned(frames.attribute(frame, "call"), arrays, "cpu")
    entry, fields = plan.prepared.entry(), plan.prepared.fields(plan.constants)
    if entry is None:
        raise CompileError("sru_rt: the kernel of a program could not be compiled; see the warning")
    if len(fields) > _MAX_FIELDS:
        raise CompileError(f"sru_rt: a kernel has {len(fields)} arguments; programs of JAX take up to {_MAX_FIELDS}")
    first = len(plan.constants)
    for i, (number, rest) in enumerate(fields):
        buffer = -1 if number is None else plan.buffers[number - first]
        reply.fields[i].buffer, reply.fields[i].rest = buffer, rest
    reply.pool, reply.tasks, reply.n_fields = entry.pool, entry.tasks, len(fields)
    reply.kernel = ctypes.cast(entry.function, c_void_p).value


def _planned(text: str, arrays: frames.Arrays, device: str) -> Planned:
    layouts = arrays.layouts()
    n = arrays.n_operands
    return planned(Statement.parse(text), layouts[:n], layouts[n:], device)


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ----------------------------------------------------------------------------------------------------------------------
# The handler in Python


class Handler:
    """Of one platform, "cpu" or "CUDA", for as long as the process lives."""

    def __init__(self, platform: str) -> None:
        self._minor = 0
        self._on_gpu = platform == "CUDA"
        self._plans: dict[Hashable, Planned] = {}
        self._function = frames.HANDLER(self.call)

    @property
    def address(self) -> int:
        return ctypes.cast(self._function, c_void_p).value or 0

    def report(self, minor: int) -> None:
        """Sets the version that the handler reports, 0.`minor`; with 0 that which suits."""
        self._minor = minor

    def call(self, frame: Any) -> Any:
        """What XLA calls. Nothing is raised through it: the process would end."""
        f = frame.contents
        try:
            traits = frames.COMMAND_BUFFER_COMPATIBLE if self._on_gpu else 0
            if not frames.answers_metadata(f, self._minor, traits) and f.stage == frames.EXECUTE:
                self._execute(f)
        except BaseException as error:
            return frames.error(f, _message(error))
        return None

    def _execute(self, frame: Frame) -> None:
        arrays, text = frames.arrays(frame), frames.attribute(frame, "call")
        if not self._on_gpu:
            self._found(text, arrays, "cpu").run(arrays.addresses)
            return
        number = frames.device(frame)
        number = gpus.current() if number is None else number
        with gpus.device(number):
            self._found(text, arrays, f"cuda:{number}").run(arrays.addresses, frames.stream(frame))

    def _found(self, text: str, arrays: frames.Arrays, device: str) -> Planned:
        key = (text, arrays.key, arrays.n_operands, device)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans.setdefault(key, _planned(text, arrays, device))
        return plan


@functools.cache
def handler(platform: str) -> Handler:
    return Handler(platform)
