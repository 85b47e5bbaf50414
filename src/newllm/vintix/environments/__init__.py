"""Families of tasks that differ in something the observation does not tell: a goal, or the laws of motion.

A family is a file of `families/`: its kind (a module of this package) and that kind's options. Each family has three
sets of tasks, numbered through: train, validation (drawn like train, for choosing checkpoints) and test (held out, from
another region of the hidden parameters).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from newllm.errors import nearest
from newllm.vintix import require
from newllm.vintix.settings import CollectSettings

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

FAMILIES_FOLDER = Path(__file__).parent.parent / "families"
SPLITS = ("train", "validation", "test")

Policy = Callable[[np.ndarray], np.ndarray]
"""Observations (n, do) of n environments to actions (n, da), inside the action box."""


@dataclass(frozen=True)
class TaskFamily:
    """Tasks that share their spaces and differ in hidden parameters.

    `make(task_ids, seed)` gives a `gymnasium.vector.VectorEnv` with one environment for each task id, in that order
    (the same id may come several times). It resets itself in the step that ends an episode (`AutoresetMode.SAME_STEP`):
    the observation returned with terminated or truncated is the first of the next episode.
    """

    name: str
    options: dict[str, Any]
    """The family's file; 'kind' is the module."""
    counts: dict[str, int]
    """Number of tasks in each split."""
    task_seed: int
    parameter_names: tuple[str, ...]
    parameters: np.ndarray
    """(tasks, k) hidden parameters of all tasks, train first, then validation, then test."""
    average: np.ndarray
    """(k,) what somebody would believe who knows the family and not the task."""
    observation_size: int
    action_size: int
    action_low: np.ndarray
    action_high: np.ndarray
    """(da,) the action box."""

    @property
    def episode_length(self) -> int:
        """Steps after which an episode is cut."""
        return self.options["episode_length"]

    def task_ids(self, split: str) -> np.ndarray:
        """The ids of 'train', 'validation' or 'test'."""
        before = sum(self.counts[name] for name in SPLITS[: SPLITS.index(split)])
        return np.arange(before, before + self.counts[split])

    def make(self, task_ids: np.ndarray, seed: int) -> VectorEnv:
        """A vector environment over these tasks; reset() begins as `seed` says."""
        return _kind(self.options).make(self.parameters[task_ids], seed, self.options)

    def demonstrator(self, task_ids: np.ndarray) -> Policy:
        """The policy that knows the hidden parameters of these tasks."""
        parameters = self.parameters[task_ids]
        return lambda observation: _kind(self.options).act(observation, parameters, self.options)

    def blind(self, task_ids: np.ndarray) -> Policy:
        """The demonstrator that takes every task for the average one: what is possible without learning the task."""
        parameters = np.repeat(self.average[None], len(task_ids), axis=0)
        return lambda observation: _kind(self.options).act(observation, parameters, self.options)

    def spec(self) -> dict[str, Any]:
        """JSON from which `from_spec` makes the same tasks again."""
        return {"name": self.name, "options": self.options, "counts": self.counts, "task_seed": self.task_seed}


def family_names() -> list[str]:
    return sorted(path.stem for path in FAMILIES_FOLDER.glob("*.yaml"))


def task_family(settings: CollectSettings) -> TaskFamily:
    """The family of the settings. Raises UserError for an unknown one, or where a package it needs is not installed."""
    path = FAMILIES_FOLDER / f"{settings.environment}.yaml"
    if settings.environment not in family_names():
        raise nearest(settings.environment, family_names(), "environment")
    counts = {split: getattr(settings, f"{split}_tasks") for split in SPLITS}
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    return from_spec(
        {"name": settings.environment, "options": options, "counts": counts, "task_seed": settings.collect_seed}
    )


def from_spec(spec: dict[str, Any]) -> TaskFamily:
    """The family that `TaskFamily.spec` described."""
    options, counts = spec["options"], spec["counts"]
    kind = _kind(options)
    parameters = [
        kind.draw(split == "test", counts[split], np.random.default_rng([spec["task_seed"], index]), options)
        for index, split in enumerate(SPLITS)
    ]
    env = kind.make(parameters[0][:1], 0, options)
    low, high = env.single_action_space.low, env.single_action_space.high
    observation_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    env.close()
    return TaskFamily(
        **spec,
        parameter_names=tuple(kind.PARAMETERS),
        parameters=np.concatenate(parameters),
        average=kind.average(options),
        observation_size=observation_size,
        action_size=action_size,
        action_low=low,
        action_high=high,
    )


def _kind(options: dict[str, Any]) -> Any:
    """The module of a family: PARAMETERS, draw, average, make, act."""
    gymnasium = require("gymnasium")
    try:
        return importlib.import_module(f"{__name__}.{options['kind']}")
    except gymnasium.error.DependencyNotInstalled:  # Gymnasium alone has no MuJoCo
        require("mujoco")
        raise
