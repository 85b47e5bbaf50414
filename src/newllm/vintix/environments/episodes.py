"""Gymnasium environments, one by one, with episodes of a fixed length."""

from __future__ import annotations

from typing import Any

import gymnasium


class CutEpisodes(gymnasium.wrappers.TimeLimit):
    """TimeLimit without the infos, whose collection costs a vector environment more than a small step does."""

    def step(self, action: Any):
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, truncated, {}
