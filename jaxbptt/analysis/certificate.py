r"""Methods of taking the gradient compared on the user's own data: how far their results differ, and what each one costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt.analysis.adjoint_parts import AdjointPart, check_parts
from jaxbptt.analysis.compare import relative_error, tolerance
from jaxbptt.analysis.cost import compile_and_cost, median_seconds
from jaxbptt.arrays import check_callable, check_concrete, check_count, scalar_loss
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.html_table import fields_table, html_table, text_table
from jaxbptt.scans.adjoint import adjoint_scan
from jaxbptt.scans.checkpointed import checkpointed_scan
from jaxbptt.scans.exact import scan
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.newton import newton_scan
from jaxbptt.scans.parallel import coefficients_of, parallel_scan
from jaxbptt.scans.parallel_adjoint import parallel_adjoint_scan
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import combine, differentiable, name, partition

Scans = Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]]

# Numbers of all Jacobians: a product of two of them takes n operations a number.
_MOST_COEFFICIENTS = 2**22

COLUMNS = ("method", "relative error", "temporary KiB", "Mflop", "ms", "agrees")
"""Heads of a certificate's table; `row_in_words` makes its rows."""


class CertificateRow(NamedTuple):
    """One method of taking the gradient, checked against the reference.

    Attributes:
        name: of the strategy.
        agrees: whether value and every leaf are within the certificate's tolerance.
        value_error: |L − L_ref| / |L_ref|; nan for a method that gives the gradient only.
        errors: leaf to max|g − g_ref| / max|g_ref|, for leaves of params, and of init and xs where the method gives them.
        largest_error: the largest of `errors`.
        temporary_bytes: the compiler's peak of memory beyond arguments and results.
        flops: floating-point operations, each loop counted as often as it runs; nan where they can't be counted.
        compiler_flops: the compiler's figure, which counts the body of a loop once.
        seconds: median wall-clock time of value and gradient, compiled.
        compile_seconds: from tracing to executable.
    """

    name: str
    agrees: bool
    value_error: float
    errors: Mapping[str, float]
    largest_error: float
    temporary_bytes: int
    flops: float
    compiler_flops: float
    seconds: float
    compile_seconds: float

    _repr_html_ = fields_table


class Certificate(NamedTuple):
    """Every method on the same data. Prints as a table.

    Attributes:
        rows: a `CertificateRow` for each method; the reference, `scan`, is the first.
        tolerance: the relative error up to which a method agrees, by the dtype of the gradient.
        dtype: of the gradient.
        parts: an `AdjointPart` for each part of the `adjoint` given, in the order in which they run; () without one.
    """

    rows: tuple[CertificateRow, ...]
    tolerance: float
    dtype: str
    parts: tuple[AdjointPart, ...] = ()

    def __str__(self) -> str:
        return "\n".join([text_table(COLUMNS, map(row_in_words, self.rows)), *map(str, self.parts)])

    def _repr_html_(self) -> str:
        agrees = f"Agrees up to a relative error of {self.tolerance:.0e}, {self.dtype}."
        rows = map(row_in_words, self.rows)
        return html_table(COLUMNS, rows, title="Certificate", notes=(agrees, *map(str, self.parts)))


