"""Every error that the library raises on purpose.

A message names the function, the argument, what it got, what it needs and the way on.
"""


class SruRtError(Exception):
    """Base class of all errors of this library."""


class ArgumentError(SruRtError, ValueError):
    """An argument has a value that the function does not take, or goes badly with another argument."""


class ShapeError(ArgumentError):
    """An array has the wrong number of axes, or an axis of the wrong size."""


class DtypeError(SruRtError, TypeError):
    """An array has a dtype that the function does not take beside the others."""


class LibraryError(SruRtError, TypeError):
    """An argument is no array, is of another library than the others, or of one that cannot be served."""


class StepError(SruRtError, TypeError):
    """A step function does something that cannot be traced."""


class CompileError(SruRtError, RuntimeError):
    """No compiler was found, or it failed; the message holds its output."""


class CacheError(SruRtError, RuntimeError):
    """The folder for compiled code cannot be used safely."""
