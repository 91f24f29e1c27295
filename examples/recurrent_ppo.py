"""Recurrent PPO on a T-maze: the cue at the first step says which way to turn at the end of the corridor.

The policy is a GRU with a linear read-out. Episodes begin and end inside a rollout, so the carry is reset where `is_first` is
True; it passes from rollout to rollout. An update unrolls the stored steps again, by the strategy named with `--scan`. The
same policy without memory, its carry reset at every step, is right half of the time. A few seconds on two cores.

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

ENVIRONMENTS, ROLLOUT, UPDATES = 64, 32, 150
BURN_IN = 8  # steps before a rollout that bring the carry up to date
EPOCHS, MINIBATCHES = 4, 2
LEARNING_RATE, MAX_GRADIENT_NORM = 3e-3, 0.5
GAMMA, LAMBDA, CLIP = 0.97, 0.95, 0.2  # discount γ, GAE's λ, PPO's ε
ENTROPY_BONUS, VALUE_COEFFICIENT = 0.01, 0.5

STRATEGIES = {
    "adjoint_scan": bptt.adjoint_scan,
    "scan": bptt.scan,
    "checkpointed_scan": bptt.checkpointed_scan,
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=16),
}


class Maze(NamedTuple):
    """The state of a T-maze."""

    cue: Any  # LEFT or RIGHT
    position: Any  # 0 … LENGTH; the junction is at LENGTH
    is_first: Any  # whether this is the first step of an episode


def reset(key):
    """A maze with a new cue, the agent at its start."""
    return Maze(cue=jax.random.randint(key, (), LEFT, RIGHT + 1), position=jnp.int32(0), is_first=jnp.bool_(True))


def observe(maze):
    """What the agent sees: the cue, at the first step alone, and whether it is at the junction. `[3]`."""
    left, right = (maze.is_first & (maze.cue == side) for side in (LEFT, RIGHT))
    return jnp.stack([left, right, maze.position == LENGTH]).astype(jnp.float32)


def step(key, maze, action):
    """The next state, the reward, and whether the episode ended; the next state is then the first of a new episode.

    A turn at the junction ends the episode, with reward 1 if it is the cue's and -1 if not. Walking into a wall costs 0.1.
    """
    at_junction, turns = maze.position == LENGTH, action != FORWARD
    done = at_junction & turns
    reward = jnp.where(done, jnp.where(action == maze.cue, 1.0, -1.0), jnp.where(at_junction | turns, -0.1, 0.0))
    moved = maze.position + (~at_junction & ~turns)
    walked = Maze(maze.cue, moved.astype(jnp.int32), jnp.bool_(False))
    maze = jax.tree.map(lambda new, old: jnp.where(done, new, old), reset(key), walked)
    return maze, reward.astype(jnp.float32), done


class Step(NamedTuple):
    """What is stored of a step, `[time, environment, ...]`."""

    carry: Any  # before the step, and before it is reset
    observation: Any
    is_first: Any
    action: Any
    log_prob: Any
    value: Any
    reward: Any
    done: Any


cell = bptt.gru(input_size=3, hidden_size=32)
net = bptt.network(cell, 3 + 1)  # a logit for each action, and the value


def policy(params, carry, observations, is_first, *, scan=bptt.scan):
    """The last carry, log π(a) of all actions, and values, of observations `[time, environment, 3]`."""
    carry, outputs = net.apply(params, carry, observations, scan=partial(scan, is_first=is_first))
    return carry, jax.nn.log_softmax(outputs[..., :-1]), outputs[..., -1]


def of_action(log_probs, actions):
    """log π of the actions taken."""
    return jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]


def act(params, memory, state, key):
    """One step in all environments: state (carry, mazes)."""
    carry, mazes = state
    key_action, key_mazes = jax.random.split(key)
    observation, is_first = jax.vmap(observe)(mazes), mazes.is_first | ~memory
    next_carry, log_probs, value = policy(params, carry, observation[None], is_first[None])
    action = jax.random.categorical(key_action, log_probs[0])
    mazes, reward, done = jax.vmap(step)(jax.random.split(key_mazes, ENVIRONMENTS), mazes, action)
    log_prob = of_action(log_probs[0], action)
    return (next_carry, mazes), Step(carry, observation, is_first, action, log_prob, value[0], reward, done)


def advantages(rollout, last_value):
    """GAE: Aₜ = δₜ + γ λ Aₜ₊₁, δₜ = rₜ + γ vₜ₊₁ − vₜ; an episode's last step has neither vₜ₊₁ nor Aₜ₊₁."""

    def backward(later, step):
        advantage, next_value = later
        discount = GAMMA * ~step.done
        advantage = step.reward + discount * (next_value + LAMBDA * advantage) - step.value
        return (advantage, step.value), advantage

    return jax.lax.scan(backward, (jnp.zeros_like(last_value), last_value), rollout, reverse=True)[1]