def certify(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    scans: Scans | None = None,
    gradients: Mapping[str, Callable[..., Any]] | None = None,
    adjoint: Adjoint | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    r"""Check that all methods of taking value and gradient agree on the same data, and measure what each one costs.

    error of a leaf = max|g − g_ref| / max|g_ref|,  with g_ref by `jax.grad` through `scan`

    Gradients are with respect to params, init and xs. Unlike most functions here it compiles what it is given, since the
    costs are those of compiled programs; don't call it inside `jit`. Run times are medians over `repeats` rounds in which
    the methods take turns. Costs one compilation and `repeats` + 1 runs a method.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        scans: the strategies, by name or as a sequence of functions. By default every exact one: `adjoint_scan` with the
            adjoint derived, and with the `Cell`'s own where there is one, and `checkpointed_scan`; and those that are parallel
            in time where they apply, and where the coefficients of all steps are 2²² numbers at most: `parallel_scan` for a
            step that is affine in the carry, `parallel_adjoint_scan` and `newton_scan` for any other.
        gradients: further methods, which are no scans, by name: `(params, init, xs) -> ∂L/∂params`.
        adjoint: an `Adjoint` of your own for the step. It gets a row, `adjoint_scan (given)`, and each of its three parts is
            checked alone, at every time step and under random cotangents. A part is given what the ones before it returned:
            the first that does not agree is the one to look at.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, as for `scan`; passed to every strategy, like the next two where given.
        valid: booleans `[time, *batch]`, as for `scan`.
        reset_carry: what `is_first` resets to, as for `scan`.
        repeats: rounds of timing.
        progress: called with the name of each method before it is compiled.

    Returns:
        A `Certificate`, whose first row is `scan` itself.

    Raises:
        ValueError: no repeats, two methods of one name, a gradient of another structure or shape; and
            whatever the strategies raise.
        TypeError: traced arguments, a strategy, loss or gradient that is not a function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 8)
        >>> xs = jax.random.normal(jax.random.key(0), (20, 3))
        >>> loss = lambda carry, ys: jnp.mean(ys**2)
        >>> certificate = bptt.certify(cell, cell.init(jax.random.key(1)), cell.initial_carry(), xs, loss)
        >>> for row in certificate.rows:
        ...     print(row.name, row.agrees)
        scan True
        adjoint_scan (derived) True
        adjoint_scan True
        checkpointed_scan True
        checkpointed_scan (schedule) True
        parallel_adjoint_scan True
        newton_scan True
    """
    check_concrete("certify", params=params, init=init, xs=xs)
    loss = scalar_loss(loss)
    check_count("repeats", repeats, "at least one round of timing is needed")
    # Non-differentiable leaves (counters, keys, functions among the params) are the same for every method.
    diff, nondiff = partition((params, init, xs))
    flags = Flags(is_first, valid, reset_carry)
    options = flags.options

    def value_and_gradient(strategy):
        def unrolled_loss(diff):
            params, init, xs = combine(diff, nondiff)
            return loss(*strategy(step, params, init, xs, length=length, **options))

        return jax.value_and_grad(unrolled_loss)

    def gradient_only(method):
        return lambda diff: (math.nan, (differentiable(method(*combine(diff, nondiff))), None, None))

    if gradients is not None and not isinstance(gradients, Mapping):
        raise TypeError(
            f"gradients is a {type(gradients).__name__}: pass functions (params, init, xs) -> gradient by name."
        )
    if scans is None:
        strategies = sequential_strategies(step) + _parallel_strategies(step, params, init, xs, length)
    else:
        strategies = named(scans)
    if adjoint is not None:
        strategies.append(("adjoint_scan (given)", partial(adjoint_scan, adjoint=adjoint)))
    methods = [("scan", value_and_gradient(scan))]
    methods += [(label, value_and_gradient(strategy)) for label, strategy in strategies if strategy is not scan]
    methods += [(label, gradient_only(method)) for label, method in (gradients or {}).items()]
    for label, method in [*strategies, *(gradients or {}).items()]:
        check_callable(f"The method {label!r}", method, "a strategy, or (params, init, xs) -> gradient")
    labels = [label for label, _ in methods]
    check_names(labels)

    calls, costs, results = [], [], []
    for label, method in methods:
        if progress is not None:
            progress(label)
        compiled, cost = compile_and_cost(method, diff)
        calls.append(lambda compiled=compiled: compiled(diff))
        costs.append(cost)
        results.append(jax.tree.map(np.asarray, compiled(diff)))
    seconds = median_seconds(calls, repeats)

    reference_value, reference = results[0]
    bound = tolerance(reference, reference)
    rows = []
    given = len(gradients or {})
    for i, (label, (value, gradient), cost, s) in enumerate(zip(labels, results, costs, seconds, strict=True)):
        value_error = relative_error(value, reference_value)
        errors = _errors_by_leaf(label, gradient, reference)
        value_agrees = value_error <= bound or i >= len(labels) - given
        agrees = value_agrees and all(error <= bound for error in errors.values())
        # numpy's maximum keeps nan, Python's drops it.
        largest = float(np.max([0.0, *errors.values()]))
        rows.append(
            CertificateRow(
                label,
                agrees,
                value_error,
                errors,
                largest,
                cost.temporary_bytes,
                cost.flops,
                cost.compiler_flops,
                s,
                cost.compile_seconds,
            )
        )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(reference)}
    parts = ()
    if adjoint is not None:
        parts = check_parts(step, adjoint, prepare(step, params, init, xs, length, is_first, valid), flags)
    return Certificate(tuple(rows), bound, ", ".join(sorted(map(str, dtypes))), parts)


