"""PyTorch: functions and modules of recurrences on its tensors.

The functions of `sru_rt` itself take tensors, too, and record their gradients. Here they have `recompute=`, and can be
compiled without having been called before.
"""

from .functional import mingru as mingru
from .functional import minlstm as minlstm
from .functional import own_cell as own_cell
from .functional import qrnn as qrnn
from .functional import sru as sru
