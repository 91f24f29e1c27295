r"""Truncated BPTT as a pure update: the carry passes from chunk to chunk, the gradient does not.

`tbptt` returns two functions in optax's style, and the loop is the user's. Everything a run needs is in one pytree,
`TrainState`: saved and loaded, the run continues bit for bit.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxbptt.array_types import is_weak, zeros
from jaxbptt.arrays import at_least_float32, check_callable, check_count, check_key
from jaxbptt.html_table import fields_table
from jaxbptt.influences.influence import Influence, check_influence
from jaxbptt.scans.adjoint import adjoint_scan
from jaxbptt.scans.exact import scan as exact_scan
from jaxbptt.scans.healing import Healing
from jaxbptt.scans.truncated import truncated_scan
from jaxbptt.scans.windowed import windowed_scan
from jaxbptt.training.chunks import Chunk
from jaxbptt.trees import combine, differentiable, is_array, name, partition
from jaxbptt.words import counted


class TrainState(NamedTuple):
    """A run between two updates, one pytree.

    Attributes:
        params: of the network, any pytree.
        opt_state: states of the clipping and of the optimiser, for the differentiable params.
        carry: before the next chunk.
        step: updates so far; where each chunk is used once, also the position in the stream.
        key: random key, split at each update.
        influence: dc/dθ of that carry, or an estimate, with `tbptt(influence=...)`; `None` without.
    """

    params: Any
    opt_state: Any
    carry: Any
    step: Array
    key: Any
    influence: Any = None

    _repr_html_ = fields_table


class Metrics(NamedTuple):
    """What an update measured, scalars.

    Attributes:
        loss: before the update.
        gradient_norm: ‖dL/dθ‖₂ over all leaves, before clipping.
        fraction_clipped: the share of the gradient's nonzero entries that clipping changed.
        carry_norm: ‖c‖₂ over all leaves and rows, after the chunk.
        aux: what the loss returned beside the carry, with `has_aux=True`; () without.
    """

    loss: Array
    gradient_norm: Array
    fraction_clipped: Array
    carry_norm: Array
    aux: Any = ()

    _repr_html_ = fields_table


class Evaluation(NamedTuple):
    """What `evaluate` measured: the `Metrics` that take no gradient.

    Attributes:
        loss: of the chunk.
        carry_norm: ‖c‖₂ over all leaves and rows, after the chunk.
        aux: what the loss returned beside the carry, with `has_aux=True`; () without.
    """

    loss: Array
    carry_norm: Array
    aux: Any = ()

    _repr_html_ = fields_table


class _InitAndUpdate(NamedTuple):
    init: Callable[..., TrainState]
    update: Callable[..., tuple[TrainState, Metrics]]


class TruncatedBPTT(_InitAndUpdate):
    """The functions of `tbptt`: a pair `init, update`, with `evaluate` beside it.

    Attributes:
        init: `(params, carry, key, chunk=None) -> TrainState`.
        update: `(state, chunk) -> (state, Metrics)`.
        evaluate: `(state, chunk) -> (state, Evaluation)`.
    """

    evaluate: Callable[..., tuple[TrainState, Evaluation]]

    def __new__(cls, init: Any, update: Any, evaluate: Any) -> "TruncatedBPTT":
        """Unpacked, it is the pair alone."""
        functions = super().__new__(cls, init, update)
        functions.evaluate = evaluate
        return functions


def tbptt(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    truncation_length: int | None = None,
    update_every: int | None = None,
    burn_in: int = 0,
    scan: Callable[..., Any] | None = None,
    clip: optax.GradientTransformation | None = None,
    has_aux: bool = False,
    influence: Influence | None = None,
) -> TruncatedBPTT:
    r"""Truncated BPTT: an update every k₁ time steps, with a gradient that reaches back k₂ of them.

    c, L = loss(θ, c, chunk),  θ ← θ + optimizer(clip(∂L/∂θ)),  with ∂c/∂θ = 0 for the incoming carry

    - Neither length given: the gradient goes back to the start of the chunk (k₁ = k₂ = the chunk's length).
    - `truncation_length` < `update_every`: the gradient is also cut inside the chunk, every k₂ steps (`truncated_scan`).
      This needs the memory of k₂ steps only, but computes each step twice: to save time, use shorter chunks.
    - `truncation_length` > `update_every`: a chunk has k₂ steps. The first k₂ − k₁ are those that the chunk before ended
      with (`streams.rows(..., overlap=k₂ - k₁)`); they are recomputed with the current params. Only the losses of the
      last k₁ steps count, and their gradient reaches back through the whole chunk. It costs k₁ more forward steps, which
      give the carry that the next chunk starts from.

    With `influence` the cut is healed: M = dc/dθ is carried from chunk to chunk beside the carry, and the gradient gets what the
    chunk says of the carry c that it starts from, times M:

    ∂L/∂θ = (∂L/∂θ)_c + c̄ᵀ M,  c̄ = ∂L/∂c

    With `influences.rtrl()` and θ held, the gradients of the chunks add up to that of the whole sequence, to rounding. While θ
    learns, M is that of the params that were used on the way (Williams and Zipser). Chunks of one step are online learning. It
    costs one more forward pass and, at each step and row, what the influence costs: O(n² p) for `rtrl`, n numbers of the carry
    and p of the params. Healed are the params that `scan` is given, whatever the loss computes them from, and arrays that its
    step closes over. What else the carry depends on has its gradient from within the chunk, as without an influence: so put an
    embedding of the inputs, or another layer, into the step. `scan` is called once, with the carry that the loss is given, and
    the loss returns the carry that it returns.

    An update costs what its gradient and the optimiser cost; memory does not grow with the number of updates. Chunks of one
    shape are traced once; pad a shorter one (`streams` do).

    Args:
        loss: `loss(params, carry, chunk, *, scan, key) -> (loss, carry)`. It unrolls the network with the `scan` it is
            given, `carry, ys = scan(step, params, carry, chunk.xs)`, which already has the chunk's `valid` and `is_first`.
            It masks what it computes from the outputs with `chunk.mask`, as in `losses.cross_entropy(ys, chunk.targets,
            mask=chunk.mask)`. `key` is a new one at every update. With `has_aux=True` it returns `(loss, (carry, aux))`.
        optimizer: any of optax's, including those that need the value of the loss; schedules belong to it.
        truncation_length: k₂, time steps.
        update_every: k₁, time steps; by default the chunk's length.
        burn_in: time steps at the start of each chunk that only bring the carry up to date, without gradient or loss, as
            for replayed sequences with a stored state (Kapturowski et al. 2019).
        scan: the strategy; `adjoint_scan` by default. `truncation_length` < `update_every` sets it to `truncated_scan`.
        clip: a transformation of the gradient before the optimiser, such as `optax.clip_by_global_norm(1.0)`. Only what it
            changes counts in `fraction_clipped`.
        has_aux: whether the loss returns aux beside the carry, any pytree, which then is `aux` of the metrics.
        influence: heals the cut: an `Influence`, exact as `influences.rtrl()` or an estimate, is carried from chunk to chunk.

    Returns:
        `init(params, carry, key, chunk=None) -> TrainState` and `update(state, chunk) -> (state, Metrics)`, to be jitted by
        the caller, best with `donate_argnums=0`. With an influence `init` needs a chunk, of which it reads the shapes. A chunk
        is a `Chunk` with leaves `[time, batch, ...]`. Params that are not differentiable, such as integers, are left unchanged;
        a model with functions or flags among its leaves needs `eqx.filter_jit` in place of `jax.jit`.

        The pair also has `evaluate(state, chunk) -> (state, Evaluation)`: the loss that `update` would find, without
        gradient, update or the memory of one. Of the state it changes the carry and the key, so validation starts from a
        state with a carry of its own, `state._replace(carry=...)`. Don't donate that: its params are those in training. An
        influence it leaves as it is, no longer that of the carry: don't go on to train from there.

    Raises:
        ValueError: lengths below 1, a `truncation_length` below `update_every` together with a `scan`, a `burn_in` where
            chunks overlap, an `influence` with a `burn_in`, a `truncation_length` or a strategy that truncates; from `update`, a
            chunk whose length doesn't match these options. With an influence, also from `init` without a chunk, and from both for
            a loss that calls `scan` twice or never, maps it with `jax.vmap`, runs it in reverse or does not depend on it, and for
            rows with flags that can't be told apart; from `update`, a state with an influence of another form.
        TypeError: a `loss` or `scan` that is not a function, an `optimizer` or `clip` that is not optax's; from `init`, a
            `key` that is not a random key; from `update`, a state or chunk of another type, a loss that doesn't return a
            pair, or no pair of carry and aux with `has_aux=True`; an `influence` that is no `Influence`, and with one, a step that
            writes to a mutable array.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import jaxbptt as bptt
        >>> cell = bptt.lstm(1, 8)
        >>> net = bptt.network(cell, output_size=1)
        >>> def loss(params, carry, chunk, *, scan, key):
        ...     carry, outputs = net.apply(params, carry, chunk.xs, scan=scan)
        ...     return bptt.losses.mean_squared_error(outputs, chunk.targets, mask=chunk.mask), carry
        >>> functions = bptt.tbptt(loss, optax.adam(1e-2), clip=optax.clip_by_global_norm(1.0))
        >>> init, update = functions
        >>> state = init(net.init(jax.random.key(0)), cell.initial_carry((4,)), jax.random.key(1))
        >>> waves = bptt.streams.rows(jnp.sin(jnp.arange(2_000.0))[:, None], batch=4, chunk_length=20)
        >>> update = jax.jit(update)
        >>> first = update(state, waves.at(0))[1].loss
        >>> for chunk in waves:
        ...     state, metrics = update(state, chunk)
        >>> int(state.step), bool(metrics.loss < first / 2)
        (25, True)
        >>> held_out = bptt.streams.rows(jnp.cos(jnp.arange(400.0))[:, None], batch=4, chunk_length=20)
        >>> evaluate, validation, total = jax.jit(functions.evaluate), state._replace(carry=cell.initial_carry((4,))), 0.0
        >>> for chunk in held_out:
        ...     validation, measured = evaluate(validation, chunk)
        ...     total += measured.loss / len(held_out)
        >>> bool(total < first)
        True

        Healed, the gradients of all chunks add up to that of the sequence, here of w + w² + w³ at w = 1/2:

        >>> def total(w, h, chunk, *, scan, key):
        ...     h, hs = scan(lambda w, h, x: (w * h, w * h), w, h, chunk.xs)
        ...     return jnp.sum(hs), h
        >>> w, one_step = jnp.array(0.5), bptt.Chunk(jnp.zeros((1, 1)))
        >>> for influence in (None, bptt.influences.rtrl()):
        ...     init, update = bptt.tbptt(total, optax.sgd(-1.0), influence=influence)  # w + ∂L/∂w
        ...     state, gradient = init(w, jnp.ones(1), jax.random.key(0), one_step), 0.0
        ...     for _ in range(3):
        ...         state, _ = jax.jit(update)(state._replace(params=w), one_step)
        ...         gradient += state.params - w
        ...     print(gradient)
        1.75
        2.75

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490: BPTT(h; h′) with h = k₂ and h′ = k₁. Williams and Zipser, A learning algorithm for
        continually running fully recurrent neural networks, 1989, doi:10.1162/neco.1989.1.2.270: the influence. Kapturowski et
        al., Recurrent experience replay in distributed reinforcement learning, ICLR 2019.
    """
    returned = "(loss, (carry, aux))" if has_aux else "(loss, carry)"
    check_callable("loss", loss, f"loss(params, carry, chunk, *, scan, key) -> {returned}")
    clip = optax.identity() if clip is None else clip
    for option, given in (("optimizer", optimizer), ("clip", clip)):
        if not hasattr(given, "update"):
            raise TypeError(f"{option} is a {type(given).__name__}, but a transformation of optax's is expected.")
    overlap = _overlap(truncation_length, update_every, burn_in)
    if influence is not None:
        _check_influence(influence, scan, truncation_length, update_every, burn_in)
    strategy = _strategy(scan, truncation_length, update_every, overlap)
    if burn_in:
        strategy = partial(_with_burn_in, strategy, burn_in)

    def init(params: Any, carry: Any, key: Any, chunk: Any = None) -> TrainState:
        check_key(key)
        # Copies, since the caller may donate the state to `update`; some optimisers keep the params in their own state.
        params, carry, key = jax.tree.map(_copied, (params, carry, key))
        trained = differentiable(params)
        opt_state = jax.tree.map(_copied, (clip.init(trained), optimizer.init(trained)))
        state = TrainState(params, opt_state, carry, jnp.zeros((), jnp.int32), key)
        return state if influence is None else state._replace(influence=no_influence(state, chunk))

    def no_influence(state: TrainState, chunk: Any) -> Any:
        """Zeros, in the form that the influence has for this loss."""
        if chunk is None:
            raise ValueError(
                "The form of an influence depends on what the loss gives to scan: pass a chunk as well, init(params, carry, key, "
                "chunk). Only its shapes are read."
            )
        trained, fixed = partition(state.params)
        _, chunk_key, _ = begin("init", state, chunk)
        arrays, static = partition((state.carry, chunk, chunk_key), is_array)

        def gradient(trained, arrays):
            carry, chunk, key = combine(arrays, static)
            healing = Healing.of(influence, None, None, trained, arrays)
            unroll = healing.around(strategy)
            jax.grad(lambda trained: run(combine(trained, fixed), carry, chunk, key, unroll)[0])(trained)
            healing.check()
            found.append(healing.found[0])

        found = []
        jax.eval_shape(gradient, trained, arrays)
        return jax.tree.map(zeros, found[0])

    def run(
        params: Any, carry: Any, chunk: Chunk, key: Any, strategy: Callable[..., Any] = strategy
    ) -> tuple[Array, tuple[Any, Any]]:
        """(loss, (carry, aux)) of a chunk, aux () where the loss has none."""
        flags = {word: flag for word in ("valid", "is_first") if (flag := getattr(chunk, word)) is not None}
        chunk = chunk._replace(mask=_loss_mask(chunk, uncounted=max(overlap, burn_in)))
        result = loss(params, carry, chunk, scan=partial(_on_chunk, strategy, flags), key=key)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"The loss returns a pair {returned}, but this one returned {type(result).__name__}.")
        value, after = result
        if not has_aux:
            return value, (after, ())
        if not (isinstance(after, tuple) and len(after) == 2):
            raise TypeError(
                f"With has_aux=True the loss returns {returned}, but this one returned {type(after).__name__} in the place "
                "of (carry, aux)."
            )
        return value, after

    def run_to_next(params: Any, carry: Any, chunk: Chunk, key: Any, last: Any) -> Any:
        """The carry that the next chunk starts from, checked; `last` is that after this one."""
        _check_carry(carry, last, returned)
        if not overlap:
            return last
        # The next chunk starts inside this one, so the carry it needs is not the last one but that after k₁ steps.
        before_next = jax.tree.map(lambda leaf: leaf[: len(leaf) - overlap], chunk)
        return run(params, carry, before_next, key)[1][0]

    def begin(function: str, state: TrainState, chunk: Chunk) -> Any:
        """The state's next key, that for this chunk, and that for the influence."""
        if not isinstance(state, TrainState):
            raise TypeError(
                f"{function} takes a TrainState, but got a {type(state).__name__}: pass what init(...) returned."
            )
        _check_chunk(function, chunk, truncation_length, update_every, burn_in)
        # A third key for an influence; without one, runs are what they were.
        return (*jax.random.split(state.key), None) if influence is None else jax.random.split(state.key, 3)

    def update(state: TrainState, chunk: Chunk) -> tuple[TrainState, Metrics]:
        key, chunk_key, influence_key = begin("update", state, chunk)
        _check_state(state, influence)
        trained, fixed = partition(state.params)

        def loss_of(healing, trained, after):
            # state.carry is a constant here, whatever params it was computed with: this is the truncation.
            return run(combine(trained, fixed), state.carry, chunk, chunk_key, healing.around(strategy, after))

        healing = Healing.of(influence, state.influence, influence_key, trained, state.carry, chunk, chunk_key)
        after = jax.tree.map(zeros, state.influence)
        healed = jax.value_and_grad(partial(loss_of, healing), argnums=(0, 1), has_aux=True)
        (value, (last, aux)), (gradient, influence_after) = healed(trained, after)
        healing.check()
        next_carry = run_to_next(state.params, state.carry, chunk, chunk_key, last)
        clip_state, opt_state = state.opt_state
        clipped, clip_state = clip.update(gradient, clip_state, trained)

        def value_of(trained):
            return loss_of(healing.again(), trained, after)[0]

        # What optax passes to optimisers that take more than the gradient, such as line searches; unused, it costs nothing.
        extra = {"value": value, "grad": clipped, "value_fn": value_of}
        updates, opt_state = optax.with_extra_args_support(optimizer).update(clipped, opt_state, trained, **extra)
        params = combine(optax.apply_updates(trained, updates), fixed)
        metrics = Metrics(
            loss=value,
            gradient_norm=_norm(gradient),
            fraction_clipped=_fraction_changed(gradient, clipped),
            carry_norm=_norm(differentiable(next_carry)),
            aux=aux,
        )
        return TrainState(params, (clip_state, opt_state), next_carry, state.step + 1, key, influence_after), metrics

    def evaluate(state: TrainState, chunk: Chunk) -> tuple[TrainState, Evaluation]:
        key, chunk_key, _ = begin("evaluate", state, chunk)
        value, (last, aux) = run(state.params, state.carry, chunk, chunk_key)
        next_carry = run_to_next(state.params, state.carry, chunk, chunk_key, last)
        measured = Evaluation(value, _norm(differentiable(next_carry)), aux)
        return state._replace(carry=next_carry, key=key), measured

    return TruncatedBPTT(init, update, evaluate)


def _copied(leaf: Any) -> Any:
    """A new array of a fixed dtype: a weakly typed one changes its type at the first update, and would be traced twice."""
    if not is_array(leaf):
        return leaf
    copy = jnp.array(leaf, copy=True)
    return copy.astype(copy.dtype) if is_weak(copy) else copy


def _overlap(truncation_length: Any, update_every: Any, burn_in: Any) -> int:
    """How many steps a chunk shares with the one before it."""
    if truncation_length is not None:
        check_count("truncation_length", truncation_length, "it counts time steps")
    if update_every is not None:
        check_count("update_every", update_every, "it counts time steps")
    check_count("burn_in", burn_in, "it counts time steps", least=0)
    overlap = max(truncation_length - update_every, 0) if truncation_length and update_every else 0
    if overlap and burn_in:
        raise ValueError(
            f"burn_in={burn_in} was given with truncation_length={truncation_length} above update_every={update_every}, "
            "whose chunks already begin with steps that only bring the carry up to date: leave one of them out."
        )
    return overlap


def _check_influence(influence: Any, scan: Any, truncation_length: Any, update_every: Any, burn_in: int) -> None:
    """Raise unless chunks follow each other, each step in one of them, and the gradient reaches back to their starts."""
    check_influence(influence, "it says how dc/dθ is carried from chunk to chunk")
    cutting = getattr(scan, "func", scan) in (truncated_scan, windowed_scan)
    if truncation_length is not None or cutting:
        how = f"scan={scan!r}" if cutting else f"truncation_length={truncation_length}"
        raise ValueError(
            f"{how} was given with an influence, which is what the gradient of a whole chunk lacks: leave one of them out."
        )
    if burn_in:
        raise ValueError(
            f"burn_in={burn_in} was given with an influence, which says what the carry at the start of a chunk owes to the "
            "params, where burn_in has no gradient: leave one of them out."
        )


def _check_state(state: TrainState, influence: Any) -> None:
    """Raise where a state and `tbptt` don't have the same influence."""
    if influence is None and state.influence is not None:
        raise ValueError(
            "The state has an influence, but this tbptt was called without one: pass it, or state._replace(influence=None)."
        )
    if influence is not None and state.influence is None:
        raise ValueError(
            "The state has no influence, but this tbptt was called with one: begin with its init(params, carry, key, chunk)."
        )


def _strategy(scan: Any, truncation_length: Any, update_every: Any, overlap: int) -> Callable[..., Any]:
    """The scan given, or the one that the lengths ask for."""
    if scan is not None:
        check_callable("scan", scan, "adjoint_scan, or another strategy")
    if truncation_length is None or overlap:
        return adjoint_scan if scan is None else scan
    if scan is None:
        return partial(truncated_scan, truncation_length=truncation_length)
    if truncation_length != update_every:
        raise ValueError(
            f"truncation_length={truncation_length} cuts inside a chunk, which is done by truncated_scan, and another scan "
            "was given: leave one of them out, or pass scan=partial(truncated_scan, truncation_length=...)."
        )
    return scan


def _check_chunk(function: str, chunk: Any, truncation_length: Any, update_every: Any, burn_in: int) -> None:
    """Raise unless a chunk has as many time steps as the options ask for."""
    if not isinstance(chunk, Chunk):
        raise TypeError(f"{function} takes a Chunk(xs, targets, ...), but got a {type(chunk).__name__}.")
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(chunk)}
    if len(sizes) != 1:
        raise ValueError(
            f"The chunk's leaves have {sorted(sizes)} time steps: time is their first axis, and they must agree on it."
        )
    (steps,) = sizes
    if update_every is not None:
        expected = max(truncation_length or 0, update_every)
        if steps != expected:
            new = f", the last {update_every} of them new (streams.rows(..., overlap=...))" * (expected > update_every)
            raise ValueError(
                f"The chunk has {counted(steps, 'time step')}, but update_every={update_every} and "
                f"truncation_length={truncation_length} take chunks of {expected}{new}: cut it, or pad it with streams.pad."
            )
    elif truncation_length is not None and steps < truncation_length:
        raise ValueError(
            f"The chunk has {counted(steps, 'time step')}, but truncation_length is {truncation_length}: a gradient that "
            "reaches back beyond the chunk needs update_every as well, and chunks that overlap."
        )
    if burn_in >= steps:
        raise ValueError(
            f"The chunk has {counted(steps, 'time step')}, and burn_in={burn_in} leaves none of them to learn from."
        )


