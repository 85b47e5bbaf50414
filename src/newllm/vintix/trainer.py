"""The trainer of action models: data in the order of their indices, weights chosen by play."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerControl, TrainerState, TrainingArguments

from newllm.devices import resolve_precision
from newllm.errors import UserError
from newllm.training.callbacks import MetricsCallback, Schedule, ScheduledFlow
from newllm.training.exact import ExactTrainer, common_arguments
from newllm.vintix.model import VintixModel
from newllm.vintix.settings import VintixRun


@dataclass(frozen=True)
class VintixProgress:
    """Where a run stands when it has been measured."""

    run: str
    step: int
    total_steps: int
    loss: float
    """Mean squared error over the last log window."""
    score: float
    """In-context score on the validation tasks."""
    seconds_left: float


class VintixFlow(ScheduledFlow):
    """The flow of an action model: ends as well where the loss or the score is not finite."""

    def __init__(self, run: VintixRun) -> None:
        super().__init__(Schedule.evenly(run.steps, run.evaluations), run.checkpoint_minutes)
        self.run = run

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if not math.isfinite(entry.get("loss", 0.0)):
            raise UserError(
                f"{self.run.name}: the training loss is {entry['loss']} at step {state.global_step} "
                f"(lr {self.run.lr:g}): try a lower --lr or --precision float32; the last checkpoint is kept"
            )
        if not math.isfinite(entry.get("eval_score", 0.0)):
            raise UserError(
                f"{self.run.name}: the in-context score is {entry['eval_score']} at step {state.global_step}: play in "
                "the validation tasks gives returns that are not finite; collect the histories again into a new folder"
            )


class VintixTrainer(ExactTrainer):
    """`score()` measures the model, and higher is better."""

    model: VintixModel

    def __init__(
        self,
        run: VintixRun,
        score: Callable[[VintixModel], float],
        on_progress: Callable[[VintixProgress], None] | None,
        folder: Path,
        **kwargs: Any,
    ) -> None:
        args = training_arguments(run, folder)
        precision = resolve_precision(run.precision, args.device)
        super().__init__(flow=VintixFlow(run), precision=precision, args=args, **kwargs)
        self.run_settings, self.score, self.on_progress = run, score, on_progress
        self.add_callback(MetricsCallback(folder / "metrics.jsonl"))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        """Item i of the data is a random window as it is: the order needs no chance of its own."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def measure(self) -> dict[str, float]:
        """The score on validation tasks, in the place where the Trainer expects a validation loss."""
        return {"eval_score": self.score(self.model)}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate()
        if self.on_progress is not None:
            step, total = self.state.global_step, self.run_settings.steps
            seconds = (time.monotonic() - self.started) / (step - self.first_step)
            loss = next(entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry)
            left = seconds * (total - step)
            self.on_progress(VintixProgress(self.run_settings.name, step, total, loss, metrics["eval_score"], left))
        return metrics


def training_arguments(run: VintixRun, folder: Path) -> TrainingArguments:
    return common_arguments(
        run, folder, run.steps, metric_for_best_model="score", greater_is_better=True, report_to="none"
    )
