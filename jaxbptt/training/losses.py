r"""Losses over time, on optax's: per step or at the last step only, with masks for sequences that end early.

A masked step is taken out before the loss is computed, not multiplied by zero after, so whatever stands in the padding,
nan included, changes neither value nor gradient.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

Reduction = Literal["mean", "sum"]


def cross_entropy(
    logits: Float[ArrayLike, "time *batch classes"],
    labels: Any,
    *,
    mask: Any = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    r"""Softmax cross-entropy at each step, over the valid steps.

    Lₜ = −Σ_c ŷₜ,c log softmax(yₜ)_c,  L = mean (or Σ) of Lₜ over valid steps and batch

    Args:
        logits: yₜ, `[time, *batch, classes]`.
        labels: class numbers `[time, *batch]`, or distributions ŷₜ over classes with the shape of `logits`.
        mask: boolean `[time, *batch]`, True where a step counts; all of them by default.
        reduction: `"mean"` over valid steps, or `"sum"`, the Σₜ of the textbook.

    Returns:
        The loss in nats; 0 where no step is valid.

    Raises:
        ValueError: shapes that do not fit, a reduction of another name.
        TypeError: a mask that is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import losses
        >>> logits = jnp.array([[0.0, 0.0], [jnp.nan, 9.0]])
        >>> print(losses.cross_entropy(logits, jnp.array([1, 0]), mask=jnp.array([True, False])).round(4))
        0.6931

    References:
        Bridle, Probabilistic interpretation of feedforward classification network outputs, 1990,
        doi:10.1007/978-3-642-76153-9_28.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    classes = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:-1] if classes else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"labels have shape {labels.shape}, but logits have {logits.shape}: pass class numbers (integers) of shape "
            f"{logits.shape[:-1]}, or distributions (floats) of shape {logits.shape}."
        )
    mask = _check_mask(mask, logits.shape[:-1])
    logits = jnp.where(mask[..., None], logits, 0)
    if classes:
        per_step = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(mask, labels, 0))
    else:
        labels = labels.astype(logits.dtype)
        per_step = optax.softmax_cross_entropy(logits, jnp.where(mask[..., None], labels, 1 / logits.shape[-1]))
    return _reduce(per_step, mask, reduction)


def mean_squared_error(
    outputs: Float[ArrayLike, "time *batch features"],
    targets: Any,
    *,
    mask: Any = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    r"""Squared error at each step, averaged over features, over the valid steps.

    Lₜ = mean_f (yₜ,f − ŷₜ,f)²,  L = mean (or Σ) of Lₜ over valid steps and batch

    Args:
        outputs: yₜ, `[time, *batch, features]`.
        targets: ŷₜ, of the same shape.
        mask: boolean `[time, *batch]`, True where a step counts; all of them by default.
        reduction: `"mean"` over valid steps, or `"sum"`, the Σₜ of the textbook.

    Returns:
        The loss, in squared units of the targets; 0 where no step is valid.

    Raises:
        ValueError: shapes that do not fit, a reduction of another name.
        TypeError: a mask that is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import losses
        >>> print(losses.mean_squared_error(jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])))
        2.5
    """
    outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets have shape {targets.shape}, but outputs have {outputs.shape}: they must be the same."
        )
    mask = _check_mask(mask, outputs.shape[:-1])
    difference = jnp.where(mask[..., None], outputs - targets.astype(outputs.dtype), 0)
    return _reduce(optax.squared_error(difference).mean(axis=-1), mask, reduction)


def final_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    r"""The same loss on the last step only, as for classifying a whole sequence; with a mask, on each row's last valid one.

    L = L_τ(y_τ, ŷ_τ),  τ = T, or the last t whose mask is True

    Args:
        loss: `cross_entropy`, `mean_squared_error`, or another of the same signature.

    Returns:
        `final_loss(outputs, targets, *, mask=None, **options)`. `targets` may have a time axis, as for `loss`, or be those
        of the last step alone, without one. Rows without a valid step do not count.

    Raises:
        ValueError: from the returned function, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import losses
        >>> last = losses.final_step(losses.mean_squared_error)
        >>> print(last(jnp.array([[5.0], [3.0]]), jnp.array([1.0])))
        4.0
    """

    def final_loss(outputs, targets, *, mask=None, **options):
        outputs, targets = jnp.asarray(outputs), jnp.asarray(targets)
        if outputs.shape[0] == 0:
            raise ValueError("final_step needs at least one time step, but outputs have none.")
        timeless = targets.shape in (outputs.shape[1:], outputs.shape[1:-1]) and not _is_per_step(targets, outputs)
        if not timeless and targets.shape[:1] != outputs.shape[:1]:
            raise ValueError(
                f"targets have shape {targets.shape}, but outputs have {outputs.shape}: pass targets of every step, "
                f"[{outputs.shape[0]}, ...], or of the last step alone, without an axis of time."
            )
        if mask is None:
            return loss(outputs[-1:], targets[None] if timeless else targets[-1:], **options)
        mask = _check_mask(mask, outputs.shape[:-1])
        # The last True of each row, counted from the end; a row without one gives T − 1 and is masked out.
        last = outputs.shape[0] - 1 - jnp.argmax(mask[::-1], axis=0)

        def pick(array):
            index = last.reshape((1, *last.shape, *(1,) * (array.ndim - 1 - last.ndim)))
            return jnp.take_along_axis(array, index, axis=0)

        targets = targets[None] if timeless else pick(targets)
        return loss(pick(outputs), targets, mask=mask.any(axis=0)[None], **options)

    return final_loss


def _is_per_step(targets: Array, outputs: Array) -> bool:
    """Where time and batch are as long as each other, shapes alone don't tell: class numbers of all steps are integers."""
    if targets.shape == outputs.shape:
        return True
    return targets.shape == outputs.shape[:-1] and bool(jnp.issubdtype(targets.dtype, jnp.integer))


def _check_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    if mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype}, but True and False are expected: pass mask.astype(bool).")
    if mask.shape != shape:
        raise ValueError(
            f"mask has shape {mask.shape}, but {shape} is expected, [time, *batch]: one entry for each step of each row. "
            "Broadcast a mask of time alone with jnp.broadcast_to."
        )
    return mask


def _reduce(per_step: Array, mask: Array, reduction: str) -> Array:
    total = jnp.sum(per_step, where=mask)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)
    raise ValueError(f"reduction is {reduction!r}, but only 'mean' and 'sum' are known.")
