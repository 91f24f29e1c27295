r"""Fixed points and slow points of a recurrence: where its state stays, or nearly stays, while the input is held.

Around them the dynamics of a trained network are nearly linear. They are searched for by least squares on the distance that
the state moves in one step, from many first guesses at once; optimistix does the search.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Complex, Float, Int

from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.trajectory import prepare_state, state_size, state_vector, step_and_push
from jaxbptt.arrays import as_array, check_concrete, check_count, check_key, is_number
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import columns_table, fields_table, in_words, is_known
from jaxbptt.scans.recurrence import as_arrays
from jaxbptt.trees import differentiable, is_key, name
from jaxbptt.words import counted, install_command

# Numbers of Jacobians that are held at once: guesses beyond that are searched from one group after the other.
_AT_ONCE = 2**24


class FixedPoints(NamedTuple):
    """Fixed points and slow points. Fixed ones come first, each kind in the order of the guesses that found them.

    Attributes:
        points: as carries, leaves `[points, ...]`.
        states: the same as state vectors, `[points, n]`.
        speeds: q = ½‖F(h) − h‖², `[points]`.
        residual_norms: ‖F(h) − h‖, `[points]`.
        fixed: True for fixed points, False for those that are only slow, `[points]`.
        jacobians: ∂F/∂h at each point, `[points, n, n]`.
        eigenvalues: of the Jacobians, largest modulus first, `[points, n]`.
        num_unstable: eigenvalues outside the unit circle: directions in which perturbations grow.
        num_marginal: eigenvalues on the unit circle, to √eps: along a line or ring of fixed points there is one.
        found_from: for each guess, the index of the point that its search ended at; −1 where it ended at none, `[guesses]`.
    """

    points: Any
    states: Float[Array, "points n"]
    speeds: Float[Array, " points"]
    residual_norms: Float[Array, " points"]
    fixed: Bool[Array, " points"]
    jacobians: Float[Array, "points n n"]
    eigenvalues: Complex[Array, "points n"]
    num_unstable: Int[Array, " points"]
    num_marginal: Int[Array, " points"]
    found_from: Int[Array, " guesses"]

    @property
    def stable(self) -> Bool[Array, " points"]:
        """Where all eigenvalues lie inside the unit circle: perturbations in every direction shrink."""
        return (self.num_unstable == 0) & (self.num_marginal == 0)

    def __str__(self) -> str:
        """A table, one row for each point."""
        columns = {head: [head, *map(in_words, values)] for head, values in self._columns().items()}
        widths = [max(map(len, column)) for column in columns.values()]
        rows = zip(*columns.values(), strict=True)
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, self._nowhere()])

    def _repr_html_(self) -> str:
        if not all(map(is_known, self[1:])):
            return fields_table(self)
        return columns_table(self, self._columns(), notes=[self._nowhere()])

    def _columns(self) -> dict[str, Any]:
        return {
            "point": range(len(self.fixed)),
            "kind": ["fixed" if fixed else "slow" for fixed in self.fixed],
            "‖F(h) − h‖": self.residual_norms,
            "largest |μ|": abs(self.eigenvalues[:, 0]),
            "unstable": self.num_unstable,
            "marginal": self.num_marginal,
            "guesses": self._guesses()[1:],
        }

    def _guesses(self) -> np.ndarray:
        """How many led to no point, and to each of the points."""
        return np.bincount(np.asarray(self.found_from) + 1, minlength=len(self.fixed) + 1)

    def _nowhere(self) -> str:
        return f"{counted(int(self._guesses()[0]), 'guess', 'guesses')} led to no point."


def fixed_points(
    step: Callable[..., Any] | Cell,
    params: Any,
    x: Any,
    guesses: Any,
    *,
    tolerance: float | None = None,
    slow: float = 1e-2,
    distance: float | None = None,
    max_steps: int = 200,
) -> FixedPoints:
    r"""Fixed points and slow points of a recurrence whose input is held.

    h* = F(h*; x),  F(h; x) = the new carry of step(params, h, x)

    From each guess, Levenberg and Marquardt's method (optimistix) minimises the speed q(h) = ½‖F(h) − h‖²: fixed points have
    q = 0, stable or not; slow points, where the search ends with q small but not 0, are often what is left of a fixed
    point that has just vanished, or lie on a line or ring along which the state drifts. The Jacobian at a point says what
    happens near it: F(h* + δ) ≈ h* + J δ. The search finds no point that no guess leads to, so take many. At a bifurcation,
    where two points meet, it converges slowly, and may report a slow point in place of a fixed one.

    Time O(G n³) for each step of the search, from G guesses; memory O(G n²), but at most 2²⁴ numbers of Jacobians at once.
    Needs the extra `fixed-points`. It looks at the numbers, to merge what several guesses found: call it outside `jax.jit`,
    with float64 for accurate points.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode: no `jax.custom_vjp` in it.
        params: any pytree.
        x: the input that is held, as one step takes it, without time axis; `None` for a step without input.
        guesses: carries to start from, leaves `[guesses, ...]`, such as states of a trajectory (`sample_states`).
            Non-differentiable leaves are held, and are no part of the state.
        tolerance: a point is fixed where ‖F(h) − h‖ ≤ tolerance (1 + ‖h‖); eps^¾ by default, 2e-12 in float64.
        slow: a point is slow where ‖F(h) − h‖ ≤ slow (1 + ‖h‖); other ends of searches are left out.
        distance: two points are the same where they lie within distance (1 + ‖h‖); eps^⅓ by default, 6e-6 in float64. Take
            more where the slow points form a continuum and a few of them will do.
        max_steps: steps of the search from each guess. One that ends there counts by its speed as any other.

    Returns:
        `FixedPoints`; print it for a table.

    Raises:
        ValueError: guesses without a leading axis in common, or without differentiable numbers; batch axes beyond it
            in those of a `Cell`; a tolerance, `slow` or `distance` not above 0; `max_steps` below 1.
        TypeError: traced or complex numbers; as for `scan`.
        ImportError: the extra is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> unit = lambda w, h, x: (jnp.tanh(w * h), None)  # bistable for w > 1: two stable points and one between them
        >>> found = bptt.fixed_points(unit, 1.5, None, jnp.linspace(-1.0, 1.0, 7))
        >>> print(found.points.round(3) + 0, found.num_unstable, found.found_from)
        [-0.859  0.     0.859] [0 1 0] [0 0 1 1 1 2 2]

    References:
        Sussillo and Barak, Opening the black box, 2013, doi:10.1162/NECO_a_00409; Golub and Sussillo, FixedPointFinder, 2018,
        doi:10.21105/joss.01003; Rader, Lyons and Kidger, Optimistix, 2024, arXiv:2402.09983.
    """
    check_concrete("fixed_points", params=params, x=x, guesses=guesses)
    for word, value in (("tolerance", tolerance), ("slow", slow), ("distance", distance)):
        if not is_number(value, 0) and (value is not None or word == "slow"):
            raise ValueError(f"{word} is {value!r}, but it is measured in units of 1 + ‖h‖: pass a number above 0.")
    check_count("max_steps", max_steps, "it counts steps of the search")
    guesses, count = _stacked("guesses", guesses)
    if not jax.tree.leaves(differentiable(guesses)):
        raise ValueError("guesses have no differentiable numbers, so there is no state: pass floating-point numbers.")
    x = as_arrays("x", x)
    first = jax.tree.map(lambda leaf: leaf[0], guesses)
    r = prepare_state(step, params, first, jax.tree.map(lambda leaf: leaf[None], x), 1, root="guesses[0]")
    size, dtype = state_size(first)
    eps = float(jnp.finfo(dtype).eps)
    tolerance = float(eps**0.75 if tolerance is None else tolerance)
    distance = float(eps ** (1 / 3) if distance is None else distance)
    at_once = max(1, _AT_ONCE // size**2)

    search = _search(r.step, r.params, x, dtype, max_steps, 100 * eps)
    states, residual_norms = map(np.asarray, jax.lax.map(search, guesses, batch_size=min(at_once, count)))
    scale = 1 + np.linalg.norm(states, axis=1)
    chosen, found_from = _merged(states, residual_norms / scale, tolerance, float(slow), distance * scale)

    def jacobian(point):
        return step_and_push(r, point, x, jnp.eye(size, dtype=dtype))[1]

    points = jax.vmap(lambda guess, state: _with_state(guess, state))(
        jax.tree.map(lambda leaf: leaf[chosen], guesses), jnp.asarray(states[chosen])
    )
    jacobians = jax.lax.map(jacobian, points, batch_size=min(at_once, max(len(chosen), 1)))
    # On the host, since not every device has a decomposition.
    eigenvalues = np.linalg.eigvals(np.asarray(jacobians))
    eigenvalues = np.take_along_axis(eigenvalues, np.argsort(-np.abs(eigenvalues), axis=1, kind="stable"), axis=1)
    beyond = np.abs(eigenvalues) - 1
    norms = residual_norms[chosen]
    return FixedPoints(
        points=points,
        states=jnp.asarray(states[chosen]),
        speeds=jnp.asarray(norms**2 / 2),
        residual_norms=jnp.asarray(norms),
        fixed=jnp.asarray(norms <= tolerance * scale[chosen]),
        jacobians=jacobians,
        eigenvalues=jnp.asarray(eigenvalues.astype(np.result_type(eigenvalues, np.complex64))),
        num_unstable=jnp.asarray(np.sum(beyond > eps**0.5, axis=1)),
        num_marginal=jnp.asarray(np.sum(np.abs(beyond) <= eps**0.5, axis=1)),
        found_from=jnp.asarray(found_from),
    )


def sample_states(
    carries: Any, count: int, *, key: Array, noise: float = 0.0, batch_axes: int = 0, valid: Any = None
) -> Any:
    r"""States drawn at random from a trajectory, with noise: first guesses for `fixed_points`.

    h = c_s + noise · σ ⊙ z,  s uniform over all (valid) states,  z ~ N(0, 1)

    with σ the standard deviation of each number over the states. Guesses on the trajectory alone may miss unstable points
    beside it. Time and memory O(T n). To be jitted.

    Args:
        carries: leaves `[time, *batch, ...]`, such as the states that a step returns as its output.
        count: how many to draw, with replacement.
        key: a random key.
        noise: in standard deviations.
        batch_axes: how many axes after time count states too.
        valid: booleans `[time, *batch]`: False for padded steps, which are not drawn.

    Returns:
        Carries with leaves `[count, ...]`. Non-differentiable leaves are drawn without noise.

    Raises:
        ValueError: leaves without these axes in common; `count` below 1; negative `noise`; `valid` of another shape, or
            False everywhere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 5)
        >>> key = jax.random.key(0)
        >>> _, hs = bptt.scan(cell, cell.init(key), cell.initial_carry((8,)), jax.random.normal(key, (50, 8, 3)))
        >>> bptt.sample_states(hs, 100, key=key, noise=0.1, batch_axes=1).shape
        (100, 5)

    References:
        Golub and Sussillo, FixedPointFinder, 2018, doi:10.21105/joss.01003.
    """
    check_count("count", count, "it counts states")
    check_key(key)
    if not (is_number(noise, 0) or (is_number(noise, -1) and noise == 0)):
        raise ValueError(f"noise is {noise!r}, but it counts standard deviations: pass a number of at least 0.")
    check_count("batch_axes", batch_axes, "it counts axes after time", least=0)
    carries, _ = _stacked("carries", carries, 1 + batch_axes)
    leading = jax.tree.leaves(carries)[0].shape[: 1 + batch_axes]
    weights = None
    if valid is not None:
        valid = as_array("valid", valid, "[time, *batch] of booleans")
        if valid.shape != leading or valid.dtype != bool:
            raise ValueError(
                f"valid is {valid.dtype}{list(valid.shape)}, but the carries have {leading} states: pass one boolean for each."
            )
        if not isinstance(valid, Tracer) and not np.asarray(valid).any():
            raise ValueError("valid is False everywhere, so there is no state to draw: pass a trajectory that has one.")
        weights = valid.ravel().astype(jnp.result_type(float))
        weights = weights / jnp.sum(weights)
    key, own = jax.random.split(key)
    total = int(np.prod(leading))
    index = jax.random.choice(own, total, (count,), p=weights)
    leaves, treedef = jax.tree.flatten(carries)
    drawn = []
    for leaf, own in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        flat = leaf.reshape(total, *leaf.shape[1 + batch_axes :])
        states = flat[index]
        if not is_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            where = None if valid is None else valid.reshape(total, *(1,) * (flat.ndim - 1))
            deviation = jnp.std(flat, axis=0, where=where, keepdims=True)
            states += jnp.asarray(noise, states.dtype) * deviation * jax.random.normal(own, states.shape, states.dtype)
        drawn.append(states)
    return treedef.unflatten(drawn)


def _stacked(root: str, tree: Any, axes: int = 1) -> tuple[Any, int]:
    """Arrays for all leaves, checked to have their first axes in common; and the length of the first."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{root} have no leaves: pass carries, stacked along a first axis.")
    shapes = []
    for path, leaf in leaves:
        leaf = leaf if is_key(leaf) else as_array(name(root, path), leaf, "an array of stacked states")
        if leaf.ndim < axes or 0 in leaf.shape[:axes]:
            raise ValueError(
                f"{name(root, path)} has shape {leaf.shape}, but {counted(axes, 'axis', 'axes')} of states come first: pass "
                "at least one state, stacked along a first axis."
            )
        shapes.append((leaf.shape[:axes], name(root, path)))
    for shape, leaf_name in shapes:
        if shape != shapes[0][0]:
            raise ValueError(
                f"{shapes[0][1]} holds {shapes[0][0]} states, but {leaf_name} {shape}: pass as many in every leaf."
            )
    return as_arrays(root, tree), shapes[0][0][0]


