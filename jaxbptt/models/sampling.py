r"""Text that a model writes: drawn byte by byte, of which any number make a character, and cut where a character ends."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import check_count, check_key, is_number
from jaxbptt.models.architecture import ModelNetwork
from jaxbptt.models.model import Model
from jaxbptt.tasks import InputError
from jaxbptt.tasks.mapped import is_utf8
from jaxbptt.tasks.vocabulary import Vocabulary

# Bytes that are read or drawn by one call of a compiled function, however long prompt and text are.
BLOCK = 64
# A temperature of 0 is told apart, and must not divide.
_LOWEST_TEMPERATURE = 1e-6


def sample(model: Model, prompt: str | None, *, length: int, temperature: float, key: Any) -> str:
    r"""Text that follows a prompt, drawn byte by byte from a model of text.

    bₜ ~ softmax(logitsₜ / temperature), and the network reads bₜ next; at temperature 0, bₜ = argmax logitsₜ

    Only bytes are drawn with which the text is UTF-8, where the training text was: so no character is left in halves,
    however little the model was trained. Otherwise bytes that are not UTF-8 become `"\ufffd"`.

    Costs one step of the network for each byte of the prompt and the text, in blocks of 64 by a function that is compiled
    once for a model.

    Args:
        model: what `load` returned, of a model of text.
        prompt: the text before; `None` for the end of the training data.
        length: characters to draw, as Python counts them.
        temperature: 1 draws as often as the model expects, less is more certain; 0 takes the likeliest byte each time.
        key: of `jax.random`. With the same key a shorter text is the beginning of a longer one.

    Returns:
        The text, without the prompt.

    Raises:
        InputError: a model of numbers; an empty prompt, one with characters that the model has never seen, which are named.
        ValueError: a length below 1, a temperature below 0.
        TypeError: no key.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> from jaxbptt import models, tasks
        >>> network = models.build(models.Architecture("gru", 8, 1, 4, 4, text=True))
        >>> letters = tasks.Vocabulary(tuple(b" abn"))
        >>> params, carry = network.init(jax.random.key(0)), network.cell.initial_carry()
        >>> model = models.Model(network, params, carry, letters, None, {"prompt": [1]}, {}, 0)
        >>> len(models.sample(model, "ban", length=20, temperature=0.8, key=jax.random.key(1)))
        20
    """
    if model.vocabulary is None:
        names = () if model.columns is None else model.columns.names
        raise InputError(
            f"This is a model of numbers ({', '.join(names[:5])}{', …' * (len(names) > 5)}), which has no text to sample: "
            "`python -m jaxbptt forecast` predicts what comes next."
        )
    check_count("length", length, "it counts characters")
    if temperature != 0 and not is_number(temperature, 0):
        raise ValueError(f"temperature is {temperature!r}, but it divides the logits: pass a number of at least 0.")
    check_key(key)
    end_of_training = np.asarray(model.settings["prompt"], np.int32)
    following = np.asarray(_following(model.vocabulary.symbols, end_of_training))
    given = end_of_training if prompt is None else _encoded(model.vocabulary, prompt, utf8=bool((following != 0).any()))
    state = model.carry, jnp.zeros_like(model.params.b_y), jnp.int32(0)
    # In float32 more would be infinite.
    heat = np.float32(min(float(temperature), float(np.finfo(np.float32).max)))
    drawn = np.zeros(0, np.int32)
    start = 0
    while True:
        block = np.full(BLOCK, -1, np.int32)
        part = given[start : start + BLOCK]
        block[: len(part)] = part
        state, symbols = _read_or_draw(model.network, model.params, state, block, np.int32(start), following, heat, key)
        drawn = np.append(drawn, np.asarray(symbols)[len(part) :])
        start += BLOCK
        if len(drawn) >= length and len(text := model.vocabulary.decode(drawn)) >= length:
            return text[:length]


def _encoded(vocabulary: Vocabulary, prompt: str, *, utf8: bool) -> np.ndarray:
    if not prompt:
        raise InputError("The prompt is empty: give at least one character, or none to continue the training data.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("The prompt is not UTF-8.") from None
    try:
        return vocabulary.encode(prompt)
    except InputError as error:
        if utf8 or prompt.isascii():
            raise
        raise InputError(
            f"{error} The prompt is read as UTF-8, and that text was in another encoding, so use ASCII characters only."
        ) from None


@partial(jax.jit, static_argnums=0)
def _read_or_draw(
    network: ModelNetwork,
    params: Any,
    state: Any,
    given: Any,
    start: Any,
    following: Any,
    temperature: Any,
    key: Any,
) -> tuple[Any, Any]:
    """One block of symbols: those given, and drawn ones where that is −1. `start` is how many there were before."""

    def step(state, at):
        carry, logits, place = state
        given, position = at
        allowed = following[place]
        logits = jnp.where(allowed >= 0, logits, -jnp.inf)
        heat = jnp.maximum(temperature, _LOWEST_TEMPERATURE).astype(logits.dtype)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits / heat)
        drawn = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(given.dtype)
        symbol = jnp.where(given >= 0, given, drawn)
        carry, h = network.cell.step(params.cell, carry, network.read(params, symbol))
        # The end of the training data may begin in the middle of a character, whose bytes lead nowhere.
        return (carry, network.readout(params, symbol, h), jnp.maximum(allowed[symbol], 0)), symbol

    return jax.lax.scan(step, state, (given, start + jnp.arange(BLOCK, dtype=start.dtype)))


# Places inside a character of UTF-8, by the bytes that may follow, from the first to the last, and the place after them.
# Place 0 is between characters; bytes that would encode a character in more bytes than it needs are not UTF-8.
_UTF8: tuple[tuple[tuple[int, int, int], ...], ...] = (
    (
        (0x00, 0x7F, 0),
        (0xC2, 0xDF, 1),
        (0xE0, 0xE0, 4),
        (0xE1, 0xEC, 2),
        (0xED, 0xED, 5),
        (0xEE, 0xEF, 2),
        (0xF0, 0xF0, 6),
        (0xF1, 0xF3, 3),
        (0xF4, 0xF4, 7),
    ),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0x80, 0xBF, 2),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
    ((0x90, 0xBF, 2),),
    ((0x80, 0x8F, 2),),
)


def _following(symbols: Sequence[int], example: np.ndarray) -> np.ndarray:
    """The place in a character after each symbol, `[place, symbol]` int32, −1 where it must not be drawn.

    Of a text that is not UTF-8 everything may be drawn. Whether it is, the example says, and the symbols themselves, where
    one can be in no character.
    """
    after = np.full((len(_UTF8), 256), -1, np.int32)
    for place, ranges in enumerate(_UTF8):
        for first, last, then in ranges:
            after[place, first : last + 1] = then
    after = after[:, list(symbols)]
    # Nor a symbol after which none completes the character.
    while (leads_nowhere := np.isin(after, np.flatnonzero((after < 0).all(axis=1)))).any():
        after[leads_nowhere] = -1
    reached = {0}
    while more := set(np.unique(after[list(reached)]).tolist()) - reached - {-1}:
        reached |= more
    if (after[list(reached)] < 0).all(axis=0).any() or not is_utf8(np.array(symbols, np.uint8)[example]):
        return np.zeros_like(after)
    return after
