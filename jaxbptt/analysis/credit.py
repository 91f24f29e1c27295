r"""Credit by lag: how far back the gradient comes from, what truncation costs, and which inputs it reaches.

Everything uses the same backward steps as the strategies in `scans`: one forward pass that saves residuals, and then
`Adjoint.backward` on them, for all time steps at once or for many truncation lengths at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxbptt.analysis.backward_passes import gradients, map_over_lags, unroll
from jaxbptt.analysis.norms import cosine, norm_over_time, tree_norm
from jaxbptt.arrays import as_numpy, check_callable, check_concrete, check_count
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import columns_table, fields_table
from jaxbptt.scans.flags import Flags
from jaxbptt.trees import combine, differentiable
from jaxbptt.words import counted


class LagContributions(NamedTuple):
    """The gradient by lag: what paths of each length, from a loss term back to a use of the weights, add to it.

    Attributes:
        contributions: G⁽ˡ⁾, like the params, leaves `[lag, *leaf]`; over all lags they sum to ∂L/∂params.
        gradient: ∂L/∂params, by a backward pass of its own.
        norms: ‖G⁽ˡ⁾‖ over all leaves, `[lag]`.
        relative_errors: ‖Σₖ G⁽ᵏ⁾ − ∂L/∂params‖ / ‖∂L/∂params‖ with the lags k ≤ l, `[lag]`.
        cosines: of the angle between Σₖ G⁽ᵏ⁾, k ≤ l, and ∂L/∂params, `[lag]`.
    """

    contributions: Any
    gradient: Any
    norms: Float[Array, " lag"]
    relative_errors: Float[Array, " lag"]
    cosines: Float[Array, " lag"]

    def _repr_html_(self) -> str:
        columns = {"norm": self.norms, "relative error up to it": self.relative_errors, "cosine up to it": self.cosines}
        return columns_table(self, {"lag, time steps": range(len(self.norms))} | columns)


class BiasCurve(NamedTuple):
    """How far a truncated gradient g_K is from the exact g, for several truncation lengths K.

    Attributes:
        relative_errors: ‖g_K − g‖ / ‖g‖ over all leaves, `[k]`.
        cosines: of the angle between g_K and g, `[k]`.
    """

    relative_errors: Float[Array, " k"]
    cosines: Float[Array, " k"]

    _repr_html_ = fields_table


class TruncationBias(NamedTuple):
    """The bias of truncated BPTT, of both kinds.

    Attributes:
        lengths: K, time steps, `[k]`.
        windowed: of `windowed_scan(window=K)`.
        truncated: of `truncated_scan(truncation_length=K)`.
    """

    lengths: Int[Array, " k"]
    windowed: BiasCurve
    truncated: BiasCurve

    def _repr_html_(self) -> str:
        columns = {
            f"{kind}, {what}": numbers
            for kind, curve in (("windowed", self.windowed), ("truncated", self.truncated))
            for what, numbers in (("relative error", curve.relative_errors), ("cosine", curve.cosines))
        }
        return columns_table(self, {"K, time steps": self.lengths} | columns)


def lag_contributions(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    max_lag: int | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> LagContributions:
    r"""Split the gradient by lag: by how many time steps before the loss the weights were used.

    G⁽ˡ⁾ = Σₜ (∂⁺hₜ₋ₗ/∂θ)ᵀ Aₗ[t],  A₀[t] = aₜ,  Aₗ₊₁[t] = Jₜ₋ₗᵀ Aₗ[t]

    A scan over the lag, with all t at once. Σₗ G⁽ˡ⁾ = ∂L/∂θ; the sum of the first W is BPTT with a window of W steps.
    Time O(L) gradients for L lags, memory O(T n + L p).

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀, any pytree of arrays.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        max_lag: the longest lag; T − 1, for all of them, by default.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, as for `scan`: where a new sequence begins, no credit passes to what is before.
        valid: booleans `[time, *batch]`, as for `scan`: a padded step contributes nothing, but counts
            in the lag, as it does in the window of `windowed_scan`.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        `LagContributions`, with `max_lag + 1` entries; non-differentiable leaves are `None`.

    Raises:
        ValueError: `max_lag` below 0 or above T − 1; as for `scan`.

    Example:
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> lags = bptt.lag_contributions(power, 0.2, 0.9, None, lambda h, ys: ys[-1], length=3)
        >>> print(lags.contributions.round(4))  # w² h₀ for each of the three uses of w
        [0.036 0.036 0.036]
        >>> print([f"{error:.2f}" for error in lags.relative_errors])
        ['0.67', '0.33', '0.00']

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    check_callable("loss", loss, "loss(carry, ys) -> scalar")
    u = unroll(step, params, init, xs, loss, length, Flags(is_first, valid, reset_carry))
    longest = u.length - 1 if max_lag is None else max_lag
    meaning = f"a sequence of {counted(u.length, 'time step')} has lags 0 to {u.length - 1}"
    check_count("max_lag", longest, meaning, least=0, most=u.length - 1)
    gradient = gradients(u, u.length)[0]

    def measure(contribution, partial_sum):
        return (contribution, tree_norm(contribution), *_distance(partial_sum, gradient))

    contributions, *measures = map_over_lags(u, longest + 1, measure)
    return LagContributions(contributions, gradient, *measures)


