"""Every value of a Vintix experiment: each field is a flag of `newllm vintix …` and a key of a YAML config.

One config file serves collect, train and evaluate; each command takes the fields that concern it. No torch import.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from newllm.errors import UserError, flag
from newllm.resolution import check_at_least, check_positive, check_seeds, check_shares
from newllm.settings import Precision

CONFIGS_FOLDER = Path(__file__).parent / "configs"
SEEDS = 2**31
"""Every seed a user gives lies below it; `evaluate.EVALUATION_SEED` is beyond."""


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
        check_at_least(self, 1, "train_tasks", "validation_tasks", "test_tasks", "histories_per_task", "history_steps")
        check_at_least(self, 1, "score_episodes", "group_steps")
        check_seeds("collect_seed", self.collect_seed, SEEDS)
        check_positive(self, "noise_power")
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
    carry_reward: bool = True
    """The first step of an episode sees the last reward of the episode before, which otherwise is never seen."""
    inner_ep_pos_enc: bool = False
    """Add an embedding of the step within its episode."""
    max_episode_steps: int = 1000
    """Size of that embedding's table; later steps take its last entry."""
    dropout: float = 0.1
    """Dropout of attention weights and of what is added to the residual stream."""

    def check_model(self) -> None:
        """Raises UserError for a value out of range, before anything starts."""
        check_at_least(self, 1, "num_layers", "num_heads", "intermediate_size", "context", "max_episode_steps")
        check_shares(self, "dropout")
        if self.hidden_size < 4 or self.hidden_size % 2 or self.hidden_size % self.num_heads:
            raise UserError(
                f"--hidden-size is {self.hidden_size}: it must be even, at least 4, and a multiple of --num-heads "
                f"{self.num_heads}"
            )


@dataclass(kw_only=True)
class VintixTrainSettings:
    """Budget and optimiser; batch and optimiser are by default those of config `small`."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of initialisation, of the order of the data and of dropout; one model for each."""
    control_seeds: list[int] = field(default_factory=list)
    """Seeds of models that are trained in the same way on histories of the demonstrator alone, without noise and so
    without learning: the control. Their histories are collected by the same settings when they are not there yet."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 8
    """Windows in a micro-batch."""
    gradient_accumulation: int = 8
    """Micro-batches in an optimizer step."""
    target: Literal["taken", "demonstrator"] = "taken"
    """What the model learns to answer at a step: the action that was taken there, noise and all (Algorithm
    Distillation, as in the paper), or the one the demonstrator would have taken (as in the Decision-Pretrained
    Transformer, arXiv 2306.14892)."""
    start_share: float = 0.25
    """Share of the windows that begin where their history does, when nothing is known yet and the noise is high."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.005
    """Share of the optimizer steps spent in linear warm-up; a cosine follows."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of the peak learning rate."""
    weight_decay: float = 0.1
    """Weight decay on matrices; none on biases, norms and pads."""
    adam_beta1: float = 0.9
    """First AdamW beta."""
    adam_beta2: float = 0.99
    """Second AdamW beta."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 turns it off."""
    precision: Precision = "auto"
    """Of training: 'auto' is bf16 autocast where the device computes it natively, else float32."""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""
    threads: int | None = None
    """CPU threads for torch; None leaves torch's choice, and shares it among --jobs."""
    jobs: int | None = None
    """Models trained at the same time, each in a process of its own; None: on a CPU as many as there are cores and
    models, on a GPU one."""
    evaluations: int = 8
    """How often a run is measured by playing validation tasks; the best weights are kept."""
    validation_episodes: int = 10
    """Episodes played in each validation task; the score is that of the second half of them."""
    checkpoint_minutes: float = 2.0
    """A checkpoint is written at every evaluation, and at the first point of the loss curve (every hundredth of the
    steps, every 25th at most) that comes so long after the last: a killed run loses little."""

    def check_train(self) -> None:
        """Raises UserError for a value out of range, before anything starts."""
        check_at_least(self, 1, "steps", "batch_size", "gradient_accumulation", "evaluations", "validation_episodes")
        check_at_least(self, 1, "threads", "jobs")
        check_at_least(self, 0, "weight_decay", "max_grad_norm")
        check_shares(self, "warmup_ratio", "min_lr_ratio", "adam_beta1", "adam_beta2")
        if not 0 <= self.start_share <= 1:
            raise UserError(f"--start-share is {self.start_share}: it must lie in [0, 1]")
        check_positive(self, "lr", "checkpoint_minutes")
        for name in ("seeds", "control_seeds"):
            check_seeds(name, getattr(self, name), SEEDS)
            seeds = getattr(self, name)
            if len(set(seeds)) < len(seeds):
                raise UserError(f"{flag(name)} is {seeds}: each seed only once")
        if not self.seeds and not self.control_seeds:
            raise UserError("--seeds is empty: give at least one seed")


