r"""Losses over time, on optax's: per step or at the last step only, with masks for sequences that end early.

A masked step is left out before the loss is computed, not multiplied by zero afterwards, so whatever is in the padding,
nan included, changes neither value nor gradient. Outputs in half precision are converted to float32 first, and the loss is
rounded to their dtype at the end: sums and counts over thousands of steps overflow float16 and lose digits in bfloat16.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from jaxbptt.arrays import as_array, at_least_float32, check_callable, check_count

Reduction = Literal["mean", "sum"]


def cross_entropy(
    logits: Float[ArrayLike, "time *batch classes"],
    labels: Any,
    *,
    mask: Any = None,
    ignore_label: int | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    r"""Softmax cross-entropy at each step, over the valid steps.

    Lₜ = −Σ_c ŷₜ,c log softmax(yₜ)_c,  L = mean (or Σ) of Lₜ over valid steps and batch

    Args:
        logits: yₜ, `[time, *batch, classes]`.
        labels: class numbers `[time, *batch]` from 0 on, or distributions ŷₜ over classes with the shape of `logits`.
        mask: boolean `[time, *batch]`, True where a step counts; all of them by default.
        ignore_label: the class number of steps that don't count, such as −1 or −100 in data made for other libraries.
        reduction: `"mean"` over valid steps, or `"sum"`, the Σₜ of the textbook.

    Returns:
        The loss in nats, in the dtype of `logits`; 0 where no step is valid. A label that is negative or not a class of
        `logits`, at a step that counts, makes it nan, and the gradient of that step too.

    Raises:
        ValueError: shapes that don't fit, logits without classes, an `ignore_label` that the labels can't hold, another
            `reduction`.
        TypeError: a mask that is not boolean; arguments that are not arrays of real numbers.

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
    _check_reduction(reduction)
    logits = _outputs("logits", logits, "[time, *batch, classes]")
    labels = _real("labels", labels, "[time, *batch] of class numbers")
    by_number = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:-1] if by_number else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"labels have shape {labels.shape}, but logits have {logits.shape}: pass class numbers (integers) of shape "
            f"{logits.shape[:-1]}, or distributions (floats) of shape {logits.shape}."
        )
    if logits.ndim == 1 and not by_number:
        raise ValueError(
            f"logits and labels both have shape {logits.shape}: without class numbers it can't be told whether the axis is "
            "time or classes. Give them [time, classes], a single step as [1, classes]."
        )
    mask = _check_mask(mask, logits.shape[:-1])
    if ignore_label is not None:
        mask = mask & (labels != _check_ignored(ignore_label, labels.dtype))
    classes = logits.shape[-1]
    dtype = logits.dtype
    logits = jnp.where(mask[..., None], logits.astype(at_least_float32(dtype)), 0)
    if by_number:
        labels = jnp.where(mask, labels, 0)
        # Compared within the labels' own range: a larger bound would wrap around in a narrow integer dtype.
        known = (labels >= 0) & (labels <= min(classes - 1, jnp.iinfo(labels.dtype).max))
        per_step = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, labels, 0))
        # A product, not jnp.where, so that the gradient is nan as well.
        per_step = per_step * jnp.where(known, 1, jnp.nan).astype(per_step.dtype)
    else:
        labels = jnp.where(mask[..., None], labels.astype(logits.dtype), 1 / classes)
        per_step = optax.softmax_cross_entropy(logits, labels)
    return _reduce(per_step, mask, reduction).astype(dtype)


