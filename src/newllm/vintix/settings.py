"""Every value of a Vintix experiment: each field is a flag of `newllm vintix …` and a key of a YAML config.

One config file serves collect, train and evaluate; each command takes the fields that concern it. No torch import.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from newllm.settings import UserError

CONFIGS_FOLDER = Path(__file__).parent / "configs"


@dataclass(kw_only=True)
class CollectSettings:
    """Which tasks, and how their learning histories are made."""

    environment: str = "point_reacher"
    """Family of tasks: a file of vintix/families, such as point_reacher, reacher or pendulum."""
    train_tasks: int = 1024
    """Tasks whose histories are collected."""
    validation_tasks: int = 32
    """Further tasks of the training region, without histories: checkpoints are chosen by the return on them."""
    test_tasks: int = 64
    """Tasks of the held-out region: for evaluation only."""
    histories_per_task: int = 1
    """Learning histories collected from each training task."""
    history_steps: int = 1000
    """Steps N of a history, over which its noise goes from 1 to 0."""
    noise_power: float = 1.0
    """Exponent p of the noise ε(n) = (1 − (n / ((1 − f)N))^p)^(1/p): above 1 the noise stays high for longer."""
    noise_free_share: float = 0.1
    """Share f of a history, its end, that the demonstrator plays without noise; 1 gives demonstrator-only data."""
    score_episodes: int = 20
    """Episodes over which the random and demonstrator return of each task is measured."""
    group_steps: int = 10000
    """Steps in an HDF5 group of a history file."""
    collect_seed: int = 0
    """Seed of the tasks, of their starting states and of the noise."""

    def check_collect(self) -> None:
        """Raises UserError for a value out of range, before anything starts."""
        for name in ("train_tasks", "validation_tasks", "test_tasks", "histories_per_task", "history_steps"):
            _at_least(self, name, 1)
        for name in ("score_episodes", "group_steps"):
            _at_least(self, name, 1)
        if not self.noise_power > 0:
            raise UserError(f"--noise-power is {self.noise_power}: it must be greater than 0")
        if not 0 <= self.noise_free_share <= 1:
            raise UserError(f"--noise-free-share is {self.noise_free_share}: it must lie in [0, 1]")


@dataclass(kw_only=True)
class VintixModelSettings:
    """The model; the defaults are those of config `small`."""

    hidden_size: int = 256
    """Width D of the residual stream."""
    num_layers: int = 3
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads."""
    intermediate_size: int = 128
    """Width of the MLP."""
    context: int = 2048
    """Steps the model sees, in training and when it acts."""


@dataclass(kw_only=True)
class VintixTrainSettings:
    """Budget and optimiser; the defaults are those of config `small`."""

    seed: int = 0
    """Seed of initialisation, of the order of the data and of dropout."""


@dataclass(kw_only=True)
class VintixEvaluateSettings:
    """What is measured after training."""

    episodes: int = 10
    """Episodes played in each test task, one after the other in one context."""


@dataclass(kw_only=True)
class VintixSettings(CollectSettings, VintixModelSettings, VintixTrainSettings, VintixEvaluateSettings):
    """All that a config file may hold."""


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS_FOLDER.glob("*.yaml"))


def _at_least(settings: object, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value < least:
        raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")


def collect_values(settings: CollectSettings) -> dict[str, object]:
    """What the histories depend on, by name: the fields of CollectSettings alone."""
    return {field.name: getattr(settings, field.name) for field in fields(CollectSettings)}
