"""Random recurrences, each through `lax.scan` and through other strategies: values and gradients are to be the same.

A case is drawn from a seed; the suite runs the first 72, and the command line any:
`python tests/fuzz.py 1000` runs seeds 0 … 999, `python tests/fuzz.py 1000 2000` those from 1000 on; `--only 7` one, in full.
"""

import argparse
import functools
import os
import random
import sys
import time
import traceback
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import fast_compilation  # noqa: F401, which sets flags before jax is imported
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from reference import assert_close, gradient_of, make_cell, random_like

import jaxbptt as bptt

N = 3  # entries of a vector


class Case(NamedTuple):
    """A recurrence, and how its gradient is taken.

    Attributes:
        carry, params, closed, xs: kinds of the leaves, by name. `closed` is closed over.
        program: operations, each its name and the places of its three operands among all values so far.
        new_carry: for each leaf of the carry, the place of the value that it becomes.
        ys: places of the outputs.
        loss: the names of carry leaves and numbers of outputs that the loss reads.
        last: whether it reads the last output only.
        wrt: names of the leaves by which it is differentiated.
        steps: T.
        rows: the batch, or None.
        shared: names of inputs that all rows have in common.
        flags: of `is_first` and `valid`, those given.
        padding: what stands in the inputs where there is no step.
        how: "jit", "eager", "vmap", "nested" in `lax.scan`, or "second" derivatives.
        contenders: strategies, with their options.
        cell: name of a cell in place of the program.
        seed: for the numbers.
    """

    carry: dict[str, str]
    params: dict[str, str]
    closed: dict[str, str]
    xs: dict[str, str]
    program: tuple[tuple[str, int, int, int], ...]
    new_carry: tuple[int, ...]
    ys: tuple[int, ...]
    loss: tuple[Any, ...]
    last: bool
    wrt: tuple[str, ...]
    steps: int
    rows: int | None
    shared: tuple[str, ...]
    flags: tuple[str, ...]
    padding: float
    how: str
    contenders: tuple[tuple[str, dict[str, Any]], ...]
    cell: str | None
    seed: int


# Values of any dtype and shape, as an operation wants them.


