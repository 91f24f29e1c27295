r"""What every strategy asks of its arguments, checked in one place and before anything is compiled.

`prepare` settles the number of time steps and the dtype of the first carry. As the step is traced, the carry is checked to
keep its structure, shapes and dtypes. Errors name the leaf, what was expected and what to do.
"""

import inspect
from collections.abc import Callable
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.export import is_symbolic_dim

from jaxbptt.along_time import at_one_step
from jaxbptt.array_types import is_on_devices, is_weak, sharded_by_rows, sharded_like
from jaxbptt.arrays import check_count
from jaxbptt.cells.cell import Cell, step_of
from jaxbptt.trees import is_array, is_key, is_ref, name
from jaxbptt.words import counted


class Recurrence(NamedTuple):
    """A step with its arguments, checked: `step(params, carry, x) -> (carry, y)` over `length` time steps.

    With `reverse` it runs from the last of them to the first.
    """

    step: Callable[..., Any]
    params: Any
    init: Any
    xs: Any
    length: int
    reverse: bool = False


def prepare(
    step: Callable[..., Any] | Cell, params: Any, init: Any, xs: Any, length: Any, *flags: Any, reverse: bool = False
) -> Recurrence:
    """Check the arguments of a strategy; `step` is only called if `init` holds Python numbers or is on several devices.

    Entries of the carry will be selected by `flags`, if there are any.
    """
    if not isinstance(reverse, bool | np.bool_):
        raise TypeError(f"reverse is {reverse!r}, but it says whether to run from the last step: pass True or False.")
    step = step_of(step)
    if not jax.tree.leaves(xs) and length is None:
        _raise_for_no_length(step)
    length = _time_steps(xs, length)
    xs = as_arrays("xs", xs)
    step = _in_own_containers(step)
    init = as_arrays("init", init)
    for flag in filter(is_array, flags):
        init = jax.tree.map(lambda leaf, flag=flag: leaf if is_key(leaf) else sharded_by_rows(leaf, flag), init)
    if any(map(is_weak, jax.tree.leaves(init))):
        init = _settle_dtypes(step, params, init, xs)
    step = _checked(step)
    if any(is_on_devices(leaf) for leaf in jax.tree.leaves((params, init, xs)) if is_array(leaf) and not is_ref(leaf)):
        init = _settle_devices(step, params, init, xs)
    return Recurrence(step, params, init, xs, length, bool(reverse))


def as_arrays(root: str, tree: Any) -> Any:
    """Arrays for all leaves; raises for a mutable one, which `jnp.asarray` would read entry by entry, forever."""

    def array(path, leaf):
        if is_ref(leaf):
            leaf_name = name(root, path)
            raise TypeError(
                f"{leaf_name} is a mutable array (a Ref) of shape {leaf.shape}: pass its values, {leaf_name}[...]. In xs, "
                "jaxbptt.scan takes it as it is, without flags."
            )
        return jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(array, tree)


def length_for_scan(length: Any) -> Any:
    """`length=` for `lax.scan`: one that `jax.export` leaves open it takes from its inputs alone."""
    return None if is_symbolic_dim(length) else length


def check_known_length(strategy: str, length: Any) -> None:
    """Raise for a number of time steps that `jax.export` leaves open."""
    if is_symbolic_dim(length):
        raise ValueError(
            f"{strategy} cuts time into segments, but the number of time steps is symbolic, {length}: export it with a "
            "fixed number (the batch may be symbolic), or use scan, adjoint_scan or windowed_scan."
        )


_CALLED_AS_LAX = (
    "The step takes two arguments, (carry, x), as lax.scan's does, but a strategy's takes three, (params, carry, x): call the "
    "strategy as lax.scan is called, as_lax(adjoint_scan)(f, init, xs), or give it a step that takes params, which may be "
    "None, adjoint_scan(lambda params, carry, x: f(carry, x), None, init, xs)."
)


def _raise_for_no_length(step: Callable[..., Any]) -> None:
    """Raise where neither xs nor length is there, as in a call like that of `lax.scan`."""
    if _takes_two(step):
        raise TypeError(_CALLED_AS_LAX)
    raise ValueError(
        "Neither xs nor length was given: pass xs with time as its first axis, or length=T. The arguments are (step, params, "
        "init, xs), and those of lax.scan, (f, init, xs), go to as_lax(strategy)."
    )


def _takes_two(step: Callable[..., Any]) -> bool:
    """Whether a step can be called with (carry, x) and not with (params, carry, x), by its signature."""

    def accepts(count, signature):
        try:
            signature.bind(*range(count))
        except TypeError:
            return False
        return True

    try:
        signature = inspect.signature(step)
        if inspect.isfunction(step):  # its own code says more than what it wraps, unless it hands on any arguments
            own = inspect.signature(step, follow_wrapped=False)
            hands_on = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own.parameters.values())
            signature = signature if hands_on else own
    except (TypeError, ValueError):  # a callable without a signature
        return False
    return accepts(2, signature) and not accepts(3, signature)


