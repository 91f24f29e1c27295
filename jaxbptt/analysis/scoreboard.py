r"""Every gradient held against the exact one on the user's own data, biased ones and random ones, with what each costs a step."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from jaxbptt import influences
from jaxbptt.analysis.certificate import Scans, check_names, named
from jaxbptt.analysis.cost import Cost, compile_and_cost, median_seconds
from jaxbptt.arrays import check_callable, check_concrete, check_count, scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table, html_table, text_table
from jaxbptt.programs.evaluate import bind, evaluate_jaxpr, subjaxprs
from jaxbptt.scans.exact import scan
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.forward import forward_scan
from jaxbptt.scans.recurrence import prepare
from jaxbptt.scans.truncated import truncated_scan
from jaxbptt.trees import combine, differentiable, name, partition
from jaxbptt.words import counted

# Numbers of an influence in full, above which it is left out unless it is asked for.
_MOST_NUMBERS = 2**25

_HEAD = (
    "method",
    "cosine",
    "relative error",
    "norm ratio",
    "bias",
    "± of it",
    "variance",
    "KiB",
    "Mflop a step",
    "µs a step",
)


class Accuracy(NamedTuple):
    """How near gradients g are to the exact one, g*. Of several random ones ḡ is the mean.

    Attributes:
        cosine: of the angle between g and g*; the mean over the draws. nan where one of them is 0.
        relative_error: ‖g − g*‖ / ‖g*‖, the mean over the draws.
        norm_ratio: ‖g‖ / ‖g*‖, the mean over the draws.
        bias: ‖ḡ − g*‖ / ‖g*‖; of a gradient that is not random its relative error.
        standard_error: of ḡ, in the same unit: how large a bias is found where there is none. 0 where nothing is random.
        variance: E‖g − E g‖² / ‖g*‖²; nan for a single draw, 0 where nothing is random.
    """

    cosine: float
    relative_error: float
    norm_ratio: float
    bias: float
    standard_error: float
    variance: float

    _repr_html_ = fields_table


class ScoreboardRow(NamedTuple):
    """One method of taking the gradient, held against the exact one: the fields of `Accuracy`, over all leaves of the params.

    Attributes:
        name: of the method.
        cosine: as in `Accuracy`, like the five after it.
        relative_error: as there.
        norm_ratio: as there.
        bias: as there.
        standard_error: as there.
        variance: as there.
        bytes: the compiler's peak of memory beyond arguments and results.
        flops: floating-point operations a time step, value and gradient; nan where they can't be counted.
        seconds: median wall-clock time a time step, compiled.
        draws: how many keys the gradient was drawn with; 1 where it is not random.
        leaves: the `Accuracy` by leaf of the params, where asked for.
    """

    name: str
    cosine: float
    relative_error: float
    norm_ratio: float
    bias: float
    standard_error: float
    variance: float
    bytes: int
    flops: float
    seconds: float
    draws: int = 1
    leaves: Mapping[str, Accuracy] = {}

    _repr_html_ = fields_table


class Scoreboard(NamedTuple):
    """All methods on the same data. Prints as a table.

    Attributes:
        rows: a `ScoreboardRow` for each method.
        exact: the row of the exact gradient, by `scan`.
        skipped: what was left out, and why, by name.
    """

    rows: tuple[ScoreboardRow, ...]
    exact: ScoreboardRow
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join([text_table(_HEAD, map(_in_words, (self.exact, *self.rows))), *self._notes()])

    def _repr_html_(self) -> str:
        rows = map(_in_words, (self.exact, *self.rows))
        return html_table(_HEAD, rows, title="Scoreboard", notes=self._notes())

    def _notes(self) -> list[str]:
        return [f"Left out: {label}. {why}" for label, why in self.skipped.items()]


def score_gradients(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    scans: Scans | None = None,
    keys: Any = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    by_leaf: bool = False,
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Scoreboard:
    r"""Hold gradients of the params, biased or random, against the exact one, and measure what each one costs a step.

    cos ∠(g, g*),  ‖g − g*‖ / ‖g*‖,  and of a random g the bias ‖ḡ − g*‖ / ‖g*‖ and the variance E‖g − E g‖² / ‖g*‖²

    g* is taken by `jax.grad` through `scan`. A method is random if its gradient reads the `key` that it is given. A bias is one
    where it is well above its standard error; a few draws don't show a small one. Like `certify` it compiles what it is given:
    don't call it inside `jit`. Costs one compilation and `repeats` + 1 runs a method, and a run for each key of a random one.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        scans: the strategies, by name or as a sequence of functions. By default truncated BPTT at several lengths, and `forward_scan`
            with every influence that fits the step: not those that would need more than 2²⁵ numbers, nor those whose form the step
            does not have. What was left out is in `skipped`.
        keys: random keys `[draws]` for the random ones; by default 16.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, as for `scan`; passed to every strategy, like the next two where given.
        valid: booleans `[time, *batch]`, as for `scan`.
        reset_carry: what `is_first` resets to, as for `scan`.
        by_leaf: whether each row has the accuracy of each leaf as well.
        repeats: rounds of timing, in which the methods take turns.
        progress: called with the name of each method before it is compiled.

    Returns:
        A `Scoreboard`.

    Raises:
        ValueError: no repeats, no time steps, two methods of one name, an exact gradient of 0; and whatever strategies that are given
            raise.
        TypeError: traced arguments, a strategy or loss that is not a function, keys that are not an array of random keys.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(2, 4)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 2))
        >>> loss = lambda carry, ys: jnp.mean(ys**2)
        >>> scans = {"K = 1": partial(bptt.truncated_scan, truncation_length=1), "rtrl": bptt.forward_scan}
        >>> truncated, rtrl = bptt.score_gradients(cell, params, cell.initial_carry(), xs, loss, scans=scans).rows
        >>> truncated.cosine < 0.999, truncated.variance, rtrl.relative_error < 1e-5
        (True, 0.0, True)

    References:
        Marschall, Cho and Savin, A unified framework of online learning algorithms for training recurrent neural networks, 2020,
        arXiv:1907.02649, compare such gradients by their angle to each other.
    """
    check_concrete("score_gradients", params=params, init=init, xs=xs, keys=keys)
    loss = scalar_loss(loss)
    check_count("repeats", repeats, "at least one round of timing is needed")
    r = prepare(step, params, init, xs, length, is_first, valid)
    if not r.length:
        raise ValueError(
            "The sequence has no time steps, so its gradient is 0, and nothing is right or wrong: pass some."
        )
    keys = jax.random.split(jax.random.key(0), 16) if keys is None else _checked(keys)
    diff, nondiff = partition(params)
    options = Flags(is_first, valid, reset_carry).options

    def gradient_by(strategy):
        draws = _takes_key(strategy)

        def value_and_gradient(diff, key):
            def unrolled_loss(diff):
                given = options | ({"key": key} if draws else {})
                return loss(*strategy(step, combine(diff, nondiff), init, xs, length=length, **given))

            return jax.value_and_grad(unrolled_loss)(diff)

        return value_and_gradient

    chosen, skipped = _default(r.length, params, r.init) if scans is None else (named(scans), {})
    for label, strategy in chosen:
        check_callable(f"The method {label!r}", strategy, "a strategy, such as truncated_scan with a truncation_length")
    check_names(["scan", *(label for label, _ in chosen)])
    methods = []
    for label, strategy in [("scan", scan), *chosen]:
        if progress is not None:
            progress(label)
        try:
            methods.append(_compiled(label, gradient_by(strategy), diff, keys))
        except ValueError as error:
            if scans is not None:  # asked for
                raise
            skipped[label] = str(error)
    exact, *others = _scored(methods, params, r.length, repeats, by_leaf=by_leaf)
    return Scoreboard(tuple(others), exact, skipped)


class _Method(NamedTuple):
    """A compiled gradient, with the gradients by each of its keys."""

    name: str
    call: Callable[[], Any]
    cost: Cost
    gradients: list[Any]
    is_random: bool


def _compiled(label: str, method: Callable[..., Any], diff: Any, keys: Any) -> _Method:
    is_random = reads_key(method, diff, keys[0])
    compiled, cost = compile_and_cost(method, diff, keys[0])
    gradients = [compiled(diff, key)[1] for key in (keys if is_random else keys[:1])]
    return _Method(label, partial(compiled, diff, keys[0]), cost, jax.tree.map(np.asarray, gradients), is_random)


def reads_key(fn: Callable[..., Any], args: Any, key: Any) -> bool:
    """Whether the result of `fn(args, key)` depends on the key, by its trace."""
    traced = jax.make_jaxpr(fn)(args, key)
    # Functions with a derivative of their own count as reading all that they are given: so they are opened.
    opened = jax.make_jaxpr(lambda *leaves: evaluate_jaxpr(traced.jaxpr, traced.consts, list(leaves), _opened))(
        *jax.tree.leaves((args, key))
    )
    _, used = dce_jaxpr(opened.jaxpr, [True] * len(opened.jaxpr.outvars))
    return used[-1]


def _opened(eqn: Any, values: list[Any]) -> list[Any]:
    inside = next(subjaxprs(eqn), None) if eqn.primitive.name.startswith("custom_jvp_call") else None
    return bind(eqn, values) if inside is None else evaluate_jaxpr(*inside, values, _opened)


def _scored(methods: list[_Method], params: Any, length: int, repeats: int, *, by_leaf: bool) -> list[ScoreboardRow]:
    leaf_names = [name("params", path) for path, _ in jax.tree_util.tree_leaves_with_path(differentiable(params))]
    exact = _as_vectors(methods[0].gradients[0])
    if not np.linalg.norm(np.concatenate(exact)):
        raise ValueError(
            "The exact gradient is 0, and no other can be held against it: check that the loss depends on the params."
        )
    rows = []
    seconds = median_seconds([method.call for method in methods], repeats)
    for method, time in zip(methods, seconds, strict=True):
        found = list(map(_as_vectors, method.gradients))
        whole = _accuracy([np.concatenate(vectors) for vectors in found], np.concatenate(exact), method.is_random)
        leaves = {}
        if by_leaf:
            for i, leaf in enumerate(leaf_names):
                leaves[leaf] = _accuracy([vectors[i] for vectors in found], exact[i], method.is_random)
        cost = method.cost.temporary_bytes, method.cost.flops / length, time / length
        rows.append(ScoreboardRow(method.name, *whole, *cost, len(found), leaves))
    return rows


def _accuracy(drawn: list[np.ndarray], exact: np.ndarray, is_random: bool) -> Accuracy:
    scale = np.linalg.norm(exact) or np.nan
    norms = np.array([np.linalg.norm(each) for each in drawn])
    products = np.array([each @ exact for each in drawn])
    # 0/0 is nan: there is no angle to a gradient of 0.
    cosines = products / np.where(norms == 0, np.nan, norms) / scale
    errors = np.array([np.linalg.norm(each - exact) for each in drawn]) / scale
    mean = np.mean(drawn, axis=0)
    variance = standard_error = 0.0
    if is_random:
        count = len(drawn)
        variance = (
            sum(np.linalg.norm(each - mean) ** 2 for each in drawn) / scale**2 / (count - 1) if count > 1 else np.nan
        )
        standard_error = np.sqrt(variance / count)
    bias = np.linalg.norm(mean - exact) / scale
    measures = np.mean(cosines), np.mean(errors), np.mean(norms) / scale, bias, standard_error, variance
    return Accuracy(*map(float, measures))


def _as_vectors(gradient: Any) -> list[np.ndarray]:
    """The leaves as vectors of real numbers in double precision."""
    vectors = [np.ravel(leaf).astype(np.result_type(leaf.dtype, np.float64)) for leaf in jax.tree.leaves(gradient)]
    return [vector.view(np.float64) for vector in vectors]


def _default(length: int, params: Any, init: Any) -> tuple[list[tuple[str, Callable[..., Any]]], dict[str, str]]:
    """Truncated BPTT at a few lengths, and every influence that is not too large; the others, with why."""
    lengths = [K for K in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000) if length > K]
    strategies: list[tuple[str, Callable[..., Any]]] = [
        (f"truncated, K = {K}", partial(truncated_scan, truncation_length=K)) for K in lengths
    ]
    full = {"rtrl": influences.rtrl(), "snap(2)": influences.snap(2)}
    others = {
        "snap(1)": influences.snap(1),
        "eprop": influences.eprop(),
        "rflo": influences.rflo(),
        "low_rank(4)": influences.low_rank(4),
        "kf_rtrl": influences.kf_rtrl(),
        "uoro": influences.uoro(),
    }
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(differentiable(tree))) for tree in (params, init)]
    skipped = {}
    if math.prod(sizes) > _MOST_NUMBERS:
        why = f"It takes {counted(sizes[1], 'number')} of the carry times {counted(sizes[0], 'weight')}; pass it in scans to have it."
        full, skipped = {}, dict.fromkeys(full, why)
    for label, influence in (full | others).items():
        strategies.append((label, partial(forward_scan, influence=influence)))
    return strategies, skipped


def _takes_key(strategy: Callable[..., Any]) -> bool:
    """Whether a strategy is to be given a key: whether it takes one, and has none yet."""
    if isinstance(strategy, partial) and "key" in strategy.keywords:
        return False
    try:
        return "key" in inspect.signature(strategy).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


def _checked(keys: Any) -> Any:
    dtype = getattr(keys, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or keys.ndim != 1 or not keys.size:
        what = f"of shape {keys.shape}" if hasattr(keys, "shape") else f"a {type(keys).__name__}"
        raise TypeError(
            f"keys is {what}, but random keys [draws] are expected: pass jax.random.split(jax.random.key(0), 16)."
        )
    return keys


def _in_words(row: ScoreboardRow) -> tuple[str, ...]:
    """The cells under `_HEAD`."""
    return (
        row.name,
        f"{row.cosine:.4f}",
        f"{row.relative_error:.2g}",
        f"{row.norm_ratio:.3g}",
        f"{row.bias:.2g}",
        f"{row.standard_error:.1g}",
        f"{row.variance:.2g}",
        f"{row.bytes / 1024:,.0f}",
        f"{row.flops / 1e6:,.3g}",
        f"{row.seconds * 1e6:,.3g}",
    )
