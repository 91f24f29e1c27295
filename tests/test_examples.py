"""The examples do what they say, run as a user runs them; and the maze of the recurrent policy keeps its rules."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt as bptt

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("recurrent_ppo", ROOT / "examples" / "recurrent_ppo.py")
ppo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ppo)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--scan", "truncated_scan", "--figure", "curves.png")])
def test_recurrent_policy_learns_what_a_memoryless_one_does_not(arguments, tmp_path):
    command = [sys.executable, ROOT / "examples" / "recurrent_ppo.py", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=env)
    lines = run.stdout.splitlines()
    assert lines[1].split() == ["updates", "recurrent", "memoryless"]
    updates, recurrent, memoryless = lines[-1].split()
    assert updates == "91-100"
    assert float(recurrent) > 0.95
    assert 0.4 < float(memoryless) < 0.6
    assert [path.name for path in tmp_path.iterdir()] == [name for name in arguments if name.endswith(".png")]


@pytest.mark.parametrize("cue", [ppo.LEFT, ppo.RIGHT])
def test_maze(cue):
    """Walls cost 0.1 and stop, the cue is seen once, and the turn at the junction decides and ends the episode."""
    move = jax.jit(ppo.move)
    key = jax.random.key(0)
    start = ppo.reset(key)
    start = start._replace(cue=jnp.full_like(start.cue, cue))
    maze, seen, rewards = start, [], []
    for action in [ppo.LEFT, *[ppo.FORWARD] * (ppo.LENGTH + 1)]:
        seen.append(ppo.observe(maze).tolist())
        maze, reward, done = move(key, maze, start.cue.dtype.type(action))
        rewards.append(float(reward))
        assert not done
        assert not maze.is_first
    assert seen[0] == [cue == ppo.LEFT, cue == ppo.RIGHT, False]
    assert seen[1:] == [[0, 0, 0]] * ppo.LENGTH + [[0, 0, 1]]
    np.testing.assert_allclose(rewards, [-0.1, *[0] * ppo.LENGTH, -0.1], rtol=1e-6)
    assert maze == start._replace(position=ppo.LENGTH, is_first=False)
    for turn in (ppo.LEFT, ppo.RIGHT):
        new, reward, done = move(key, maze, start.cue.dtype.type(turn))
        assert done
        assert reward == (1 if turn == cue else -1)
        assert new == ppo.reset(key)
        assert new.is_first
        assert new.position == 0


def test_both_cues_are_drawn():
    cues = jax.vmap(ppo.reset)(jax.random.split(jax.random.key(0), 100)).cue
    assert set(cues.tolist()) == {ppo.LEFT, ppo.RIGHT}


@pytest.fixture(scope="module")
def rollout():
    """Params, and 150 steps of four environments with memory and without, from a new episode each."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        keys = jax.random.split(jax.random.key(1), 150)
        state = ppo.cell.initial_carry((4,)), jax.vmap(ppo.reset)(keys[:4])
        params = ppo.net.init(jax.random.key(2))
        steps = jax.jit(lambda memory: jax.lax.scan(partial(ppo.act, params, memory), state, keys)[1])
        return params, steps(jnp.bool_(True)), steps(jnp.bool_(False))


def test_first_steps_follow_last_ones(rollout):
    _, recurrent, memoryless = rollout
    assert (recurrent.done.sum(axis=0) > 1).all()
    np.testing.assert_array_equal(recurrent.is_first, bptt.streams.is_first_from_done(recurrent.done))
    assert memoryless.is_first.all()
    # The cue is seen at the first step of an episode, and nowhere else.
    np.testing.assert_array_equal(recurrent.observation[..., :2].sum(axis=-1), recurrent.is_first)


def test_stored_steps_unroll_to_what_they_were(rollout):
    """From the middle of an episode, with episodes that begin on the way: what makes PPO's ratio 1 before an update."""
    params, recurrent, memoryless = rollout
    for steps in (recurrent, memoryless):
        later = jax.tree.map(lambda leaf: leaf[5:], steps)
        _, log_probs, value = ppo.policy(params, later.carry[0], later.observation, later.is_first)
        taken = np.take_along_axis(np.asarray(log_probs), np.asarray(later.action)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(taken, later.log_prob, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(value, later.value, rtol=1e-5, atol=1e-6)


def test_gradient_stays_in_its_episode(rollout):
    params, steps, _ = rollout
    episode = np.cumsum(steps.is_first, axis=0)
    last = episode == episode[-1]

    def values_of_last_episode(observations):
        _, _, values = ppo.policy(params, steps.carry[0], observations, steps.is_first, scan=bptt.adjoint_scan)
        return jnp.sum(jnp.where(last, values, 0))

    reached = np.any(jax.grad(values_of_last_episode)(steps.observation) != 0, axis=-1)
    np.testing.assert_array_equal(reached, last)


def test_advantages_are_sums_over_the_rest_of_the_episode(rollout):
    """Aₜ = Σₗ (γλ)ˡ δₜ₊ₗ up to the end of the episode, or of the rollout."""
    _, steps, _ = rollout
    value_after = jnp.arange(4, dtype=jnp.float32)
    found = np.asarray(ppo.advantages(steps, value_after))
    values = np.concatenate([steps.value, value_after[None]])
    done = np.asarray(steps.done)
    delta = np.asarray(steps.reward) + ppo.GAMMA * ~done * values[1:] - values[:-1]
    for row in range(4):
        for t in range(len(done)):
            ends = np.flatnonzero(done[t:, row])
            rest = delta[t : t + ends[0] + 1, row] if len(ends) else delta[t:, row]
            expected = np.sum((ppo.GAMMA * ppo.LAMBDA) ** np.arange(len(rest)) * rest)
            np.testing.assert_allclose(found[t, row], expected, rtol=1e-4, atol=1e-5)


def test_burn_in_brings_the_carry_but_no_gradient(rollout):
    params, steps, _ = rollout
    before, later = (jax.tree.map(lambda leaf, part=part: leaf[part], steps) for part in (slice(3, 5), slice(5, 20)))
    assert not steps.is_first[4:6].any(axis=0).all()

    @jax.jit
    @jax.value_and_grad
    def loss(observation):
        shown = before._replace(observation=observation)
        return ppo.loss(params, shown, later, jnp.ones_like(later.value), scan=bptt.adjoint_scan)

    value, gradient = loss(before.observation)
    assert loss(before.observation + 1)[0] != value
    np.testing.assert_array_equal(gradient, 0)
