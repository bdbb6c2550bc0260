"""PyTorch: functions and modules of recurrences on its tensors.

The functions of `sru_rt` itself take tensors, too, and record their gradients. Here they have `recompute=`, and can be
compiled without having been called before.
"""

from .functional import mingru as mingru
from .functional import minlstm as minlstm
from .functional import own_cell as own_cell
from .functional import qrnn as qrnn
from .functional import sru as sru
from .min_rnns import MinGRU as MinGRU
from .min_rnns import MinLSTM as MinLSTM
from .own import RNN as RNN
from .qrnn_module import QRNN as QRNN
from .qrnn_module import QRNNState as QRNNState
from .sru_modules import SRU as SRU
from .sru_modules import SRUCell as SRUCell
