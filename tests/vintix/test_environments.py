import dataclasses
import json
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st

from newllm.errors import UserError
from newllm.vintix.collect import mean_score, measure
from newllm.vintix.environments import family_names, from_spec, regions, task_family
from newllm.vintix.play import normalised
from newllm.vintix.settings import CollectSettings

HIDDEN = ("point_reacher", "reacher", "pendulum")


def family_of(name, **values):
    tasks = {"train_tasks": 4, "validation_tasks": 3, "test_tasks": 3}
    return task_family(CollectSettings(environment=name, **(tasks | values)))


def played(env, seed, steps=30):
    """Observations (steps + 1, n, do), rewards and ends (steps, n) under actions that depend on the step alone."""
    chance = np.random.default_rng(0)
    low, high = env.single_action_space.low, env.single_action_space.high
    observations, rewards, ends = [env.reset(seed=seed)[0]], [], []
    for _ in range(steps):
        action = np.tile(chance.uniform(low, high), (env.num_envs, 1)).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        rewards.append(reward.copy())
        ends.append(terminated | truncated)
    return np.stack(observations), np.stack(rewards), np.stack(ends)


def test_an_unknown_environment_is_named_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'point_reacher'"):
        family_of("point_reachr")
    with pytest.raises(UserError, match=r"unknown environment '\.\./families/reacher'"):
        family_of("../families/reacher")  # a name, not a path


