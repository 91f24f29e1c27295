r"""How much of the gradient an influence keeps, by lag: from how far back the weights learn with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.along_time import at_one_step
from jaxbptt.analysis.credit import lag_contributions
from jaxbptt.analysis.norms import cosine, tree_norm
from jaxbptt.arrays import check_callable, scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import columns_table
from jaxbptt.influences.carried import Carried, entering
from jaxbptt.influences.influence import Influence, check_influence
from jaxbptt.programs.flagged import present, taken
from jaxbptt.programs.perturbed import every_leaf, led_to
from jaxbptt.programs.readout import Readout
from jaxbptt.programs.rows import rows_of
from jaxbptt.programs.trace import ClosedParams, trace
from jaxbptt.scans.flags import Flags, beside_input
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import combine, partition


class KeptContributions(NamedTuple):
    """An estimate of the gradient by lag, beside the gradient itself.

    Attributes:
        contributions: G̃⁽ˡ⁾, like the params, leaves `[lag, *leaf]`: what the weights' use l steps before a loss adds to the estimate.
            Over all lags they sum to the estimate.
        cosines: of the angle between G̃⁽ˡ⁾ and the exact G⁽ˡ⁾, `[lag]`; nan where one of them is 0.
        norm_ratios: ‖G̃⁽ˡ⁾‖ / ‖G⁽ˡ⁾‖, `[lag]`.
        exact_norms: ‖G⁽ˡ⁾‖, `[lag]`.
    """

    contributions: Any
    cosines: Float[Array, " lag"]
    norm_ratios: Float[Array, " lag"]
    exact_norms: Float[Array, " lag"]

    def _repr_html_(self) -> str:
        columns = {"cosine": self.cosines, "norm ratio": self.norm_ratios, "norm of the exact part": self.exact_norms}
        return columns_table(self, {"lag, time steps": range(len(self.cosines))} | columns)


def kept_contributions(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    influence: Influence,
    key: Any = None,
    max_lag: int | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> KeptContributions:
    r"""Split the gradient that an influence gives by lag, and hold each part against that of the exact gradient.

    G̃⁽ˡ⁾ = Σₜ āₜ (Mₜ[l + 1] − Mₜ[l]),  where Mₜ[k] is the influence after k steps from 0, those before t

    āₜ is ∂L/∂cₜ through yₜ alone. Of an exact influence G̃⁽ˡ⁾ is the G⁽ˡ⁾ of `lag_contributions`; `snap(1)` keeps lag 0 and loses
    of the others what passes through other units; of a random influence both M are drawn with the same keys, so that G̃⁽ˡ⁾ has the
    noise of one lag. Time and memory those of L + 1 influences for L lags.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀, any pytree of arrays.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        influence: such as `influences.snap(1)`.
        key: random key, for an influence that draws; for the mean over several map this function with `jax.vmap`.
        max_lag: the longest lag; T − 1, for all of them, by default.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, as for `scan`.
        valid: booleans `[time, *batch]`, as for `scan`; a padded step counts in the lag, as in `lag_contributions`.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        `KeptContributions`, with `max_lag + 1` entries.

    Raises:
        ValueError: `max_lag` below 0 or above T − 1; an influence that draws without a `key`; flags for rows that can't be told
            apart; as for `scan`.
        TypeError: an `influence` that is no `Influence`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(2, 4)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (12, 2))
        >>> def kept(influence):
        ...     args = cell, params, cell.initial_carry(), xs, lambda h, hs: jnp.mean(hs**2)
        ...     return jax.jit(lambda: bptt.kept_contributions(*args, influence=influence, max_lag=3))()
        >>> exact, local = kept(bptt.influences.rtrl()), kept(bptt.influences.snap(1))
        >>> print(exact.cosines.round(3), bool(local.cosines[0] > 0.999), bool(local.cosines[3] < 0.9))
        [1. 1. 1. 1.] True True

    References:
        Menick et al., A practical sparse approximation for real time recurrent learning, 2020, arXiv:2006.07232.
    """
    check_callable("loss", loss, "loss(carry, ys) -> scalar")
    check_influence(influence, "an Influence is expected")
    flags = {"is_first": is_first, "valid": valid, "reset_carry": reset_carry}
    exact = lag_contributions(step, params, init, xs, loss, max_lag=max_lag, length=length, **flags)
    r = prepare(step, params, init, xs, length, is_first, valid)
    traced = trace(r.step, r.params, r.init, r.xs)
    rows = rows_of(r.step, traced, r.init, r.xs)
    rows.check_flags(is_first, valid)
    # What the step closes over is not among the params.
    wanted = ClosedParams(every_leaf(traced.params.leaves), [False] * len(traced.params.closed_over))
    kept = led_to(traced.step, wanted, traced.shapes)
    flagged = beside_input(r._replace(step=traced.step, params=traced.params), Flags(**flags))
    last_bar, ys_bar = _bars(flagged, scalar_loss(loss), kept)
    windows = len(exact.norms)
    sums = _windowed(
        Carried(influence, rows, wanted, kept),
        Readout(traced, wanted, kept, ys_bar),
        flagged,
        last_bar,
        ys_bar,
        key,
        windows,
    )
    parts = jax.tree.map(lambda leaf: jnp.diff(leaf, axis=0, prepend=jnp.zeros_like(leaf[:1])), sums)
    parts = traced.like_params(parts)
    theirs = exact.contributions
    ratios = jax.vmap(tree_norm)(parts) / exact.norms
    return KeptContributions(parts, jax.vmap(cosine)(parts, theirs), ratios, exact.norms)


def _bars(flagged: Any, loss: Callable[..., Any], kept: Any) -> tuple[Any, Any]:
    """∂L/∂c_T, for the leaves that are kept, and ∂L/∂yₜ."""
    carry, ys = jax.lax.scan(
        lambda carry, x: flagged.step(flagged.params, carry, x), flagged.init, flagged.xs, length=flagged.length
    )
    diff, nondiff = partition((carry, ys), flags=(kept, every_leaf(ys)))
    return jax.grad(lambda diff: loss(*combine(diff, nondiff)))(diff)


def _windowed(carried: Carried, read: Readout, flagged: Any, last_bar: Any, ys_bar: Any, key: Any, windows: int) -> Any:
    """The estimates in which a loss reaches back 1, 2 … `windows` steps, stacked."""
    own, *resets = flagged.params
    reads = read.reads(own, flagged.init, at_one_step(flagged.xs)[0])

    def body(state, at_t):
        t, carry, Ms, sums = state
        inputs, y_bar = at_t
        valid = inputs[2]
        step_key = None if key is None else jax.random.fold_in(key, t)
        _, entered, old, x = entering((), carry, inputs, resets)
        new, _ = read.traced.step(own, old, x)
        own_bar, old_bar, new_bar = read.pull(own, old, x, new, present(valid, y_bar))

        def of_window(M, sums):
            M = entering(M, carry, inputs, resets)[0]
            if reads.params:
                sums = carried.add(sums, own_bar)
            if reads.old_carry:
                sums = carried.add_pulled(sums, M, old_bar)
            M = taken(valid, carried.advance(own, M, old, x, step_key), M)
            return M, carried.add_pulled(sums, M, new_bar) if reads.new_carry else sums

        # Each window has, one step later, what the next shorter one has had.
        before = jax.tree.map(lambda leaf: jnp.concatenate([jnp.zeros_like(leaf[:1]), leaf[:-1]]), Ms)
        Ms, sums = jax.vmap(of_window)(before, sums)
        return (t + 1, taken(valid, new, entered), Ms, sums), None

    x = jax.tree.map(lambda leaf: leaf[0], flagged.xs[0])

    def stacked(tree):
        return jax.tree.map(lambda leaf: jnp.zeros((windows, *leaf.shape), leaf.dtype), tree)

    start = (
        jnp.zeros((), jnp.int32),
        flagged.init,
        stacked(carried.init(own, flagged.init, x)),
        stacked(carried.nothing(own)),
    )
    (_, _, Ms, sums), _ = jax.lax.scan(body, start, (flagged.xs, ys_bar), length=flagged.length)
    sums = jax.vmap(lambda sums, M: carried.add_pulled(sums, M, last_bar))(sums, Ms)
    return jax.vmap(lambda sums: carried.finish(sums, own))(sums)
