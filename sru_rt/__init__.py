"""Runtime-compiled kernels for gated element-wise recurrences.

Nothing happens at import: no framework is imported, nothing is compiled, no folder is made.
"""

from ._version import __version__ as __version__
from .cells.mingru import *
from .cells.minlstm import *
from .cells.qrnn import *
from .cells.sru import *
from .graph import exp as exp
from .graph import log as log
from .graph import maximum as maximum
from .graph import minimum as minimum
from .graph import relu as relu
from .graph import sigmoid as sigmoid
from .graph import softplus as softplus
from .graph import sqrt as sqrt
from .graph import tanh as tanh
from .graph import where as where
from .own import cell as cell
from .replay import PreparedCall as PreparedCall
from .replay import prepare as prepare