def _search(step: Callable[..., Any], params: Any, x: Any, dtype: Any, max_steps: int, tolerance: float) -> Any:
    """The search from one guess: the state it ended at, and how far one step moves it."""
    try:
        import lineax
        import optimistix as optx
    except ModuleNotFoundError as error:
        message = f"fixed_points needs {error.name}: {install_command('fixed-points')}"
        raise ImportError(message, name=error.name) from None
    # The solver has numbers of its own in the default precision, which the state's must not be below.
    own = np.promote_types(dtype, jnp.result_type(float))
    # By the normal equations, three times as fast as by QR (measured, n = 128): what their conditioning costs a step, the
    # damping bounds and the next step makes good.
    normal = lineax.Normal(lineax.Cholesky())
    solver = optx.LevenbergMarquardt(rtol=tolerance, atol=tolerance, linear_solver=normal)

    def search(guess):
        def residual(h, _):
            new_carry, _ = step(params, _with_state(guess, h), x)
            return state_vector(new_carry)[0].astype(h.dtype) - h

        start = state_vector(guess)[0].astype(own)
        h = optx.least_squares(residual, solver, start, max_steps=max_steps, throw=False).value.astype(dtype)
        return h, norm(residual(h, None))

    return search


def _with_state(carry: Any, state: Array) -> Any:
    """The carry with another state vector."""
    flat, state_of = state_vector(carry)
    return state_of(state.astype(flat.dtype))


def _merged(
    states: np.ndarray, residuals: np.ndarray, tolerance: float, slow: float, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The guesses that stand for a point each, and the index of its point for each guess.

    Of points within their distance of each other the one with the smallest residual is kept.
    """
    kept: list[int] = []
    owner = np.full(len(states), -1)
    for i in np.argsort(residuals, kind="stable"):
        if not residuals[i] <= slow:  # or nan
            break
        away = np.linalg.norm(states[kept] - states[i], axis=1)
        if kept and away.min() <= distances[i]:
            owner[i] = kept[int(away.argmin())]
        else:
            kept.append(int(i))
            owner[i] = i
    first = {i: int(np.argmax(owner == i)) for i in kept}
    chosen = sorted(kept, key=lambda i: (residuals[i] > tolerance, first[i]))
    index = {i: number for number, i in enumerate(chosen)} | {-1: -1}
    return np.asarray(chosen, int), np.asarray([index[int(i)] for i in owner], int)
