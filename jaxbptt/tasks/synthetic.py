r"""Synthetic problems whose answer depends on inputs a known number of steps back, after Hochreiter and Schmidhuber.

Only memory helps in them, so that the loss shows how far back a network, or a truncated gradient, reaches.
"""

import math

import jax
import jax.numpy as jnp

from jaxbptt.tasks.task import Sequences, Task, check_size, checked, last_step


def adding_problem(*, steps: int = 100) -> Task:
    r"""Add the two marked numbers of a random sequence.

    y = Σₜ mₜ vₜ,  vₜ uniform in [0, 1),  mₜ ∈ {0, 1} with one marker in each half

    The variant with a fixed length and values in [0, 1), as in Le et al. and Arjovsky et al. The first marker is uniform
    over steps 0 … ⌊T/2⌋ − 1, the second over the rest. `xs` are vₜ and mₜ; `ys` is y at every step, but only the last
    one counts.

    Baseline: predicting the mean, 1. Its squared error is the variance of a sum of two uniform numbers, 2 · 1/12 = 1/6.

    Args:
        steps: T, length of the sequences.

    Returns:
        A task with mean squared error, 2 inputs and 1 output.

    Raises:
        ValueError: fewer than 2 steps.
        TypeError: steps that are not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> task = tasks.adding_problem(steps=50)
        >>> xs, ys, mask = task.sample(jax.random.key(0), 4)
        >>> xs.shape, ys.shape, int(mask.sum()), round(task.baseline, 4)
        ((50, 4, 2), (50, 4, 1), 4, 0.1667)

    References:
        Hochreiter and Schmidhuber, Long short-term memory, 1997, doi:10.1162/neco.1997.9.8.1735, section 5.4; Le, Jaitly and
        Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015, arXiv:1504.00941.
    """
    check_size("steps", steps, 2, "each half needs a step for its marker")

    def sample(key, batch):
        value_key, first_key, second_key = jax.random.split(key, 3)
        values = jax.random.uniform(value_key, (steps, batch), jnp.float32)
        first = jax.random.randint(first_key, (batch,), 0, steps // 2, jnp.int32)
        second = jax.random.randint(second_key, (batch,), steps // 2, steps, jnp.int32)
        time = jnp.arange(steps, dtype=jnp.int32)[:, None]
        markers = ((time == first[None]) | (time == second[None])).astype(jnp.float32)
        answer = jnp.sum(markers * values, axis=0)
        ys = jnp.broadcast_to(answer[None, :, None], (steps, batch, 1))
        return Sequences(jnp.stack([values, markers], axis=-1), ys, last_step(steps, batch))

    return Task(checked(sample), "mean_squared_error", 1 / 6, 2, 1)


def copy_memory(*, delay: int, symbols: int = 8, length: int = 10) -> Task:
    r"""Read symbols, wait, and repeat them in the same order.

    xs: a₁ … a_L, delay − 1 blanks, go, L blanks;  ys: delay + L blanks, a₁ … a_L;  T = delay + 2L

    Symbols are drawn uniformly and are numbered from 0; class `symbols` is the blank, and input `symbols + 1`, which is
    never a target, is go. Inputs are one-hot, and every step counts.

    Baseline: predicting blank for delay + L steps and then each symbol with the same probability,
    L log(symbols) / (delay + 2L). It counts steps, but remembers no symbol.

    Args:
        delay: steps from the last symbol to the first one repeated, including the step with go; Arjovsky's T.
        symbols: number of different symbols.
        length: L, how many are to be remembered.

    Returns:
        A task with cross-entropy, `symbols + 2` inputs and `symbols + 1` classes.

    Raises:
        ValueError: a delay or length below 1, fewer than 2 symbols.
        TypeError: one of them is not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> xs, ys, mask = tasks.copy_memory(delay=3, symbols=2, length=4).sample(jax.random.key(0), 1)
        >>> "".join("01_>"[i] for i in xs[:, 0].argmax(-1)), "".join("01_"[i] for i in ys[:, 0])
        ('1001__>____', '_______1001')

    References:
        Hochreiter and Schmidhuber, Long short-term memory, 1997, doi:10.1162/neco.1997.9.8.1735; Arjovsky, Shah and Bengio,
        Unitary evolution recurrent neural networks, 2016, arXiv:1511.06464, section 4.1.
    """
    check_size("delay", delay, 1, "go takes a step of its own")
    check_size("symbols", symbols, 2, "a single symbol leaves nothing to remember")
    check_size("length", length, 1, "there must be a symbol to remember")
    steps = delay + 2 * length
    blank, go = symbols, symbols + 1

    def sample(key, batch):
        drawn = jax.random.randint(key, (length, batch), 0, symbols, jnp.int32)
        xs = jnp.full((steps, batch), blank, jnp.int32).at[:length].set(drawn).at[length + delay - 1].set(go)
        ys = jnp.full((steps, batch), blank, jnp.int32).at[-length:].set(drawn)
        return Sequences(jax.nn.one_hot(xs, symbols + 2, dtype=jnp.float32), ys, jnp.ones((steps, batch), bool))

    return Task(checked(sample), "cross_entropy", length * math.log(symbols) / steps, symbols + 2, symbols + 1)


def temporal_order(*, steps: int = 100) -> Task:
    r"""Classify the order of two symbols among distractors.

    y = 2 s₁ + s₂,  s = 0 for X and 1 for Y:  XX, XY, YX, YY

    Inputs are one-hot in the order E, B, a, b, c, d, X, Y. Each sequence begins with E, ends with B, and is filled with a
    to d at random. Step t₁ in [⌊T/10⌋, ⌊T/5⌋] and step t₂ in [⌊T/2⌋, ⌊3T/5⌋] hold X or Y instead, all of it uniform:
    10 to 20 and 50 to 60 for T = 100, as in the original, where the length varies from 100 to 110. `ys` is y at every
    step, but only the last one counts.

    Baseline: the last symbol is always B, and the four classes are equally likely, so log 4.

    Args:
        steps: T, length of the sequences.

    Returns:
        A task with cross-entropy, 8 inputs and 4 classes.

    Raises:
        ValueError: fewer than 10 steps.
        TypeError: steps that are not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> xs, ys, mask = tasks.temporal_order(steps=12).sample(jax.random.key(0), 1)
        >>> "".join("EBabcdXY"[i] for i in xs[:, 0].argmax(-1)), int(ys[-1, 0])
        ('EbXbcabXbabB', 0)

    References:
        Hochreiter and Schmidhuber, Long short-term memory, 1997, doi:10.1162/neco.1997.9.8.1735, section 5.6, task 6a.
    """
    check_size("steps", steps, 10, "E, the two symbols and B each need a step of their own")

    def sample(key, batch):
        filler_key, symbol_key, first_key, second_key = jax.random.split(key, 4)
        first = jax.random.randint(first_key, (batch,), steps // 10, steps // 5 + 1, jnp.int32)
        second = jax.random.randint(second_key, (batch,), steps // 2, 3 * steps // 5 + 1, jnp.int32)
        symbols = jax.random.randint(symbol_key, (2, batch), 0, 2, jnp.int32)
        row = jnp.arange(batch, dtype=jnp.int32)
        xs = jax.random.randint(filler_key, (steps, batch), 2, 6, jnp.int32).at[0].set(0).at[-1].set(1)
        xs = xs.at[first, row].set(6 + symbols[0]).at[second, row].set(6 + symbols[1])
        ys = jnp.broadcast_to(2 * symbols[0] + symbols[1], (steps, batch))
        return Sequences(jax.nn.one_hot(xs, 8, dtype=jnp.float32), ys, last_step(steps, batch))

    return Task(checked(sample), "cross_entropy", math.log(4), 8, 4)


def delayed_xor(*, delay: int, steps: int | None = None) -> Task:
    r"""Tell whether two neighbouring bits, a number of steps back, were different.

    yₜ = x_{t−d} ⊕ x_{t−d−1},  t = d + 1 … T − 1,  xₜ ∈ {0, 1} with equal probability

    A lag that a gradient must reach, d + 1, and nothing in between that helps: the two bits are needed together. The
    first d + 1 steps have no target and don't count.

    Baseline: yₜ is a fair coin that is independent of xₜ, for d = 0 too, so log 2.

    Args:
        delay: d, steps from the later one of the two bits to the answer.
        steps: T, length of the sequences, counted from 0; 2(d + 1) by default, half of which count.

    Returns:
        A task with cross-entropy, 1 input and 2 classes.

    Raises:
        ValueError: a delay below 0, or fewer than d + 2 steps.
        TypeError: one of them is not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> xs, ys, mask = tasks.delayed_xor(delay=2, steps=9).sample(jax.random.key(0), 1)
        >>> print(xs[:, 0, 0].astype(int), ys[mask])
        [1 0 0 1 1 1 0 1 1] [1 0 1 0 0 1]

    References:
        Bertschinger and Natschläger, Real-time computation at the edge of chaos in recurrent neural networks, 2004,
        doi:10.1162/089976604323057443, which has the parity of three bits.
    """
    check_size("delay", delay, 0, "an answer can't come before its bits")
    steps = 2 * (delay + 1) if steps is None else steps
    check_size("steps", steps, delay + 2, f"delay={delay} leaves no step with a target")

    def sample(key, batch):
        bits = jax.random.randint(key, (steps, batch), 0, 2, jnp.int32)
        different = bits[1 : steps - delay] ^ bits[: steps - delay - 1]
        ys = jnp.zeros((steps, batch), jnp.int32).at[delay + 1 :].set(different)
        mask = jnp.zeros((steps, batch), bool).at[delay + 1 :].set(True)
        return Sequences(bits[..., None].astype(jnp.float32), ys, mask)

    return Task(checked(sample), "cross_entropy", math.log(2), 1, 2)
