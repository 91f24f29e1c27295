r"""The next character of a text: real sequences with structure at every range, in the form of the other tasks."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.tasks.files import InputError, Series, read_standard_library
from jaxbptt.tasks.task import Sequences, Task, check_size, checked
from jaxbptt.words import counted


def characters(series: Series | None = None, *, steps: int) -> Task:
    r"""Predict the next character of a text, in sequences that start anywhere in it.

    xs[t] = one-hot cₜ,  ys[t] = c_{t+1}

    Every step counts.

    Baseline: each character with its frequency p in the text, regardless of the context: −Σ_c p_c log p_c, the entropy of
    single characters.

    Args:
        series: a text, from `read_text`; Python's own source by default, see `read_standard_library`.
        steps: length of the sequences.

    Returns:
        A task with cross-entropy, and as many inputs and classes as the text has symbols.

    Raises:
        InputError: a series of numbers, or a text that is shorter than `steps` + 1.
        ValueError: fewer than 1 step.
        TypeError: steps that are not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> xs, ys, mask = tasks.characters(steps=20).sample(jax.random.key(0), 2)
        >>> symbols = tasks.read_standard_library().symbols
        >>> bool((xs[1:].argmax(-1) == ys[:-1]).all()), xs.shape[-1] == len(symbols)
        (True, True)

    References:
        Shannon, Prediction and entropy of printed English, 1951, doi:10.1002/j.1538-7305.1951.tb01366.x.
    """
    series = read_standard_library() if series is None else series
    check_size("steps", steps, 1, "there must be a step to predict")
    if not isinstance(series, Series):
        raise TypeError(f"series is a {type(series).__name__}, but a text is expected: read it with tasks.read_text.")
    if not series.symbols:
        raise InputError(f"{series.name} holds numbers, but characters needs a text: read it with read_text.")
    text = np.asarray(series.values, np.int32)
    if len(text) < steps + 1:
        raise InputError(
            f"{series.name} has {counted(len(text), 'character')}, but steps={steps:,} needs {steps + 1:,}, one more to "
            f"predict. Use a longer text or fewer steps."
        )
    frequencies = np.bincount(text) / len(text)
    frequencies = frequencies[frequencies > 0]
    classes = len(series.symbols)

    def sample(key, batch):
        starts = jax.random.randint(key, (batch,), 0, len(text) - steps, jnp.int32)
        time = jnp.arange(steps + 1, dtype=jnp.int32)[:, None]
        numbers = jnp.asarray(text)[starts[None] + time]
        xs = jax.nn.one_hot(numbers[:-1], classes, dtype=jnp.float32)
        return Sequences(xs, numbers[1:], jnp.ones((steps, batch), bool))

    return Task(checked(sample), "cross_entropy", float(-np.sum(frequencies * np.log(frequencies))), classes, classes)
