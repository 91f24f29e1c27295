r"""State Jacobians, their products, and the gradient computed from them: the chain rule through time, literally.

A third method of taking the gradient, independent of the backward scans: Jacobians come from forward mode, one dense matrix
a step, and are multiplied. It costs n times as much, and shows the Jacobians that the scans only multiply by.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxbptt.along_time import at_one_step, put_window, room
from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.operators import dense_jacobians
from jaxbptt.analysis.trajectory import Trajectory, state_size, state_vector, trajectory_of
from jaxbptt.arrays import at_least_float32, scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import combine, differentiable, partition, pull

# Numbers of J that are computed at once; more were no faster, and take a few times their memory beside J itself.
_AT_ONCE = 2**20


class ScaledProducts(NamedTuple):
    """Products of Jacobians that neither overflow nor underflow: ∂h_T/∂hₜ = exp(log_scales[t]) · matrices[t].

    Attributes:
        matrices: of Frobenius norm 1 (or 0, where the product is exactly 0).
        log_scales: natural logarithm of the Frobenius norm of the product.
    """

    matrices: Float[Array, "time n n"]
    log_scales: Float[Array, " time"]

    _repr_html_ = fields_table


class LogSingularValues(NamedTuple):
    """Natural logarithms of the singular values of products of Jacobians, largest first.

    Attributes:
        log_values: log σᵢ.
        resolved: False where rounding may have drowned σᵢ.
    """

    log_values: Float[Array, "*products n"]
    resolved: Bool[Array, "*products n"]

    _repr_html_ = fields_table


class TemporalContributions(NamedTuple):
    """What each time step adds to the gradient.

    Attributes:
        contributions: like the params, leaves `[time, *leaf]`; their sum over time is ∂L/∂params.
        adjoints: ∂L/∂cₜ through the steps after t, as flat state vectors `[time, n]`.
    """

    contributions: Any
    adjoints: Float[Array, "time n"]

    _repr_html_ = fields_table


def state_jacobians(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> tuple[Any, Float[Array, "time n n"]]:
    r"""Unroll a recurrence and take the Jacobian of every step.

    Jₜ = ∂cₜ/∂cₜ₋₁,  t = 1 … T

    by `jax.jacfwd`, mapped over time. Time O(T n · step), memory O(T n²): T n² numbers for J, and little beyond; for
    n = 1000 and T = 1000 in float32 that is 4 GB. The carry counts as one state vector, its leaves flattened in order (for
    an LSTM: h, then c), and should have no batch axis; use `jax.vmap` for a batch.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode: no `jax.custom_vjp` in it.
        params: any pytree, passed to every step.
        init: c₀; non-differentiable leaves (counters, keys) are carried along but are no part of the state vector.
        xs: inputs, leaves `[time, features]`, or `None`.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time]`, as for `scan`: where a new sequence begins, the carry before it counts for nothing,
            and Jₜ is 0.
        valid: booleans `[time]`, as for `scan`: a padded step holds the carry, and Jₜ is the identity.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        The carries c₁ … c_T, stacked on a leading time axis, and J `[time, n, n]`: entry `[t]` of both is of the same step.

    Raises:
        ValueError, TypeError: as for `scan`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> rotate = lambda W, h, x: (W @ h, None)
        >>> hs, J = bptt.state_jacobians(rotate, jnp.array([[0.0, -1.0], [1.0, 0.0]]), jnp.ones(2), length=3)
        >>> hs.shape, J.shape
        ((3, 2), (3, 2, 2))
    """
    flags = Flags(is_first, valid, reset_carry)
    trajectory = trajectory_of(prepare(step, params, init, xs, length), flags)
    return trajectory.new_carries, _jacobians(trajectory)


def jacobian_products(J: Float[ArrayLike, "time n n"]) -> ScaledProducts:
    r"""Products of state Jacobians from the end of the sequence back to each step, scaled so that any T is safe.

    ∂h_T/∂hₜ = J_T J_{T−1} … J_{t+1},  t = 1 … T

    Order matters: later steps stand on the left. Entry `[t]` belongs to the same step as `J[t]`, so the last one is the
    identity, and ∂h_T/∂h₀ is the first one times `J[0]`. Each product is divided by its norm, whose logarithm is kept.
    Time O(T n³), memory O(T n²). Exact in the leading direction; see `product_log_singular_values` for the others.

    Args:
        J: Jacobians Jₜ = ∂hₜ/∂hₜ₋₁ in order of time, `[time, n, n]`.

    Returns:
        `ScaledProducts(matrices [time, n, n], log_scales [time])`, finite wherever J is; in float32 at least.

    Raises:
        ValueError: J not of shape `[time, n, n]`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> products = bptt.jacobian_products(jnp.full((10_000, 1, 1), 0.1))
        >>> print((products.log_scales[0] / jnp.log(10)).round())  # 0.1 to the power 9,999 is far below float range
        -9999.0
    """
    J = dense_jacobians(J)
    n = J.shape[1]

    def body(matrix, jacobian):
        # Both factors are scaled to at most 1 first: entries near the largest float would overflow in the sum.
        size = jnp.max(jnp.abs(jacobian), initial=0)
        size = jnp.where(size > 0, size, 1)
        product, growth = _normalise(matrix @ (jacobian / size))
        return product, (matrix, growth + jnp.log(size))

    identity, log_norm = _normalise(jnp.eye(n, dtype=J.dtype))
    _, (matrices, growth) = jax.lax.scan(body, identity, J, reverse=True)
    # growth[t] is what J[t] does to the product of the later ones. Summed at the end, and not in the loop, since a running
    # sum would gather a rounding error at every step.
    later = jnp.concatenate([growth[1:], jnp.broadcast_to(log_norm, growth[:1].shape)])
    return ScaledProducts(matrices, jax.lax.cumsum(later, reverse=True))


def product_log_singular_values(products: ScaledProducts) -> LogSingularValues:
    r"""Singular values of products of Jacobians, as logarithms, with a mask of those that can be trusted.

    log σᵢ(∂h_T/∂hₜ),  i = 1 … n

    Time O(T n³), memory O(T n²). A stored product holds its directions only relative to the largest: below
    n·eps·σ₁ for each factor its singular values are rounding noise, as are those of all products made from it; `resolved`
    is False there. `singular_values` resolves them, for chosen steps.

    Args:
        products: from `jacobian_products`.

    Returns:
        `LogSingularValues(log_values [time, n], resolved [time, n])`, largest first; −∞ where a value is exactly 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> J = jnp.tile(jnp.diag(jnp.array([1.0, 0.01])), (9, 1, 1))
        >>> bptt.product_log_singular_values(bptt.jacobian_products(J)).resolved[:, 1].tolist()
        [False, False, False, False, False, True, True, True, True]
    """
    if not isinstance(products, ScaledProducts):
        raise TypeError(f"products are a {type(products).__name__}: pass what jacobian_products(J) returned.")
    matrices = products.matrices
    sigma = jnp.linalg.svd(matrices.astype(at_least_float32(matrices.dtype)), compute_uv=False)
    steps, n = sigma.shape
    factors = jnp.arange(steps, 0, -1, dtype=sigma.dtype)  # each adds its rounding error
    floor = n * jnp.finfo(sigma.dtype).eps * factors[:, None] * sigma[:, :1]
    # A value that a product has lost is lost in all longer products made from it too, however large it looks there.
    resolved = jax.lax.cummin((sigma > floor).astype(jnp.int8), reverse=True).astype(bool)
    return LogSingularValues(jnp.log(sigma) + products.log_scales[:, None], resolved)


def temporal_contributions(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> TemporalContributions:
    r"""The terms of the chain rule through time: what the weights at each step contribute to the gradient.

    dL_T/dθ = Σₜ dL_T/dh_T · ∂h_T/∂hₜ · ∂⁺hₜ/∂θ,  ∂h_T/∂hₜ = J_T … J_{t+1}

    where ∂⁺ holds hₜ₋₁ fixed; a loss at several steps sums over them. The row vectors are multiplied through the dense
    Jacobians of `state_jacobians` from the right, so no product of matrices is formed. Time O(T n²) after O(T n · step)
    for the Jacobians, memory O(T (n² + p)): T copies of the params. `gradient_flow` gives the norms without them.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀, without batch axis.
        xs: inputs, leaves `[time, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time]`, as for `scan`: where a new sequence begins, the carry before it counts for nothing,
            and no term goes through it.
        valid: booleans `[time]`, as for `scan`: a padded step holds the carry, and contributes 0.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        `TemporalContributions`; non-differentiable leaves are `None`.

    Raises:
        ValueError, TypeError: as for `scan`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, None)
        >>> terms = bptt.temporal_contributions(power, 0.2, 0.9, None, lambda h, ys: h, length=3)
        >>> print(terms.contributions.round(4), f"{terms.contributions.sum():.3f}")  # together 3 w² h₀
        [0.036 0.036 0.036] 0.108

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063, eq. 5.
    """
    loss = scalar_loss(loss)
    r = prepare(step, params, init, xs, length)
    trajectory = trajectory_of(r, Flags(is_first, valid, reset_carry))
    r, carries = trajectory.recurrence, trajectory.carries
    diff, nondiff = partition((trajectory.last_carry, trajectory.ys))
    carry_bar, ys_bar = jax.grad(lambda diff: loss(*combine(diff, nondiff)))(diff)
    J = _jacobians(trajectory)

    def through_output(carry, x, y_bar):
        """(∂yₜ/∂cₜ₋₁)ᵀ ȳₜ, in forward mode."""
        flat, state_of = state_vector(carry)

        def weighted_output(flat):
            y = differentiable(r.step(r.params, state_of(flat), x)[1])
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, y_bar, y)), jnp.zeros((), flat.dtype))

        return jax.jacfwd(weighted_output)(flat)

    def body(adjoint, at_t):
        jacobian, immediate = at_t
        return adjoint @ jacobian + immediate, adjoint

    last_adjoint, unravel = ravel_pytree(carry_bar)
    immediate = jax.vmap(through_output)(carries, r.xs, ys_bar)
    _, adjoints = jax.lax.scan(body, last_adjoint, (J, immediate), reverse=True)

    own, *rest = r.params

    def term(at_t):
        carry, x, adjoint, y_bar = at_t
        (params_bar,) = pull(lambda params: r.step((params, *rest), carry, x), (own,), (unravel(adjoint), y_bar))
        return params_bar

    return TemporalContributions(jax.lax.map(term, (carries, r.xs, adjoints, ys_bar)), adjoints)


def _jacobians(trajectory: Trajectory) -> Array:
    r = trajectory.recurrence

    def jacobian(carry, x):
        flat, state_of = state_vector(carry)

        def next_state(flat):
            return state_vector(r.step(r.params, state_of(flat), x)[0])[0]

        return jax.jacfwd(next_state)(flat)

    size, _ = state_size(r.init)
    steps = max(_AT_ONCE // size**2, 1)
    if is_symbolic_dim(r.length) or steps >= r.length:
        return jax.vmap(jacobian)(*trajectory.at)
    # Written into the result a few steps at a time: the compiler, which makes other forms of J on the way, makes them of
    # these steps alone. The last ones begin earlier where they would not be as many, and are computed twice.
    starts = jnp.minimum(jnp.arange(0, r.length, steps), r.length - steps)
    at = jax.tree.map(lambda leaf: leaf[starts[:, None] + jnp.arange(steps)], trajectory.at)

    def body(J, inputs):
        start, at = inputs
        return put_window(J, jax.vmap(jacobian)(*at), start), None

    one = jax.eval_shape(jacobian, *at_one_step(trajectory.at))
    return jax.lax.scan(body, room(one, r.length), (starts, at))[0]


def _normalise(matrix: Array) -> tuple[Array, Array]:
    size = norm(matrix)
    size = jnp.where(size > 0, size, 1)
    return matrix / size, jnp.log(size)
