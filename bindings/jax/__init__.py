"""JAX: functions of recurrences on its arrays, under its transformations.

The functions of `sru_rt` itself take arrays of JAX, too. Here they have `recompute=`, and parameters are drawn by keys.
Modules are in `nnx` for Flax and in `equinox`, which are imported by themselves; `convert` exchanges parameters with
the modules for PyTorch. Importing this module is enough for programs with recurrences that were exported by
`jax.export`, and are loaded in another process.
"""

from .functional import mingru as mingru
from .functional import minlstm as minlstm
from .functional import own_cell as own_cell
from .functional import qrnn as qrnn
from .functional import sru as sru
from .init import mingru_init as mingru_init
from .init import minlstm_init as minlstm_init
from .init import qrnn_init as qrnn_init
from .init import sru_init as sru_init
from .over_time import sharded_recurrence as sharded_recurrence
from .xla import register as register
from .xla import register_if_known as _register_if_known
from .xla import target as target

_register_if_known()
