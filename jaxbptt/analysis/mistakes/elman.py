r"""The mistakes of the textbook's loop for the Elman network, equation by equation.

hₜ = tanh(W_hh hₜ₋₁ + W_xh xₜ + b),  yₜ = hₜ or W_hy hₜ + b_y,  and backward

dhₜ = W_hyᵀ dyₜ + W_hhᵀ dh_rawₜ₊₁,  dh_rawₜ = dhₜ ⊙ (1 − hₜ²)
dW_hy += dyₜ hₜᵀ,  dW_xh += dh_rawₜ xₜᵀ,  dW_hh += dh_rawₜ hₜ₋₁ᵀ,  db += dh_rawₜ

The network is found by its numbers, in params of any structure, its matrices written for W h or for h W.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.mistakes.known import Mistake
from jaxbptt.analysis.mistakes.loop import Problem
from jaxbptt.trees import is_differentiable

Matrix = tuple[int, bool]  # the number of a leaf, and whether it is stored transposed


class Roles(NamedTuple):
    """Which leaf of params is which weight of an Elman network.

    Attributes:
        W_hh: the recurrent matrix.
        W_xh: of the input.
        b: the leaves that are added to the pre-activation.
        W_hy: of the read-out, or `None` where the output is the state, or there is none.
        b_y: the leaves that are added to the output.
    """

    W_hh: Matrix
    W_xh: Matrix
    b: tuple[int, ...] = ()
    W_hy: Matrix | None = None
    b_y: tuple[int, ...] = ()

    @property
    def read_out(self) -> set[int]:
        """The leaves of the read-out."""
        return {*self.b_y, *([] if self.W_hy is None else [self.W_hy[0]])}


class Equations(NamedTuple):
    """The equations of one time step; 0 everywhere is without a mistake.

    Attributes:
        of_loss: what W_hyᵀ dy is multiplied by in dh_raw, a number in `_FACTORS`.
        of_carried: the same for dh_next.
        matrix: what dh_raw is carried back by, a number in `_MATRICES`.
        read_out: 1 where W_hy is not transposed.
        sent: 1 where dh is carried back in the place of dh_raw.
        summed: 1 where dh is summed in the place of dh_raw.
        state: the state that dW_hy reads: 0 for hₜ, 1 for hₜ₋₁.
        starts: 1 where the loop starts from the last W_hyᵀ dy, and adds it again.
    """

    of_loss: Any = 0
    of_carried: Any = 0
    matrix: Any = 0
    read_out: Any = 0
    sent: Any = 0
    summed: Any = 0
    state: Any = 0
    starts: Any = 0


# Each in the place of 1 − hₜ²: what it is called, and its value from hₜ, hₜ₋₁ and the pre-activation aₜ.
_FACTORS = {
    "": lambda h, before, a: (1 - h) * (1 + h),
    "tanh' is missing: dh_raw = dh": lambda h, before, a: jnp.ones_like(h),
    "tanh' is that of hₜ₋₁: dh_raw = dh (1 − hₜ₋₁²)": lambda h, before, a: 1 - before**2,
    "tanh' has no square: dh_raw = dh (1 − hₜ)": lambda h, before, a: 1 - h,
    "tanh' is taken at hₜ, not at the pre-activation: dh_raw = dh (1 − tanh(hₜ)²)": lambda h, before, a: (
        1 - jnp.tanh(h) ** 2
    ),
    "tanh' is 1 − aₜ² of the pre-activation aₜ: dh_raw = dh (1 − aₜ²)": lambda h, before, a: 1 - a**2,
    "tanh' is that of the logistic function: dh_raw = dh hₜ (1 − hₜ)": lambda h, before, a: h * (1 - h),
    "tanh' is multiplied by twice: dh_raw = dh (1 − hₜ²)²": lambda h, before, a: (1 - h**2) ** 2,
    "tanh' has the wrong sign: dh_raw = dh (1 + hₜ²)": lambda h, before, a: 1 + h**2,
    "tanh stands for its derivative: dh_raw = dh hₜ": lambda h, before, a: h,
}
_MATRICES = (
    "",
    "W_hh is not transposed in dhₜ₋₁ = W_hhᵀ dh_rawₜ",
    "W_hh is missing in dhₜ₋₁ = W_hhᵀ dh_rawₜ",
    "W_xh stands for W_hh in dhₜ₋₁ = W_hhᵀ dh_rawₜ",
)


def mistakes(roles: Roles) -> Iterator[Mistake]:
    """The mistakes in the equations of this network."""
    for number, name in enumerate(_FACTORS):
        if number:
            yield Mistake(name, equations={"of_loss": number, "of_carried": number})
    for number, name in enumerate(_MATRICES):
        if number:
            yield Mistake(name, equations={"matrix": number})
    yield Mistake("tanh' is missing for dh_next: dh_raw = W_hyᵀ dy (1 − h²) + dh_next", equations={"of_carried": 1})
    yield Mistake("tanh' is missing for dy: dh_raw = W_hyᵀ dy + dh_next (1 − h²)", equations={"of_loss": 1})
    yield Mistake("dh is carried back before tanh': dhₜ₋₁ = W_hhᵀ dhₜ", equations={"sent": 1})
    yield Mistake("dh stands for dh_raw in the weight gradient", equations={"summed": 1}, by_leaf=True)
    yield Mistake(
        "the loss of the last time step is counted twice: dh_next starts from it, and the loop adds it",
        equations={"starts": 1},
    )
    if roles.W_hy is not None:
        yield Mistake("W_hy is not transposed in dh = W_hyᵀ dy + dh_next", equations={"read_out": 1})
        yield Mistake("hₜ₋₁ stands for hₜ in dW_hy += dyₜ hₜᵀ", equations={"state": 1}, by_leaf=True)


def find(step: Any, params: Any, init: Any, xs: Any) -> Roles | None:
    """The roles of the leaves of params, if the step computes an Elman network's, at a random state and input."""
    leaves, hs, x = (jax.tree.leaves(tree) for tree in (params, init, xs))
    arrays = [*leaves, *hs, *x]
    if len(hs) != 1 or len(x) != 1 or not all(map(is_differentiable, arrays)) or any(map(jnp.iscomplexobj, arrays)):
        return None
    (h,) = hs
    if not h.ndim or x[0].ndim != h.ndim + 1 or not 2 <= len(leaves) <= 8:
        return None
    rng = np.random.default_rng(0)
    like_h, like_x = (rng.standard_normal(shape) for shape in (h.shape, x[0].shape[1:]))
    given = (
        jax.tree.structure(tree).unflatten([jnp.asarray(leaf, like.dtype)])
        for tree, leaf, like in ((init, like_h, h), (xs, like_x, x[0]))
    )
    new_h, y = (jax.tree.leaves(tree) for tree in jax.jit(step)(params, *given))
    if len(new_h) != 1 or len(y) > 1:
        return None
    weights = [np.asarray(leaf, np.float64) for leaf in leaves]
    return _roles(weights, like_h, like_x, np.asarray(new_h[0], np.float64), y, float(jnp.finfo(h.dtype).eps) ** 0.6)


