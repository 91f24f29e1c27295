r"""The linear recurrent unit: a diagonal complex recurrence, as pairs of real arrays, with its hand-written backward pass."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import at_least_float32, check_key, is_number
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Adjoint, Cell


class LRUParams(NamedTuple):
    """Weights of an LRU: `nu_log [hidden]`, `theta_log [hidden]`, `gamma_log [hidden]`; the complex `B [hidden, input]` and `C
    [output, hidden]` by real and imaginary part; `D [output]`, or `None` where y has not the size of x."""  # noqa: D205, D209

    nu_log: Float[Array, " hidden"]
    theta_log: Float[Array, " hidden"]
    gamma_log: Float[Array, " hidden"]
    B_re: Float[Array, "hidden input"]
    B_im: Float[Array, "hidden input"]
    C_re: Float[Array, "output hidden"]
    C_im: Float[Array, "output hidden"]
    D: Float[Array, " output"] | None


class LRUState(NamedTuple):
    """The carry of an LRU: real and imaginary part of h, each `[*batch, hidden]`."""

    re: Float[Array, "*batch hidden"]
    im: Float[Array, "*batch hidden"]


def lru(
    input_size: int,
    hidden_size: int,
    *,
    output_size: int | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
) -> Cell:
    r"""A linear recurrent unit: each unit turns and shrinks its complex number by a fixed factor, and adds the input.

    λ = exp(−exp ν + i exp θ)
    hₜ = λ ⊙ hₜ₋₁ + exp(γ) ⊙ B xₜ
    yₜ = Re(C hₜ) + D ⊙ xₜ

    The params are the logarithms ν, θ and γ, so |λ| < 1 whatever training does to them. D ⊙ x is there where y has the size of
    x, as in the paper. A complex number is a pair of real arrays, which XLA compiles better. The recurrence is linear, and each
    unit has its own: what is not linear stands between layers. Time O(2 n (input + output)) a step; the backward pass keeps
    hₜ₋₁.

    Args:
        input_size: features of x.
        hidden_size: n complex numbers in the state.
        output_size: features of y; by default `hidden_size`, as in other cells. In the paper it is `input_size`.
        dtype: of the parameters and the carry: of the real and imaginary parts.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        r_min: of |λ| at the start: λ is drawn uniformly from the ring between the radii `r_min` and `r_max`.
        r_max: as `r_min`. A unit forgets over 1/(1 − |λ|) time steps, so long dependencies need it near 1.
        max_phase: largest angle of λ at the start, in radians per time step; a small one lets the units turn slowly.

    Returns:
        A `Cell` with `LRUParams`; its carry is an `LRUState(re, im)`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, radii that are not 0 ≤ r_min < r_max ≤ 1, a `max_phase`
            that is not above 0; at a step, params, a carry or an x that do not fit the sizes or each other.
        TypeError: a carry that is not an `LRUState`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.lru(input_size=3, hidden_size=5, r_min=0.9, r_max=0.999)
        >>> state, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry(), jax.numpy.ones(3))
        >>> state.re.shape, y.shape
        ((5,), (5,))

    References:
        Orvieto et al., Resurrecting recurrent neural networks for long sequences, 2023, arXiv:2303.06349; the start is that
        of appendix A.
    """
    output_size = hidden_size if output_size is None else output_size
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
    dense.check_dtype(dtype)
    if not (is_number(r_min, -math.inf) and is_number(r_max, -math.inf) and 0 <= r_min < r_max <= 1):
        raise ValueError(
            f"r_min is {r_min!r} and r_max {r_max!r}, but |λ| is drawn between them: pass 0 ≤ r_min < r_max ≤ 1."
        )
    if not is_number(max_phase, 0):
        raise ValueError(f"max_phase is {max_phase!r}, but it is the largest angle, in radians: pass a number above 0.")
    units, of_input, of_output = (hidden_size,), (hidden_size, input_size), (output_size, hidden_size)
    shapes = {"nu_log": units, "theta_log": units, "gamma_log": units}
    shapes |= {"B_re": of_input, "B_im": of_input, "C_re": of_output, "C_im": of_output}
    if output_size == input_size:
        shapes["D"] = (output_size,)
    products = dense.products(compute_dtype)

    def init(key: Array) -> LRUParams:
        check_key(key)
        drawn = at_least_float32(dtype)
        keys = jax.random.split(key, 7)
        # Not 0, where the logarithms have no value.
        u, phase = (jax.random.uniform(k, units, drawn, jnp.finfo(drawn).eps, 1.0) for k in keys[:2])
        # |λ|² is uniform between the squares of the radii, which is uniform over the area of the ring.
        nu_log = jnp.log(-0.5 * jnp.log(r_min**2 + u * (r_max**2 - r_min**2)))
        # 1 − |λ|² by expm1, since it may be tiny.
        gamma_log = 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_log)))
        B_re, B_im = (jax.random.normal(k, of_input, drawn) / math.sqrt(2 * input_size) for k in keys[2:4])
        C_re, C_im = (jax.random.normal(k, of_output, drawn) / math.sqrt(hidden_size) for k in keys[4:6])
        D = jax.random.normal(keys[6], (output_size,), drawn) if "D" in shapes else None
        params = LRUParams(nu_log, jnp.log(max_phase * phase), gamma_log, B_re, B_im, C_re, C_im, D)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> LRUState:
        re, im = (dense.zeros(batch_shape, hidden_size, dtype) for _ in range(2))
        return LRUState(re, im)

    def factor(params):
        """Real and imaginary part of λ."""
        radius, phase = jnp.exp(-jnp.exp(params.nu_log)), jnp.exp(params.theta_log)
        return radius * jnp.cos(phase), radius * jnp.sin(phase)

    def along(leaf, rows):
        return jnp.expand_dims(leaf, range(rows.ndim - 1))

    def moved(params, state, x):
        """The new state, and x as an array."""
        if not (hasattr(state, "re") and hasattr(state, "im")):
            found = f"an array {state.shape}" if hasattr(state, "shape") else type(state).__name__
            raise TypeError(
                f"lru: the carry is {found}, but an LRUState(re, im) is expected: make it with "
                "cell.initial_carry(batch_shape)."
            )
        states = {"carry.re": state.re, "carry.im": state.im}
        x = dense.check_step("lru", params, shapes, (input_size, hidden_size), x, **states)
        a, b, scale = (along(leaf, state.re) for leaf in (*factor(params), jnp.exp(params.gamma_log)))
        re = a * state.re - b * state.im + scale * products.linear(params.B_re, x)
        im = b * state.re + a * state.im + scale * products.linear(params.B_im, x)
        return LRUState(re, im), x

    def step(params, state, x):
        state, x = moved(params, state, x)
        y = products.linear(params.C_re, state.re) - products.linear(params.C_im, state.im)
        return state, y if params.D is None else y + along(params.D, x) * x

    def forward(params, state, x):
        return step(params, state, x), state

    def backward(params, residuals, x, state_bar, y_bar):
        a, b = (along(leaf, state_bar.re) for leaf in factor(params))
        re_bar = state_bar.re + products.back(y_bar, params.C_re)
        im_bar = state_bar.im - products.back(y_bar, params.C_im)
        return LRUState(a * re_bar + b * im_bar, a * im_bar - b * re_bar), LRUState(re_bar, im_bar)

    def contract(params, state, xs, ys_bar, deltas):
        a, b = factor(params)
        scale = jnp.exp(params.gamma_log)
        a_bar = dense.sum_rows(deltas.re * state.re + deltas.im * state.im)
        b_bar = dense.sum_rows(deltas.im * state.re - deltas.re * state.im)
        with_x_re, with_x_im = (products.weight_gradient(delta, xs) for delta in deltas)
        # Σ ȳₜ hₜᵀ from hₜ₋₁ and xₜ, of which hₜ is made: the states after the steps are not saved.
        y_re, y_im, y_x = (products.weight_gradient(ys_bar, inputs) for inputs in (state.re, state.im, xs))
        params_bar = LRUParams(
            nu_log=-jnp.exp(params.nu_log) * (a * a_bar + b * b_bar),
            theta_log=jnp.exp(params.theta_log) * (a * b_bar - b * a_bar),
            gamma_log=scale * jnp.sum(params.B_re * with_x_re + params.B_im * with_x_im, axis=1),
            B_re=scale[:, None] * with_x_re,
            B_im=scale[:, None] * with_x_im,
            C_re=y_re * a[None] - y_im * b[None] + products.linear(params.B_re, y_x) * scale[None],
            C_im=-(y_re * b[None] + y_im * a[None] + products.linear(params.B_im, y_x) * scale[None]),
            D=None if params.D is None else dense.sum_rows(ys_bar * xs),
        )
        B_re, B_im = scale[:, None] * params.B_re, scale[:, None] * params.B_im
        xs_bar = products.back(deltas.re, B_re) + products.back(deltas.im, B_im)
        return params_bar, xs_bar if params.D is None else xs_bar + along(params.D, xs) * ys_bar

    step = dense.with_sizes(step, input_size, output_size)
    return Cell(init, initial_carry, step, Adjoint(forward, backward, contract))
