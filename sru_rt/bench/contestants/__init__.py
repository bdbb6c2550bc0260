"""Who takes part: our own library under each array library, yardsticks, and other libraries."""

from __future__ import annotations

from ..contest import Contestant
from .accelerated_scan import Scalar, Warp
from .copies import Copy, MatchedCopy
from .fla import Chunked, Recurrent
from .in_arrays import Ours, Prepared, Products
from .in_jax import OursInJax, ProductsOfJax, Recomputing
from .in_torch import OursInTorch, ProductsOfTorch
from .jax_scans import AssociativeScan, Scan
from .mingru_pytorch import MinGRUPyTorch
from .naive import Naive
from .overheads import Clone, EmptyCall, WithoutOut
from .sru import Sru
from .torch_layers import GRU, LSTM, Convolution
from .torch_scan import TorchScan

ALL: tuple[Contestant, ...] = (
    Copy(),
    MatchedCopy(),
    Products(),
    Ours(),
    Prepared(),
    WithoutOut(),
    Naive(),
    ProductsOfTorch(),
    OursInTorch(),
    Clone(),
    ProductsOfJax(),
    OursInJax(),
    Recomputing(),
    EmptyCall(),
    Sru(),
    LSTM(),
    GRU(),
    Convolution(2),
    Convolution(3),
    MinGRUPyTorch(),
    Warp(),
    Scalar(),
    Recurrent(),
    Chunked(),
    TorchScan(),
    AssociativeScan(),
    Scan(),
)
BY_NAME = {one.name: one for one in ALL}