def _roles(weights: list[np.ndarray], h: np.ndarray, x: np.ndarray, new_h: np.ndarray, y: Any, bound: float) -> Any:
    def matrices(rows, columns):
        for i, leaf in enumerate(weights):
            for transposed in (False, True):
                matrix = leaf.T if transposed else leaf
                if matrix.shape == (rows, columns):
                    yield (i, transposed), matrix

    def vectors(size, taken):
        free = [i for i, leaf in enumerate(weights) if leaf.shape == (size,) and i not in taken]
        for count in range(len(free) + 1):
            yield from itertools.combinations(free, count)

    def same(a, b):
        return a.shape == b.shape and np.abs(a - b).max(initial=0) <= bound * (1 + np.abs(b).max(initial=0))

    def cells():
        n = h.shape[-1]
        for (W_hh, hh), (W_xh, xh) in itertools.product(matrices(n, n), matrices(n, x.shape[-1])):
            if W_hh[0] != W_xh[0]:
                for b in vectors(n, ()):
                    if same(np.tanh(h @ hh.T + x @ xh.T + sum(weights[i] for i in b)), new_h):
                        yield Roles(W_hh, W_xh, b)

    for roles in cells():
        taken = {roles.W_hh[0], roles.W_xh[0], *roles.b}
        if len(taken) == len(weights) and (not y or same(np.asarray(y[0], np.float64), new_h)):
            return roles
        for W_hy, hy in matrices(y[0].shape[-1], new_h.shape[-1]) if y and y[0].ndim else ():
            for b_y in vectors(hy.shape[0], taken):
                used = {*taken, W_hy[0], *b_y}
                if len(used) == len(weights) == len(taken) + 1 + len(b_y):
                    out = new_h @ hy.T + sum((weights[i] for i in b_y), 0.0)
                    if same(np.asarray(y[0], np.float64), out):
                        return roles._replace(W_hy=W_hy, b_y=b_y)
    return None


