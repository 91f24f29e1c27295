"""What one time step computes: the contracts, the built-in cells, and their combination."""

from jaxbptt.cells.elman import elman
from jaxbptt.cells.gru import gru
from jaxbptt.cells.lstm import lstm

CELLS = {"elman": elman, "gru": gru, "lstm": lstm}
"""The built-in cells by name, as the command line and the report know them."""
