"""Gymnasium's Reacher-v5 (MuJoCo) with its goal fixed for each task and taken out of the observation.

Observation (6): cosines and sines of both joint angles, both joint velocities. Action (2): torques in [−1, 1]. Reward:
−|fingertip − goal| − reward_control_weight·|action|². At Gymnasium's weight of 1 random torques cost several times what
any goal is worth, and standing still would already score near the demonstrator.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from newllm.vintix import demonstrators
from newllm.vintix.environments.episodes import CutEpisodes
from newllm.vintix.environments.regions import ring

PARAMETERS = ("goal_x", "goal_y")
STATE = [0, 1, 2, 3, 6, 7]
"""What Reacher-v5 observes of the arm; 4 and 5 are the goal, 8 and 9 the way to it."""


def draw(held_out: bool, count: int, chance: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
    """(count, 2) goals in metres, of the held-out sectors of the ring or of the others."""
    return ring(held_out, count, chance, options)


def average(options: dict[str, Any]) -> np.ndarray:
    """The middle of all goals."""
    return np.zeros(2)


class HiddenGoalReacher(ReacherEnv):
    """Reacher-v5 with one goal for all episodes, which is not observed."""

    def __init__(self, goal: np.ndarray, reward_control_weight: float) -> None:
        self.goal = goal
        super().__init__(reward_control_weight=reward_control_weight)
        self.observation_space = Box(-np.inf, np.inf, (len(STATE),), np.float32)

    def reset_model(self) -> np.ndarray:
        """As Reacher-v5 begins, but for the goal."""
        positions = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        velocities = self.init_qvel + self.np_random.uniform(-0.005, 0.005, self.model.nv)
        positions[-2:], velocities[-2:] = self.goal, 0
        self.set_state(positions, velocities)
        return self._get_obs()

    def _get_obs(self) -> np.ndarray:
        return super()._get_obs()[STATE].astype(np.float32)


def make(parameters: np.ndarray, seed: int, options: dict[str, Any]) -> SyncVectorEnv:
    def one(goal: np.ndarray):
        return CutEpisodes(HiddenGoalReacher(goal, options["reward_control_weight"]), options["episode_length"])

    return SyncVectorEnv([functools.partial(one, goal) for goal in parameters], autoreset_mode=AutoresetMode.SAME_STEP)


act = demonstrators.reacher
