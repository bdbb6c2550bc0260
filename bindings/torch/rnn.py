"""Modules in the manner of torch.nn.LSTM: QRNN, MinGRU, MinLSTM, and RNN for cells of one's own."""

from .min_rnns import MinGRU as MinGRU
from .min_rnns import MinLSTM as MinLSTM
from .own import RNN as RNN
from .qrnn_module import QRNN as QRNN
from .qrnn_module import QRNNState as QRNNState