@pytest.mark.parametrize("name", ["reacher", "inverted_pendulum"])
def test_gymnasium_without_mujoco_takes_one_line(name, monkeypatch):
    for module in [*sys.modules]:  # as where nothing has been imported yet
        if module.startswith(("gymnasium.envs.mujoco", f"newllm.vintix.environments.{name}")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(UserError, match="needs mujoco, which is not installed"):
        family_of(name)


@pytest.mark.parametrize("name", family_names())
def test_a_family_is_made_again_from_its_description(name):
    family = family_of(name)
    again = from_spec(json.loads(json.dumps(family.spec())))
    assert np.array_equal(again.parameters, family.parameters)
    assert [len(again.task_ids(split)) for split in ("train", "validation", "test")] == [4, 3, 3]
    ids = np.concatenate([family.task_ids(split) for split in ("train", "validation", "test")])
    assert np.array_equal(ids, np.arange(len(family.parameters)))


@pytest.mark.parametrize("name", HIDDEN)
def test_test_tasks_do_not_change_with_the_number_of_training_tasks(name):
    few, many = family_of(name), family_of(name, train_tasks=9)
    assert np.array_equal(few.parameters[few.task_ids("test")], many.parameters[many.task_ids("test")])


@given(
    seed=st.integers(0, 10**6), sectors=st.sampled_from([8, 16]), every=st.integers(2, 4), margin=st.floats(0.1, 0.4)
)
def test_goals_for_tests_keep_a_distance_from_those_for_training(seed, sectors, every, margin):
    options = {"sectors": sectors, "held_out_every": every, "margin": margin, "goal_radius": [0.7, 1.0]}
    train, test = (regions.ring(held_out, 200, np.random.default_rng(seed), options) for held_out in (False, True))
    nearest = np.linalg.norm(train[:, None] - test[None], axis=-1).min()
    assert nearest >= 2 * 0.7 * np.sin(margin * np.pi / sectors) - 1e-9
    for goals in (train, test):
        radius = np.linalg.norm(goals, axis=1)
        assert (radius >= 0.7).all()
        assert (radius <= 1.0).all()


@given(seed=st.integers(0, 10**6), bins=st.integers(2, 4), every=st.integers(2, 4), margin=st.floats(0.1, 0.4))
def test_parameters_for_tests_keep_a_distance_from_those_for_training(seed, bins, every, margin):
    options = {"ranges": [[6, 14], [0.5, 1.5], [1, 2]], "bins": bins, "held_out_every": every, "margin": margin}
    train, test = (regions.cells(held_out, 200, np.random.default_rng(seed), options) for held_out in (False, True))
    width = np.array([8, 1, 1]) / bins
    apart = (np.abs(train[:, None] - test[None]) / width).max(axis=-1)
    assert apart.min() >= margin - 1e-9


@pytest.mark.parametrize("name", family_names())
def test_the_gymnasium_api(name):
    family = family_of(name)
    env = family.make(family.task_ids("test"), 0)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.num_envs == 3
    assert env.single_observation_space.shape == (family.observation_size,)
    observation, _ = env.reset(seed=1)
    demonstrator = family.demonstrator(family.task_ids("test"))
    for step in range(family.episode_length):
        assert observation in env.observation_space
        action = demonstrator(observation)
        assert action.shape == (3, family.action_size)
        assert (action >= family.action_low).all()
        assert (action <= family.action_high).all()
        observation, reward, terminated, truncated, info = env.step(action.astype(np.float32))
        assert reward.shape == terminated.shape == truncated.shape == (3,)
        assert not terminated.any()  # no demonstrator lets the pole fall
        assert truncated.all() == (step == family.episode_length - 1)
    assert "final_obs" in info
    assert not np.array_equal(np.stack(list(info["final_obs"])), observation)
    env.close()


@pytest.mark.parametrize("name", HIDDEN)
def test_episodes_begin_as_the_seed_says(name):
    family = family_of(name)
    env = family.make(family.task_ids("train"), 0)
    first, again, other = played(env, 5), played(env, 5), played(env, 6)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("name", ["point_reacher", "reacher"])
def test_only_the_reward_tells_where_the_goal_is(name):
    family = family_of(name)
    tasks = [family.make(family.task_ids("train")[[index]], 0) for index in (0, 1)]
    (one, reward, _), (two, other_reward, _) = (played(env, 3) for env in tasks)
    assert np.array_equal(one, two)
    assert not np.allclose(reward, other_reward)


@pytest.mark.parametrize("name", HIDDEN)
def test_tasks_in_a_vector_do_not_see_each_other(name):
    family = family_of(name)
    ids = family.task_ids("train")
    together = played(family.make(ids[[0, 1]], 0), 3)
    beside_another = played(family.make(ids[[0, 2]], 0), 3)
    assert np.array_equal(together[0][:, 0], beside_another[0][:, 0])
    assert np.array_equal(together[1][:, 0], beside_another[1][:, 0])


def test_the_point_reacher_pays_only_at_the_end_of_an_episode():
    family = family_of("point_reacher")
    _, rewards, ends = played(family.make(family.task_ids("train"), 0), 0, steps=2 * family.episode_length)
    paid = family.options["paid_steps"]
    episodes = rewards.reshape(2, family.episode_length, -1)
    assert (episodes[:, :-paid] == 0).all()
    assert (episodes[:, -paid:] != 0).all()
    assert np.flatnonzero(ends[:, 0]).tolist() == [family.episode_length - 1, 2 * family.episode_length - 1]


def test_the_reward_of_the_point_reacher_is_that_of_the_position_observed_with_it():
    family = family_of("point_reacher")
    ids = family.task_ids("train")
    observations, rewards, _ = played(family.make(ids, 0), 0, steps=family.episode_length - 1)
    distance = np.linalg.norm(observations[-1, :, :2] - family.parameters[ids], axis=1)
    assert np.allclose(rewards[-1], 1 - distance / family.options["goal_radius"][1], atol=1e-6)


def test_the_reacher_is_gymnasiums_without_its_goal():
    family = family_of("reacher")
    ours = family.make(family.task_ids("train")[:1], 0)
    theirs = gymnasium.make("Reacher-v5", reward_control_weight=family.options["reward_control_weight"])
    theirs.reset(seed=0)
    ours.reset(seed=0)
    arm = ours.envs[0].unwrapped
    theirs.unwrapped.set_state(arm.data.qpos.copy(), arm.data.qvel.copy())
    for action in np.random.default_rng(0).uniform(-1, 1, (10, 2)).astype(np.float32):
        observation, reward, *_ = ours.step(action[None])
        expected, expected_reward, *_ = theirs.step(action)
        assert np.allclose(observation[0], expected[[0, 1, 2, 3, 6, 7]], atol=1e-5)
        assert np.allclose(expected[4:6], family.parameters[0])
        assert np.isclose(reward[0], expected_reward)


def test_the_plain_pendulum_is_gymnasiums():
    ours, theirs = family_of("plain_pendulum").make(np.arange(1), 0), gymnasium.make("Pendulum-v1")
    assert np.array_equal(ours.reset(seed=4)[0][0], theirs.reset(seed=4)[0])
    for action in np.random.default_rng(0).uniform(-2, 2, (20, 1)).astype(np.float32):
        observation, reward, *_ = ours.step(action[None])
        expected, expected_reward, *_ = theirs.step(action)
        assert np.allclose(observation[0], expected)
        assert np.isclose(reward[0], expected_reward)


@pytest.mark.parametrize("name", family_names())
def test_demonstrators_play_far_better_than_chance(name):
    family = family_of(name)
    settings = CollectSettings(environment=name, score_episodes=3)
    for task in measure(family, "test", settings):
        assert task["demonstrator"] > task["random"] + 0.3 * abs(task["random"])


def test_who_does_not_learn_the_goal_scores_next_to_nothing():
    family = family_of("point_reacher", test_tasks=64)
    assert mean_score(measure(family, "test", CollectSettings()), "blind") <= 0.15


def learned_pendulum(rows, options):
    """From (observation, action, observation after) so far: what fits ω' = ω + (1.5·g/l·sin θ + 3/(m·l²)·u)·0.05."""
    estimates = []
    for row in rows:
        before, action, after, _ = (np.array(column) for column in zip(*row, strict=True))
        free = np.abs(after[:, 2]) < 7.99  # the velocity is cut at 8
        terms = np.stack([before[free, 1], action[free, 0]], axis=1)
        change = (after[free, 2] - before[free, 2]) / 0.05
        weight, torque = np.maximum(np.linalg.lstsq(terms, change, rcond=None)[0], 0.1)
        estimates.append([weight / 1.5, 1.0, 3 / torque])  # as if the length were 1: it moves in the same way
    return np.array(estimates)


def learned_reacher(rows, options):
    """The mean of the goals whose distance from the fingertip is what was paid."""
    chance = np.random.default_rng(0)
    goals = np.concatenate([regions.ring(held_out, 1500, chance, options) for held_out in (False, True)])
    estimates = []
    for row in rows:
        after, reward = np.array([part[2] for part in row]), np.array([part[3] for part in row])
        first, second = np.arctan2(after[:, 2:4], after[:, :2]).T
        joint, tip = options["links"][0] * np.exp(1j * first), options["links"][1] * np.exp(1j * (first + second))
        distance = np.abs((joint + tip)[:, None] - (goals[:, 0] + 1j * goals[:, 1]))
        error = ((distance + reward[:, None]) ** 2).sum(axis=0)
        likely = np.exp(-(error - error.min()) / (2 * 0.004**2))
        estimates.append(likely @ goals / likely.sum())
    return np.array(estimates)


@pytest.mark.parametrize(
    ("name", "learned", "least"), [("pendulum", learned_pendulum, 0.15), ("reacher", learned_reacher, 0.5)]
)
def test_one_episode_tells_what_is_hidden_and_knowing_it_pays(name, learned, least):
    """Who plays blindly once, and then as the demonstrator of what fits to it, against who stays blind."""
    family = family_of(name, test_tasks=32)
    ids = family.task_ids("test")
    tasks = measure(family, "test", CollectSettings(score_episodes=3))
    env = family.make(ids, 0)
    rows, returns, policy = [[] for _ in ids], np.zeros((len(ids), 2)), family.blind(ids)
    observation, _ = env.reset(seed=99)
    for episode in range(2):
        for step in range(family.episode_length):
            action = policy(observation).astype(np.float32)
            after, reward, _, _, _ = env.step(action)
            returns[:, episode] += reward
            if step < family.episode_length - 1:
                for row, part in zip(rows, zip(observation, action, after, reward, strict=True), strict=True):
                    row.append(part)
            observation = after
        knowing = dataclasses.replace(family, parameters=learned(rows, family.options))
        policy = knowing.demonstrator(np.arange(len(ids)))
    scores = normalised(returns, tasks)
    assert scores[:, 1].mean() > mean_score(tasks, "blind") + least
    env.close()
