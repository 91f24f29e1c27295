"""Methods of taking the gradient of a recurrence through time, and the analysis of that gradient.

Functions, and the types that users make; those of results are in `analysis`, `scans`, `textbook` and `training`.
"""

import importlib as _importlib
from typing import Any as _Any

from jaxbptt import analysis as analysis
from jaxbptt import influences as influences
from jaxbptt import interop as interop
from jaxbptt import models as models
from jaxbptt import scans as scans
from jaxbptt import tasks as tasks
from jaxbptt import training as training
from jaxbptt.analysis.certificate import certify as certify
from jaxbptt.analysis.compare import compare_gradients as compare_gradients
from jaxbptt.analysis.components import participation_ratio as participation_ratio
from jaxbptt.analysis.components import principal_components as principal_components
from jaxbptt.analysis.covariant import covariant_lyapunov_vectors as covariant_lyapunov_vectors
from jaxbptt.analysis.credit import input_saliency as input_saliency
from jaxbptt.analysis.credit import lag_contributions as lag_contributions
from jaxbptt.analysis.credit import truncation_bias as truncation_bias
from jaxbptt.analysis.diagnosis import diagnose_gradient as diagnose_gradient
from jaxbptt.analysis.fixed_points import fixed_points as fixed_points
from jaxbptt.analysis.fixed_points import sample_states as sample_states
from jaxbptt.analysis.flow import gradient_flow as gradient_flow
from jaxbptt.analysis.horizon import adaptive_truncation_length as adaptive_truncation_length
from jaxbptt.analysis.horizon import effective_horizon as effective_horizon
from jaxbptt.analysis.jacobians import jacobian_products as jacobian_products
from jaxbptt.analysis.jacobians import product_log_singular_values as product_log_singular_values
from jaxbptt.analysis.jacobians import state_jacobians as state_jacobians
from jaxbptt.analysis.jacobians import temporal_contributions as temporal_contributions
from jaxbptt.analysis.kept import kept_contributions as kept_contributions
from jaxbptt.analysis.lyapunov import lyapunov_exponents as lyapunov_exponents
from jaxbptt.analysis.normality import departure_from_normality as departure_from_normality
from jaxbptt.analysis.operators import jacobian_operators as jacobian_operators
from jaxbptt.analysis.parallel_plan import plan_parallel as plan_parallel
from jaxbptt.analysis.paths import surviving_paths as surviving_paths
from jaxbptt.analysis.plan import plan as plan
from jaxbptt.analysis.scoreboard import score_gradients as score_gradients
from jaxbptt.analysis.spectrum import jacobian_eigenvalues as jacobian_eigenvalues
from jaxbptt.analysis.spectrum import log_norms as log_norms
from jaxbptt.analysis.spectrum import singular_values as singular_values
from jaxbptt.bidirectional import Bidirectional as Bidirectional
from jaxbptt.bidirectional import Directions as Directions
from jaxbptt.bidirectional import bidirectional as bidirectional
from jaxbptt.cells import initializers as initializers
from jaxbptt.cells.cell import Adjoint as Adjoint
from jaxbptt.cells.cell import Cell as Cell
from jaxbptt.cells.dropout import DropoutParams as DropoutParams
from jaxbptt.cells.dropout import dropout as dropout
from jaxbptt.cells.elman import ElmanParams as ElmanParams
from jaxbptt.cells.elman import elman as elman
from jaxbptt.cells.elman import elman_state_jacobians as elman_state_jacobians
from jaxbptt.cells.gru import GRUParams as GRUParams
from jaxbptt.cells.gru import gru as gru
from jaxbptt.cells.layer_norm import LayerNormLSTMParams as LayerNormLSTMParams
from jaxbptt.cells.lru import LRUParams as LRUParams
from jaxbptt.cells.lru import LRUState as LRUState
from jaxbptt.cells.lru import lru as lru
from jaxbptt.cells.lstm import LSTMParams as LSTMParams
from jaxbptt.cells.lstm import LSTMState as LSTMState
from jaxbptt.cells.lstm import lstm as lstm
from jaxbptt.cells.min_gru import MinGRUParams as MinGRUParams
from jaxbptt.cells.min_gru import min_gru as min_gru
from jaxbptt.cells.min_lstm import MinLSTMParams as MinLSTMParams
from jaxbptt.cells.min_lstm import min_lstm as min_lstm
from jaxbptt.cells.rate import RateParams as RateParams
from jaxbptt.cells.rate import rate as rate
from jaxbptt.cells.rg_lru import RGLRUParams as RGLRUParams
from jaxbptt.cells.rg_lru import rg_lru as rg_lru
from jaxbptt.cells.stack import stack as stack
from jaxbptt.influences.influence import Influence as Influence
from jaxbptt.models.model import load as load
from jaxbptt.network import Network as Network
from jaxbptt.network import NetworkParams as NetworkParams
from jaxbptt.network import network as network
from jaxbptt.scans.adjoint import adjoint_scan as adjoint_scan
from jaxbptt.scans.as_lax import as_lax as as_lax
from jaxbptt.scans.checkpointed import checkpointed_scan as checkpointed_scan
from jaxbptt.scans.cudnn import cudnn_scan as cudnn_scan
from jaxbptt.scans.exact import scan as scan
from jaxbptt.scans.flags import valid_from_lengths as valid_from_lengths
from jaxbptt.scans.forward import forward_scan as forward_scan
from jaxbptt.scans.newton import newton_scan as newton_scan
from jaxbptt.scans.newton import newton_states as newton_states
from jaxbptt.scans.parallel import parallel_scan as parallel_scan
from jaxbptt.scans.parallel_adjoint import parallel_adjoint_scan as parallel_adjoint_scan
from jaxbptt.scans.schedule import checkpoint_schedule as checkpoint_schedule
from jaxbptt.scans.truncated import truncated_scan as truncated_scan
from jaxbptt.scans.windowed import windowed_scan as windowed_scan
from jaxbptt.textbook import bptt as bptt
from jaxbptt.training import checkpoints as checkpoints
from jaxbptt.training import hooks as hooks
from jaxbptt.training import losses as losses
from jaxbptt.training import regularizers as regularizers
from jaxbptt.training import sharding as sharding
from jaxbptt.training import streams as streams
from jaxbptt.training.chunks import Chunk as Chunk
from jaxbptt.training.tbptt import TrainState as TrainState
from jaxbptt.training.tbptt import tbptt as tbptt
from jaxbptt.words import install_command as _install_command

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """`plots`, imported when first asked for: it needs matplotlib, which the rest does without."""
    if name != "plots":
        raise AttributeError(f"module 'jaxbptt' has no attribute {name!r}")
    try:
        return _importlib.import_module("jaxbptt.plots")
    except ModuleNotFoundError as error:
        raise ImportError(f"jaxbptt.plots needs {error.name}: {_install_command('report')}") from error
