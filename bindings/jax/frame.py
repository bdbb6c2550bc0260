"""What XLA gives a handler of its foreign function interface: its structs (xla/ffi/api/c_api.h), and how they are read.

The layout is that of versions 0.1 to 0.3 of the interface. cuda/xla_ffi.h declares the part of it that the compiled
handler reads.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from typing import Any, NamedTuple

from ...passes import Layout

EXECUTE = 3  # the stage in which a handler computes
METADATA = 1  # the extension by which XLA asks for the version
STRING = 4  # the type of an attribute
OLDEST_MINOR, NEWEST_MINOR = 1, 3  # of the versions 0.x whose structs are these
INVALID_ARGUMENT = 3  # of its codes of errors
COMMAND_BUFFER_COMPATIBLE = 1  # of the traits of a handler: what it launches can be captured, and replayed

_DTYPES = {1: "bool", 4: "int32", 5: "int64", 10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}


class Extension(Structure):
    """A link of a list; its fields, which name the class itself, are below."""


Extension._fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", POINTER(Extension))]
_BASE: list[Any] = [("struct_size", c_size_t), ("extensions", POINTER(Extension))]


class Version(Structure):
    _fields_ = [*_BASE, ("major", c_int), ("minor", c_int)]


class Metadata(Structure):
    _fields_ = [("struct_size", c_size_t), ("version", Version), ("traits", c_uint32)]


class MetadataExtension(Structure):
    _fields_ = [("base", Extension), ("metadata", POINTER(Metadata))]


class ErrorCreate(Structure):
    _fields_ = [*_BASE, ("message", c_char_p), ("code", c_int)]


class ErrorDestroy(Structure):
    _fields_ = [*_BASE, ("error", c_void_p)]


class StreamGet(Structure):
    _fields_ = [*_BASE, ("context", c_void_p), ("stream", c_void_p)]


class DeviceOrdinalGet(Structure):
    _fields_ = [*_BASE, ("context", c_void_p), ("ordinal", c_int32)]


class Api(Structure):
    _fields_ = [
        *_BASE,
        ("version", Version),
        ("internal", c_void_p),
        ("error_create", CFUNCTYPE(c_void_p, POINTER(ErrorCreate))),
        ("error_get_message", c_void_p),
        ("error_destroy", CFUNCTYPE(None, POINTER(ErrorDestroy))),
        ("handler_register", c_void_p),
        ("stream_get", CFUNCTYPE(c_void_p, POINTER(StreamGet))),
        ("others", c_void_p * 12),
        ("device_ordinal_get", CFUNCTYPE(c_void_p, POINTER(DeviceOrdinalGet))),  # not before jaxlib 0.6
    ]


class Buffer(Structure):
    _fields_ = [*_BASE, ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class Buffers(Structure):
    _fields_ = [*_BASE, ("size", c_int64), ("types", POINTER(c_int)), ("buffers", POINTER(POINTER(Buffer)))]


class Text(Structure):
    _fields_ = [("begin", POINTER(c_char)), ("size", c_size_t)]


class Attributes(Structure):
    _fields_ = [
        *_BASE,
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(Text))),
        ("values", POINTER(c_void_p)),
    ]


class Frame(Structure):
    _fields_ = [
        *_BASE,
        ("api", POINTER(Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("operands", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    ]


HANDLER = CFUNCTYPE(c_void_p, POINTER(Frame))


class Arrays(NamedTuple):
    """The buffers of a frame, operands and then results: their addresses, and a key of their dtypes and sizes."""

    n_operands: int
    addresses: list[int]
    key: tuple[Any, ...]

    def layouts(self) -> list[Layout]:
        found = []
        for dtype, dims in self.key:
            shape = tuple((c_int64 * (len(dims) // 8)).from_buffer_copy(dims)) if dims else ()
            found.append(Layout(shape, _DTYPES.get(dtype, f"number {dtype} of XLA")))
        return found


def arrays(frame: Frame) -> Arrays:
    found = [one[i].contents for one, n in _lists(frame) for i in range(n)]
    key = tuple([(b.dtype, ctypes.string_at(b.dims, 8 * b.rank) if b.rank else b"") for b in found])
    return Arrays(frame.operands.size, [b.data or 0 for b in found], key)


def _lists(frame: Frame) -> list[tuple[Any, int]]:
    return [(one.buffers, one.size) for one in (frame.operands, frame.results)]


def attribute(frame: Frame, name: str) -> str:
    """An attribute that is a text; empty if there is none."""
    a = frame.attributes
    for i in range(a.size):
        if a.types[i] == STRING and _string(a.names[i].contents) == name:
            return _string(ctypes.cast(a.values[i], POINTER(Text)).contents)
    return ""


def _string(text: Text) -> str:
    return ctypes.string_at(text.begin, text.size).decode()


def answers_metadata(frame: Frame, minor: int, traits: int) -> bool:
    """Answers what XLA asks when a handler is registered; see cuda/xla_ffi.h."""
    extension = frame.extensions
    while extension:
        if extension.contents.type == METADATA:
            minor = minor or (frame.api.contents.version.minor if frame.api else OLDEST_MINOR)
            metadata = ctypes.cast(extension, POINTER(MetadataExtension)).contents.metadata.contents
            metadata.version.major, metadata.version.minor = 0, min(max(minor, OLDEST_MINOR), NEWEST_MINOR)
            metadata.traits = traits
            return True
        extension = extension.contents.next
    return False


def error(frame: Frame, message: str) -> Any:
    """What a handler that failed returns."""
    made = ErrorCreate(ctypes.sizeof(ErrorCreate), None, message.encode(errors="replace"), INVALID_ARGUMENT)
    return frame.api.contents.error_create(ctypes.byref(made))


def stream(frame: Frame) -> int:
    """The address of the stream of a GPU on which the handler is to launch."""
    api, asked = frame.api.contents, StreamGet(ctypes.sizeof(StreamGet), None, frame.context, None)
    _check(api, api.stream_get(ctypes.byref(asked)))
    return int(asked.stream or 0)


def device(frame: Frame) -> int | None:
    """The number of the GPU; None where this XLA does not say."""
    api = frame.api.contents
    if api.struct_size < Api.device_ordinal_get.offset + Api.device_ordinal_get.size:
        return None
    asked = DeviceOrdinalGet(ctypes.sizeof(DeviceOrdinalGet), None, frame.context, 0)
    _check(api, api.device_ordinal_get(ctypes.byref(asked)))
    return int(asked.ordinal)


def _check(api: Api, error: int | None) -> None:
    if error:
        api.error_destroy(ctypes.byref(ErrorDestroy(ctypes.sizeof(ErrorDestroy), None, error)))
        raise RuntimeError("XLA does not say on which stream of which device a kernel is to run")
