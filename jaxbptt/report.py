r"""What the report contains: for each cell, the certificate, the gradient's flow and reach, and singular values.

Only numbers are made here; `page` makes the HTML of them, and the command line the table in the terminal.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.certificate import Certificate, certify
from jaxbptt.analysis.credit import LagContributions, TruncationBias, lag_contributions, truncation_bias
from jaxbptt.analysis.diagnosis import GradientDiagnosis, diagnose_gradient
from jaxbptt.analysis.flow import GradientFlow, gradient_flow
from jaxbptt.analysis.horizon import effective_horizon
from jaxbptt.analysis.jacobians import (
    LogSingularValues,
    jacobian_products,
    log_singular_values,
    state_jacobians,
    temporal_contributions,
)
from jaxbptt.cells.cell import Cell
from jaxbptt.cells.elman import elman
from jaxbptt.cells.gru import gru
from jaxbptt.cells.lstm import lstm
from jaxbptt.network import NetworkParams, network
from jaxbptt.tasks import NextStep
from jaxbptt.textbook import bptt
from jaxbptt.training import losses
from jaxbptt.words import counted

CELLS = {"elman": elman, "gru": gru, "lstm": lstm}
# Dense Jacobians and one weight gradient for each step are what the third road needs: beyond this it is left out.
MAX_DENSE_BYTES = 2**30


class CellReport(NamedTuple):
    """All that the report says of one cell.

    Attributes:
        name: of the cell.
        certificate: the gradient of the mean loss over all steps, every exact way.
        bias: of the biased ways, for the same loss.
        flow: the gradient of the last step's loss, back through time.
        diagnosis: why that gradient became what it is, on the first row of the batch.
        lags: the gradient of the mean loss by lag, without the contributions themselves; `None` where they would not fit.
        horizon: the lag from which on what is still to come is under 1 % of that gradient, the longest over its leaves.
        singular_values: of ∂h_T/∂hₜ on the first row of the batch, or `None` where the dense Jacobians would not fit.
        bound_rate: γ σ_max(W_hh) for the Elman cell, `None` for the others.
        left_out: ways that did not fit in memory, in words.
    """

    name: str
    certificate: Certificate
    bias: TruncationBias
    flow: GradientFlow
    diagnosis: GradientDiagnosis
    lags: LagContributions | None
    horizon: int | None
    singular_values: LogSingularValues | None
    bound_rate: float | None
    left_out: tuple[str, ...]


def stages(name: str, task: NextStep, hidden: int) -> int:
    """How many times `report_cell` reports progress."""
    dense = _dense_bytes(CELLS[name](task.xs.shape[-1], hidden), task) <= MAX_DENSE_BYTES
    textbook = name == "elman" and task.loss == "cross_entropy"
    return 8 + 3 * dense + textbook


def report_cell(
    name: str, task: NextStep, *, hidden: int, seed: int, dtype: Any, progress: Callable[[str], None]
) -> CellReport:
    """Build an untrained network around one cell, and take its gradient on the task every way there is."""
    batch, features = task.xs.shape[1:]
    cell = CELLS[name](features, hidden, dtype=dtype)
    net = network(cell, features)
    params, W_hy = net.init(jax.random.key(seed))
    xs, init = jnp.asarray(task.xs, dtype), cell.initial_carry((batch,))
    targets = jnp.asarray(task.targets) if task.loss == "cross_entropy" else jnp.asarray(task.targets, dtype)
    loss = getattr(losses, task.loss)

    def whole_loss(carry, hs):
        return loss(hs @ W_hy.T, targets)

    def last_loss(carry, hs):
        return losses.final_step(loss)(hs @ W_hy.T, targets)

    gradients, left_out = {}, []
    dense = _dense_bytes(cell, task)
    if dense <= MAX_DENSE_BYTES:
        gradients["Jacobian products"] = lambda params, init, xs: _by_jacobian_products(
            cell, params, xs, lambda hs, targets: loss(hs @ W_hy.T, targets), targets
        )
    else:
        left_out.append(f"Jacobian products, singular values and lags: {dense / 2**30:.1f} GiB of dense matrices")
    if name == "elman" and task.loss == "cross_entropy":
        gradients["textbook loop"] = lambda params, init, xs: _by_textbook(params, W_hy, init, xs, targets)
    certificate = certify(
        cell,
        params,
        init,
        xs,
        whole_loss,
        gradients=gradients,
        repeats=3,
        progress=lambda way: progress(f"{name}: {way}"),
    )

    progress(f"{name}: truncation")
    lengths = [2**i for i in range(len(xs).bit_length())]
    bias = jax.jit(lambda params, init, xs: truncation_bias(cell, params, init, xs, whole_loss, lengths=lengths))(
        params, init, xs
    )
    progress(f"{name}: gradient flow")
    flow = jax.jit(lambda params, init, xs: gradient_flow(cell, params, init, xs, last_loss))(params, init, xs)
    progress(f"{name}: why")
    first_row = jax.tree.map(lambda leaf: leaf[0], init), xs[:, 0]
    diagnosis = diagnose_gradient(cell, params, *first_row, lambda carry, hs: loss(hs[-1] @ W_hy.T, targets[-1, 0]))
    values = lags = horizon = None
    if dense <= MAX_DENSE_BYTES:
        progress(f"{name}: lags")
        lags = jax.jit(lambda params, init, xs: lag_contributions(cell, params, init, xs, whole_loss))(params, init, xs)
        horizon = max(jax.tree.leaves(jax.tree.map(int, effective_horizon(lags, 0.01))))
        lags = jax.tree.map(np.asarray, lags._replace(contributions=None))
        progress(f"{name}: singular values")
        values = jax.jit(lambda xs: _singular_values(cell, params, xs))(xs[:, 0])
    rate = float(jnp.linalg.norm(params.W_hh, 2)) if name == "elman" else None
    flow, bias = jax.tree.map(np.asarray, (flow, bias))
    return CellReport(name, certificate, bias, flow, diagnosis, lags, horizon, values, rate, tuple(left_out))


def reach(flow: GradientFlow, fraction: float) -> int | None:
    """The longest lag at which ‖∂L/∂hₜ‖ is at least a fraction of its largest value; `None` where it is 0 throughout."""
    norms = np.asarray(flow.norms, float)
    if not norms.max(initial=0) > 0:
        return None
    return len(norms) - 1 - int(np.argmax(norms >= fraction * norms.max()))


def reach_sentence(report: CellReport) -> str:
    """How far back the gradient of the last step's loss reaches, in one sentence."""
    norms = np.asarray(report.flow.norms, float)
    steps = len(norms)
    if not np.isfinite(norms).all():
        return f"{report.name}: the gradient is not finite in {np.count_nonzero(~np.isfinite(norms))} of {counted(steps, 'step')}."
    lag = reach(report.flow, 0.01)
    if lag is None:
        return f"{report.name}: no gradient reaches any state, the last step's loss does not depend on them."
    floor = reach(report.flow, float(np.finfo(report.flow.norms.dtype).eps)) or 0
    dtype = report.flow.norms.dtype.name
    if lag == steps - 1:
        start = f"the gradient of the last step's loss reaches all {counted(steps, 'step')} back with at least 1 % of its largest size"
    else:
        start = (
            f"the gradient of the last step's loss falls under 1 % of its largest size {counted(lag + 1, 'step')} back"
        )
    if floor == steps - 1:
        end = f"at the first step it is {norms[0] / norms.max():.0e} of it"
    else:
        end = f"{counted(floor + 1, 'step')} back it is so far under it that {dtype} loses it in any sum with what is near"
    return f"{report.name}: {start}; {end}."


