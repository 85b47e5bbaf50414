"""What a model learns inside its context: the score of every episode in tasks it has never seen, without an update.

Four ways to play tell where the score comes from:

    full               the context goes on from episode to episode
    context_reset      it is emptied at the start of each: nothing can be learned from one episode for the next
    reward_masked      all rewards are read as 0: what earned them cannot be told
    demonstrator_only  full, by a model whose histories had no noise and so showed no learning

Beside them stand random play, the demonstrator, who knows the task, and the blind demonstrator, who takes every task
for the average one.

Scores are normalised, (return − random) / (demonstrator − random), with both returns those of the task itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from newllm.vintix.environments import Policy, TaskFamily
from newllm.vintix.inference import VintixEngine

# Observation (n, do), previous reward (n,), whether an episode starts (n,) to actions (n, da).
Act = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
TRIMMED = 0.25  # of the scores at either end, for the inter-quartile mean
LEVEL = 95  # percent of the bootstrap samples within an interval


@dataclass
class Played:
    """Episodes that were played, one after the other, in n tasks."""

    returns: np.ndarray
    """(n, E) sums of rewards."""
    observations: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """By row and episode, the observations (steps + 1, do) of the episodes that were to be recorded, from that at the
    start to that after the last step."""


def play(act: Act, family: TaskFamily, task_ids: np.ndarray, episodes: int, seed: int, recorded: int = 0) -> Played:
    """Plays all tasks at once; records the first and the last episode of the first `recorded` rows."""
    env = family.make(task_ids, seed)
    rows = np.arange(len(task_ids))
    returns = np.zeros((len(rows), episodes))
    seen: dict[tuple[int, int], list[np.ndarray]] = {
        (row, episode): [] for row in range(min(recorded, len(rows))) for episode in (0, episodes - 1)
    }
    episode, start = np.zeros(len(rows), dtype=int), np.ones(len(rows), dtype=bool)
    observation, _ = env.reset(seed=seed)
    reward = np.zeros(len(rows))
    while episode.min() < episodes:
        for (row, number), observations in seen.items():
            if episode[row] == number:
                observations.append(observation[row].copy())
        observation, reward, terminated, truncated, info = env.step(act(observation, reward, start))
        counts = episode < episodes  # where episodes differ in length, some rows are done before others
        returns[rows[counts], episode[counts]] += reward[counts]
        start = terminated | truncated
        for (row, number), observations in seen.items():
            if start[row] and episode[row] == number:  # `observation` is that of the next episode already
                observations.append(info["final_obs"][row])
        episode += start
    env.close()
    return Played(returns, {key: np.stack(observations) for key, observations in seen.items()})


def agent(engine: VintixEngine, *, context_reset: bool = False, reward_masked: bool = False) -> Act:
    """A model that plays, in full or as a control."""

    def act(observation: np.ndarray, reward: np.ndarray, start: np.ndarray) -> np.ndarray:
        if context_reset and start.any():
            engine.reset(np.flatnonzero(start).tolist())
        return engine.act(observation, np.zeros_like(reward) if reward_masked else reward, start)

    return act


def without_memory(policy: Policy) -> Act:
    """A policy that looks at the observation alone."""
    return lambda observation, reward, start: policy(observation)


def random_policy(family: TaskFamily, seed: int) -> Policy:
    """Uniform in the action box."""
    chance = np.random.default_rng(seed)
    low, high = family.action_low, family.action_high
    return lambda observation: chance.uniform(low, high, (len(observation), family.action_size))


def normalised(returns: np.ndarray, tasks: list[dict[str, Any]]) -> np.ndarray:
    """Returns (n, E) as scores: 0 is random play in that task, 1 its demonstrator's."""
    random, demonstrator = (np.array([task[key] for task in tasks])[:, None] for key in ("random", "demonstrator"))
    return (returns - random) / (demonstrator - random)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean over axis 0 of what remains when the lowest and the highest quarter are cut off (arXiv 2108.13264)."""
    cut = int(TRIMMED * len(scores))
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)


def curve(scores: np.ndarray, resamples: int, seed: int) -> dict[str, list[float]]:
    """Score against episode, with an interval.

    Args:
        scores: (S, n, E) of S models, each in the same n tasks.
        resamples: bootstrap samples; each draws models and tasks anew, with replacement.

    Returns:
        'value', 'low' and 'high', one number for each episode: inter-quartile mean over models and tasks, and the
        bounds of its 95 % interval.
    """
    models, tasks, episodes = scores.shape
    chance = np.random.default_rng(seed)
    samples = np.empty((resamples, episodes))
    for index in range(resamples):
        drawn = scores[chance.integers(models, size=models)][:, chance.integers(tasks, size=tasks)]
        samples[index] = interquartile_mean(drawn.reshape(-1, episodes))
    margin = (100 - LEVEL) / 2
    low, high = np.percentile(samples, [margin, 100 - margin], axis=0)
    value = interquartile_mean(scores.reshape(-1, episodes))
    return {"value": value.tolist(), "low": low.tolist(), "high": high.tolist()}
