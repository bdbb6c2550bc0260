"""Memory for results and for what is kept between forward and backward.

Fresh pages cost as much as a pass over them, and a training step asks for the same large arrays again and again. So
large blocks are not given back to the system at once, but kept for the next array of about their size.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

import numpy as np

from . import settings
from .errors import ArgumentError

NDArray = np.ndarray[Any, Any]

_ALIGNMENT = 64  # a cache line: packs of lanes do not straddle two
_SMALL = 1 << 12  # up to which it takes longer to align an array than packs save
_LARGE = 1 << 20  # below, the system's allocator reuses memory well
# Large blocks begin in the middle of a page, as arrays of others begin near the start of one. A processor takes a load
# for one of what was just stored where the last 12 bits of their addresses agree, and waits: results that begin some
# lines after an array that is read made a sweep take up to a fifth longer.
_PAGE, _IN_PAGE = 1 << 12, 1 << 11

_MOST_PLACES = 16

_free: list[NDArray] = []  # oldest first


class _Block:
    """Memory that an array stands on. When the last array on it is gone, it becomes free for the next."""

    def __init__(self, memory: NDArray) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        try:
            _free.append(self.memory)
            excess = sum([block.nbytes for block in _free]) - settings.pool_bytes()
            while excess > 0:
                excess -= _free.pop(0).nbytes
        except (ArgumentError, AttributeError, IndexError, TypeError):
            return  # a setting that empty() complains of, the end of the interpreter, or a block that another took


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray:
    """An uninitialised C-contiguous array that begins at a multiple of a cache line, unless it is small."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes <= _SMALL:
        return np.empty(shape, dtype)
    if nbytes >= _LARGE:
        return np.asarray(_take(nbytes))[:nbytes].view(dtype).reshape(shape)
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory, -address(memory) % _ALIGNMENT)


def address(array: NDArray) -> int:
    """Of the first element. Where an array lets itself be written to, its buffer tells it in a quarter of the time."""
    buffer: Any = array
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (BufferError, TypeError, ValueError):
        return int(array.__array_interface__["data"][0])


def _large(nbytes: int) -> NDArray:
    memory = np.empty(nbytes + _PAGE, np.uint8)
    start = (_IN_PAGE - address(memory)) % _PAGE
    return memory[start : start + nbytes]


def _take(nbytes: int) -> _Block:
    """A free block that is large enough and not much too large, else a fresh one."""
    for i in range(len(_free) - 1, -1, -1):
        try:
            block = _free.pop(i)
        except IndexError:  # another thread was faster
            continue
        if nbytes <= block.nbytes <= nbytes + nbytes // 8:
            return _Block(block)
        _free.insert(i, block)
    settings.pool_bytes()  # complains of a bad value
    return _Block(_large(nbytes))


class Workspace(threading.local):
    """Memory that a thread's next call at the same place writes anew."""

    def __init__(self) -> None:
        self._memory: dict[Hashable, Any] = {}

    def array(self, place: Hashable, shape: Sequence[int], dtype: np.dtype[Any], empty: Callable[..., Any]) -> Any:
        """An array of that shape; if the place has too little memory so far, `empty` gives it more."""
        nbytes = prod(shape) * dtype.itemsize
        memory = self._memory.get(place)
        if memory is None or memory.nbytes < nbytes:
            if len(self._memory) >= _MOST_PLACES:  # streams come and go
                self._memory.clear()
            memory = self._memory[place] = empty((nbytes,), np.dtype(np.uint8))
        return memory[:nbytes].view(dtype).reshape(shape)
