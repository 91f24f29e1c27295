"""Other libraries: their cells as a `Cell` and its params, and torch's weights."""

from jaxbptt.interop.modules import from_equinox as from_equinox
from jaxbptt.interop.modules import from_flax as from_flax
from jaxbptt.interop.torch_weights import from_torch as from_torch
from jaxbptt.interop.torch_weights import to_torch as to_torch
