"""Gymnasium's InvertedPendulum-v5 (MuJoCo) as it is: nothing hidden, and episodes that end when the pole falls.

Observation (4): cart position, pole angle, their velocities. Action (1): force in [−3, 3]. Reward 1 a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from newllm.vintix import demonstrators
from newllm.vintix.environments.episodes import CutEpisodes

PARAMETERS = ()


def draw(held_out: bool, count: int, chance: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
    """(count, 0): all tasks are the same."""
    return np.zeros((count, 0))


def average(options: dict[str, Any]) -> np.ndarray:
    return np.zeros(0)


def make(parameters: np.ndarray, seed: int, options: dict[str, Any]) -> SyncVectorEnv:
    def one():
        return CutEpisodes(InvertedPendulumEnv(), options["episode_length"])

    return SyncVectorEnv([one] * len(parameters), autoreset_mode=AutoresetMode.SAME_STEP)


act = demonstrators.inverted_pendulum
