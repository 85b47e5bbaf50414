"""Scripted demonstrators: for each kind of environment, the action of somebody who knows the hidden parameters.

All are pure functions: observation (n, do), parameters (n, k), options → action (n, da) inside the action box.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def point_reacher(observation: np.ndarray, goals: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Heads for the goal as fast as can still be braked, v = √(2·a·distance), and for `gain` of a short rest at once."""
    position, velocity = observation[:, :2], observation[:, 2:]
    gap = goals - position
    distance = np.linalg.norm(gap, axis=1, keepdims=True)
    speed = np.minimum(options["gain"] * distance, np.sqrt(2 * options["acceleration"] * distance))
    wanted = gap / np.maximum(distance, 1e-9) * speed
    return np.clip((wanted - (1 - options["damping"]) * velocity) / options["acceleration"], -1, 1)