def _check_carry(before: Any, after: Any, returned: str) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        aux = ""
        if isinstance(after, tuple) and after and jax.tree.structure(after[0]) == jax.tree.structure(before):
            aux = " For (loss, (carry, aux)) pass has_aux=True."
        raise TypeError(
            f"The loss returned a carry of structure {jax.tree.structure(after)}, but it was given one of "
            f"{jax.tree.structure(before)}: return {returned}, the carry as the scan returns it.{aux}"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        old, new = jax.typeof(old), jax.typeof(new)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"The loss returned {name('carry', path)} as {new.dtype}{list(new.shape)}, but it was given "
                f"{old.dtype}{list(old.shape)}: return {returned}, the carry as the scan returns it."
            )


def _loss_mask(chunk: Chunk, uncounted: int) -> Any:
    """Where a step counts in the loss: not in padding, nor in the first `uncounted` steps. `None` if all do."""
    masks = [mask for mask in (chunk.mask, chunk.valid) if mask is not None]
    if uncounted:
        like = masks[0] if masks else jnp.empty(jax.tree.leaves((chunk.is_first, chunk.targets, chunk.xs))[0].shape[:2])
        counts = jnp.arange(len(like)) >= uncounted
        masks.append(jnp.broadcast_to(counts.reshape(-1, *(1,) * (like.ndim - 1)), like.shape))
    return reduce(jnp.logical_and, masks) if masks else None


