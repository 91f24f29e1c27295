r"""Backpropagation through time as a textbook writes it: the Elman network, softmax cross-entropy, every quantity by name.

For reading and teaching, one line to an equation. `adjoint_scan` computes the same gradient for any step, and faster.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from jaxbptt.arrays import as_array, at_least_float32
from jaxbptt.cells.elman import ElmanParams
from jaxbptt.html_table import fields_table
from jaxbptt.network import NetworkParams


class TextbookBPTT(NamedTuple):
    """What a textbook's backward pass computes, with the textbook's names; leading axes are time.

    Attributes:
        loss: L = Σₜ Lₜ, in nats.
        hs: hₜ from h₁ on, `[time, hidden]`.
        ys: yₜ, the logits, `[time, output]`.
        dy: ∂L/∂yₜ, `[time, output]`.
        dh: ∂L/∂hₜ in full, `[time, hidden]`.
        dh_raw: ∂L/∂aₜ at the pre-activation, `[time, hidden]`.
        dW_hy: ∂L/∂W_hy, `[output, hidden]`.
        dW_hh: ∂L/∂W_hh, `[hidden, hidden]`.
        dW_xh: ∂L/∂W_xh, `[hidden, input]`.
        db: ∂L/∂b, `[hidden]`.
        dh_0: ∂L/∂h₀, `[hidden]`.
    """

    loss: Float[Array, ""]
    hs: Float[Array, "time hidden"]
    ys: Float[Array, "time output"]
    dy: Float[Array, "time output"]
    dh: Float[Array, "time hidden"]
    dh_raw: Float[Array, "time hidden"]
    dW_hy: Float[Array, "output hidden"]
    dW_hh: Float[Array, "hidden hidden"]
    dW_xh: Float[Array, "hidden input"]
    db: Float[Array, " hidden"]
    dh_0: Float[Array, " hidden"]

    _repr_html_ = fields_table

    @property
    def gradients(self) -> NetworkParams:
        """The weight gradients in the structure of the params, as `jax.grad` returns them."""
        return NetworkParams(ElmanParams(self.dW_xh, self.dW_hh, self.db), self.dW_hy)


def bptt(
    params: NetworkParams,
    xs: Float[ArrayLike, "time input"],
    h_0: Float[ArrayLike, " hidden"],
    targets: Int[ArrayLike, " time"] | Float[ArrayLike, "time output"],
) -> TextbookBPTT:
    r"""Manual BPTT for an Elman network with softmax cross-entropy at every step, summed over time.

    hₜ = tanh(W_hh hₜ₋₁ + W_xh xₜ + b),  yₜ = W_hy hₜ,  L = Σₜ −log softmax(yₜ)[ŷₜ]

    and backward, for t = T … 1:

    dyₜ = softmax(yₜ) − ŷₜ
    dhₜ = W_hyᵀ dyₜ + W_hhᵀ dh_rawₜ₊₁
    dh_rawₜ = dhₜ ⊙ (1 − hₜ²)
    dW_hy += dyₜ hₜᵀ,  dW_xh += dh_rawₜ xₜᵀ,  dW_hh += dh_rawₜ hₜ₋₁ᵀ,  db += dh_rawₜ

    Time O(T n²), memory O(T n), for one sequence; use `jax.vmap` for a batch.

    Args:
        params: of `network(elman(...), ...)`.
        xs: inputs, `[time, input]`.
        h_0: first state, `[hidden]`.
        targets: class numbers `[time]`, or distributions over classes `[time, output]`.

    Returns:
        A `TextbookBPTT` with everything named above, in float32 at least; `.gradients` has the structure of `params`.

    Raises:
        ValueError: shapes that do not fit together, a read-out with a bias.
        TypeError: params of something else, arguments that are not arrays of numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(3, 4)
        >>> net = bptt.network(cell, 3)
        >>> params, xs, targets = net.init(jax.random.key(0)), jnp.eye(3), jnp.array([1, 2, 0])
        >>> result = bptt.bptt(params, xs, cell.initial_carry(), targets)
        >>> def loss(params):
        ...     _, ys = net.apply(params, cell.initial_carry(), xs)
        ...     return bptt.losses.cross_entropy(ys, targets, reduction="sum")
        >>> bptt.compare_gradients(result.gradients, jax.grad(loss)(params)).agrees
        True

    References:
        Rumelhart, Hinton and Williams, Learning internal representations by error propagation, 1986; Werbos 1990,
        doi:10.1109/5.58337.
    """
    if not isinstance(params, NetworkParams) or not isinstance(params.cell, ElmanParams):
        raise TypeError(f"params are a {type(params).__name__}, but those of network(elman(...), ...) are expected.")
    if params.b_y is not None:
        raise ValueError("params have a bias b_y, but yₜ = W_hy hₜ here: make them with network(..., bias=False).")
    given = {**params.cell._asdict(), "W_hy": params.W_hy, "xs": xs, "h_0": h_0}
    arrays = [as_array(name, leaf, "an array") for name, leaf in given.items()]
    W_xh, W_hh, b, W_hy, xs, h_0 = (leaf.astype(at_least_float32(leaf.dtype)) for leaf in arrays)
    targets = as_array("targets", targets, "class numbers [time]")
    _check(xs, h_0, targets, W_xh, W_hy)
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, W_hy.shape[0], dtype=h_0.dtype)

    def forward(h, x):
        h = jnp.tanh(W_hh @ h + W_xh @ x + b)
        return h, h

    _, hs = jax.lax.scan(forward, h_0, xs)
    ys = hs @ W_hy.T
    hs_prev = jnp.concatenate([h_0[None], hs])[:-1]

    def backward(carry, at_t):
        dh_next, dW_hy, dW_hh, dW_xh, db = carry
        x, h_prev, h, y, target = at_t
        dy = jax.nn.softmax(y) - target
        dW_hy = dW_hy + jnp.outer(dy, h)
        dh = W_hy.T @ dy + dh_next
        dh_raw = dh * (1 - h**2)
        dW_xh = dW_xh + jnp.outer(dh_raw, x)
        dW_hh = dW_hh + jnp.outer(dh_raw, h_prev)
        db = db + dh_raw
        return (W_hh.T @ dh_raw, dW_hy, dW_hh, dW_xh, db), (dy, dh, dh_raw)

    zeros: Any = tuple(jnp.zeros_like(leaf) for leaf in (h_0, W_hy, W_hh, W_xh, b))
    (dh_0, dW_hy, dW_hh, dW_xh, db), (dy, dh, dh_raw) = jax.lax.scan(
        backward, zeros, (xs, hs_prev, hs, ys, targets), reverse=True
    )
    loss = -jnp.sum(targets * jax.nn.log_softmax(ys))
    return TextbookBPTT(loss, hs, ys, dy, dh, dh_raw, dW_hy, dW_hh, dW_xh, db, dh_0)


def _check(xs: Any, h_0: Any, targets: Any, W_xh: Any, W_hy: Any) -> None:
    if W_xh.ndim != 2 or W_hy.ndim != 2:
        raise ValueError(f"W_xh has shape {W_xh.shape} and W_hy {W_hy.shape}, but matrices are expected.")
    hidden, features = W_xh.shape
    wanted = {
        "xs": (xs.shape, [(*xs.shape[:1], features)]),
        "h_0": (h_0.shape, [(hidden,)]),
        "targets": (targets.shape, [xs.shape[:1], (*xs.shape[:1], W_hy.shape[0])]),
    }
    for argument, (shape, allowed) in wanted.items():
        if shape not in allowed:
            raise ValueError(
                f"{argument} has shape {shape}, but the weights need {' or '.join(map(str, allowed))}. "
                "bptt takes one sequence; use jax.vmap for a batch."
            )
