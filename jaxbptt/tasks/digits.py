r"""Handwritten digits, read one row or one pixel at a time: a real problem that needs no download.

The images come with scikit-learn, which is in the extra `tasks` and imported only when they are asked for.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import check_count
from jaxbptt.html_table import fields_table
from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.task import Sequences, Task, checked, last_step
from jaxbptt.words import install_command


class Digits(NamedTuple):
    """Images to train on, and images to test on.

    Attributes:
        train: the task; it draws training images, with replacement.
        test: all test images, as one batch.
    """

    train: Task
    test: Sequences

    _repr_html_ = fields_table


def digits(*, by: Literal["rows", "pixels"] = "rows", seed: int = 0) -> Digits:
    r"""Say which digit an image of 8 × 8 pixels shows, after reading it row by row or pixel by pixel.

    1,797 images in a random order, the first 359 (20 %) for the test and 1,438 for training. Pixels are 0 to 1, in 17
    shades, from the top left, along the rows. `xs` are 8 steps of 8 features or 64 steps of 1; `ys` is the class at every
    step, but only the last one counts.

    Baseline: a guess without looking at the image. The classes are about equally frequent, so log 10.

    Args:
        by: "rows" or "pixels", what a step reads.
        seed: of the order; the same split for the same seed.

    Returns:
        `train`, a task with cross-entropy, 8 or 1 inputs and 10 classes; `test`, the test images.

    Raises:
        ValueError: `by` of another name, a seed that is not a whole number.
        InputError: scikit-learn is not installed.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> train, test = tasks.digits(by="rows")
        >>> train.sample(jax.random.key(0), 32).xs.shape, test.xs.shape
        ((8, 32, 8), (8, 359, 8))

    References:
        Alpaydin and Kaynak, Optical recognition of handwritten digits, 1998, doi:10.24432/C50P49; pixel by pixel: Le, Jaitly
        and Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015, arXiv:1504.00941.
    """
    if by not in ("rows", "pixels"):
        raise ValueError(f"by is {by!r}, but an image is read by 'rows' or by 'pixels'.")
    check_count("seed", seed, "it orders the images", least=0)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(f"The digits come with scikit-learn: {install_command('tasks')}") from None
    features = 8 if by == "rows" else 1
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    xs = (images[order] / 16).astype(np.float32).reshape(len(images), -1, features).swapaxes(0, 1)
    classes = classes[order].astype(np.int32)
    ys = np.repeat(classes[None], len(xs), axis=0)
    held_out = round(len(images) / 5)

    def sample(key, batch):
        index = jax.random.randint(key, (batch,), held_out, len(images), jnp.int32)
        return Sequences(jnp.asarray(xs)[:, index], jnp.asarray(ys)[:, index], last_step(len(xs), batch))

    train = Task(checked(sample), "cross_entropy", math.log(10), features, 10)
    test = Sequences(jnp.asarray(xs[:, :held_out]), jnp.asarray(ys[:, :held_out]), last_step(len(xs), held_out))
    return Digits(train, test)
