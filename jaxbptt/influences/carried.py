r"""An influence carried beside a recurrence, over all rows of a batch: what `forward_scan` and `tbptt` share.

Here rows are mapped, resets and padding selected, complex arrays taken apart and leaves without a gradient left out, so that an
`Influence` sees one row of real numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.influences.influence import Influence
from jaxbptt.influences.state import state_jacobian, unravelled, vector
from jaxbptt.programs.perturbed import fit
from jaxbptt.programs.rows import Rows
from jaxbptt.trees import combine, is_array, partition


class Carried(NamedTuple):
    """An influence along a recurrence.

    Attributes:
        influence: the estimate.
        rows: the step of one row.
        wanted: for each leaf of the params whether it gets a gradient.
    """

    influence: Influence
    rows: Rows
    wanted: Any

    def init(self, params: Any, carry: Any, x: Any) -> Any:
        """No influence, for each row."""
        wanted, step = self._of_row(params, carry)

        def of_row(carry, x):
            return self.influence.init(step, wanted, carry, x)

        return self.rows.map(of_row, 0, self.rows.x_axes)(_paired(carry), x)

    def advance(self, params: Any, M: Any, carry: Any, x: Any, key: Any) -> Any:
        """From before a step to after it; `carry` is that before it."""
        wanted, step = self._of_row(params, carry)

        def of_row(M, carry, x, key):
            return self.influence.advance(step, wanted, carry, x, M, key)

        keys = key if key is None or not self.rows.batch else jax.random.split(key, self.rows.batch)
        return self.rows.map(of_row, 0, 0, self.rows.x_axes, 0)(M, _paired(carry), x, keys)

    def pull(self, M: Any, carry_bar: Any) -> Any:
        """dL/dc times the influence, summed over rows: gradients of the wanted params, in the precision of the influence."""
        bars = self.rows.map(self.influence.pull, 0, 0)(M, _paired_bar(carry_bar))
        return jax.tree.map(lambda leaf: leaf.sum(range(len(self.rows.batch))), bars)

    def as_pulled(self, bars: Any) -> Any:
        """Gradients of the wanted params in the form of what `pull` returns."""
        return _paired_bar(bars)

    def finish(self, bars: Any, params: Any) -> Any:
        """What `pull` returned, added up, as gradients like the wanted params."""
        wanted = partition(params, flags=self.wanted)[0]
        bars = _unpaired_bar(bars, wanted)
        return fit(bars, params, self.wanted, "params")

    def _of_row(self, params: Any, carry: Any) -> tuple[Any, Callable[..., Any]]:
        """The wanted params as real arrays, and the step of one row as a function of them."""
        wanted, others = partition(params, flags=self.wanted)

        def step(paired, carry_of_row, x):
            new_carry, y = self.rows.step(combine(_unpaired(paired, wanted), others), _unpaired(carry_of_row, carry), x)
            return _paired(new_carry), y

        return _paired(wanted), step

    def start(self, carry: Any) -> Array:
        """dc/dc, for each row: the identity `[*batch, n, n]`."""

        def of_row(carry):
            v = vector(carry)
            return jnp.eye(v.size, dtype=v.dtype)

        return self.rows.map(of_row, 0)(_paired(carry))

    def advance_start(self, params: Any, start: Array, carry: Any, x: Any) -> Array:
        """The derivative of the carry with respect to that at the start, from before a step to after it."""
        wanted, step = self._of_row(params, carry)

        def of_row(start, carry, x):
            return state_jacobian(step, wanted, carry, x) @ start

        return self.rows.map(of_row, 0, 0, self.rows.x_axes)(start, _paired(carry), x)

    def pull_start(self, start: Array, carry_bar: Any) -> Any:
        """dL/dc times it: a cotangent of the carry at the start."""

        def of_row(start, bar):
            return unravelled(vector(bar) @ start, bar)

        return _unpaired_bar(self.rows.map(of_row, 0, 0)(start, _paired_bar(carry_bar)), carry_bar)


def _is_complex(leaf: Any) -> bool:
    return is_array(leaf) and jnp.iscomplexobj(leaf)


def _paired(tree: Any) -> Any:
    """Complex leaves as pairs of real ones."""
    return jax.tree.map(lambda leaf: (leaf.real, leaf.imag) if _is_complex(leaf) else leaf, tree)


def _unpaired(tree: Any, like: Any) -> Any:
    """Undo `_paired`; `like` has the structure of what it undoes."""

    def joined(leaf, found):
        return jax.lax.complex(*found) if _is_complex(leaf) else found

    return jax.tree.map(joined, like, tree)


def _paired_bar(tree: Any) -> Any:
    """Cotangents of the pairs: that of a + ib is ā - i b̄ in JAX."""
    return jax.tree.map(lambda leaf: (leaf.real, -leaf.imag) if _is_complex(leaf) else leaf, tree)


def _unpaired_bar(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.conj() if _is_complex(leaf) else leaf, _unpaired(tree, like))
