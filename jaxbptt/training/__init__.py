"""Training with truncated BPTT: losses, streams of chunks, the update, checkpoints, sharding and regularisers."""

from jaxbptt.training.chunks import Chunk as Chunk
from jaxbptt.training.tbptt import Evaluation as Evaluation
from jaxbptt.training.tbptt import Metrics as Metrics
from jaxbptt.training.tbptt import TrainState as TrainState
from jaxbptt.training.tbptt import TruncatedBPTT as TruncatedBPTT