def truncation_bias(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    lengths: Sequence[int] | Int[np.ndarray, " k"] | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> TruncationBias:
    r"""How biased truncated BPTT is on this sequence, for every truncation length at once and both kinds of cut.

    ‖g_K − g‖ / ‖g‖ and the cosine of g_K and g,  K = 1 … T

    Windowed: g_K is the sum of the contributions of the lags below K, so one scan over the lag gives all K. Truncated: one
    backward pass for each K, several in parallel, after one forward pass. Time of about one gradient for each length, plus
    max K for the windows; memory O(T n + p), a few times.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree; the bias is that of their gradient.
        init: c₀, any pytree of arrays.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        lengths: K, time steps from 1 to T; all of them by default.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, as for `scan`: where a new sequence begins, no credit passes to what is before.
        valid: booleans `[time, *batch]`, as for `scan`: a padded step contributes nothing, but counts in
            K, as it does in `windowed_scan` and `truncated_scan`.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        `TruncationBias`; nan throughout where the exact gradient is 0.

    Raises:
        ValueError: a K outside 1 … T; as for `scan`.

    Example:
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> bias = bptt.truncation_bias(power, 0.2, 0.9, None, lambda h, ys: ys[-1], length=3)
        >>> print([f"{error:.2f}" for error in bias.windowed.relative_errors])
        ['0.67', '0.33', '0.00']
        >>> print([f"{error:.2f}" for error in bias.truncated.relative_errors])  # K = 2 cuts before the last step
        ['0.67', '0.67', '0.00']

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    check_callable("loss", loss, "loss(carry, ys) -> scalar")
    u = unroll(step, params, init, xs, loss, length, Flags(is_first, valid, reset_carry))
    check_concrete("truncation_bias", lengths=lengths)
    chosen = np.arange(1, u.length + 1) if lengths is None else np.atleast_1d(as_numpy(lengths))
    if (
        not np.issubdtype(chosen.dtype, np.integer)
        or chosen.ndim > 1
        or not chosen.size
        or chosen.min() < 1
        or chosen.max() > u.length
    ):
        raise ValueError(
            f"lengths is {lengths!r}, but {counted(u.length, 'time step')} can be cut every 1 to {u.length} of them."
        )
    gradient = gradients(u, u.length)[0]
    windowed = map_over_lags(u, int(chosen.max()), lambda _, partial_sum: _distance(partial_sum, gradient))
    lengths_array = jnp.asarray(chosen)
    truncated = u.map(lambda K: _distance(gradients(u, K)[0], gradient), lengths_array)
    return TruncationBias(
        lengths_array, BiasCurve(*(curve[lengths_array - 1] for curve in windowed)), BiasCurve(*truncated)
    )


def input_saliency(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    losses: Callable[..., Any],
    *,
    steps: Sequence[int] | Int[np.ndarray, " chosen"] | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> Float[Array, "chosen time"]:
    r"""Which past input mattered, for the loss of each step on its own.

    ‖∂Lₜ/∂xₛ‖,  s = 1 … T, for chosen t

    One forward pass, and a backward pass for each t, several in parallel. Time O(T) steps for each t, memory O(T n).

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: any pytree.
        init: c₀, any pytree of arrays.
        xs: inputs, differentiable leaves `[time, *batch, features]`; for tokens, their one-hot vectors or embeddings.
            The norm is taken over all axes but time.
        losses: `losses(carry, ys) -> [time]`, one loss for each step.
        steps: which entries of `losses`, from 0; all of them by default.
        is_first: booleans `[time, *batch]`, as for `scan`: where a new sequence begins, no credit passes to what is before.
        valid: booleans `[time, *batch]`, as for `scan`: an input in the padding matters not at all.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        `[chosen, time]`: entry [t, s] for the loss of step t and the input of step s; 0 where s comes after t.

    Raises:
        ValueError: non-differentiable inputs, `losses` that return no vector, steps outside it; as for `scan`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> leaky = lambda w, h, x: (w * h + x, w * h + x)
        >>> print(bptt.input_saliency(leaky, 0.5, 0.0, jnp.ones(3), lambda h, ys: ys))
        [[1.   0.   0.  ]
         [0.5  1.   0.  ]
         [0.25 0.5  1.  ]]

    References:
        Simonyan, Vedaldi and Zisserman, Deep inside convolutional networks: visualising image classification models and
        saliency maps, 2013, arXiv:1312.6034.
    """
    if not jax.tree.leaves(differentiable(xs)):
        raise ValueError(
            "xs has no differentiable leaf, so no gradient reaches it: pass one-hot vectors or embeddings as inputs, not "
            "integers."
        )
    check_callable("losses", losses, "losses(carry, ys) -> [time]")
    u = unroll(step, params, init, xs, None, None, Flags(is_first, valid, reset_carry))
    value, pull = jax.vjp(lambda outputs: losses(*combine(outputs, u.nondiff)), u.outputs)
    if jnp.ndim(value) != 1:
        raise ValueError(
            f"losses returned an array of shape {jnp.shape(value)}: return one loss for each step, [time]."
        )
    check_concrete("input_saliency", steps=steps)
    chosen = np.arange(len(value)) if steps is None else np.atleast_1d(as_numpy(steps))
    if chosen.ndim > 1 or not np.issubdtype(chosen.dtype, np.integer) or ((chosen < 0) | (chosen >= len(value))).any():
        raise ValueError(f"steps is {steps!r}, but there are losses 0 to {len(value) - 1}.")

    def saliency(t):
        (bars,) = pull(jnp.zeros_like(value).at[t].set(1))
        return norm_over_time(gradients(u._replace(bars=bars), u.length)[1])

    return u.map(saliency, jnp.asarray(chosen))


def _distance(gradient: Any, exact: Any) -> tuple[Array, Array]:
    """Relative norm of the difference, and cosine."""
    exact = jax.tree.map(lambda a, b: b.astype(a.dtype), gradient, exact)
    difference = jax.tree.map(jnp.subtract, gradient, exact)
    return tree_norm(difference) / tree_norm(exact), cosine(gradient, exact)