def sequential_strategies(step: Callable[..., Any] | Cell) -> list[tuple[str, Callable[..., Any]]]:
    """The exact strategies that run a loop over time, by name."""
    strategies: list[tuple[str, Callable[..., Any]]] = [
        ("adjoint_scan", adjoint_scan),
        ("checkpointed_scan", checkpointed_scan),
        ("checkpointed_scan (schedule)", _scheduled),
    ]
    if isinstance(step, Cell) and step.adjoint is not None:
        strategies.insert(
            0, ("adjoint_scan (derived)", lambda cell, *args, **options: adjoint_scan(cell.step, *args, **options))
        )
    return strategies


def _parallel_strategies(
    step: Callable[..., Any] | Cell, params: Any, init: Any, xs: Any, length: int | None
) -> list[tuple[str, Callable[..., Any]]]:
    """Those that apply to the step, unless they would take much longer than all others."""
    r = prepare(step, params, init, xs, length)
    coefficients = coefficients_of(step, r)
    if not 0 < r.length * coefficients.numbers <= _MOST_COEFFICIENTS:
        return []
    if not coefficients.forward_mode:
        return [("parallel_adjoint_scan", parallel_adjoint_scan)]
    candidates = [parallel_scan] if coefficients.affine else [parallel_adjoint_scan, newton_scan]
    return [(strategy.__name__, strategy) for strategy in candidates]


def _scheduled(step: Any, params: Any, init: Any, xs: Any, *, length: int | None, **options: Any) -> tuple[Any, Any]:
    steps = prepare(step, params, init, xs, length).length
    checkpoints = max(math.isqrt(steps), 1)
    return checkpointed_scan(step, params, init, xs, length=length, checkpoints=checkpoints, **options)


def named(scans: Scans) -> list[tuple[str, Callable[..., Any]]]:
    """Strategies with their names."""
    if not isinstance(scans, Mapping | Sequence):
        raise TypeError(f"scans is a {type(scans).__name__}: pass the strategies by name, or a sequence of them.")
    if isinstance(scans, Mapping):
        return list(scans.items())
    return [(getattr(strategy, "__name__", str(strategy)), strategy) for strategy in scans]


def check_names(labels: list[str]) -> None:
    """Raise where two methods have one name."""
    repeated = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if repeated:
        raise ValueError(
            f"More than one method is called {repeated[0]!r}: pass scans as a mapping with a name for each; 'scan' itself "
            "is the reference, and always included."
        )


def _errors_by_leaf(label: str, gradient: Any, reference: Any) -> dict[str, float]:
    errors = {}
    for root, mine, theirs in zip(("params", "init", "xs"), gradient, reference, strict=True):
        if mine is not None:
            if jax.tree.map(np.shape, mine) != jax.tree.map(np.shape, theirs):
                raise ValueError(
                    f"{label!r} returned a gradient of {root} with shapes {jax.tree.map(np.shape, mine)}, but "
                    f"{jax.tree.map(np.shape, theirs)} are expected: the structure and shapes of {root} itself."
                )
            leaves = jax.tree_util.tree_leaves_with_path(theirs)
            for (path, leaf), my_leaf in zip(leaves, jax.tree.leaves(mine), strict=True):
                errors[name(root, path)] = relative_error(my_leaf, leaf)
    return errors


def row_in_words(row: CertificateRow) -> tuple[str, ...]:
    """The cells under `COLUMNS`, the same wherever a certificate is shown."""
    return (
        row.name,
        f"{row.largest_error:.1e}",
        f"{row.temporary_bytes / 1024:,.1f}",
        f"{row.flops / 1e6:,.2f}",
        f"{row.seconds * 1e3:,.2f}",
        "yes" if row.agrees else "NO",
    )