def number(a):
    """Real, of any shape."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.normal(a, a.shape)
    if jnp.iscomplexobj(a):
        return a.real + a.imag
    return a.astype(float)


def scalar(a):
    a = number(a)
    return a.sum() / max(a.size, 1)


def vector(a):
    a = number(a)
    if a.size == 0:
        return jnp.zeros(N) + a.sum()
    return jnp.broadcast_to(a if a.ndim < 2 else a.mean(axis=0), (N,))


def matrix(a):
    a = number(a)
    return (
        a
        if a.shape == (N, N)
        else jnp.eye(N) * scalar(a)
        if a.ndim == 0
        else vector(a)[:, None] * jnp.arange(1.0, N + 1)
    )


def index(a):
    """A whole number, mostly of an entry of a vector."""
    return jnp.clip(jnp.nan_to_num(jnp.round(2 * scalar(a))), -4, 4).astype(jnp.int32)


def positive(a):
    return 1 + vector(a) ** 2


def fitted(a, kind):
    """A value as a leaf of the carry of some kind; bounded, so that no error grows without end."""
    match kind:
        case "scalar":
            return 0.8 * jnp.tanh(scalar(a))
        case "vector":
            return 0.8 * jnp.tanh(vector(a))
        case "matrix":
            return 0.8 * jnp.tanh(matrix(a))
        case "empty":
            return jnp.zeros((0, N)) + vector(a)
        case "complex":
            return lax.complex(0.8 * jnp.tanh(vector(a)), 0.3 * jnp.sin(vector(a)))
        case "integer":
            return index(a)
        case "boolean":
            return scalar(a) > 0.1
        case "overflow":
            return 1e200 * (1 + vector(a) ** 2)
    raise ValueError(kind)


# Operations: of three values, and of what all of them together may need.


@jax.custom_jvp
def softplus(x):
    return jnp.logaddexp(x, 0.0)


@softplus.defjvp
def _(primals, tangents):
    return softplus(*primals), tangents[0] * jax.nn.sigmoid(primals[0])


@jax.custom_vjp
def scaled_gradient(x, y):
    return x * y


scaled_gradient.defvjp(lambda x, y: (x * y, (x, y)), lambda saved, bar: (0.5 * bar * saved[1], 0.7 * bar * saved[0]))


@jax.custom_vjp
def with_symbolic_zeros(x, y):
    return x + jnp.sin(y), x * y


def _backward(saved, bars):
    x, y = saved
    first, second = (jnp.zeros(N) if isinstance(bar, jax.custom_derivatives.SymbolicZero) else bar for bar in bars)
    return first + second * y, first * jnp.cos(y) + second * x


with_symbolic_zeros.defvjp(
    lambda x, y: (with_symbolic_zeros(x.value, y.value), (x.value, y.value)), _backward, symbolic_zeros=True
)


def conv(a, b):
    a, b = vector(a).reshape(1, 1, N), vector(b).reshape(1, 1, N)
    return lax.conv_general_dilated(a, b, (1,), "SAME").reshape(N)


def while_loop(a):
    a = lax.stop_gradient(vector(a))
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1]) + 0.1), (0, a))[1]


def while_inside(a):
    """Of the value itself: only where it is not differentiated. Other cases are no cases."""
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.cos(s[1])), (0, vector(a)))[1]


OPERATIONS = {
    "same": lambda a, b, c: vector(a),
    "add": lambda a, b, c: vector(a) + vector(b),
    "multiply": lambda a, b, c: vector(a) * vector(b),
    "divide": lambda a, b, c: vector(a) / positive(b),
    "matvec": lambda a, b, c: matrix(a) @ vector(b),
    "matmul": lambda a, b, c: matrix(a) @ matrix(b),
    "outer": lambda a, b, c: jnp.outer(vector(a), vector(b)),
    "einsum": lambda a, b, c: jnp.einsum("ij,j,ik->k", matrix(a), vector(b), matrix(c)),
    "tanh": lambda a, b, c: jnp.tanh(vector(a)),
    "sin": lambda a, b, c: jnp.sin(matrix(a)),
    "exp": lambda a, b, c: jnp.exp(jnp.tanh(vector(a))),
    "power": lambda a, b, c: positive(a) ** jnp.tanh(vector(b)),
    "max": lambda a, b, c: jnp.maximum(vector(a), vector(b)),
    "relu": lambda a, b, c: jax.nn.relu(vector(a)),
    "abs": lambda a, b, c: jnp.abs(matrix(a)),
    "gather": lambda a, b, c: matrix(a)[index(b) % N],
    "gather many": lambda a, b, c: vector(a)[jnp.stack([index(b), index(c), index(b) + 1]) % N],
    "gather, beyond": lambda a, b, c: (
        vector(a).at[jnp.stack([index(b), index(c)])].get(mode="fill", fill_value=0.5).sum()
    ),
    "scatter": lambda a, b, c: vector(a).at[index(b) % N].set(scalar(c)),
    "scatter add": lambda a, b, c: vector(a).at[jnp.stack([index(b), index(c)]) % N].add(vector(b)[:2]),
    "scatter, beyond": lambda a, b, c: vector(a).at[index(b)].set(scalar(c), mode="drop"),
    "slice": lambda a, b, c: lax.dynamic_slice(vector(a), (index(b),), (2,)).sum(),
    "update slice": lambda a, b, c: lax.dynamic_update_slice(vector(a), vector(b)[:2], (index(c),)),
    "sort": lambda a, b, c: jnp.sort(vector(a)),
    "sort pairs": lambda a, b, c: lax.sort((vector(a), vector(b)), num_keys=1)[1],
    "top": lambda a, b, c: lax.top_k(vector(a), 2)[0].sum(),
    "cumsum": lambda a, b, c: jnp.cumsum(vector(a)),
    "cumprod": lambda a, b, c: jnp.cumprod(vector(a)),
    "cummax": lambda a, b, c: lax.cummax(vector(a)),
    "flip": lambda a, b, c: jnp.roll(matrix(a)[::-1].T, 1, axis=0),
    "concatenate": lambda a, b, c: jnp.concatenate([vector(a)[:1], vector(b)[1:]]),
    # JAX can't transpose one whose padding alone is differentiated.
    "pad": lambda a, b, c: lax.pad(vector(a) + scalar(b), scalar(b), ((-1, 1, 0),)),
    "where": lambda a, b, c: jnp.where(vector(a) > 0, vector(b), vector(c)),
    "where, undefined": lambda a, b, c: jnp.where(
        vector(a) > 0, jnp.sqrt(jnp.where(vector(a) > 0, vector(a), 1.0)), vector(b)
    ),
    "clip": lambda a, b, c: jnp.clip(vector(a), -0.3, 0.4),
    "sum": lambda a, b, c: jnp.sum(matrix(a), axis=1),
    "reduce max": lambda a, b, c: jnp.max(matrix(a), axis=0),
    "prod": lambda a, b, c: jnp.prod(vector(a)),
    "argmax": lambda a, b, c: jnp.argmax(vector(a)).astype(jnp.int32),
    "logsumexp": lambda a, b, c: jax.nn.logsumexp(vector(a)),
    "softmax": lambda a, b, c: jax.nn.softmax(matrix(a)),
    "norm": lambda a, b, c: jnp.sqrt(jnp.sum(positive(a))),
    "conv": lambda a, b, c: conv(a, b),
    "fft": lambda a, b, c: jnp.fft.fft(vector(a)) * 0.5,
    "complex product": lambda a, b, c: jnp.exp(lax.complex(jnp.sin(vector(a)), vector(b))),
    "conjugate": lambda a, b, c: jnp.conj(lax.complex(vector(a), vector(b)) * lax.complex(vector(c), vector(b))),
    "solve": lambda a, b, c: jnp.linalg.solve(2 * N * jnp.eye(N) + jnp.tanh(matrix(a)), vector(b)),
    "cond": lambda a, b, c: lax.cond(
        scalar(a) > 0, lambda b, c: jnp.sin(b) * c, lambda b, c: b - c, vector(b), vector(c)
    ),
    "cond, undefined": lambda a, b, c: lax.cond(
        scalar(a) > 0, lambda a, b: jnp.sqrt(a) * b, lambda a, b: b, scalar(a), vector(b)
    ),
    "switch": lambda a, b, c: lax.switch(
        index(a) % 3, [lambda b, c: b, lambda b, c: c * b, lambda b, c: jnp.tanh(c)], vector(b), vector(c)
    ),
    "while": lambda a, b, c: while_loop(a) * vector(b),
    "while inside": lambda a, b, c: while_inside(a) * vector(b),
    "fori": lambda a, b, c: lax.fori_loop(0, 3, lambda i, s: jnp.sin(s * vector(b) + vector(c)), vector(a)),
    "scan": lambda a, b, c: lax.scan(lambda s, z: (jnp.tanh(matrix(c) @ s + z), s), vector(a), matrix(b))[0],
    "scan, outputs": lambda a, b, c: lax.scan(lambda s, z: (s * 0.5 + z, s * z), scalar(a), vector(b))[1],
    "map": lambda a, b, c: lax.map(lambda row: jnp.sin(row @ vector(b)), matrix(a)),
    "vmap": lambda a, b, c: jax.vmap(lambda row, z: jnp.tanh(row * z).sum())(matrix(a), vector(b)),
    "jit": lambda a, b, c: jax.jit(lambda a, b: jnp.sin(a) * b)(vector(a), vector(b)),
    "remat": lambda a, b, c: jax.checkpoint(lambda a, b: jnp.sin(jnp.tanh(a) * b))(vector(a), vector(b)),
    "custom_jvp": lambda a, b, c: softplus(vector(a)),
    "custom_vjp": lambda a, b, c: scaled_gradient(vector(a), vector(b)),
    "symbolic zeros": lambda a, b, c: with_symbolic_zeros(vector(a), vector(b))[0],
    "symbolic zeros, both": lambda a, b, c: sum(with_symbolic_zeros(vector(a), vector(b))),
    "stop_gradient": lambda a, b, c: lax.stop_gradient(vector(a)) * vector(b),
    "gradient": lambda a, b, c: jax.grad(lambda z: jnp.sum(jnp.sin(z) * vector(b)))(vector(a)),
    "integer": lambda a, b, c: index(a) + index(b),
    "boolean": lambda a, b, c: vector(a) > vector(b),
    "empty": lambda a, b, c: jnp.zeros((N, 0)) @ jnp.zeros((0,)) + vector(a)[:0].sum() + vector(b),
    "one hot": lambda a, b, c: jax.nn.one_hot(index(a), N, dtype=float) @ matrix(b),
    "overflow": lambda a, b, c: jnp.exp(1000.0 * positive(a)),
    "log of 0": lambda a, b, c: jnp.log(0.0 * vector(a)),
    "root of 0": lambda a, b, c: jnp.sqrt(jnp.maximum(vector(a), 0.0)),
    "norm of 0": lambda a, b, c: jnp.linalg.norm(0.0 * vector(a)),
}
# These make what is not finite, or has such a derivative.
NOT_FINITE = ("overflow", "log of 0", "root of 0", "norm of 0")


def step(case, closed, params, carry, x):
    """One step of the program; what is no number becomes one where it is used."""
    values = [*closed.values(), *params.values(), *carry.values(), *x.values(), jnp.array(0.4)]
    for name, *places in case.program:
        values.append(OPERATIONS[name](*(values[place % len(values)] for place in places)))
    new = {}
    for (name, kind), place in zip(case.carry.items(), case.new_carry, strict=True):
        if kind == "key":
            new[name] = jax.random.fold_in(carry[name], index(values[place % len(values)]))
        elif kind == "overflow":
            new[name] = carry[name] * fitted(values[place % len(values)], kind)
        else:
            new[name] = fitted(values[place % len(values)], kind)
    return new, [values[place % len(values)] for place in case.ys]


SHAPES = {"scalar": (), "vector": (N,), "matrix": (N, N), "empty": (0, N), "overflow": (N,), "complex": (N,)}


def leaf(kind, shape, rng):
    """Random numbers of a kind, with leading axes of some shape."""
    match kind:
        case "key":
            return jax.random.split(jax.random.key(rng.integers(99)), shape)
        case "integer":
            return jnp.asarray(rng.integers(0, N, shape), jnp.int32)
        case "boolean":
            return jnp.asarray(rng.random(shape) < 0.5)
        case "complex":
            return jnp.asarray(rng.standard_normal((*shape, N)) + 1j * rng.standard_normal((*shape, N)))
    return jnp.asarray(rng.standard_normal((*shape, *SHAPES[kind])))


def arguments(case):
    """Everything that the loss is a function of, and the flags."""
    rng = np.random.default_rng(case.seed)
    rows = () if case.rows is None else (case.rows,)
    flags = {name: rng.random((case.steps, *rows)) < (0.3 if name == "is_first" else 0.7) for name in case.flags}
    if case.cell:
        cell = make_cell(case.cell)
        args = {
            "params": random_like(jax.eval_shape(cell.init, jax.random.key(0)), case.seed, 0.5),
            "init": random_like(jax.eval_shape(lambda: cell.initial_carry(rows)), case.seed + 1),
            "xs": {"x": jnp.asarray(rng.standard_normal((case.steps, *rows, 3)))},
            "closed": {},
        }
    else:
        kinds = {"params": case.params, "closed": case.closed}
        args = {group: {name: leaf(kind, (), rng) for name, kind in leaves.items()} for group, leaves in kinds.items()}
        args["init"] = {name: leaf(kind, rows, rng) for name, kind in case.carry.items()}
        args["xs"] = {
            name: leaf(kind, (case.steps, *(() if name in case.shared else rows)), rng)
            for name, kind in case.xs.items()
        }
    if "is_first" in flags:
        args["reset"] = args["init"] if any(kind == "key" for kind in case.carry.values()) else None
        if case.seed % 2:
            args["reset"] = jax.tree.map(lambda leaf: leaf[::-1] if rows else leaf, args["init"])
    if "valid" in flags:

        def padded(name, x):
            if name in case.shared or not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            valid = flags["valid"].reshape(flags["valid"].shape + (1,) * (x.ndim - flags["valid"].ndim))
            return jnp.where(valid, x, case.padding)

        args["xs"] = {name: padded(name, x) for name, x in args["xs"].items()}
    return args, flags


def lax_scan(step, params, init, xs, **options):
    return lax.scan(partial(getattr(step, "step", step), params), init, xs, **options)


def strategy(case, name, options):
    """A strategy; for `lax.scan`, which knows no flags, `bptt.scan` where there are any."""
    if name == "lax.scan":
        return bptt.scan if case.flags else lax_scan
    return partial(getattr(bptt, name), **options)


def outcome(case, scan, flags, args):
    """The loss, its gradients, and all values."""
    if case.cell:
        cell = make_cell(case.cell)
        # A Cell keeps its own backward.
        one = cell
        pick = lambda xs: xs["x"]
    else:
        pick = lambda xs: xs

    def loss(closed, params, init, xs, reset=None):
        if not case.cell:
            one_row = partial(step, case, closed)
            in_axes = None, 0, {name: None if name in case.shared else 0 for name in case.xs}
            the_step = one_row if case.rows is None else jax.vmap(one_row, in_axes, axis_size=case.rows)
        else:
            the_step = one
        options = {name: flags[name] for name in case.flags}
        if reset is not None:
            options["reset_carry"] = reset
        run = partial(scan, the_step, **options, **({} if case.cell else {"length": case.steps}))
        xs = pick(xs)
        if case.how == "nested":

            def outer(carry, scale):
                carry, ys = run(params, carry, xs)
                return carry, ys

            carry, ys = lax.scan(outer, init, None, length=2)
        else:
            carry, ys = run(params, init, xs)
        if case.cell:
            read = [carry if "c0" in case.loss else (), ys if 0 in case.loss else ()]
        else:
            read = [carry[name] for name in case.loss if name in case.carry]
            some = [ys[i] for i in case.loss if i not in case.carry]
            read += [y[-1:] for y in some] if case.last else some
        return total(read), (carry, ys)

    if case.how == "second":

        def slope(**args):
            (_, out), gradients = gradient_of(loss, args, case.wrt, has_aux=True)
            return total(gradients), out

        return gradient_of(slope, args, case.wrt, has_aux=True)
    if case.how == "vmap":
        scales = jnp.array([1.0, -0.5])

        def scaled(scale):
            some = jax.tree.map(
                lambda leaf: leaf * scale if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, args["init"]
            )
            return gradient_of(loss, args | {"init": some}, case.wrt, has_aux=True)

        return jax.vmap(scaled)(scales)
    return gradient_of(loss, args, case.wrt, has_aux=True)


def total(tree):
    """A number that all with a derivative in a tree goes into, each entry otherwise."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size]
    terms = [
        jnp.sum((leaf.real - 0.7 * leaf.imag) * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)) for leaf in leaves
    ]
    return sum(terms, jnp.zeros(()))