@dataclass(kw_only=True)
class VintixEvaluateSettings:
    """What is measured after training."""

    episodes: int = 20
    """Episodes played in each test task, one after the other in one context."""
    headline_episode: int = 10
    """The episode whose score is the report's headline; the first is 1."""
    evaluate_context: int | None = None
    """Steps the model sees when it acts; None: as many as in training."""
    evaluate_seed: int = 0
    """Seed of the starting states of the test tasks and of the bootstrap. Whatever it is, the states are none that
    histories or validation begin in."""
    resamples: int = 2000
    """Bootstrap samples of tasks, and of seeds where there are several, that the 95 % intervals are made of."""
    strip_tasks: int = 3
    """Test tasks whose first and last episode the report draws."""

    def check_evaluate(self) -> None:
        """Raises UserError for a value out of range, before anything starts."""
        check_at_least(self, 1, "episodes", "headline_episode", "resamples", "strip_tasks", "evaluate_context")
        check_seeds("evaluate_seed", self.evaluate_seed, SEEDS)
        if self.headline_episode > self.episodes:
            raise UserError(
                f"--headline-episode is {self.headline_episode}: it must be one of the {self.episodes} --episodes"
            )


@dataclass(kw_only=True)
class VintixSettings(CollectSettings, VintixModelSettings, VintixTrainSettings, VintixEvaluateSettings):
    """All that a config file may hold."""

    def check_evaluate(self) -> None:
        """Also of --threads, which evaluation shares with training."""
        super().check_evaluate()
        check_at_least(self, 1, "threads")


@dataclass(kw_only=True)
class VintixRun(VintixSettings):
    """One model to train."""

    seed: int = 0
    """Seed of initialisation, of the order of the data and of dropout."""
    demonstrator_only: bool = False
    """Whether its histories are without noise: the control."""

    @property
    def name(self) -> str:
        return f"{'demonstrator_only' if self.demonstrator_only else 'seed'}-{self.seed}"

    @property
    def model(self) -> str:
        return "vintix"

    def hash(self, *, training_only: bool = True) -> str:
        """Identifies what the run computes, but for its data. Threads change rounding alone."""
        names = sorted([*training_fields(), "seed", "demonstrator_only"])
        values = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@dataclass(kw_only=True)
class VintixBench(VintixModelSettings):
    """`newllm bench vintix`: the shape is that of config `small`."""

    observation_size: int = 4
    """Numbers of an observation."""
    action_size: int = 2
    """Numbers of an action."""
    environments: int = 32
    """Environments that are acted in at once."""
    laps: list[int] = field(default_factory=lambda: [1, 2, 4])
    """After how many times the context a step is measured: once the ring is full, its time must not grow."""
    rounds: int = 3
    """Rounds; in each, ring and recomputation are measured once at every lap."""
    steps: int = 10
    """Steps of the ring in a round."""
    threads: int | None = None
    """CPU threads for torch; None leaves torch's choice."""
    device: str = "auto"
    """'auto' is cuda where there is one, else cpu."""

    def check(self) -> None:
        """Raises UserError for a value out of range, before anything starts."""
        self.check_model()
        check_at_least(self, 1, "observation_size", "action_size", "environments", "rounds", "steps", "threads")
        if not self.laps or min(self.laps) < 1:
            raise UserError(f"--laps is {self.laps}: give whole numbers of at least 1")


def model_values(settings: VintixModelSettings) -> dict[str, Any]:
    """The fields of VintixModelSettings alone, by name."""
    return {f.name: getattr(settings, f.name) for f in fields(VintixModelSettings)}


def training_fields() -> list[str]:
    """Names of the fields that decide what training computes, from a seed and from histories."""
    names = [f.name for cls in (VintixModelSettings, VintixTrainSettings) for f in fields(cls)]
    return [name for name in names if name not in ("seeds", "control_seeds", "checkpoint_minutes", "threads", "jobs")]


def collect_values(settings: CollectSettings) -> dict[str, Any]:
    """What the histories depend on, by name: the fields of CollectSettings alone."""
    return {f.name: getattr(settings, f.name) for f in fields(CollectSettings)}