def horizon_sentence(report: CellReport) -> str | None:
    """How far back the gradient of the mean loss comes from, in one sentence; `None` where it was not computed."""
    if report.lags is None:
        return None
    steps = len(report.lags.norms)
    if not np.isfinite(report.lags.norms).all() or not report.horizon:
        return f"{report.name}: no horizon, the gradient of the mean loss is 0 or not finite."
    return f"{report.name}: all but 1 % of the gradient of the mean loss comes from the last {report.horizon} of {counted(steps, 'step')}."


def _dense_bytes(cell: Cell, task: NextStep) -> float:
    """Memory of one Jacobian and one weight gradient for every time step."""
    n = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.initial_carry)))
    p = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.init, jax.random.key(0))))
    return len(task.xs) * (n * n + p) * jnp.result_type(float).itemsize


def _by_jacobian_products(cell: Cell, params: Any, xs: Any, loss: Callable[..., Any], targets: Any) -> Any:
    """Mean over the batch of the sum over time of each row's contributions, one row after the other."""

    def row(at_row):
        xs, targets = at_row
        terms = temporal_contributions(cell, params, cell.initial_carry(), xs, lambda _, hs: loss(hs, targets))
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), terms.contributions)

    rows = jax.lax.map(row, (jnp.moveaxis(xs, 1, 0), jnp.moveaxis(targets, 1, 0)))
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), rows)


def _by_textbook(params: Any, W_hy: Any, init: Any, xs: Any, targets: Any) -> Any:
    pieces = jax.vmap(bptt, in_axes=(None, 1, 0, 1))(NetworkParams(params, W_hy), xs, init, targets)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0) / targets.size, pieces.gradients.cell)


def _singular_values(cell: Cell, params: Any, xs: Any) -> LogSingularValues:
    _, J = state_jacobians(cell, params, cell.initial_carry(), xs)
    return log_singular_values(jacobian_products(J))


def cells_of(choice: str) -> Iterator[str]:
    """The cells that `--cell` names."""
    return iter(CELLS if choice == "all" else (choice,))