# What a strategy says of a step that it is not made for.
DOES_NOT_APPLY = (
    "needs a step that is affine in the carry",
    "forward_scan has no gradient of xs",
    "the rows of the carry can't be told apart",
)


def check(case):
    """Raise where a strategy does otherwise than `lax.scan`. Returns how many were compared; 0 if `lax.scan` refuses."""
    args, flags = arguments(case)
    compiled = (lambda f: f) if case.how == "eager" else jax.jit
    reference = partial(outcome, case, strategy(case, "lax.scan", {}), flags)
    try:
        jax.eval_shape(partial(outcome, case._replace(flags=()), lax_scan, {}), args | {"reset": None})
    except Exception:  # differentiated by what has no derivative, and the like: no case
        return 0

    def everyone(args):
        results = [reference(args)]
        for name, options in case.contenders:
            try:
                results.append(outcome(case, strategy(case, name, options), flags, args))
            except Exception as error:
                if any(words in str(error) for words in DOES_NOT_APPLY):
                    results.append(None)
                    continue
                error.add_note(f"by {name}, {options}")
                raise
        return results

    try:
        expected, *results = compiled(everyone)(args)
    except Exception:
        try:
            compiled(reference)(args)
        except Exception:  # traced, but not compiled: no case either
            return 0
        raise
    for (name, options), result in zip(case.contenders, results, strict=True):
        if result is None:
            continue
        try:
            assert_close(result, expected, rtol=1e-7)
        except AssertionError as error:
            error.add_note(f"by {name}, {options}")
            if _is_ill_conditioned(reference, args, expected, result):
                continue
            raise
    return sum(result is not None for result in results)


