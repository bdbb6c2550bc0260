"""A folder of compiled code that only its user can write.

Entries are published by atomic rename and end in a checksum, so that a reader sees a whole entry or none, however
many processes write at once. Code is never loaded from a folder or a file that somebody else could have written.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from . import settings
from .errors import CacheError

_DIGEST_BYTES = 32


def folder() -> Path:
    """The cache folder, made if missing. Raises CacheError if it cannot be made or others can write to it."""
    try:
        path = settings.cache_dir()
    except RuntimeError as error:  # of pathlib
        raise CacheError(
            f"sru_rt: there is no folder for the cache ({error}); set SRU_RT_CACHE_DIR to a folder of yours"
        ) from None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve()
        state = path.stat()
    except OSError as error:
        raise CacheError(
            f"sru_rt: the cache folder {path} cannot be made ({error.strerror}); set SRU_RT_CACHE_DIR to a folder of "
            "yours"
        ) from None
    if not path.is_dir() or not os.access(path, os.X_OK):
        raise CacheError(f"sru_rt: the cache folder {path} cannot be read; set SRU_RT_CACHE_DIR to a folder of yours")
    _require_own(path, state)
    return path


def _require_own(path: Path, state: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):  # Windows: the user's profile folder is protected by its access list
        return
    if state.st_uid not in (os.geteuid(), 0):  # root could do anything to the user anyway
        raise CacheError(
            f"sru_rt: {path} belongs to user {state.st_uid}, not to you ({os.geteuid()}), so compiled code in it is "
            "not trusted; set SRU_RT_CACHE_DIR to a folder of yours"
        )
    if stat.S_IMODE(state.st_mode) & 0o022:
        raise CacheError(
            f"sru_rt: others can write to {path}, so compiled code in it is not trusted; run `chmod go-w {path}` or "
            "set SRU_RT_CACHE_DIR to another folder"
        )


def find(path: Path) -> bool:
    """Whether a whole, trusted entry stands at `path`. Raises CacheError for one that others could have written."""
    return read(path) is not None


def read(path: Path) -> bytes | None:
    """The content of the entry at `path`; None if there is no whole one. Raises CacheError as `find`.

    A damaged one stays until it is replaced: another process may just have done so.
    """
    try:
        with path.open("rb") as file:
            _require_own(path, os.fstat(file.fileno()))
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(
            f"sru_rt: {path} cannot be read ({error.strerror}); remove it, or set SRU_RT_CACHE_DIR to another folder"
        ) from None
    entry = content[:-_DIGEST_BYTES]
    return entry if hashlib.sha256(entry).digest() == content[-_DIGEST_BYTES:] else None


def write(content: bytes, path: Path) -> None:
    """Makes an entry of `content`. Raises CacheError if the folder cannot be written."""
    try:
        handle, made = tempfile.mkstemp(prefix=".build-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            publish(Path(made), path)
        finally:
            Path(made).unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(
            f"sru_rt: the cache folder {path.parent} cannot be written ({error}); set SRU_RT_CACHE_DIR to another one"
        ) from None


def publish(made: Path, path: Path) -> None:
    """Moves the finished file `made`, which lies in the same folder, to `path`."""
    content = made.read_bytes()
    with made.open("ab") as file:  # a loader of shared objects ignores what follows the last section
        file.write(hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
    made.chmod(0o700)
    os.replace(made, path)
