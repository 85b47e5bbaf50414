"""Hidden-goal point reacher: a point mass in the plane that is paid for being near a goal it is not shown.

Observation (4): position and velocity. Action (2): acceleration, each in [−1, 1].

    v' = (1 − damping)·v + acceleration·a        x' = x + v'

Reward: 1 − |x' − goal| / goal_radius in the last `paid_steps` steps of an episode, 0 before. It belongs to the position
that is observed together with it: 1 at the goal, next to 0 at the start, less than 0 on the far side.

Two things make this a problem of learning over episodes. Goals lie on a ring around the start, so whoever does not know
the goal has no better place than the middle, where random play remains as well. And an episode tells where the goal was
only when it is too late to go there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from newllm.vintix import demonstrators
from newllm.vintix.environments.regions import ring

PARAMETERS = ("goal_x", "goal_y")


def draw(held_out: bool, count: int, chance: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
    """(count, 2) goals, of the held-out sectors of the ring or of the others."""
    return ring(held_out, count, chance, options)


def average(options: dict[str, Any]) -> np.ndarray:
    """The middle of all goals."""
    return np.zeros(2)


class PointReacher(VectorEnv):
    """One point mass for each goal, all stepped at once."""

    def __init__(self, goals: np.ndarray, seed: int, options: dict[str, Any]) -> None:
        self.goals, self.options = goals, options
        self.num_envs = len(goals)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = Box(-np.inf, np.inf, (4,), np.float32)
        self.single_action_space = Box(-1, 1, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._chance = np.random.default_rng(seed)
        self.position: np.ndarray = np.zeros((self.num_envs, 2))
        self.velocity: np.ndarray = np.zeros((self.num_envs, 2))
        self.elapsed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begins an episode everywhere; with a seed, the sequence of starting states begins anew."""
        if seed is not None:
            self._chance = np.random.default_rng(seed)
        self._begin()
        return self._observe(), {}

    def step(self, actions: np.ndarray):
        """(n, 2) actions → observation (n, 4), reward (n,), terminated, truncated, info; all episodes end together."""
        accelerations = self.options["acceleration"] * np.clip(actions, -1, 1)
        self.velocity = (1 - self.options["damping"]) * self.velocity + accelerations
        self.position = self.position + self.velocity
        self.elapsed += 1
        paid = self.elapsed > self.options["episode_length"] - self.options["paid_steps"]
        reward = paid * (1 - np.linalg.norm(self.position - self.goals, axis=1) / self.options["goal_radius"][1])
        over = np.full(self.num_envs, self.elapsed == self.options["episode_length"])
        info: dict[str, Any] = {}
        if over[0]:
            info = {"final_obs": self._observe()}
            self._begin()
        return self._observe(), reward, np.zeros_like(over), over, info

    def _begin(self) -> None:
        angle = self._chance.uniform(0, 2 * np.pi, self.num_envs)
        radius = self.options["start_radius"] * np.sqrt(self._chance.uniform(0, 1, self.num_envs))
        self.position = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        self.velocity = self.options["start_speed"] * self._chance.normal(size=(self.num_envs, 2))
        self.elapsed = 0

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.position, self.velocity], axis=1).astype(np.float32)


def make(parameters: np.ndarray, seed: int, options: dict[str, Any]) -> PointReacher:
    return PointReacher(parameters, seed, options)


act = demonstrators.point_reacher
