r"""Which known mistake gives a gradient: all of them are run, and only one that gives every number of it is named.

Rounding apart, and by a stated chance: a match must be so close, in so many numbers, that of all the candidates tried one
would come as close by luck less than once in a million times.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.mistakes import elman
from jaxbptt.analysis.mistakes.given import Prepared, arrays_of, counts_of, problem_of
from jaxbptt.analysis.mistakes.known import Mistake, of_any_loop
from jaxbptt.analysis.mistakes.loop import blocks_transposed, gradient, init_gradient, right_loop
from jaxbptt.analysis.mistakes.matching import Match
from jaxbptt.trees import combine, differentiable, is_array, name

_BLOCK = 64  # candidates in one call of the program
# Multiplications above which no two mistakes are tried together.
_MOST_WORK = 3e10

_RIGHT = Mistake("")


class Search(NamedTuple):
    """What was found.

    Attributes:
        names: the mistakes that give this gradient, each alone.
        by_leaf: for each leaf that differs, the mistakes in it, where they are made in these leaves and not in others.
        tried: how many were run.
    """

    names: tuple[str, ...]
    by_leaf: tuple[tuple[str, ...], ...]
    tried: int


def search(p: Prepared, mine: Sequence[Any], reference: Sequence[Any], bounds: Sequence[float]) -> Search:
    """Run the known mistakes, and find those that give `mine`; `bounds` are the relative errors of rounding, by leaf."""
    known = [_RIGHT, *of_any_loop(p.steps, p.rows), *_of_weights(p)]
    factors = _factors(p)
    run = _program(p, mine, reference, [factor for factor, _ in factors])
    errors, sizes = run(known)
    _check_reference(p, errors[0, -1], sizes[0], bounds)
    match = Match(mine, reference, bounds, [factor for factor, _ in factors], tried=len(known) * len(factors))
    alone = match.close(errors[:, 0], sizes)
    read_out = _leaves_of(p)
    by_leaf = np.array([mistake.by_leaf for mistake in known])
    only_losses = np.array([_of_losses(mistake) for mistake in known])

    def named(fits, f=0):
        for i in np.flatnonzero(fits.all(1)):
            if not match.likely(errors[i, f], sizes[i], ~match.agrees):
                yield "; and ".join(filter(None, (known[i].name, factors[f][1])))

    others = range(1, len(factors))
    fits = {f: match.close(errors[:, f], sizes, f) for f in others}
    is_right = np.arange(len(known))[:, None] == 0
    names = _distinct([*named(alone & ~is_right), *(found for f in others for found in named(fits[f] & is_right, f))])
    names = names or _distinct(named((alone | (read_out & match.agrees)) & only_losses[:, None]))
    if names:
        return Search(names, (), len(known))
    differing = np.flatnonzero(~match.agrees)
    names = _distinct(named((alone | match.agrees) & by_leaf[:, None]))
    if names:
        return Search((), (names,) * len(differing), len(known))
    each = [
        _distinct(
            known[i].name
            for i in np.flatnonzero(alone[:, leaf] & by_leaf)
            if not match.likely(errors[i, 0], sizes[i], np.arange(len(mine)) == leaf)
        )
        for leaf in differing
    ]
    if all(each):
        return Search((), tuple(each), len(known))
    names = _distinct(found for f in others for found in named(fits[f], f))
    if names:
        return Search(names, (), len(known))
    # In a single time step most mistakes are the same: two of them give whatever one looks for.
    pairs = list(_pairs(known)) if p.steps > 1 else []
    work = len(pairs) * p.steps * p.rows * sum(leaf.size for leaf in mine)
    if not pairs or work > _MOST_WORK:
        return Search((), (), len(known))
    errors, sizes = run([pair for _, _, pair in pairs])
    first, second = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
    fits = match.close(errors[:, 0], sizes)
    # Where one is made in the sums, other leaves show the other alone.
    fits |= (alone[first] & by_leaf[second, None]) | (alone[second] & by_leaf[first, None])
    match = match._replace(tried=match.tried + len(pairs))
    names = [
        pairs[i][2].name for i in np.flatnonzero(fits.all(1)) if not match.likely(errors[i, 0], sizes[i], ~match.agrees)
    ]
    return Search(_distinct(names), (), len(known) + len(pairs))


def _of_losses(mistake: Mistake) -> bool:
    """Whether it can be made where a loss enters the recursion, and not in the gradient of the read-out."""
    return bool(mistake.loop) and not mistake.equations and set(mistake.loop) <= {"loss_from", "loss_weight"}


def compiled(p: Prepared, factors: tuple[float, ...]) -> Callable[..., Any]:
    """A program for a block of candidates: the errors of mine against each factor times what they give, and their sizes.

    By leaf; the last error is that of the reference.
    """
    static = arrays_of(p.given)[1]

    @jax.jit
    def block(arrays, mine, reference, loops, equations):
        problem = problem_of(p, *combine(arrays, static))

        def measured(candidate):
            params_bar, init_bar = gradient(problem, *candidate)
            bars = [params_bar, init_gradient(init_bar, problem.init)] if p.with_init else params_bar
            leaves = jax.tree.leaves(bars)

            def error(leaf, other, factor):
                return jnp.max(jnp.abs(other.astype(leaf.dtype) - jnp.asarray(factor, leaf.dtype) * leaf), initial=0)

            def of_all(others, factor):
                return jnp.stack([error(*pair, factor).astype(float) for pair in zip(leaves, others, strict=True)])

            sizes = jnp.stack([jnp.max(jnp.abs(leaf), initial=0).astype(float) for leaf in leaves])
            errors = [of_all(mine, factor) for factor in factors] + [of_all(reference, 1.0)]
            return jnp.stack(errors), sizes

        return jax.lax.map(measured, (loops, equations), batch_size=problem.side_by_side)

    return block


def _program(p: Prepared, mine: Any, reference: Any, factors: Sequence[float]) -> Callable[..., Any]:
    """A function of mistakes: what `compiled` gives for all of them."""
    block, right = compiled(p, tuple(factors)), right_loop(p.steps, p.rows)
    fixed = arrays_of(p.given)[0], list(mine), list(reference)

    def run(mistakes):
        found = []
        for start in range(0, len(mistakes), _BLOCK):
            some = list(mistakes[start : start + _BLOCK])
            some += [_RIGHT] * (_BLOCK - len(some))
            loops = _stacked(right._replace(**mistake.loop) for mistake in some)
            equations = _stacked(elman.Equations(**mistake.equations) for mistake in some)
            found.append(block(*fixed, loops, equations))
        errors, sizes = (
            np.concatenate(list(map(np.asarray, part)))[: len(mistakes)] for part in zip(*found, strict=True)
        )
        # What is nan matches nothing.
        return np.where(np.isfinite(errors), errors, np.inf), np.where(np.isfinite(sizes), sizes, 0)

    return run


def _stacked(trees: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def _of_weights(p: Prepared) -> Iterable[Mistake]:
    """The mistakes in what the step itself computes: by name for an Elman network, of any other its square matrices."""
    if p.roles is not None:
        yield from elman.mistakes(p.roles)
        return
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(p.given.params)):
        if is_array(leaf) and blocks_transposed(leaf) is not None:
            words = f"{name('params', path)} is not transposed where the gradient is carried back"
            yield Mistake(words, {"transposed": np.array(number)})


def _pairs(known: Sequence[Mistake]) -> Iterable[tuple[int, int, Mistake]]:
    """Two mistakes at once, which change different things."""
    for (i, a), (j, b) in itertools.combinations(enumerate(known), 2):
        if not (a.common and b.common and a.name and b.name and a.name != b.name):
            continue
        if a.loop.keys() & b.loop.keys() or a.equations.keys() & b.equations.keys():
            continue
        both = Mistake(f"{a.name}; and {b.name}", {**a.loop, **b.loop}, {**a.equations, **b.equations})
        yield i, j, both


def _factors(p: Prepared) -> list[tuple[float, str]]:
    """What a whole gradient may be multiplied by, and the words for it; 1 first."""
    found = [(1.0, ""), (-1.0, "the sign is wrong")]
    for count, words in counts_of(p).items():
        found.append((1 / count, f"it is the mean over {words}, where the reference is the sum"))
        found.append((float(count), f"it is the sum over {words}, where the reference is the mean"))
    return found


def _leaves_of(p: Prepared) -> np.ndarray:
    """Whether each leaf of the gradient is one of the read-out's."""
    count = len(jax.tree.leaves(differentiable((p.given.params, p.given.init) if p.with_init else p.given.params)))
    found = set() if p.roles is None else p.roles.read_out
    return np.array([i in found for i in range(count)])


def _check_reference(p: Prepared, errors: np.ndarray, sizes: np.ndarray, bounds: Sequence[float]) -> None:
    for (path, _), error, size, bound in zip(
        jax.tree_util.tree_leaves_with_path(differentiable(p.given.params)), errors, sizes, bounds, strict=False
    ):
        if not error <= 20 * bound * max(size, float(np.max(sizes)) * 1e-6):
            raise ValueError(
                f"The reference is not the gradient of this problem: {name('params', path)} differs by "
                f"{error / size if size else float('inf'):.1e} of its size. Pass the step, params, init, xs and loss that "
                "the reference was taken with; of a Cell with an adjoint of your own, check that first with certify."
            )


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