def _on_chunk(
    scan: Callable[..., Any], flags: Any, step: Any, params: Any, init: Any, *args: Any, **options: Any
) -> Any:
    """`scan` with the flags of a chunk, except those that the call gives itself."""
    flags = {word: flag for word, flag in flags.items() if word not in options}
    rows: Any = next((jnp.shape(flag)[1:2] for flag in flags.values()), ())
    for path, leaf in jax.tree_util.tree_leaves_with_path(differentiable(init)):
        if jnp.shape(leaf)[: len(rows)] != rows:
            raise ValueError(
                f"The chunk has {rows[0]} rows, but {name('carry', path)} has shape {jnp.shape(leaf)}: rows are its first "
                f"axis. Start from a carry with as many, such as cell.initial_carry(({rows[0]},)), or change the stream's "
                "batch."
            )
    return scan(step, params, init, *args, **flags, **options)


def _with_burn_in(
    scan: Callable[..., Any],
    burn_in: int,
    step: Any,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """`scan` whose first `burn_in` steps have no gradient, neither through the carry nor through their outputs."""
    if options.get("reverse"):
        raise ValueError(
            "reverse=True runs from the last step of the chunk, and burn_in brings the carry up to date from the first: leave "
            "one of them out."
        )
    lengths = (None, None) if length is None else (burn_in, length - burn_in)
    along_time = {word: options.pop(word) for word in ("valid", "is_first") if word in options}
    xs_before, flags_before = jax.tree.map(lambda leaf: leaf[:burn_in], (xs, along_time))
    xs_after, flags_after = jax.tree.map(lambda leaf: leaf[burn_in:], (xs, along_time))
    # The options of a strategy say how its gradient is taken; of them only the carry at a reset changes values.
    resets = {"reset_carry": options["reset_carry"]} if "reset_carry" in options else {}
    carry, ys_before = jax.lax.stop_gradient(
        exact_scan(step, params, init, xs_before, length=lengths[0], **flags_before, **resets)
    )
    carry, ys_after = scan(step, params, carry, xs_after, length=lengths[1], **flags_after, **options)
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), ys_before, ys_after)


def _norm(tree: Any) -> Array:
    """‖·‖₂ over all leaves. Written as optax's clipping writes it, so that the compiler merges the two."""
    wide = [leaf.astype(at_least_float32(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum((jnp.sum(jnp.real(leaf.conj() * leaf)) for leaf in wide), 0.0))


def _fraction_changed(before: Any, after: Any) -> Array:
    """The share of the nonzero entries that were changed."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    changed = sum(jnp.sum(old != new) for old, new in pairs)
    entries = sum(jnp.sum(old != 0) for old, _ in pairs)
    return jnp.asarray(changed, jnp.float32) / jnp.maximum(entries, 1).astype(jnp.float32)
