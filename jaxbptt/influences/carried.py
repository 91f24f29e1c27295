r"""An influence carried beside a recurrence, over all rows of a batch: what `forward_scan` and `tbptt` share.

Here rows are mapped, resets and padding selected, complex arrays taken apart and leaves without a gradient left out, so that an
`Influence` sees one row of real numbers.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.arrays import at_least_float32
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.state import state_jacobian, unravelled, vector
from jaxbptt.programs.flagged import begins, select_rows
from jaxbptt.programs.perturbed import fit
from jaxbptt.programs.rows import Rows
from jaxbptt.trees import combine, is_array, partition, select

_FEW_ROWS = 16


class Carried(NamedTuple):
    """An influence along a recurrence.

    Attributes:
        influence: the estimate.
        rows: the step of one row.
        wanted: for each leaf of the params whether it gets a gradient.
        kept: for each leaf of the carry whether the influence on it counts: whether anything leads from the wanted params through
            it to what the loss uses. The others are inputs of the step, as x is.
    """

    influence: Influence
    rows: Rows
    wanted: Any
    kept: Any

    @property
    def moves(self) -> bool:
        """Whether there is any influence: none where the params do not lead through the carry to what the loss uses."""
        return any(jax.tree.leaves(self.kept)) and any(jax.tree.leaves(self.wanted))

    def init(self, params: Any, carry: Any, x: Any) -> Any:
        """No influence, for each row."""
        if not self.moves:
            return ()
        step, wanted, state, inputs = self._of_row(params, carry, x)

        def of_row(state, inputs):
            return self.influence.init(step, wanted, state, inputs)

        return self.rows.map(of_row, 0, self._input_axes)(state, inputs)

    def advance(self, params: Any, M: Any, carry: Any, x: Any, key: Any) -> Any:
        """From before a step to after it; `carry` is that before it."""
        if not self.moves:
            return M
        step, wanted, state, inputs = self._of_row(params, carry, x)

        def of_row(M, state, inputs, key):
            return self.influence.advance(step, wanted, state, inputs, M, key)

        keys = key if key is None or not self.rows.batch else jax.random.split(key, self.rows.batch)
        return self.rows.map(of_row, 0, 0, self._input_axes, 0)(M, state, inputs, keys)

    def nothing(self, params: Any) -> Any:
        """Zeros to add up gradients in, of real arrays and in single precision at least."""
        wanted = _paired(select(params, self.wanted))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, at_least_float32(leaf.dtype)), wanted)

    def add(self, sums: Any, bars: Any) -> Any:
        """With gradients of the wanted params."""
        return jax.tree.map(lambda total, bar: total + bar.astype(total.dtype), sums, _paired_bar(bars))

    def add_pulled(self, sums: Any, M: Any, carry_bar: Any) -> Any:
        """With dL/dc times the influence, for all rows."""
        if not self.moves:
            return sums
        bars = self.rows.map(self.influence.pull, 0, 0)(M, _paired_bar(carry_bar))
        axes = len(self.rows.batch)
        return jax.tree.map(lambda total, bar: total + _over_rows(bar, axes).astype(total.dtype), sums, bars)

    def finish(self, bars: Any, params: Any) -> Any:
        """What was added up, as gradients like the wanted params."""
        return fit(_unpaired_bar(bars, select(params, self.wanted)), params, self.wanted, "params")

    def start(self, carry: Any) -> Array:
        """dc/dc, for each row: the identity `[*batch, n, n]`."""

        def of_row(state):
            v = vector(state)
            return jnp.eye(v.size, dtype=v.dtype)

        return self.rows.map(of_row, 0)(_paired(select(carry, self.kept)))

    def advance_start(self, params: Any, start: Array, carry: Any, x: Any) -> Array:
        """The derivative of the carry with respect to that at the start, from before a step to after it."""
        step, wanted, state, inputs = self._of_row(params, carry, x)

        def of_row(start, state, inputs):
            return state_jacobian(step, wanted, state, inputs) @ start

        return self.rows.map(of_row, 0, 0, self._input_axes)(start, state, inputs)

    def pull_start(self, start: Array, carry_bar: Any) -> Any:
        """dL/dc times it: a cotangent of the carry at the start."""

        def of_row(start, bar):
            return unravelled(vector(bar) @ start, bar)

        return _unpaired_bar(self.rows.map(of_row, 0, 0)(start, _paired_bar(carry_bar)), carry_bar)

    @property
    def _input_axes(self) -> Any:
        return self.rows.x_axes, 0

    def _of_row(self, params: Any, carry: Any, x: Any) -> tuple[Callable[..., Any], Any, Any, Any]:
        """The step of one row as the influence sees it, and its arguments: the wanted params, the kept carry, and its inputs."""
        wanted, other_params = partition(params, flags=self.wanted)
        state, others = partition(carry, flags=self.kept)

        def step(paired, state_of_row, inputs):
            x, others = inputs
            full = combine(_unpaired(state_of_row, state), others)
            new_carry, y = self.rows.step(combine(_unpaired(paired, wanted), other_params), full, x)
            return _paired(select(new_carry, self.kept)), y

        return step, _paired(wanted), _paired(state), (x, others)


def entering(M: Any, carry: Any, inputs: Any, resets: Any) -> tuple[Any, Any, Any, Any]:
    """What a step starts from where rows are reset or padding: (M, carry, the carry it runs on, the x it runs on).

    `inputs` are (x, is_first, valid) at the step, and `resets` are (reset carry, what padded steps run on), `None` where no flags
    were given.
    """
    (x, first, valid), (reset, padding) = inputs, resets
    if first is not None:
        here = begins(first, valid)
        carry = select_rows(here, reset, carry)
        M = select_rows(here, jax.tree.map(jnp.zeros_like, M), M)
    runs_on = (carry, x) if valid is None else select_rows(valid, (carry, x), padding)
    return M, carry, *runs_on


def _over_rows(bar: Array, axes: int) -> Array:
    """The sum over the leading axes.

    Of a few rows as so many additions: XLA on CPU took 3 to 9 times as long for a sum over a leading axis of 4 (jax 0.10,
    2 cores, x86, rows of 384 × 128 and 1,024 × 256).
    """
    if axes != 1 or len(bar) > _FEW_ROWS or not jax.typeof(bar).sharding.mesh.empty:
        return bar.sum(range(axes))
    return reduce(jnp.add, [bar[i] for i in range(len(bar))])


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
