"""The built-in cells: one file each, with its step function, its public functions (`__all__`), and `named_cells`."""

import importlib
import pkgutil

from ..cell import Cell


def named_cells() -> list[Cell]:
    """The cells whose emitted text stands in cuda/cells/, one file each."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return [cell for module in modules for cell in module.named_cells()]