def _is_ill_conditioned(reference, args, expected, result):
    """Whether inputs that differ in their last digits make as much of a difference, and none in what is finite."""

    def nudged(leaf):
        return leaf * (1 + 1e-14) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    other = jax.jit(reference)(jax.tree.map(nudged, args))
    for a, b, c in zip(*map(jax.tree.leaves, (result, expected, other)), strict=True):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            continue
        a, b, c = map(np.asarray, (a, b, c))
        finite = np.isfinite(b)
        if not np.array_equal(finite, np.isfinite(a)):
            return False
        a, b, c = (leaf[finite & np.isfinite(c)] for leaf in (a, b, c))
        noise = np.max(np.abs(b - c), initial=0.0) + 1e-7 * np.max(np.abs(b), initial=0.0)
        if np.max(np.abs(a - b), initial=0.0) > 1e3 * noise:
            return False
    return True


def simplest(case):
    """A case that fails like this one and has as little in it as can be, found by leaving out one thing after another."""

    def failure(case):
        try:
            check(case)
        except Exception as error:
            return type(error), [word for word in str(error).split() if word.isalpha()][:8]
        return None

    def simpler(case):
        for contender in case.contenders:
            yield case._replace(contenders=(contender,))
        yield from (case._replace(**change) for change in ({"how": "jit"}, {"flags": ()}, {"rows": None, "shared": ()}))
        yield from (case._replace(flags=(flag,)) for flag in case.flags)
        yield from (case._replace(steps=steps) for steps in (0, 1, 2, 3, 17) if steps < case.steps)
        yield from (case._replace(**{field: (leaf,)}) for field in ("wrt", "loss") for leaf in getattr(case, field))
        for i, (name, *places) in enumerate(case.program):
            yield case._replace(program=(*case.program[:i], ("same", places[0], 0, 0), *case.program[i + 1 :]))
            if name != "same":
                for j in range(3):
                    changed = (name, *places[:j], -1, *places[j + 1 :])
                    yield case._replace(program=(*case.program[:i], changed, *case.program[i + 1 :]))
        for i in range(len(case.carry)):
            yield case._replace(new_carry=(*case.new_carry[:i], -1, *case.new_carry[i + 1 :]))
        for field in ("carry", "params", "closed", "xs"):
            for name in getattr(case, field):
                yield case._replace(**{field: getattr(case, field) | {name: "scalar"}})

    kind, found = failure(case), True
    while found:
        size = lambda case: str(case).replace("same", "")
        found = next(
            (c for c in simpler(case) if c != case and len(size(c)) < len(size(case)) and failure(c) == kind), None
        )
        case = found or case
    return case


