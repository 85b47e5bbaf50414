"""Steps of Lagged Cache Training as a worker takes them: those of a second or later epoch, which has states to read."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm.models.recurrent import RecurrentLM
from newllm.settings import RunSettings
from newllm.training.lagged_cache import LaggedTraining, is_deep


class LaggedSteps:
    """The losses of a run's ordinary and deeper steps, each asked for by itself.

    Every batch is taken for the same windows: but for the very first, all of them find states that were kept.
    """

    def __init__(self, model: RecurrentLM, batch_size: int, seq_length: int, settings: dict[str, Any]) -> None:
        """settings: those of a run that say how it is trained; its states stay in memory, whatever they say."""
        run = RunSettings(seq_length=seq_length, **settings | {"lagged_memory": math.inf})
        self.model, self.samples = model, torch.arange(batch_size)
        self.training = LaggedTraining(model, run, batch_size, Path())
        self.share = run.lagged_deep_share

    def loss(self, ids: Tensor, deep: bool) -> Tensor:
        """Of (B, T) tokens in an ordinary step or, where the settings have such, in a deeper one."""
        step = next(step for step in itertools.count() if is_deep(step, self.share) == deep)
        return self.training.loss({"input_ids": ids, "labels": ids, "sample": self.samples}, step, None)

    @torch.no_grad()
    def discrete(self, ids: Tensor) -> Tensor:
        """The pass that gives (B, T) tokens their first states, before the first step on them."""
        return self.model.first_states(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
