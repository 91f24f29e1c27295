r"""What the report contains: for each network, the certificate, how far back the gradient reaches, and singular values.

Only numbers are computed here; `wording` makes sentences and tables of them, and `page` the HTML.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.certificate import Certificate, certify, sequential_strategies
from jaxbptt.analysis.credit import (
    LagContributions,
    TruncationBias,
    input_saliency,
    lag_contributions,
    truncation_bias,
)
from jaxbptt.analysis.diagnosis import GradientDiagnosis, diagnose_gradient
from jaxbptt.analysis.flow import GradientFlow, gradient_flow
from jaxbptt.analysis.horizon import effective_horizon
from jaxbptt.analysis.jacobians import (
    LogSingularValues,
    jacobian_products,
    product_log_singular_values,
    state_jacobians,
    temporal_contributions,
)
from jaxbptt.cells import CELLS
from jaxbptt.cells.cell import Cell
from jaxbptt.cells.elman import ElmanParams
from jaxbptt.cells.gru import GRUParams
from jaxbptt.cells.lstm import LSTMParams
from jaxbptt.network import NetworkParams, network
from jaxbptt.scans.exact import scan
from jaxbptt.tasks import NextStep
from jaxbptt.textbook import bptt
from jaxbptt.training import losses

# Dense Jacobians and a weight gradient for each time step: where they take more than this, they are left out.
MAX_DENSE_BYTES = 2**30
# So many steps' losses have their saliency on the page: more would make it heavy.
_MAX_LOSSES = 128


class Row(NamedTuple):
    """What the networks read in the first row of the batch, as people see it.

    Attributes:
        name: of the data.
        characters: of a text, one for each time step; `None` for numbers.
        columns: names of the columns of numbers; empty for a text.
        values: of the columns, in their own units, `[time, columns]`; `None` for a text.
    """

    name: str
    characters: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    values: np.ndarray | None = None


class Saliency(NamedTuple):
    """How much the losses of some steps depend on each input, on the first row of the batch.

    Attributes:
        steps: whose losses, from 0, in order, the last step among them, `[chosen]`.
        values: ‖∂Lₜ/∂xₛ‖, 0 where s comes after t, `[chosen, time]`.
    """

    steps: np.ndarray
    values: np.ndarray


class CellReport(NamedTuple):
    """All that the report says of one network.

    Attributes:
        name: of the entry.
        certificate: the gradient of the mean loss over all steps, by every exact method.
        bias: of the truncated methods, for the same loss.
        flow: the gradient of the last step's loss, back through time.
        diagnosis: why that gradient became what it is, on the first row of the batch.
        left_out: what did not fit in memory, in words.
        lags: the gradient of the mean loss by lag, without the contributions themselves; `None` where they would not fit.
        horizon: the lag from which on less than 1 % of that gradient is still to come, the longest over its leaves.
        singular_values: of ∂h_T/∂hₜ on the first row of the batch, or `None` where the dense Jacobians would not fit.
        bound_rate: γ σ_max(W_hh) for the Elman cell, `None` for the others.
        loss: the mean over all steps and rows.
        saliency: of the inputs for the losses of single steps.
        kind: of the cell, a name in `CELLS`; empty for others.
        kept: the share of the state that a unit keeps in a step, by the bias that its update or forget gate starts with;
            `None` where weights are trained, and for cells without such a gate.
        trained: whether the weights are trained, and not those that training starts from.
    """

    name: str
    certificate: Certificate
    bias: TruncationBias
    flow: GradientFlow
    diagnosis: GradientDiagnosis
    left_out: tuple[str, ...] = ()
    lags: LagContributions | None = None
    horizon: int | None = None
    singular_values: LogSingularValues | None = None
    bound_rate: float | None = None
    loss: float | None = None
    saliency: Saliency | None = None
    kind: str = ""
    kept: float | None = None
    trained: bool = False


class Entry(NamedTuple):
    """A network with its weights and sequences: what a report opens up.

    Attributes:
        name: what the report calls it.
        cell: the recurrence.
        params: of the cell.
        init: the first carry, leaves `[batch, ...]`.
        xs: what the cell reads, `[time, batch, features]`.
        known: what the loss needs beside the cell's outputs, leaves `[time, batch, ...]`.
        loss: `(hs, known) -> scalar`, the mean over the steps and rows that it is given.
        gradients: further methods for the certificate, by name, `(params, init, xs) -> gradient of params`.
        kind: of the cell, a name in `CELLS`; empty for others.
        trained: whether the weights are trained, and not those that training starts from.
    """

    name: str
    cell: Cell
    params: Any
    init: Any
    xs: Any
    known: Any
    loss: Callable[[Any, Any], Any]
    gradients: Mapping[str, Callable[..., Any]] = {}
    kind: str = ""
    trained: bool = False


def untrained(name: str, task: NextStep, *, hidden: int, seed: int, dtype: Any, observed: Any = None) -> Entry:
    """A cell with a linear read-out, with random weights, on the task.

    Args:
        name: in `CELLS`.
        task: the sequences.
        hidden: size of the state.
        seed: of the weights.
        dtype: of all that is computed.
        observed: booleans like the targets of numbers, False where one does not count.
    """
    batch, features = task.xs.shape[1:]
    cell = CELLS[name](features, hidden, dtype=dtype)
    params, W_hy, _ = network(cell, features).init(jax.random.key(seed))
    by_number = task.loss == "cross_entropy"
    targets = jnp.asarray(task.targets) if by_number else jnp.asarray(task.targets, dtype)
    mask = None if observed is None else jnp.asarray(observed)

    def loss(hs, known):
        targets, mask = known
        return getattr(losses, task.loss)(hs @ W_hy.T, targets, mask=mask)

    by_textbook = {"textbook loop": lambda params, init, xs: _by_textbook(params, W_hy, init, xs, targets)}
    return Entry(
        name,
        cell,
        params,
        cell.initial_carry((batch,)),
        jnp.asarray(task.xs, dtype),
        (targets, mask),
        loss,
        by_textbook if name == "elman" and by_number else {},
        kind=name,
    )


class Stage(NamedTuple):
    """One computation of a report.

    Attributes:
        title: what is computed.
        compute: `(show) -> fields of the CellReport`; calls `show` with the name of what it is at.
        timed: whether it measures times, so that nothing else may run.
    """

    title: str
    compute: Callable[[Callable[[str], None]], dict[str, Any]]
    timed: bool = False


def _run(name: str, stage: Stage, progress: Callable[[str, int], None]) -> dict[str, Any]:
    progress(f"{name}: {stage.title}", 0)
    fields = stage.compute(lambda method: progress(f"{name}: {method}", 0))
    progress(f"{name}: {stage.title}", 1)
    return fields


def report_cells(entries: Sequence[Entry], progress: Callable[[str, int], None]) -> list[CellReport]:
    """All stages of all networks; `progress(words, stages done)` is told what runs, and when a stage is done.

    Most of the time goes into compiling, on one core a program, so stages run two at a time; the certificates, which
    measure times, run after them and alone.
    """
    todo = [(entry.name, stage) for entry in entries for stage in stages(entry)]
    found: dict[str, dict[str, Any]] = {entry.name: {} for entry in entries}
    x64 = bool(jax.config.read("jax_enable_x64"))

    def run(name: str, stage: Stage) -> None:
        with jax.enable_x64(x64):  # a thread starts with the global settings
            found[name] |= _run(name, stage, progress)

    alone = [(name, stage) for name, stage in todo if stage.timed]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, name, stage) for name, stage in todo if not stage.timed]
        try:
            for one in runs:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name, stage in alone:
        run(name, stage)
    return [CellReport(name, **fields) for name, fields in found.items()]


def stages(entry: Entry) -> list[Stage]:
    """What is computed for one network."""
    cell, params, init, xs, known, loss = entry.cell, entry.params, entry.init, entry.xs, entry.known, entry.loss
    dense_bytes = _dense_bytes(entry)
    dense = dense_bytes <= MAX_DENSE_BYTES

    def mean_loss(carry, hs):
        return loss(hs, known)

    def last_loss(carry, hs):
        return loss(hs[-1:], jax.tree.map(lambda leaf: leaf[-1:], known))

    def certificate(show):
        gradients = dict(entry.gradients)
        if dense:
            gradients = {"Jacobian products": partial(_by_jacobian_products, entry)} | gradients
        # Those that are parallel in time would take longer to compile than all others together.
        scans = dict(sequential_strategies(cell))
        result = certify(cell, params, init, xs, mean_loss, scans=scans, gradients=gradients, repeats=3, progress=show)
        left_out = f"Jacobian products, singular values and lags: {dense_bytes / 2**30:.1f} GiB of dense matrices"
        value = jax.jit(lambda params, init, xs: mean_loss(*scan(cell, params, init, xs)))(params, init, xs)
        found = {"certificate": result, "left_out": () if dense else (left_out,), "loss": float(value)}
        start = {"kind": entry.kind, "trained": entry.trained, "kept": None if entry.trained else _kept(params)}
        return found | start

    def truncation(show):
        lengths = [2**i for i in range(len(xs).bit_length())]
        bias = jax.jit(lambda params, init, xs: truncation_bias(cell, params, init, xs, mean_loss, lengths=lengths))
        return {"bias": jax.tree.map(np.asarray, bias(params, init, xs))}

    def flow(show):
        flow = jax.jit(lambda params, init, xs: gradient_flow(cell, params, init, xs, last_loss))(params, init, xs)
        return {"flow": jax.tree.map(np.asarray, flow)}

    def diagnosis(show):
        known_last = jax.tree.map(lambda leaf: leaf[-1:, 0], known)
        loss_of_row = lambda carry, hs: loss(hs[-1:], known_last)  # noqa: E731
        return {"diagnosis": diagnose_gradient(cell, params, *_row(entry, 0), loss_of_row)}

    def saliency(show):
        known_of_row = jax.tree.map(lambda leaf: leaf[:, 0], known)

        def by_step(carry, hs):
            one = lambda h, known: loss(h[None], jax.tree.map(lambda leaf: leaf[None], known))  # noqa: E731
            return jax.vmap(one)(hs, known_of_row)

        steps = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), _MAX_LOSSES)).round().astype(int))
        of_row = jax.jit(lambda params, init, xs: input_saliency(cell, params, init, xs, by_step, steps=steps))
        return {"saliency": Saliency(steps, np.asarray(of_row(params, *_row(entry, 0))))}

    def by_lag(show):
        def without_contributions(params, init, xs):
            lags = lag_contributions(cell, params, init, xs, mean_loss)
            return lags._replace(contributions=None), effective_horizon(lags, 0.01)

        lags, horizons = jax.tree.map(np.asarray, jax.jit(without_contributions)(params, init, xs))
        return {"lags": lags, "horizon": max(map(int, jax.tree.leaves(horizons)))}

    def singular_values(show):
        rate = float(jnp.linalg.norm(params.W_hh, 2)) if isinstance(params, ElmanParams) else None
        values = jax.jit(partial(_singular_values, cell))(params, *_row(entry, 0))
        return {"singular_values": values, "bound_rate": rate}

    always = [
        Stage("certificate", certificate, timed=True),
        Stage("truncation", truncation),
        Stage("gradient flow", flow),
        Stage("diagnosis", diagnosis),
        Stage("saliency", saliency),
    ]
    of_dense = [Stage("lags", by_lag), Stage("singular values", singular_values)]
    return always + of_dense if dense else always


def _dense_bytes(entry: Entry) -> float:
    """Memory of one Jacobian and one weight gradient for every time step."""
    n, p = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (_row(entry, 0)[0], entry.params))
    return len(entry.xs) * (n * n + p) * jnp.result_type(float).itemsize


def _kept(params: Any) -> float | None:
    """The share of the state that is kept in a step by the bias of its gate alone, as a mean over the units."""
    if not isinstance(params, GRUParams | LSTMParams):
        return None
    gates = 3 if isinstance(params, GRUParams) else 4
    return float(jnp.mean(jax.nn.sigmoid(jnp.split(params.b, gates)[1])))


def _row(entry: Entry, i: int) -> tuple[Any, Any]:
    """The first carry and the inputs of one row of the batch."""
    return jax.tree.map(lambda leaf: leaf[i], entry.init), entry.xs[:, i]


def _by_jacobian_products(entry: Entry, params: Any, init: Any, xs: Any) -> Any:
    """Sum over the batch and over time of each row's contributions, one row after the other."""
    _, hs = scan(entry.cell, params, init, xs)
    hs_bar = jax.grad(entry.loss)(hs, entry.known)

    def row(at_row):
        init, xs, hs_bar = at_row
        terms = temporal_contributions(entry.cell, params, init, xs, lambda _, hs: jnp.sum(hs * hs_bar))
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), terms.contributions)

    rows = jax.lax.map(row, (init, jnp.moveaxis(xs, 1, 0), jnp.moveaxis(hs_bar, 1, 0)))
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), rows)


def _by_textbook(params: Any, W_hy: Any, init: Any, xs: Any, targets: Any) -> Any:
    terms = jax.vmap(bptt, in_axes=(None, 1, 0, 1))(NetworkParams(params, W_hy), xs, init, targets)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0) / targets.size, terms.gradients.cell)


def _singular_values(cell: Cell, params: Any, init: Any, xs: Any) -> LogSingularValues:
    _, J = state_jacobians(cell, params, init, xs)
    return product_log_singular_values(jacobian_products(J))
