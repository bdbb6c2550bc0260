"""Cells as text, for programs that outlive the process that wrote them: the exported graphs of frameworks.

A built-in cell is its family and options, ``sru(skip='x', activation='tanh', ...)``; one of a user is the place and
the name of its step function and a digest of its formula, ``models.cells:leaky@0f3a...``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import sys
from dataclasses import fields
from typing import Any

from . import emit
from .cell import Cell
from .errors import ArgumentError

_own: dict[str, Cell] = {}  # whose text was asked for in this process


@functools.cache
def text_of(cell: Cell) -> str:
    """The text of a cell, from which `cell_of` finds it again."""
    if cell.options is not None:
        values = ", ".join(f"{f.name}={getattr(cell.options, f.name)!r}" for f in fields(cell.options))
        return f"{_family(cell.options)}({values})"
    step = cell.step
    digest = hashlib.sha256(emit.emit(cell).encode()).hexdigest()[:16]
    text = f"{step.__module__}:{step.__qualname__}@{digest}"
    _own[text] = cell
    return text


@functools.cache
def cell_of(text: str) -> Cell:
    """The cell of a text.

    Raises:
        ArgumentError: there is no such cell, or its formula is another one now.
    """
    if text in _own:
        return _own[text]
    return _own_cell(text) if "@" in text else _built_in(text)


def _family(options: Any) -> str:
    return str(type(options).__module__.rpartition(".")[2])


def _built_in(text: str) -> Cell:
    try:
        call = ast.parse(text, mode="eval").body
        family = call.func.id  # type: ignore[attr-defined]
        values = {k.arg: ast.literal_eval(k.value) for k in call.keywords}  # type: ignore[attr-defined]
        module = importlib.import_module(f"{__package__}.cells.{family}")
        return getattr(module, f"{family}_cell")(module.Options(**values))
    except (AttributeError, ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"sru_rt: {text!r} is no cell of this version ({error}); it was written by another version of sru_rt: "
            "export the program again"
        ) from None


def _own_cell(text: str) -> Cell:
    place, _, _ = text.partition("@")
    module, _, name = place.partition(":")
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        cell = found._cell
    except (AttributeError, ImportError) as error:
        raise ArgumentError(
            f"sru_rt: the cell {name!r} of module {module!r} is not here ({error}); define it at the top level of a "
            "module that can be imported, or before the program that uses it is loaded"
        ) from None
    if text_of(cell) != text:
        raise ArgumentError(
            f"sru_rt: the step function of the cell {name!r} of module {module!r} has changed since the program that "
            "uses it was written; export the program again"
        )
    return cell
