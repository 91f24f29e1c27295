from jaxbptt.cells.cell import Adjoint as Adjoint, Cell as Cell
from jaxbptt.cells.elman import ElmanParams as ElmanParams, elman as elman, elman_state_jacobians as elman_state_jacobians
from jaxbptt.cells.gru import GRUParams as GRUParams, gru as gru
from jaxbptt.cells.lstm import LSTMParams as LSTMParams, LSTMState as LSTMState, lstm as lstm
from jaxbptt.cells.stack import stack as stack
from jaxbptt.scans.adjoint import adjoint_scan as adjoint_scan
from jaxbptt.scans.exact import scan as scan
