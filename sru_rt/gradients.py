"""What a backward function returns, and what a forward function keeps for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .errors import ArgumentError


class Gradients:
    """Gradients by the names of the inputs, as attributes. An input that was None, or a pair, has such a gradient."""

    def __init__(self, values: dict[str, Any], known: Sequence[str]) -> None:
        self._values, self._known = values, tuple(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._values:
            return self._values[name]
        if name in self._known:
            raise AttributeError(f"the gradient of {name} was not asked for; add it to need=")
        raise AttributeError(f"there is no gradient of {name!r}; there are those of {', '.join(self._known)}")

    def __iter__(self) -> Iterator[str]:
        """The names of the gradients that were computed."""
        return iter(self._values)

    def __dir__(self) -> list[str]:
        return sorted(self._values)

    def __repr__(self) -> str:
        def shape(value: Any) -> str:
            if isinstance(value, tuple):
                return f"({', '.join(map(shape, value))})"
            return "None" if value is None else f"{value.dtype.name}{list(value.shape)}"

        return f"Gradients({', '.join(f'{k}={shape(v)}' for k, v in self._values.items())})"


def wanted(function: str, need: Any, given: Mapping[str, Any]) -> set[str]:
    """The names in `need`, by default all inputs that were given."""
    if need is None:
        return {name for name, value in given.items() if value is not None}
    try:
        names = (need,) if isinstance(need, str) else tuple(need)
    except TypeError:
        raise ArgumentError(
            f"{function}: need must be a name or names among {', '.join(given)} (got {need!r})"
        ) from None
    for name in names:
        if not isinstance(name, str) or name not in given:
            raise ArgumentError(f"{function}: need has {name!r}; it may have {', '.join(given)}")
        if given[name] is None:
            raise ArgumentError(f"{function}: need has {name!r}, but {name} was None in the forward; leave it out")
    return set(names)


def nbytes(value: Any, pointer: Callable[[Any], int]) -> int:
    """Memory of the distinct contiguous arrays in nested tuples and dicts, in bytes; `pointer` gives an address."""
    arrays: dict[int, int] = {}

    def walk(v: Any) -> None:
        if isinstance(v, dict):
            walk(tuple(v.values()))
        elif isinstance(v, (tuple, list)):
            for item in v:
                walk(item)
        elif v is not None:
            arrays[pointer(v)] = v.nbytes  # two views of one array count once

    walk(value)
    return sum(arrays.values())
