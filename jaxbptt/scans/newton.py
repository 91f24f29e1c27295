r"""Any recurrence, parallel in time: all states at once by Newton's method, and a gradient that is exact however they were found."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxbptt.along_time import flipped, room
from jaxbptt.arrays import as_array, check_count, is_number
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.html_table import fields_table
from jaxbptt.programs.structure import Group
from jaxbptt.scans.affine import at_all_steps
from jaxbptt.scans.all_at_once import AllAtOnce, strategy
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.newton_iteration import Options, Report, newton
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import Recurrence, check_known_length, prepare
from jaxbptt.trees import combine, is_differentiable, name

# Beyond so many passes over all time steps the loop over time is likely to be faster.
_MAX_ITERATIONS = 100


class NewtonStates(NamedTuple):
    """What Newton's method made of a recurrence, and how it went.

    Attributes:
        carries: the last guess of the carries after every step, leaves `[time, ...]`, right before `first_bad_step`.
        ys: the outputs of a step from each of them.
        iterations: affine recurrences that were solved, one after the other: over all time steps, or with `chunk_length` over
            one window each.
        residual: the largest |cₜ − f(cₜ₋₁)|, relative to the largest |c| of the leaf and row up to there.
        converged: whether the last iteration changed no state by more than the tolerance, and no residual is larger.
        first_bad_step: the first step, in the order of running, at which one of them is; T where there is none.
    """

    carries: Any
    ys: Any
    iterations: Int[Array, ""]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    first_bad_step: Int[Array, ""]

    def _repr_html_(self) -> str:
        return fields_table(self)


def newton_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    jacobian: Literal["full", "diagonal"] = "full",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    damping: float = 0.0,
    guess: Any = None,
    chunk_length: int | None = None,
) -> tuple[Any, Any]:
    r"""`scan` of any recurrence, parallel in time: its states by Newton's method, all at once.

    cₜ = f(cₜ₋₁, xₜ) for t = 1 … T, linearised at a guess g of all states and solved for its correction, again and again:
    δₜ = Jₜ δₜ₋₁ + (f(gₜ₋₁, xₜ) − gₜ),  Jₜ = ∂f/∂c at gₜ₋₁,  g ← g + δ

    The values are those of `scan`, to the tolerance. Where it does not converge, the states are computed in sequence, all of
    them or, with `chunk_length`, from the first step of the window on: not from the first bad step, since computed for all t
    at once a step rounds differently, and where errors grow these would be other states than those of `scan`. The gradient is
    exact whatever Jacobian the iteration used: one affine recurrence of the exact one, in reverse (`parallel_adjoint_scan`).

    Each iteration is an associative scan of depth 2 log₂ T. With the full Jacobian it takes O(T n³) operations and O(T n²)
    numbers for a row whose state has n: batch axes are found in the traced step, as are entries and leaves of the carry that
    do not depend on each other. With the diagonal alone it takes O(T n) of both beside the steps themselves, and more
    iterations, four to twelve times as many for cells as they are initialised. The diagonal is read off the equations where
    there is one matrix product at most between element-wise operations, as in all cells without layer normalisation; otherwise
    it takes n tangents of all steps, one after the other.

    How many iterations there are depends on the largest Lyapunov exponent (`lyapunov_exponents`): below 0 they hardly grow with
    T, above it so fast that it does not converge (`newton_states`). The layers of a `stack` are solved one after the other.

    By causality each iteration makes at least one more step right, whatever is wrong after it. So `chunk_length` lets a
    window of C steps move on to the first bad step, with O(C n²) numbers. What is not finite on the way is replaced. Leaves
    without a derivative, counters or random keys, run in sequence, with those on which they depend and that depend on them. A
    step that branches (`lax.cond`) is linearised one step at a time. Side effects of a step happen each time it is computed.
    Matrix products of the step are in full precision, unless `jax.default_matmul_precision` says otherwise: rounded to TF32,
    as GPUs do by default, they would not let the states converge. It pays on accelerators, where a loop over time waits at
    each step; on a CPU the loop is faster.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        jacobian: "full", or "diagonal": the derivative of each entry of the carry with respect to itself.
        tolerance: the change of a state in the last iteration, relative to the largest one of its leaf and row up to that step.
            By default 1e-10 in double precision, 2e-6 in single precision, and 4 units in the last place in half precision.
        max_iterations: passes over all time steps after which it goes on in sequence, 100 by default; a window of C steps
            counts as C/T of one.
        damping: from 0 up to, not including, 1; J is multiplied by 1 − damping. Where early iterates overflow it may help.
        guess: of the carries after every step, like `newton_states(...).carries`; zeros by default. The states of the
            last update of the params, say: a good guess saves iterations. Its leaves without a derivative are not read.
        chunk_length: C, time steps whose Jacobians exist at a time. `None` for all, and for the backward pass as
            `parallel_adjoint_scan`.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: another `jacobian`, `damping` outside [0, 1), a tolerance that is not above 0, `max_iterations` or
            `chunk_length` below 1, a guess of other shapes; and as `adjoint_scan`.
        TypeError: a guess of another structure, a step that writes to a mutable array; and as `adjoint_scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 4)
        >>> params, h_0, xs = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((50, 3))
        >>> loss = lambda params, scan, **kw: jnp.mean(scan(cell, params, h_0, xs, **kw)[1] ** 2)
        >>> gradient = jax.jit(jax.grad(loss), static_argnames=("scan", "jacobian"))
        >>> ours = gradient(params, bptt.newton_scan, jacobian="diagonal")
        >>> bptt.compare_gradients(ours, gradient(params, bptt.scan)).agrees
        True

    References:
        DEER: Lim, Zhu, Selfridge and Kasim, Parallelizing non-linear sequential models over the sequence length, 2023,
        arXiv:2309.12252. The diagonal, damping and causality: Gonzalez, Warrington, Smith and Linderman, Towards
        scalable and stable parallelization of nonlinear RNNs (ELK), 2024, arXiv:2407.19115. When it converges: Gonzalez et al.,
        Predictability enables parallelization of nonlinear state space models, 2025, arXiv:2508.16817.
    """
    options = _checked_options(jacobian, tolerance, max_iterations, damping, chunk_length)
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    solver = _Solver.of("newton_scan", step, r, Flags(is_first, valid, reset_carry), guess, options)
    r = solver.r
    # A function with a derivative of its own must not hold tracers.
    solver = solver._replace(r=r._replace(params=None, init=None, xs=None))

    def before(params, init, xs):
        return solver.solve(params, init, xs, finish=True)[0]

    return strategy("newton_scan", solver.over_time, before, r.length, chunk_length)(r)


def newton_states(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    jacobian: Literal["full", "diagonal"] = "full",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    damping: float = 0.0,
    guess: Any = None,
    chunk_length: int | None = None,
) -> NewtonStates:
    r"""The states of a recurrence by Newton's method alone, and how it went: `newton_scan` without the rest in sequence.

    g ← g + δ,  δₜ = Jₜ δₜ₋₁ + (f(gₜ₋₁, xₜ) − gₜ),  until |δₜ| ≤ tolerance · max |gₛ| over s ≤ t

    Does it converge, in how many iterations, and how far did it get? Costs are those of `newton_scan`. The results are arrays,
    under `jax.jit` and `jax.vmap` too, where each mapped row has its own; rows on batch axes share one loop, which ends when all
    are right. They are constants to a gradient: take that of `newton_scan`.

    Args:
        step: as `newton_scan`, like all other arguments.

    Returns:
        `NewtonStates`. Its carries are finite where Newton's method diverged too; from `first_bad_step` on they are worthless
        then, and so are outputs and residual.

    Raises:
        ValueError: as `newton_scan`.
        TypeError: as `newton_scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> unit = lambda w, h, x: (jnp.tanh(w * h + x), h)
        >>> xs = jax.random.normal(jax.random.key(0), (1000,))
        >>> found = bptt.newton_states(unit, 0.9, 0.0, xs)
        >>> print(found.converged, found.iterations < 10, found.first_bad_step)
        True True 1000

    References:
        As `newton_scan`.
    """
    options = _checked_options(jacobian, tolerance, max_iterations, damping, chunk_length)
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    solver = _Solver.of("newton_states", step, r, Flags(is_first, valid, reset_carry), guess, options)
    r, over_time = solver.r, solver.over_time
    params, init, xs = jax.tree.map(_constant, (r.params, r.init, r.xs))
    if r.length:
        before, after, report = solver.solve(params, init, xs, finish=False)
        step = partial(over_time.step.step, params)
        _, ys = at_all_steps(step, r.length, one_at_a_time=over_time.step.one_at_a_time)(before, xs)
    else:
        after, report = room(init, 0), Report.nothing_done(0)
        _, ys = over_time.run(params, init, xs, 0)
    if r.reverse:
        after, ys = flipped((after, ys))
    return NewtonStates(
        after, ys, report.iterations, report.residual, report.first_bad_step == r.length, report.first_bad_step
    )


class _Solver(NamedTuple):
    """A recurrence and how to solve it.

    Attributes:
        over_time: the pass.
        r: the recurrence with params and xs to call it with.
        on_leaves: its step on real leaves.
        groups: of the leaves.
        guess_of: the guess, of the xs that hold it.
        options: of the iteration.
    """

    over_time: Pass
    r: Recurrence
    on_leaves: AllAtOnce
    groups: list[Group]
    guess_of: Callable[[Any], Any]
    options: Options

    @classmethod
    def of(
        cls,
        strategy_name: str,
        step: Callable[..., Any] | Cell,
        r: Recurrence,
        flags: Flags,
        guess: Any,
        options: Options,
    ) -> "_Solver":
        """For a prepared recurrence."""
        check_known_length(strategy_name, r.length)
        r, adjoint = r._replace(step=_in_full_precision(r.step)), step.adjoint if isinstance(step, Cell) else None
        if guess is not None:
            r, adjoint = _with_guess(r, _checked_guess(guess, r), adjoint)
        over_time, r = one_pass(r.step, adjoint, r, flags, 1)
        over_time.check_recomputable(strategy_name)
        on_leaves = AllAtOnce.of(over_time, r.init)
        groups = on_leaves.groups(r.params, r.init, r.xs, look_for_clashes=False)
        guessed, flagged = guess is not None, flags.given

        def guess_of(xs):
            return (xs[0] if flagged else xs)[1] if guessed else None

        return cls(over_time, r, on_leaves, groups, guess_of, options)

    def solve(self, params: Any, init: Any, xs: Any, *, finish: bool) -> tuple[Any, Any, Any]:
        """The carries before and after every step, and the report."""
        leaves, guess = self.on_leaves.leaves, self.guess_of(xs)
        before, after, report = newton(
            lambda parts, x: self.on_leaves.step(parts, (params, x)),
            self.groups,
            leaves.split(init),
            xs,
            None if guess is None else leaves.split(combine(guess, init)),
            self.r.length,
            self.options,
            one_at_a_time=self.over_time.step.one_at_a_time,
            finish=finish,
        )
        return leaves.joined(before), leaves.joined(after), report


def _in_full_precision(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, whose products have full precision unless the user chose one.

    With factors rounded to TF32, the default on GPUs, or to bfloat16, a step jumps by 1e-3 where a factor changes by as
    little as you like, and no iteration gets nearer than that: on an H200, 100 iterations left a GRU wrong from step 272 on.
    """

    def precise(*args):
        config: Any = jax.config
        with jax.default_matmul_precision(config.jax_default_matmul_precision or "highest"):
            return step(*args)

    return precise


