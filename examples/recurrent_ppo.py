"""Recurrent PPO on a T-maze: a cue at the first step says which way to turn at the end of the corridor.

The policy is a GRU with a linear read-out. Episodes begin and end inside a rollout, so the carry is reset where `is_first`
is True; it passes from rollout to rollout. An update unrolls the stored steps again, and `--scan` names the strategy that
takes the gradient. Without memory, its carry reset at every step, the same policy is right half of the time.

    python examples/recurrent_ppo.py [--scan adjoint_scan] [--seed 0] [--figure FILE]
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxbptt as bptt

LENGTH = 8  # steps from the cue to the junction
LEFT, RIGHT, FORWARD = range(3)

ENVIRONMENTS, ROLLOUT, UPDATES, EVERY = 64, 32, 100, 10  # a row of the table every 10 updates
BURN_IN = 8  # steps before a rollout that bring its carry up to date
EPOCHS, MINIBATCHES, LEARNING_RATE, MAX_GRADIENT_NORM = 4, 2, 2e-3, 0.5
GAMMA, LAMBDA, CLIP = 0.97, 0.95, 0.2  # discount γ, λ of GAE, ε of PPO
VALUE_COEFFICIENT, ENTROPY_BONUS = 0.5, 0.01

STRATEGIES = {
    "adjoint_scan": bptt.adjoint_scan,
    "scan": bptt.scan,
    "checkpointed_scan": bptt.checkpointed_scan,
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=16),
}


class Maze(NamedTuple):
    """The state of a T-maze."""

    cue: Any  # LEFT or RIGHT
    position: Any  # 0 to LENGTH, where the junction is
    is_first: Any  # whether the episode has just begun


def reset(key):
    """A maze with a new cue and the agent at its start."""
    return Maze(jax.random.randint(key, (), LEFT, RIGHT + 1), jnp.int32(0), jnp.bool_(True))


def observe(maze):
    """What the agent sees: the cue, at the first step alone, and whether it is at the junction. `[3]`."""
    left, right = (maze.is_first & (maze.cue == side) for side in (LEFT, RIGHT))
    return jnp.stack([left, right, maze.position == LENGTH]).astype(jnp.float32)


def move(key, maze, action):
    """The next maze, the reward, and whether the episode has ended; the next maze is then that of a new episode.

    A turn at the junction ends the episode: reward 1 if it is the one of the cue, else -1. Running into a wall costs 0.1.
    """
    at_junction, turns = maze.position == LENGTH, action != FORWARD
    done, walks = at_junction & turns, ~at_junction & ~turns
    reward = jnp.where(done, jnp.where(action == maze.cue, 1.0, -1.0), jnp.where(walks, 0.0, -0.1))
    moved = Maze(maze.cue, jnp.where(walks, maze.position + 1, maze.position), jnp.bool_(False))
    maze = jax.tree.map(lambda new, old: jnp.where(done, new, old), reset(key), moved)
    return maze, reward.astype(jnp.float32), done


class Step(NamedTuple):
    """What is stored of a step; over a rollout, arrays `[time, environment, ...]`."""

    carry: Any  # before the step, and before a reset
    observation: Any
    is_first: Any
    action: Any
    log_prob: Any  # log π(action)
    value: Any
    reward: Any
    done: Any


cell = bptt.gru(input_size=3, hidden_size=32)
net = bptt.network(cell, 3 + 1)  # a logit for each action, and the value


def policy(params, carry, observations, is_first, *, scan=bptt.scan):
    """The last carry, log π of every action, and the values, for observations `[time, environment, 3]`."""
    carry, outputs = net.apply(params, carry, observations, scan=partial(scan, is_first=is_first))
    return carry, jax.nn.log_softmax(outputs[..., :-1]), outputs[..., -1]


def act(params, memory, state, key):
    """One step in every environment, from the state (carry, mazes)."""
    carry, mazes = state
    key_action, key_mazes = jax.random.split(key)
    observation, is_first = jax.vmap(observe)(mazes), mazes.is_first | ~memory  # no memory: every step is the first
    next_carry, log_probs, value = policy(params, carry, observation[None], is_first[None])
    action = jax.random.categorical(key_action, log_probs[0])
    mazes, reward, done = jax.vmap(move)(jax.random.split(key_mazes, len(action)), mazes, action)
    log_prob = jnp.take_along_axis(log_probs[0], action[..., None], axis=-1)[..., 0]
    return (next_carry, mazes), Step(carry, observation, is_first, action, log_prob, value[0], reward, done)


def advantages(rollout, value_after):
    """GAE: Aₜ = δₜ + γλ Aₜ₊₁, δₜ = rₜ + γ vₜ₊₁ − vₜ; vₜ₊₁ and Aₜ₊₁ count as 0 at the last step of an episode."""

    def backward(later, step):
        advantage, next_value = later
        discount = jnp.where(step.done, 0.0, GAMMA)
        advantage = step.reward + discount * (next_value + LAMBDA * advantage) - step.value
        return (advantage, step.value), advantage

    return jax.lax.scan(backward, (jnp.zeros_like(value_after), value_after), rollout, reverse=True)[1]


def loss(params, before, rollout, advantage, *, scan):
    """The clipped loss of PPO, from the stored steps unrolled again.

    The carry at the start of the rollout comes from params that the update has changed since. So the steps `before` the
    rollout are unrolled by the params as they are now, without gradient, for a carry to start from: the burn-in.
    """
    carry, _, _ = policy(params, before.carry[0], before.observation, before.is_first)
    carry = jax.lax.stop_gradient(carry)
    _, log_probs, value = policy(params, carry, rollout.observation, rollout.is_first, scan=scan)
    log_prob = jnp.take_along_axis(log_probs, rollout.action[..., None], axis=-1)[..., 0]
    ratio = jnp.exp(log_prob - rollout.log_prob)
    # Advantages are not normalised: once the task is solved they are small noise, and normalising makes it large.
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1).mean()
    value_loss = 0.5 * jnp.mean((rollout.value + advantage - value) ** 2)
    return VALUE_COEFFICIENT * value_loss - gain - ENTROPY_BONUS * entropy


@partial(jax.jit, static_argnames="scan")
def train(key, memory, *, scan):
    """How many episodes ended in each update, and how many of them with the right turn: two arrays `[update]`."""
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRADIENT_NORM), optax.adam(LEARNING_RATE))

    def descend(learner, rows, batch):
        params, opt_state = learner
        gradient = jax.grad(loss)(params, *jax.tree.map(lambda leaf: leaf[:, rows], batch), scan=scan)
        changes, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, changes), opt_state), None

    def update(state, key):
        learner, acting, before = state
        key_rollout, key_after, key_rows = jax.random.split(key, 3)
        one_step = partial(act, learner[0], memory)
        acting, rollout = jax.lax.scan(one_step, acting, jax.random.split(key_rollout, ROLLOUT))
        _, after = one_step(acting, key_after)  # for its value alone
        batch = before, rollout, advantages(rollout, after.value)
        # A minibatch has some of the environments and all of their steps: what is unrolled has to stay in order.
        rows = jnp.stack([jax.random.permutation(key, ENVIRONMENTS) for key in jax.random.split(key_rows, EPOCHS)])
        learner, _ = jax.lax.scan(partial(descend, batch=batch), learner, rows.reshape(EPOCHS * MINIBATCHES, -1))
        before = jax.tree.map(lambda leaf: leaf[-BURN_IN:], rollout)
        return (learner, acting, before), (rollout.done.sum(), (rollout.done & (rollout.reward > 0)).sum())

    key_params, key_mazes, key_before, key = jax.random.split(key, 4)
    params = net.init(key_params)
    acting = cell.initial_carry((ENVIRONMENTS,)), jax.vmap(reset)(jax.random.split(key_mazes, ENVIRONMENTS))
    acting, before = jax.lax.scan(partial(act, params, memory), acting, jax.random.split(key_before, BURN_IN))
    learner = params, optimizer.init(params)
    return jax.lax.scan(update, (learner, acting, before), jax.random.split(key, UPDATES))[1]


def draw(curves, file):
    """Success rate against update; needs matplotlib, which the rest does without."""
    from jaxbptt.plots import figure as parts

    figure, (axes,) = parts.new_figure(1, width=8.0)
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(range(EVERY, UPDATES + 1, EVERY), curve, parts.DASHES[i], color=parts.COLOURS[i], label=name)
    parts.label_axes(axes, f"T-maze, {LENGTH} steps from cue to junction", "update", "success rate")
    parts.add_legend([axes], None)
    figure.savefig(file)


def main(arguments=None):
    """Train with and without memory, print both learning curves, and return the last success rate of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", choices=STRATEGIES, default="adjoint_scan", help="what takes the gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file to draw the learning curves to")
    options = parser.parse_args(arguments)
    curves = {}
    for name, memory in {"recurrent": True, "memoryless": False}.items():
        counts = train(jax.random.key(options.seed), jnp.bool_(memory), scan=STRATEGIES[options.scan])
        ended, well = jnp.stack(counts).reshape(2, -1, EVERY).sum(axis=-1)
        curves[name] = well / ended
    print(f"success rate, gradient by {options.scan}\n{'updates':>9}", *(f"{name:>12}" for name in curves))
    for i, rates in enumerate(zip(*curves.values(), strict=True)):
        print(f"{f'{EVERY * i + 1}-{EVERY * (i + 1)}':>9}", *(f"{rate:>12.3f}" for rate in rates))
    if options.figure:
        draw(curves, options.figure)
    return {name: float(curve[-1]) for name, curve in curves.items()}


if __name__ == "__main__":
    main()
