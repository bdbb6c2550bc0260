"""What the library says: a log for those who ask for it, and warnings, each once in a process."""

from __future__ import annotations

import functools
import logging
import warnings

from . import settings

_log = logging.getLogger("sru_rt")


def debug(message: str, *values: object) -> None:
    """Logs; SRU_RT_DEBUG=1 sends the log to standard error, without any set-up by the program."""
    if settings.debug() and not _log.handlers:
        _log.addHandler(logging.StreamHandler())
        _log.setLevel(logging.DEBUG)
    _log.debug(message, *values)


@functools.cache
def warn_once(text: str) -> None:
    """Warns once in a process."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)
