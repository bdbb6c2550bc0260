"""Checks what a public function is given, against declared axes and dtypes, and says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import library as libraries
from . import settings
from .dtypes import IO_DTYPES, is_integer, name_of
from .errors import ArgumentError, DtypeError, ShapeError
from .library import Library, NDArray
from .on_numpy import NUMPY


class Check:
    """The checks of one call. Axis letters take their size from the first array that has them.

    The first array also says which library all others must be of, if `library` does not. `names` says what the
    function calls an array that a cell declares under another name.
    """

    def __init__(self, function: str, library: Library | None = None, /, **names: str) -> None:
        self.function, self.names = function, names
        self._library, self._origin = library, "what the forward was given"
        self.sizes: dict[str, tuple[int, str]] = {}
        self.leading = ""  # the array whose dtype all others follow

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis][0]

    @property
    def library(self) -> Library:
        return self._library or NUMPY

    def set(self, axis: str, size: int, origin: str) -> None:
        self.sizes[axis] = (size, origin)

    def error(self, name: str, problem: str, kind: type[ArgumentError] = ArgumentError) -> ArgumentError:
        return kind(f"{self.function}: {name} {problem}")

    def choice(self, name: str, value: Any, choices: Sequence[Any]) -> Any:
        """`value`, if it is one of the choices; a bool of NumPy as one of Python."""
        value = bool(value) if isinstance(value, np.bool_) else value
        if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
            raise self.error(name, f"must be one of {', '.join(map(repr, choices))} (got {value!r})")
        return value

    def number(self, name: str, value: Any) -> float:
        found = None if isinstance(value, (int, float)) else libraries.of(value)
        if getattr(value, "requires_grad", False):
            raise self.error(name, f"must be a number (got an array that requires a gradient); pass float({name})")
        if found is not None and not found.reads_values:
            way = f"pass float({name}), which waits for the device"
            raise self.error(name, f"must be a number (got an array on {found.device}); {way}")
        try:
            number = float("no number") if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(name, f"must be a number that fits in a float (got {value!r})") from None
        if not np.isfinite(number):
            raise self.error(name, f"must be finite (got {value!r})")
        return number

    def array(self, name: str, value: Any, axes: str, dtypes: Sequence[str]) -> NDArray:
        """`value` as a plain array, if it has the axes (letters, or sizes) and one of the dtypes."""
        array = self.plain(name, value)
        self.shape(name, array, axes)
        self.dtype(name, array, dtypes)
        return array

    def plain(self, name: str, value: Any) -> NDArray:
        """`value` if it is an array of the library of all others, on their device."""
        if self._library is None:
            self._library, self._origin = libraries.of(value), name
        return self.library.plain(self.function, name, value, self._origin)

    def shape(self, name: str, array: NDArray, axes: str) -> None:
        letters = axes.split()
        if array.ndim != len(letters):
            raise self.error(
                name,
                f"has {array.ndim} axes, shape {tuple(array.shape)}; it needs {self._describe(letters, name)}",
                ShapeError,
            )
        for letter, size in zip(letters, array.shape):
            needed = int(letter) if letter.isdigit() else self.sizes.setdefault(letter, (size, name))[0]
            if size != needed:
                needs = self._describe(letters, name)
                raise self.error(name, f"has shape {tuple(array.shape)}; it needs {needs}", ShapeError)
            if size == 0 and letter in ("d", "d_in", "p"):  # L and B may be 0
                problem = f"has shape {tuple(array.shape)}, {letter} = 0; {letter} must be at least 1"
                raise self.error(name, problem, ShapeError)

    def _describe(self, letters: Sequence[str], name: str) -> str:
        """E.g. ``(D, B, d) = (1, 3, 8), where B = 3 comes from x and D = 1, d = 8 come from weight``."""
        known = {letter: self.sizes[letter] for letter in letters if letter in self.sizes}
        sizes = [str(known[letter][0]) if letter in known else letter for letter in letters]
        text = _tuple(letters) + (f" = {_tuple(sizes)}" if known else "")
        by_origin: dict[str, list[str]] = {}
        for letter, (size, origin) in known.items():
            if origin != name:
                by_origin.setdefault(origin, []).append(f"{letter} = {size}")
        origins = [f"{', '.join(s)} {'come' if len(s) > 1 else 'comes'} from {o}" for o, s in by_origin.items()]
        return text + (f", where {' and '.join(origins)}" if origins else "")

    def dtype(self, name: str, array: NDArray, dtypes: Sequence[str]) -> None:
        if name_of(array.dtype) not in dtypes:
            needed = " or ".join(dict.fromkeys(dtypes))
            way = f"convert it with {self.library.conversion(name, dtypes[0])}"
            if name.startswith("out"):
                way = f"pass {self.library.name}.empty({array.shape}, {dtypes[0]!r})"
            elif self.leading and name_of(array.dtype) in IO_DTYPES:
                way += f", or give {self.leading} the dtype {name_of(array.dtype)}"
            raise DtypeError(f"{self.function}: {name} has dtype {name_of(array.dtype)}; it needs {needed}: {way}")

    def io_dtype(self, name: str, array: NDArray) -> str:
        """The dtype of x (or u), which all others follow."""
        if name_of(array.dtype) not in IO_DTYPES:
            raise DtypeError(
                f"{self.function}: {name} has dtype {name_of(array.dtype)}; it needs one of {', '.join(IO_DTYPES)}: "
                f"convert it with {self.library.conversion(name, 'float32')}"
            )
        self.leading = name
        return name_of(array.dtype)

    def lengths(self, value: Any) -> NDArray | None:
        """`lengths` as int64 (B,); a list of integers will do, and on a device an array of the host.

        Values on a device are left to the kernel, which clamps them, and checked with SRU_RT_DEBUG=1.
        """
        if value is None:
            return None
        array, on_host = self._lengths(value)
        if not is_integer(name_of(array.dtype)) and 0 not in array.shape:
            whole = self.library.conversion(f"{self.library.name}.asarray(lengths)", "int64")
            raise DtypeError(
                f"{self.function}: lengths has dtype {name_of(array.dtype)}; it needs an integer dtype: convert it "
                f"with {whole}"
            )
        self.shape("lengths", array, "B")
        host = self.library.to_host(array) if on_host or settings.debug() else None
        if host is not None:
            self._in_range(host)
        return self.library.integers(array)

    def _lengths(self, value: Any) -> tuple[NDArray, bool]:
        """An array, and whether its values are on the host."""
        if isinstance(value, np.ndarray):
            return NUMPY.plain(self.function, "lengths", value, ""), True
        if not isinstance(value, (list, tuple)):
            array = self.plain("lengths", value)
            own = libraries.of(array)  # in a trace some arrays have values, and some have not
            return array, own is not None and own.reads_values
        try:
            return np.asarray(value), True
        except (ValueError, OverflowError):
            raise self.error("lengths", f"must be (B,) integers (got the ragged {value!r})", ShapeError) from None
        except TypeError:
            problem = f"must be (B,) integers (got a {type(value).__name__} of something else); pass an array of them"
            raise self.error("lengths", problem) from None

    def _in_range(self, lengths: np.ndarray[Any, Any]) -> None:
        wrong = np.flatnonzero((lengths < 0) | (lengths > self["L"]))
        if wrong.size:
            b = int(wrong[0])
            raise self.error(
                "lengths",
                f"must be from 0 to L = {self['L']} (got {lengths[b]} for sequence {b}); L comes from "
                f"{self.sizes['L'][1]}",
            )

    def flags(self, name: str, value: Any) -> NDArray | None:
        """`mask` or `reset` as bool (L, B); integers and floats count as true where they are not 0."""
        if value is None:
            return None
        array = self.plain(name, value)
        given = name_of(array.dtype)
        if not (given == "bool" or is_integer(given) or given.startswith(("float", "bfloat"))):
            way = f"convert it with {self.library.conversion(name, 'bool')}"
            raise DtypeError(f"{self.function}: {name} has dtype {given}; it needs bool: {way}")
        self.shape(name, array, "L B")
        return self.library.contiguous(array, np.dtype(bool))


def _tuple(words: Sequence[str]) -> str:
    """As Python prints a tuple."""
    return f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"
