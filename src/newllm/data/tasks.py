"""Tasks mixed into a text: a share of the optimizer steps trains on a task's windows, the others on the text's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from newllm.data.recall import RecallDataset
from newllm.data.reversal import ReversalDataset
from newllm.data.windows import TaskDataset, WindowDataset
from newllm.settings import CommonSettings

if TYPE_CHECKING:
    from newllm.data.preparation import PreparedData

TASKS: dict[str, type[TaskDataset]] = {"recall_share": RecallDataset, "reversal_share": ReversalDataset}
"""Every task, by the setting that says which share of the optimizer steps it takes."""


def task_shares(settings: CommonSettings) -> dict[str, float]:
    """The tasks that are trained on: setting and share."""
    return {name: share for name in TASKS if (share := getattr(settings, name)) > 0}


def training_tasks(data: PreparedData, settings: CommonSettings, seed: int) -> list[TaskDataset]:
    """Their windows, in the order of `task_shares`. Raises UserError where a task makes none."""
    return [TASKS[name](data, settings, seed) for name in task_shares(settings)]


def task_of_each_step(shares: Sequence[float]) -> Iterator[int | None]:
    """For every optimizer step the task it takes, an index of `shares`, or None for text: each spread evenly.

    A task's turn comes when it is a whole step behind its share; of several, the one furthest behind goes first.
    """
    taken = [0] * len(shares)
    for step in itertools.count(1):
        behind = {t: step * s - taken[t] for t, s in enumerate(shares) if math.floor(step * s) > taken[t]}
        task = max(behind, key=behind.__getitem__, default=None)
        if task is not None:
            taken[task] += 1
        yield task


class WithTasks(Dataset[dict[str, Tensor]]):
    """The windows of a text, and after the last of them (at indices from `len` on) those of K tasks in turn.

    Item n of task k is at len + n K + k.
    """

    def __init__(self, windows: WindowDataset, tasks: Sequence[TaskDataset]) -> None:
        self.windows, self.tasks = windows, tasks

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self):
            return self.windows[index]
        number, task = divmod(index - len(self), len(self.tasks))
        return self.tasks[task][number]

    def expect(self, steps: int, shares: Sequence[float], items_per_step: int) -> None:
        """Announces how many optimizer steps there will be, each task's share, and how many items a step takes."""
        for task, share in zip(self.tasks, shares, strict=True):
            task.expect(int(steps * share), items_per_step)


def stack_windows(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch (B, …) of windows (…), or (ΣR, L) of items that are several windows (R, L) each."""
    join = torch.cat if items[0]["input_ids"].dim() == 2 else torch.stack
    return {name: join([item[name] for item in items]) for name in items[0]}