def _time_steps(xs: Any, length: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(xs)
    if is_symbolic_dim(length):
        if not leaves:
            raise ValueError(f"length is symbolic, {length}, and there are no xs to take it from: pass a whole number.")
    elif length is not None:
        way_out = (
            "a traced one is not known yet, name it in static_argnames of jax.jit"
            if isinstance(length, Tracer)
            else None
        )
        check_count("length", length, "it counts time steps", least=0, way_out=way_out)
        length = index(length)
    sizes = []
    for path, leaf in leaves:
        shape = jnp.shape(leaf)
        if not shape:
            raise ValueError(
                f"{name('xs', path)} has no axis to scan over: its shape is (). Time is the first axis of every leaf of xs; "
                "what stays the same at every step belongs to params."
            )
        sizes.append((shape[0], name("xs", path), shape))
    if length is not None:
        sizes.insert(0, (length, "length", length))
    steps, first, first_shape = sizes[0]
    for size, leaf_name, shape in sizes[1:]:
        if size != steps:
            raise ValueError(
                f"{first} says {counted(steps, 'time step')} ({first_shape}), but {leaf_name} has {size} (shape {shape}). "
                "Time is the first axis, and every leaf of xs (and length, where given) must agree on it: cut or pad "
                "one of them."
            )
    return steps


def _settle_dtypes(step: Callable[..., Any], params: Any, init: Any, xs: Any) -> Any:
    """Give Python numbers in `init` the dtype they have after a step, as `lax.scan` does; those that keep it stay weak."""
    result = jax.eval_shape(lambda carry, x: step(params, carry, x), init, at_one_step(xs))
    if not _is_pair(result) or jax.tree.structure(result[0]) != jax.tree.structure(init):
        return init  # `_checked` has the better message, when the step is traced.

    def settled(leaf, to):
        return leaf.astype(to.dtype) if is_weak(leaf) and leaf.dtype != to.dtype and _keeps(leaf, to) else leaf

    return jax.tree.map(settled, init, result[0])


def _settle_devices(step: Callable[..., Any], params: Any, init: Any, xs: Any) -> Any:
    """Give `init` the sharding, and the devices it varies over, of the carry after a step: a carry of zeros has neither."""
    for _ in jax.tree.leaves(init):  # the sharding of one leaf may follow from another's
        new, _ = jax.eval_shape(lambda carry, x: step(params, carry, x), init, at_one_step(xs))
        init, before = jax.tree.map(sharded_like, init, new), init
        if all(old is leaf for old, leaf in zip(*map(jax.tree.leaves, (before, init)), strict=True)):
            return init
    return init


def _keeps(leaf: Any, to: Any) -> bool:
    """Whether the new dtype holds the number: a real one holds a whole number, not the other way round."""
    kinds = (jnp.complexfloating, jnp.floating, jnp.integer, jnp.bool_)
    old, new = (next((i for i, kind in enumerate(kinds) if jnp.issubdtype(x.dtype, kind)), None) for x in (leaf, to))
    return old is not None and new is not None and new <= old


def _in_own_containers(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, called with copies of its containers: it may change them, and they are read after it, and traced again."""

    def in_own_containers(*args):
        args = jax.tree.map(lambda leaf: leaf, args)
        try:
            return step(*args)
        except TypeError as error:
            if "positional argument" in str(error) and _takes_two(step):
                raise TypeError(_CALLED_AS_LAX) from error
            raise

    return in_own_containers


def _checked(step: Callable[..., Any]) -> Callable[..., Any]:
    def checked_step(params, carry, x):
        result = step(params, carry, x)
        if not _is_pair(result):
            raise TypeError(f"A step returns a pair (carry, y), but this one returned {_describe(result)}.")
        new_carry, y = result
        _check_carry(carry, new_carry)
        return new_carry, y

    return checked_step


def _check_carry(before: Any, after: Any) -> None:
    structure, new_structure = jax.tree.structure(before), jax.tree.structure(after)
    if structure != new_structure:
        raise TypeError(
            f"The carry changed its structure across a step: it went in as {structure} and came out as {new_structure}. "
            "Return the new carry in the containers of the old one; per-step results belong in y."
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        leaf, old, new = name("carry", path), jax.typeof(old), jax.typeof(new)
        if new.shape != old.shape:
            way_out = f"return one of shape {old.shape} from the step, and what else is wanted of it in y."
            if _is_broadcast(old.shape, new.shape):
                way_out = f"if xs has batch axes, start from a carry that has them too, {new.shape}."
            raise ValueError(
                f"{leaf} changed its shape across a step: it went in as {old.shape} and came out as {new.shape}. "
                f"The carry must keep its shape: {way_out}"
            )
        if new.dtype != old.dtype:
            raise TypeError(
                f"{leaf} changed its dtype across a step: it went in as {old.dtype} and came out as {new.dtype}. Start "
                f"from a carry of {new.dtype}, or cast in the step with .astype({old.dtype.name!r}) before returning."
            )


def _is_broadcast(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether an array of the first shape would be repeated to make the second."""
    along = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and 0 not in large and all(size in (1, other) for size, other in along)


def _is_pair(result: Any) -> bool:
    return isinstance(result, tuple | list) and len(result) == 2


def _describe(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {len(result)}"
    if hasattr(result, "shape"):
        return f"one array of shape {result.shape}"
    return f"{type(result).__name__}"