def problem(roles: Roles, general: Problem, params: Any) -> Problem:
    """The same problem with the equations of the textbook in the place of the derived ones."""
    leaves, treedef = jax.tree.flatten(params)

    def matrix(role):
        return leaves[role[0]].T if role[1] else leaves[role[0]]

    W_hh, W_xh = matrix(roles.W_hh), matrix(roles.W_xh)
    square = W_xh if W_xh.shape == W_hh.shape else W_hh
    backs = jnp.stack([W_hh, W_hh.T, jnp.eye(len(W_hh), dtype=W_hh.dtype), square])
    W_hy = None if roles.W_hy is None else matrix(roles.W_hy)
    ways = None if W_hy is None else jnp.stack([W_hy, W_hy.T if W_hy.shape[0] == W_hy.shape[1] else W_hy])
    (states,), (xs,) = jax.tree.leaves(general.states), jax.tree.leaves(general.xs)
    before, h = states[:-2], states[1:-1]
    a = before @ W_hh.T + xs @ W_xh.T + sum((leaves[i] for i in roles.b), jnp.zeros_like(W_hh[0]))
    factors = jnp.stack([factor(h, before, a) for factor in _FACTORS.values()], axis=1)

    def of_loss(eq, y_bar):
        """W_hyᵀ dy."""
        bars = jax.tree.leaves(y_bar)
        if not bars:
            return jnp.zeros_like(h[0])
        return bars[0] if ways is None else bars[0] @ ways[eq.read_out]

    def dh(eq, h_bar, y_bar):
        return of_loss(eq, y_bar) + jax.tree.leaves(h_bar)[0]

    def backward(eq, _, residuals, x, h_bar, y_bar):
        last, factors = residuals[:2]
        of_y, treedef = of_loss(eq, y_bar), jax.tree.structure(h_bar)
        of_next = jax.tree.leaves(h_bar)[0] + jnp.where(last & (eq.starts == 1), of_y, 0)
        by_loss = of_y * factors[eq.of_loss]
        dh, dh_raw = of_y + of_next, by_loss + of_next * factors[eq.of_carried]
        sent = jnp.where(eq.sent == 1, dh, dh_raw)
        return treedef.unflatten([sent @ backs[eq.matrix]]), (dh_raw, dh)

    def contract(eq, _, residuals, xs, ys_bar, deltas):
        *_, before, h = residuals
        delta = jnp.where(eq.summed == 1, deltas[1], deltas[0])
        found = {roles.W_hh: _outer(delta, before), roles.W_xh: _outer(delta, jax.tree.leaves(xs)[0])}
        found |= {(i, False): _rows(delta).sum(0) for i in roles.b}
        if roles.W_hy is not None and W_hy is not None:
            (dy,) = jax.tree.leaves(ys_bar) or [jnp.zeros((*h.shape[:-1], len(W_hy)), h.dtype)]
            found |= {roles.W_hy: _outer(dy, jnp.where(eq.state == 1, before, h))}
            found |= {(i, False): _rows(dy).sum(0) for i in roles.b_y}
        by_leaf = {i: leaf.T if transposed else leaf for (i, transposed), leaf in found.items()}
        return treedef.unflatten([by_leaf[i] for i in range(len(leaves))])

    residuals = jnp.arange(len(h)) == len(h) - 1, factors, before, h

    def arriving(eq, h_bar, y_bar):
        return jax.tree.structure(h_bar).unflatten([dh(eq, h_bar, y_bar)])

    return general._replace(
        backward=backward, contract=contract, arriving=arriving, transposed=lambda _: params, residuals=residuals
    )


def _rows(stacked: Any) -> Any:
    return stacked.reshape(-1, stacked.shape[-1])


def _outer(a: Any, b: Any) -> Any:
    """The sum of outer products over time and rows."""
    return _rows(a).T @ _rows(b)
