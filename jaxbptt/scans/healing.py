r"""The cut of truncated BPTT healed: what the carry at the start of a chunk owes to the params, by an influence.

The gradient of a chunk stops at the carry that it starts from, c. With an influence M = dc/dθ beside c the rest is Mᵀ c̄. Here
the scan that a loss is given adds it, and moves M over the chunk. M comes out of the backward pass as the cotangent of zeros:
so whatever the loss wraps the scan in, nothing has to be handed through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbptt.along_time import at_one_step
from jaxbptt.array_types import as_type, type_of, varying_alike, zeros
from jaxbptt.influences.carried import Carried, entering
from jaxbptt.influences.influence import Influence
from jaxbptt.programs.flagged import taken
from jaxbptt.programs.perturbed import led_to
from jaxbptt.programs.rows import Rows, rows_of
from jaxbptt.programs.trace import TracedStep, trace
from jaxbptt.scans.flags import Flags, beside_input
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import is_array, is_differentiable, same_keys


class Healing(NamedTuple):
    """Of one run of a loss.

    Attributes:
        influence: what is carried; `None` for a cut as it is.
        before: M before the chunk; `None` to find its type.
        key: for an influence that draws.
        given: all arrays that the loss is run on. Where none of them is mapped, a `jax.vmap` around the scan is the loss's own.
        called: gets an entry at each call of the scan.
        found: gets the type of M where the scan is differentiated.
        moved: gets an entry where M is moved over the chunk.
    """

    influence: Any
    before: Any
    key: Any
    given: Any
    called: list[None]
    found: list[Any]
    moved: list[None]

    @classmethod
    def of(cls, influence: Influence | None, before: Any, key: Any, *given: Any) -> "Healing":
        """Before the loss is run."""
        return cls(influence, before, key, given, [], [], [])

    def again(self) -> "Healing":
        """For another run from the same influence."""
        return self.of(self.influence, self.before, self.key, *self.given)

    def around(self, strategy: Callable[..., Any], after: Any = None) -> Callable[..., Any]:
        """`strategy` with the influence; `after` are zeros like it, whose cotangent is the influence after the chunk."""
        return strategy if self.influence is None else partial(self._scan, strategy, after)

    def _scan(
        self,
        strategy: Callable[..., Any],
        after: Any,
        step: Any,
        params: Any,
        init: Any,
        xs: Any = None,
        *,
        length: Any = None,
        is_first: Any = None,
        valid: Any = None,
        reset_carry: Any = None,
        reverse: Any = False,
        **options: Any,
    ) -> tuple[Any, Any]:
        """`strategy`, with the influence of what came before the chunk in the gradient of `params`."""
        if self.called:
            raise ValueError(
                "The loss calls scan more than once, but an influence belongs to one recurrence: put the layers in one step, as "
                "stack does, or leave influence out."
            )
        self.called.append(None)
        if reverse:
            raise ValueError(
                "reverse=True runs from the last step of the chunk, and an influence comes from the chunk before: leave one of "
                "them out."
            )
        r = prepare(step, params, init, xs, length, is_first, valid)
        traced = trace(r.step, r.params, r.init, r.xs)
        if traced.refs:
            raise TypeError(
                "The step has a mutable array (a Ref), and an influence computes each step more than once, so that it would be "
                "written to each time: return what it holds from the step, or leave influence out."
            )
        rows = rows_of(r.step, traced, r.init, r.xs)
        rows.check_flags(is_first, valid)
        chunk = _Chunk(self, traced, rows, r.length, *jax.tree.flatten(r.init))
        start = chunk.with_influence(r.xs)
        flags = Flags(is_first, valid, reset_carry)
        lengths = {} if length is None else {"length": length}
        outputs = strategy(step, params, start, xs, **lengths, **flags.options, **options)
        # Checked by the strategy, and broadcast.
        flagged = beside_input(r._replace(params=traced.params), flags)
        return chunk.moving(outputs, flagged.params[1:], flagged.xs, after)

    def check(self) -> None:
        """Raise where the loss, now differentiated, did not do what an influence needs."""
        if self.influence is None:
            return
        if not self.called:
            raise ValueError(
                "The loss does not call the scan it is given, and an influence is carried beside that: call it."
            )
        if not (self.found and self.moved):
            raise ValueError(
                "The loss does not depend on what scan returns, or nothing that scan is given depends on the params, so there is "
                "no influence to carry: compute the loss from the outputs of scan, or leave influence out."
            )


@partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("wanted",))
@dataclass(frozen=True)
class _Saved:
    """What the forward pass leaves for the backward pass, and for each array that the step reads whether it has a gradient."""

    arrays: Any
    wanted: tuple[bool, ...]


class _Chunk(NamedTuple):
    """The recurrence over a chunk; its params are the `ClosedParams` of the traced step."""

    healing: Healing
    traced: TracedStep
    rows: Rows
    length: int
    leaves: list[Any]
    carry_tree: Any

    def with_influence(self, xs: Any) -> Any:
        """The carry that the chunk starts from, whose cotangent also goes to the params."""
        x = at_one_step(xs)
        before, M_tree = jax.tree.flatten(self.healing.before)

        @jax.custom_vjp
        def joined(own, leaves, before, given):
            return leaves

        def forward(own, leaves, before, given):
            wanted = _perturbed(own)
            own, leaves, before, given = _values((own, leaves, before, given))
            carry = self.carry_tree.unflatten(_of_all_rows(leaves, given))
            types = jax.eval_shape(self._carried(own, wanted).init, own, carry, x)
            self.healing.found.append(types)
            if self.healing.before is not None:
                _check_type(self.healing.before, types)
            return leaves, _Saved((own, before), wanted)

        def backward(saved, bars):
            if self.healing.before is None:
                return None, _instantiated(bars), None, None
            own, before = saved.arrays
            carried = self._carried(own, saved.wanted)
            kept = jax.tree.leaves(carried.kept)
            carry_bar = self.carry_tree.unflatten([_bar(*pair) for pair in zip(bars, kept, strict=True)])
            sums = carried.add_pulled(carried.nothing(own), M_tree.unflatten(before), carry_bar)
            return carried.finish(sums, own), _instantiated(bars), None, None

        joined.defvjp(forward, backward, symbolic_zeros=True)
        given = list(filter(is_array, jax.tree.leaves(self.healing.given)))
        own, leaves, before = varying_alike((self.traced.params, self.leaves, before))
        return self.carry_tree.unflatten(joined(own, leaves, before, given))

    def moving(self, outputs: Any, resets: Any, xs: Any, after: Any) -> Any:
        """What the scan returned; as it is differentiated, the influence moves over the chunk."""
        out, out_tree = jax.tree.flatten(outputs)
        read, read_tree = jax.tree.flatten((self.leaves, resets, xs, self.healing.key))
        before, M_tree = jax.tree.flatten(self.healing.before)

        @jax.custom_vjp
        def attached(out, own, read, before, after):
            return out

        def forward(out, own, read, before, after):
            wanted = _perturbed(own)
            out, own, read, before, after = _values((out, own, read, before, after))
            return out, _Saved((own, read, before), wanted)

        def backward(saved, bars):
            self.healing.moved.append(None)
            if self.healing.before is None:
                return _instantiated(bars), None, None, None, None
            own, read, before = same_keys(saved.arrays)
            leaves, resets, xs, key = read_tree.unflatten(read)
            M = self._moved(own, saved.wanted, M_tree.unflatten(before), leaves, resets, xs, key)
            return _instantiated(bars), None, None, None, M_tree.flatten_up_to(M)

        attached.defvjp(forward, backward, symbolic_zeros=True)
        args = varying_alike((out, self.traced.params, read, before, jax.tree.leaves(after)))
        return out_tree.unflatten(attached(*args))

    def _moved(self, own: Any, wanted: Any, M: Any, leaves: Any, resets: Any, xs: Any, key: Any) -> Any:
        """The influence after the chunk."""
        carried = self._carried(own, wanted)

        def body(state, at_t):
            carry, M = state
            t, inputs = at_t
            M, carry, old, x = entering(M, carry, inputs, resets)
            valid = inputs[2]
            new, _ = self.traced.step(own, old, x)
            M = taken(valid, carried.advance(own, M, same_keys(old), same_keys(x), jax.random.fold_in(key, t)), M)
            return (taken(valid, new, carry), M), None

        steps = jnp.arange(self.length), xs
        state = self.carry_tree.unflatten(leaves), M
        # One step needs no loop: this is online learning.
        return jax.lax.scan(body, state, steps, length=self.length, unroll=self.length == 1)[0][1]

    def _carried(self, own: Any, wanted: Any) -> Carried:
        flags = jax.tree.structure(own).unflatten(wanted)
        # Of the later chunks' losses nothing is known, so all that the params reach counts.
        return Carried(self.healing.influence, self.rows, flags, led_to(self.traced.step, flags, self.traced.shapes))


def _perturbed(own: Any) -> tuple[bool, ...]:
    """Which of the arrays that the step reads have a gradient."""
    return tuple(leaf.perturbed and is_differentiable(leaf.value) for leaf in jax.tree.leaves(own, is_leaf=_is_primal))


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)


def _bar(bar: Any, kept: bool) -> Any:
    """The cotangent of a leaf of the carry, `None` where it has no influence."""
    if not kept:
        return None
    return zeros(as_type(bar.aval)) if isinstance(bar, SymbolicZero) else bar


def _instantiated(bars: Any) -> Any:
    """Cotangents to be passed on, `None` for zeros."""
    return [None if isinstance(bar, SymbolicZero) else bar for bar in bars]


@jax.custom_batching.custom_vmap
def _of_all_rows(leaves: Any, given: Any) -> Any:
    """The leaves of the carry; under a `jax.vmap` in the loss an influence would be that of one row, not of each."""
    return leaves


@_of_all_rows.def_vmap
def _rows_or_runs(axis_size: int, in_batched: Any, leaves: Any, given: Any) -> Any:
    of_leaves, of_given = in_batched
    if not any(of_given):  # not an update mapped over many runs, each with an influence of its own
        raise ValueError(
            "The loss maps scan with jax.vmap, but the influence is that of all rows: give scan the whole batch, with a step for "
            "[*batch, ...], such as jax.vmap(step, (None, 0, 0))."
        )
    return leaves, of_leaves


def _check_type(state: Any, needed: Any) -> None:
    """Raise where the state's influence is not one for this chunk."""
    there, here = (list(map(type_of, jax.tree.leaves(tree))) for tree in (state, needed))
    described = [[f"{aval.dtype}{list(aval.shape)}" for aval in avals] for avals in (there, here)]
    if jax.tree.structure(state) != jax.tree.structure(needed) or described[0] != described[1]:
        there, here = (", ".join(leaves) or "empty" for leaves in described)
        raise ValueError(
            f"The state's influence is {there}, but for this loss and chunk it is {here}: begin with init(params, carry, key, "
            "chunk), for a chunk with as many rows, and keep the influence and the loss."
        )
