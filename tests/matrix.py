"""Large matrices, of which a part is enough where only another Python or NumPy is tried."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(values: Iterable[Any], every: int = 8) -> list[Any]:
    """Values for parametrize, tuples being those of several names. All but each `every`th carry the marker `matrix`."""
    return [
        pytest.param(*(v if type(v) is tuple else (v,)), marks=pytest.mark.matrix if i % every else ())
        for i, v in enumerate(values)
    ]