# How a case is drawn.


LENGTHS = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 18, 23, 24, 31, 33, 40]


def draw(rng: random.Random) -> Case:
    """A case, all of it from one source of randomness; simplest where that gives zeros."""

    def some(kinds, most, prefix, least=0):
        return {f"{prefix}{i}": rng.choice(kinds) for i in range(rng.randint(least, most))}

    carry = some(["vector", "scalar", "matrix", "complex", "integer", "boolean", "key", "empty", "overflow"], 3, "c", 1)
    params = some(["matrix", "vector", "scalar", "complex", "integer", "key", "empty"], 3, "p")
    closed = some(["vector", "matrix", "scalar", "integer", "key"], 1, "v")
    xs = some(["vector", "scalar", "matrix", "integer", "boolean", "key", "complex", "empty"], 2, "x")
    cell = rng.choice(["elman", "gru", "lstm", "stack"]) if rng.random() < 0.05 else None
    how = rng.choice(["jit", "jit", "jit", "jit", "vmap", "nested", "second"])
    if rng.random() < 0.02:
        how = "eager"
    names = list(OPERATIONS)
    if how == "nested":
        carry = {name: "vector" if kind == "overflow" else kind for name, kind in carry.items()}
    if how == "nested" or rng.random() < 0.6:
        names = [name for name in names if name not in NOT_FINITE]
    places = lambda: rng.randrange(64)
    program = tuple((rng.choice(names), places(), places(), places()) for _ in range(rng.randint(1, 8)))
    ys = tuple(places() for _ in range(rng.randint(0, 3)))
    readable = [name for name, kind in carry.items() if kind != "overflow" or rng.random() < 0.1] + list(range(len(ys)))
    loss = tuple(leaf for leaf in readable if rng.random() < 0.6) or tuple(readable[:1])
    if cell:
        carry, params, closed, xs, loss = {}, {}, {}, {"x": "vector"}, rng.choice([("c0",), (0,), ("c0", 0)])
    leaves = ["params", "init", "xs"] if cell else [*carry, *params, *closed, *xs]
    wrt = tuple(leaf for leaf in leaves if rng.random() < 0.5) or (rng.choice(leaves),)
    # A loop of JAX's own takes a custom derivative whole: all of the carry is differentiated, and read.
    if how == "nested" and not cell:
        loss, wrt = (*carry, *range(len(ys))), tuple(dict.fromkeys((*carry, *wrt)))
    rows = rng.choice([None, None, None, 2, 3, 1, 0]) if rng.random() < 0.7 else None
    shared = tuple(name for name in xs if rows is not None and not cell and rng.random() < 0.2)
    steps = rng.choice(LENGTHS)
    if rng.random() < 0.03:
        steps = rng.choice([1023, 1024, 1025, 2047, 2048, 2049, 2050])
    flags = tuple(name for name in ("is_first", "valid") if rng.random() < 0.25)
    contenders = [
        ("adjoint_scan", {}),
        ("adjoint_scan", {"unroll": 2}),
        ("checkpointed_scan", {}),
        ("checkpointed_scan", {"segment_length": rng.choice([1, 3, 8, max(steps // 2, 1), steps + 1])}),
        ("checkpointed_scan", {"checkpoints": rng.choice([c for c in (1, 2, 3, 5, steps) if 0 < c <= max(steps, 1)])}),
        ("truncated_scan", {"truncation_length": max(steps, 1) + rng.choice([0, 5])}),
        ("windowed_scan", {"window": max(steps, 1)}),
        ("parallel_adjoint_scan", {"chunk_length": rng.choice([None, 1, 3, 8, max(steps, 1)])}),
        ("parallel_scan", {"chunk_length": rng.choice([None, 3, 8])}),
        ("forward_scan", {}),
        ("newton_scan", {"jacobian": rng.choice(["full", "diagonal"]), "chunk_length": rng.choice([None, 3, 8])}),
    ]
    if "overflow" in carry.values():  # their coefficients overflow with it, and 0 times them is nan
        contenders = [each for each in contenders if not each[0].startswith(("parallel", "newton", "forward"))]
    if any(name.startswith(("custom_vjp", "symbolic zeros")) for name, *_ in program):  # no forward mode
        contenders = [each for each in contenders if each[0] not in ("parallel_scan", "newton_scan")]
    if any(
        name in NOT_FINITE for name, *_ in program
    ):  # an infinite influence, of which the loss may use nothing: 0 · inf
        contenders = [each for each in contenders if each[0] != "forward_scan"]
    if steps > 100:
        contenders = [contender for contender in contenders if contender[0] != "windowed_scan"]
    if how == "second":  # a window is not differentiated again
        contenders = [contender for contender in contenders if contender[0] != "windowed_scan"]
    if flags == () and rng.random() < 0.1:
        contenders.append(("scan", {}))
    contenders = tuple(rng.sample(contenders, min(4, len(contenders))))
    return Case(
        carry,
        params,
        closed,
        xs,
        program,
        tuple(places() for _ in carry),
        ys,
        loss,
        rng.random() < 0.3,
        wrt,
        steps,
        rows,
        shared,
        flags,
        rng.choice([float("nan"), float("inf"), 0.0, 1e300]),
        how,
        contenders,
        cell,
        rng.randrange(10**6),
    )


def strict(function):
    """As the suite runs: in double precision, with no promotion that nobody asked for."""

    @functools.wraps(function)
    def run(*args):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            return function(*args)

    return run


@strict
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=int, nargs="?", default=100)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("--contenders", type=int, help="at most so many strategies for each case")
    parser.add_argument("--strategies", help="those strategies alone, each with the options drawn for it")
    parser.add_argument("--only", type=int, help="the case of this seed")
    parser.add_argument("--simplest", action="store_true", help="and the simplest one that fails like it")
    options = parser.parse_args()
    if options.only is not None:
        case = draw(random.Random(options.only))
        print(case)
        if options.simplest:
            case = simplest(case)
            print(case)
        print(check(case), "comparisons")
        return
    start, compared, cases, failures = time.time(), 0, 0, Counter()
    for seed in range(options.first, options.first + options.cases):
        case = draw(random.Random(seed))
        contenders = [each for each in case.contenders if each[0] in (options.strategies or each[0]).split(",")]
        case = case._replace(contenders=tuple(contenders[: options.contenders]))
        if not contenders:
            continue
        try:
            count = check(case)
        except Exception as error:
            where = [frame for frame in traceback.extract_tb(error.__traceback__) if "jaxbptt/" in frame.filename]
            at = f"{os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
            message = next((line for line in str(error).splitlines() if line.strip("- ")), "")
            kind = f"{type(error).__name__} {at} {message[:150]}"
            failures[kind.split(":")[0]] += 1
            print(
                f"seed {seed}: {kind} {[note for note in getattr(error, '__notes__', []) if note.startswith('by')]}",
                flush=True,
            )
            count = len(case.contenders)
        compared, cases = compared + count, cases + (count > 0)
        if seed % 200 == 199:
            print(
                f"{seed + 1}: {cases} cases, {compared} comparisons, {sum(failures.values())} failures, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
            jax.clear_caches()
    print(f"{cases} cases, {compared} comparisons, {sum(failures.values())} failures in {time.time() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
