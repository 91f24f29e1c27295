"""Two cells over one sequence: each row is read back from its own end, and each of its sequences from its end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SEQUENTIAL, assert_close, make_cell, problem, random_like

import jaxbptt as bptt

STEPS, ROWS = 9, 3


def layer_and_args(name="gru", seed=0):
    cells = make_cell(name), make_cell(name)
    (params, init, xs), (params_back, init_back, _) = (
        problem(cells[i], STEPS, (ROWS,), seed=seed + 9 * i) for i in (0, 1)
    )
    return bptt.bidirectional(*cells), bptt.Directions(params, params_back), bptt.Directions(init, init_back), xs


def alone(layer, params, carry, xs):
    """Of one sequence, by the loop that runs forward, and the same over the flipped sequence."""
    (last, ys), (first, ys_back) = (
        bptt.scan(cell.step, params[i], carry[i], xs[:: (1, -1)[i]]) for i, cell in enumerate(layer)
    )
    return (last, first), jnp.concatenate([ys, ys_back[::-1]], -1)


@pytest.mark.parametrize("name", ["elman", "lstm", "stack"])
@pytest.mark.slow
def test_rows_are_those_of_their_sequences(name):
    """With holes and sequences that follow each other in a row, under every exact strategy, in value and gradient."""
    layer, params, carry, xs = layer_and_args(name)
    cells = make_cell(name), make_cell(name)
    valid = np.ones((STEPS, ROWS), bool)
    valid[-4:, 1] = False
    valid[[0, 3, 6], 2] = False
    is_first = np.zeros((STEPS, ROWS), bool)
    is_first[0] = True  # of a row that is reset at once
    is_first[4, 0] = is_first[5, 2] = is_first[3, 2] = True  # that of a step that is not there counts for nothing
    sequences = {0: [range(4), range(4, 9)], 1: [range(5)], 2: [[1, 2, 4], [5, 7, 8]]}

    def carry_features(carry):
        return jax.tree.leaves(carry.forward)[-1].shape[-1]

    def by_hand(params, carry, xs):
        ys, ends = jnp.zeros((STEPS, ROWS, 2 * carry_features(carry))), {}
        for row, parts in sequences.items():
            for i, steps in enumerate(parts):
                steps = np.array(steps)
                start = jax.tree.map(lambda leaf, row=row: leaf[row], carry)
                zeros = jax.tree.map(jnp.zeros_like, start)
                # From its carry starts only what begins where the row does; forward that is reset, unless step 0 is missing.
                start = (
                    start.forward if row == 2 and i == 0 else zeros.forward,
                    start.backward if i == len(parts) - 1 else zeros.backward,
                )
                (last, first), out = alone(cells, params, start, xs[steps, row])
                ys = ys.at[steps, row].set(out)
                ends.setdefault(row, [None, first])[0] = last
        stacked = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(ends[row][i] for row in range(ROWS))) for i in (0, 1)
        )
        return bptt.Directions(*stacked), ys

    bars = random_like(jax.eval_shape(by_hand, params, carry, xs), 5)
    spoilt = jnp.where(valid[..., None], xs, jnp.nan)

    @jax.jit
    def ways(*args):
        functions = {"by hand": by_hand} | {
            name: partial(layer.apply, scan=scan, is_first=is_first, valid=valid) for name, scan in SEQUENTIAL.items()
        }
        outs = {name: jax.vjp(function, *args) for name, function in functions.items()}
        return {name: (out, pull(bars)) for name, (out, pull) in outs.items()}

    expected, *others = ways(params, carry, spoilt).values()
    assert np.isfinite(expected[0][1]).all()
    for result in others:
        assert_close(result, expected)


def test_flags_of_time_alone_and_none():
    layer, params, carry, xs = layer_and_args()
    cells = make_cell("gru"), make_cell("gru")
    expected = alone(cells, params, carry, xs)
    last, ys = layer.apply(params, tuple(carry), xs)
    assert_close((tuple(last), ys), expected)
    is_first = np.arange(STEPS) == 4
    flagged = layer.apply(params, carry, xs, is_first=is_first[:, None].repeat(ROWS, 1))
    zeros = jax.tree.map(jnp.zeros_like, carry)
    assert_close(flagged[1][4:], alone(cells, params, (zeros[0], carry[1]), xs[4:])[1])
    assert_close(flagged[1][:4], alone(cells, params, (carry[0], zeros[1]), xs[:4])[1])
    # What is not given is left to the options of the strategy.
    valid = bptt.valid_from_lengths([9, 4, 0], STEPS)
    as_option = layer.apply(params, carry, xs, scan=partial(bptt.scan, valid=valid))
    assert_close(as_option, layer.apply(params, carry, xs, valid=valid))
    assert not as_option[1][:, 2].any()
    no_steps = layer.apply(params, carry, xs[:0], valid=valid[:0], is_first=valid[:0])
    assert_close(no_steps, (carry, jnp.zeros((0, ROWS, 8))))


def test_errors():
    layer, params, carry, xs = layer_and_args()
    plain = bptt.Cell(lambda key: None, lambda batch_shape=(): jnp.zeros(()), lambda _, c, x: (c, {"y": x}))
    apart = bptt.bidirectional(make_cell("gru"), plain)
    for call, message in (
        (
            lambda: bptt.bidirectional(lambda *_: None, make_cell("gru")),
            "forward is a function, but a Cell is expected",
        ),
        (lambda: bptt.bidirectional(make_cell("gru"), None), "backward is a NoneType, but a Cell is expected"),
        (
            lambda: layer.apply(params.forward, carry, xs),
            r"params is a GRUParams.*pass Directions\(forward, backward\)",
        ),
        (
            lambda: layer.apply(params, carry.forward, xs),
            r"carry is a .*, but one entry for each direction is expected",
        ),
        (lambda: layer.apply(params, carry, xs, scan=None), "scan is a NoneType"),
        (lambda: layer.apply(params, carry, xs, valid=xs[..., 0]), "valid has dtype float64"),
        (lambda: layer.apply(params, carry, xs, is_first=xs[..., 0]), "is_first has dtype float64"),
        (lambda: apart.apply((params[0], None), (carry[0], jnp.zeros(())), xs), "of forward have structure .*the same"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