def mean_squared_error(
    outputs: Float[ArrayLike, "time *batch features"],
    targets: Any,
    *,
    mask: Any = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    r"""Squared error at each step, averaged over features, over the valid steps.

    Lₜ = mean_f (yₜ,f − ŷₜ,f)²,  L = mean (or Σ) of Lₜ over valid steps and batch

    With a mask of single features, such as those that were observed, L is the mean over the features that count, or their
    Σ over the number of features of a step.

    Args:
        outputs: yₜ, `[time, *batch, features]`.
        targets: ŷₜ, of the same shape.
        mask: boolean `[time, *batch]`, True where a step counts, or `[time, *batch, features]`; all of them by default.
        reduction: `"mean"` over valid steps, or `"sum"`, the Σₜ of the textbook.

    Returns:
        The loss, in squared units of the targets and the dtype of `outputs`; 0 where no step is valid.

    Raises:
        ValueError: shapes that don't fit, outputs without features, another `reduction`.
        TypeError: a mask that is not boolean; arguments that are not arrays of real numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import losses
        >>> print(losses.mean_squared_error(jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])))
        2.5
    """
    _check_reduction(reduction)
    outputs = _outputs("outputs", outputs, "[time, *batch, features]")
    targets = _real("targets", targets, "[time, *batch, features]")
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets have shape {targets.shape}, but outputs have {outputs.shape}: they must be the same."
        )
    of_features = getattr(mask, "ndim", None) == outputs.ndim
    mask = _check_mask(mask, outputs.shape if of_features else outputs.shape[:-1])
    wide = at_least_float32(outputs.dtype)
    counts = mask if of_features else mask[..., None]
    errors = optax.squared_error(jnp.where(counts, outputs.astype(wide) - targets.astype(wide), 0))
    if not of_features:
        errors = errors.mean(axis=-1)
    elif reduction == "sum":
        errors = errors / errors.shape[-1]
    return _reduce(errors, mask, reduction).astype(outputs.dtype)


def final_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    r"""The same loss on the last step only, to classify whole sequences; with a mask, on each row's last valid step.

    L = L_τ(y_τ, ŷ_τ),  τ = T, or the last t whose mask is True

    Args:
        loss: `cross_entropy`, `mean_squared_error`, or another of the same signature.

    Returns:
        `final_loss(outputs, targets, *, mask=None, **options)`. `targets` may have a time axis, as for `loss`, or be those
        of the last step alone, without one. Rows without a valid step don't count.

    Raises:
        ValueError: from the returned function, shapes that don't fit.
        TypeError: a loss that is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import losses
        >>> last = losses.final_step(losses.mean_squared_error)
        >>> print(last(jnp.array([[5.0], [3.0]]), jnp.array([1.0])))
        4.0
    """
    check_callable("loss", loss, "losses.cross_entropy, or another of that signature")

    def final_loss(outputs, targets, *, mask=None, **options):
        outputs = as_array("outputs", outputs, "[time, *batch, features]")
        targets = as_array("targets", targets, "[time, ...]")
        if not outputs.shape or outputs.shape[0] == 0:
            raise ValueError(
                f"outputs have shape {outputs.shape}, but final_step needs at least one time step, on the first axis."
            )
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
    """Whether targets have a time axis where shapes alone don't tell, time and batch being equally long."""
    if targets.shape == outputs.shape:
        return True
    # [time, batch] of integers are class numbers of every step; of floats, [batch, features] of the last step.
    return targets.shape == outputs.shape[:-1] and bool(jnp.issubdtype(targets.dtype, jnp.integer))


def _outputs(name: str, outputs: Any, expected: str) -> Array:
    outputs = _real(name, outputs, expected)
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(f"{name} have dtype {outputs.dtype}, but floating-point numbers are expected: convert them.")
    if outputs.ndim < 1 or outputs.shape[-1] == 0:
        raise ValueError(
            f"{name} have shape {outputs.shape}, but {expected} is expected, with at least one entry on the last axis."
        )
    return outputs


def _real(name: str, array: Any, expected: str) -> Array:
    array = as_array(name, array, expected)
    if jnp.iscomplexobj(array):
        raise TypeError(
            f"{name} have dtype {array.dtype}, but real numbers are expected: pass real and imaginary parts."
        )
    return array


def _check_ignored(ignore_label: Any, dtype: Any) -> int:
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"ignore_label is {ignore_label!r}, but labels of {dtype} are distributions, not class numbers: pass a mask."
        )
    least, most = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    meaning = f"labels of {dtype} are from {least} to {most}"
    check_count("ignore_label", ignore_label, meaning, least, most, "pass a whole number they can hold, or a mask")
    return int(ignore_label)


def _check_reduction(reduction: Any) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, but only 'mean' and 'sum' are known.")


def _check_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    if mask is None:
        return jnp.ones(shape, bool)
    mask = as_array("mask", mask, "[time, *batch] of booleans")
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
    return total if reduction == "sum" else total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)
