"""Gymnasium's Pendulum-v1 with gravity, length and mass of each task hidden.

Observation (3): cosine and sine of the angle from upright, angular velocity. Action (1): torque in [−2, 2]. Reward:
−(angle² + 0.1·velocity² + 0.001·torque²), which must be earned by swinging up and standing.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from newllm.vintix import demonstrators
from newllm.vintix.environments.episodes import CutEpisodes
from newllm.vintix.environments.regions import cells

PARAMETERS = ("gravity", "length", "mass")


def draw(held_out: bool, count: int, chance: np.random.Generator, options: dict[str, Any]) -> np.ndarray:
    """(count, 3) gravity in m/s², length in m, mass in kg; of the held-out cells of the box or of the others."""
    if "fixed" in options:
        return np.tile(np.array(options["fixed"], dtype=float), (count, 1))
    return cells(held_out, count, chance, options)


def average(options: dict[str, Any]) -> np.ndarray:
    """The middle of the box."""
    return np.array(options.get("fixed") or np.mean(options["ranges"], axis=1), dtype=float)


def make(parameters: np.ndarray, seed: int, options: dict[str, Any]) -> SyncVectorEnv:
    def one(gravity: float, length: float, mass: float):
        env = PendulumEnv(g=gravity)
        env.l, env.m = length, mass
        return CutEpisodes(env, options["episode_length"])

    return SyncVectorEnv([functools.partial(one, *row) for row in parameters], autoreset_mode=AutoresetMode.SAME_STEP)


act = demonstrators.pendulum
