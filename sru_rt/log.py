"""What the library says: a log for those who ask for it, and warnings, each once in a process."""

from __future__ import annotations

import logging
import warnings

from . import settings

_log = logging.getLogger("sru_rt")
_warned: set[str] = set()


def debug(message: str, *values: object) -> None:
    """Logs; SRU_RT_DEBUG=1 sends the log to standard error, without any set-up by the program."""
    if settings.debug() and not _log.handlers:
        _log.addHandler(logging.StreamHandler())
        _log.setLevel(logging.DEBUG)
        _log.propagate = False
    _log.debug(message, *values)


def warn_once(topic: str, text: str) -> None:
    """Warns once in a process about a topic."""
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
