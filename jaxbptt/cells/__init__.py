"""What one time step computes: the contracts, the built-in cells, and their combination."""

from jaxbptt.cells.elman import elman
from jaxbptt.cells.gru import gru
from jaxbptt.cells.lru import lru
from jaxbptt.cells.lstm import lstm
from jaxbptt.cells.min_gru import min_gru
from jaxbptt.cells.min_lstm import min_lstm
from jaxbptt.cells.rg_lru import rg_lru

CELLS = {
    "elman": elman,
    "gru": gru,
    "lstm": lstm,
    "lru": lru,
    "min_gru": min_gru,
    "min_lstm": min_lstm,
    "rg_lru": rg_lru,
}
"""The built-in cells by name, as the command line and the report know them."""