def ppo_loss(params, before, rollout, advantage, *, scan):
    """PPO's clipped loss, with the stored steps unrolled again.

    The carry stored with a rollout was computed by params of before the update. So the steps `before` the rollout are
    unrolled too, from the carry stored with them, by the params as they are now: the burn-in, which has no gradient.
    """
    carry, _, _ = policy(params, before.carry[0], before.observation, before.is_first)
    carry = jax.lax.stop_gradient(carry)
    _, log_probs, value = policy(params, carry, rollout.observation, rollout.is_first, scan=scan)
    ratio = jnp.exp(of_action(log_probs, rollout.action) - rollout.log_prob)
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gain = jnp.minimum(ratio * scaled, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * scaled).mean()
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1).mean()
    value_loss = 0.5 * jnp.mean((value - (rollout.value + advantage)) ** 2)
    return VALUE_COEFFICIENT * value_loss - gain - ENTROPY_BONUS * entropy


@partial(jax.jit, static_argnames="scan")
def train(key, memory, *, scan):
    """Episodes that ended in each update, and those of them that ended well: two arrays `[update]`."""
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRADIENT_NORM), optax.adam(LEARNING_RATE))

    def descend(learner, rows, batch):
        params, opt_state = learner
        gradient = jax.grad(ppo_loss)(params, *jax.tree.map(lambda a: a[:, rows], batch), scan=scan)
        changes, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, changes), opt_state), None

    def update(state, key):
        learner, (carry, mazes), before = state
        key_rollout, key_epochs = jax.random.split(key)
        keys = jax.random.split(key_rollout, ROLLOUT)
        (carry, mazes), rollout = jax.lax.scan(partial(act, learner[0], memory), (carry, mazes), keys)
        # The value of the step after the last one, whose carry is reset if an episode has just ended.
        observation, is_first = jax.vmap(observe)(mazes), mazes.is_first | ~memory
        _, _, last_value = policy(learner[0], carry, observation[None], is_first[None])
        batch = (before, rollout, advantages(rollout, last_value[0]))
        # A minibatch is a share of the environments, never of the steps: a row stays whole.
        keys = jax.random.split(key_epochs, EPOCHS)
        rows = jax.vmap(lambda key: jax.random.permutation(key, ENVIRONMENTS))(keys)
        rows = rows.reshape(EPOCHS * MINIBATCHES, -1)
        learner, _ = jax.lax.scan(partial(descend, batch=batch), learner, rows)
        before = jax.tree.map(lambda a: a[-BURN_IN:], rollout)
        return (learner, (carry, mazes), before), (rollout.done.sum(), (rollout.done & (rollout.reward > 0)).sum())

    key_params, key_mazes, key = jax.random.split(key, 3)
    params, carry = net.init(key_params), cell.initial_carry((ENVIRONMENTS,))
    acting = carry, jax.vmap(reset)(jax.random.split(key_mazes, ENVIRONMENTS))
    # Before the first rollout there is nothing: its first step resets the carry, whatever the burn-in makes of zeros.
    one_step = jax.eval_shape(partial(act, params, memory), acting, key)[1]
    before = jax.tree.map(lambda a: jnp.zeros((BURN_IN, *a.shape), a.dtype), one_step)
    state = (params, optimizer.init(params)), acting, before
    return jax.lax.scan(update, state, jax.random.split(key, UPDATES))[1]


def draw(curves, every, file):
    """Success rate against update."""
    from jaxbptt.plots import figure as parts  # needs matplotlib, which the rest does without

    figure, (axes,) = parts.new_figure(1, width=8.0)
    for i, (name, curve) in enumerate(curves.items()):
        updates = every * (1 + jnp.arange(len(curve)))
        axes.plot(updates, curve, color=parts.COLOURS[i], linestyle=parts.DASHES[i], label=name)
    parts.label_axes(axes, f"T-maze, {LENGTH} steps from cue to junction", "update", "success rate")
    parts.legend_below(figure, axes)
    figure.savefig(file)


def main(arguments=None, every=10):
    """Trains with and without memory, prints both learning curves, and returns the last success rate of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", choices=STRATEGIES, default="adjoint_scan", help="how the gradient is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file to draw the learning curves to")
    options = parser.parse_args(arguments)
    curves = {}
    for name, memory in {"recurrent": True, "memoryless": False}.items():
        ended, well = train(jax.random.key(options.seed), memory, scan=STRATEGIES[options.scan])
        curves[name] = well.reshape(-1, every).sum(axis=1) / ended.reshape(-1, every).sum(axis=1)
    print(f"success rate, gradient by {options.scan}\n{'updates':>9}", *(f"{name:>12}" for name in curves))
    for i, rates in enumerate(zip(*curves.values(), strict=True)):
        print(f"{every * i + 1:>4}-{every * (i + 1):<4}", *(f"{rate:>12.3f}" for rate in rates))
    if options.figure:
        draw(curves, every, options.figure)
    return {name: float(curve[-1]) for name, curve in curves.items()}


if __name__ == "__main__":
    main()