def _checked_options(jacobian: Any, tolerance: Any, max_iterations: Any, damping: Any, chunk_length: Any) -> Options:
    if not isinstance(jacobian, str) or jacobian not in ("full", "diagonal"):
        raise ValueError(f"jacobian is {jacobian!r}, but it says what to linearise by: pass 'full' or 'diagonal'.")
    if tolerance is not None and not is_number(tolerance, 0):
        raise ValueError(
            f"tolerance is {tolerance!r}, but it bounds how much a state still changes: pass a number above 0, or None."
        )
    if max_iterations is not None:
        check_count("max_iterations", max_iterations, "it counts passes over all time steps")
    if chunk_length is not None:
        check_count("chunk_length", chunk_length, "it counts time steps")
    if not is_number(damping, -1, 1) or damping < 0:
        raise ValueError(
            f"damping is {damping!r}, but 1 − damping is the factor on the Jacobian: pass a number from 0 up to, but not "
            "including, 1."
        )
    return Options(jacobian == "diagonal", tolerance, max_iterations or _MAX_ITERATIONS, damping, chunk_length)


def _checked_guess(guess: Any, r: Recurrence) -> Any:
    """The guess as a constant, in the dtypes of the carry; `None` for leaves without a derivative, which are not read."""
    if jax.tree.structure(guess) != jax.tree.structure(r.init):
        raise TypeError(
            f"guess has structure {jax.tree.structure(guess)}, but init has {jax.tree.structure(r.init)}: pass carries "
            "stacked on a leading time axis, such as `newton_states(...).carries`."
        )

    def checked(path, leaf, target):
        if not is_differentiable(target):
            return None
        leaf = as_array(name("guess", path), leaf, f"an array of {target.dtype}")
        shape = (r.length, *target.shape)
        if leaf.shape != shape:
            raise ValueError(
                f"{name('guess', path)} has shape {leaf.shape}, but {shape} is expected: the carry after each time step, "
                f"of which there are {r.length}."
            )
        return _constant(leaf.astype(target.dtype))

    return jax.tree_util.tree_map_with_path(checked, guess, r.init)


def _with_guess(r: Recurrence, guess: Any, adjoint: Adjoint | None) -> tuple[Recurrence, Adjoint | None]:
    """The recurrence whose inputs are (xs, guess), since a function with a derivative of its own must not hold tracers."""
    step = r.step
    r = r._replace(step=lambda params, carry, x: step(params, carry, x[0]), xs=(r.xs, guess))
    return r, None if adjoint is None else _adjoint_with_guess(adjoint)


def _adjoint_with_guess(adjoint: Adjoint) -> Adjoint:
    def forward(params, carry, x):
        return adjoint.forward(params, carry, x[0])

    def backward(params, residuals, x, carry_bar, y_bar):
        return adjoint.backward(params, residuals, x[0], carry_bar, y_bar)

    def contract(params, residuals, xs, ys_bar, deltas):
        params_bar, xs_bar = adjoint.contract(params, residuals, xs[0], ys_bar, deltas)
        return params_bar, (xs_bar, jax.tree.map(jnp.zeros_like, xs[1]))

    return Adjoint(forward, backward, contract)


def _constant(leaf: Any) -> Any:
    return jax.lax.stop_gradient(leaf) if is_differentiable(leaf) else leaf
