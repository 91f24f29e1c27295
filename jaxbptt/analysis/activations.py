r"""The squashing functions inside a step, found in its trace: how flat they are, and the step as if they never were.

A state Jacobian is weights times slopes of tanh and σ. Which of the two shrinks a gradient can't be read off the Jacobian;
it can be off a second one in which every slope is put to its largest value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.programs.evaluate import bind, evaluate_jaxpr, opening_wrappers
from jaxbptt.programs.trace import TracedStep

# Largest slope, and how fast the slope falls with |a|: tanh′(a) = 1/cosh²(a), σ′(a) = 1/(4 cosh²(a/2)).
_SQUASHING = {"tanh": (1.0, 2.0), "logistic": (0.25, 1.0)}


def relative_slopes(traced: TracedStep) -> Callable[..., dict[str, Array]]:
    """`(params, carry, x) -> {name: mean slope over the units, as a part of its largest value}`, in the order of the trace.

    From the pre-activation, which keeps slopes that 1 − tanh² has lost. Functions inside of branches and loops are not seen.
    """

    def slopes(params, carry, x):
        found = {}

        def record(kind, a):
            _, rate = _SQUASHING[kind]
            e = jnp.exp(-rate * jnp.abs(a))
            found[f"{kind} {len(found) + 1}"] = jnp.mean(4 * e / (1 + e) ** 2)

        _evaluate(traced, (params, carry, x), record)
        return found

    return slopes


def opened(traced: TracedStep) -> Callable[..., Any]:
    """The same step with derivatives as if no tanh and no σ were saturated: each slope at its largest value."""

    def step(params, carry, x):
        return traced.out_tree.unflatten(_evaluate(traced, (params, carry, x), _open))

    return step


def _open(kind: str, a: Array) -> Array:
    largest, _ = _SQUASHING[kind]
    fn = jax.custom_jvp(jnp.tanh if kind == "tanh" else jax.nn.sigmoid)
    fn.defjvp(lambda primals, tangents: (fn(*primals), jnp.asarray(largest, tangents[0].dtype) * tangents[0]))
    return fn(a)


def _evaluate(traced: TracedStep, inputs: Any, visit: Callable[[str, Array], Array | None]) -> list[Any]:
    """Evaluate a step; where `visit` returns something for a squashing function, it stands for its result."""

    def run(eqn, values):
        kind = eqn.primitive.name
        seen = visit(kind, values[0]) if kind in _SQUASHING else None
        return bind(eqn, values) if seen is None else [seen]

    params, carry, x = inputs
    leaves = jax.tree.leaves((params.leaves, carry, x))
    return evaluate_jaxpr(traced.jaxpr, params.closed_over, leaves, opening_wrappers(run))
